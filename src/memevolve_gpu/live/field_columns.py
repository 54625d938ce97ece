"""The fields that filters use, as columns in memory: a filter that was never seen is answered without reading units.

A column holds the values of one path for every row, in order of their slots. It is read from the records when a filter
first names the path, and read again for the rows that the log names. Conditions become masks over the rows, which
``and``, ``or`` and ``not`` combine. Fields with long texts have no column: the records answer for them.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..records.filters import (
    RANGES,
    Condition,
    Every,
    Filter,
    Instant,
    Node,
    Not,
    composed,
    conditions_of,
    doubled,
    element_test,
    kind_of,
)
from ..records.records import Records
from ..types import IntArray
from ..utils.lru import LruCache
from ..utils.timestamps import micros_of

__all__ = ["FieldColumns"]

BoolArray = npt.NDArray[np.bool_]
Path = tuple[str, ...]

MOST_COLUMNS = 24
BYTES_PER_ROW, LEAST_BYTES = 100, 1 << 20
"""Columns are dropped, the least recently used first, while all together need more bytes than this."""

_FRESH_SHARE, _FRESH_ROWS = 0.05, 2_000
"""Rows that changed since a column was read are kept beside it until they are more than this."""

_NO_MOMENT = np.iinfo(np.int64).min
_EXACT = 2.0**53


class _Texts(Sequence[str]):
    """Distinct texts, given in ascending order, in one block of memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        raw = [text.encode() for text in texts]
        self._data = b"".join(raw)
        self._ends = np.cumsum([0, *map(len, raw)])
        self.composed = self._data.isascii() or all(composed(text) == text for text in self)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, at: Any) -> Any:
        return self._data[self._ends[at] : self._ends[at + 1]].decode()

    @property
    def nbytes(self) -> int:
        return len(self._data) + self._ends.nbytes


