"""Retrieval: the contract of a strategy, its results and metrics, and the context that runs one."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ...errors import ConfigurationError, InvalidFilterError, InvalidQueryError
from ...monitoring.events import LatencyRing
from ...types import Filters, JsonObject, MemoryUnit
from ...utils.arguments import having, mapping, switch, whole_number
from ...utils.forking import lock
from ...utils.timestamps import now_text
from ..store.base import StorageBackend
from ..store.foreign import as_backend
from ..store.ranking import Ranking


class QueryRecord(TypedDict):
    """An entry of the query history; ``timestamp`` is ISO 8601 in UTC."""

    query: str
    top_k: int
    filters: JsonObject
    results_count: int
    timestamp: str


class StrategyMetrics(TypedDict, total=False):
    """Metrics of one strategy; times are milliseconds, embedding included, and missing before the first query."""

    queries: int
    failures: int
    empty: int
    mean_results: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass
class _Tally:
    queries: int = 0
    failures: int = 0
    empty: int = 0
    results: int = 0
    latencies: LatencyRing = field(default_factory=LatencyRing)


class RetrievalMetrics:
    """Metrics by the name of a strategy. Safe to use from several threads.

    Examples:
        >>> from memevolve_gpu.components.retrieve import RetrievalMetrics
        >>> metrics = RetrievalMetrics()
        >>> metrics.record("KeywordRetrievalStrategy", 0.002, 3)
        >>> metrics.summary()["KeywordRetrievalStrategy"]["mean_results"]
        3.0
    """

    def __init__(self) -> None:
        self._lock = lock()
        self._tallies: dict[str, _Tally] = {}

    def record(self, strategy: str, seconds: float, found: int | None) -> None:
        """Record a query.

        Args:
            strategy: Name of the strategy.
            seconds: Duration.
            found: Number of results; None when the query failed.
        """
        with self._lock:
            tally = self._tallies.setdefault(strategy, _Tally())
            tally.queries += 1
            tally.failures += found is None
            tally.empty += found == 0
            tally.results += found or 0
        tally.latencies.record(seconds)

    def summary(self) -> dict[str, StrategyMetrics]:
        """Describe the queries so far.

        Returns:
            Metrics by the name of the strategy: ``mean_results`` of successful queries, percentiles of the newest.
        """
        with self._lock:
            tallies = dict(self._tallies)
        return {name: _described(tally) for name, tally in tallies.items()}

    def clear(self) -> None:
        """Delete all metrics."""
        with self._lock:
            self._tallies.clear()


def _described(tally: _Tally) -> StrategyMetrics:
    answered = tally.queries - tally.failures
    described: StrategyMetrics = {
        "queries": tally.queries,
        "failures": tally.failures,
        "empty": tally.empty,
        "mean_results": tally.results / answered if answered else 0.0,
    }
    latencies = tally.latencies.percentiles()
    if latencies:
        described.update({"p50_ms": latencies["p50_ms"], "p95_ms": latencies["p95_ms"], "p99_ms": latencies["p99_ms"]})
    return described


HISTORY_KEPT = 1000
"""Entries of a context's history."""

COUNTED = 1000
"""The most that ``count_relevant`` counts."""


@dataclass
class RetrievalResult:
    """A unit that a query found.

    Attributes:
        unit_id: The unit's id.
        unit: The unit.
        score: Grows with relevance; the scale depends on the strategy.
        metadata: What the strategy knows about the result, such as ``distance``.

    Examples:
        >>> from memevolve_gpu.components.retrieve import RetrievalResult
        >>> RetrievalResult("a", {"id": "a", "content": "git bisect"}, 0.9).score
        0.9
    """

    unit_id: str
    unit: MemoryUnit
    score: float
    metadata: JsonObject | None = None


