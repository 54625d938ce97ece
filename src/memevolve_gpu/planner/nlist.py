"""How many inverted lists an index needs, and whether the existing number still fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ListsStatus = Literal["OPTIMAL", "DEGRADED", "INEFFICIENT", "GOOD"]

DEFAULT_NLIST_MAX = 256

_CAP_GROWS_FROM = 50_000
_RECREATE_AT = 0.25
DEGRADED_ABOVE, INEFFICIENT_BELOW = 100, 10
"""Vectors per list beyond which lists are too few, unless the default rule plans no more of them, or too many."""


def should_recreate(current: int, planned: int) -> bool:
    """Whether ``current`` lists differ from ``planned`` ones by at least a quarter of the plan."""
    return planned > 0 and abs(current - planned) >= _RECREATE_AT * planned


def lists_status(n: int, nlist: int) -> ListsStatus:
    """How well ``nlist`` lists suit ``n`` vectors.

    Returns:
        GOOD where no lists are used; DEGRADED above 100 vectors per list where the default rule plans more lists by a
        quarter of its plan, INEFFICIENT below 10 vectors per list, else OPTIMAL.
    """
    if nlist <= 0:
        return "GOOD"
    planned = DEFAULT_RULE.lists_for(n)
    if n > DEGRADED_ABOVE * nlist and nlist < planned and should_recreate(nlist, planned):
        return "DEGRADED"
    return "INEFFICIENT" if n < INEFFICIENT_BELOW * nlist else "OPTIMAL"


@dataclass(frozen=True, slots=True)
class ListsRule:
    """The settings that decide the number of lists."""

    vectors_per_centroid: int = 39
    """The fewest training points per centroid that faiss' k-means accepts without a warning."""
    nlist_min: int = 10
    nlist_max: int | None = None
    """None: 256, and above 50,000 vectors growing with the square root of their number; a given one stays."""
    adaptive: bool = True
    """False keeps the lists of an index however the store grows."""

    def lists_for(self, n: int) -> int:
        """Lists for ``n`` vectors: ``clip(n // vectors_per_centroid, nlist_min, nlist_max)``."""
        return min(max(n // self.vectors_per_centroid, self.nlist_min), self._most(n))

    def held_by(self, n: int, nlist: int) -> list[str]:
        """The settings, as variables, that keep ``nlist`` lists too few or too many for ``n`` vectors.

        Empty where the lists suit, and where a rebuild by the rule would help.
        """
        status = lists_status(n, nlist)
        if status not in ("DEGRADED", "INEFFICIENT"):
            return []
        ruled = self.lists_for(n)
        found = [] if self.adaptive else ["ADAPTIVE_NLIST=false"]
        return found + self._bounds(n, status == "DEGRADED") if lists_status(n, ruled) == status else found

    def _bounds(self, n: int, too_few: bool) -> list[str]:
        """The setting that keeps the rule's number of lists from suiting ``n`` vectors."""
        wanted, most = n // self.vectors_per_centroid, self._most(n)
        if too_few and wanted > most:
            return [f"NLIST_MAX={most}"]
        if not too_few and wanted < self.nlist_min:
            return [f"NLIST_MIN={self.nlist_min}"]
        return [f"VECTORS_PER_CENTROID={self.vectors_per_centroid}"]

    def _most(self, n: int) -> int:
        if self.nlist_max is not None:
            return self.nlist_max
        return int(DEFAULT_NLIST_MAX * math.sqrt(max(1.0, n / _CAP_GROWS_FROM)))


DEFAULT_RULE = ListsRule()
adaptive_nlist = DEFAULT_RULE.lists_for
"""The number of lists by the default rule."""
