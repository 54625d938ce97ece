"""How many inverted lists an index needs, and whether the existing number still fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ListsStatus = Literal["OPTIMAL", "DEGRADED", "INEFFICIENT", "GOOD"]

DEFAULT_VECTORS_PER_CENTROID = 39
"""The fewest training points per centroid that faiss' k-means accepts without a warning."""
DEFAULT_NLIST_MIN = 10
DEFAULT_NLIST_MAX = 256

_CAP_GROWS_FROM = 50_000
_RECREATE_AT = 0.25
DEGRADED_ABOVE, INEFFICIENT_BELOW = 100, 10
"""Vectors per list beyond which lists are too few, or too many."""


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


def lists_status(n: int, nlist: int) -> ListsStatus:
    """How well ``nlist`` lists suit ``n`` vectors.

    Returns:
        GOOD where no lists are used; DEGRADED above 100, INEFFICIENT below 10 vectors per list, else OPTIMAL.
    """
    if nlist <= 0:
        return "GOOD"
    if n > DEGRADED_ABOVE * nlist:
        return "DEGRADED"
    return "INEFFICIENT" if n < INEFFICIENT_BELOW * nlist else "OPTIMAL"


@dataclass(frozen=True, slots=True)
class ListsRule:
    """The settings that decide the number of lists; ``nlist_max`` None: 256, growing above 50,000 vectors."""

    vectors_per_centroid: int = DEFAULT_VECTORS_PER_CENTROID
    nlist_min: int = DEFAULT_NLIST_MIN
    nlist_max: int | None = None
    adaptive: bool = True

    def held_by(self, n: int, nlist: int) -> list[str]:
        """The settings, as variables, that keep ``nlist`` lists too few or too many for ``n`` vectors.

        Empty where the lists suit, and where a rebuild by the rule would help.
        """
        status = lists_status(n, nlist)
        if status not in ("DEGRADED", "INEFFICIENT"):
            return []
        ruled = adaptive_nlist(
            n, vectors_per_centroid=self.vectors_per_centroid, nlist_min=self.nlist_min, nlist_max=self.nlist_max
        )
        found = [] if self.adaptive else ["ADAPTIVE_NLIST=false"]
        return found + self._bounds(n, status == "DEGRADED") if lists_status(n, ruled) == status else found

    def _bounds(self, n: int, too_few: bool) -> list[str]:
        """The setting that keeps the rule's number of lists from suiting ``n`` vectors."""
        wanted, most = n // self.vectors_per_centroid, _maximum(n, self.nlist_max)
        if too_few and wanted > most:
            return [f"NLIST_MAX={most}"]
        if not too_few and wanted < self.nlist_min:
            return [f"NLIST_MIN={self.nlist_min}"]
        return [f"VECTORS_PER_CENTROID={self.vectors_per_centroid}"]


def _maximum(n: int, nlist_max: int | None) -> int:
    if nlist_max is not None:
        return nlist_max
    return int(DEFAULT_NLIST_MAX * math.sqrt(max(1.0, n / _CAP_GROWS_FROM)))