class _Values:
    """The values of n rows, by kind; an element of a list counts as a value of its row."""

    def __init__(self, values: Sequence[Any]) -> None:
        """``values`` are those of JSON, NaN where a row has none."""
        self.n = len(values)
        self.missing = np.zeros(self.n, dtype=np.bool_)
        self.null = np.zeros(self.n, dtype=np.bool_)
        self.sizes: tuple[IntArray, IntArray] = (_ints([]), _ints([]))
        at: dict[str, list[int]] = {kind: [] for kind in ("number", "text", "null", "true", "false")}
        held: dict[str, list[Any]] = {kind: [] for kind in at}
        self._split(values, at, held)
        self.at = {kind: np.asarray(found, dtype=np.int32) for kind, found in at.items()}
        self.numbers = np.array([float(doubled(one)) for one in held["number"]])
        big = np.abs(self.numbers) >= _EXACT
        self.big = [(at["number"][i], held["number"][i]) for i in np.flatnonzero(big).tolist()]
        self.at["number"], self.numbers = self.at["number"][~big], self.numbers[~big]
        distinct = sorted(set(held["text"]))
        self.texts = _Texts(distinct)
        codes = dict(zip(distinct, range(len(distinct)), strict=True))
        self.codes = np.fromiter((codes[text] for text in held["text"]), dtype=np.int32, count=len(held["text"]))
        self._micros: IntArray | None = None

    def _split(self, values: Sequence[Any], at: dict[str, list[int]], held: dict[str, list[Any]]) -> None:
        kinds = {float: "number", int: "number", str: "text"}
        sized: list[tuple[int, int]] = []
        for row, value in enumerate(values):
            kind = kinds.get(type(value))
            if kind is None:
                if isinstance(value, list):
                    sized.append((row, len(value)))
                elif value is None:
                    self.null[row] = True
                for element in value if isinstance(value, list) else (value,):
                    name = kind_of(element)
                    if name in at:
                        at[name].append(row)
                        held[name].append(element)
            elif value != value:  # noqa: PLR0124 - NaN
                self.missing[row] = True
            else:
                at[kind].append(row)
                held[kind].append(value)
        self.sizes = _ints([row for row, _ in sized]), _ints([size for _, size in sized])

    @property
    def nbytes(self) -> int:
        arrays = [self.missing, self.null, *self.sizes, *self.at.values(), self.numbers, self.codes]
        more = 0 if self._micros is None else self._micros.nbytes
        return sum(one.nbytes for one in arrays) + self.texts.nbytes + more + 64 * len(self.big)

    def mask(self, one: Condition) -> BoolArray:
        """The rows that meet the condition."""
        if one.op == "exists":
            return ~self.missing if one.values[0] else self.missing
        if one.op == "is_null":
            empty: BoolArray = self.missing | self.null
            return empty if one.values[0] else ~empty
        found = np.zeros(self.n, dtype=np.bool_)
        if one.op == "size":
            rows, sizes = self.sizes
            found[rows[(sizes >= one.values[0]) & (sizes <= one.values[1])]] = True
        elif one.op == "in":
            self._mark_equal(one, found)
        elif one.op == "contains":
            self._mark_contains(one, found)
        elif one.op in RANGES and not isinstance(one.values[0], (str, Instant)):
            compare, bound = RANGES[one.op], one.values[0]
            found[self.at["number"][self._in_range(compare, bound)]] = True
            test = element_test(one, False)
            found[[row for row, value in self.big if test(value)]] = True
        else:
            found[self.at["text"][self._texts_that(one)[self.codes]]] = True
        return found

    def _in_range(self, compare: Callable[[Any, Any], Any], bound: float) -> BoolArray:
        if isinstance(bound, int) and abs(bound) > _EXACT:  # as a double it might be another number
            bound = np.inf if bound > 0 else -np.inf
        inside: BoolArray = compare(self.numbers, bound)
        return inside

    def _mark_equal(self, one: Condition, found: BoolArray) -> None:
        kinds: dict[str, list[Any]] = {}
        for value in one.values:
            kinds.setdefault(kind_of(value), []).append(value)
        for kind in kinds.keys() & {"null", "true", "false"}:
            found[self.at[kind]] = True
        small = [value for value in kinds.get("number", ()) if abs(value) < _EXACT]
        if small:
            equal = self.numbers == small[0] if len(small) == 1 else np.isin(self.numbers, np.array(small, dtype=float))
            found[self.at["number"][equal]] = True
        if len(small) < len(kinds.get("number", ())):
            test = element_test(one, False)
            found[[row for row, value in self.big if test(value)]] = True
        if "text" in kinds or "instant" in kinds:
            found[self.at["text"][self._texts_that(one)[self.codes]]] = True

    def _mark_contains(self, one: Condition, found: BoolArray) -> None:
        self._mark_equal(Condition(one.path, "in", one.values, one.nfc), found)
        lists = np.zeros(self.n, dtype=np.bool_)
        lists[self.sizes[0]] = True
        found &= lists
        if isinstance(one.values[0], str):
            held = self.at["text"][self._texts_that(one)[self.codes]]
            found[held[~lists[held]]] = True

    def _texts_that(self, one: Condition) -> BoolArray:
        """The texts that meet a condition, as single values."""
        first = one.values[0]
        found = np.zeros(len(self.texts), dtype=np.bool_)
        if one.op in RANGES and isinstance(first, Instant):
            micros = self._moments()
            found = RANGES[one.op](micros, first.micros) & (micros != _NO_MOMENT)
        elif one.op in RANGES and (self.texts.composed or not one.nfc):
            low, high = bisect_left(self.texts, first), bisect_right(self.texts, first)
            starts, ends = {"gt": (high, None), "gte": (low, None), "lt": (0, low), "lte": (0, high)}[one.op]
            found[starts:ends] = True
        elif one.op == "in" and (self.texts.composed or not one.nfc):
            for value in one.values:
                if isinstance(value, Instant):
                    found |= self._moments() == value.micros
                elif isinstance(value, str):
                    at = bisect_left(self.texts, value)
                    if at < len(found) and self.texts[at] == value:
                        found[at] = True
        else:
            test = element_test(one, False)
            found = np.fromiter(map(test, self.texts), dtype=np.bool_, count=len(self.texts))
        return found

    def _moments(self) -> IntArray:
        """The texts as microseconds, computed when a filter first asks for moments."""
        if self._micros is None:
            moments = (micros_of(text) for text in self.texts)
            self._micros = np.array([_NO_MOMENT if one is None else one for one in moments], dtype=np.int64)
        return self._micros


@dataclass
class _Column:
    """``read`` are the values of the first rows; ``fresh`` those of the rows that are newer or were changed since."""

    read: _Values
    fresh: dict[int, Any]
    fresh_values: _Values | None = None

    @property
    def nbytes(self) -> int:
        return self.read.nbytes + 200 * len(self.fresh)

    def mask(self, one: Condition, n: int) -> BoolArray:
        found = np.zeros(n, dtype=np.bool_)
        found[: self.read.n] = self.read.mask(one)
        if self.fresh:
            if self.fresh_values is None:
                self.fresh_values = _Values(list(self.fresh.values()))
            found[np.fromiter(self.fresh, dtype=np.int64, count=len(self.fresh))] = self.fresh_values.mask(one)
        return found


