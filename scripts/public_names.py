#!/usr/bin/env python3
"""Make docs/reference/api/names.md: every public name with the first sentence of its docstring.

    python scripts/public_names.py            print the page
    python scripts/public_names.py --write    write it

A test compares the page with the code.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "api" / "names.md"

MODULES = (
    "memevolve_gpu",
    "memevolve_gpu.components.manage",
    "memevolve_gpu.components.retrieve",
    "memevolve_gpu.integrations.langchain",
)
"""Modules whose ``__all__`` is public; the last one needs langchain-core."""

DOORS = (
    "memevolve_gpu.integrations.haystack",
    "memevolve_gpu.integrations.importers",
    "memevolve_gpu.integrations.langgraph",
    "memevolve_gpu.integrations.llama_index",
    "memevolve_gpu.integrations.mcp",
    "memevolve_gpu.integrations.mem0",
)
"""The same of other frameworks. Where a framework is not installed, the page keeps what it has."""

FOREIGN = {"model_post_init", "settings_customise_sources"}
"""Hooks of the libraries that classes derive from."""

HEAD = """# All public names

The first sentence of each docstring. The other pages of this reference have parameters, results, errors and examples.
`python scripts/public_names.py --write` makes this page; a test compares it with the code.
"""


def page() -> str:
    """The page as Markdown."""
    return "\n".join([HEAD, *map(_section, MODULES + DOORS)])


def _section(name: str) -> str:
    title = f"## {name}\n\n"
    try:
        module = importlib.import_module(name)
    except ImportError:
        if name in MODULES:
            raise
        return title + PAGE.read_text(encoding="utf-8").partition(title)[2].partition("\n\n")[0].rstrip() + "\n"
    return f"{title}| name | what it is |\n|---|---|\n{''.join(_rows(module))}"


def _rows(module: Any) -> Iterator[str]:
    for name in sorted(module.__all__, key=str.lower):
        found = getattr(module, name)
        yield _row(f"{name}()" if inspect.isfunction(found) else name, _doc(found, name))
        if inspect.isclass(found) and not issubclass(found, BaseException):
            for member, doc in _members(found):
                yield _row(f"{name}.{member}", doc)


def _row(name: str, doc: str) -> str:
    return f"| `{name}` | {_sentence(doc)} |\n"


def _doc(found: Any, name: str) -> str:
    if inspect.isclass(found) or inspect.isfunction(found):
        return inspect.getdoc(found) or ""
    return _alias_doc(name)


def _alias_doc(name: str) -> str:
    """The text below the assignment of a type alias, which has no docstring."""
    source = Path(inspect.getfile(importlib.import_module("memevolve_gpu.types"))).read_text(encoding="utf-8")
    statements = ast.parse(source).body
    for statement, after in pairwise(statements):
        named = isinstance(statement, ast.Assign) and any(ast.unparse(target) == name for target in statement.targets)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return str(after.value.value)
    return ""


def _members(cls: type) -> Iterator[tuple[str, str]]:
    """Public methods and properties that this package defines, in the order of their names."""
    for name in sorted({name for name in dir(cls) if not name.startswith("_")}):
        owner = next(base for base in cls.__mro__ if name in base.__dict__)
        found = inspect.getattr_static(cls, name)
        if not owner.__module__.startswith("memevolve_gpu") or name in FOREIGN:
            continue
        if isinstance(found, property):
            yield name, inspect.getdoc(found) or ""
        elif isinstance(found, (staticmethod, classmethod)) or inspect.isfunction(found):
            yield f"{name}()", inspect.getdoc(getattr(cls, name)) or ""


def _sentence(doc: str) -> str:
    """The first sentence of a docstring as Markdown in a table; a dash where there is none."""
    text = " ".join(doc.strip().split("\n\n")[0].split())
    text = re.sub(r":(?:class|meth|func|mod|attr|exc|data):`~?\.*([^`]+)`", r"`\1`", text).replace("``", "`")
    first = re.match(r".+?[.?](?= [A-Z`]|$)", text)
    return (first[0] if first else text).replace("|", "\\|") or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