class RetrievalStrategy(ABC):
    """The contract of a retrieval strategy: finds units for a query in any backend.

    Examples:
        >>> from memevolve_gpu.components.retrieve import RetrievalResult, RetrievalStrategy
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> class Newest(RetrievalStrategy):
        ...     def retrieve(self, query, storage_backend, top_k=5, filters=None):
        ...         units = storage_backend.retrieve_all()[::-1][:top_k]
        ...         return [RetrievalResult(unit["id"], unit, 1.0) for unit in units]
        ...     def count_relevant(self, query, storage_backend, filters=None):
        ...         return storage_backend.count()
        >>> store = ScratchStore([{"id": "a", "content": "old"}, {"id": "b", "content": "new"}])
        >>> [found.unit_id for found in Newest().retrieve("anything", store, top_k=1)]
        ['b']
    """

    @abstractmethod
    def retrieve(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Filters | None = None
    ) -> list[RetrievalResult]:
        """Find the units that match a query best.

        Args:
            query: The text to search for.
            storage_backend: The store.
            top_k: Most results.
            filters: Limits the search to units that match, see ``docs/reference/filters.md``.

        Returns:
            The results, best first.

        Raises:
            InvalidQueryError: ``query`` or ``top_k`` cannot be used.
            InvalidFilterError: ``filters`` is malformed.
            EmbeddingError: The query cannot be embedded.
        """

    def retrieve_by_ids(self, unit_ids: Sequence[str], storage_backend: StorageBackend) -> list[RetrievalResult]:
        """Read units by their ids, and count an access to each.

        Args:
            unit_ids: Ids; those of no unit are skipped.
            storage_backend: The store.

        Returns:
            The units in the order of ``unit_ids``, with score 1.0.
        """
        backend = as_backend(storage_backend)
        units = backend.retrieve_batch(unit_ids)
        backend.record_access(list(units))
        return [RetrievalResult(unit_id, unit, 1.0) for unit_id, unit in units.items()]

    def search(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Filters | None = None
    ) -> list[RetrievalResult]:
        """Call :meth:`retrieve`: MemEvolve's other name for it.

        Args:
            query: As there, like the others.
            storage_backend: See ``query``.
            top_k: See ``query``.
            filters: See ``query``.

        Returns:
            The results, best first.
        """
        return self.retrieve(query, storage_backend, top_k, filters)

    @abstractmethod
    def count_relevant(self, query: str, storage_backend: StorageBackend, filters: Filters | None = None) -> int:
        """Count the units that :meth:`retrieve` could find.

        Args:
            query: The text to search for.
            storage_backend: The store.
            filters: As for :meth:`retrieve`.

        Returns:
            Their number, at most 1,000.
        """

    def ranked_by(self, ranking: Ranking) -> RetrievalStrategy:
        """Return a copy of the strategy that ranks by age and importance too.

        Args:
            ranking: How they count.

        Returns:
            The copy.

        Raises:
            InvalidQueryError: The strategy has no attribute ``ranking``.
        """
        Ranking.checked(ranking)
        if not hasattr(self, "ranking"):
            raise InvalidQueryError(
                f"recency and importance: a {type(self).__name__} does not rank by them; use one of this package's "
                "strategies"
            )
        other = copy.copy(self)
        other.ranking = Ranking.checked(ranking)
        return other

    def save_state(self) -> JsonObject:
        """Describe the state that another instance needs to continue.

        Returns:
            JSON values for :meth:`restore_state`.
        """
        return {}

    def restore_state(self, state: Mapping[str, object]) -> None:
        """Take over the state of another instance.

        Args:
            state: What :meth:`save_state` of that instance returned.
        """
        del state