class FieldColumns:
    """The columns of one store; every method may be called by any thread."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._lock = threading.RLock()
        self._busy = False
        self._seq = -1
        self._slots = _ints([])
        self._columns: LruCache[Path, _Column | None] = LruCache(MOST_COLUMNS)

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        return self._slots.nbytes + sum(one.nbytes for one in self._columns.values() if one is not None)

    def holds(self, paths: Iterable[Path]) -> bool:
        """Are these fields in memory, or known to be too long?"""
        return all(path in self._columns for path in paths)

    def clear(self) -> None:
        """Forget every column."""
        with self._lock:
            self._seq = -1
            self._columns.clear()

    def matching(
        self, filters: Filter, watermark: int, live_slots: Callable[[], IntArray], changed: Callable[[int], Any]
    ) -> IntArray:
        """Slots that match, int64 ascending, as of log entry ``watermark`` or later; some may be of deleted units.

        live_slots: gives the slots that are alive at the watermark. changed: gives those that were added or changed
        after a log entry, None where that is not known.
        """
        with self._lock:
            if self._busy:  # a signal handler interrupts this thread
                return self._records.matching(filters)
            self._busy = True
            try:
                self._follow(watermark, live_slots, changed)
                mask = self._mask(filters.root, self._ready(filters))
                self._shrink()
                found: IntArray = self._slots[mask]
                return found
            finally:
                self._busy = False

    def _follow(self, watermark: int, live_slots: Callable[[], IntArray], changed: Callable[[int], Any]) -> None:
        """Bring the rows and every column up to the watermark."""
        if self._seq >= watermark:
            return
        slots = changed(self._seq) if self._seq >= 0 else None
        if slots is None or len(slots) > max(_FRESH_ROWS, len(self._slots) // 4):
            self._columns.clear()
            self._slots = live_slots()
        elif len(slots):
            last = self._slots[-1] if len(self._slots) else -1
            self._slots = np.concatenate([self._slots, slots[slots > last]])
            for path in self._columns:
                self._freshen(path, slots)
        self._seq = watermark

    def _freshen(self, path: Path, slots: IntArray) -> None:
        column = self._columns.get(path)
        if column is None:
            return
        if len(column.fresh) + len(slots) > max(_FRESH_ROWS, _FRESH_SHARE * column.read.n):
            self._columns.drop(path)
            return
        column.fresh.update(dict.fromkeys(self._rows(slots).tolist(), np.nan))
        found = self._records.field_values(path, slots)
        column.fresh.update(zip(self._rows(found[0]).tolist(), found[1], strict=True))
        column.fresh_values = None

    def _rows(self, slots: IntArray) -> IntArray:
        """The rows of the slots that have one."""
        at = np.searchsorted(self._slots, slots)
        at[at == len(self._slots)] = 0
        rows: IntArray = at[self._slots[at] == slots] if len(self._slots) else _ints([])
        return rows

    def _ready(self, filters: Filter) -> dict[Path, _Column | None]:
        """The columns that a filter needs; None for a path that has none."""
        paths = dict.fromkeys(one.path for one in conditions_of(filters.root) if one.path != ("id",))
        return {path: self._column(path) for path in paths}

    def _column(self, path: Path) -> _Column | None:
        if path in self._columns:
            return self._columns.get(path)
        column = None
        if self._records.field_is_short(path):
            slots, values = self._records.field_values(path, None)
            if len(slots) == len(self._slots) and np.array_equal(slots, self._slots):
                column = _Column(_Values(values), {})
            else:
                held = dict(zip(slots.tolist(), values, strict=True))
                column = _Column(_Values([held.get(slot, np.nan) for slot in self._slots.tolist()]), {})
            column = column if column.nbytes <= self._most_bytes else None
        return self._columns.put(path, column)

    def _mask(self, node: Node, columns: dict[Path, _Column | None]) -> BoolArray:
        if isinstance(node, Not):
            return ~self._mask(node.part, columns)
        if not isinstance(node, Condition):
            every = isinstance(node, Every)
            found = np.full(len(self._slots), every)
            for part in node.parts:
                found = found & self._mask(part, columns) if every else found | self._mask(part, columns)
            return found
        column = columns.get(node.path)
        if column is not None:
            return column.mask(node, len(self._slots))
        mask = np.zeros(len(self._slots), dtype=np.bool_)
        mask[self._rows(self._records.matching(Filter(Every((node,)), node.spec)))] = True
        return mask

    def _shrink(self) -> None:
        while len(self._columns) > 1 and self.nbytes > self._most_bytes:
            self._columns.drop(next(iter(self._columns)))

    @property
    def _most_bytes(self) -> int:
        return max(LEAST_BYTES, BYTES_PER_ROW * len(self._slots))


def _ints(values: list[int]) -> IntArray:
    return np.asarray(values, dtype=np.int64)
