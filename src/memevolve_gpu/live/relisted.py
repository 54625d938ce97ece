"""What another number of lists did to recall and latency."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .view import View

__all__ = ["Relisted"]


@dataclass(frozen=True, slots=True)
class Relisted:
    """The last change of nlist: when (seconds since 1970), from what to what, and how the store did before it."""

    at: float
    nlist_before: int
    nlist_after: int
    before: dict[str, float | None]

    @classmethod
    def between(cls, old: View, new: View, latency: dict[str, float] | None) -> Relisted:
        return cls(time.time(), old.body.nlist, new.body.nlist, _figures(old, latency))

    def report(self, view: View, latency: dict[str, float] | None) -> dict[str, Any]:
        """Plain values: nlist, recall@10 and latency before and since; None for what is not known yet."""
        return {
            "at": self.at,
            "nlist": [self.nlist_before, self.nlist_after],
            "before": self.before,
            "since": _figures(view, latency),
        }


def _recall(view: View) -> float | None:
    """recall@10 as it was last measured: of real queries in use, else of the body when it was judged."""
    if view.facts.probed is not None:
        return view.facts.probed
    return None if view.facts.quality is None else view.facts.quality.recall


def _figures(view: View, latency: dict[str, float] | None) -> dict[str, float | None]:
    known = latency or {}
    return {"recall": _recall(view), "p50_ms": known.get("p50_ms"), "p95_ms": known.get("p95_ms")}
