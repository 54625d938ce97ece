"""How retrieval does: counts and latencies of each strategy, in bounded memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from ...monitoring.latency import LatencyRing

__all__ = ["RetrievalMetrics"]


@dataclass
class _Tally:
    queries: int = 0
    failures: int = 0
    empty: int = 0
    results: int = 0
    latencies: LatencyRing = field(default_factory=LatencyRing)


class RetrievalMetrics:
    """Figures by the name of a strategy. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._tallies: dict[str, _Tally] = {}

    def record(self, strategy: str, seconds: float, found: int | None) -> None:
        """A query took ``seconds`` and found so many units; None: it failed."""
        with self._lock:
            tally = self._tallies.setdefault(strategy, _Tally())
            tally.queries += 1
            tally.failures += found is None
            tally.empty += found == 0
            tally.results += found or 0
        tally.latencies.record(seconds)

    def summary(self) -> dict[str, dict[str, Any]]:
        """For each strategy ``queries``, ``failures``, ``empty``, ``mean_results`` (of those that did not fail), and
        ``p50_ms``, ``p95_ms``, ``p99_ms`` of the newest queries, embedding included.
        """
        with self._lock:
            tallies = dict(self._tallies)
        return {name: _described(tally) for name, tally in tallies.items()}

    def clear(self) -> None:
        """Start anew."""
        with self._lock:
            self._tallies.clear()


def _described(tally: _Tally) -> dict[str, Any]:
    answered = tally.queries - tally.failures
    latencies = tally.latencies.percentiles() or {}
    return {
        "queries": tally.queries,
        "failures": tally.failures,
        "empty": tally.empty,
        "mean_results": tally.results / answered if answered else 0.0,
        **{name: value for name, value in latencies.items() if name != "searches"},
    }
