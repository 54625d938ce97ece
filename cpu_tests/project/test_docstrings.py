"""Public names and methods are documented in Google style, and the examples in their docstrings run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, is_typeddict

import pytest
from milvus_fake import FakeMilvus
from pydantic_settings import BaseSettings
from support import each

import memevolve_gpu
from memevolve_gpu.components import manage, retrieve
from memevolve_gpu.components.store import MetadataMixin
from memevolve_gpu.integrations.importers import import_into
from memevolve_gpu.milvus.client import MilvusClient

WITHOUT_DOCSTRING = {"MemoryUnit"}
"""Aliases of built-in types."""

PUBLIC = {
    **{name: getattr(module, name) for module in (memevolve_gpu, manage, retrieve) for name in module.__all__},
    "MetadataMixin": MetadataMixin,
    "import_into": import_into,
}
for _name in WITHOUT_DOCSTRING:
    del PUBLIC[_name]
DOCUMENTED = sorted(PUBLIC)


def parts(name: str, found: Any) -> Iterator[tuple[str, Any]]:
    """Yield a public object and, of a class, its own constructor and public members, with their dotted names."""
    yield name, found
    if not inspect.isclass(found):
        return
    for attribute in dir(found):
        raw = inspect.getattr_static(found, attribute)
        if attribute == "settings_customise_sources":
            continue  # a hook of pydantic-settings
        if attribute == "__init__" and (dataclasses.is_dataclass(found) or issubclass(found, BaseSettings)):
            continue  # generated from fields, which are documented one by one
        ours = str(getattr(inspect.unwrap(_function(raw) or raw), "__module__", "")).startswith("memevolve_gpu")
        if ours and (not attribute.startswith("_") or attribute == "__init__"):
            yield f"{name}.{attribute}", getattr(found, attribute)


def _function(raw: Any) -> Any:
    """The function behind a method or property; None for anything else."""
    if isinstance(raw, property):
        return raw.fget
    if isinstance(raw, (staticmethod, classmethod)):
        return raw.__func__
    return raw if inspect.isfunction(raw) else None


def missing(name: str, found: Any) -> list[str]:
    """What the docstring of one object lacks."""
    text = inspect.getdoc(found) or ""
    if not text:
        return [f"{name}: docstring"]
    if not inspect.isroutine(found):
        return []
    signature = inspect.signature(found)
    taken = [one for one in signature.parameters if one not in ("self", "cls")]
    described = text.partition("Args:")[2].replace("    **", "    ")
    lacks = [f"{name}: {one} in Args" for one in taken if f"\n    {one}: " not in described]
    if signature.return_annotation not in ("None", None, signature.empty) and "Returns:" not in text:
        lacks.append(f"{name}: Returns")
    return lacks


def examples(name: str, found: Any) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    module = inspect.getmodule(found)
    return [one for one in finder.find(found, name, module=module, globs={}) if one.examples]


@each("name", DOCUMENTED)
def test_every_public_name_and_method_is_documented(name: str) -> None:
    assert [lack for part, found in parts(name, PUBLIC[name]) for lack in missing(part, found)] == []


def undocumented(found: type) -> list[str]:
    """Public methods and properties of a class that neither have a docstring nor inherit one."""
    members = [one for one in vars(found) if not one.startswith("_") and _function(vars(found)[one]) is not None]
    return [f"{found.__qualname__}.{one}" for one in members if not inspect.getdoc(getattr(found, one))]


@pytest.mark.parametrize("package", ["memevolve_gpu.components.store", "memevolve_gpu.milvus"])
def test_every_method_of_the_stores_has_or_inherits_a_docstring(package: str) -> None:
    found = importlib.import_module(package)
    modules = [importlib.import_module(f"{package}.{one.name}") for one in pkgutil.iter_modules(found.__path__)]
    classes = {one for module in modules for _, one in inspect.getmembers(module, inspect.isclass)}
    ours = [one for one in classes if one.__module__.startswith(package) and not one.__name__.startswith("_")]
    assert len(ours) > 10
    instructions = "PlainReader."  # has one method for each instruction of a pickle, named after it
    assert [lack for one in ours for lack in undocumented(one) if not lack.startswith(instructions)] == []


@each("name", DOCUMENTED)
def test_every_public_class_and_function_has_an_example(name: str) -> None:
    found = PUBLIC[name]
    if not (inspect.isclass(found) and issubclass(found, Exception)) and not is_typeddict(found):
        assert examples(name, found)


@pytest.mark.parametrize("name", sorted(name for name, found in PUBLIC.items() if examples(name, found)))
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeMilvus()
    monkeypatch.setattr(MilvusClient, "_connect", lambda _self, seconds: server.connect(seconds))
    for number, example in enumerate(examples(name, PUBLIC[name])):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        said: list[str] = []
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
        assert result.failed == 0, "".join(said)
        assert result.attempted > 0


def test_public_calls_return_typed_values() -> None:
    """JSON is what callers put into units, or what only ``restore_state`` reads; the rest has types of its own."""
    returned = {
        part: str(inspect.signature(found).return_annotation)
        for name in DOCUMENTED
        for part, found in parts(name, PUBLIC[name])
        if inspect.isroutine(found)
    }
    assert len(returned) > 200
    assert {part for part, annotation in returned.items() if re.search(r"\bAny\b", annotation)} == set()
    json = {part.rpartition(".")[2] for part, annotation in returned.items() if "Json" in annotation}
    assert json == {"get_metadata", "facets", "save_state"}


class Base:
    def one(self) -> None:
        """Do one thing."""


class Derived(Base):
    def one(self) -> None: ...
    def two(self) -> None: ...


def documented(first: int, second: str = "") -> bool:
    """Compare.

    Args:
        first: A number.
        second: A text.

    Returns:
        Whether they are equal.

    Example:
        >>> 1 + 1
        3
    """
    return str(first) == second


def half_documented(first: int, second: str = "") -> bool:
    """Compare.

    Args:
        first: A number.
    """
    return str(first) == second


def test_the_checks_find_what_is_missing() -> None:
    assert missing("f", documented) == []
    assert missing("f", half_documented) == ["f: second in Args", "f: Returns"]
    assert missing("f", lambda: 1) == ["f: docstring"]
    assert undocumented(Derived) == ["Derived.two"]
    (wrong,) = examples("f", documented)
    assert doctest.DocTestRunner().run(wrong, out=lambda _text: None).failed == 1
