"""What a quantiser is trained on: a bounded, seeded sample in which no outlier sets the scale."""

from __future__ import annotations

import numpy as np

from ..errors import EngineError
from ..types import FloatArray, IndexPlan

POINTS_PER_CENTROID = 128
CODE_ROUNDS = 10
"""Enough to train the centroids of codes, and rounds of k-means. On 39,320 real embeddings 256 points and 25 rounds
took 0.98 s instead of 0.20 s; recall@10 of 1,000 questions differed by less than from seed to seed (0.994 at 40
candidates)."""
POINTS_PER_LIST = 32
LIST_ROUNDS = 5
"""The same for lists: 64 points and 10 rounds took 3.5 s instead of 1.6 s for 1,008 lists, at no better recall."""
ADD_ROWS = 16_384
"""Rows handed to an engine at a time."""
MIN_CODE_POINTS = 16
"""A 4-bit code has 16 centroids, and k-means wants at least as many points."""
CODE_TRAINING_POINTS = MIN_CODE_POINTS * POINTS_PER_CENTROID

_FEWEST_CODES, _MOST_CODES = 64, 256
_CENTRE_ROWS = 1024
_OUTLIER_FACTOR = 4.0


def training_sample(vectors: FloatArray, limit: int, seed: int) -> FloatArray:
    """At most ``limit`` rows of ``vectors`` (n, d), drawn without repetition, outliers pulled in; a float32 copy.

    A row further from the median than four times the 95th percentile is moved along its direction to that radius: one
    vector of norm 10,000 among unit vectors would otherwise halve recall.

    Raises:
        EngineError: fewer than 16 rows.
    """
    n = len(vectors)
    if n < MIN_CODE_POINTS:
        raise EngineError(
            f"4-bit codes need at least {MIN_CODE_POINTS} vectors to train, got {n}; keep the exact index"
        )
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(n, limit, replace=False)) if n > limit else np.arange(n)
    sample = np.array(vectors[chosen], dtype=np.float32, order="C")
    _pull_in_outliers(sample)
    return sample


def default_codes(dim: int) -> int:
    """A 4-bit code for four dimensions, but at least 64 codes, one for each of fewer dimensions, and at most 256.

    Between a sixth and a half of the dimensions the time at equal recall is nearly flat; a quarter takes half the
    memory of a half (measured on six sets: docs/decisions/0008-quarter-codes-held-once.md). More than 256 codes would
    take more than 0.2 MB for 1,000 rows.
    """
    return -(-dim // -(-dim // min(_MOST_CODES, max(_FEWEST_CODES, dim // 4))))


def code_shape(plan: IndexPlan, dim: int) -> tuple[int, int]:
    """(codes a row, columns that they cover) by ``plan`` for vectors of ``dim`` dimensions."""
    codes = min(plan.codes or default_codes(dim), dim)
    return codes, padded_dim(dim, codes)


def padded_dim(dim: int, codes: int) -> int:
    """The smallest multiple of ``codes`` that holds ``dim`` columns."""
    return codes * -(-dim // codes)


def padded_columns(vectors: FloatArray, width: int) -> FloatArray:
    """``vectors`` (n, d) with zero columns appended up to ``width``, C-contiguous; the same array where none are."""
    n, dim = vectors.shape
    if dim == width:
        return np.ascontiguousarray(vectors)
    wide = np.zeros((n, width), np.float32)
    wide[:, :dim] = vectors
    return wide


def _pull_in_outliers(sample: FloatArray) -> None:
    centre = np.median(sample[:: max(1, len(sample) // _CENTRE_ROWS)], axis=0)
    radii = np.linalg.norm((sample - centre).astype(np.float64), axis=1)
    limit = _OUTLIER_FACTOR * float(np.quantile(radii, 0.95, method="lower"))
    far = radii > max(limit, np.finfo(np.float32).tiny)
    if limit > 0 and far.any():
        pulled = (sample[far] - centre) * (limit / radii[far])[:, None]
        sample[far] = centre + pulled
