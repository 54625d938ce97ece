"""What a body is worth before it goes live: does every row find itself, and does search find what exact search finds?

Nothing is added to or removed from the body to find out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..index.base import Body
from ..types import Effort, FloatArray

__all__ = ["SELF_HIT_FLOOR", "Quality", "measure", "recall_of", "recalls_of", "self_hits"]

SELF_HIT_FLOOR = 0.9
"""A body below this share of self-hits never goes live."""

_STEP = 32

RELATIVE_EPSILON = 1e-5
"""A result this close, relative to the squared norm of the query, counts as the vector itself."""


@dataclass(frozen=True, slots=True)
class Quality:
    """self_hit: share of stored vectors that find a vector equal to themselves first (1.0 under inner product, where
    the nearest vector need not be the vector itself); recall: mean recall@k against the exact scan, ties counted as
    hits; queries: how many of each were tried."""

    self_hit: float
    recall: float
    queries: int

    @property
    def score(self) -> float:
        """The figure reported as ``training_quality_score``: the worse of the two."""
        return min(self.self_hit, self.recall)

    def meets(self, target_recall: float) -> bool:
        return self.self_hit >= SELF_HIT_FLOOR and self.recall >= target_recall


def measure(
    body: Body,
    effort: Effort,
    *,
    k: int = 10,
    queries: int = 64,
    seed: int = 0,
    pause: Callable[[], None] = lambda: None,
) -> Quality:
    """Search the body with a seeded sample of its own vectors.

    The sample is nudged for the recall part (a tenth of the mean distance between sampled rows), so that the
    nearest row is not simply the query itself. ``pause`` is called between searches of a few queries.
    """
    if body.n == 0:
        return Quality(1.0, 1.0, 0)
    rng = np.random.default_rng(seed)
    picked = np.sort(rng.choice(body.n, min(queries, body.n), replace=False)).astype(np.int64)
    stored = body.vectors_at(picked)
    nudged = _nudge(stored, rng, normalise=body.metric == "cosine")
    found = _in_steps(body, nudged, k, effort, pause)
    truth = _in_steps(body, nudged, k, Effort(exact=True), pause)
    return Quality(_self_hit(body, stored, effort), recall_of(found, truth), len(picked))


def self_hits(body: Body, effort: Effort, *, start: int = 0, queries: int = 64, seed: int = 0) -> float:
    """The share of a seeded sample of the rows from position ``start`` on that find themselves; 1.0 where none are."""
    if start >= body.n:
        return 1.0
    rng = np.random.default_rng(seed)
    picked = start + rng.choice(body.n - start, min(queries, body.n - start), replace=False)
    return _self_hit(body, body.vectors_at(np.sort(picked).astype(np.int64)), effort)


def recall_of(found: FloatArray, truth: FloatArray) -> float:
    """Mean recall@k from the distances alone; see :func:`recalls_of`."""
    return float(np.mean(recalls_of(found, truth)))


def recalls_of(found: FloatArray, truth: FloatArray) -> npt.NDArray[np.float64]:
    """Recall@k of each query, float64 (nq,), from the distances alone, ascending float32 (nq, k) each.

    A result no farther than the exact k-th is a hit. Ties therefore count as hits, and rows beyond the end of the store
    (+inf in ``truth``) do not count at all.
    """
    wanted = np.isfinite(truth).sum(axis=1)
    last = np.where(wanted > 0, np.take_along_axis(truth, np.maximum(wanted - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    slack = np.abs(last) * 1e-5 + 1e-7
    hits = np.minimum((found <= (last + slack)[:, None]).sum(axis=1), wanted)
    return np.where(wanted > 0, hits / np.maximum(wanted, 1), 1.0).astype(np.float64)


def _in_steps(body: Body, queries: FloatArray, k: int, effort: Effort, pause: Callable[[], None]) -> FloatArray:
    """Distances float32 (nq, k), a few queries at a time."""
    pieces = []
    for start in range(0, len(queries), _STEP):
        pieces.append(body.search(queries[start : start + _STEP], k, effort)[0])
        pause()
    return np.concatenate(pieces)


def _self_hit(body: Body, stored: FloatArray, effort: Effort) -> float:
    """The share of ``stored`` that find themselves."""
    if body.metric == "ip":
        return 1.0
    scale = np.maximum(np.einsum("ij,ij->i", stored, stored), 1e-12)
    distances, _ = body.search(stored, 1, effort)
    return float(np.mean(distances[:, 0] <= RELATIVE_EPSILON * scale))


def _nudge(stored: FloatArray, rng: np.random.Generator, *, normalise: bool) -> FloatArray:
    spread = float(np.sqrt(np.mean(np.var(stored, axis=0)))) if len(stored) > 1 else 0.0
    noise = rng.standard_normal(stored.shape).astype(np.float32) * np.float32(0.1 * spread)
    nudged = stored + noise
    if normalise:
        norms = np.linalg.norm(nudged, axis=1, keepdims=True)
        nudged = nudged / np.where(norms > 0, norms, 1)
    return np.ascontiguousarray(nudged, dtype=np.float32)
