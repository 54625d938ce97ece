"""Cached filter masks, updated by changed slots instead of evaluated again.

A filter's slots are found once by the records; later searches only look again at the slots that came or changed
since. The cache is bounded and holds nothing that the records do not say.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..index.base import Body
from ..index.bitmap import Allowed
from ..types import IntArray
from .view import Mask, View, contains

__all__ = ["FilterMasks", "Touched"]

KEPT_FILTERS = 32
KEPT_TOUCHES = 16_384

Matching = Callable[[Any, "IntArray | None"], IntArray]


class Touched:
    """The slots that came or changed lately, with the log entry that did it; bounded."""

    def __init__(self, since: int) -> None:
        self.restart(since)

    def restart(self, since: int) -> None:
        """Forget everything; what was touched up to ``since`` is no longer known."""
        self._known_from = since  # first: whoever reads meanwhile must rather know too little
        self._entries: deque[tuple[int, int]] = deque()

    def extend(self, entries: Iterable[tuple[int, int]]) -> None:
        self._entries.extend(entries)
        while len(self._entries) > KEPT_TOUCHES:
            self._known_from = self._entries[0][0]
            self._entries.popleft()

    def since(self, seq: int) -> IntArray | None:
        """Ascending distinct slots touched after ``seq``; None when that is no longer known."""
        entries = list(self._entries)  # in one step: other threads, and signal handlers, append meanwhile
        if seq < self._known_from:
            return None
        found: list[int] = []
        for at, slot in reversed(entries):
            if at <= seq:
                break
            found.append(slot)
        return np.unique(np.asarray(found, dtype=np.int64))


def _no_body() -> None:
    """No body has been masked."""


@dataclass
class _Entry:
    """One filter: ``slots`` matched as of log entry ``seq``; the mask made of them for one body and its deaths."""

    seq: int = -1
    slots: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    rows_for: Callable[[], Body | None] = _no_body
    """The body, which is not kept alive for it: it may hold a device's memory."""
    rows: np.ndarray[Any, np.dtype[np.bool_]] | None = None
    allowed_dead: int = -1
    allowed: Allowed | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    busy: bool = False


class FilterMasks:
    """Masks by filter, least recently used first out."""

    def __init__(self, matching: Matching) -> None:
        self._matching = matching
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            entries = list(self._entries.values())
        return sum(entry.slots.nbytes + (0 if entry.rows is None else 2 * entry.rows.nbytes) for entry in entries)

    def mask(self, key: str, filters: Any, view: View, touched: Touched) -> Mask:
        """The mask of ``filters`` for ``view``; ``key`` is the filter's canonical form."""
        entry = self._entry(key)
        with entry.lock:
            if entry.busy:  # a signal handler or finalizer inside this very call: it does without what is half done
                entry = _Entry()
            entry.busy = True
            try:
                self._refresh(entry, filters, view, touched)
                return Mask(self._allowed(entry, view), entry.slots)
            finally:
                entry.busy = False

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def _entry(self, key: str) -> _Entry:
        with self._lock:
            entry = self._entries.pop(key, None) or _Entry()
            self._entries[key] = entry
            while len(self._entries) > KEPT_FILTERS:
                self._entries.popitem(last=False)
            return entry

    def _refresh(self, entry: _Entry, filters: Any, view: View, touched: Touched) -> None:
        if entry.seq >= view.watermark:
            return
        slots = touched.since(entry.seq) if entry.seq >= 0 else None
        if slots is None:
            entry.slots, entry.rows_for = self._matching(filters, None), _no_body
        elif len(slots):
            self._look_again(entry, filters, slots)
        entry.seq = view.watermark

    def _look_again(self, entry: _Entry, filters: Any, slots: IntArray) -> None:
        matched = self._matching(filters, slots)
        stay = entry.slots[~contains(slots, entry.slots)]
        entry.slots = np.union1d(stay, matched)
        body = entry.rows_for()
        if body is not None and body.n and slots[0] <= body.slots[-1]:
            entry.rows_for = _no_body

    def _allowed(self, entry: _Entry, view: View) -> Allowed | None:
        if not view.body.n:
            return None
        if entry.rows_for() is not view.body or entry.rows is None:
            rows = np.zeros(view.body.n, dtype=np.bool_)
            positions = view.body.position_of(entry.slots)
            rows[positions[positions >= 0]] = True
            entry.rows_for, entry.rows, entry.allowed_dead = weakref.ref(view.body), rows, -1
        if entry.allowed_dead != view.body_dead or entry.allowed is None:
            alive = view.alive
            entry.allowed = Allowed(entry.rows if alive is None else entry.rows & alive.rows)
            entry.allowed_dead = view.body_dead
        return entry.allowed
