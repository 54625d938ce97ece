"""The project's files held to each other and to the code: settings, commands, links, environments, the wheel."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import STAND_IN, each

import memevolve_gpu
from memevolve_gpu.utils.config import EmbeddingConfig, MilvusConfig, StorageConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "memevolve_gpu"
CONFIGS = (StorageConfig, MilvusConfig, EmbeddingConfig)
NOT_OURS = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__"}
MADE_HERE = {"demo", "dist", "build"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(read("pyproject.toml"))["project"]
    return found


def files() -> Iterator[Path]:
    """Every file of the checkout that is not made by a tool."""
    for folder, folders, names in os.walk(ROOT):
        top = Path(folder) == ROOT
        folders[:] = [name for name in folders if name not in NOT_OURS and not (top and name in MADE_HERE)]
        yield from (Path(folder) / name for name in names if name not in NOT_OURS)  # .git of a worktree is a file


def documents() -> list[Path]:
    return [path for path in files() if path.suffix == ".md"]


def settings() -> dict[str, tuple[Any, str]]:
    """Variable to (configuration, setting), first names only."""
    return {config.prefix + name.upper(): (config, name) for config in CONFIGS for name in config.model_fields}


def shown(config: Any, name: str) -> str:
    """A default as a settings file writes it."""
    value = config.model_fields[name].default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "/".join(value)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# Settings


def example_settings() -> dict[str, tuple[str, list[str]]]:
    """Variable to (value, comment lines above it) of .env.example."""
    found: dict[str, tuple[str, list[str]]] = {}
    above: list[str] = []
    for line in read(".env.example").splitlines():
        if match := re.fullmatch(r"#?(MEMEVOLVE_\w+)=(.*)", line):
            found[match[1]] = (match[2], above)
            above = []
        else:
            above = [*above, line] if line.startswith("# ") else []
    return found


def test_the_example_file_names_every_setting_and_no_other() -> None:
    assert list(example_settings()) == sorted(example_settings(), key=list(example_settings()).index)
    assert set(example_settings()) == set(settings())


def test_the_example_file_sets_nothing_until_edited() -> None:
    assert [line for line in read(".env.example").splitlines() if line and not line.startswith("#")] == []


@each("variable", sorted(settings()))
def test_the_example_file_shows_default_meaning_and_what_is_allowed(variable: str) -> None:
    config, name = settings()[variable]
    value, above = example_settings()[variable]
    assert value == shown(config, name)
    assert above[-1] == f"# Allowed: {config.allowed(name)}"
    assert len(" ".join(above[:-1])) > 20


def test_the_example_file_with_every_line_taken_is_the_default(tmp_path: Path) -> None:
    taken = tmp_path / "taken.env"
    taken.write_text(re.sub(r"(?m)^#(?=MEMEVOLVE_)", "", read(".env.example")), encoding="utf-8")
    for config in CONFIGS:
        assert config(_env_file=taken) == config(_env_file=None)
    assert "max_memory_units" in StorageConfig(_env_file=taken).model_fields_set


def test_the_configuration_document_has_every_setting_with_its_default() -> None:
    sections = re.findall(
        r"(?m)^### (\w+)\n\nDefault: (.+?)\. Allowed: (.+)\.$", read("docs/reference/configuration.md")
    )
    expected = {
        (variable, f"`{shown(config, name)}`" if shown(config, name) else "none", config.allowed(name))
        for variable, (config, name) in settings().items()
    }
    assert set(sections) == expected
    assert len(sections) == len(expected)


def test_documents_name_only_variables_that_exist() -> None:
    known = {variable for config in CONFIGS for variable in config.variables()}
    known |= {config.prefix + name.upper() for config in CONFIGS for name in config.foreign}
    for path in [*documents(), ROOT / ".env.example"]:
        named = set(re.findall(r"MEMEVOLVE_(?:STORAGE|MILVUS|EMBEDDING)_\w+", path.read_text(encoding="utf-8")))
        assert named <= known, path.name


def test_second_names_are_documented() -> None:
    for config in CONFIGS:
        for name in config.aliases:
            for document in (".env.example", "docs/reference/configuration.md"):
                assert config.prefix + name.upper() in read(document)


# The command line


def table_after(heading: str, text: str) -> list[list[str]]:
    """Rows of the first table below a line that starts with ``heading``."""
    rows = text[text.index(heading) :].splitlines()
    start = next(number for number, row in enumerate(rows) if row.startswith("|"))
    found = []
    for row in rows[start + 2 :]:
        if not row.startswith("|"):
            break
        found.append([cell.strip().strip("`") for cell in row.strip("|").split("|")])
    return found


def commands() -> set[str]:
    from typer.main import get_command

    from memevolve_gpu import cli

    return set(get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_the_command_line_page_lists_the_commands() -> None:
    rows = table_after("| command |", read("docs/reference/cli.md"))
    assert {row[0] for row in rows} == commands()


def test_the_command_line_page_lists_the_exit_codes() -> None:
    from memevolve_gpu.cli.app import MEANING

    rows = table_after("| code |", read("docs/reference/cli.md"))
    assert [(int(code), meaning) for code, meaning in rows] == [(int(code), text) for code, text in MEANING.items()]


def test_documents_and_scripts_use_only_commands_that_exist() -> None:
    for path in [*documents(), ROOT / "scripts" / "demo"]:
        text = path.read_text(encoding="utf-8")
        used = set(re.findall(r"(?m)(?:^|`)memevolve-store ([a-z]+)", text))
        assert used <= commands(), path.name


# README


def python_of(name: str) -> list[str]:
    return re.findall(r"(?s)```python\n(.*?)```", read(name))


def run_python_of(name: str, folder: Path) -> str:
    """Run a document's Python as one program in an empty folder; return what it prints."""
    program = folder / "program.py"
    program.write_text("\n".join(python_of(name)), encoding="utf-8")
    if importlib.util.find_spec("sentence_transformers") is None:
        (folder / "sentence_transformers.py").write_text(STAND_IN, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (block,) = python_of("README.md")
    assert len([line for line in block.splitlines() if line]) <= 8
    assert "LocalEmbedder" in block
    first, second = run_python_of("README.md", tmp_path).splitlines()
    assert re.fullmatch(r"0\.\d\d git bisect finds the commit that broke a test\.", first)
    assert second == "[]"


def test_the_python_of_the_tutorial_runs(tmp_path: Path) -> None:
    assert len(python_of("docs/tutorial/index.md")) >= 5
    lines = run_python_of("docs/tutorial/index.md", tmp_path).splitlines()
    assert lines[0] == "['unit_0', 'unit_1']"
    assert lines[-3:] == ["2 True", "2 of 50000 units; nothing to do", "[]"]
    assert "git worktree checks out a second branch." in lines


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 120


def test_the_readme_goes_in_the_order_of_a_newcomers_questions() -> None:
    text = read("README.md")
    assert re.findall(r"(?m)^## (.+)$", text) == [
        "Install",
        "In Python",
        "Two commands",
        "What it guarantees",
        "When not to use it",
        "Links",
    ]
    assert text.count("![") == 1
    assert text.index("![") < text.index("## Install")


def test_the_architecture_page_tells_where_the_files_of_memevolve_are() -> None:
    rows = table_after("| in MemEvolve |", read("docs/explanation/architecture.md"))
    assert len(rows) == 7
    for theirs, ours, what in rows:
        assert theirs.replace("src/memevolve/", "src/memevolve_gpu/") == ours
        assert is_committed(ours) is (what != "next"), ours


def is_committed(name: str) -> bool:
    """A file that somebody is still writing is not there yet; outside a git checkout every file counts."""
    if not (ROOT / ".git").exists():
        return (ROOT / name).is_file()
    listed = subprocess.run(["git", "ls-files", name], cwd=ROOT, capture_output=True, text=True, check=True)
    return bool(listed.stdout)


def test_the_install_page_lists_the_extras() -> None:
    rows = table_after("| extra |", read("docs/how-to/install.md"))
    assert {row[0] for row in rows} == set(project()["optional-dependencies"])


# Links and paths


PLACEHOLDER = "https://memevolve-gpu.example/"
"""Stands for the public address until there is one; docs/how-to/release.md says how to replace it."""


def targets(text: str) -> list[str]:
    """What the links of a Markdown text lead to, inline ones and definitions."""
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?m)^\[[^\]]+\]: (\S+)$", text)


