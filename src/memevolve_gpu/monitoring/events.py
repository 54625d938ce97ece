"""Events of a store, and latencies of recent searches.

Events are logged and kept in a bounded ring; totals by kind are kept as long as the store is open.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np

from ..types import JsonObject
from ..utils.forking import lock
from ..utils.report_types import EventReport, LatencyReport

LATENCIES_KEPT = 2048


class LatencyRing:
    """The durations of the last searches. Appending to a deque is atomic, so no lock is needed."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=LATENCIES_KEPT)

    def record(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def forget(self) -> None:
        """Drop all durations, so that those before and after a change are not mixed."""
        self._seconds.clear()

    def percentiles(self) -> LatencyReport | None:
        """Of the last searches; None before the first."""
        taken = np.array(list(self._seconds)) * 1e3
        if not len(taken):
            return None
        p50, p95, p99 = np.percentile(taken, [50, 95, 99]).tolist()
        return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "searches": len(taken)}


KEPT = 256

logger = logging.getLogger("memevolve_gpu")


@dataclass(frozen=True, slots=True)
class Event:
    """kind: a short stable word; cause: one sentence; seconds: duration; at: Unix time; figures: numbers."""

    kind: str
    cause: str
    seconds: float = 0.0
    level: int = logging.INFO
    at: float = field(default_factory=time.time)
    figures: JsonObject = field(default_factory=dict)

    def report(self) -> EventReport:
        level, figures = logging.getLevelName(self.level), deepcopy(self.figures)
        return EventReport(
            kind=self.kind, cause=self.cause, seconds=self.seconds, level=level, at=self.at, figures=figures
        )


class EventLog:
    """A bounded, thread-safe ring of events; signal handlers and finalizers may use it too."""

    def __init__(self) -> None:
        self._lock = lock()
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._totals: Counter[str] = Counter()

    def record(
        self, kind: str, cause: str, *, seconds: float = 0.0, level: int = logging.INFO, **figures: object
    ) -> Event:
        event = Event(kind, cause, round(seconds, 6), level, figures=figures)
        with self._lock:
            self._events.append(event)
            self._totals[kind] += 1
        logger.log(level, "%s: %s", kind, cause)
        return event

    def recent(self, kind: str | None = None) -> list[Event]:
        """Newest last."""
        with self._lock:
            return [event for event in list(self._events) if kind is None or event.kind == kind]

    def totals(self) -> dict[str, int]:
        with self._lock:
            return dict(self._totals)
