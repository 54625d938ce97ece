"""One background thread per store that runs maintenance and yields to searches."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from ..errors import MemEvolveError
from ..monitoring.events import EventLog
from ..utils.forking import renew_in_child

__all__ = ["SearchYield", "Worker"]

ACTIVE_SECONDS = 0.05
"""A search so lately means that the next is near."""

LONGEST_REST = 0.01
"""Seconds of one rest."""


class SearchYield:
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
        row_filter = (now - self._began) - 2 * self.rested
        if row_filter > 0 and now - self._last_search() < ACTIVE_SECONDS:
            self._sleep(min(row_filter, LONGEST_REST))
            self.rested += self._clock() - now


IDLE_SECONDS = 60.0
"""How long a thread without work stays before it ends; the next piece of work starts another."""

RETRY_SECONDS = 5.0
"""How long to leave a round that failed before the next try."""

NICENESS = 10
"""Lowers the thread's priority where the system knows such a thing."""


class Worker:
    """Runs ``work`` on a daemon thread whenever ``wake`` is called; never two at once."""

    def __init__(self, work: Callable[[], float | None], events: EventLog) -> None:
        """``work`` is a bound method, held weakly; it returns the seconds after which to call it again, None for when
        it is poked."""
        self._work = weakref.WeakMethod(work)
        self._events = events
        self._thread: threading.Thread | None = None
        self.start_failure = ""
        """Why the last attempt to start the thread failed; empty when it did not."""
        self._reset()
        renew_in_child(self)

    def wake(self) -> bool:
        """There may be something to do; False when no thread can see to it now. The next call tries again."""
        with self._lock:
            if self._stopping:
                return False
            self._call()
            return self._thread is not None or self._started()

    def stop(self) -> None:
        """Let a running round finish, then end the thread."""
        with self._lock:
            self._stopping = True
            self._calls.put(None)
            thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join()

    def after_fork(self) -> None:
        """The thread does not exist in the child; start anew when poked."""
        self._reset()

    def _reset(self) -> None:
        """Signal handlers and finalizers may call in the middle of everything here, so the locks are re-entrant ones;
        ``threading.Event`` has none."""
        self._lock = threading.RLock()
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._stopping = False
        self._thread = None

    def _call(self) -> None:
        if self._calls.empty():
            self._calls.put(None)

    def _called(self, timeout: float) -> bool:
        """Wait for a call, and take all that have come; False when none came in so many seconds."""
        try:
            self._calls.get(timeout=timeout)
        except Empty:
            return False
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        return True

    def _started(self) -> bool:
        """Start the thread; the lock is held. The system may have none to give: then this is a state, not an error."""
        self._thread = thread = threading.Thread(target=self._loop, name="memevolve-maintenance", daemon=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            self._thread = None
            if not self.start_failure:
                self._events.record("background-failed", f"no thread: {error}; tried again", level=logging.WARNING)
            self.start_failure = str(error) or type(error).__name__
            return False
        self.start_failure = ""
        return True

    def _loop(self) -> None:
        _step_back()
        try:
            due = False
            while not self._ends(due):
                later = self._one_round()
                due = later is not None
                if later:
                    self._called(later)
        finally:
            with self._lock:  # after an error that nobody foresaw the next call must find no dead thread
                if self._thread is threading.current_thread():
                    self._thread = None

    def _ends(self, due: bool) -> bool:
        """Wait for work unless some is due; True when the thread is to end, which no later poke can overlook."""
        due = due or self._called(IDLE_SECONDS)
        with self._lock:
            if (due or not self._calls.empty()) and not self._stopping:
                return False
            self._thread = None
            return True

    def _one_round(self) -> float | None:
        work = self._work()
        if work is None:
            self._stopping = True
            return None
        try:
            return work()
        except (MemEvolveError, OSError, MemoryError, RuntimeError) as error:
            self._events.record("maintenance-failed", str(error), level=logging.ERROR)
            del work
            self._rest(RETRY_SECONDS)
            return 0.0

    def _rest(self, seconds: float) -> None:
        """Wait so long, whoever calls, unless the thread is to end."""
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            self._called(left)


def _step_back() -> None:
    """Let whoever waits for an answer go first. Threads have priorities of their own on Linux only."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
