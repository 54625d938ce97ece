"""The vector store for LlamaIndex: what its base class promises, its filters against LlamaIndex's own reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import SEED

pytest.importorskip("llama_index.core", reason="llama-index-core is missing: pip install 'memevolve-gpu[llama-index]'")

from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.schema import ImageNode, IndexNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from memevolve_gpu import VectorStore
from memevolve_gpu.errors import ConfigurationError, InvalidFilterError, InvalidQueryError, InvalidUnitError
from memevolve_gpu.integrations.llama_index import MemEvolveVectorStore

CONFIG = {"background": False}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemEvolveVectorStore]:
    one = MemEvolveVectorStore(index_file=str(tmp_path / "m"), embedding_dim=2, storage_config=CONFIG)
    yield one
    one.close()


def node(node_id: str, text: str, embedding: list[float] | None, ref: str | None = None, **metadata: Any) -> TextNode:
    links = {} if ref is None else {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=ref)}
    return TextNode(id_=node_id, text=text, embedding=embedding, metadata=metadata, relationships=links)


def three() -> list[TextNode]:
    return [
        node("a", "rebase and push", [1.0, 0.0], "git", user="alice", tags=["x", "y"], n=1, at="2024-01-01"),
        node("b", "write tests", [0.6, 0.8], "work", user="bob", tags=[], n=2, at="2025-01-01T10:00:00Z"),
        node("c", "rebase later", None, "git", user="Alicia_%", n=3),
    ]


def where(key: str, operator: str, value: Any) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, operator=FilterOperator(operator), value=value)])


def ids(store: MemEvolveVectorStore, filters: MetadataFilters | None) -> list[str]:
    return [one.node_id for one in store.get_nodes(filters=filters)]


@pytest.mark.parametrize(
    ("key", "operator", "value", "found"),
    [
        ("user", "==", "alice", "a"),
        ("user", "!=", "alice", "bc"),
        ("n", ">", 1, "bc"),
        ("n", ">=", 2, "bc"),
        ("n", "<", 2, "a"),
        ("n", "<=", 2, "ab"),
        ("at", ">", "2024-06-01", "b"),
        ("n", "in", [1, 3], "ac"),
        ("n", "nin", [1, 3], "b"),
        ("tags", "any", ["y", "z"], "a"),
        ("tags", "all", ["x", "y"], "a"),
        ("tags", "all", ["x", "z"], ""),
        ("tags", "contains", "x", "a"),
        ("user", "text_match", "lic", "ac"),
        ("user", "text_match", "a_%", "c"),
        ("user", "text_match", "ALICE", ""),
        ("user", "text_match_insensitive", "ALI", "ac"),
        ("tags", "is_empty", None, "bc"),
        ("at", "==", None, "c"),
        ("at", "!=", None, "ab"),
        ("ref_doc_id", "==", "git", "ac"),
    ],
)
def test_every_operator(store: MemEvolveVectorStore, key: str, operator: str, value: Any, found: str) -> None:
    store.add(three())
    assert ids(store, where(key, operator, value)) == list(found)
    query = VectorStoreQuery([1.0, 0.0], similarity_top_k=9, filters=where(key, operator, value))
    assert set(store.query(query).ids or []) == set(found) - {"c"}  # which has no embedding


def test_operators_are_all_known() -> None:
    tested = {mark.args[1][i][1] for mark in test_every_operator.pytestmark for i in range(len(mark.args[1]))}
    assert tested == {one.value for one in FilterOperator}


def test_nested_conditions(store: MemEvolveVectorStore) -> None:
    store.add(three())
    either = MetadataFilters(
        filters=[*where("n", "==", 1).filters, *where("n", "==", 3).filters], condition=FilterCondition.OR
    )
    assert ids(store, either) == ["a", "c"]
    neither = MetadataFilters(filters=either.filters, condition=FilterCondition.NOT)
    assert ids(store, neither) == ["b"]
    both = MetadataFilters(filters=[either, *where("user", "!=", "alice").filters])
    assert ids(store, both) == ["c"]
    assert ids(store, MetadataFilters(filters=[both, neither], condition=FilterCondition.OR)) == ["b", "c"]
    assert ids(store, MetadataFilters(filters=[])) == ["a", "b", "c"]


def test_random_filters_match_what_llama_index_says(store: MemEvolveVectorStore) -> None:
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    fields: dict[str, list[Any]] = {"n": [1, 2, 2.5], "s": ["a", "b", "ab", ""], "l": [["a"], ["a", "b"], []]}
    metadata = {
        str(number): {key: chance.choice(values) for key, values in fields.items() if chance.random() < 0.8}
        for number in range(40)
    }
    store.add([node(name, "text", [1.0, 0.0], **one) for name, one in metadata.items()])
    operators = {
        "n": ["==", "!=", ">", ">=", "<", "<=", "in", "nin", "is_empty"],
        "s": ["==", "!=", "in", "nin", "text_match", "text_match_insensitive", "contains", "is_empty"],
        "l": ["contains", "any", "all", "is_empty"],
    }
    for _ in range(200):
        filters = []
        for _ in range(chance.randint(1, 3)):
            key = chance.choice(list(operators))
            operator = chance.choice(operators[key])
            among: list[Any] = fields["s"][:3] if key == "l" else fields[key]
            value: Any = chance.sample(among, 2) if operator in ("in", "nin", "any", "all") else chance.choice(among)
            if key == "n" and isinstance(value, list):
                value = [1, 2]
            filters.append(MetadataFilter(key=key, operator=FilterOperator(operator), value=value))
        asked = MetadataFilters(filters=filters, condition=chance.choice(list(FilterCondition)))
        matches = build_metadata_filter_fn(lambda name: metadata[name], asked)
        assert ids(store, asked) == [name for name in metadata if matches(name)], asked


def test_nodes_come_back_as_they_were(store: MemEvolveVectorStore) -> None:
    nodes = [
        node("t", "text", [1.0, 0.0], "doc", created_at="mine", deep={"a": [1, None]}),
        IndexNode(id_="i", text="index", index_id="other", embedding=[1.0, 0.0]),
        ImageNode(id_="p", text="caption", image_url="x.png", embedding=[1.0, 0.0]),
    ]
    assert store.add(nodes) == ["t", "i", "p"]
    for given, got in zip(nodes, store.get_nodes(), strict=True):
        assert type(got) is type(given)
        assert got.model_dump() == {**given.model_dump(), "embedding": None}
    assert ids(store, where("created_at", "==", "mine")) == ["t"]
    assert ids(store, where("deep.a", "contains", 1)) == ["t"]


def test_query_modes(store: MemEvolveVectorStore) -> None:
    store.add(three())
    store.add([node("d", "rebase", [0.0, 1.0])])
    nearest = store.query(VectorStoreQuery([1.0, 0.0], similarity_top_k=2))
    assert nearest.ids == ["a", "b"]
    assert nearest.similarities == pytest.approx([1.0, 0.6])
    assert [one.get_content() for one in nearest.nodes or []] == ["rebase and push", "write tests"]
    for mode in (VectorStoreQueryMode.TEXT_SEARCH, VectorStoreQueryMode.SPARSE):
        words = store.query(VectorStoreQuery(query_str="rebase", similarity_top_k=5, mode=mode))
        assert set(words.ids or []) == {"a", "c", "d"}

    def hybrid(alpha: float | None) -> list[str]:
        mode = VectorStoreQueryMode.HYBRID
        query = VectorStoreQuery([1.0, 0.0], query_str="rebase", similarity_top_k=4, mode=mode, alpha=alpha)
        return list(store.query(query).ids or [])

    assert hybrid(None)[0] in "ad"
    assert hybrid(1.0)[:2] == ["a", "b"]
    assert hybrid(0.0)[0] == "d"  # the shortest text with the word
    varied = VectorStoreQuery([0.9, 0.1], similarity_top_k=2, mode=VectorStoreQueryMode.MMR, mmr_threshold=0.1)
    assert store.query(varied).ids == ["a", "d"]
    limited = VectorStoreQuery([1.0, 0.0], similarity_top_k=5, node_ids=["a", "b"], doc_ids=["work"])
    assert store.query(limited).ids == ["b"]
    with pytest.raises(ConfigurationError, match="svm"):
        store.query(VectorStoreQuery([1.0, 0.0], mode=VectorStoreQueryMode.SVM))
    with pytest.raises(InvalidQueryError, match="query_embedding"):
        store.query(VectorStoreQuery())
    with pytest.raises(InvalidQueryError, match="query_str"):
        store.query(VectorStoreQuery(mode=VectorStoreQueryMode.TEXT_SEARCH))


def test_deleting(store: MemEvolveVectorStore) -> None:
    store.add(three())
    store.delete("nobody")
    store.delete("git")
    assert ids(store, None) == ["b"]
    store.add(three())
    store.delete_nodes(["a", "b"], where("n", "==", 1))
    assert ids(store, None) == ["b", "c"]
    store.delete_nodes([])
    with pytest.raises(InvalidFilterError, match="clear"):
        store.delete_nodes()
    assert [one.node_id for one in store.get_nodes(["c", "b", "c", "no"])] == ["c", "b"]
    store.clear()
    assert store.get_nodes() == []


async def test_async(store: MemEvolveVectorStore) -> None:
    assert await store.async_add(three()) == ["a", "b", "c"]
    assert (await store.aquery(VectorStoreQuery([1.0, 0.0]))).ids == ["a"]
    await store.adelete_nodes(["b"])
    await store.adelete("git")
    assert await store.aget_nodes() == []
    await store.async_add(three())
    await store.aclear()
    assert await store.aget_nodes() == []


@pytest.mark.parametrize("bad", [where("n", "in", 1), where("n", "text_match", 1), where("n", ">", [1])])
def test_bad_filters_are_named(store: MemEvolveVectorStore, bad: MetadataFilters) -> None:
    with pytest.raises(InvalidFilterError):
        store.get_nodes(filters=bad)


def test_what_is_no_node_is_refused(store: MemEvolveVectorStore) -> None:
    with pytest.raises(InvalidUnitError, match=r"nodes\[1\]"):
        store.add([node("a", "text", [1.0, 0.0]), "text"])
    assert store.get_nodes() == []


def test_an_index_on_top_is_kept_and_read_by_other_doors(tmp_path: Path) -> None:
    def index_store() -> MemEvolveVectorStore:
        return MemEvolveVectorStore(index_file=str(tmp_path / "m"), embedding_dim=4, storage_config=CONFIG)

    model, first = MockEmbedding(4), index_store()
    context = StorageContext.from_defaults(vector_store=first)
    nodes = [node("a", "rebase", None), node("b", "push", None)]
    index = VectorStoreIndex(nodes, storage_context=context, embed_model=model)
    index.insert_nodes([node("c", "tests", None)])
    first.close()
    second = index_store()
    again = VectorStoreIndex.from_vector_store(second, embed_model=model)
    assert {one.node_id for one in again.as_retriever(similarity_top_k=5).retrieve("git")} == {"a", "b", "c"}
    second.close()
    with VectorStore(tmp_path / "m", None, storage_config=CONFIG) as store:
        assert [unit["content"] for unit in store.units()] == ["rebase", "push", "tests"]
    assert MemEvolveVectorStore.from_dict(second.to_dict()).index_file == second.index_file


def test_the_quick_start_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (repository / "docs" / "how-to" / "llama-index.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == "Copy the -wal file too.\n"
