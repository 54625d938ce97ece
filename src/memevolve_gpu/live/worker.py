"""One background thread per store that runs maintenance when there is something to do."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

from ..errors import MemEvolveError
from ..monitoring.events import EventLog
from ..utils.forking import renew_in_child

__all__ = ["Worker"]

IDLE_SECONDS = 60.0
"""How long a thread without work stays before it ends; the next piece of work starts another."""

RETRY_SECONDS = 5.0
"""How long to leave a round that failed, or that another process is doing, before the next try."""


class Worker:
    """Runs ``work`` on a daemon thread whenever ``poke`` is called; never two at once."""

    def __init__(self, work: Callable[[], bool], events: EventLog) -> None:
        """``work`` is a bound method, held weakly; it returns False when it should be tried again a little later."""
        self._work = weakref.WeakMethod(work)
        self._events = events
        self._thread: threading.Thread | None = None
        self._reset()
        renew_in_child(self)

    def poke(self) -> None:
        """There may be something to do."""
        with self._lock:
            if self._stopping.is_set():
                return
            self._wake.set()
            if self._thread is None:
                thread = threading.Thread(target=self._loop, name="memevolve-maintenance", daemon=True)
                self._thread = thread
                thread.start()

    def stop(self) -> None:
        """Let a running round finish, then end the thread."""
        with self._lock:
            self._stopping.set()
            self._wake.set()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def after_fork(self) -> None:
        """The thread does not exist in the child; start anew when poked."""
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = None

    def _loop(self) -> None:
        while not self._ends():
            self._wake.clear()
            if not self._one_round() and not self._stopping.wait(RETRY_SECONDS):
                self._wake.set()

    def _ends(self) -> bool:
        """Wait for work; True when the thread is to end, which a poke can then no longer overlook."""
        self._wake.wait(IDLE_SECONDS)
        with self._lock:
            if self._wake.is_set() and not self._stopping.is_set():
                return False
            self._thread = None
            return True

    def _one_round(self) -> bool:
        work = self._work()
        if work is None:
            self._stopping.set()
            return True
        try:
            return work()
        except (MemEvolveError, OSError, MemoryError) as error:
            self._events.record("maintenance-failed", str(error), level=logging.ERROR)
            return False
