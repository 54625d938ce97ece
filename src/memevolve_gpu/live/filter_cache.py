"""Cached masks of filters and namespaces, which are updated for changed slots rather than evaluated again.

The columns of the filter's fields find its slots once; later searches evaluate it only for slots that were added or
changed since. The cache is bounded.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ..index.base import Index
from ..index.bitmap import RowFilter, RowList
from ..records.filters import Filter
from ..records.records import Records
from ..types import IntArray
from ..utils.forking import lock
from ..utils.lru import LruCache
from .field_columns import FieldColumns, Log
from .foresight import Foresight
from .view import FEW_ROWS, View, ViewFilter, contains, row_filter_of

KEPT_FILTERS = 32
KEPT_IN_NAMESPACES = 256
"""The same for namespaces, whose filters are small."""
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
    """One filter: the ``slots`` that match as of log entry ``seq``, and their rows in one index and its deaths."""

    seq: int = -1
    slots: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    rows_for: Callable[[], Index | None] = _no_index
    """The index of the rows, held weakly: it may use a device's memory."""
    rows: RowFilter | None = None
    """Rows of that index, dead and expired ones included."""
    dead: int = -1
    gone: IntArray | None = None
    row_filter: RowFilter | None = None
    """``rows`` without the first ``dead`` rows that died, and without the slots ``gone``."""
    answer: tuple[weakref.ref[View], IntArray | None, ViewFilter] | None = None
    """The last answer: for which view, without which slots ``gone``."""
    lock: threading.RLock = field(default_factory=lock)
    busy: bool = False

    @property
    def nbytes(self) -> int:
        rows, answer = self.rows, self.answer
        delta = None if answer is None else answer[2].delta
        held = self.slots.nbytes + (0 if rows is None else 2 * rows.nbytes)
        return held + (0 if delta is None else delta.nbytes)


class FilterCache:
    """Masks by filter and namespaces; the least recently used is dropped first."""

    def __init__(self, records: Records) -> None:
        self._matching = records.matching
        self.columns = FieldColumns(records)
        self.foresight = Foresight(self.columns, records)
        self._entries: LruCache[Hashable, _Entry] = LruCache(KEPT_FILTERS)
        self._in_namespaces: LruCache[Hashable, _Entry] = LruCache(KEPT_IN_NAMESPACES)
        self._lock = lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            entries = [*self._entries.values(), *self._in_namespaces.values()]
        held = self.columns.nbytes
        return held + sum(entry.nbytes for entry in entries)

    def mask(
        self,
        filters: Filter,
        view: View,
        touched: Touched,
        keys: tuple[int, ...] | None = None,
        gone: IntArray | None = None,
    ) -> tuple[ViewFilter, bool]:
        """The rows of ``view`` that match ``filters``, and whether they were known as of its watermark.

        keys: limits them to these namespaces. gone: slots, ascending, that have expired.
        """
        small = keys is not None and view.count_of(keys) <= FEW_ROWS
        key, cache = (filters.key, keys), self._in_namespaces if small else self._entries
        with self._lock:
            held = cache.get(key)
        answer = None if held is None else held.answer
        if answer is not None and answer[0]() is view and answer[1] is gone:
            return answer[2], True
        with self._used(key, cache) as entry:
            known = entry.seq == view.watermark
            self._refresh(entry, filters, view, touched, keys)
            index = _row_filter(entry, view, gone, lambda: view.index.position_of(entry.slots))
            delta = _delta_filter(view, view.delta_positions_of(entry.slots), gone) if view.delta_n else None
            found = ViewFilter(index, delta)
            entry.answer = (weakref.ref(view), gone, found) if known else None
            return found, known

    def namespaces(self, view: View, keys: tuple[int, ...] | None, gone: IntArray | None) -> ViewFilter:
        """The rows of these namespaces, None for all; gone: as for :meth:`mask`."""
        delta = _delta_filter(view, view.delta_rows_of(keys), gone) if view.delta_n else None
        rows = None if keys is None else view.rows_of(keys)
        if rows is not None and len(rows) <= FEW_ROWS:
            return ViewFilter(_live(RowList(view.index.n, rows), view, _positions(view, gone)), delta)
        with self._used(keys, self._entries) as entry:
            return ViewFilter(_row_filter(entry, view, gone, lambda: rows), delta)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._in_namespaces.clear()
        self.columns.clear()

    def evaluated(self, filters: Filter, view: View, touched: Touched, keys: tuple[int, ...] | None) -> IntArray:
        """Slots that match at the watermark of the view or later, ascending; some may be of deleted units."""
        if keys is not None:
            slots = view.slots_of(keys)
            if len(slots) <= FEW_ROWS:
                return self._matching(filters, slots)
        found = self.columns.matching(filters, Log(view.watermark, view.live_slots, touched.since))
        return found if keys is None else found[contains(slots, found)]

    @contextmanager
    def _used(self, key: Hashable, cache: LruCache[Hashable, _Entry]) -> Iterator[_Entry]:
        with self._lock:
            entry = cache.get(key) or cache.put(key, _Entry())
        with entry.lock:
            if entry.busy:  # a signal handler or finalizer interrupts this call: use no half-done entry
                entry = _Entry()
            entry.busy = True
            try:
                yield entry
            finally:
                entry.busy = False

    def _refresh(
        self, entry: _Entry, filters: Filter, view: View, touched: Touched, keys: tuple[int, ...] | None
    ) -> None:
        if entry.seq >= view.watermark:
            return
        slots = touched.since(entry.seq) if entry.seq >= 0 else None
        if slots is None:
            entry.slots, entry.rows_for = self.evaluated(filters, view, touched, keys), _no_index
        elif len(slots):
            self._look_again(entry, filters, slots, view, keys)
        entry.seq = view.watermark

    def _look_again(
        self, entry: _Entry, filters: Filter, slots: IntArray, view: View, keys: tuple[int, ...] | None
    ) -> None:
        seen = slots if keys is None else slots[contains(view.slots_of(keys), slots)]
        matched = self._matching(filters, seen) if len(seen) else seen
        stay = entry.slots[~contains(slots, entry.slots)]
        entry.slots = np.union1d(stay, matched)
        index = entry.rows_for()
        if index is not None and index.n and slots[0] <= index.slots[-1]:
            entry.rows_for = _no_index


