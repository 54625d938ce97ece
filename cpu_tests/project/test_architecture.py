"""The layering and the budgets of the package, read from its source.

See docs/explanation/architecture.md. Each rule is also run on a small sample that breaks it, so that a rule which
stopped looking would be noticed.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support import each

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "memevolve_gpu"

LAYERS = [
    {"__main__"},
    {"cli", "demo", "dropin", "server"},
    {"integrations"},
    {"health_hook", "async_api"},
    {"memory_system"},
    {"backends"},
    {"components", "milvus"},
    {"live"},
    {"training", "planner", "monitoring"},
    {"records", "index", "devices"},
    {"utils"},
    {"types", "errors"},
]
"""Packages from the top down. A package sees itself and those of lower layers; the top of the package sees them all."""

NEIGHBOURLY = [{"cli", "server"}, {"components", "milvus"}, {"training", "planner", "monitoring"}, {"types", "errors"}]
"""Layers whose packages may see each other, as long as no circle comes of it."""

ENGINES = {
    "anyio",
    "chromadb",
    "cupy",
    "faiss",
    "fastapi",
    "fastembed",
    "grpc",
    "haystack",
    "httpx",
    "lancedb",
    "langchain_core",
    "langgraph",
    "llama_index",
    "mcp",
    "mem0",
    "openai",
    "opentelemetry",
    "prometheus_client",
    "pyarrow",
    "pymilvus",
    "pynvml",
    "qdrant_client",
    "sentence_transformers",
    "starlette",
    "torch",
    "triton",
    "uvicorn",
}
"""Imported only inside functions: they are optional, slow to load, or fail when half installed."""

BASES = {
    "integrations/haystack": {"haystack"},
    "integrations/langchain": {"langchain_core"},
    "integrations/langgraph": {"langgraph"},
    "integrations/llama_index": {"llama_index"},
    "integrations/mem0": {"mem0"},
    "server/access": {"anyio", "fastapi", "prometheus_client", "starlette"},
    "server/app": {"fastapi", "prometheus_client", "starlette"},
    "server/client": {"httpx"},
    "server/metrics": {"opentelemetry", "prometheus_client"},
    "server/routes": {"fastapi", "starlette"},
    "server/searching": {"fastapi", "starlette"},
    "server/ui": {"fastapi", "starlette"},
}
"""Modules made of what is optional: they are imported by nobody but those who have it."""

PICKLING = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
LEGACY = "components/store/legacy_import.py"
CONFIG = "utils/config.py"
HANDING_ON = "demo/corruption.py"
"""Hands the environment on to a child process, without settings, and reads none."""

ANY_ERROR_ALLOWED = {
    "utils/embeddings/adapter.py": "the embedding function is the user's and may raise anything",
    "server/access.py": "what a call in another thread raises is given to its caller",
    "memory_system.py": "a callback is the user's; what it is told of is done and stays done",
}
"""Files with a handler for every exception, and why."""

MOST_ANY = {"components": 25, "index": 25, "integrations": 70, "server": 35, "utils": 25}
"""Most uses of ``Any`` in a package, 15 in all others: libraries and frameworks without types, SQL rows, and arguments
that are handed on. What callers give is ``object`` until it is checked; JSON, filters, vectors and tensors have names
in ``types.py``."""

MOST_LINES_IN_FILE = 900
MOST_LINES_IN_FUNCTION = 60


class Module:
    """One source file: its path, the package it is in and its syntax tree."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self.tree = ast.parse(source)
        self.nodes = list(ast.walk(self.tree))
        self.parts = Path(name).with_suffix("").parts
        self.package = self.parts[0]

    def imports(self) -> Iterator[tuple[ast.stmt, str, bool]]:
        """Yield (statement, dotted name, relative) for every import; relative ones are resolved below the package."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node, alias.name, False
            elif isinstance(node, ast.ImportFrom) and node.level:
                base = [*self.parts[: len(self.parts) - node.level], *(node.module or "").split(".")]
                names = [".".join(filter(None, base))] if node.module else [alias.name for alias in node.names]
                for name in names:
                    yield node, ".".join(filter(None, [*([] if node.module else base), name])), True
            elif isinstance(node, ast.ImportFrom):
                yield node, node.module or "", False


def modules() -> list[Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [Module(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


MODULES = modules()


def layer(package: str) -> int:
    """The number of the package's layer; -1, above all, for the top of the package and modules outside it."""
    return next((number for number, packages in enumerate(LAYERS) if package in packages), -1)


def upward_imports(module: Module) -> list[str]:
    if module.name == "__init__.py":
        return []
    return [
        f"{module.name}:{node.lineno} imports {target}"
        for node, target, relative in module.imports()
        if relative and not may_see(module.package, target.split(".")[0])
    ]


