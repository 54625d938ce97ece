"""What an index is judged by: its rows find themselves, and one that mixes them up does not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracle import METRICS, clustered, index_of
from support import FakeBatchEmbedder

from memevolve_gpu import VectorStore
from memevolve_gpu.index.base import Index
from memevolve_gpu.training.recall import measure, self_hits
from memevolve_gpu.types import FloatArray, IntArray, Metric, SearchParams

DIM = 96
TRY = SearchParams(nprobe=16, rerank=100)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["two_stage", "ivf"])
def test_rows_find_themselves(kind: str, metric: Metric, rng: np.random.Generator) -> None:
    index = index_of(kind, clustered(rng, 1500, DIM, metric), metric)
    assert self_hits(index, TRY) == 1.0
    assert measure(index, TRY).self_hit == 1.0


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_rows_that_are_mixed_up_are_noticed(metric: Metric, rng: np.random.Generator) -> None:
    index = index_of("two_stage", clustered(rng, 1500, DIM, metric), metric)

    class Mixed:
        """The index, which looks elsewhere than it was asked to."""

        def __getattr__(self, name: str) -> object:
            return getattr(index, name)

        def search(self, queries: FloatArray, k: int, params: SearchParams) -> tuple[FloatArray, IntArray]:
            shifted = queries + np.float32(0.05)
            return index.search(shifted / np.linalg.norm(shifted, axis=1, keepdims=True), k, params)

    mixed: Index = Mixed()  # type: ignore[assignment]
    assert self_hits(mixed, TRY) < 0.5


@pytest.mark.parametrize("dim", [384, 768, 1024])
def test_wide_cosine_stores_get_their_index(dim: int, tmp_path: Path, rng: np.random.Generator) -> None:
    chosen = {"background": False, "metric": "cosine", "index_type": "ivf"}
    with VectorStore(tmp_path / "memory", FakeBatchEmbedder(dim), storage_config=chosen) as store:
        vectors = clustered(rng, 1200, dim, "l2")
        store.store_batch([{"id": f"u{i}", "content": f"fact {i}"} for i in range(1200)], embeddings=vectors)
        store.run_maintenance()
        index = store.statistics()["index"]
        assert index["kind"] == "ivf"
        assert index["precision"] == "float32"
