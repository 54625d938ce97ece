"""Units at equal distances come in one order, oldest first, however many results are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SEED

from memevolve_gpu import StorageConfig, VectorStore

DIM, EQUAL, OTHERS = 16, 40, 600
METRICS = ("l2", "cosine", "ip")
KINDS = ("flat", "ivf", "hnsw", "auto")
FILTER = {"type": "even"}


def filled(
    path: Path, index_type: str, metric: str, *, index: bool, delta: bool
) -> tuple[VectorStore, np.ndarray[Any, Any]]:
    """Equal units among others, in the index, in the delta buffer or in both; some of them deleted since."""
    rng = np.random.default_rng(SEED)
    config = StorageConfig(
        index_type=index_type, metric=metric, min_training_units=100, background=False, max_memory_units=10_000
    )
    store = VectorStore(path, None, DIM, storage_config=config)
    same = rng.standard_normal(DIM).astype(np.float32)

    def batch(name: str) -> None:
        vectors = rng.standard_normal((OTHERS, DIM)).astype(np.float32)
        vectors[rng.choice(OTHERS, EQUAL, replace=False)] = same
        units = [
            {"id": f"{name}{n:04}", "content": "text", "type": ("even", "odd")[n % 2]} for n in rng.permutation(OTHERS)
        ]
        store.store_batch(units, vectors)

    if index:
        batch("body")
        store.retrain()
    if delta:
        batch("tail")
    found = store.search_vectors(same[None], EQUAL, recall=1.0)[1][0]
    store.delete_batch([one for one in found[3::5] if one is not None])
    return store, same


@pytest.mark.parametrize("index_type", KINDS)
def test_a_smaller_k_is_a_prefix_of_a_larger_one(tmp_path: Path, index_type: str) -> None:
    for number, metric in enumerate(METRICS):
        for index, delta in ((True, False), (False, True), (True, True)):
            store, same = filled(tmp_path / f"{number}{index}{delta}", index_type, metric, index=index, delta=delta)
            for filters in (None, FILTER):
                everything = store.search_vectors(same[None], 3 * EQUAL, filters, 1.0)
                equal = int((everything[0][0] == everything[0][0][0]).sum()) if metric != "ip" else 0
                assert equal > 10 or metric == "ip"
                order = {unit["id"]: at for at, unit in enumerate(store.units())}
                for k in (*range(1, 16), 25, 60):
                    distances, ids = store.search_vectors(same[None], k, filters)
                    assert ids[0] == everything[1][0][:k], (metric, index, delta, filters, k)
                    places = [order[one] for one in ids[0][: min(k, equal)] if one is not None]
                    assert places == sorted(places)
                    assert (np.diff(distances[0]) >= 0).all()
            store.close()


def test_pages_of_equal_units_repeat_none_and_miss_none(tmp_path: Path) -> None:
    config = StorageConfig(background=False)
    with VectorStore(tmp_path / "store", lambda _: np.ones(DIM, np.float32), DIM, storage_config=config) as store:
        store.store_batch([{"id": f"id{n}", "content": "the same"} for n in range(12)])
        pages = [store.search("the same", 3 * page)[3 * (page - 1) :] for page in range(1, 5)]
        assert [unit_id for page in pages for _, unit_id in page] == [f"id{n}" for n in range(12)]


def test_a_store_of_nothing_but_equal_vectors(tmp_path: Path) -> None:
    config = StorageConfig(background=False, max_memory_units=50_000, min_training_units=100)
    with VectorStore(tmp_path / "store", None, DIM, storage_config=config) as store:
        units = [{"id": f"id{n}", "content": "the same"} for n in range(5_000)]
        store.store_batch(units, np.ones((5_000, DIM), np.float32))
        store.run_maintenance()
        distances, ids = store.search_vectors(np.ones((20, DIM)), 7)
        assert ids == [[f"id{n}" for n in range(7)]] * 20
        assert not distances.any()
