"""Upkeep steps aside while others search."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Courtesy"]

ACTIVE_SECONDS = 0.05
"""A search so lately means that the next is near."""

LONGEST_REST = 0.01
"""Seconds of one rest."""


class Courtesy:
    """Called between pieces of work of some milliseconds: rests while searches are running, altogether at most as long
    as it has worked, so that upkeep takes at most twice as long."""

    def __init__(
        self,
        last_search: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            last_search: when somebody last began or ended a search, by ``clock``.
            clock: seconds.
            sleep: waits so many seconds.
        """
        self._last_search, self._clock, self._sleep = last_search, clock, sleep
        self._began = clock()
        self.rested = 0.0
        """Seconds spent resting."""

    def __call__(self) -> None:
        now = self._clock()
        allowed = (now - self._began) - 2 * self.rested
        if allowed > 0 and now - self._last_search() < ACTIVE_SECONDS:
            self._sleep(min(allowed, LONGEST_REST))
            self.rested += self._clock() - now
