"""The door for LangChain: its public conformance suite, and what the suite does not ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed: pip install 'memevolve-gpu[dev]'")

from langchain_tests.integration_tests.vectorstores import VectorStoreIntegrationTests

from memevolve_gpu.langchain import MemEvolveVectorStore


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
