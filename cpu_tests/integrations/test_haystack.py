"""The document store for Haystack: Haystack's own suites, then what they leave out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SEED

pytest.importorskip("haystack", reason="haystack-ai is not installed: pip install 'memevolve-gpu[haystack]'")

from haystack import Document, Pipeline
from haystack.dataclasses import ByteStream, SparseEmbedding
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy
from haystack.errors import FilterError
from haystack.testing import document_store as suite
from haystack.testing import document_store_async as async_suite
from haystack.utils.filters import document_matches_filter

from memevolve_gpu.integrations.haystack import (
    MemEvolveDocumentStore,
    MemEvolveEmbeddingRetriever,
    MemEvolveHybridRetriever,
    MemEvolveKeywordRetriever,
)

CONFIG = {"background": False}


def plain(document: Document) -> dict[str, Any]:
    """The document with its embedding as float32, which is what the store keeps."""
    held: dict[str, Any] = document.to_dict(flatten=False)
    if held["embedding"] is not None:
        held["embedding"] = np.asarray(held["embedding"], dtype=np.float32).tolist()
    return held


class Fixture:
    @pytest.fixture
    def document_store(self, tmp_path: Path) -> Iterator[MemEvolveDocumentStore]:
        store = MemEvolveDocumentStore(tmp_path / "m", storage_config=CONFIG)
        yield store
        store.close()

    @staticmethod
    def assert_documents_are_equal(received: list[Document], expected: list[Document]) -> None:
        assert [plain(one) for one in received] == [plain(one) for one in expected]


class TestSuite(
    Fixture,
    suite.DocumentStoreBaseExtendedTests,
    suite.CountDocumentsByFilterTest,
    suite.CountUniqueMetadataByFilterTest,
    suite.GetMetadataFieldsInfoTest,
    suite.GetMetadataFieldMinMaxTest,
    suite.GetMetadataFieldUniqueValuesTest,
):
    def test_write_documents(self, document_store: MemEvolveDocumentStore) -> None:
        one = Document(content="a text")
        assert document_store.write_documents([one]) == 1
        with pytest.raises(DuplicateDocumentError, match="OVERWRITE"):
            document_store.write_documents([one])


class TestAsyncSuite(
    Fixture,
    async_suite.CountDocumentsAsyncTest,
    async_suite.CountDocumentsByFilterAsyncTest,
    async_suite.CountUniqueMetadataByFilterAsyncTest,
    async_suite.DeleteAllAsyncTest,
    async_suite.DeleteByFilterAsyncTest,
    async_suite.DeleteDocumentsAsyncTest,
    async_suite.FilterDocumentsAsyncTest,
    async_suite.GetMetadataFieldMinMaxAsyncTest,
    async_suite.GetMetadataFieldsInfoAsyncTest,
    async_suite.GetMetadataFieldUniqueValuesAsyncTest,
    async_suite.UpdateByFilterAsyncTest,
    async_suite.WriteDocumentsAsyncTest,
):
    async def test_write_documents_async(self, document_store: MemEvolveDocumentStore) -> None:
        one = Document(content="a text")
        assert await document_store.write_documents_async([one]) == 1  # type: ignore[attr-defined]
        with pytest.raises(DuplicateDocumentError):
            await document_store.write_documents_async([one])  # type: ignore[attr-defined]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemEvolveDocumentStore]:
    one = MemEvolveDocumentStore(tmp_path / "m", 2, storage_config=CONFIG)
    yield one
    one.close()


EAST, NORTH = [1.0, 0.0], [0.0, 1.0]


def three() -> list[Document]:
    return [
        Document(id="a", content="rebase and push", meta={"user": "alice"}, embedding=EAST),
        Document(id="b", content="write tests", meta={"user": "bob"}, embedding=NORTH),
        Document(id="c", content="rebase later", meta={"user": "alice"}),
    ]


def ids(found: dict[str, list[Document]]) -> list[str]:
    return [one.id for one in found["documents"]]


def test_a_document_comes_back_as_it_was(store: MemEvolveDocumentStore) -> None:
    whole = Document(
        content="text",
        blob=ByteStream(b"\x00\xff", mime_type="x/y"),
        meta={"created_at": "mine", "deep": {"key.with dot": [1, None, "ä"]}, 'a"b\\c.d': 1},
        embedding=[0.25, 0.5],
        sparse_embedding=SparseEmbedding(indices=[1], values=[0.5]),
        score=0.5,
    )
    bare = Document(id="bare", content=None, meta={})
    store.write_documents([whole, bare])
    assert store.filter_documents() == [whole, bare]
    store.update_by_filter({"field": "id", "operator": "==", "value": "bare"}, {"updated_at": "now"})
    store.update_by_filter({"field": "id", "operator": "==", "value": "bare"}, {"x": 1})
    assert store.filter_documents()[1].meta == {"updated_at": "now", "x": 1}
    assert store.count_documents_by_filter({"field": "meta.updated_at", "operator": "==", "value": "now"}) == 1
    assert store.count_documents_by_filter({"field": "meta.created_at", "operator": "==", "value": None}) == 1


def test_a_rejected_batch_writes_nothing(store: MemEvolveDocumentStore) -> None:
    store.write_documents(three()[:1])
    with pytest.raises(DuplicateDocumentError):
        store.write_documents(three())
    with pytest.raises(ValueError, match="embeddings"):
        store.write_documents([Document(content="x", embedding=[1.0, 2.0, 3.0])])
    assert store.count_documents() == 1
    assert store.write_documents([*three(), *three()], DuplicatePolicy.SKIP) == 2


VALUES = [None, 1, 2.5, -3, "b", "2024-05-01", "2024-05-01T00:00:00", "2023-01-31T10:00:00Z", True]


def random_filter(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    if depth < 3 and chance.random() < 0.5:
        parts = [random_filter(chance, depth + 1) for _ in range(chance.randint(0, 3))]
        return {"operator": chance.choice(["AND", "OR", "NOT"]), "conditions": parts}
    field = chance.choice(["meta.x", "meta.y", "meta.z.inner", "y", "content"])
    operator = chance.choice(["==", "!=", "in", "not in", ">", ">=", "<", "<="])
    if operator in ("in", "not in"):
        return {"field": field, "operator": operator, "value": chance.sample(VALUES, chance.randint(0, 3))}
    among = VALUES if operator in ("==", "!=") else [None, 1, 2.5, "2024-05-01", "2023-01-31T10:00:00"]
    return {"field": field, "operator": operator, "value": chance.choice(among)}


def test_random_filters_match_what_haystack_says(store: MemEvolveDocumentStore) -> None:
    """Against Haystack's reference; where it raises because of a document's type, ours does not match."""
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    documents = [
        Document(
            id=str(number),
            content=chance.choice(["a", "b", None]),
            meta={
                key: value
                for key, value in [
                    ("x", chance.choice([1, 2.5, -3, 7, None])),
                    ("y", chance.choice(["b", "2024-05-01", "2023-01-31T10:00:00Z", True, None])),
                    ("z", chance.choice([{"inner": 1}, {"inner": "2024-05-01T00:00:00"}, {}, 3])),
                ]
                if chance.random() < 0.8
            },
        )
        for number in range(40)
    ]
    store.write_documents(documents)
    compared = 0
    for _ in range(300):
        filters = random_filter(chance)
        try:
            expected = [one.id for one in documents if document_matches_filter(filters, one)]
        except (FilterError, TypeError):
            continue
        if any(isinstance(one, bool) for one in VALUES if _mentions(filters, one)):
            continue  # True equals 1 in Python, and not in JSON
        assert [one.id for one in store.filter_documents(filters)] == expected, filters
        compared += 1
    assert compared > 100


def _mentions(filters: dict[str, Any], value: Any) -> bool:
    if "conditions" in filters:
        return any(_mentions(one, value) for one in filters["conditions"])
    held = filters["value"] if isinstance(filters["value"], list) else [filters["value"]]
    return any(one == value for one in held)


@pytest.mark.parametrize(
    "bad",
    [
        "text",
        {"operator": "XOR", "conditions": []},
        {"operator": "AND", "conditions": {}},
        {"field": "meta.x", "operator": "~", "value": 1},
        {"field": "", "operator": "==", "value": 1},
        {"field": "meta.x", "operator": ">", "value": "text"},
        {"field": "meta.x", "operator": ">", "value": True},
        {"field": "meta.x", "operator": "==", "value": {"a": 1}},
        {"field": "embedding", "operator": "==", "value": [1.0]},
    ],
)
def test_bad_filters_are_filter_errors(store: MemEvolveDocumentStore, bad: Any) -> None:
    with pytest.raises(FilterError):
        store.filter_documents(bad)


def test_deleting_by_a_filter_of_everything_is_refused(store: MemEvolveDocumentStore) -> None:
    store.write_documents(three())
    with pytest.raises(FilterError, match="delete_all_documents"):
        store.delete_by_filter({})
    assert store.count_documents() == 3


def test_retrievers(store: MemEvolveDocumentStore) -> None:
    store.write_documents(three())
    alice = {"field": "meta.user", "operator": "==", "value": "alice"}
    by_meaning = MemEvolveEmbeddingRetriever(store, top_k=5)
    found = by_meaning.run([0.6, 0.8])
    assert ids(found) == ["b", "a"]  # c has no embedding
    assert [one.score for one in found["documents"]] == pytest.approx([0.8, 0.6])
    assert ids(by_meaning.run([0.6, 0.8], filters=alice)) == ["a"]
    assert set(ids(MemEvolveKeywordRetriever(store).run("rebase"))) == {"a", "c"}
    assert ids(MemEvolveHybridRetriever(store, top_k=3).run("rebase", EAST))[0] == "a"
    assert ids(asyncio.run(by_meaning.run_async(EAST, top_k=1))) == ["a"]
    assert store.filter_documents({"field": "embedding", "operator": "==", "value": None})[0].id == "c"


def test_a_pipeline_survives_yaml(store: MemEvolveDocumentStore) -> None:
    alice = {"field": "meta.user", "operator": "==", "value": "alice"}
    store.write_documents(three())
    pipeline = Pipeline()
    pipeline.add_component("find", MemEvolveHybridRetriever(store, alice, 2, filter_policy="merge"))
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["memevolve_gpu.integrations.haystack"])
    found = again.run({"find": {"query": "rebase", "query_embedding": EAST}})
    assert ids(found["find"]) == ["a", "c"]
    again.get_component("find").document_store.close()


def test_the_store_is_kept(tmp_path: Path) -> None:
    first = MemEvolveDocumentStore(tmp_path / "m", 2, storage_config=CONFIG)
    first.write_documents(three())
    first.close()
    second = MemEvolveDocumentStore.from_dict(first.to_dict())
    assert [one.id for one in second.filter_documents()] == ["a", "b", "c"]
    second.close()


def test_the_quick_start_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (repository / "docs" / "how-to" / "haystack.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == "wal\n"
