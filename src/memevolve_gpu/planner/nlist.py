"""How many inverted lists, and whether those that exist still fit."""

from __future__ import annotations

import math
from typing import Literal

__all__ = [
    "DEFAULT_NLIST_MAX",
    "DEFAULT_NLIST_MIN",
    "DEFAULT_VECTORS_PER_CENTROID",
    "ListsStatus",
    "adaptive_nlist",
    "lists_status",
    "should_recreate",
]

ListsStatus = Literal["OPTIMAL", "DEGRADED", "INEFFICIENT", "GOOD"]

DEFAULT_VECTORS_PER_CENTROID = 39
"""The fewest training points per centroid that faiss' k-means accepts without a warning."""
DEFAULT_NLIST_MIN = 10
DEFAULT_NLIST_MAX = 256

_CAP_GROWS_FROM = 50_000
_RECREATE_AT = 0.25
_DEGRADED_ABOVE = 100 / 39
_INEFFICIENT_BELOW = 10 / 39


def adaptive_nlist(
    n: int,
    *,
    vectors_per_centroid: int = DEFAULT_VECTORS_PER_CENTROID,
    nlist_min: int = DEFAULT_NLIST_MIN,
    nlist_max: int | None = None,
) -> int:
    """Lists for ``n`` vectors: ``clip(n // vectors_per_centroid, nlist_min, nlist_max)``.

    Without ``nlist_max`` it is 256, and above 50,000 vectors it grows with the square root of n; a given one stays.
    """
    return min(max(n // vectors_per_centroid, nlist_min), _maximum(n, nlist_max))


def should_recreate(current: int, planned: int) -> bool:
    """Whether ``current`` lists differ from ``planned`` ones by at least a quarter of the plan."""
    return planned > 0 and abs(current - planned) >= _RECREATE_AT * planned


def lists_status(
    n: int, nlist: int, *, planned: int, vectors_per_centroid: int = DEFAULT_VECTORS_PER_CENTROID
) -> ListsStatus:
    """How well ``nlist`` lists suit ``n`` vectors, where the plan for n would have ``planned`` lists.

    Returns:
        GOOD where no lists are used; DEGRADED above 100/39 times, INEFFICIENT below 10/39 times the vectors per
        centroid that the plan holds, else OPTIMAL. With no cap in play and 39 vectors per centroid that is above 100
        and below 10.
    """
    if nlist <= 0:
        return "GOOD"
    capped = planned != n // vectors_per_centroid
    held = n / planned if capped and planned > 0 else vectors_per_centroid
    ratio = n / nlist / held if held > 0 else 1.0
    if ratio > _DEGRADED_ABOVE:
        return "DEGRADED"
    return "INEFFICIENT" if ratio < _INEFFICIENT_BELOW else "OPTIMAL"


def _maximum(n: int, nlist_max: int | None) -> int:
    if nlist_max is not None:
        return nlist_max
    return int(DEFAULT_NLIST_MAX * math.sqrt(max(1.0, n / _CAP_GROWS_FROM)))
