"""No public call answers an odd argument with a raw error, and none of them writes anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import FakeBatchEmbedder

from memevolve_gpu import HashingEmbedder, MemEvolveError, StorageConfig, VectorStore
from memevolve_gpu.components.store.copy import copy_store

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


def walk(name: str, call: Callable[..., Any], good: dict[str, Any]) -> list[str]:
    """What came out of the calls that is neither a result nor an error of ours."""
    wrong = []
    for parameter, at, given in arguments(call, good):
        try:
            result = call(**given)
            if isinstance(result, Iterator):
                next(result, None)
        except MemEvolveError:
            continue
        except TypeError as error:
            if "for several ids call" not in str(error):  # the one raw error that is promised
                wrong.append(f"{name}({parameter}, value {at}): TypeError: {str(error)[:100]}")
        except Exception as error:  # noqa: BLE001 - collected
            kind = type(error).__name__
            shape = f"{type(given[parameter]).__name__}, value {at}"
            wrong.append(f"{name}({parameter}={shape}): {kind}: {str(error)[:100]}")
    return wrong


UNIT = {"content": "text"}
GOOD: dict[str, Any] = {
    "unit": UNIT,
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
    "filters": {"id": "absent"},
    "field": "type",
    "changes": {"metadata": {}},
}
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


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    with VectorStore(
        tmp_path / "store", FakeBatchEmbedder(DIM), DIM, storage_config=StorageConfig(background=False)
    ) as opened:
        opened.store_batch([{"id": name, "content": name} for name in ("kept1", "kept2")])
        yield opened


def test_every_call_of_a_store(store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "targets"
    folder.mkdir()
    good = {
        **GOOD,
        "path": folder / "backup",
        "backup": folder / "absent",
        "prefix": folder / "new",
        "index_file": folder / "new",
    }
    wrong: list[str] = []
    for name, _ in inspect.getmembers(VectorStore, callable):
        if name.startswith("_") or name in ("close", "clear"):
            continue
        before = store.change_number
        wrong += walk(name, getattr(store, name), good)
        if name in READING:
            assert store.change_number == before, name
    assert wrong == []
    assert store.retrieve_batch(["kept1", "kept2"])
    assert not store.check()


def test_what_opens_and_copies_stores(store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    embed = FakeBatchEmbedder(DIM)

    def made(index_file: Any, embedding_function: Any, embedding_dim: Any = DIM, index_type: Any = None,
             storage_config: Any = None) -> None:  # fmt: skip
        VectorStore(index_file, embedding_function, embedding_dim, index_type, storage_config).close()

    good = {"index_file": tmp_path / "made", "embedding_function": embed, "source": store, "target": store}
    wrong = walk("VectorStore", made, good) + walk("copy_store", copy_store, good)
    wrong += walk("HashingEmbedder", HashingEmbedder, {})
    embedder = HashingEmbedder()

    def embedded(text: Any) -> Any:
        return embedder(text)

    wrong += walk("HashingEmbedder()", embedded, {"text": "text"})
    assert wrong == []
    assert store.count() == 2
