"""The contract of a retrieval strategy, its results and metrics, and the context that runs one."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...monitoring.events import LatencyRing
from ...types import MemoryUnit
from ...utils.timestamps import now_text
from ..store.base import StorageBackend, as_backend

__all__ = ["RetrievalContext", "RetrievalMetrics", "RetrievalResult", "RetrievalStrategy"]


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


HISTORY_KEPT = 1000
"""Queries that a context remembers."""

COUNTED = 1000
"""``count_relevant`` counts up to this many."""


@dataclass
class RetrievalResult:
    """A unit that was found. ``score`` grows with relevance; ``metadata`` says where it comes from."""

    unit_id: str
    unit: MemoryUnit
    score: float
    metadata: dict[str, Any] | None = None


class RetrievalStrategy(ABC):
    """Finds units for a query in any backend."""

    @abstractmethod
    def retrieve(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Mapping[str, Any] | None = None
    ) -> list[RetrievalResult]:
        """The ``top_k`` best matching units, best first. filters: see docs/reference/filters.md."""

    def retrieve_by_ids(self, unit_ids: Sequence[str], storage_backend: StorageBackend) -> list[RetrievalResult]:
        """The units of these ids that exist, in this order, with score 1."""
        backend = as_backend(storage_backend)
        units = backend.retrieve_batch(unit_ids)
        backend.record_access(list(units))
        return [RetrievalResult(unit_id, unit, 1.0) for unit_id, unit in units.items()]

    def search(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Mapping[str, Any] | None = None
    ) -> list[RetrievalResult]:
        """As :meth:`retrieve`."""
        return self.retrieve(query, storage_backend, top_k, filters)

    @abstractmethod
    def count_relevant(
        self, query: str, storage_backend: StorageBackend, filters: Mapping[str, Any] | None = None
    ) -> int:
        """How many units :meth:`retrieve` could return, counted up to a thousand."""

    def save_state(self) -> dict[str, Any]:
        """What another instance needs to take over, as JSON values."""
        return {}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``save_state`` of another instance gave."""
        del state


class RetrievalContext:
    """Runs a strategy, with defaults, the last thousand queries, and figures."""

    def __init__(
        self,
        strategy: RetrievalStrategy,
        default_top_k: int = 5,
        default_filters: Mapping[str, Any] | None = None,
        enable_metrics: bool = True,
    ) -> None:
        """``default_filters`` hold where a call gives none."""
        self.strategy = strategy
        self.default_top_k = default_top_k
        self.default_filters = dict(default_filters or {})
        self.retrieval_history: deque[dict[str, Any]] = deque(maxlen=HISTORY_KEPT)
        self.metrics = RetrievalMetrics() if enable_metrics else None

    def set_strategy(self, strategy: RetrievalStrategy) -> None:
        """Use another strategy from now on."""
        self.strategy = strategy

    def retrieve(
        self,
        query: str,
        storage_backend: StorageBackend,
        top_k: int | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> list[RetrievalResult]:
        """The best matching units, best first. Raises what the strategy raises."""
        strategy, wanted, holding = self.strategy, *self._defaults(top_k, filters)
        started = time.perf_counter()
        try:
            results = strategy.retrieve(query, storage_backend, wanted, holding)
        except BaseException:
            self._measure(strategy, started, None)
            raise
        self._measure(strategy, started, len(results))
        self.retrieval_history.append(
            {
                "query": query,
                "top_k": wanted,
                "filters": dict(holding or {}),
                "results_count": len(results),
                "timestamp": now_text(),
            }
        )
        return results

    def search(
        self,
        query: str,
        storage_backend: StorageBackend,
        top_k: int | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> list[RetrievalResult]:
        """As :meth:`retrieve`."""
        return self.retrieve(query, storage_backend, top_k, filters)

    def retrieve_by_ids(self, unit_ids: Sequence[str], storage_backend: StorageBackend) -> list[RetrievalResult]:
        """The units of these ids that exist."""
        return self.strategy.retrieve_by_ids(unit_ids, storage_backend)

    def count_relevant(
        self, query: str, storage_backend: StorageBackend, filters: Mapping[str, Any] | None = None
    ) -> int:
        """How many units the query could find, counted up to a thousand."""
        return self.strategy.count_relevant(query, storage_backend, self._defaults(None, filters)[1])

    def get_retrieval_history(self) -> list[dict[str, Any]]:
        """``query``, ``top_k``, ``filters``, ``results_count`` and ``timestamp``, newest last."""
        return list(self.retrieval_history)

    def clear_history(self) -> None:
        """Forget the history."""
        self.retrieval_history.clear()

    def _defaults(self, top_k: int | None, filters: Mapping[str, Any] | None) -> tuple[int, Mapping[str, Any] | None]:
        holding = self.default_filters if filters is None else filters
        return self.default_top_k if top_k is None else top_k, holding or None

    def _measure(self, strategy: RetrievalStrategy, started: float, found: int | None) -> None:
        if self.metrics is not None:
            self.metrics.record(type(strategy).__name__, time.perf_counter() - started, found)