def may_see(package: str, other: str) -> bool:
    return (
        package == other or layer(other) > layer(package) or any({package, other} <= layer_ for layer_ in NEIGHBOURLY)
    )


def absolute_imports_of_ours(module: Module) -> list[str]:
    return [
        f"{module.name}:{node.lineno} imports {target}"
        for node, target, relative in module.imports()
        if not relative and target.split(".")[0] == "memevolve_gpu"
    ]


def engine_imports_with_the_module(module: Module) -> list[str]:
    """Whatever runs when the module is imported: everything but the insides of functions."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _is_type_checking(node):
            return
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        foreign = ENGINES - BASES.get("/".join(module.parts[:2]), set())
        found.extend(f"{module.name} imports {name}" for name in names if name.split(".")[0] in foreign)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(module.tree)
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def environment_reads(module: Module) -> list[str]:
    if module.name in {CONFIG, HANDING_ON}:
        return []
    reading = {"environ", "environb", "getenv", "getenvb", "load_dotenv", "dotenv_values", "find_dotenv"}
    found = []
    for node in module.nodes:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if isinstance(node, ast.alias):
            name = node.name
        if name in reading:
            found.append(f"{module.name}:{getattr(node, 'lineno', 0)} {name}")
    return found


def pickling(module: Module) -> list[str]:
    if module.name == LEGACY:
        return []
    found = [f"{module.name}:{node.lineno} {name}" for node, name, _ in module.imports() if name in PICKLING]
    keywords = [node for node in module.nodes if isinstance(node, ast.keyword) and node.arg == "allow_pickle"]
    return found + [f"{module.name} allow_pickle" for node in keywords if ast.unparse(node.value) != "False"]


def blanket_handlers(module: Module) -> list[str]:
    """Handlers for every exception; one that tidies up and ends with a bare ``raise`` swallows nothing."""
    if module.name in ANY_ERROR_ALLOWED:
        return []
    return [
        f"{module.name}:{node.lineno} except {ast.unparse(node.type) if node.type else ''}"
        for node in module.nodes
        if isinstance(node, ast.ExceptHandler)
        and _catches_everything(node.type)
        and ast.unparse(node.body[-1]) != "raise"
    ]


def _catches_everything(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(one is None or (isinstance(one, ast.Name) and one.id in ("Exception", "BaseException")) for one in kinds)


def asserts(module: Module) -> list[str]:
    return [f"{module.name}:{node.lineno} assert" for node in module.nodes if isinstance(node, ast.Assert)]


def long_files(module: Module) -> list[str]:
    lines = len(module.source.splitlines())
    return [f"{module.name}: {lines} lines"] if lines >= MOST_LINES_IN_FILE else []


def function_lengths(module: Module) -> Iterator[tuple[int, str]]:
    """Yield (lines without the docstring, place) of every function."""
    for node in module.nodes:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            text = node.body[0]
            lines -= (text.end_lineno or text.lineno) - text.lineno + 1
        yield lines, f"{module.name}:{node.lineno} {node.name}: {lines} lines"


def long_functions(module: Module) -> list[str]:
    return [place for lines, place in function_lengths(module) if lines > MOST_LINES_IN_FUNCTION]


BREAKING = {
    upward_imports: ("records/log.py", "def f():\n    from ..index import base\n"),
    absolute_imports_of_ours: ("live/a.py", "from memevolve_gpu.errors import MemEvolveError\n"),
    engine_imports_with_the_module: ("index/a.py", "try:\n    import faiss.contrib\nexcept ImportError:\n    pass\n"),
    environment_reads: ("live/a.py", "from os import environ\n"),
    pickling: ("live/a.py", "import numpy as np\nnp.load('x', allow_pickle=True)\n"),
    blanket_handlers: ("live/a.py", "try:\n    pass\nexcept (ValueError, Exception):\n    pass\n"),
    asserts: ("live/a.py", "def f(x):\n    assert x\n"),
    long_files: ("live/a.py", "x = 1\n" * MOST_LINES_IN_FILE),
    long_functions: ("live/a.py", "def f():\n" + "    x = 1\n" * MOST_LINES_IN_FUNCTION),
}
RULES = list(BREAKING)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: object) -> None:
    assert callable(rule)
    assert [place for module in MODULES for place in rule(module)] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_what_breaks_it(rule: object) -> None:
    assert callable(rule)
    assert rule(Module(*BREAKING[rule]))


@each(
    ("name", "source", "breaks"),
    [
        ("records/a.py", "from .. import index\n", True),
        ("records/a.py", "from ..errors import StorageError\n", False),
        ("records/deep/a.py", "from ...index.base import Body\n", True),
        ("records/deep/a.py", "from ..log import Log\n", False),
        ("index/a.py", "from ..records.log import Log\n", True),
        ("index/a.py", "from ..devices.host import available_memory\n", True),
        ("planner/a.py", "from ..live.view import View\n", True),
        ("live/a.py", "from ..records.log import Log\nfrom ..index.base import Body\n", False),
        ("components/store/vector_store.py", "from ...live.live import Live\n", False),
        ("components/store/vector_store.py", "from ...memory_system import MemorySystem\n", True),
        ("utils/a.py", "from ..devices import host\n", True),
        ("errors.py", "from .utils import config\n", True),
        ("live/a.py", "from .. import __version__\n", True),
        ("monitoring/events.py", "from ..planner import nlist_for\n", False),
        ("memory_system.py", "from .components.store import VectorStore\n", False),
        ("memory_system.py", "from .cli import main\n", True),
        ("cli/main.py", "from ..memory_system import MemorySystem\nfrom .console import out\n", False),
        (
            "integrations/langchain/store.py",
            "from ...components.store import VectorStore\nfrom .filters import parse\n",
            False,
        ),
        ("integrations/langchain/store.py", "from ...cli import main\n", True),
        ("components/a.py", "from ..integrations.langchain import MemEvolveVectorStore\n", True),
    ],
)
def test_layering_of_samples(name: str, source: str, *, breaks: bool) -> None:
    assert bool(upward_imports(Module(name, source))) is breaks


@pytest.mark.parametrize(
    ("name", "found"),
    [("integrations/langchain/a.py", 0), ("components/a.py", 1), ("memory_system.py", 1), ("__init__.py", 1)],
)
def test_langchain_is_imported_with_its_own_package_only(name: str, found: int) -> None:
    source = "from langchain_core.documents import Document\n"
    assert len(engine_imports_with_the_module(Module(name, source))) == found


def test_nobody_imports_a_package_that_needs_what_is_optional() -> None:
    named = {(module.name, target) for module in MODULES for _, target, relative in module.imports() if relative}
    outside = {name for name, target in named if target.startswith("integrations") and not name.startswith("integr")}
    assert outside <= {
        "cli/read_commands.py",
        "cli/serve_commands.py",
        "cli/write_commands.py",
        "server/app.py",
    }  # inside a command


def test_packages_do_not_import_in_circles() -> None:
    sees: dict[str, set[str]] = {}
    for module in MODULES:
        packages = {target.split(".")[0] for _, target, relative in module.imports() if relative}
        sees.setdefault(module.package, set()).update(packages - {module.package})
    graphlib.TopologicalSorter(sees).prepare()  # raises CycleError


def test_any_stays_where_there_are_no_types() -> None:
    uses = Counter(
        module.package for module in MODULES for node in module.nodes if isinstance(node, ast.Name) and node.id == "Any"
    )
    assert {package: count for package, count in uses.items() if count > MOST_ANY.get(package, 15)} == {}


def test_every_package_has_a_layer() -> None:
    packages = {module.package for module in MODULES} - {"__init__"}
    assert packages <= set().union(*LAYERS)


def declared() -> set[str]:
    """Import names of the base dependencies and of every engine."""
    return {
        "numpy",
        "apsw",
        "pydantic",
        "pydantic_core",
        "pydantic_settings",
        "re2",
        "rich",
        "snowballstemmer",
        "typer",
    } | ENGINES


def test_nothing_is_imported_that_is_not_declared() -> None:
    foreign: Iterable[tuple[str, str]] = (
        (module.name, target.split(".")[0])
        for module in MODULES
        for _, target, relative in module.imports()
        if not relative
    )
    allowed = set(sys.stdlib_module_names) | declared() | {"memevolve"}
    assert [(name, target) for name, target in foreign if target not in allowed] == []


def test_every_exemption_is_still_needed() -> None:
    names = {module.name for module in MODULES}
    for name in ANY_ERROR_ALLOWED:
        assert name in names


def test_the_architecture_page_draws_and_lists_the_layers() -> None:
    text = (PACKAGE.parents[1] / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    existing = {module.parts[0] for module in MODULES}
    layers = [packages for packages in LAYERS if packages != {"__main__"}]  # one line that calls cli
    expected = {number: packages & existing for number, packages in enumerate(layers, 1)}
    drawn = {int(number): set(re.findall(r"\w+", names)) for number, names in re.findall(r"│ +(\d+) │([^│]+)│", text)}
    assert drawn == expected
    listed: dict[int, set[str]] = {}
    for number, package, sentence in re.findall(r"(?m)^\| (\d+) \| `(\w+)` \| (.+) \|$", text):
        listed.setdefault(int(number), set()).add(package)
        assert sentence.endswith(".")
    assert listed == expected
