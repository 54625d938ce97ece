"""No public call answers an odd argument with a raw error, and none of them writes anything."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import DIM, walk
from langchain_kit import Words
from milvus_fake import FakeMilvus
from support import FakeBatchEmbedder

from memevolve_gpu import (
    EmbeddingConfig,
    F,
    HashingEmbedder,
    LocalEmbedder,
    Memory,
    MemorySystem,
    MemorySystemConfig,
    MilvusStore,
    OpenAIEmbedder,
    StorageConfig,
    VectorStore,
)
from memevolve_gpu.components.manage import MemoryManager, SimpleManagementStrategy
from memevolve_gpu.components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    Ranking,
    RetrievalContext,
    SemanticRetrievalStrategy,
)
from memevolve_gpu.components.store.copy import copy_store
from memevolve_gpu.integrations import langchain

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from public_names import MODULES  # type: ignore[import-not-found]

UNIT = {"content": "text"}
GOOD: dict[str, Any] = {
    "content": "close files",
    "time": "30d",
    "ranking": Ranking(),
    "value": 1,
    "pattern": "a",
    "size": 1,
    "moments": None,
    "low": 0,
    "high": 1,
    "now": 0.0,
    "unit": UNIT,
    "other": F("type") == "skill",
    "units": [UNIT],
    "unit_id": "absent",
    "ids": ["absent"],
    "delete_ids": ["absent"],
    "query": "text",
    "queries": np.ones((1, DIM), np.float32),
    "count": 1,
    "kind": "lru",
    "limit": 1,
    "operation_type": "prune",
    "details": {},
    "state": {},
    "text": "text",
    "texts": ["text"],
    "experience": UNIT,
    "trajectory": [UNIT],
    "trajectories": [[UNIT]],
    "unit_ids": ["absent"],
    "operation": "prune",
    "documents": [],
    "items": [],
    "keys": ["absent"],
    "key_value_pairs": [],
    "k": 1,
    "vectors": np.ones((1, DIM), np.float32),
    "distance": 1.0,
    "metric": "l2",
    "name": "value",
    "values": {},
    "new_component": SemanticRetrievalStrategy(),
    "semantic_weight": 0.5,
    "keyword_weight": 0.5,
    "neighbours": 0.5,
    "diversity": 0.5,
    "rerank": lambda _query, texts: [0.0] * len(texts),
    "relative": False,
    "scope": ["user"],
    "keep": "newest",
    "compare": "text",
    "filters": {"id": "absent"},
    "field": "type",
    "changes": {"metadata": {}},
}

NOBODY = "http://127.0.0.1:9/v1"
"""An address where no service answers."""


class FakeModel:
    """In the place of sentence_transformers.SentenceTransformer."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def encode(self, texts: list[str], **_: Any) -> Any:
        return np.ones((len([text.strip() for text in texts]), DIM))


READING = {
    *("retrieve", "retrieve_all", "retrieve_batch", "exists", "count", "get_metadata", "search", "search_units"),
    *("search_vectors", "search_keywords", "units", "export_rows", "vectors_of", "sample_vectors", "inventory"),
    *(
        "similarities",
        "facets",
        "access_order",
        "access_counts",
        "record_access",
        "get_storage_health",
        "statistics",
        "check",
    ),
}

MADE_BY_US = {
    *("Hit", "MemoryUnit", "HealthMetrics", "Merged", "Operation", "Removal", "QueryRecord", "RetrievalResult"),
    *("RetrievalMetrics", "StrategyMetrics"),
}
"""Types of results, which callers read."""

CONTRACTS = {"StorageBackend", "ManagementStrategy", "RetrievalStrategy"}
"""Contracts that callers fulfil."""

