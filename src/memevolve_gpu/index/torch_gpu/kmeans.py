"""k-means on a device, for inverted lists."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .kernel_ops import Operations
from .runtime import host_tensor, load_torch

__all__ = ["ITERATIONS", "norms_of", "train"]

ITERATIONS = 10
"""What faiss gives inverted lists; more improve the objective by less than 1 %."""
_NO_LOCK: AbstractContextManager[Any] = nullcontext()
_ENOUGH = 1e-4
"""A relative improvement of the objective below this ends the training."""
_APART = 2.0**-7
"""By this share the two centroids of a split list are moved apart: 16 steps of float16."""


def train(
    x: Any,
    nlist: int,
    *,
    seed: int,
    operations: Operations,
    iterations: int = ITERATIONS,
    progress: Callable[[float], None] = lambda _: None,
    lock: AbstractContextManager[Any] = _NO_LOCK,
) -> Any:
    """Centroids of the rows of ``x`` by Lloyd's steps: float32 (nlist, columns) on its device.

    The same arguments give the same bits.

    Args:
        x: float16 (m, columns), m at least nlist.
        nlist: how many.
        seed: decides the rows that training starts from.
        operations: for the device of ``x``.
        iterations: at most.
        progress: called with the finished fraction, 0 to 1.
        lock: the device's lock, held step by step.
    """
    torch = load_torch()
    chosen = np.sort(np.random.default_rng(seed).choice(len(x), nlist, replace=False))
    with lock:
        centroids = x[host_tensor(chosen).to(x.device)].to(torch.float32)
        before, own = float("inf"), float(torch.linalg.vector_norm(x, dtype=torch.float32)) ** 2 / len(x)
    for step in range(iterations):
        with lock:
            centroids, scores = _step(x, centroids, operations)
            now = own + float(scores.mean())
        progress((step + 1) / iterations)
        if before - now <= _ENOUGH * abs(now) and step:
            break
        before = now
    progress(1.0)
    return centroids


def norms_of(narrow: Any) -> Any:
    """|c|^2 of float16 rows, float32."""
    return narrow.to(load_torch().float32).square().sum(1)


def _step(x: Any, centroids: Any, operations: Operations) -> tuple[Any, Any]:
    """The means of the lists that the centroids make, and each row's score there."""
    torch = load_torch()
    narrow = centroids.to(torch.float16)
    labels, scores = operations.assign(x, narrow, norms_of(narrow))
    ordered = torch.sort(labels, stable=True)
    bounds = torch.arange(len(centroids) + 1, dtype=torch.int32, device=x.device)
    starts = torch.searchsorted(ordered.values, bounds)
    counts = starts.diff()
    sums = operations.sum_lists(x, ordered.indices, starts)
    means = sums / counts.clamp_min(1)[:, None]
    return _refilled(means, counts), scores


def _refilled(means: Any, counts: Any) -> Any:
    """Each empty list takes half of one of the largest: both centroids start a little apart."""
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return means
    large = counts.argsort(descending=True, stable=True)[: len(empty)]
    large, empty = large[counts[large] > 1], empty[: int((counts[large] > 1).sum())]
    means[empty] = means[large] * (1 + _APART)
    means[large] = means[large] * (1 - _APART)
    return means
