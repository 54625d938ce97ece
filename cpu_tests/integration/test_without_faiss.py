"""faiss is a dependency of opening a store, not of importing the package."""

from __future__ import annotations

from pathlib import Path

from forks import Forks


def run(fresh: Forks, program: str) -> str:
    done = fresh(program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_neither_faiss_nor_torch(fresh: Forks) -> None:
    program = """
import sys
import memevolve_gpu, memevolve_gpu.cli, memevolve_gpu.components.store.vector_store
from memevolve_gpu import *
print([name for name in ("faiss", "torch", "cupy", "openai", "sentence_transformers") if name in sys.modules])
"""
    assert run(fresh, program).strip() == "[]"


def test_the_constructor_says_what_is_missing(fresh: Forks, tmp_path: Path) -> None:
    program = """
import sys
sys.modules["faiss"] = None
from memevolve_gpu import VectorStore
try:
    VectorStore("store", lambda text: [1.0, 2.0])
except RuntimeError as error:
    print(type(error).__name__, error)
"""
    said = run(fresh, program)
    assert said.startswith("EngineError Failed to create ivf index: ")
    assert "pip install 'memevolve-gpu[cpu]'" in said
    assert list(tmp_path.iterdir()) == [], "a store was half made"
