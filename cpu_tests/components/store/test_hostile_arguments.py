"""No public call answers an odd argument with a raw error, and none of them writes anything."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_kit import Words
from milvus_fake import FakeMilvus
from support import FakeBatchEmbedder

from memevolve_gpu import (
    AsyncMemorySystem,
    AsyncVectorStore,
    EmbeddingConfig,
    F,
    HashingEmbedder,
    LocalEmbedder,
    MemEvolveError,
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

DIM = 8


def deep() -> list[Any]:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


class Odd:
    """Its ``repr`` fails."""

    def __repr__(self) -> str:
        raise ValueError("no repr")


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    -(10**30),
    10**5000,
    1.5,
    float("nan"),
    float("inf"),
    -1e308,
    "",
    " ",
    "\ud800",
    "a\0b",
    "x" * 300,
    "/" + "y" * 5000,
    b"bytes",
    b"\xff",
    [],
    [[]],
    ["a"],
    [None],
    [b"a"],
    [{"content": 1}],
    ["\ud800"],
    {},
    {"a": 1},
    {1: 2},
    {"\ud800": "\ud800"},
    {"id": "\ud800", "content": "\ud800"},
    {"content": "text", "metadata": {"n": float("nan")}},
    {"type": {"in": [Odd()]}},
    {"type": deep()},
    deep(),
    {"a", "b"},
    range(3),
    object(),
    Odd(),
    lambda *_: None,
    np.array([]),
    np.full((1, DIM), np.nan, np.float32),
    np.ones((2, 3, 4)),
    np.array(["a"]),
    np.array([object()]),
    np.float64("nan"),
    2 + 3j,
    iter([1]),
    Ellipsis,
]


def parameters(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        name: one
        for name, one in inspect.signature(call).parameters.items()
        if name != "self" and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }


def arguments(call: Callable[..., Any], good: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every parameter with every odd value, the others as they should be; and every required one left out."""
    known = parameters(call)
    required = {name: good[name] for name, one in known.items() if one.default is one.empty}
    for name in known:
        for at, value in enumerate(VALUES):
            yield name, at, {**required, name: value}


def told(error: Exception) -> str:
    try:
        return str(error)[:100]
    except Exception as odd:  # noqa: BLE001 - the value that the message would show
        return f"a message that cannot be made: {odd!r}"


def first_ones(call: Callable[..., Any]) -> list[str]:
    """The parameters that can be given by position alone."""
    return [name for name, one in parameters(call).items() if one.kind is one.POSITIONAL_ONLY]


async def taken(result: Any) -> None:
    """Wait for a result, take the first of several, and close it."""
    if inspect.isawaitable(result):
        result = await result
    if isinstance(result, Iterator):
        next(result, None)
    elif isinstance(result, AsyncIterator):
        await anext(result, None)
    elif hasattr(result, "close"):
        closing = result.close()
        if inspect.isawaitable(closing):
            await closing


def walk(name: str, call: Callable[..., Any], good: dict[str, Any]) -> list[str]:
    """What came out of the calls that is neither a result nor an error of ours."""
    wrong = []
    for parameter, at, given in arguments(call, good):
        try:
            result = call(*[given.pop(first) for first in first_ones(call)], **given)
            asyncio.run(taken(result))
        except MemEvolveError:
            continue
        except TypeError as error:
            if "for several ids call" not in told(error):  # the one raw error that is promised
                wrong.append(f"{name}({parameter}, value {at}): TypeError: {told(error)}")
        except Exception as error:  # noqa: BLE001 - collected
            kind = type(error).__name__
            wrong.append(f"{name}({parameter}, value {at}): {kind}: {told(error)}")
    return wrong


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
    *("Hit", "MemoryUnit", "HealthMetrics", "Operation", "Removal", "QueryRecord", "RetrievalResult"),
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
            "system": MemorySystem(MemorySystemConfig(storage_backend=store)),
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
            "AsyncVectorStore": lambda: AsyncVectorStore(self.store),
            "AsyncMemorySystem": lambda: AsyncMemorySystem(
                MemorySystem(MemorySystemConfig(storage_backend=self.store))
            ),
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
            elif hasattr(result, "close") and result is not self.store and not name.startswith("Async"):
                result.close()  # one for asyncio would close the store

        make.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
        return make


def public() -> Iterator[tuple[str, Any]]:
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            found = getattr(importlib.import_module(module), name)
            if callable(found) and not (inspect.isclass(found) and issubclass(found, BaseException)):
                yield name, found


NAMES = dict(public())
DELETING = {"AsyncMemorySystem", "MemoryManager", "MemorySystem", "SimpleManagementStrategy", "MemEvolveVectorStore"}


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
