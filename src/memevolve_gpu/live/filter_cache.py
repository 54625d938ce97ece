"""Cached filter masks, which are updated for changed slots rather than evaluated again.

The columns of the filter's fields find its slots once; later searches evaluate it only for slots that were added or
changed since. The cache is bounded.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..index.base import Index
from ..index.bitmap import RowFilter
from ..records.filters import Filter
from ..records.records import Records
from ..types import IntArray
from ..utils.lru import LruCache
from .field_columns import FieldColumns, Log
from .view import View, ViewFilter, contains

__all__ = ["FilterCache", "Touched"]

KEPT_FILTERS = 32
KEPT_TOUCHES = 16_384


class Touched:
    """The slots that were recently added or changed, with the log entries; bounded."""

    def __init__(self, since: int) -> None:
        self.restart(since)

    def restart(self, since: int) -> None:
        """Start again; changes up to ``since`` are not known."""
        self._known_from = since  # first, so that a concurrent reader does not miss changes
        self._entries: deque[tuple[int, int]] = deque()

    def extend(self, entries: Iterable[tuple[int, int]]) -> None:
        self._entries.extend(entries)
        while len(self._entries) > KEPT_TOUCHES:
            self._known_from = self._entries[0][0]
            self._entries.popleft()

    def since(self, seq: int) -> IntArray | None:
        """Distinct slots touched after ``seq``, ascending; None when they are not known any more."""
        entries = list(self._entries)  # one step: other threads and signal handlers append
        if seq < self._known_from:
            return None
        found: list[int] = []
        for at, slot in reversed(entries):
            if at <= seq:
                break
            found.append(slot)
        return np.unique(np.asarray(found, dtype=np.int64))


def _no_index() -> None:
    """There is no mask of any index."""


@dataclass
class _Entry:
    """One filter: the ``slots`` that match as of log entry ``seq``, and their mask for one index and its deaths."""

    seq: int = -1
    slots: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    rows_for: Callable[[], Index | None] = _no_index
    """The index of the mask, held weakly: it may use a device's memory."""
    rows: np.ndarray[Any, np.dtype[np.bool_]] | None = None
    allowed_dead: int = -1
    row_filter: RowFilter | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    busy: bool = False


class FilterCache:
    """Masks by filter; the least recently used is dropped first."""

    def __init__(self, records: Records) -> None:
        self._matching = records.matching
        self.columns = FieldColumns(records)
        self._entries: LruCache[str, _Entry] = LruCache(KEPT_FILTERS)
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            entries = self._entries.values()
        held = self.columns.nbytes
        return held + sum(
            entry.slots.nbytes + (0 if entry.rows is None else 2 * entry.rows.nbytes) for entry in entries
        )

    def mask(self, filters: Filter, view: View, touched: Touched) -> ViewFilter:
        """The mask of ``filters`` for ``view``."""
        entry = self._entry(filters.key)
        with entry.lock:
            if entry.busy:  # a signal handler or finalizer interrupts this call: use no half-done entry
                entry = _Entry()
            entry.busy = True
            try:
                self._refresh(entry, filters, view, touched)
                return ViewFilter(self._row_filter(entry, view), entry.slots)
            finally:
                entry.busy = False

    def evaluated(self, filters: Filter, view: View, touched: Touched) -> IntArray:
        """Slots that match at the watermark of the view or later, ascending; some may be of deleted units."""
        return self.columns.matching(filters, Log(view.watermark, view.live_slots, touched.since))

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
        self.columns.clear()

    def _entry(self, key: str) -> _Entry:
        with self._lock:
            return self._entries.get(key) or self._entries.put(key, _Entry())

    def _refresh(self, entry: _Entry, filters: Filter, view: View, touched: Touched) -> None:
        if entry.seq >= view.watermark:
            return
        slots = touched.since(entry.seq) if entry.seq >= 0 else None
        if slots is None:
            entry.slots, entry.rows_for = self.evaluated(filters, view, touched), _no_index
        elif len(slots):
            self._look_again(entry, filters, slots)
        entry.seq = view.watermark

    def _look_again(self, entry: _Entry, filters: Filter, slots: IntArray) -> None:
        matched = self._matching(filters, slots)
        stay = entry.slots[~contains(slots, entry.slots)]
        entry.slots = np.union1d(stay, matched)
        index = entry.rows_for()
        if index is not None and index.n and slots[0] <= index.slots[-1]:
            entry.rows_for = _no_index

    def _row_filter(self, entry: _Entry, view: View) -> RowFilter | None:
        if not view.index.n:
            return None
        if entry.rows_for() is not view.index or entry.rows is None:
            rows = np.zeros(view.index.n, dtype=np.bool_)
            positions = view.index.position_of(entry.slots)
            rows[positions[positions >= 0]] = True
            entry.rows_for, entry.rows, entry.allowed_dead = weakref.ref(view.index), rows, -1
        if entry.allowed_dead != view.index_dead or entry.row_filter is None:
            alive = view.alive
            entry.row_filter = RowFilter(entry.rows if alive is None else entry.rows & alive.rows)
            entry.allowed_dead = view.index_dead
        return entry.row_filter
