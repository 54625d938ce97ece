"""Exact neighbours, block by block, and recall against them, query by query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .protocol import Array

__all__ = ["Truth", "exact", "hits"]

Mask = npt.NDArray[np.bool_]

BLOCK = 16_384
TIE = 1e-5
"""Similarities of unit vectors in float32 that differ by less are equal: duplicates may stand for each other."""


@dataclass(frozen=True)
class Truth:
    """ids int64 (nq, k), nearest first; floor float32 (nq,): the similarity of the last of them."""

    ids: npt.NDArray[np.int64]
    floor: Array


def exact(vectors: Array, queries: Array, k: int, allowed: Mask | None = None, block: int = BLOCK) -> Truth:
    """The k rows of vectors (n, dim) with the greatest inner product with each query; fewer when fewer are allowed.

    allowed bool (n,): rows that count; None: all. Raises ValueError when none is allowed.
    """
    best = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    ids = np.zeros((len(queries), 0), dtype=np.int64)
    for start in range(0, len(vectors), block):
        rows = np.arange(start, min(start + block, len(vectors)))
        if allowed is not None:
            rows = rows[allowed[rows]]
        if not len(rows):
            continue
        scores = queries @ np.asarray(vectors[rows]).T
        best, ids = merged(best, ids, scores, np.broadcast_to(rows, scores.shape), k)
    if not best.shape[1]:
        raise ValueError("allowed must leave at least one row")
    return Truth(ids, best[:, -1])


def merged(
    best: Array, ids: npt.NDArray[np.int64], scores: Array, rows: npt.NDArray[np.int64], k: int
) -> tuple[Array, npt.NDArray[np.int64]]:
    best, ids = np.concatenate([best, scores], axis=1), np.concatenate([ids, rows], axis=1)
    if best.shape[1] > k:
        kept = np.argpartition(-best, k - 1, axis=1)[:, :k]
        best, ids = np.take_along_axis(best, kept, axis=1), np.take_along_axis(ids, kept, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(ids, order, axis=1)


def hits(
    found: Sequence[Sequence[int]], queries: Array, vectors: Array, truth: Truth, allowed: Mask | None = None
) -> list[int]:
    """How many of each query's results belong to its k nearest; k itself is ``truth.ids.shape[1]``.

    A result counts once, if it is a row that is allowed and at least as similar as the last true one.
    """
    k = truth.ids.shape[1]
    counts = []
    for query, names, floor in zip(queries, found, truth.floor, strict=True):
        rows = np.asarray([i for i in dict.fromkeys(names) if 0 <= i < len(vectors)][:k], dtype=np.int64)
        if allowed is not None:
            rows = rows[allowed[rows]]
        good = np.asarray(vectors[rows]) @ query >= floor - TIE
        counts.append(int(good.sum()))
    return counts
