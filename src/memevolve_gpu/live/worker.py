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
from ..index.faiss_support import leave_half
from ..monitoring.events import EventLog
from ..utils.backoff import Backoff
from ..utils.forking import lock, renew_in_child

ACTIVE_SECONDS = 0.05
"""After a search this recent, another one is likely."""

LONGEST_REST = 0.01
"""Seconds of one rest."""


class SearchYield:
    """Rests between pieces of work of a few milliseconds while searches are running.

    The total rest is at most the time worked, so maintenance takes at most twice as long.
    """

    def __init__(
        self,
        last_search: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Make the pauses of one round.

        Args:
            last_search: when a search last started or ended, by ``clock``.
            clock: returns seconds.
            sleep: waits for some seconds.
        """
        self._last_search, self._clock, self._sleep = last_search, clock, sleep
        self._started = clock()
        self.rested = 0.0
        """Seconds spent resting."""

    def __call__(self) -> None:
        now = self._clock()
        allowed = (now - self._started) - 2 * self.rested
        if allowed > 0 and now - self._last_search() < ACTIVE_SECONDS:
            self._sleep(min(allowed, LONGEST_REST))
            self.rested += self._clock() - now


IDLE_SECONDS = 60.0
"""How long a thread without work waits before it ends; the next call starts another."""

RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 60.0
"""Wait before the next try after a failed round; doubled by each failure in a row."""

NICENESS = 10
"""Added to the thread's nice value where the system supports that."""


class Worker:
    """Runs ``work`` on a daemon thread whenever ``wake`` is called; never two at once."""

    def __init__(self, work: Callable[[], float | None], events: EventLog) -> None:
        """``work``: a bound method, held weakly; it returns the seconds after which to call it again, None to wait for
        ``wake``."""
        self._work = weakref.WeakMethod(work)
        self._events = events
        self._thread: threading.Thread | None = None
        self._retry = Backoff(RETRY_SECONDS, LONGEST_RETRY_SECONDS)
        self.start_failure = ""
        """Why the last attempt to start the thread failed; empty when it did not."""
        self.after_fork()
        renew_in_child(self)

    def wake(self) -> bool:
        """Have ``work`` called soon; False when no thread can run. The next call tries again."""
        with self._lock:
            if self._stopping:
                return False
            if self._calls.empty():
                self._calls.put(None)
            return self._thread is not None or self._started()

    def stop(self) -> None:
        """Wait for a running round, then end the thread."""
        with self._lock:
            self._stopping = True
            self._calls.put(None)
            thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join()

    def after_fork(self) -> None:
        """The thread does not exist in the child; ``wake`` starts another.

        Signal handlers and finalizers may call any method at any time, so the locks are re-entrant; ``threading.Event``
        is not.
        """
        self._lock = lock()
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._stopping = False
        self._thread = None

    def _called(self, timeout: float) -> bool:
        """Wait for calls of ``wake`` and consume them; False when none came within ``timeout`` seconds."""
        try:
            self._calls.get(timeout=timeout)
        except Empty:
            return False
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        return True

    def _started(self) -> bool:
        """Start the thread; the lock is held. A failure is kept in ``start_failure``, and raises nothing."""
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
        _lower_priority()
        try:
            leave_half()
            due = False
            while not self._ends(due):
                later = self._one_round()
                due = later is not None
                if later:
                    self._called(later)
        finally:
            with self._lock:  # also after an unforeseen error, so that the next call starts another thread
                if self._thread is threading.current_thread():
                    self._thread = None

    def _ends(self, due: bool) -> bool:
        """Wait for work unless some is due; True when the thread is to end. A later ``wake`` then starts another."""
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
            later = work()
        except (MemEvolveError, OSError, MemoryError, RuntimeError) as error:
            self._events.record("maintenance-failed", str(error), level=logging.ERROR)
            del work
            self._rest(self._retry.failed())
            return 0.0
        self._retry.reset()
        return later

    def _rest(self, seconds: float) -> None:
        """Wait, even if ``wake`` is called, unless the thread is to end."""
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            self._called(left)


def _lower_priority() -> None:
    """Lower this thread's priority, so that searches run first. Only Linux has a priority per thread."""
    if sys.platform == "linux":
        with suppress(OSError):
            me = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + NICENESS))
