"""How low the true mean recall may lie, given the recalls of a few queries."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["CONFIDENCE_Z", "IMAGINED_MISS", "lower_bounds"]

CONFIDENCE_Z = 1.645
"""Standard normal quantile of a one-sided 95 %."""
IMAGINED_MISS = 0.1
"""What the one query that is added to the sample misses, unless half a result is more."""


def lower_bounds(recalls: npt.NDArray[np.float64], ks: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Lower bounds of the mean recall@k for several k, meant to hold in 95 % of draws.

    The normal bound over the sample and one imagined query of recall 0.9 (0.5 at k = 1), made non-increasing in k. On
    2,000 real queries over inverted lists, 4-bit codes and graphs it held in 91 to 97 % of draws of 64 to 192.

    - Why not the bare normal bound or the bootstrap: there they held in 73 % (n = 64) to 85 % (n = 256) of draws,
      because rare total misses are often not in the sample at all, and a sample without a miss has no variance. The
      imagined query stands for them.
    - Why not Hoeffding's or the empirical Bernstein bound: they always held, and asked for 6 to 40 times the miss that
      was there; no recall above 0.9 could be shown with 256 queries.
    - Non-increasing in k: the first neighbours are found no worse than the first k are on average (so measured on every
      kind of body). Recall@1 is 0 or 1 per query, and its own bound would be several times as wide.

    Together, on near and on far queries apart, efforts chosen by this bound missed their target in 2 to 3 % of draws of
    192 real queries, at 1.2 to 1.3 times the least effort.

    Args:
        recalls: float64 (nq, m), one column per k; NaN columns where a k was not measured.
        ks: the k of the columns, ascending.

    Returns:
        float64 (m,); -inf where a k was not measured, and everywhere without queries.
    """
    n = len(recalls)
    if n == 0:
        return np.full(recalls.shape[1], -np.inf)
    total = n + 1
    imagined = 1.0 - np.maximum(IMAGINED_MISS, 0.5 / np.asarray(ks))
    mean = (recalls.sum(axis=0) + imagined) / total
    square = ((recalls * recalls).sum(axis=0) + imagined**2) / total
    variance = np.maximum(square - mean * mean, 0.0) * total / n
    bounds = mean - CONFIDENCE_Z * np.sqrt(variance) / math.sqrt(total)
    bounds = np.where(np.isnan(bounds), -np.inf, bounds)
    falling: npt.NDArray[np.float64] = np.maximum.accumulate(bounds[::-1])[::-1]
    return np.where(np.isnan(recalls[0]), -np.inf, falling)
