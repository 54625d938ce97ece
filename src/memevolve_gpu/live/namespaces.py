"""What a search may see: the rows of some namespaces, without those that have expired.

The namespace of a slot never changes, so the rows of an index are grouped once, when the index is made: four bytes a
row, and nothing in a store that uses the default namespace alone. Expiry times are kept for the rows that have one. The
log brings both up to date, so writes of other processes arrive here like those of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..types import IntArray

DEFAULT = 0
"""Key of the default namespace."""

Times = npt.NDArray[np.float64]
"""Unix times, float64 (m,)."""

_MERGE_AT = 1024
_MERGE_SHARE = 4


@dataclass(frozen=True, slots=True)
class Scope:
    """What a search may see.

    keys: of the namespaces, ascending; None for all. now: the Unix time at which expiry is judged; None ignores it.
    """

    keys: tuple[int, ...] | None = (DEFAULT,)
    now: float | None = None


EVERYTHING = Scope(None)


class RowGroups:
    """The n rows of an index by namespace: for each key its rows, ascending. Never changes."""

    __slots__ = ("_ends", "_keys", "_order", "n")

    def __init__(self, namespaces: npt.NDArray[np.int32]) -> None:
        """``namespaces`` int32 (n,): the key of each row."""
        order = np.argsort(namespaces, kind="stable")
        self._order = order.astype(np.int32)
        self._keys, counts = np.unique(namespaces, return_counts=True)
        self._ends = np.cumsum(counts)
        self.n = len(namespaces)

    @property
    def nbytes(self) -> int:
        return int(self._order.nbytes + self._keys.nbytes + self._ends.nbytes)

    def rows(self, keys: Sequence[int]) -> IntArray:
        """Rows of these namespaces, int64 (m,), ascending."""
        if len(keys) == 1:
            return self._of(keys[0]).astype(np.int64)
        found = np.concatenate([np.empty(0, np.int32), *[self._of(key) for key in keys]])
        return np.sort(found).astype(np.int64)

    def count(self, keys: Sequence[int]) -> int:
        """Number of rows of these namespaces."""
        return sum(len(self._of(key)) for key in keys)

    def covered_by(self, keys: Sequence[int]) -> bool:
        """Whether every row is of one of these namespaces."""
        return len(self._keys) <= len(keys) and set(self._keys.tolist()) <= set(keys)

    def by_row(self) -> npt.NDArray[np.int32]:
        """The key of each row, int32 (n,)."""
        found = np.empty(self.n, np.int32)
        found[self._order] = np.repeat(self._keys, np.diff(self._ends, prepend=0))
        return found

    def _of(self, key: int) -> npt.NDArray[np.int32]:
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return self._order[:0]
        return self._order[int(self._ends[at - 1]) if at else 0 : int(self._ends[at])]


def grouped(slots: IntArray, named: tuple[IntArray, npt.NDArray[np.int32]]) -> RowGroups | None:
    """The rows with these slots, int64 (n,) ascending, by namespace; None where all are of the default one.

    named: slots, int64 (m,) ascending, that are of other namespaces, and the keys of those, int32 (m,).
    """
    known, keys = named
    if not len(known) or not len(slots):
        return None
    at = np.minimum(np.searchsorted(slots, known), len(slots) - 1)
    here = slots[at] == known
    if not here.any():
        return None
    namespaces = np.zeros(len(slots), np.int32)
    namespaces[at[here]] = keys[here]
    return RowGroups(namespaces)


def joined(groups: RowGroups | None, n: int, more: npt.NDArray[np.int32], kept: IntArray | slice) -> RowGroups | None:
    """The rows ``kept`` of an index of n rows, followed by rows of the namespaces ``more``, int32 (m,)."""
    if groups is None and not more.any():
        return None
    held = np.zeros(n, np.int32) if groups is None else groups.by_row()
    return RowGroups(np.concatenate([held[kept], more]))


@dataclass(frozen=True, slots=True)
class _Times:
    """Rows that expire. times float64 (m,) ascending and slots int64 (m,) belong together; ``changed`` overrides them:
    the new time of a slot, None for one that is gone or does not expire any more. first: the earliest time in it."""

    times: Times
    slots: IntArray
    changed: dict[int, float | None]
    first: float


class Expiring:
    """When rows expire. Any thread reads; one at a time writes."""

    def __init__(self, load: Callable[[], tuple[IntArray, Times]]) -> None:
        """``load`` reads the slots and Unix times of all rows that expire."""
        self._load = load
        self._known: tuple[object, int, IntArray] = (None, 0, np.empty(0, np.int64))
        self._state = _sorted(np.empty(0, np.int64), np.empty(0))

    @property
    def nbytes(self) -> int:
        return self._state.times.nbytes + self._state.slots.nbytes + 100 * len(self._state.changed)

    def restart(self) -> None:
        """Read everything again."""
        slots, times = self._load()
        self._state = _sorted(slots, times)

    def extend(self, entries: Iterable[tuple[int, float | None]]) -> None:
        """Note the times of slots; None for one that is gone or does not expire."""
        state = self._state
        idle = not len(state.times) and not state.changed
        new = {slot: time for slot, time in entries if not (idle and time is None)}
        if not new:
            return
        changed = {**state.changed, **new}
        if len(changed) > max(_MERGE_AT, len(state.times) // _MERGE_SHARE):
            keep = ~np.isin(state.slots, np.fromiter(changed, np.int64, len(changed)))
            late = [(slot, time) for slot, time in changed.items() if time is not None]
            slots = np.concatenate([state.slots[keep], np.array([slot for slot, _ in late], np.int64)])
            self._state = _sorted(slots, np.concatenate([state.times[keep], np.array([time for _, time in late])]))
            return
        first = min((time for time in changed.values() if time is not None), default=np.inf)
        self._state = _Times(state.times, state.slots, changed, float(first))

    def gone(self, now: float) -> IntArray | None:
        """Slots that expired by ``now`` and were not deleted, int64 (m,) ascending; None for none.

        The same array as before where nothing changed.
        """
        state = self._state
        if not (len(state.times) and state.times[0] <= now) and state.first > now:
            return None
        upto = int(np.searchsorted(state.times, now, side="right"))
        late = [slot for slot, time in state.changed.items() if time is not None and time <= now]
        known_state, known_number, known = self._known
        if known_state is state and known_number == upto + len(late):
            return known if len(known) else None
        early = state.slots[:upto]
        if state.changed:
            early = early[~np.isin(early, np.fromiter(state.changed, np.int64, len(state.changed)))]
        found = np.sort(np.concatenate([early, np.array(late, np.int64)]))
        self._known = state, upto + len(late), found
        return found if len(found) else None


def _sorted(slots: IntArray, times: Times) -> _Times:
    order = np.argsort(times, kind="stable")
    return _Times(times[order], slots[order], {}, float(np.inf))
