"""faiss is a dependency of opening a store, not of importing the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(program: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_neither_faiss_nor_torch(tmp_path: Path) -> None:
    program = """
import sys
import memevolve_gpu, memevolve_gpu.cli, memevolve_gpu.components.store.vector_store
from memevolve_gpu import *
print([name for name in ("faiss", "torch", "cupy", "openai", "sentence_transformers") if name in sys.modules])
"""
    assert run(program, tmp_path).strip() == "[]"


def test_the_constructor_says_what_is_missing(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["faiss"] = None
from memevolve_gpu import VectorStore
try:
    VectorStore("store", lambda text: [1.0, 2.0])
except RuntimeError as error:
    print(type(error).__name__, error)
"""
    said = run(program, tmp_path)
    assert said.startswith("EngineError Failed to create ivf index: ")
    assert "pip install 'memevolve-gpu[cpu]'" in said
    assert list(tmp_path.iterdir()) == [], "a store was half made"
