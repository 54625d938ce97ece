"""How long the latest searches took, embedding apart."""

from __future__ import annotations

from collections import deque

import numpy as np

__all__ = ["LatencyRing"]

KEPT = 2048


class LatencyRing:
    """The durations of the newest searches. Appending to a deque is atomic, so threads need no lock."""

    def __init__(self, kept: int = KEPT) -> None:
        self._seconds: deque[float] = deque(maxlen=kept)

    def record(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def forget(self) -> None:
        """Start anew, so that the figures before and after a change can be told apart."""
        self._seconds.clear()

    def percentiles(self) -> dict[str, float] | None:
        """{"p50_ms", "p95_ms", "p99_ms", "searches"} of the newest searches; None before the first."""
        taken = np.array(list(self._seconds)) * 1e3
        if not len(taken):
            return None
        p50, p95, p99 = np.percentile(taken, [50, 95, 99]).tolist()
        return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "searches": len(taken)}
