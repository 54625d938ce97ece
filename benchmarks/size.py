"""Count the source, by package, and how much of it is of abilities that came after the house was rebuilt.

    python benchmarks/size.py                          the checkout
    python benchmarks/size.py --base COMMIT --out F    beside an earlier commit, as JSON too

``LATER`` lists the modules that are wholly of one such ability. What an ability added to other modules counts as
theirs: the last row, all other modules, still holds parts of the later abilities.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import publish

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/memevolve_gpu"

LATER: dict[str, tuple[str, ...]] = {
    "server, its client, keys and metrics": ("server/", "cli/serve_commands.py"),
    "adapters of other frameworks, importers, MCP": (
        "integrations/documents.py",
        "integrations/haystack.py",
        "integrations/importers.py",
        "integrations/langgraph.py",
        "integrations/llama_index.py",
        "integrations/mcp.py",
        "integrations/mem0.py",
        "integrations/langchain/key_value.py",
        "integrations/langchain/retriever.py",
    ),
    "history, undo, feed of changes, erasure": (
        "components/store/history.py",
        "records/erasure.py",
        "records/history.py",
    ),
    "namespaces and expiry": ("components/store/namespaces.py", "live/namespaces.py"),
    "filters as columns, ranking, pages, facets": (
        "components/store/listing.py",
        "components/store/queries.py",
        "components/store/ranking.py",
        "components/store/selecting.py",
        "components/retrieve/reorder.py",
        "live/column_file.py",
        "live/field_columns.py",
        "live/foresight.py",
        "live/field_values.py",
    ),
    "words before FTS5, keyword queries": ("records/keyword_query.py", "records/tokenizer.py"),
    "what two texts say, for deduplication": ("components/manage/meaning.py", "components/manage/meaning_words.py"),
    "asyncio": ("async_api.py",),
    "logs that belong to their file, damage": ("records/damage.py", "records/lineage.py"),
    "MemEvolve's server, the demos, doctor": (
        "cli/demo.py",
        "cli/doctor.py",
        "demo/",
        "health_hook.py",
    ),
}


class Count:
    """Lines of some files: all of them, and those of docstrings, imports, blank lines and comments."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        counted = [_counted(text) for text in sources.values()]
        self.files, self.median = len(counted), statistics.median([one["lines"] for one in counted] or [0])
        self.parts = {name: sum(one[name] for one in counted) for name in _counted("")}

    def figures(self) -> dict[str, Any]:
        return {"files": self.files, "median_file": self.median, **self.parts}


def _counted(text: str) -> dict[str, int]:
    lines, tree = text.splitlines(), ast.parse(text)
    documented, imported = set[int](), set[int]()
    statements = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            statements += 1
    rest = [line.strip() for number, line in enumerate(lines, 1) if number not in documented | imported]
    blank, comments = sum(not line for line in rest), sum(line.startswith("#") for line in rest)
    return {
        "lines": len(lines),
        "code": len(rest) - blank - comments,
        "docstrings": len(documented),
        "imports": len(imported),
        "import_statements": statements,
        "blank": blank,
    }


def sources(commit: str | None) -> dict[str, str]:
    """The modules by their path in the package, of a commit or of the checkout."""
    if commit is None:
        return {str(one.relative_to(ROOT / PACKAGE)): one.read_text() for one in sorted((ROOT / PACKAGE).rglob("*.py"))}
    listed = _git("ls-tree", "-r", "--name-only", commit, PACKAGE).splitlines()
    return {name[len(PACKAGE) + 1 :]: _git("show", f"{commit}:{name}") for name in listed if name.endswith(".py")}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_names(commit: str) -> set[str]:
    """The names of the test functions in a commit."""
    return set(_git("grep", "-hoE", r"def test_[a-z0-9_]+", commit, "--", "cpu_tests").splitlines())


def package_of(module: str) -> str:
    return module.split("/", maxsplit=1)[0] if "/" in module else "the top"


def later(modules: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The modules of each later ability, and last all others. Raises SystemExit for a name that is no module."""
    left = dict(modules)
    for ability, names in LATER.items():
        own = {module: left.pop(module) for module in list(left) if module.startswith(names)}
        gone = [name for name in names if not any(module.startswith(name) for module in own)]
        if gone:
            raise SystemExit(f"LATER names {', '.join(gone)}, and there is no such module; correct {__file__}")
        yield ability, own
    yield "all other modules", left


def by_package(modules: Mapping[str, str]) -> dict[str, Any]:
    packages = sorted({package_of(module) for module in modules})
    found = {one: Count({m: t for m, t in modules.items() if package_of(m) == one}).figures() for one in packages}
    return {**found, "all": Count(modules).figures()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", metavar="COMMIT", help="an earlier commit to count too")
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    modules = sources(None)
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD").strip(),
        "packages": by_package(modules),
        "abilities": {ability: Count(own).figures() for ability, own in later(modules)},
    }
    if given.base:
        found["base"] = {"commit": given.base, "packages": by_package(sources(given.base))}
        before, after = test_names(given.base), test_names("HEAD")
        found["tests"] = {"names_before": len(before), "names": len(after), "kept": len(before & after)}
    publish(found, given.out)


if __name__ == "__main__":
    main()
