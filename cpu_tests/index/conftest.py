"""Rows of vectors, and spills from few bytes on."""

from __future__ import annotations

import numpy as np
import pytest

from memevolve_gpu.index import vector_table
from memevolve_gpu.types import FloatArray


@pytest.fixture
def rows(request: pytest.FixtureRequest, rng: np.random.Generator) -> FloatArray:
    """As many as the module's ``N``, of its ``DIM`` dimensions."""
    return rng.standard_normal((request.module.N, request.module.DIM)).astype(np.float32)


@pytest.fixture
def spilling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_table, "SPILLED_BYTES", 10_000)
