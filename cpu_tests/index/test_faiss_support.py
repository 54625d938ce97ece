"""A faiss that is missing, doubled, half installed or broken is named, with the command that repairs it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import threading
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from memevolve_gpu.errors import EngineError
from memevolve_gpu.index import faiss_support
from memevolve_gpu.index.faiss_support import after_fork, load_faiss, one_thread, translate_error
from memevolve_gpu.types import FAISS_FOR_GPUS


def distribution(version: str, *files: str) -> Any:
    return SimpleNamespace(version=version, files=[PurePosixPath(file) for file in files] or None)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The faiss distributions that the machine claims to have; none loaded yet. Other packages stay as they are."""
    claimed: dict[str, Any] = {"faiss-cpu": distribution("1.15.1", "faiss/__init__.py", "faiss_cpu.libs/libgomp.so")}
    real = importlib.metadata.distribution

    def look_up(name: str) -> Any:
        if not name.startswith("faiss"):
            return real(name)
        if name not in claimed:
            raise importlib.metadata.PackageNotFoundError(name)
        return claimed[name]

    monkeypatch.setattr(importlib.metadata, "distribution", look_up)
    monkeypatch.setattr(faiss_support, "_module", None)
    return claimed


@pytest.fixture
def instead(installed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder ``faiss`` that is imported instead of the real one."""
    for name in [name for name in sys.modules if name == "faiss" or name.startswith("faiss.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "faiss"
    folder.mkdir()
    return folder


def refusal() -> str:
    with pytest.raises(EngineError) as caught:
        load_faiss()
    assert isinstance(caught.value, RuntimeError)
    return str(caught.value)


def test_loads_once_and_from_any_thread(installed: dict[str, Any]) -> None:
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(load_faiss())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(module) for module in found}) == 1
    installed.clear()
    assert load_faiss() is found[0], "what was found is kept"


def test_missing(installed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    installed.clear()
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = refusal()
    assert "not installed" in message
    assert "pip install 'memevolve-gpu[cpu]'" in message
    monkeypatch.undo()
    assert load_faiss().__name__ == "faiss", "a failure is not remembered"


@pytest.mark.parametrize("name", FAISS_FOR_GPUS)
def test_two_distributions_over_each_other(name: str, installed: dict[str, Any]) -> None:
    installed[name] = distribution("1.14.0", "faiss/__init__.py")
    message = refusal()
    assert f"faiss-cpu 1.15.1, {name} 1.14.0" in message
    assert f"pip uninstall -y faiss-cpu {name}" in message
    del installed[name]
    load_faiss()


def test_distribution_without_a_list_of_files_counts(installed: dict[str, Any]) -> None:
    installed["faiss"] = distribution("1.9.0")
    assert "2 times" in refusal()


def test_namesake_that_installs_nothing_there_is_no_clash(installed: dict[str, Any]) -> None:
    installed["faiss-gpu"] = distribution("0.1", "something_else/__init__.py")
    load_faiss()


def test_folder_without_its_module(instead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(instead.parent)])
    message = refusal()
    assert "half installed" in message
    assert "pip uninstall -y faiss-cpu" in message
    assert "faiss" not in sys.modules, "the next call looks again"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("from .swigfaiss import *", "'faiss.swigfaiss' is missing"),
        ("from ._swigfaiss import Index", "'faiss._swigfaiss' is missing"),
        ("import numpy_of_another_age", "'numpy_of_another_age' is missing"),
        ("raise ImportError('undefined symbol: _ZN5faiss')", "undefined symbol"),
        ("import os; os.IndexPQFastScan", "IndexPQFastScan"),
        ("swig_ptr(", "half installed"),
    ],
)
def test_half_installed(instead: Path, source: str, words: str) -> None:
    (instead / "__init__.py").write_text(source, encoding="utf-8")
    message = refusal()
    assert "half installed" in message
    assert words in message
    assert "pip uninstall -y faiss-cpu" in message


@pytest.mark.parametrize("error", ["RuntimeError", "OSError"])
def test_cuda_libraries_lack(instead: Path, error: str) -> None:
    (instead / "__init__.py").write_text(f"raise {error}('libcudart.so.12: cannot open\\nmore')", encoding="utf-8")
    message = refusal()
    assert "libcudart.so.12" in message
    assert "more" not in message
    assert "CUDA" in message


def test_too_old(instead: Path) -> None:
    (instead / "__init__.py").write_text("__version__ = '1.5.3'\nclass IndexFlat: ...", encoding="utf-8")
    message = refusal()
    assert "1.5.3" in message
    assert "IDSelectorAll" in message


def test_nothing_is_imported_with_the_modules() -> None:
    code = "import memevolve_gpu.index.registry, memevolve_gpu.index.snapshot_file, sys; print('faiss' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_one_thread_is_undone() -> None:
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        with one_thread():
            assert faiss.omp_get_max_threads() == 1
        assert faiss.omp_get_max_threads() == 3
        after_fork()
        assert faiss.omp_get_max_threads() == 1
    finally:
        faiss.omp_set_num_threads(before)


def test_after_fork_without_faiss_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_support, "_module", None)
    after_fork()


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (MemoryError(), "out of memory while testing"),
        (RuntimeError("Error in faiss\nlong trace"), "faiss failed while testing: Error in faiss"),
    ],
)
def test_what_faiss_raises_is_translated(raised: Exception, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught, translate_error("testing"):
        raise raised
    assert caught.value.__cause__ is raised
    assert "trace" not in str(caught.value)


def test_our_own_errors_pass_unchanged() -> None:
    ours = EngineError("as it was")
    with pytest.raises(EngineError) as caught, translate_error("testing"):
        raise ours
    assert caught.value is ours


FORKING = """
import os, signal, numpy as np
from memevolve_gpu.index.registry import build
from memevolve_gpu.types import SearchParams, IndexPlan, Rows
n = 3000
x = np.random.default_rng(1).standard_normal((n, 64)).astype(np.float32)
rows = Rows(np.arange(n), np.zeros(n, np.uint8), np.arange(1, n + 1), x)
indexes = [build(IndexPlan(kind, nlist=16), rows, "l2", seed=1) for kind in ("exact", "two_stage", "ivf", "hnsw")]
answers = [index.search(x[:200], 5, SearchParams())[1] for index in indexes]
child = os.fork()
if child == 0:
    signal.alarm(20)  # a child that hangs ends itself
    same = all((index.search(x[:200], 5, SearchParams())[1] == answer).all() for index, answer in zip(indexes, answers))
    os._exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_forked_child_searches() -> None:
    """Without the hook a child of a parent that used several OpenMP threads waits for a pool that is not there."""
    several = os.environ | {"OMP_NUM_THREADS": "4"}
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=several,
    )
    assert shown.stdout.strip() == "0", shown.stderr
