"""The fields that filters use, as columns in memory: a filter that was never seen is answered without reading units.

A column holds the values of one path for every row, in order of their slots. It is read from the records when a filter
first names the path, and read again for the rows that the log names. Conditions become masks over the rows, which
``and``, ``or`` and ``not`` combine. Fields with long texts have no column: the records answer for them.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStoreError
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
from ..records.schema import FIELDS_KEY
from ..types import AnyArray, IntArray, Json
from ..utils.forking import lazy, lock
from ..utils.lru import LruCache
from ..utils.timestamps import micros_of

BoolArray = npt.NDArray[np.bool_]
Path = tuple[str, ...]

MOST_COLUMNS = 24
MOST_FORESEEN, SAMPLED, DEPTH = 12, 64, 3
"""Fields that are read before a filter names them; units that say which there are, and how deep their fields lie."""

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


class FieldValues:
    """The values of n rows, by kind; an element of a list counts as a value of its row."""

    def __init__(self, values: Sequence[Json]) -> None:
        """``values`` are those of JSON, NaN where a row has none."""
        self.n = len(values)
        self.missing = np.zeros(self.n, dtype=np.bool_)
        self.null = np.zeros(self.n, dtype=np.bool_)
        self.sizes: tuple[IntArray, IntArray] = (_ints([]), _ints([]))
        at: dict[str, list[int]] = {kind: [] for kind in ("number", "text", "null", "true", "false")}
        held: dict[str, list[Json]] = {kind: [] for kind in at}
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

    def _split(self, values: Sequence[Json], at: dict[str, list[int]], held: dict[str, list[Json]]) -> None:
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
    def has_moments(self) -> bool:
        """Whether a filter asked for moments."""
        return self._micros is not None

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

    def order_keys(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """What sorts the rows: the kind of the value (0 null or missing, 1 false, 2 true, 3 number, 4 text, 5 list or
        object), int64 (n,), and the number, or the place of the text among the texts, float64 (n,).
        """
        kinds = np.where(self.missing | self.null, 0, 5)
        values = np.zeros(self.n)
        for kind, name in enumerate(("false", "true", "number", "text"), start=1):
            kinds[self.at[name]] = kind
        values[self.at["number"]] = self.numbers
        values[self.at["text"]] = self.codes
        for row, number in self.big:
            kinds[row], values[row] = 3, doubled(number)
        kinds[self.sizes[0]], values[self.sizes[0]] = 5, 0.0
        return kinds, values

    def by_row(self, *, moments: bool) -> npt.NDArray[np.float64]:
        """The number, or the Unix time of the text, of each row, float64 (n,); NaN where the value is no such one."""
        found = np.full(self.n, np.nan)
        if moments:
            micros = self._moments()
            known = micros[self.codes] != _NO_MOMENT
            found[self.at["text"][known]] = micros[self.codes[known]] / 1e6
        else:
            found[self.at["number"]] = self.numbers
            for row, number in self.big:
                found[row] = doubled(number)
        found[self.sizes[0]] = np.nan
        return found

    def counts(self, rows: BoolArray) -> dict[tuple[Json, ...], int]:
        """How many of the rows have each value: (kind as in :meth:`order_keys`, value) to the number."""
        found: dict[tuple[Json, ...], int] = {}
        for kind, name in enumerate(("null", "false", "true")):
            found[kind, 0] = len(np.unique(self.at[name][rows[self.at[name]]]))
        numbers = np.concatenate([self.numbers, [float(doubled(value)) for _, value in self.big]])
        numbered = np.concatenate([self.at["number"], np.array([row for row, _ in self.big], dtype=np.int32)])
        for kind, at, values in ((3, numbered, numbers), (4, self.at["text"], self.codes)):
            inside = rows[at]
            pairs = np.unique(np.stack([at[inside].astype(float), values[inside].astype(float)]), axis=1)
            each, many = np.unique(pairs[1], return_counts=True)
            names = each.tolist() if kind == 3 else [self.texts[int(code)] for code in each]
            found.update({(kind, name): count for name, count in zip(names, many.tolist(), strict=True)})
        return {key: count for key, count in found.items() if count}

    def _in_range(self, compare: Callable[[Json, Json], Json], bound: float) -> BoolArray:
        if isinstance(bound, int) and abs(bound) > _EXACT:  # as a double it might be another number
            bound = np.inf if bound > 0 else -np.inf
        inside: BoolArray = compare(self.numbers, bound)
        return inside

    def _mark_equal(self, one: Condition, found: BoolArray) -> None:
        kinds: dict[str, list[Json]] = {}
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

    read: FieldValues
    fresh: dict[int, Json]
    fresh_values: FieldValues | None = None

    @property
    def nbytes(self) -> int:
        return self.read.nbytes + 200 * len(self.fresh)

    def mask(self, one: Condition, n: int) -> BoolArray:
        """The rows, of n, that meet the condition."""
        found = np.zeros(n, dtype=np.bool_)
        self._fill(found, lambda values: values.mask(one))
        return found

    def by_row(self, n: int, *, moments: bool) -> npt.NDArray[np.float64]:
        """As of ``FieldValues``."""
        found = np.full(n, np.nan)
        self._fill(found, lambda values: values.by_row(moments=moments))
        return found

    def _fill(self, found: AnyArray, of: Callable[[FieldValues], AnyArray]) -> None:
        found[: self.read.n] = of(self.read)
        if self.fresh:
            if self.fresh_values is None:
                self.fresh_values = FieldValues(list(self.fresh.values()))
            found[np.fromiter(self.fresh, dtype=np.int64, count=len(self.fresh))] = of(self.fresh_values)


class Log(NamedTuple):
    """The state that columns follow: a log entry; what gives the slots that are alive then; and what gives those that
    were added or changed after another entry, None where that is not known.
    """

    watermark: int
    live_slots: Callable[[], IntArray]
    changed: Callable[[int], IntArray | None]


class FieldColumns:
    """The columns of one store; every method may be called by any thread."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._lock = lock()
        self._busy = False
        self._seq = -1
        self._slots = _ints([])
        self._columns: LruCache[Path, _Column | None] = LruCache(MOST_COLUMNS)
        self.wants_foresight = False
        """A filter had to read a field, so filters may soon name others."""
        self._foresaw = False
        self._named: dict[Path, None] = {}

    @lazy
    def saved(self) -> dict[Path, bool]:
        """The fields that filters named in this process or before it, as they were last kept; True: they hold moments.

        Read at the first use: a forked child makes new columns for stores that are closed, too.
        """
        try:
            held = json.loads(self._records.get_meta_text(FIELDS_KEY) or "[]")
            return {tuple(str(part) for part in path): bool(moments) for path, moments in held}
        except (ValueError, TypeError, RecursionError, CorruptStoreError):  # damaged: they are only a hint
            return {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        return self._slots.nbytes + sum(one.nbytes for one in self._columns.values() if one is not None)

    def holds(self, paths: Iterable[Path]) -> bool:
        """Are these fields in memory, or known to be too long?"""
        return all(path in self._columns for path in paths)

    def clear(self) -> None:
        """Forget every column, and which fields filters named since they were last kept."""
        with self._lock:
            self._seq = -1
            self._columns.clear()
            self.forget_named()

    def matching(self, filters: Filter, log: Log) -> IntArray:
        """Slots that match, int64 ascending, as of the watermark or later; some may be of deleted units."""
        with self._turn(log) as mine:
            if mine:
                found: IntArray = self._slots[self._mask(filters.root, self._ready(filters))]
                self._shrink()
                return found
        return self._records.matching(filters)

    def by_slot(self, path: Path, slots: IntArray, log: Log, *, moments: bool) -> npt.NDArray[np.float64]:
        """The numbers, or the Unix times of the texts, of live slots, float64 (n,); NaN where there is no such one."""
        with self._turn(log) as mine:
            column = self._column(path) if mine else None
            if column is not None:
                return column.by_row(len(self._slots), moments=moments)[np.searchsorted(self._slots, slots)]
        return self._read(path, slots).by_row(moments=moments)

    def whole(self, path: Path, slots: IntArray, log: Log) -> tuple[IntArray, FieldValues]:
        """Slots, those given among them, and the values of the field in each."""
        with self._turn(log) as mine:
            if mine and path in self._columns and (column := self._columns.get(path)) is not None and column.fresh:
                self._columns.drop(path)
            column = self._column(path) if mine else None
            if column is not None:
                return self._slots, column.read
        return slots, self._read(path, slots)

    def _read(self, path: Path, slots: IntArray) -> FieldValues:
        found = self._records.field_values(path, slots)
        held = dict(zip(found[0].tolist(), found[1], strict=True))
        return FieldValues([held.get(slot, np.nan) for slot in slots.tolist()])

    @contextmanager
    def _turn(self, log: Log) -> Iterator[bool]:
        """Hold the lock, with every column at the watermark; False in a handler that interrupts this very thread."""
        with self._lock:
            if self._busy:
                yield False
                return
            self._busy = True
            try:
                self._follow(log)
                yield True
            finally:
                self._busy = False

    def _follow(self, log: Log) -> None:
        """Bring the rows and every column up to the watermark."""
        watermark, live_slots, changed = log
        if self._seq >= watermark:
            return
        slots = changed(self._seq) if self._seq >= 0 else None
        if slots is None or len(slots) > max(_FRESH_ROWS, len(self._slots) // 4):
            self._columns.clear()
            self._slots, self._foresaw = live_slots(), False
        elif len(slots):
            last = self._slots[-1] if len(self._slots) else -1
            self._slots = np.concatenate([self._slots, slots[slots > last]])
            for path in self._columns:
                self._freshen(path, slots)
        self._seq = watermark

    def _freshen(self, path: Path, slots: IntArray) -> None:
        column, slots = self._columns.get(path), self._slots[self._rows(slots)]
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
        self._named.pop(path, None)
        self._named[path] = None
        if path in self._columns:
            return self._columns.get(path)
        self.wants_foresight = not self._foresaw
        return self._columns.put(path, self._made(path, self._slots))

    def _made(self, path: Path, slots: IntArray) -> _Column | None:
        """The column of a field for these slots, as of now; None where its texts are long."""
        if not self._records.field_is_short(path):
            return None
        found, values = self._records.field_values(path, None)
        if not np.array_equal(found, slots):
            held = dict(zip(found.tolist(), values, strict=True))
            values = [held.get(slot, np.nan) for slot in slots.tolist()]
        column = _Column(FieldValues(values), {})
        return column if column.nbytes <= self._most_bytes else None

    def foresee(self, log: Callable[[], Log], recalled: Mapping[Path, bool]) -> None:
        """Read the recalled and the usual short fields of the units before a filter names them; filters go on
        meanwhile. recalled: True for fields that hold moments."""
        self.wants_foresight, self._foresaw = False, True
        with self._turn(log()) as mine:
            paths = list(dict.fromkeys([*recalled, *self._usual_fields()])) if mine else []
        for path in paths:
            with self._turn(log()) as mine:
                seq, slots = self._seq, self._slots
                if not mine or path in self._columns or len(self._columns) >= MOST_COLUMNS:
                    continue
            column = self._made(path, slots)
            if column is not None and recalled.get(path):
                column.read.by_row(moments=True)  # converts them now
            if column is not None and self.nbytes + column.nbytes > self._most_bytes:
                continue
            now = log()
            with self._turn(now) as mine:
                changed = now.changed(seq) if mine else None
                if changed is None or path in self._columns or not np.array_equal(self._slots[: len(slots)], slots):
                    continue
                self._columns.put(path, column)
                if len(changed):
                    self._freshen(path, changed)

    def save_named(self, timeout: float) -> None:
        """Keep with the records which fields filters named, at most ``MOST_COLUMNS``, the latest last."""
        with self._lock:
            held = dict(zip(self._columns, self._columns.values(), strict=True))
            named, saved = self._named, self.saved
            paths = [*(path for path in saved if path not in named), *named][-MOST_COLUMNS:]
        moments = {path for path, column in held.items() if column is not None and column.read.has_moments}
        latest = {path: path in moments or saved.get(path, False) for path in paths}
        if self._records.read_only or latest == saved:
            return
        with self._records.write(timeout) as tx:
            if named is not self._named or (saved and tx.get_meta(FIELDS_KEY) is None):  # erased meanwhile
                self.forget_named()
                return
            tx.set_meta(FIELDS_KEY, json.dumps(list(latest.items())).encode())
            self.saved = latest

    def forget_named(self) -> None:
        """Forget which fields filters named; what the records keep of that is read again."""
        self._named = {}
        self.__dict__.pop("saved", None)

    def _usual_fields(self) -> list[Path]:
        """The paths of the values and lists of the newest units, most frequent first; without the id and the texts."""
        newest = self._records.units_at(self._slots[-SAMPLED:]).values()
        counts = Counter(path for unit in newest for path in _paths_in(unit))
        for path in (("id",), ("content",), ("reasoning",), ("query",)):
            counts.pop(path, None)
        return [path for path, _ in counts.most_common(MOST_FORESEEN)]

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


def _paths_in(value: Mapping[str, object], above: Path = ()) -> Iterator[Path]:
    for key, held in value.items():
        path = (*above, key)
        if not isinstance(held, dict):
            yield path
        elif len(path) < DEPTH:
            yield from _paths_in(held, path)


def _ints(values: list[int]) -> IntArray:
    return np.asarray(values, dtype=np.int64)
