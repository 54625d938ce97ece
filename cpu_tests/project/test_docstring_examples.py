"""The examples in docstrings run, and every class and function of the user-facing packages has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import memevolve_gpu

SOURCE = Path(memevolve_gpu.__file__).parent
MODULES = [
    ".".join((memevolve_gpu.__name__, *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
EXAMPLES_EXPECTED = [
    "memevolve_gpu.components.manage",
    "memevolve_gpu.components.retrieve",
    "memevolve_gpu.integrations.langchain",
    "memevolve_gpu.memory_system",
]
VALUES = {"Capacity", "ComponentType", "Operation", "QueryRecord", "StrategyMetrics"}
"""Internal, or types of values that the examples of others show."""


def loaded(name: str) -> object:
    if ".langchain" in name:
        pytest.importorskip("langchain_core", reason="langchain-core is not installed")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(loaded(name), optionflags=doctest.ELLIPSIS)  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", EXAMPLES_EXPECTED)
def test_every_public_name_has_an_example(name: str) -> None:
    module = loaded(name)
    for public in set(module.__all__) - VALUES:  # type: ignore[attr-defined]
        assert ">>> " in (inspect.getdoc(getattr(module, public)) or ""), public
