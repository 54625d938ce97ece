"""A sample of real queries, kept with the records, for calibration and recall probes."""

from __future__ import annotations

from typing import cast

from ..errors import StorageError
from ..monitoring.events import EventLog
from ..records.records import Records
from ..training.calibration import MIN_REAL
from ..training.reservoir import Reservoir
from ..types import FloatArray
from ..utils.vectors import DeviceQueries

__all__ = ["QuerySample"]

KEY = "query_sample"

LOOK_EVERY = 4096
"""Searches after which it is time to look whether the calibration still fits what is asked."""

ASKED_ANEW = 4.0
"""A calibration is repeated when this many times as many queries have been seen as then."""


class QuerySample:
    """A bounded sample of query vectors; see :mod:`memevolve_gpu.training.reservoir`. Nothing is kept when ``enabled``
    is off."""

    def __init__(self, records: Records, events: EventLog, seed: int, enabled: bool) -> None:
        self._records, self._events = records, events
        self._enabled = enabled
        held = records.get_meta(KEY) if enabled else None
        self._reservoir = Reservoir.from_bytes(held or b"", records.dim, seed=seed)
        self._saved = 0
        self._searches = 0

    @property
    def seen(self) -> int:
        return self._reservoir.seen

    @property
    def kept(self) -> int:
        """Query vectors in the sample."""
        return len(self._reservoir)

    def note(self, queries: FloatArray | DeviceQueries) -> bool:
        """A search was made with these queries; True once in a while, when upkeep should have a look."""
        self._searches += 1
        if self._enabled:
            self._reservoir.offer(cast("FloatArray", queries))  # only a row that is taken is read
        return self._searches % LOOK_EVERY == 0

    def sample(self) -> FloatArray:
        """float32 (m, dim)."""
        return self._reservoir.sample()

    def has_news_since(self, seen: int) -> bool:
        """Have so many queries come since ``seen`` that a calibration made then is out of date?"""
        return self.seen >= max(MIN_REAL, ASKED_ANEW * seen)

    def save(self) -> None:
        """Keep the sample with the records, where it has changed; it may be lost without harm."""
        taken = self._reservoir.taken
        if not self._enabled or self._records.read_only or taken == self._saved:
            return
        try:
            with self._records.write() as tx:
                tx.set_meta(KEY, self._reservoir.to_bytes())
            self._saved = taken
        except StorageError as error:
            self._events.record("queries-unsaved", str(error))

    def after_fork(self) -> None:
        """In a forked child: a lock that nobody holds."""
        self._reservoir.reset_lock()
