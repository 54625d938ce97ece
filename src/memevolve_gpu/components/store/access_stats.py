"""Access statistics of units, buffered in memory and written a thousand at a time."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal

from ...errors import LockTimeoutError, StorageError
from ...monitoring.events import EventLog
from ...records.records import Records
from ...records.transaction import enter, in_order, read_counts
from ...utils.forking import renew_in_child

__all__ = ["Accesses"]

FLUSH_AT = 1000
"""Ids read that are written down together."""

MOST_HELD = 10_000
"""Ids held when nothing can be written; then the oldest are forgotten."""


class Accesses:
    """The access figures of one open store. ``note`` costs about a microsecond and never waits.

    What is in memory is lost in a crash, at most the newest thousand ids or so.
    """

    def __init__(self, records: Records, events: EventLog, wake: weakref.WeakMethod[Callable[[], bool]]) -> None:
        """``wake`` asks the background to call ``flush``; it returns False when there is none."""
        self._records = records
        self._events = events
        self._wake = wake
        self._reads: list[tuple[float, Sequence[str]]] = []
        self._held = 0
        self._flushing = threading.RLock()
        self._busy = False
        renew_in_child(self)

    @property
    def is_full(self) -> bool:
        """Is there enough to be written down?"""
        return self._held >= FLUSH_AT

    def note(self, ids: Sequence[str]) -> None:
        """The units of these ids were given to somebody."""
        self._reads.append((time.time(), ids))
        before = self._held // FLUSH_AT
        self._held += len(ids)
        if self._held // FLUSH_AT > before:
            self._overflow()

    def flush(self, timeout: float | None = 0) -> None:
        """Write down what is held, in one transaction that the index takes no notice of; drop it where that fails.

        Waits ``timeout`` seconds for other writers, None as long as any write does; then the reads are held on.
        """
        with self._flushing:
            if self._busy:  # a signal handler or finalizer inside this very call
                return
            self._busy = True
            try:
                self._write_down(self._taken(), timeout)
            finally:
                self._busy = False

    def in_order(self, kind: Literal["lru", "lfu"], limit: int) -> list[str]:
        """See ``VectorStore.access_order``. Where nothing can be written, units are taken by age."""
        if self._records.read_only:
            return list(islice(self._records.ids(), limit))
        self.flush(timeout=None)
        with self._records.write() as tx:
            return tx.outside(lambda con: in_order(con, kind, limit))

    def counts(self) -> dict[str, int]:
        """See ``VectorStore.access_counts``."""
        if self._records.read_only:
            return {}
        self.flush(timeout=None)
        with self._records.write() as tx:
            return tx.outside(read_counts)

    def after_fork(self) -> None:
        """In a forked child: nobody holds the lock, and the reads are the parent's to write down."""
        self._flushing = threading.RLock()
        self._busy = False
        self._taken()

    def _write_down(self, reads: dict[str, tuple[float, int]], timeout: float | None) -> None:
        if not reads or self._records.read_only:
            return
        try:
            with self._records.write(timeout=timeout) as tx:
                tx.outside(lambda con: enter(con, reads))
        except LockTimeoutError:
            self._keep(reads)
        except StorageError as error:
            self._events.record("access-lost", f"{len(reads)} units' access figures: {error}")

    def _keep(self, reads: dict[str, tuple[float, int]]) -> None:
        """Somebody writes just now: hold the reads for the next time, up to the limit."""
        if self._held + len(reads) > MOST_HELD:
            self._events.record(
                "access-lost", f"{len(reads)} units' access figures: another process writes all the time"
            )
            return
        self._reads.extend((moment, (unit_id,) * count) for unit_id, (moment, count) in reads.items())
        self._held += sum(count for _, count in reads.values())

    def _overflow(self) -> None:
        wake = self._wake()
        if wake is None or not wake():
            self.flush()
        elif self._held >= MOST_HELD:
            self._taken()
            self._events.record("access-lost", f"more than {MOST_HELD} reads waited to be written down")

    def _taken(self) -> dict[str, tuple[float, int]]:
        """Everything held, added up by id; nothing is held afterwards."""
        held, self._reads = self._reads, []
        self._held = 0
        reads: dict[str, tuple[float, int]] = {}
        for moment, ids in held:
            for unit_id in ids:
                reads[unit_id] = (moment, reads.get(unit_id, (moment, 0))[1] + 1)
        return reads
