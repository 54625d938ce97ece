"""The hybrid retriever, the document index, the key-value store and what mem0 calls: LangChain's suites, and more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed: pip install 'memevolve-gpu[dev]'")

from langchain_core.documents import Document
from langchain_kit import Words
from langchain_tests.integration_tests import (
    BaseStoreAsyncTests,
    BaseStoreSyncTests,
    RetrieversIntegrationTests,
)
from langchain_tests.integration_tests.indexer import AsyncDocumentIndexTestSuite, DocumentIndexerTestSuite

from memevolve_gpu.components.retrieve import KeywordRetrievalStrategy
from memevolve_gpu.errors import ConfigurationError, InvalidQueryError, InvalidUnitError
from memevolve_gpu.integrations.langchain import (
    MemEvolveDocumentIndex,
    MemEvolveKeyValueStore,
    MemEvolveRetriever,
    MemEvolveVectorStore,
)

CONFIG = {"background": False}


@pytest.fixture
def documents(tmp_path: Path) -> Iterator[MemEvolveVectorStore]:
    with MemEvolveVectorStore.open(tmp_path / "documents", Words(), storage_config=CONFIG) as store:
        yield store


@pytest.fixture
def kv_store(tmp_path: Path) -> Iterator[MemEvolveKeyValueStore]:
    with MemEvolveKeyValueStore(tmp_path / "keys", CONFIG) as store:
        yield store


class TestKeyValueStore(BaseStoreSyncTests[Any]):
    @pytest.fixture
    def three_values(self) -> tuple[Any, Any, Any]:
        return b"\x00\xff", {"json": [1, None]}, "text"

    @pytest.fixture
    def kv_store(self, tmp_path: Path) -> Iterator[MemEvolveKeyValueStore]:
        with MemEvolveKeyValueStore(tmp_path / "keys", CONFIG) as store:
            yield store


class TestKeyValueStoreAsync(BaseStoreAsyncTests[Any]):
    @pytest.fixture
    def three_values(self) -> tuple[Any, Any, Any]:
        return b"\x00\xff", {"json": [1, None]}, "text"

    @pytest.fixture
    async def kv_store(self, tmp_path: Path) -> Any:
        with MemEvolveKeyValueStore(tmp_path / "keys", CONFIG) as store:
            yield store


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self, documents: MemEvolveVectorStore) -> None:
        documents.add_texts([f"git lesson number {number}" for number in range(8)])
        self.documents = documents

    @property
    def retriever_constructor(self) -> type[MemEvolveRetriever]:
        return MemEvolveRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"store": self.documents}

    @property
    def retriever_query_example(self) -> str:
        return "git lesson"


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
class TestDocumentIndex(DocumentIndexerTestSuite):
    @pytest.fixture
    def index(self, documents: MemEvolveVectorStore) -> MemEvolveDocumentIndex:
        return MemEvolveDocumentIndex(store=documents)


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
class TestDocumentIndexAsync(AsyncDocumentIndexTestSuite):
    @pytest.fixture
    async def index(self, documents: MemEvolveVectorStore) -> Any:
        return MemEvolveDocumentIndex(store=documents)


def test_a_retriever_finds_by_words_what_has_another_meaning_and_obeys_filters(documents: MemEvolveVectorStore) -> None:
    documents.add_documents(
        [
            Document(id="code", page_content="error E4711 means a full disk", metadata={"user": "a"}),
            Document(id="other", page_content="error E0815 means no network", metadata={"user": "b"}),
        ]
    )
    retriever = MemEvolveRetriever(store=documents, k=1)
    assert [found.id for found in retriever.invoke("E4711")] == ["code"]
    assert [found.id for found in retriever.invoke("E4711", filter={"user": "b"})] == ["other"]
    assert [found.id for found in retriever.invoke("E4711", filters={"id": "other"}, k=2)] == ["other"]
    by_words = MemEvolveRetriever(store=documents, strategy=KeywordRetrievalStrategy(), filter={"user": "b"})
    assert by_words.invoke("E4711") == []
    with pytest.raises(InvalidQueryError, match="unknown option 'fitler'"):
        retriever.invoke("E4711", fitler={"user": "b"})
    with pytest.raises(ConfigurationError, match="store: Field required; fitler: Extra inputs"):
        MemEvolveRetriever(fitler={})


def test_keys_and_values_are_checked_and_a_batch_is_stored_whole_or_not(kv_store: MemEvolveKeyValueStore) -> None:
    for pairs, words in [
        ([("a", 1), ("b", float("nan"))], "cannot be kept as JSON"),
        ([("a", 1), (2, 1)], "a key must be a string, got 2"),
        ([("a", 1), ("b",)], "key_value_pairs must be pairs"),
        ([("a", 1), ("", 1)], "1 to 1024 characters"),
    ]:
        with pytest.raises(InvalidUnitError, match=words):
            kv_store.mset(pairs)  # type: ignore[arg-type]
    assert list(kv_store.yield_keys()) == []
    with pytest.raises(InvalidUnitError, match="keys must be a list"):
        kv_store.mget("abc")


def test_values_are_there_after_opening_again(tmp_path: Path) -> None:
    with MemEvolveKeyValueStore(tmp_path / "keys", CONFIG) as store:
        store.mset([("a/1", {"base64": "not bytes"}), ("b", b"")])
    with MemEvolveKeyValueStore(tmp_path / "keys", CONFIG) as store:
        assert store.mget(["a/1", "b"]) == [{"base64": "not bytes"}, b""]
        assert list(store.yield_keys(prefix="a/")) == ["a/1"]


def test_mem0_can_list_documents_through_its_langchain_provider(documents: MemEvolveVectorStore) -> None:
    """The provider reads ``client._collection.get(where=, limit=)``, as Chroma's LangChain store has it."""
    documents.add_texts(["x", "y", "z"], [{"user_id": "a"}, {"user_id": "b"}, {"user_id": "a"}], ids=["1", "2", "3"])
    listed = documents._collection.get(where={"user_id": "a"}, limit=5)
    assert listed == {"ids": ["1", "3"], "documents": ["x", "z"], "metadatas": [{"user_id": "a"}] * 2}
    assert documents._collection.get(limit=2)["ids"] == ["1", "2"]