def in_checkout(address: str) -> Path:
    """The file of this checkout that an address in the repository stands for."""
    repository = project()["urls"]["Repository"]
    found = re.fullmatch(rf"{re.escape(repository)}/(?:blob|raw|tree)/main/([^#]+)(?:#.*)?", address)
    assert found, f"{address} is no file of {repository}"
    return ROOT / found[1]


def test_every_address_of_the_project_is_one_that_pyproject_names() -> None:
    urls = project()["urls"]
    assert all(url.startswith(PLACEHOLDER) for url in urls.values())
    assert f"site_url: {urls['Documentation']}\n" in read("mkdocs.yml")
    assert f"repo_url: {urls['Repository']}\n" in read("mkdocs.yml")
    for path in files():
        if path.suffix in {".md", ".txt", ".yml", ".py"}:
            found = re.findall(rf"{re.escape(PLACEHOLDER)}[^\s)\]\"'`,]+", path.read_text(encoding="utf-8"))
            assert all(address.startswith((urls["Documentation"], urls["Repository"])) for address in found), path


def test_the_links_of_the_readme_are_absolute() -> None:
    assert all(target.startswith(PLACEHOLDER) for target in targets(read("README.md")))
    used = set(re.findall(r"\[[^\]]+\]\[([a-z]+)\]", read("README.md").replace("\n", " ")))
    assert used == set(re.findall(r"(?m)^\[([a-z]+)\]: ", read("README.md")))


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@each("document", documents())
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"(?s)```.*?```", "", document.read_text(encoding="utf-8"))
    for target in targets(text):
        name, _, anchor = target.partition("#")
        if name.startswith(PLACEHOLDER):
            path = in_checkout(name)
        elif re.match(r"[a-z]+:", name):
            continue
        else:
            path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert ROOT in (path, *path.parents), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))
            assert anchor in map(slug, headings), target


