"""The LangChain adapter: its public conformance suite, and what the suite does not ask."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed: pip install 'memevolve-gpu[dev]'")

from langchain_tests.integration_tests.vectorstores import VectorStoreIntegrationTests

from memevolve_gpu.integrations.langchain import MemEvolveVectorStore


class Conformance(VectorStoreIntegrationTests):
    """The suite, asked of a store with one metric and index type."""

    settings: ClassVar[dict[str, object]] = {"background": False}

    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[MemEvolveVectorStore]:
        with MemEvolveVectorStore.open(tmp_path / "m", self.get_embeddings(), storage_config=self.settings) as store:
            yield store


class TestConformanceUnderL2(Conformance):
    settings: ClassVar = {"metric": "l2", "background": False}


class TestConformanceUnderCosine(Conformance):
    settings: ClassVar = {"metric": "cosine", "background": False}


class TestConformanceUnderInnerProduct(Conformance):
    settings: ClassVar = {"metric": "ip", "background": False}


def run(program: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(program), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_quick_start_for_langchain_runs(repository: Path, tmp_path: Path) -> None:
    done = run(repository / "examples" / "langchain_quickstart.py", tmp_path, str(tmp_path / "kept"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Added 300 documents" in done.stdout
    assert "sqlite-busy" in done.stdout.split("Only tools and skills")[0]
    assert "replaced: The staging cluster is rebuilt every Sunday." in done.stdout
    assert "Still there: False" in done.stdout
    assert "oom-killed-137" in done.stdout.split("Opened again")[1]
    assert list(tmp_path.glob("kept*"))


def test_the_python_of_the_document_runs(repository: Path, tmp_path: Path) -> None:
    blocks = re.findall(
        r"(?s)```python\n(.*?)```", (repository / "docs" / "how-to" / "langchain.md").read_text(encoding="utf-8")
    )
    program = tmp_path / "document.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    done = run(program, tmp_path)
    assert (done.stdout, done.stderr) == ("Copy the -wal file too. 1\n", "")
