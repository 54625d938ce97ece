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

KEY = "query_sample"

LOOK_EVERY = 4096
"""Searches after which to check whether the calibration still fits the queries."""

RECALIBRATE_GROWTH = 4.0
"""A calibration is repeated when this many times as many queries have been seen as at its time."""


class QuerySample:
    """A bounded sample of query vectors; see :mod:`memevolve_gpu.training.reservoir`.

    Nothing is kept unless ``enabled``.
    """

    def __init__(self, records: Records, events: EventLog, seed: int, enabled: bool) -> None:
        self._records, self._events = records, events
        self._enabled, self._seed = enabled, seed
        held = records.get_meta(KEY) if enabled else None
        self._reservoir = Reservoir.from_bytes(held or b"", records.dim, seed=seed)
        self._saved, self._kept = 0, held is not None
        """How often the sample had changed when it was saved; whether the records should keep one."""
        self._searches = 0

    @property
    def seen(self) -> int:
        return self._reservoir.seen

    @property
    def kept(self) -> int:
        """Query vectors in the sample."""
        return len(self._reservoir)

    def note(self, queries: FloatArray | DeviceQueries) -> bool:
        """Note the queries of one search; True once in 4,096 searches, when the calibration should be checked."""
        self._searches += 1
        if self._enabled:
            self._reservoir.offer(cast("FloatArray", queries))  # only sampled rows are read
        return self._searches % LOOK_EVERY == 0

    def sample(self) -> FloatArray:
        """float32 (m, dim)."""
        return self._reservoir.sample()

    def has_news_since(self, seen: int) -> bool:
        """Whether a calibration made when ``seen`` queries had been seen is out of date."""
        return self.seen >= max(MIN_REAL, RECALIBRATE_GROWTH * seen)

    def forget(self) -> None:
        """Begin again, without any query."""
        self._reservoir = Reservoir.from_bytes(b"", self._records.dim, seed=self._seed)
        self._saved, self._kept = 0, False

    def save(self, timeout: float | None = None) -> None:
        """Save the sample with the records if it has changed; a failure is an event.

        timeout: seconds to wait for other writers, None for the store's.
        """
        taken = self._reservoir.taken
        if not self._enabled or self._records.read_only or taken == self._saved:
            return
        try:
            with self._records.write(timeout) as tx:
                if self._kept and tx.get_meta(KEY) is None:  # another opening of the store erased it
                    self.forget()
                    return
                tx.set_meta(KEY, self._reservoir.to_bytes())
                self._saved, self._kept = taken, True
        except StorageError as error:
            self._events.record("queries-unsaved", str(error))
