"""The store on a machine with a GPU, with whichever faiss is installed there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memevolve_gpu.components.store.vector_store import VectorStore
from memevolve_gpu.utils.embeddings import HashingEmbedder

SEED = 20_260_101


@pytest.mark.parametrize("index_type", ["flat", "ivf", "hnsw", "auto"])
def test_a_built_index_finds_the_units(index_type: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(SEED).standard_normal((2_000, 64)).astype(np.float32)
    units = [{"id": f"u{row}", "content": str(row)} for row in range(len(vectors))]
    settings = {"background": False, "device": "auto"}
    with VectorStore(
        str(tmp_path / "memory"), HashingEmbedder(64), index_type=index_type, storage_config=settings
    ) as store:
        store.store_batch(units, embeddings=vectors)
        store.run_maintenance()
        _, ids = store.search_vectors(vectors, 1)
        found = [row[0] == unit["id"] for row, unit in zip(ids, units, strict=True)]
        assert sum(found) >= store.config.target_recall * len(units)
