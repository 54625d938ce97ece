"""How long to wait before something that failed is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable


class Backoff:
    """Waits that double with each failure in a row, up to a limit."""

    def __init__(self, first: float, longest: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``first`` and ``longest`` are seconds; ``clock`` returns seconds."""
        self._first, self._longest, self._clock = first, longest, clock
        self.reset()

    def reset(self) -> None:
        """It succeeded: no wait now, and the next failure waits the shortest time again."""
        self._next_wait = self._first
        self._retry_at: float | None = None

    def failed(self) -> float:
        """Note a failure; return the seconds until the next try."""
        wait, self._next_wait = self._next_wait, min(self._longest, 2 * self._next_wait)
        self._retry_at = self._clock() + wait
        return wait

    @property
    def remaining(self) -> float:
        """Seconds until the next try; 0.0 when it may be made now."""
        return 0.0 if self._retry_at is None else max(0.0, self._retry_at - self._clock())
