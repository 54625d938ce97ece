"""Wide vectors with a few large components: rounded coarsely, they do not contradict the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SEED

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.types import FloatArray

DIM, COUNT = 256, 400


def heavy_tailed(count: int = COUNT, dim: int = DIM) -> FloatArray:
    """Unit vectors with three large components; what tells them apart is small."""
    rng = np.random.default_rng(SEED)
    rows = 0.03 * rng.standard_normal((count, dim))
    rows[:, :3] += (6.0, -2.0, 2.0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows, dtype=np.float32)


def opened(path: Path, vectors: FloatArray, **settings: Any) -> VectorStore:
    chosen = {"background": False, "min_training_units": 100, "precision": "int8", **settings}
    return VectorStore(
        path / "wide", lambda _text: vectors[0], vectors.shape[1], storage_config=StorageConfig(**chosen)
    )


def filled(path: Path, vectors: FloatArray, **settings: Any) -> VectorStore:
    store = opened(path, vectors, **settings)
    units = [{"id": f"id{row}", "content": f"fact {row}", "type": "skill"} for row in range(len(vectors))]
    store.store_batch(units, embeddings=vectors)
    return store


def is_at_rest(store: VectorStore, path: Path, vectors: FloatArray, **settings: Any) -> None:
    """Two rounds more do nothing, and an opening believes the snapshot."""
    store.snapshot()
    body = store._open.live.view.body
    assert [store.run_maintenance()["actions"] for _ in range(2)] == [[], []]
    assert store._open.live.view.body is body
    assert store.check() == []
    store.close()
    with opened(path, vectors, **settings) as again:
        totals = again.statistics()["event_totals"]
        assert (totals.get("snapshot-loaded"), totals.get("snapshot-refused", 0)) == (1, 0)
        assert again._open.live.view.body.kind == body.kind


@pytest.mark.parametrize("precision", ["auto", "float32", "float16", "int8"])
@pytest.mark.parametrize("index_type", ["flat", "ivf", "auto"])
def test_coarse_rounding_is_no_contradiction(tmp_path: Path, index_type: str, precision: str) -> None:
    vectors = heavy_tailed()
    assert np.abs(vectors).max() > 8.8 / np.sqrt(DIM)
    settings = {"index_type": index_type, "precision": precision, "target_recall": 0.5}
    store = filled(tmp_path, vectors, **settings)
    store.run_maintenance()
    is_at_rest(store, tmp_path, vectors, **settings)


def test_real_wide_text_is_no_contradiction(shared_data: Path, tmp_path: Path) -> None:
    vectors = np.load(shared_data / "wide1536_units_f16.npy")[:2000].astype(np.float32)
    store = filled(tmp_path, vectors, precision="auto", min_training_units=1000)
    assert store.run_maintenance()["actions"] == ["built ivf of 2000 rows"]
    is_at_rest(store, tmp_path, vectors, precision="auto", min_training_units=1000)


def test_another_vector_is_a_contradiction(tmp_path: Path) -> None:
    store = filled(tmp_path, heavy_tailed(), target_recall=0.5)
    store.run_maintenance()
    live = store._open.live
    rows = live.view.body.table.arrays()["vectors"]
    rows[:] = np.roll(rows, 1, axis=0)
    assert store.run_maintenance()["actions"][0] == "healed the index"
    store.close()


def test_an_index_that_misses_what_is_asked_is_refused(tmp_path: Path) -> None:
    """Judged by its own rounded vectors it would find everything."""
    vectors = heavy_tailed()
    store = filled(tmp_path, vectors, index_type="ivf", target_recall=1.0)
    store.run_maintenance()
    assert store._open.live.view.body.kind == "exact"
    queries = vectors[:50] + np.float32(0.01) * vectors[50:100]
    found = store._open.live.search(queries, 10).distances
    truth = np.square(queries[:, None, :].astype(np.float64) - vectors).sum(axis=2)
    np.testing.assert_allclose(found, np.sort(truth, axis=1)[:, :10], rtol=1e-4)
    is_at_rest(store, tmp_path, vectors, index_type="ivf", target_recall=1.0)