def _row_filter(
    entry: _Entry, view: View, gone: IntArray | None, find: Callable[[], IntArray | None]
) -> RowFilter | None:
    """The rows of the index, live ones only; None where it has none. find: their positions, -1 for a row that it has
    not; None for all rows."""
    if not view.index.n:
        return None
    if entry.rows_for() is not view.index or entry.rows is None:
        found = find()
        rows = None if found is None else found[found >= 0]
        entry.rows = RowFilter(np.ones(view.index.n, np.bool_)) if rows is None else row_filter_of(view.index.n, rows)
        entry.rows_for, entry.row_filter = weakref.ref(view.index), None
    if entry.row_filter is None or entry.dead != view.index_dead or entry.gone is not gone:
        entry.row_filter = _live(entry.rows, view, _positions(view, gone))
        entry.dead, entry.gone = view.index_dead, gone
    return entry.row_filter


def _positions(view: View, gone: IntArray | None) -> IntArray | None:
    """Where the index has the slots ``gone``."""
    if gone is None:
        return None
    found = view.index.position_of(gone)
    return found[found >= 0]


def _live(rows: RowFilter, view: View, expired: IntArray | None) -> RowFilter:
    """The rows that are alive, and not at the positions ``expired``."""
    if isinstance(rows, RowList):
        held = rows.positions
        live = held[view.index_died[held] > view.watermark] if view.index_dead else held
        return RowList(rows.n, live if expired is None else np.setdiff1d(live, expired, assume_unique=True))
    alive = view.alive
    if alive is None and expired is None:
        return rows
    mask = rows.rows.copy() if alive is None else rows.rows & alive.rows
    if expired is not None:
        mask[expired] = False
    return RowFilter(mask)


def _delta_filter(view: View, positions: IntArray, gone: IntArray | None) -> RowFilter:
    """Those of the live rows at ``positions`` of the delta buffer that have not expired."""
    if gone is not None:
        positions = np.setdiff1d(positions, view.delta_positions_of(gone), assume_unique=True)
    return row_filter_of(view.delta_n, positions)
