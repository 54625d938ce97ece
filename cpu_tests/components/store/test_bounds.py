"""What a caller's number asks for is bounded by what exists, before anything is allocated for it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import FakeBatchEmbedder

from memevolve_gpu import MemorySystem, StorageConfig, VectorStore
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    SemanticRetrievalStrategy,
)
from memevolve_gpu.components.store.copy import copy_store
from memevolve_gpu.components.store.units import MAX_RESULTS
from memevolve_gpu.errors import ConfigurationError, InvalidQueryError, MemEvolveError
from memevolve_gpu.memory_system import MemorySystemConfig

DIM, COUNT = 8, 20
HUGE = (10**9, 2**63 - 1, 2**63, 10**30, 10**5000, np.int64(2**62), np.uint64(2**64 - 1))
BAD: tuple[Any, ...] = (0, -1, -(10**30), True, False, 2.0, 1e300, float("nan"), "5", b"5", [5], {}, np.float32(3))
ROOM = 4 * 2**20
"""Bytes that a call over 20 units may take at its height."""


def opened(path: Path) -> VectorStore:
    config = StorageConfig(background=False, max_memory_units=1000)
    return VectorStore(path, FakeBatchEmbedder(DIM), DIM, storage_config=config)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    with opened(tmp_path / "store") as store:
        store.store_batch([{"id": f"id{n}", "content": f"word{n} common", "type": "skill"} for n in range(COUNT)])
        yield store


def one_query() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ones((1, DIM), np.float32)


SEARCHES: dict[str, Callable[[VectorStore, Any], Any]] = {
    "search": lambda store, k: store.search("word3", k),
    "search with a filter": lambda store, k: store.search("word3", k, {"type": "skill"}),
    "search_units": lambda store, k: store.search_units("word3", k),
    "search_keywords": lambda store, k: store.search_keywords("common", k),
    "access_order": lambda store, k: store.access_order("lru", k),
    "sample_vectors": lambda store, k: store.sample_vectors(k),
    "semantic": lambda store, k: SemanticRetrievalStrategy().retrieve("word3", store, k),
    "keyword": lambda store, k: KeywordRetrievalStrategy().retrieve("common", store, k),
    "hybrid": lambda store, k: HybridRetrievalStrategy().retrieve("common", store, k),
    "export_rows": lambda store, k: list(store.export_rows(k)),
    "forget": lambda store, k: SimpleManagementStrategy().apply_forgetting(store, "lru", k, dry_run=True)[1],
    "forget at random": lambda store, k: SimpleManagementStrategy().apply_forgetting(store, "random", k, dry_run=True)[
        1
    ],
}
ALLOW_ZERO = ("access_order", "sample_vectors", "forget", "forget at random")


@pytest.mark.parametrize("name", SEARCHES)
def test_a_huge_number_finds_what_exists_and_takes_no_memory(store: VectorStore, name: str) -> None:
    act = SEARCHES[name]
    assert len(act(store, COUNT)) == COUNT
    for number in HUGE:
        tracemalloc.start()
        try:
            found = act(store, number)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(found) == COUNT
        assert peak < ROOM


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_no_number_of_results_is_an_error_that_names_it(store: VectorStore, name: str) -> None:
    parameter = {"export_rows": "page_size", "access_order": "limit"}.get(
        name, "count" if name in ALLOW_ZERO else "top_k"
    )
    for bad in BAD:
        if bad == 0 and isinstance(bad, int) and not isinstance(bad, bool) and name in ALLOW_ZERO:
            assert len(SEARCHES[name](store, bad)) == 0
            continue
        with pytest.raises(MemEvolveError, match=f"^{parameter} must be a whole number"):
            SEARCHES[name](store, bad)


class TestSearchVectors:
    """The widest answer is stated; fewer units than asked for leave +inf and None."""

    def test_the_shape_is_what_was_asked_for(self, store: VectorStore) -> None:
        distances, ids = store.search_vectors(np.ones((3, DIM)), 50)
        assert distances.shape == (3, 50)
        assert [len(row) for row in ids] == [50] * 3
        assert np.isfinite(distances[:, :COUNT]).all()
        assert np.isinf(distances[:, COUNT:]).all()
        assert ids[0][COUNT:] == [None] * 30
        assert set(ids[0][:COUNT]) == {f"id{n}" for n in range(COUNT)}

    def test_more_than_the_stated_width_is_refused_before_anything_is_allocated(self, store: VectorStore) -> None:
        for number in HUGE:
            tracemalloc.start()
            try:
                with pytest.raises(InvalidQueryError, match=r"^top_k=.*10,000,000 results"):
                    store.search_vectors(one_query(), number)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < ROOM
        with pytest.raises(InvalidQueryError, match="for 1001 queries"):
            store.search_vectors(np.ones((1001, DIM)), MAX_RESULTS // 1000)

    def test_the_stated_width_itself_is_answered(self, store: VectorStore) -> None:
        distances, ids = store.search_vectors(one_query(), MAX_RESULTS // 10)
        assert distances.shape == (1, MAX_RESULTS // 10)
        assert sum(one is not None for one in ids[0]) == COUNT

    def test_no_units_and_no_match(self, store: VectorStore) -> None:
        distances, ids = store.search_vectors(one_query(), 7, {"type": "nothing"})
        assert distances.shape == (1, 7)
        assert ids == [[None] * 7]
        store.clear()
        assert store.search_vectors(one_query(), 7)[0].shape == (1, 7)
        assert store.search("word3", 10**30) == []

    def test_bad_numbers(self, store: VectorStore) -> None:
        for bad in BAD:
            with pytest.raises(InvalidQueryError, match=r"^top_k must be a whole number"):
                store.search_vectors(one_query(), bad)
        for bad in (True, 0, -1, 1.5, "1", float("nan"), 10**30):
            with pytest.raises(InvalidQueryError, match=r"^recall must be a number above 0"):
                store.search("word3", 3, recall=bad)  # type: ignore[arg-type]


def test_pages_of_a_copy_are_bounded(store: VectorStore, tmp_path: Path) -> None:
    with opened(tmp_path / "copy") as target:
        assert copy_store(store, target, page_size=10**30).count == COUNT
        for bad in BAD:
            with pytest.raises(ConfigurationError, match=r"^page_size must be a whole number"):
                copy_store(store, target, page_size=bad)


def test_the_memory_system_takes_its_defaults_with_the_same_care(store: VectorStore) -> None:
    with MemorySystem(MemorySystemConfig(storage_backend=store, default_retrieval_top_k=10**30)) as system:
        assert len(system.query_memory("common")) == COUNT
        assert len(system.query_memory("common", 10**9)) == COUNT
    for bad in BAD:
        with pytest.raises(ConfigurationError, match=r"^default_retrieval_top_k must be a whole number"):
            MemorySystemConfig(storage_backend=store, default_retrieval_top_k=bad)
