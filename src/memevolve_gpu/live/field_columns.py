"""The fields that filters use, as columns in memory: a filter that was never seen is answered without reading units.

A column holds the values of one path for every row, in order of their slots. It is read from the records when a filter
first names the path, and read again for the rows that the log names. Conditions become masks over the rows, which
``and``, ``or`` and ``not`` combine. Fields with long texts have no column: the records answer for them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..records.filters import Condition, Every, Filter, Node, Not, conditions_of
from ..records.records import Records
from ..types import AnyArray, IntArray, Json
from ..utils.drafts import draft_of
from ..utils.forking import lock
from ..utils.lru import LruCache
from .column_file import ColumnFile, FieldPath, KeptFields, SavedColumn, write_columns
from .field_values import BoolArray, FieldValues, values_of

MOST_COLUMNS = 24

SAVED_FROM = 4_096
"""Units from which columns are saved: the fields of fewer are read in a few milliseconds."""

BYTES_PER_ROW, LEAST_BYTES = 100, 1 << 20
"""Columns are dropped, the least recently used first, while all together need more bytes than this."""

_FRESH_SHARE, _FRESH_ROWS = 0.05, 2_000
"""Rows that changed since a column was read are kept beside it until they are more than this."""


@dataclass
class Column:
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
                self.fresh_values = values_of(list(self.fresh.values()))
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
        self._columns: LruCache[FieldPath, Column | None] = LruCache(MOST_COLUMNS)
        self.wants_foresight = False
        """A filter had to read a field, so filters may soon name others."""
        self._unsaved = False
        """Columns in memory are about to be moved into the file."""
        self.epoch = 0
        """Grows when all columns are forgotten."""
        self.kept = KeptFields(records)
        self.clear()

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that cannot be dropped."""
        own = 0 if self._file is not None and self._slots is self._file.slots else self._slots.nbytes
        return own + sum(one.nbytes for one in self._columns.values() if one is not None)

    def holds(self, paths: Iterable[FieldPath]) -> bool:
        """Are these fields in memory or in the file, or known to be too long?"""
        return all(path in self._columns or (self._file is not None and path in self._file.paths) for path in paths)

    def clear(self) -> None:
        """Forget every column, and which fields filters named since they were last kept."""
        with self._lock:
            self._seq, self._slots = -1, _ints([])
            self._forget_columns()
            self.kept.forget()

    def _forget_columns(self) -> None:
        self._columns.clear()
        self._file: ColumnFile | None = None
        self._beside = _ints([])
        """Slots that were added or changed since the file was written, ascending."""
        self.wants_foresight = False
        self.epoch += 1

    def matching(self, filters: Filter, log: Log) -> IntArray:
        """Slots that match, int64 ascending, as of the watermark or later; some may be of deleted units."""
        with self._turn(log) as mine:
            if mine:
                rows = np.flatnonzero(self._mask(filters.root, self._ready(filters)))
                self._shrink()
                found: IntArray = self._slots[rows]  # a third of the time that a mask takes
                return found
        return self._records.matching(filters)

    def by_slot(self, path: FieldPath, slots: IntArray, log: Log, *, moments: bool) -> npt.NDArray[np.float64]:
        """The numbers, or the Unix times of the texts, of live slots, float64 (n,); NaN where there is no such one."""
        with self._turn(log) as mine:
            column = self._column(path) if mine else None
            if column is not None:
                return column.by_row(len(self._slots), moments=moments)[np.searchsorted(self._slots, slots)]
        return self._read(path, slots).by_row(moments=moments)

    def whole(self, path: FieldPath, slots: IntArray, log: Log) -> tuple[IntArray, FieldValues]:
        """Slots, those given among them, and the values of the field in each."""
        with self._turn(log) as mine:
            column = self._column(path) if mine else None
            if column is not None and column.fresh:
                column = self._columns.put(path, self._made(path, self._slots))
            if column is not None:
                return self._slots, column.read
        return slots, self._read(path, slots)

    def _read(self, path: FieldPath, slots: IntArray) -> FieldValues:
        found, (values,) = self._records.field_values([path], slots)
        return values_of(in_order_of(slots, found, values))

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
        if self._seq < 0:
            self._open_file(watermark)
        slots = changed(self._seq) if self._seq >= 0 else None
        if slots is None and self._file is not None:
            slots = self._records.changed_slots(self._seq)
        if slots is None or len(slots) > max(_FRESH_ROWS, len(self._slots) // 4):
            self._forget_columns()
            self._slots = live_slots()
        elif len(slots):
            last = self._slots[-1] if len(self._slots) else -1
            self._slots = np.concatenate([self._slots, slots[slots > last]])
            self._freshen(list(self._columns), slots)
            self._beside = np.union1d(self._beside, slots)
        self._seq = watermark

    def _open_file(self, watermark: int) -> None:
        """Continue with the columns that were saved, if they are those of these records."""
        file = self.kept.open_file()
        if file is not None and file.seq <= watermark:
            self._file, self._seq, self._slots = file, file.seq, file.slots

    def _freshen(self, paths: Iterable[FieldPath], slots: IntArray) -> None:
        """Read the values of these slots again, for columns that exist; one with too many of such rows is dropped."""
        slots = self._slots[self._rows(slots)]
        columns: dict[FieldPath, Column] = {}
        for path in paths:
            column = self._columns.peek(path)
            if column is None:
                continue
            if len(column.fresh) + len(slots) > max(_FRESH_ROWS, _FRESH_SHARE * column.read.n):
                self._columns.drop(path)
            else:
                columns[path] = column
        if not columns:
            return
        rows = self._rows(slots).tolist()
        found, values = self._records.field_values(list(columns), slots)
        known = self._rows(found).tolist()
        for column, own in zip(columns.values(), values, strict=True):
            column.fresh.update(dict.fromkeys(rows, np.nan))
            column.fresh.update(zip(known, own, strict=True))
            column.fresh_values = None

    def _rows(self, slots: IntArray) -> IntArray:
        """The rows of the slots that have one."""
        at = np.searchsorted(self._slots, slots)
        at[at == len(self._slots)] = 0
        rows: IntArray = at[self._slots[at] == slots] if len(self._slots) else _ints([])
        return rows

    def _ready(self, filters: Filter) -> dict[FieldPath, Column | None]:
        """The columns that a filter needs; None for a path that has none."""
        paths = dict.fromkeys(one.path for one in conditions_of(filters.root) if one.path != ("id",))
        return {path: self._column(path) for path in paths}

    def _column(self, path: FieldPath) -> Column | None:
        self.kept.name(path)
        if path in self._columns:
            return self._columns.get(path)
        if self._load(path):
            return self._columns.get(path)
        self.wants_foresight = True
        return self._columns.put(path, self._made(path, self._slots))

    def _load(self, path: FieldPath) -> bool:
        """Whether the file had the column, which is in use now."""
        taken = None if self._file is None else self._file.take(path)
        if taken is None:
            return False
        self._columns.put(path, Column(*taken))
        if len(self._beside):
            self._freshen([path], self._beside)
        return path in self._columns

    def _made(self, path: FieldPath, slots: IntArray) -> Column | None:
        """The column of a field for these slots, as of now; None where its texts are long."""
        if not self._records.field_is_short(path):
            return None
        found, (values,) = self._records.field_values([path])
        column = Column(values_of(in_order_of(slots, found, values)), {})
        return column if column.nbytes <= self._most_bytes else None

    def state(self, log: Log) -> tuple[int, IntArray, int]:
        """The log entry that the columns are at, the slots of their rows, and the epoch."""
        with self._turn(log):
            return self._seq, self._slots, self.epoch

    def are_saved(self, count: int) -> bool:
        """Whether the columns of so many units are kept in a file."""
        return count >= SAVED_FROM

    def adopt(self, made: Mapping[FieldPath, Column], since: tuple[int, int], log: Log) -> None:
        """Use columns that were read elsewhere, as of the log entry and the epoch ``since``; they may be large where
        the next :meth:`save` moves them into the file."""
        with self._turn(log) as mine:
            changed = log.changed(since[0]) if mine else None
            if changed is None or self.epoch != since[1]:
                return
            saved = self.are_saved(len(self._slots)) and not self._records.read_only
            new = [path for path in made if path not in self._columns]
            for path in new:
                fits = saved or self.nbytes + made[path].nbytes <= self._most_bytes
                if fits and len(self._columns) < MOST_COLUMNS:
                    self._columns.put(path, made[path])
            if len(changed):
                self._freshen(new, changed)
            self._unsaved = saved

    def save(self, timeout: float) -> None:
        """Keep with the records which fields filters named, at most ``MOST_COLUMNS``, the latest last; and write the
        columns into their file where it lacks some, or many rows changed since.

        Raises StorageError, OSError.
        """
        try:
            self._save(timeout)
        finally:
            self._unsaved = False

    def _save(self, timeout: float) -> None:
        with self._lock:
            kept, epoch = self.kept, self.epoch
            named = kept.named
            latest = kept.latest(MOST_COLUMNS, {path for path, column in self._pairs() if column.read.has_moments})
            columns, seq, slots = self._to_save(), self._seq, self._slots
            saved = {path: SavedColumn(one.read, dict(one.fresh)) for path, one in columns.items()}
        if self._records.read_only or (latest == kept.saved and not columns):
            return
        if not columns:
            kept.keep(timeout, named, latest)
            return
        with draft_of(self._records.columns_path, self._records.file_mode) as draft:
            token = secrets.token_hex(8)
            with open(draft.handle, "w+b", closefd=False) as file:
                write_columns(file, token, seq, slots, saved)
            if kept.keep(timeout, named, latest, (token, seq, draft.path)):
                self._use_file(columns, epoch)

    def _to_save(self) -> dict[FieldPath, Column]:
        """The columns to write into the file; none where it is good enough. The lock is held."""
        if self._busy or not self.are_saved(len(self._slots)):
            return {}
        lacking = [path for path, one in self._pairs() if self._file is None or path not in self._file.paths]
        if not lacking and len(self._beside) <= max(_FRESH_ROWS, _FRESH_SHARE * len(self._slots)):
            return {}
        for path in [] if self._file is None else list(self._file.paths):
            if path not in self._columns and len(self._columns) < MOST_COLUMNS:
                self._load(path)
        self._file, self._beside = None, _ints([])
        return dict(self._pairs())

    def _pairs(self) -> list[tuple[FieldPath, Column]]:
        both = zip(self._columns, self._columns.values(), strict=True)
        return [(path, column) for path, column in both if column is not None]

    def _use_file(self, columns: dict[FieldPath, Column], epoch: int) -> None:
        """Continue with the columns of the file that was just written, in place of those in memory."""
        file = self.kept.open_file()
        if file is None:
            return
        taken = {path: file.take(path) for path in columns}
        with self._lock:
            if self.epoch != epoch:
                return
            self._file = file
            if len(self._slots) == len(file.slots):
                self._slots = file.slots
            for path, column in columns.items():
                mapped = taken[path]
                if mapped is not None and self._columns.peek(path) is column:
                    column.read = mapped.read

    def _mask(self, node: Node, columns: dict[FieldPath, Column | None]) -> BoolArray:
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
        while not self._unsaved and len(self._columns) > 1 and self.nbytes > self._most_bytes:
            self._columns.drop(next(iter(self._columns)))

    @property
    def _most_bytes(self) -> int:
        return max(LEAST_BYTES, BYTES_PER_ROW * len(self._slots))


def in_order_of(slots: IntArray, found: IntArray, values: list[Json]) -> list[Json]:
    """The values of ``found`` as those of ``slots``, NaN where one was not found."""
    if np.array_equal(found, slots):
        return values
    held = dict(zip(found.tolist(), values, strict=True))
    return [held.get(slot, np.nan) for slot in slots.tolist()]


def _ints(values: list[int]) -> IntArray:
    return np.asarray(values, dtype=np.int64)
