"""The vector store for LangChain beyond its conformance suite: values, ids, writing, deleting, searching, threads."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from support import SEED, FakeEmbedder

pytest.importorskip("langchain_core", reason="langchain-core is not installed: pip install 'memevolve-gpu[langchain]'")

from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_kit import AsyncOnly, Plain, Words, documents

from memevolve_gpu import StorageBackend, VectorStore
from memevolve_gpu.errors import (
    ConfigurationError,
    DimensionMismatchError,
    EmbeddingError,
    InvalidFilterError,
    InvalidQueryError,
    InvalidUnitError,
    ModelMismatchError,
    StoreClosedError,
)
from memevolve_gpu.integrations.langchain import EmbeddingsFunction, FunctionEmbeddings, MemEvolveVectorStore

CONFIG = {"background": False}


def opened(path: Path, embedding: Any = None, **config: Any) -> MemEvolveVectorStore:
    return MemEvolveVectorStore.open(path, embedding or Words(), storage_config={**CONFIG, **config})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemEvolveVectorStore]:
    with opened(tmp_path / "m") as one:
        yield one


@pytest.fixture(params=["VectorStore", "a plain backend"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemEvolveVectorStore]:
    """The store on a backend with every method, and on one with none but those that it must have."""
    if request.param == "VectorStore":
        with opened(tmp_path / "m") as one:
            yield one
    else:
        yield MemEvolveVectorStore(Plain(), Words())


def contents(found: list[Document]) -> list[str]:
    return [document.page_content for document in found]


# What is kept comes back

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
"""Keys: no filter could name one with NUL."""

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["created_at", "updated_at", "id", "langchain", "metadata", "content", "type", "$or", "a.b", ""])
METADATA = st.dictionaries(KEYS | NAMES, JSON_VALUES, max_size=5)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.text(), METADATA), min_size=1, max_size=4))
def test_a_document_comes_back_as_it_was_given(pairs: list[tuple[str, dict[str, Any]]]) -> None:
    import tempfile

    given_documents = [Document(page_content=text, metadata=metadata) for text, metadata in pairs]
    before = [document.model_copy(deep=True) for document in given_documents]
    with tempfile.TemporaryDirectory() as folder:
        with opened(Path(folder) / "m") as store:
            ids = store.add_documents(given_documents)
            expected = [document.model_copy(update={"id": own}) for document, own in zip(before, ids, strict=True)]
            assert store.get_by_ids(ids) == expected
            assert sorted(store.similarity_search("x", k=9), key=lambda found: ids.index(str(found.id))) == expected
        with opened(Path(folder) / "m") as store:
            assert store.get_by_ids(ids) == expected
    assert given_documents == before


def test_what_comes_back_is_the_callers_to_change(store: MemEvolveVectorStore) -> None:
    store.add_texts(["a"], [{"deep": {"list": [1]}}], ids=["1"])
    store.get_by_ids(["1"])[0].metadata["deep"]["list"].append(2)
    assert store.get_by_ids(["1"])[0].metadata == {"deep": {"list": [1]}}


@pytest.mark.parametrize("depth", [20, 45, 200, 400, 600, 800, 950, 1200, 5000])
def test_deep_metadata_is_refused_or_can_be_read(store: MemEvolveVectorStore, depth: int) -> None:
    metadata: dict[str, Any] = {}
    for _ in range(depth):
        metadata = {"k": [metadata]}
    try:
        store.add_texts(["deep"], [metadata], ids=["1"])
    except InvalidUnitError:
        assert store.backend.count() == 0
        assert depth > 45
    else:
        (found,) = store.similarity_search("deep")
        depths = 0
        inner = found.metadata
        while inner:
            depths, inner = depths + 1, inner["k"][0]
        assert depths == depth


RECURSIVE: dict[str, Any] = {}
RECURSIVE["self"] = RECURSIVE


@pytest.mark.parametrize(
    "metadata",
    [
        {"raw": b"bytes"},
        {"nan": float("nan")},
        {"deep": [{"infinite": float("inf")}]},
        {"a set": {1, 2}},
        {1: "a key that is no string"},
        {"an object": object()},
        {"half a pair": "\ud800"},
        {"long": "x" * 5_000_000},
        RECURSIVE,
    ],
    ids=["bytes", "nan", "infinity", "set", "key", "object", "surrogate", "long", "recursive"],
)
def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_paid_for(
    tmp_path: Path, metadata: dict[Any, Any]
) -> None:
    words = Words()
    with opened(tmp_path / "m", words) as store:
        words.documents.clear()
        bad = Document(page_content="bad")
        bad.metadata = metadata
        with pytest.raises(InvalidUnitError, match=r"documents\[1\]"):
            store.add_documents([Document(page_content="good"), bad])
        assert words.documents == []
        assert store.backend.count() == 0


def test_a_later_change_of_the_metadata_embeds_nothing_and_keeps_the_document(store: MemEvolveVectorStore) -> None:
    store.add_texts(["same text"], [{"a": 1}], ids=["1"])
    unit = store.backend.retrieve("1")
    assert unit is not None
    embedding = store.embeddings
    assert isinstance(embedding, Words)
    embedding.documents.clear()
    assert store.backend.update("1", {**unit, "metadata": {**unit["metadata"], "a": 2}})
    assert embedding.documents == []
    assert store.get_by_ids(["1"]) == [Document(id="1", page_content="same text", metadata={"a": 2})]


def test_units_of_other_doors_are_documents_too(store: MemEvolveVectorStore) -> None:
    store.backend.store(
        {"id": "s", "type": "skill", "content": "rebase onto", "tags": ["git"], "metadata": {"created_at": "then"}}
    )
    store.backend.store({"id": "t", "type": "tool", "content": None, "tags": ["shell"]})
    skill, tool = store.get_by_ids(["s", "t"])
    assert skill.page_content == "rebase onto"
    assert skill.metadata == {"type": "skill", "tags": ["git"], "created_at": "then"}
    assert tool.page_content == "shell tool"
    assert contents(store.similarity_search("x", filters={"type": "skill", "tags": "git"})) == ["rebase onto"]


# Ids

HOSTILE_IDS = [
    "' OR 1=1 --",
    "a/b\\c",
    "unit_1",
    "$or",
    "ids with spaces ",
    "é" * 512,
    "\n",
    "%s{0}",
    "🦜🔗",
    "NULL",
    "0",
]


def test_every_id_that_can_be_one_is_kept(any_store: MemEvolveVectorStore) -> None:
    given_documents = documents(len(HOSTILE_IDS))
    assert any_store.add_documents(given_documents, ids=HOSTILE_IDS) == HOSTILE_IDS
    assert [found.id for found in any_store.get_by_ids(HOSTILE_IDS)] == HOSTILE_IDS
    for n, own in enumerate(HOSTILE_IDS):
        (found,) = any_store.similarity_search(f"number w{n}", k=1)
        assert (found.id, found.metadata) == (own, {"n": n})
    any_store.delete(HOSTILE_IDS[::2])
    assert [found.id for found in any_store.get_by_ids(HOSTILE_IDS)] == HOSTILE_IDS[1::2]


@pytest.mark.parametrize("bad", ["", "x" * 1025, "a\0b", 7, ["1"]], ids=["empty", "long", "NUL", "int", "list"])
def test_an_id_that_cannot_be_one_is_refused(any_store: MemEvolveVectorStore, bad: Any) -> None:
    with pytest.raises(InvalidUnitError, match=r"documents\[1\]\['id'\]"):
        any_store.add_texts(["a", "b"], ids=["1", bad])
    assert any_store.backend.count() == 0


def test_ids_given_win_over_the_documents_own_and_none_means_no_wish(any_store: MemEvolveVectorStore) -> None:
    three = [Document(id="own", page_content=text) for text in "abc"]
    ids = any_store.add_documents(three, ids=["given", None, "also given"])
    assert ids == ["given", "own", "also given"]
    fresh = any_store.add_texts(["d"] * 50)
    assert len(set(fresh)) == 50
    assert any_store.backend.count() == 53


def test_of_an_id_given_twice_the_later_document_stays(any_store: MemEvolveVectorStore) -> None:
    assert any_store.add_texts(["first", "second"], ids=["1", "1"]) == ["1", "1"]
    assert contents(any_store.get_by_ids(["1", "1"])) == ["second"]
    assert any_store.backend.count() == 1


def test_lists_of_different_lengths_are_refused(any_store: MemEvolveVectorStore) -> None:
    with pytest.raises(InvalidUnitError, match="ids has 1 entries for 2"):
        any_store.add_texts(["a", "b"], ids=["1"])
    with pytest.raises(InvalidUnitError, match="metadatas has 1 entries for 2"):
        any_store.add_texts(["a", "b"], [{}])
    assert any_store.backend.count() == 0


def test_ids_that_nothing_has_are_passed_over(any_store: MemEvolveVectorStore) -> None:
    any_store.add_texts(["a"], ids=["1"])
    assert contents(any_store.get_by_ids(["no", "1", "é"])) == ["a"]
    assert any_store.delete(["no"]) is True
    assert any_store.backend.count() == 1


# Writing


def test_a_generator_of_texts_is_taken_whole(any_store: MemEvolveVectorStore) -> None:
    assert len(any_store.add_texts(text for text in ("a", "b", "c"))) == 3
    assert any_store.backend.count() == 3
    assert any_store.add_texts([]) == []
    assert any_store.add_documents([]) == []


def test_texts_are_embedded_in_batches_of_the_size_asked_for(tmp_path: Path) -> None:
    words = Words()
    with opened(tmp_path / "m", words) as store:
        words.batches = 0
        store.add_documents(documents(10), batch_size=4)
        assert words.batches == 3
        store.add_documents(documents(10))
        assert words.batches == 4
        with pytest.raises(InvalidQueryError, match="batch_size"):
            store.add_documents(documents(1), batch_size=0)


def test_vectors_can_be_given(any_store: MemEvolveVectorStore) -> None:
    embedding = any_store.embeddings
    assert isinstance(embedding, Words)
    pairs = [(f"text {n}", np.eye(16)[n].tolist()) for n in range(4)]
    ids = any_store.add_embeddings(iter(pairs), [{"n": n} for n in range(4)], ids=["a", "b", "c", "d"])
    assert ids == ["a", "b", "c", "d"]
    assert not [text for text in embedding.documents if text.startswith("text")]
    assert contents(any_store.similarity_search_by_vector(np.eye(16)[2].tolist(), k=1)) == ["text 2"]
    assert any_store.add_embeddings([]) == []


def test_vectors_can_be_given_without_texts(any_store: MemEvolveVectorStore) -> None:
    """As mem0 gives them: everything in the metadata."""
    vectors = np.eye(16)[:3].tolist()
    metadatas: list[dict[str, Any]] = [{"data": "likes tea", "user_id": "u"}, {"user_id": "v"}, {"data": None}]
    any_store.add_embeddings(embeddings=vectors, metadatas=metadatas, ids=["a", "b", "c"])
    assert contents(any_store.get_by_ids(["a", "b", "c"])) == ["likes tea", "", ""]
    found = any_store.similarity_search_by_vector_with_relevance_scores(
        embedding=vectors[0], k=5, filter={"user_id": "u"}
    )
    assert [document.metadata for document, _ in found] == metadatas[:1]
    assert [score for _, score in found] == pytest.approx([1])
    any_store.add_embeddings(embeddings=iter(vectors))
    assert any_store.backend.count() == 6
    with pytest.raises(InvalidUnitError, match="metadatas has 1 entries for 3"):
        any_store.add_embeddings(embeddings=vectors, metadatas=[{}])
    with pytest.raises(InvalidUnitError, match="exclude each other"):
        any_store.add_embeddings([("a", vectors[0])], embeddings=vectors)
    assert any_store.backend.count() == 6
    with pytest.raises(InvalidUnitError, match="ids must be a list"):
        any_store.get_by_ids("abc")


def test_vectors_that_do_not_fit_are_refused_whole(store: MemEvolveVectorStore) -> None:
    with pytest.raises(DimensionMismatchError):
        store.add_embeddings([("a", [1.0] * 16), ("b", [1.0] * 15)])
    with pytest.raises(DimensionMismatchError):
        store.similarity_search_by_vector([1.0] * 3)
    assert store.backend.count() == 0


def test_an_embedding_model_that_gives_too_few_vectors_is_found_out(tmp_path: Path) -> None:
    class Lossy(Words):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return super().embed_documents(texts)[:2]

    with opened(tmp_path / "m", Lossy()) as store:
        with pytest.raises(EmbeddingError, match="2 rows for 3 units"):
            store.add_texts(["a", "b", "c"])
        assert store.backend.count() == 0


# Deleting


def test_deleting_by_filter(any_store: MemEvolveVectorStore) -> None:
    any_store.add_documents(documents(10, kind="odd"))
    any_store.delete(filter={"$or": [{"n": {"$lt": 3}}, {"n": 7}]})
    assert sorted(found.metadata["n"] for found in any_store.similarity_search("number", k=20)) == [3, 4, 5, 6, 8, 9]
    any_store.delete(filters={"metadata.kind": "odd"}, filter={"n": {"$gte": 5}})
    assert sorted(found.metadata["n"] for found in any_store.similarity_search("number", k=20)) == [3, 4]
    any_store.delete(filter={"$or": []})
    assert any_store.backend.count() == 2


def test_deleting_by_filter_spares_what_changes_meanwhile(
    store: MemEvolveVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_texts(["old one", "old two"], [{"n": 1}, {"n": 1}], ids=["1", "2"])
    monkeypatch.setattr(VectorStore, "delete_where", StorageBackend.delete_where)  # that of other backends
    matching = store.backend.units

    def meanwhile(filters: Any) -> list[dict[str, Any]]:
        found = list(matching(filters))
        store.add_texts(["new one"], [{"n": 2}], ids=["1"])
        return found

    monkeypatch.setattr(store.backend, "units", meanwhile)
    store.delete(filter={"n": 1})
    assert contents(store.get_by_ids(["1", "2"])) == ["new one"]


@pytest.mark.parametrize("empty", [{}, {"$and": []}, {"$or": [{"n": 1}, {}]}])
def test_a_filter_without_a_condition_deletes_nothing(any_store: MemEvolveVectorStore, empty: dict[str, Any]) -> None:
    any_store.add_documents(documents(3))
    with pytest.raises(InvalidFilterError, match="delete_collection"):
        any_store.delete(filter=empty)
    with pytest.raises(InvalidFilterError, match="ids or a filter, not both"):
        any_store.delete(["1"], filter={"n": 1})
    assert any_store.backend.count() == 3


def test_nothing_some_and_everything_can_be_deleted(any_store: MemEvolveVectorStore) -> None:
    ids = any_store.add_documents(documents(4))
    any_store.delete([])
    assert any_store.backend.count() == 4
    with pytest.raises(InvalidUnitError, match="ids must be a list"):
        any_store.delete(ids[0])
    any_store.delete(ids[:1])
    assert any_store.backend.count() == 3
    any_store.delete()
    assert any_store.backend.count() == 0
    any_store.add_documents(documents(2))
    any_store.delete_collection()
    assert any_store.similarity_search("number") == []
    any_store.add_documents(documents(2))
    assert len(any_store.similarity_search("number")) == 2


# Searching


@pytest.mark.parametrize("k", [0, -1, 1.5, True, None, "4"])
def test_a_number_of_results_without_meaning_is_refused(any_store: MemEvolveVectorStore, k: Any) -> None:
    with pytest.raises(InvalidQueryError, match="k must be a whole number"):
        any_store.similarity_search("x", k=k)
    if k is not None:
        with pytest.raises(InvalidQueryError, match="fetch_k must be a whole number"):
            any_store.max_marginal_relevance_search("x", fetch_k=k)


def test_an_option_that_nobody_knows_is_refused(any_store: MemEvolveVectorStore) -> None:
    any_store.add_documents(documents(2))
    for search in (any_store.similarity_search, any_store.max_marginal_relevance_search):
        with pytest.raises(InvalidQueryError, match="'fliter'"):
            search("number", fliter={"n": 1})
    with pytest.raises(InvalidQueryError, match="'idz'"):
        any_store.add_documents(documents(2), idz=["1", "2"])
    with pytest.raises(InvalidQueryError, match="'where'"):
        any_store.delete(where={"n": 1})
    with pytest.raises(InvalidQueryError, match="query must be a string"):
        any_store.similarity_search([1.0] * 16)  # type: ignore[arg-type]
    assert any_store.backend.count() == 2


def test_queries_are_embedded_as_queries_and_documents_as_documents(tmp_path: Path) -> None:
    class Asymmetric(Words):
        def embed_query(self, text: str) -> list[float]:
            return super().embed_query(text.removeprefix("query: "))

    words = Asymmetric()
    with opened(tmp_path / "m", words) as store:
        store.add_texts(["alpha", "beta"])
        assert contents(store.similarity_search("query: beta", k=1)) == ["beta"]
        assert words.queries == ["query: beta".removeprefix("query: ")]
        store.backend.store({"id": "u", "content": "gamma"})
        assert words.documents[-1] == "gamma"


def test_recall_of_one_asks_for_the_exact_answer(store: MemEvolveVectorStore) -> None:
    store.add_documents(documents(30))
    exact = store.similarity_search_with_score("number w3", k=30, recall=1.0)
    assert len(exact) == 30
    assert [distance for _, distance in exact] == sorted(distance for _, distance in exact)
    with pytest.raises(InvalidQueryError, match="recall"):
        store.similarity_search("number", recall=2.0)


def test_reads_count_as_accesses(store: MemEvolveVectorStore) -> None:
    ids = store.add_documents(documents(3))
    store.similarity_search("number w0", k=1)
    store.get_by_ids([ids[1]])
    store.max_marginal_relevance_search("number w0", k=1, fetch_k=3)
    assert isinstance(store.backend, VectorStore)
    assert store.backend.access_counts() == {ids[0]: 2, ids[1]: 1}


def test_a_document_replaced_between_search_and_reading_is_searched_again() -> None:
    class Numbered(Plain):
        change_number = 0

        def store_batch(self, units: Any, embeddings: Any = None) -> list[str]:
            self.change_number += 1
            return super().store_batch(units, embeddings)

        def delete_batch(self, ids: Any, *, unchanged_since: int | None = None) -> int:
            raise NotImplementedError

    backend = Numbered()
    store = MemEvolveVectorStore(backend, Words())
    store.add_texts(["alpha", "beta"], ids=["1", "2"])
    backend.between = lambda: store.add_texts(["gamma", "alpha"], ids=["1", "2"])
    ((found, distance),) = store.similarity_search_with_score("alpha", k=1)
    assert (found.id, found.page_content) == ("2", "alpha")
    assert distance == pytest.approx(0, abs=1e-6)


def test_a_document_deleted_between_search_and_reading_makes_room_for_the_next() -> None:
    backend = Plain()
    store = MemEvolveVectorStore(backend, Words())
    store.add_texts(["alpha", "beta", "gamma"], ids=["1", "2", "3"])
    backend.between = lambda: backend.delete("1")
    assert len(store.similarity_search("alpha", k=2)) == 2
    backend.between = lambda: backend.delete("2")
    assert contents(store.max_marginal_relevance_search("beta", k=2)) == ["gamma"]


# Embedding functions


def test_without_an_embedding_the_backends_function_is_used(tmp_path: Path) -> None:
    function = FakeEmbedder(8)
    with VectorStore(tmp_path / "m", function, storage_config=CONFIG) as backend:
        store = MemEvolveVectorStore(backend)
        assert isinstance(store.embeddings, FunctionEmbeddings)
        store.add_texts(["alpha", "beta"])
        assert contents(store.similarity_search("beta", k=1)) == ["beta"]
        assert store.embeddings.embed_documents([]) == []
        assert np.allclose(store.embeddings.embed_query("x"), function.vector("x"))
        store.close()
        assert backend.count() == 2  # whoever opened it closes it


def test_without_any_embedding_vectors_still_serve(tmp_path: Path) -> None:
    with VectorStore(tmp_path / "m", None, 4, storage_config=CONFIG) as backend:
        store = MemEvolveVectorStore(backend)
        assert store.embeddings is None
        store.add_embeddings([("a", [1, 0, 0, 0]), ("b", [0, 1, 0, 0])])
        assert contents(store.similarity_search_by_vector([0, 1, 0, 0], k=1)) == ["b"]
        for asking in (lambda: store.similarity_search("a"), lambda: store.add_texts(["a"])):
            with pytest.raises(EmbeddingError, match="embedding is None"):
                asking()


def test_an_adapted_embedding_is_found_again(tmp_path: Path) -> None:
    words = Words()
    with VectorStore(tmp_path / "m", EmbeddingsFunction(words), storage_config=CONFIG) as backend:
        assert MemEvolveVectorStore(backend).embeddings is words


def test_a_store_filled_by_another_model_is_refused(tmp_path: Path) -> None:
    first, second = Words(), Words()
    first.model, second.model = "one", "two"  # type: ignore[attr-defined]
    assert EmbeddingsFunction(first).model_name == "one"
    opened(tmp_path / "m", first).close()
    with pytest.raises(ModelMismatchError, match="'one'"):
        opened(tmp_path / "m", second)


@pytest.mark.parametrize("backend", [None, object(), {}], ids=["None", "object", "dict"])
def test_a_backend_without_vectors_is_refused(backend: Any) -> None:
    with pytest.raises(ConfigurationError, match="search by vector"):
        MemEvolveVectorStore(backend, Words())


# Making, opening, closing


def test_made_from_texts_and_documents(tmp_path: Path) -> None:
    given_documents = [Document(id="own", page_content="a", metadata={"n": 1}), Document(page_content="b")]
    with MemEvolveVectorStore.from_documents(
        given_documents, Words(), index_file=tmp_path / "m", storage_config=CONFIG
    ) as store:
        assert store.get_by_ids(["own"]) == given_documents[:1]
        assert store.backend.count() == 2
        other = MemEvolveVectorStore.from_texts(["c"], Words(), [{"n": 3}], ids=["3"], backend=store.backend)
        other.close()
        assert contents(store.similarity_search("c", k=1)) == ["c"]
    with pytest.raises(StoreClosedError):
        store.similarity_search("c")
    store.close()
    with opened(tmp_path / "m") as again:
        assert contents(again.get_by_ids(["own", "3"])) == ["a", "c"]


async def test_made_from_texts_asynchronously(tmp_path: Path) -> None:
    options: dict[str, Any] = {"index_file": tmp_path / "m", "storage_config": CONFIG}
    with await MemEvolveVectorStore.afrom_texts(["a", "b"], AsyncOnly(), ids=["1", "2"], **options) as store:
        assert contents(await store.aget_by_ids(["2", "1"])) == ["b", "a"]
    with await MemEvolveVectorStore.afrom_documents([Document(page_content="c")], AsyncOnly(), **options) as store:
        assert store.backend.count() == 3


def test_making_one_needs_a_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="index_file is missing"):
        MemEvolveVectorStore.from_texts(["a"], Words())
    with pytest.raises(TypeError, match="nonsense"):
        MemEvolveVectorStore.from_texts(["a"], Words(), index_file=tmp_path / "m", nonsense=1)


def test_nothing_stays_open_when_filling_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[VectorStore] = []
    close = VectorStore.close

    def noted(self: VectorStore) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(VectorStore, "close", noted)
    bad: dict[str, Any] = {"metadatas": [{"x": b""}], "index_file": tmp_path / "m", "storage_config": CONFIG}
    with pytest.raises(InvalidUnitError):
        MemEvolveVectorStore.from_texts(["a"], Words(), **bad)
    assert len(closed) == 1
    with pytest.raises(InvalidUnitError):
        asyncio.run(MemEvolveVectorStore.afrom_texts(["a"], Words(), **bad))
    assert len(closed) == 2


# Asynchronous


async def test_every_asynchronous_call_uses_the_asynchronous_model_and_leaves_the_loop_free(tmp_path: Path) -> None:
    with opened(tmp_path / "m", AsyncOnly()) as store:
        loop, busy = threading.get_ident(), set()
        for name in ("store_batch", "search_vectors", "vectors_of", "retrieve_batch", "delete_batch", "delete_where"):
            monitored(store.backend, name, lambda: busy.add(threading.get_ident()))
        ids = await store.aadd_documents(documents(6), batch_size=2)
        ids += await store.aadd_texts(["alpha"], [{"n": 6}])
        ids += await store.aadd_embeddings([("beta", [0.5] * 16)])
        vector = [0.5] * 16
        assert contents(await store.asimilarity_search("alpha", k=1)) == ["alpha"]
        assert contents(await store.asimilarity_search_by_vector(vector, k=1)) == ["beta"]
        assert (await store.asimilarity_search_with_score("alpha", 1))[0][1] == pytest.approx(0, abs=1e-6)
        assert (await store.asimilarity_search_with_score_by_vector(vector, 1))[0][1] == pytest.approx(0, abs=1e-6)
        assert (await store.asimilarity_search_with_relevance_scores("alpha", 1))[0][1] == pytest.approx(1)
        assert contents(await store.amax_marginal_relevance_search("alpha", k=1)) == ["alpha"]
        assert contents(await store.amax_marginal_relevance_search_by_vector(vector, k=1)) == ["beta"]
        assert len(await store.aget_by_ids(ids)) == 8
        assert await store.adelete(ids[:2]) is True
        assert await store.adelete(filter={"n": 6}) is True
        assert store.backend.count() == 5
        await store.adelete_collection()
        assert store.backend.count() == 0
        assert busy
        assert loop not in busy


def monitored(owner: Any, name: str, note: Callable[[], None]) -> None:
    inner = getattr(owner, name)

    def outer(*arguments: Any) -> Any:
        note()
        return inner(*arguments)

    setattr(owner, name, outer)


async def test_many_tasks_at_once_lose_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as store:

        async def one(n: int) -> None:
            await store.aadd_texts([f"number w{n}"], [{"n": n}], ids=[f"id{n}"])
            (found,) = await store.asimilarity_search(f"number w{n}", k=1)
            assert (found.id, found.metadata) == (f"id{n}", {"n": n})

        await asyncio.gather(*(one(n) for n in range(60)))
        assert store.backend.count() == 60


def test_threads_that_replace_each_others_documents_never_mix_them_up(store: MemEvolveVectorStore) -> None:
    errors: list[str] = []

    def work(worker: int) -> None:
        rng = np.random.default_rng(SEED + worker)
        for step in range(40):
            text = f"t{worker}x{step}"
            store.add_texts([text], [{"text": text}], ids=[f"id{rng.integers(8)}"])
            found = store.similarity_search(text, k=3)
            errors.extend(str(one) for one in found if one.metadata != {"text": one.page_content})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert errors == []
    assert store.backend.count() <= 8
    for found in store.similarity_search("t", k=8):
        ((nearest, distance),) = store.similarity_search_with_score(found.page_content, k=1)
        assert nearest == found
        assert distance == pytest.approx(0, abs=1e-6)


# In LangChain's own hands


@pytest.mark.parametrize(
    ("search_type", "options"),
    [("similarity", {}), ("mmr", {"fetch_k": 10}), ("similarity_score_threshold", {"score_threshold": 0.9})],
)
def test_retrievers(any_store: MemEvolveVectorStore, search_type: str, options: dict[str, Any]) -> None:
    any_store.add_documents(documents(10))
    retriever = any_store.as_retriever(
        search_type=search_type, search_kwargs={"k": 1, "filter": {"n": {"$lt": 5}}, **options}
    )
    assert retriever.tags == ["MemEvolveVectorStore", "Words"]
    assert [found.metadata for found in retriever.invoke("number w3")] == [{"n": 3}]
    assert [found.metadata for found in asyncio.run(retriever.ainvoke("number w4"))] == [{"n": 4}]
    assert all(found.metadata["n"] < 5 for found in retriever.invoke("number w9"))


def test_the_indexing_interface_keeps_the_store_in_step_with_its_source(any_store: MemEvolveVectorStore) -> None:
    manager = InMemoryRecordManager(namespace="test")
    manager.create_schema()

    def run(texts: list[str]) -> dict[str, int]:
        source = [Document(page_content=text, metadata={"source": "s"}) for text in texts]
        done = index(source, manager, any_store, cleanup="full", source_id_key="source", key_encoder="sha256")
        return {name.removeprefix("num_"): count for name, count in done.items() if count}  # type: ignore[misc]

    assert run(["a", "b", "c"]) == {"added": 3}
    assert run(["a", "b", "c"]) == {"skipped": 3}
    assert run(["b", "d"]) == {"added": 1, "skipped": 1, "deleted": 2}
    assert sorted(contents(any_store.similarity_search("x", k=9))) == ["b", "d"]


async def test_the_asynchronous_indexing_interface(any_store: MemEvolveVectorStore) -> None:
    manager = InMemoryRecordManager(namespace="test")
    source = documents(5, source="s")
    for _ in range(2):
        await aindex(source, manager, any_store, cleanup="incremental", source_id_key="source", key_encoder="sha256")
        assert any_store.backend.count() == 5


# Import


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)


def test_nothing_but_the_door_imports_langchain() -> None:
    done = run(
        "import memevolve_gpu, sys\n"
        "[getattr(memevolve_gpu, name) for name in memevolve_gpu.__all__]\n"
        "import memevolve_gpu.cli, memevolve_gpu.dropin\n"
        "print([name for name in sys.modules if name.startswith('langchain')])"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_without_langchain_the_door_says_what_to_install() -> None:
    done = run("import sys; sys.modules['langchain_core'] = None\nimport memevolve_gpu.integrations.langchain")
    assert "pip install 'memevolve-gpu[langchain]'" in done.stderr
    assert done.returncode == 1