class RetrievalContext:
    """Runs a strategy with default arguments, and keeps metrics and the last 1,000 queries.

    Examples:
        >>> from memevolve_gpu.components.retrieve import KeywordRetrievalStrategy, RetrievalContext
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> context = RetrievalContext(KeywordRetrievalStrategy(), default_top_k=3)
        >>> store = ScratchStore([{"id": "a", "content": "git bisect finds the bad commit"}])
        >>> [found.unit_id for found in context.retrieve("bad commit", store)]
        ['a']
        >>> context.get_retrieval_history()[0]["top_k"]
        3
    """

    def __init__(
        self,
        strategy: RetrievalStrategy,
        default_top_k: int = 5,
        default_filters: Filters | None = None,
        enable_metrics: bool = True,
    ) -> None:
        """Create a context.

        Args:
            strategy: The strategy to run.
            default_top_k: ``top_k`` of calls that give none.
            default_filters: ``filters`` of calls that give none.
            enable_metrics: False records no metrics.

        Raises:
            MemEvolveError: An argument is not allowed.
        """
        self.set_strategy(strategy)
        self.default_top_k = whole_number("default_top_k", default_top_k, error=ConfigurationError)
        given = mapping("default_filters", {} if default_filters is None else default_filters, InvalidFilterError)
        self.default_filters = dict(given)
        self.retrieval_history: deque[QueryRecord] = deque(maxlen=HISTORY_KEPT)
        self.metrics = RetrievalMetrics() if switch("enable_metrics", enable_metrics) else None

    def set_strategy(self, strategy: RetrievalStrategy) -> None:
        """Use another strategy for later queries.

        Args:
            strategy: The strategy.

        Raises:
            ConfigurationError: It has no method ``retrieve``.
        """
        self.strategy: RetrievalStrategy = having("strategy", strategy, "retrieve", "a retrieval strategy")

    def retrieve(
        self,
        query: str,
        storage_backend: StorageBackend,
        top_k: int | None = None,
        filters: Filters | None = None,
        *,
        ranking: Ranking | None = None,
    ) -> list[RetrievalResult]:
        """Find the units that match a query best.

        Args:
            query: The text to search for.
            storage_backend: The store.
            top_k: Most results; None for the default.
            filters: Limits the search to units that match; None for the default.
            ranking: How age and importance count; None for what the strategy has.

        Returns:
            The results, best first.

        Raises:
            MemEvolveError: As the strategy.
        """
        strategy, wanted, chosen = self.strategy, *self._defaults(top_k, filters)
        strategy = strategy if ranking is None else strategy.ranked_by(ranking)
        started = time.perf_counter()
        try:
            results = strategy.retrieve(query, storage_backend, wanted, chosen)
        except BaseException:
            self._measure(strategy, started, None)
            raise
        self._measure(strategy, started, len(results))
        self.retrieval_history.append(
            {
                "query": query,
                "top_k": wanted,
                "filters": {} if chosen is None else {**chosen},
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
        filters: Filters | None = None,
    ) -> list[RetrievalResult]:
        """Call :meth:`retrieve`: MemEvolve's other name for it.

        Args:
            query: As there, like the others.
            storage_backend: See ``query``.
            top_k: See ``query``.
            filters: See ``query``.

        Returns:
            The results, best first.
        """
        return self.retrieve(query, storage_backend, top_k, filters)

    def retrieve_by_ids(self, unit_ids: Sequence[str], storage_backend: StorageBackend) -> list[RetrievalResult]:
        """Read units by their ids, as the strategy does.

        Args:
            unit_ids: Ids; those of no unit are skipped.
            storage_backend: The store.

        Returns:
            The units in the order of ``unit_ids``, with score 1.0.
        """
        return self.strategy.retrieve_by_ids(unit_ids, storage_backend)

    def count_relevant(self, query: str, storage_backend: StorageBackend, filters: Filters | None = None) -> int:
        """Count the units that a query could find.

        Args:
            query: The text to search for.
            storage_backend: The store.
            filters: Limits the count to units that match; None for the default.

        Returns:
            Their number, at most 1,000.
        """
        return self.strategy.count_relevant(query, storage_backend, self._defaults(None, filters)[1])

    def get_retrieval_history(self) -> list[QueryRecord]:
        """Read what was asked.

        Returns:
            The last 1,000 queries, newest last.
        """
        return list(self.retrieval_history)

    def clear_history(self) -> None:
        """Empty the history."""
        self.retrieval_history.clear()

    def _defaults(self, top_k: int | None, filters: Filters | None) -> tuple[int, Filters | None]:
        given: object = self.default_filters if filters is None else filters
        if isinstance(given, list):
            given = {"and": given}
        return self.default_top_k if top_k is None else top_k, mapping("filters", given, InvalidFilterError) or None

    def _measure(self, strategy: RetrievalStrategy, started: float, found: int | None) -> None:
        if self.metrics is not None:
            self.metrics.record(type(strategy).__name__, time.perf_counter() - started, found)