def linked_documents(document: Path) -> Iterator[Path]:
    for target in targets(document.read_text(encoding="utf-8")):
        name = target.partition("#")[0]
        path = in_checkout(name) if name.startswith(PLACEHOLDER) else (document.parent / name).resolve()
        if path.suffix == ".md" and path.is_file():
            yield path


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document not in reached:
            reached.add(document)
            waiting += linked_documents(document)
    assert set((ROOT / "docs").rglob("*.md")) <= reached


def test_documents_that_the_code_names_exist() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), ROOT / ".env.example"]:
        for name in re.findall(r"(?<![/\w])docs/[\w/.-]+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"


# The documentation site


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings", "griffe_inherited_docstrings"):
        pytest.importorskip(module, reason="the site's tools are not installed: pip install 'memevolve-gpu[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "api" / "store" / "index.html").read_text(encoding="utf-8")
    assert 'id="memevolve_gpu.VectorStore.store_batch"' in page
    assert 'id="memevolve_gpu.VectorStore.delete_where"' in page  # whose docstring is inherited


def navigation() -> list[str]:
    """The pages of the site in their order."""
    return re.findall(r"(?m)^ +- (?:[^:\n]+: )?([\w/.-]+\.md)$", read("mkdocs.yml").partition("\nnav:")[2])


def test_the_site_has_every_document() -> None:
    pages = navigation()
    assert len(pages) == len(set(pages))
    assert {ROOT / "docs" / page for page in pages} == set((ROOT / "docs").rglob("*.md"))
    assert pages[pages.index("tutorial/index.md") + 1] == "choose.md"


def test_the_site_documents_every_public_name() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference" / "api").glob("*.md"))
    shown = set(re.findall(r"(?m)^::: memevolve_gpu\.(\w+)$", pages))
    errors = {name for name in memevolve_gpu.__all__ if name.endswith(("Error", "Closed"))}
    assert "::: memevolve_gpu.errors\n" in pages
    assert shown - {"errors"} == set(memevolve_gpu.__all__) - errors


def test_the_page_of_public_names_is_made_from_the_code() -> None:
    pytest.importorskip("langchain_core", reason="one of the modules needs it")
    made = subprocess.run(
        [sys.executable, "scripts/public_names.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert made.stdout == read("docs/reference/api/names.md"), "run: python scripts/public_names.py --write"
    for name in memevolve_gpu.__all__:
        assert re.search(rf"(?m)^\| `{name}(\(\))?` \| \w", made.stdout), name


def test_llms_txt_lists_the_pages_of_the_site() -> None:
    text = read("docs/llms.txt")
    assert text.startswith("# memevolve-gpu\n\n> ")
    base = project()["urls"]["Repository"] + "/raw/main/docs/"
    linked = [target.removeprefix(base) for target in targets(text)]
    assert linked == [page for page in navigation() if page != "index.md"]


def test_no_file_names_a_machine() -> None:
    folders = {"/wo" + "rk", "/ro" + "ot", str(Path.home()), str(ROOT)} - {"/"}
    machine = re.compile(rf"(?m)(?<![\w.:/~-])(?:{'|'.join(map(re.escape, sorted(folders)))})(?=[/\s\"'`]|$)")
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in machine.finditer(text)]
    assert found == []
    assert machine.search("cd " + "/wo" + "rk/main")


@pytest.mark.parametrize("name", ["setup", "test", "demo", "release-check"])
def test_scripts_can_be_run_and_stop_at_errors(name: str) -> None:
    assert os.access(ROOT / "scripts" / name, os.X_OK)
    assert "set -euo pipefail" in read(f"scripts/{name}")
    assert f"scripts/{name}" in read("README.md") + read("CONTRIBUTING.md") + read("docs/how-to/release.md")


def test_the_forge_tests_every_python_that_the_project_names() -> None:
    matrix = re.search(r"(?m)^ +python: \[(.+)\]$", read(".github/workflows/test.yml"))
    assert matrix
    tested = re.findall(r'"(3\.\d+)"', matrix[1])
    named = {line.rpartition(" ")[2] for line in project()["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert named <= set(tested)
    assert "run: scripts/test\n" in read(".github/workflows/test.yml")
    assert "exec scripts/test\n" in read(".ci/run")


# Installation


ONLY_CONDA = {"python", "pip", "cuda-version", "pytorch-gpu"}
"""Packages that an environment needs and a wheel cannot ask for."""
CONDA_NAMES = {"pytorch": "torch", "cupy": "cupy-cuda12x"}


def requirements(*extras: str) -> dict[str, SpecifierSet]:
    """Name to bounds of the base dependencies and some extras, without markers for old Pythons."""
    lines = list(project()["dependencies"])
    for extra in extras:
        lines += project()["optional-dependencies"][extra]
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one.specifier for one in parsed if one.marker is None}


def environment(name: str) -> dict[str, SpecifierSet]:
    lines = re.findall(r"(?m)^ +- ([a-z][\w.-]*)([<>=!~,\d.*]*)$", read(name).partition("dependencies:")[2])
    return {CONDA_NAMES.get(package, package): SpecifierSet(bounds) for package, bounds in lines}


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("environment.yml", ("gpu", "torch", "openai", "local")),
        ("environment-cpu.yml", ("cpu", "openai", "local")),
        ("environment-dev.yml", ("dev",)),
    ],
)
def test_conda_environments_agree_with_the_project(name: str, extras: tuple[str, ...]) -> None:
    """Tools of development are in a file of their own; the others hold what the store needs."""
    conda = environment(name)
    wanted = requirements(*extras)
    if name == "environment-dev.yml":
        wanted = {package: bounds for package, bounds in wanted.items() if package not in requirements()}
    assert {package for package in conda if package not in ONLY_CONDA} == set(wanted)
    for package, bounds in wanted.items():
        assert conda[package] == bounds, package


@pytest.mark.parametrize("name", ["environment.yml", "environment-cpu.yml", "environment-dev.yml"])
def test_conda_environments_take_the_pythons_of_the_project(name: str) -> None:
    claimed = {Version(line.rpartition(" ")[2]) for line in project()["classifiers"] if re.search(r":: 3\.\d+$", line)}
    every = {Version(f"3.{minor}") for minor in range(6, 20)}
    assert {version for version in every if version in environment(name)["python"]} == claimed
    assert min(claimed) in SpecifierSet(project()["requires-python"])
    channels = re.findall(r"(?m)^  - (.+)$", read(name).partition("channels:")[2].partition("dependencies:")[0])
    assert channels
    assert all(re.fullmatch(r"[a-z-]+", channel) for channel in channels)


def test_the_gpu_environment_names_the_next_command_and_what_a_login_node_needs() -> None:
    text = read("environment.yml")
    assert "pip install --no-deps -e ." in text
    assert "CONDA_OVERRIDE_CUDA" in text
    assert environment("environment.yml")["cuda-version"] == SpecifierSet(">=12.9,<14")


def test_every_name_and_bound_is_found_in_a_listing_or_reported(tmp_path: Path) -> None:
    """``scripts/check-conda``: what a listing lacks, and bounds that none of its versions meets, are named."""
    given = {}
    for name in ("environment.yml", "environment-cpu.yml", "environment-dev.yml"):
        for package, bounds in re.findall(
            r"(?m)^  - ([a-z][\w.-]*)([<>=!~,\d.*]*)$", read(name).partition("dependencies:")[2]
        ):
            low = re.search(r">=([\d.]+)", bounds)
            given[package] = ["0.0.1", low[1] if low else "1.0"]
    listing = tmp_path / "listing.json"

    def told(**change: list[str] | None) -> tuple[int, str]:
        own = {name: versions for name, versions in (given | change).items() if versions is not None}
        listing.write_text(json.dumps({name: [{"version": v} for v in own[name]] for name in own}))
        command = [sys.executable, "scripts/check-conda", str(listing)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return ran.returncode, ran.stdout

    assert told()[0] == 0
    code, text = told(cupy=["12.0", "13.2"], apsw=None)
    assert code == 1
    assert "environment.yml: cupy>=13.3: the listing has 13.2 at most" in text
    assert "environment-cpu.yml: apsw: not in the listing" in text
    plain = tmp_path / "listing.txt"
    plain.write_text("".join(f"{name} {' '.join(versions)}\n" for name, versions in given.items()))
    ran = subprocess.run(
        [sys.executable, "scripts/check-conda", str(plain)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout


def test_one_faiss_at_a_time() -> None:
    assert "faiss-gpu" not in environment("environment-cpu.yml")
    assert "faiss-cpu" not in environment("environment.yml")
    assert not {"faiss-cpu", "faiss-gpu"} & set(requirements())


def test_the_changelog_knows_the_version() -> None:
    assert re.search(rf"(?m)^## \[{re.escape(memevolve_gpu.__version__)}\]", read("CHANGELOG.md"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    page = (PACKAGE / "server" / "ui" / "static").iterdir()
    sources = {path.relative_to(PACKAGE.parent).as_posix() for path in [*PACKAGE.rglob("*.py"), *page]}
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        rest = " ".join(name for name in archive.namelist() if ".dist-info/" in name)
    assert inside == sources | {"memevolve_gpu/py.typed", "memevolve_gpu/cli/memory_units.jsonl"}
    assert "LICENSE" in rest
    assert "entry_points.txt" in rest


def test_the_wheel_works_where_the_checkout_is_not(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import memevolve_gpu, sys; assert memevolve_gpu.__file__.startswith(sys.argv[1]), memevolve_gpu.__file__\n"
        "import importlib.metadata as m\n"
        "(entry,) = [e for e in m.entry_points(group='console_scripts') if e.name == 'memevolve-store'][:1]\n"
        "assert callable(entry.load()); assert m.version('memevolve-gpu') == memevolve_gpu.__version__\n"
        "with memevolve_gpu.VectorStore('m', memevolve_gpu.HashingEmbedder(64)) as store:\n"
        "    store.store({'id': 'a', 'content': 'hello'})\n"
        "    assert store.search('hello')[0][1] == 'a'\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_no_engine(fresh: Forks) -> None:
    program = "import memevolve_gpu, sys; print([n for n in ('faiss', 'torch', 'cupy', 'openai') if n in sys.modules])"
    assert fresh(program).stdout.strip() == "[]"


# Files on disk


def test_every_file_of_a_store_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memevolve_gpu import HashingEmbedder, VectorStore

    documented = {
        row[0].removeprefix("<prefix>") for row in table_after("| file |", read("docs/reference/file-format.md"))
    }
    with VectorStore(tmp_path / "m", HashingEmbedder(16), storage_config={"background": False}) as store:
        store.store_batch([{"content": f"word{number}"} for number in range(20)])
        store.run_maintenance()
        store.snapshot()
        monkeypatch.setattr("memevolve_gpu.live.field_columns.SAVED_FROM", 20)
        assert store.count({"content": "word7"}) == 1
        store._open.live.save_fields(1.0)
        made = {path.name.removeprefix("m") for path in tmp_path.iterdir()}
    assert made == documented
