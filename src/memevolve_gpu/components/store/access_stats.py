"""Access statistics of units, buffered in memory and written a thousand at a time."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal

from ...errors import LockTimeoutError, StorageError
from ...monitoring.events import EventLog
from ...records.records import Records
from ...records.transaction import Transaction, enter, in_order, read_counts
from ...utils.forking import lock, renew_in_child

FLUSH_AT = 1000
"""Ids that are written together."""

MOST_HELD = 10_000
"""Most ids that are buffered while nothing can be written; beyond that they are dropped."""


Reads = dict[tuple[int, str], tuple[float, int]]
"""(namespace, id) to (Unix time of the newest read, how many)."""


class Accesses:
    """The access statistics of one open store. ``note`` costs about a microsecond and never waits.

    A crash loses those in memory: about a thousand ids at most, ten thousand where no background thread writes them.
    """

    def __init__(self, records: Records, events: EventLog, wake: weakref.WeakMethod[Callable[[], bool]]) -> None:
        """``wake`` makes the background thread call ``flush``; it returns False when there is none."""
        self._records = records
        self._events = events
        self._wake = wake
        self._reads: list[tuple[float, int, Sequence[str]]] = []
        self._held = 0
        self._flushing = lock()
        self._busy = False
        renew_in_child(self)

    @property
    def is_full(self) -> bool:
        """Whether there are enough to be written."""
        return self._held >= FLUSH_AT

    def note(self, ids: Sequence[str], ns: int) -> None:
        """Count an access to each of these units of one namespace."""
        self._reads.append((time.time(), ns, ids))
        before = self._held // FLUSH_AT
        self._held += len(ids)
        if self._held // FLUSH_AT > before:
            self._overflow()

    def flush(self, timeout: float | None = 0) -> None:
        """Write the buffered accesses in one transaction that the index ignores; drop them where that fails.

        While another process is writing they stay buffered. timeout: seconds to wait for it, None for the store's.
        """
        with self._flushing:
            if self._busy:  # a signal handler or finalizer inside this very call
                return
            self._busy = True
            try:
                self._write_down(self._taken(), timeout)
            finally:
                self._busy = False

    def close(self) -> None:
        """Write what is buffered unless another process is writing; what is dropped then is an event."""
        self.flush()
        dropped = len(self._taken())
        if dropped and not self._records.read_only:
            cause = f"{dropped} units' access figures: another process was writing when this store was closed"
            self._events.record("access-lost", cause, level=logging.WARNING)

    def write_in(self, tx: Transaction) -> None:
        """Write the buffered accesses in this transaction; they are lost if it fails."""
        reads = self._taken()
        if reads:
            tx.outside(lambda con: enter(con, reads))

    def in_order(self, kind: Literal["lru", "lfu"], limit: int, ns: int) -> list[str]:
        """List ids as ``VectorStore.access_order`` does; by age in a read-only store."""
        if self._records.read_only:
            return list(islice(self._records.ids(ns=ns), limit))
        with self._records.write() as tx:
            self.write_in(tx)
            return tx.read(lambda con: in_order(con, kind, limit, ns))

    def counts(self, ns: int) -> dict[str, int]:
        """Count accesses as ``VectorStore.access_counts`` does; none in a read-only store."""
        if self._records.read_only:
            return {}
        with self._records.write() as tx:
            self.write_in(tx)
            return tx.read(lambda con: read_counts(con, ns))

    def after_fork(self) -> None:
        """Drop the reads in a forked child, which the parent writes."""
        self._busy = False
        self._taken()

    def _write_down(self, reads: Reads, timeout: float | None) -> None:
        if not reads or self._records.read_only:
            return
        try:
            with self._records.write(timeout=timeout) as tx:
                tx.outside(lambda con: enter(con, reads))
        except LockTimeoutError:
            self._keep(reads)
        except StorageError as error:
            self._events.record("access-lost", f"{len(reads)} units' access figures: {error}")

    def _keep(self, reads: Reads) -> None:
        """Another process is writing: keep the reads for the next time, up to the limit."""
        if self._held + len(reads) > MOST_HELD:
            self._events.record(
                "access-lost", f"{len(reads)} units' access figures: another process writes all the time"
            )
            return
        self._reads.extend((moment, ns, (unit_id,) * count) for (ns, unit_id), (moment, count) in reads.items())
        self._held += sum(count for _, count in reads.values())

    def _overflow(self) -> None:
        wake = self._wake()
        if wake is None or not wake():
            if self._held >= MOST_HELD:  # before that the next write of this store takes them along
                self.flush()
        elif self._held >= MOST_HELD:
            self._taken()
            self._events.record("access-lost", f"more than {MOST_HELD} reads waited to be written down")

    def _taken(self) -> Reads:
        """Take all buffered reads: the newest time and the count by namespace and id."""
        held, self._reads = self._reads, []
        self._held = 0
        reads: Reads = {}
        for moment, ns, ids in held:
            for unit_id in ids:
                reads[ns, unit_id] = (moment, reads.get((ns, unit_id), (moment, 0))[1] + 1)
        return reads
