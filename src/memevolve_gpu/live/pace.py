"""When the background may take rows out of the tail: at once, after a while, or once the writers rest."""

from __future__ import annotations

import time
from collections.abc import Callable

from .causes import TAIL_FRACTION, quiet_limit, tail_limit
from .view import View

__all__ = ["Pace"]

QUIET_SECONDS = 2.0
"""So long without a write counts as a rest."""

SHARE = 0.05
"""Of the time that appending may take while others write, as long as the tail is below a quarter of the body."""


class Pace:
    """Keeps one store's appends apart. A running bulk load fills the tail; what one append costs is then paid once for
    many batches."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self._watermark = -1
        self._changed = self._next = clock()

    def appended(self, seconds: float) -> None:
        """An append has just ended that took so long."""
        self._next = self._clock() + seconds / SHARE

    def delay(self, view: View) -> float | None:
        """Seconds until the tail of an up-to-date view may be appended, 0.0 for now; None when it need not be."""
        now = self._clock()
        if view.watermark != self._watermark:
            self._watermark, self._changed = view.watermark, now
        if view.tail_n <= quiet_limit(view):
            return None
        rest = max(0.0, self._changed + QUIET_SECONDS - now)
        if view.tail_n <= tail_limit(view):
            return rest
        if view.tail_n > TAIL_FRACTION * view.body.n:
            return 0.0
        return min(rest, max(0.0, self._next - now))

    def is_quiet(self) -> bool:
        """Had nobody written for a while when ``delay`` was last asked?"""
        return self._clock() - self._changed >= QUIET_SECONDS
