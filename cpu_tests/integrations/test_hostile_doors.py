"""No call of an adapter answers an odd argument with a raw error, and none of them harms what is stored."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import DIM, walk
from pydantic import ValidationError
from support import FakeBatchEmbedder

from memevolve_gpu import MemEvolveError, StorageConfig, VectorStore

VECTOR = [1.0] + [0.0] * (DIM - 1)
CONFIG = {"background": False}
ENDING = {"close", "clear", "aclear", "delete_col", "reset", "delete_all_documents", "start_ttl_sweeper", "progress"}
GOOD: dict[str, Any] = {
    "kind": "jsonl",
    "query": "text",
    "filters": None,
    "top_k": 1,
    "query_embedding": VECTOR,
    "metadata_field": "n",
    "meta": {},
    "documents": [],
    "document_ids": ["absent"],
    "metadata_fields": ["n"],
    "data": {},
    "ops": [],
    "nodes": [],
    "ref_doc_id": "absent",
    "node_ids": ["absent"],
    "vectors": [VECTOR],
    "vector_id": "absent",
    "name": "other",
    "vector_size": DIM,
    "rows": lambda: iter(()),
    "embedding_dim": DIM,
    "id": "a",
    "score": 1.0,
    "payload": {"data": "text"},
    "folder": "folder",
    "index_file": "other",
    "document_store": None,
}


def calls(instance: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public calls that this package defines."""
    for verb in dir(type(instance)):
        function = getattr(type(instance), verb)
        ours = str(getattr(function, "__module__", "")).startswith("memevolve_gpu") and callable(function)
        hook = verb == "model_post_init"  # pydantic's, not a call of users
        if ours and not hook and not verb.startswith("_") and verb not in ENDING and not verb.endswith("_async"):
            yield verb, getattr(instance, verb)


def check(instance: Any, good: dict[str, Any], allowed: tuple[type[Exception], ...] = (MemEvolveError,)) -> None:
    wrong = [line for verb, call in calls(instance) for line in walk(verb, call, good, allowed)]
    assert not wrong, "\n".join(wrong)


def module(name: str, needs: str) -> Any:
    pytest.importorskip(needs)
    return importlib.import_module(f"memevolve_gpu.integrations.{name}")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    settings = StorageConfig(background=False)
    with VectorStore(tmp_path / "store", FakeBatchEmbedder(DIM), DIM, storage_config=settings) as opened:
        opened.store({"id": "kept", "content": "kept"})
        yield opened
        assert opened.exists("kept")
        assert not opened.check()


def test_importers(store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memevolve_gpu.integrations import importers

    monkeypatch.chdir(tmp_path)
    Path("units.jsonl").write_text('{"id": "a", "content": "text"}\n')
    source = importers.open_source("jsonl", "units.jsonl")
    good = {**GOOD, "store": store, "source": source, "path": "units.jsonl"}
    wrong = walk("open_source", importers.open_source, good)
    wrong += walk("import_into", importers.import_into, good)
    if importlib.util.find_spec("pyarrow"):
        wrong += walk("write_parquet", importers.write_parquet, {**good, "path": "out.parquet", "rows": []})
    assert not wrong, "\n".join(wrong)


def test_langgraph(store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("langgraph", "langgraph.store.base").MemEvolveStore
    from langgraph.store.base import GetOp, InvalidNamespaceError, ListNamespacesOp, PutOp, SearchOp

    monkeypatch.chdir(tmp_path)
    wrong = walk("MemEvolveStore", made, {**GOOD, "store": store})
    adapter = made(store)
    check(adapter, GOOD)
    for kind, good in (
        (GetOp, {"namespace": ("a",), "key": "k"}),
        (PutOp, {"namespace": ("a",), "key": "k", "value": {"text": "x"}}),
        (SearchOp, {"namespace_prefix": ("a",)}),
        (ListNamespacesOp, {}),
    ):
        wrong += walk(kind.__name__, one_op(adapter, kind), good, (MemEvolveError, InvalidNamespaceError))
    assert not wrong, "\n".join(wrong)


def one_op(adapter: Any, kind: Any) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        return adapter.batch([kind(**given)])

    call.__signature__ = inspect.signature(kind)  # type: ignore[attr-defined]
    return call


def test_haystack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    haystack = module("haystack", "haystack")
    from haystack import Document
    from haystack.core.errors import DeserializationError
    from haystack.document_stores.errors import DocumentStoreError
    from haystack.errors import FilterError

    monkeypatch.chdir(tmp_path)
    allowed = (MemEvolveError, FilterError, DocumentStoreError, DeserializationError)
    made = haystack.MemEvolveDocumentStore
    wrong = walk("MemEvolveDocumentStore", made, GOOD, allowed)
    documents = made("m", DIM, storage_config=CONFIG)
    documents.write_documents([Document(id="kept", content="kept", embedding=VECTOR, meta={"n": 1})])
    check(documents, {**GOOD, "filters": {}, "data": documents.to_dict()}, allowed)
    assert documents.count_documents() == 1
    for name in ("Embedding", "Keyword", "Hybrid"):
        component = getattr(haystack, f"MemEvolve{name}Retriever")(documents)
        check(component, {**GOOD, "data": component.to_dict()}, allowed)
    documents.close()
    assert not wrong, "\n".join(wrong)


def test_llama_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("llama_index", "llama_index.core").MemEvolveVectorStore
    from llama_index.core.vector_stores.types import VectorStoreQuery

    monkeypatch.chdir(tmp_path)
    allowed = (MemEvolveError, ValidationError)
    wrong = walk("MemEvolveVectorStore", made, GOOD, allowed)
    vectors = made(index_file="m", embedding_dim=DIM, storage_config=CONFIG)
    check(vectors, {**GOOD, "query": VectorStoreQuery(query_embedding=VECTOR)}, allowed)

    def query(**given: Any) -> Any:
        return vectors.query(VectorStoreQuery(**given))

    query.__signature__ = inspect.signature(VectorStoreQuery)  # type: ignore[attr-defined]
    wrong += walk("VectorStoreQuery", query, {}, allowed)
    vectors.close()
    assert not wrong, "\n".join(wrong)


def test_mem0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEM0_TELEMETRY", "False")
    mem0 = module("mem0", "mem0")
    monkeypatch.chdir(tmp_path)
    allowed = (MemEvolveError, ValidationError)
    wrong = walk("MemEvolveConfig", mem0.MemEvolveConfig, GOOD, allowed)
    wrong += walk("MemEvolveVectorStore", mem0.MemEvolveVectorStore, GOOD, allowed)
    memories = mem0.MemEvolveVectorStore("m", embedding_model_dims=DIM, storage_config=CONFIG)
    check(memories, GOOD, allowed)
    memories.close()
    assert not wrong, "\n".join(wrong)


def test_mcp(store: VectorStore) -> None:
    made = module("mcp", "mcp.server.mcpserver").memory_server
    wrong = walk("memory_server", made, {**GOOD, "store": store})
    assert not wrong, "\n".join(wrong)
