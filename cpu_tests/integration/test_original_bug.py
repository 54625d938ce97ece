"""The faults that this store was written against: data on which an IVF index is trained badly, or not at all.

Whatever the data: no wrong mapping, no untrained or empty index that answers, no build loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SEED

from memevolve_gpu import StorageConfig, VectorStore

DIM = 32
RNG = np.random.default_rng(SEED)


def clusters(n: int) -> np.ndarray:
    centres = RNG.standard_normal((2, DIM)) * 10
    return centres[RNG.integers(0, 2, n)] + RNG.standard_normal((n, DIM)) * 0.01


def with_outlier(n: int) -> np.ndarray:
    rows = RNG.standard_normal((n, DIM))
    rows[n // 2] = 1e4
    return rows


DATA: dict[str, np.ndarray] = {
    "one vector": RNG.standard_normal((1, DIM)),
    "a hundred copies of one vector": np.tile(RNG.standard_normal(DIM), (100, 1)),
    "nothing but duplicates": np.tile(RNG.standard_normal(DIM), (1500, 1)),
    "fifteen distinct vectors": np.tile(RNG.standard_normal((15, DIM)), (100, 1)),
    "two clusters": clusters(1500),
    "zero vectors": np.zeros((1500, DIM)),
    "zeros among others": np.concatenate([np.zeros((500, DIM)), RNG.standard_normal((1000, DIM))]),
    "one outlier of 10^4": with_outlier(1500),
    "noise": RNG.standard_normal((1500, DIM)),
}


LEAST = [0, 16, 1000]
INDEX_TYPES = ["ivf", "hnsw", "auto"]


@pytest.mark.parametrize(
    ("index_type", "name", "min_training_units"),
    [(kind, name, LEAST[(i + j) % 3]) for i, kind in enumerate(INDEX_TYPES) for j, name in enumerate(DATA)],
)
def test_every_unit_is_found_under_its_own_id(
    tmp_path: Path, name: str, min_training_units: int, index_type: str
) -> None:
    vectors = DATA[name].astype("float32")
    with opened(tmp_path, index_type, min_training_units) as store:
        store.store_batch([{"id": f"u{i}", "content": f"{i}"} for i in range(len(vectors))], vectors)
        store.run_maintenance()
        assert_sound(store, vectors)
        assert not built(store), "a build loop"
    with opened(tmp_path, index_type, min_training_units) as store:
        assert_sound(store, vectors)
        assert not built(store), "a build loop after reopening"


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_units_that_come_one_by_one_are_always_found(tmp_path: Path, index_type: str) -> None:
    vectors = np.concatenate([np.tile(RNG.standard_normal(DIM), (60, 1)), RNG.standard_normal((200, DIM))])
    with opened(tmp_path, index_type, 0) as store:
        for i, vector in enumerate(vectors.astype("float32")):
            store.store_batch([{"id": f"u{i}", "content": f"{i}"}], vector[None, :])
            if i % 20 == 0:
                store.run_maintenance()
                assert_sound(store, vectors[: i + 1].astype("float32"))


def opened(folder: Path, index_type: str, min_training_units: int) -> VectorStore:
    settings: dict[str, Any] = {"index_type": index_type, "min_training_units": min_training_units}
    return VectorStore(folder / "store", None, DIM, storage_config=StorageConfig(background=False, **settings))


def built(store: VectorStore) -> list[str]:
    """The indexes that a round of maintenance made now."""
    return [action for action in store.run_maintenance()["actions"] if action.startswith("built")]


def assert_sound(store: VectorStore, vectors: np.ndarray) -> None:
    """Every vector finds, at distance zero, an id whose vector is the same; an exhaustive search finds every id."""
    step = max(1, len(vectors) // 300)
    asked = vectors[::step]
    distances, ids = store.search_vectors(asked, 1)
    assert (distances[:, 0] <= 1e-5 * np.maximum(1, (asked * asked).sum(axis=1))).all()
    assert all(np.array_equal(vectors[int(str(found)[1:])], asked[i]) for i, (found,) in enumerate(ids))
    everything = store.search_vectors(asked[:1], len(vectors) + 3, recall=1.0)[1][0]
    assert {found for found in everything if found} == {f"u{i}" for i in range(len(vectors))}
    assert store.index.ntotal == len(vectors)
    assert store.index.is_trained
