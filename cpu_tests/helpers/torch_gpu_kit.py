"""Torch indexes on a simulated GPU, and faults to inject into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from index.torch_gpu.conftest import CARD
from oracle import clustered, plan_of, rows_of

from memevolve_gpu.index.registry import build
from memevolve_gpu.index.torch_gpu import index as index_module
from memevolve_gpu.index.torch_gpu import search
from memevolve_gpu.index.torch_gpu.index import TorchIndex
from memevolve_gpu.types import FloatArray, IndexPlan, Metric, Precision

N, DIM = 2000, 48
ILLEGAL = "CUDA error: an illegal memory access was encountered"


def card_plan(
    kind: str, vectors: FloatArray, precision: Precision = "float32", *, float32_rows: bool = False
) -> IndexPlan:
    """A plan for the stand-in; ``float32_rows`` grants room for float32 rows there."""
    return replace(
        plan_of(f"torch-{kind}", vectors, precision), device=CARD, device_bytes=1 << 40 if float32_rows else 0
    )


def on_card(kind: str, vectors: FloatArray, metric: Metric = "l2", **how: Any) -> TorchIndex:
    """An index on the stand-in."""
    found = build(card_plan(kind, vectors, **how), rows_of(vectors), metric, seed=7)
    assert isinstance(found, TorchIndex)
    return found


def some(seed: int, n: int = N, dim: int = DIM, metric: Metric = "l2") -> FloatArray:
    return clustered(np.random.default_rng(seed), n, dim, metric)


def out_of_memory(torch: Any) -> RuntimeError:
    found: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return found


def fails_when(monkeypatch: pytest.MonkeyPatch, fault: Callable[[int], BaseException | None]) -> list[int]:
    """Every search on a device first asks ``fault(queries at once)`` what to raise; returns the sizes it was asked."""
    real, asked = search.propose, []

    def propose(rows: Any, queries: Any, *rest: Any) -> Any:
        asked.append(len(queries.wide))
        error = fault(len(queries.wide))
        if error is not None:
            raise error
        return real(rows, queries, *rest)

    for module in (index_module, search):
        monkeypatch.setattr(module, "propose", propose)
    return asked