ENDING = {"close", "clear", "watch", "aclose", "settings_customise_sources", "adelete_collection", "delete_collection"}
"""Calls that end or empty what is walked, and take nothing; one that waits for ever; and a hook of pydantic's."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    with VectorStore(
        tmp_path / "store", FakeBatchEmbedder(DIM), DIM, storage_config=StorageConfig(background=False)
    ) as opened:
        opened.store_batch([{"id": name, "content": name} for name in ("kept1", "kept2")])
        yield opened


class Bench:
    """What the public names need: a store, and an instance of every class."""

    def __init__(self, store: VectorStore, folder: Path) -> None:
        self.store, self.folder, self.embed = store, folder, FakeBatchEmbedder(DIM)
        self.good = {
            **GOOD,
            "path": folder / "backup",
            "backup": folder / "absent",
            "prefix": folder / "new",
            "index_file": folder / "new",
            "place": folder / "new",
            "embedding_function": self.embed,
            "function": self.embed,
            "embedding": Words(DIM),
            "embeddings": Words(DIM),
            "storage_backend": store,
            "backend": store,
            "store": langchain.MemEvolveVectorStore(store, Words(DIM)),
            "source": store,
            "target": store,
            "strategy": SemanticRetrievalStrategy(),
            "management_strategy": SimpleManagementStrategy(),
            "component": SemanticRetrievalStrategy(),
            "component_type": "retrieval",
            "config": StorageConfig(),
        }

    def instances(self) -> dict[str, Callable[[], Any] | None]:
        """What makes an instance of each public class that has methods; None for a function."""
        return {
            "VectorStore": lambda: self.store,
            "MilvusStore": lambda: MilvusStore(
                self.embed, DIM, milvus_config={"timeout": 0.3}, client=FakeMilvus().connect
            ),
            "MemorySystem": lambda: MemorySystem(MemorySystemConfig(storage_backend=self.store)),
            "Memory": lambda: Memory(self.folder / "memory", self.embed),
            "MemoryManager": lambda: MemoryManager(self.store, SimpleManagementStrategy()),
            "SimpleManagementStrategy": SimpleManagementStrategy,
            "SemanticRetrievalStrategy": SemanticRetrievalStrategy,
            "KeywordRetrievalStrategy": KeywordRetrievalStrategy,
            "HybridRetrievalStrategy": HybridRetrievalStrategy,
            "RetrievalContext": lambda: RetrievalContext(SemanticRetrievalStrategy()),
            "HashingEmbedder": lambda: HashingEmbedder(DIM),
            "LocalEmbedder": LocalEmbedder,
            "OpenAIEmbedder": lambda: OpenAIEmbedder(NOBODY, "key", "model", 0.3, DIM, max_retries=0),
            "EmbeddingsFunction": lambda: langchain.EmbeddingsFunction(Words(DIM)),
            "FunctionEmbeddings": lambda: langchain.FunctionEmbeddings(self.embed),
            "MemEvolveDocumentIndex": lambda: langchain.MemEvolveDocumentIndex(
                store=langchain.MemEvolveVectorStore(self.store, Words(DIM))
            ),
            "MemEvolveKeyValueStore": lambda: langchain.MemEvolveKeyValueStore(self.folder / "keys"),
            "MemEvolveRetriever": lambda: langchain.MemEvolveRetriever(
                store=langchain.MemEvolveVectorStore(self.store, Words(DIM))
            ),
            "MemEvolveVectorStore": lambda: langchain.MemEvolveVectorStore(self.store, Words(DIM)),
            "F": lambda: F("type"),
            "HalfLife": None,
            "Ranking": None,
            "StorageConfig": StorageConfig,
            "EmbeddingConfig": EmbeddingConfig,
            "MemorySystemConfig": None,
            "open_store": None,
            "maximal_marginal_relevance": None,
            "relevance": None,
        }

    def made(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Calling a class or function, and closing what it opened."""

        @functools.wraps(call, updated=())
        def make(**given: Any) -> None:
            result = call(**given)
            if name == "MemorySystemConfig":
                result.storage_backend = self.store if result.storage_backend is None else result.storage_backend
                MemorySystem(result)
            elif hasattr(result, "close") and result is not self.store:
                result.close()

        make.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
        return make


def public() -> Iterator[tuple[str, Any]]:
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            found = getattr(importlib.import_module(module), name)
            if callable(found) and not (inspect.isclass(found) and issubclass(found, BaseException)):
                yield name, found


NAMES = dict(public())
DELETING = {"MemoryManager", "MemorySystem", "SimpleManagementStrategy", "MemEvolveVectorStore"}


def is_ours(call: Any) -> bool:
    return str(getattr(call, "__module__", None)).startswith("memevolve_gpu")


def test_every_public_name_is_walked(store: VectorStore, tmp_path: Path) -> None:
    assert Bench(store, tmp_path).instances().keys() | MADE_BY_US | CONTRACTS == NAMES.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(NAMES.keys() - MADE_BY_US - CONTRACTS))
def test_no_public_call_raises_a_raw_error(
    name: str, store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "targets"
    folder.mkdir()
    monkeypatch.chdir(folder)
    fake = types.ModuleType("sentence_transformers")
    fake.__spec__ = importlib.util.spec_from_loader("sentence_transformers", loader=None)
    vars(fake)["SentenceTransformer"] = FakeModel
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    bench = Bench(store, folder)
    wrong = walk(name, bench.made(name, NAMES[name]), bench.good)
    make = bench.instances()[name]
    instance = make() if make else None
    for verb, _ in inspect.getmembers(type(instance), callable):
        if verb.startswith("_") or verb in ENDING or not is_ours(getattr(type(instance), verb)):
            continue
        before = store.change_number
        wrong += walk(f"{name}.{verb}", getattr(instance, verb), bench.good)
        if instance is store and verb in READING:
            assert store.change_number == before, verb
    if callable(instance):
        wrong += walk(f"{name}()", instance, bench.good)
    if isinstance(instance, langchain.MemEvolveKeyValueStore):
        instance.close()
    assert not wrong, "\n".join(wrong)
    assert store.retrieve_batch(["kept1", "kept2"]) or name in DELETING
    assert not store.check()


def test_what_copies_stores(store: VectorStore) -> None:
    good = {"source": store, "target": store}
    assert walk("copy_store", copy_store, good) == []
    assert store.count() == 2
