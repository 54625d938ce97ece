"""The fields that filters use, as columns in memory: a filter that was never seen is answered without reading units.

A column holds the values of one path for every row, in order of their slots. It is read from the records when a filter
first names the path, and read again for the rows that the log names. Conditions become masks over the rows, which
``and``, ``or`` and ``not`` combine. Fields with long texts have no column: the records answer for them.
"""

from __future__ import annotations

import json
import pathlib
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStoreError
from ..records.filters import Condition, Every, Filter, Node, Not, conditions_of
from ..records.records import Records
from ..records.schema import FIELDS_KEY
from ..types import AnyArray, IntArray, Json
from ..utils.drafts import draft_of
from ..utils.forking import lazy, lock
from ..utils.lru import LruCache
from .column_file import ColumnFile, SavedColumn, open_columns, write_columns
from .field_values import BoolArray, FieldReader, FieldValues, values_of

Path = tuple[str, ...]

MOST_COLUMNS = 24
MOST_FORESEEN, SAMPLED, DEPTH = 12, 64, 3
"""Fields that are read before a filter names them; units that say which there are, and how deep their fields lie."""

FORESEEN_FROM, FORESEEN_GROWTH = 4_096, 1.25
"""Units from which fields are read, and saved, although no filter has named any; growth after which they are read
again. The fields of fewer units are read in a few milliseconds."""

PAGE_SLOTS, PASS_VALUES = 2_048, 1_200_000
"""Slots of one page of that reading; values of one pass, which are in memory before they become a column."""

FORESEEN_TEXTS, FORESEEN_BYTES = 200_000, 48 << 20
"""A field with more different texts is read when a filter names it; columns in memory before they are in the file."""

BYTES_PER_ROW, LEAST_BYTES = 100, 1 << 20
"""Columns are dropped, the least recently used first, while all together need more bytes than this."""

_FRESH_SHARE, _FRESH_ROWS = 0.05, 2_000
"""Rows that changed since a column was read are kept beside it until they are more than this."""


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
        self._columns: LruCache[Path, _Column | None] = LruCache(MOST_COLUMNS)
        self.wants_foresight = False
        """A filter had to read a field, so filters may soon name others."""
        self._unsaved = False
        """Columns in memory are about to be moved into the file."""
        self._epoch = 0
        """Grows when all columns are forgotten."""
        self.clear()

    @lazy
    def _kept(self) -> tuple[dict[Path, bool], str]:
        """What the records keep: the fields that filters named, and the token of the file of columns.

        Read at the first use: a forked child makes new columns for stores that are closed, too.
        """
        try:
            return _read_kept(self._records.get_meta(FIELDS_KEY))
        except CorruptStoreError:  # it is only a hint
            return {}, ""

    @property
    def saved(self) -> dict[Path, bool]:
        """The fields that filters named here or in a process before, as last kept; True: they hold moments."""
        return self._kept[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that cannot be dropped."""
        own = 0 if self._file is not None and self._slots is self._file.slots else self._slots.nbytes
        return own + sum(one.nbytes for one in self._columns.values() if one is not None)

    def holds(self, paths: Iterable[Path]) -> bool:
        """Are these fields in memory or in the file, or known to be too long?"""
        return all(path in self._columns or (self._file is not None and path in self._file.paths) for path in paths)

    def needs_foresight(self, count: int, growth: float) -> bool:
        """Whether fields should be read before filters name them; count: the units of the store; growth: since they
        were read.
        """
        return self.wants_foresight or count >= max(FORESEEN_FROM, growth * self._foreseen)

    def clear(self) -> None:
        """Forget every column, and which fields filters named since they were last kept."""
        with self._lock:
            self._seq, self._slots, self._foreseen = -1, _ints([]), 0
            self._forget_columns()
            self.forget_named()

    def _forget_columns(self) -> None:
        self._columns.clear()
        self._file: ColumnFile | None = None
        self._beside = _ints([])
        """Slots that were added or changed since the file was written, ascending."""
        self._foresaw = False
        self._epoch += 1

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
            column = self._column(path) if mine else None
            if column is not None and column.fresh:
                column = self._columns.put(path, self._made(path, self._slots))
            if column is not None:
                return self._slots, column.read
        return slots, self._read(path, slots)

    def _read(self, path: Path, slots: IntArray) -> FieldValues:
        found, (values,) = self._records.field_values([path], slots)
        return values_of(_in_order_of(slots, found, values))

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
        token = self._kept[1]
        file = open_columns(self._records.columns_path, token) if token else None
        if file is not None and file.seq <= watermark:
            self._file, self._seq, self._slots = file, file.seq, file.slots

    def _freshen(self, paths: Iterable[Path], slots: IntArray) -> None:
        """Read the values of these slots again, for columns that exist; one with too many of such rows is dropped."""
        slots = self._slots[self._rows(slots)]
        columns: dict[Path, _Column] = {}
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

    def _ready(self, filters: Filter) -> dict[Path, _Column | None]:
        """The columns that a filter needs; None for a path that has none."""
        paths = dict.fromkeys(one.path for one in conditions_of(filters.root) if one.path != ("id",))
        return {path: self._column(path) for path in paths}

    def _column(self, path: Path) -> _Column | None:
        self._named.pop(path, None)
        self._named[path] = None
        if path in self._columns:
            return self._columns.get(path)
        if self._load(path):
            return self._columns.get(path)
        self.wants_foresight = not self._foresaw
        return self._columns.put(path, self._made(path, self._slots))

    def _load(self, path: Path) -> bool:
        """Whether the file had the column, which is in use now."""
        taken = None if self._file is None else self._file.take(path)
        if taken is None:
            return False
        self._columns.put(path, _Column(*taken))
        if len(self._beside):
            self._freshen([path], self._beside)
        return path in self._columns

    def _made(self, path: Path, slots: IntArray) -> _Column | None:
        """The column of a field for these slots, as of now; None where its texts are long."""
        if not self._records.field_is_short(path):
            return None
        found, (values,) = self._records.field_values([path])
        column = _Column(values_of(_in_order_of(slots, found, values)), {})
        return column if column.nbytes <= self._most_bytes else None

    def foresee(
        self,
        log: Callable[[], Log],
        recalled: Mapping[Path, bool],
        pause: Callable[[], None] = lambda: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read the recalled and the usual short fields of the units before a filter names them; filters go on
        meanwhile.

        Args:
            log: gives the state to follow.
            recalled: fields that were named before; True for those that hold moments.
            pause: called between pieces of a millisecond.
            stop: whether to give up.
        """
        with self._turn(log()) as mine:
            self.wants_foresight, self._foresaw, self._foreseen = False, True, len(self._slots)
            seq, slots, epoch = self._seq, self._slots, self._epoch
            wanted = list(dict.fromkeys([*recalled, *self._usual_fields()])) if mine else []
        paths = [path for path in wanted if not self.holds([path]) and self._records.field_is_short(path)]
        paths = paths[: MOST_COLUMNS - len(self._columns)]
        at_once, made = max(1, PASS_VALUES // max(1, len(slots))), dict[Path, _Column]()
        for start in range(0, len(paths), at_once):
            if sum(one.nbytes for one in made.values()) < FORESEEN_BYTES:
                made |= self._gathered(paths[start : start + at_once], slots, recalled, pause, stop)
        for path, column in made.items():
            if recalled.get(path):
                column.read.by_row(moments=True)  # converts them now
        now = log()
        with self._turn(now) as mine:
            changed = now.changed(seq) if mine and made else None
            if changed is None or self._epoch != epoch:
                return
            new = [path for path in made if path not in self._columns]
            will_be_saved = len(slots) >= FORESEEN_FROM and not self._records.read_only
            for path in new:
                fits = will_be_saved or self.nbytes + made[path].nbytes <= self._most_bytes
                if fits and len(self._columns) < MOST_COLUMNS:
                    self._columns.put(path, made[path])
            if len(changed):
                self._freshen(new, changed)
            self._unsaved = will_be_saved

    def _gathered(
        self,
        paths: list[Path],
        slots: IntArray,
        recalled: Mapping[Path, bool],
        pause: Callable[[], None],
        stop: Callable[[], bool],
    ) -> dict[Path, _Column]:
        """The columns of several fields for these slots, read in one pass; none where that was stopped.

        Without fields of very many texts, unless they are recalled.
        """
        readers = {path: FieldReader() for path in paths}
        for start in range(0, len(slots), PAGE_SLOTS):
            page = slots[start : start + PAGE_SLOTS]
            if stop() or not readers:
                return {}
            found, fields = self._records.field_values(list(readers), within=(int(page[0]), int(page[-1])))
            for path, values in zip(list(readers), fields, strict=True):
                readers[path].add(_in_order_of(page, found, values))
                if readers[path].distinct_texts > FORESEEN_TEXTS and path not in recalled:
                    del readers[path]
                pause()
        return {path: _Column(reader.finished(), {}) for path, reader in readers.items()}

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
            named, saved, epoch = self._named, self.saved, self._epoch
            paths = [*(path for path in saved if path not in named), *named][-MOST_COLUMNS:]
            held = dict(zip(self._columns, self._columns.values(), strict=True))
            moments = {path for path, column in held.items() if column is not None and column.read.has_moments}
            latest = {path: path in moments or saved.get(path, False) for path in paths}
            columns, seq, slots = self._to_save(), self._seq, self._slots
            kept = {path: SavedColumn(one.read, dict(one.fresh)) for path, one in columns.items()}
        if self._records.read_only or (latest == saved and not columns):
            return
        if not columns:
            self._keep(timeout, named, latest)
            return
        with draft_of(self._records.columns_path, self._records.file_mode) as draft:
            token = secrets.token_hex(8)
            with open(draft.handle, "w+b", closefd=False) as file:
                write_columns(file, token, seq, slots, kept)
            if self._keep(timeout, named, latest, (token, seq, draft.path)):
                self._use_file(token, columns, epoch)

    def _keep(
        self,
        timeout: float,
        named: dict[Path, None],
        latest: dict[Path, bool],
        file: tuple[str, int, pathlib.Path] | None = None,
    ) -> bool:
        """Keep the names and, if given, a file: its token, its log entry, its draft. False where units were erased or
        the log was purged since.
        """
        with self._records.write(timeout) as tx:
            raw = tx.get_meta(FIELDS_KEY)
            if named is not self._named or (self.saved and raw is None):  # erased meanwhile
                self.forget_named()
                return False
            if file is not None and tx.head.horizon > file[1]:
                return False
            token = _read_kept(raw)[1] if file is None else file[0]
            tx.set_meta(FIELDS_KEY, json.dumps({"fields": list(latest.items()), "columns": token}).encode())
            if file is not None:
                file[2].replace(self._records.columns_path)
        self._kept = latest, token
        return True

    def _to_save(self) -> dict[Path, _Column]:
        """The columns to write into the file; none where it is good enough. The lock is held."""
        if self._busy or len(self._slots) < FORESEEN_FROM:
            return {}
        lacking = [path for path, one in self._pairs() if self._file is None or path not in self._file.paths]
        if not lacking and len(self._beside) <= max(_FRESH_ROWS, _FRESH_SHARE * len(self._slots)):
            return {}
        for path in [] if self._file is None else list(self._file.paths):
            if path not in self._columns and len(self._columns) < MOST_COLUMNS:
                self._load(path)
        self._file, self._beside = None, _ints([])
        return dict(self._pairs())

    def _pairs(self) -> list[tuple[Path, _Column]]:
        both = zip(self._columns, self._columns.values(), strict=True)
        return [(path, column) for path, column in both if column is not None]

    def _use_file(self, token: str, columns: dict[Path, _Column], epoch: int) -> None:
        """Continue with the columns of the file that was just written, in place of those in memory."""
        file = open_columns(self._records.columns_path, token)
        if file is None:
            return
        taken = {path: file.take(path) for path in columns}
        with self._lock:
            if self._epoch != epoch:
                return
            self._file = file
            if len(self._slots) == len(file.slots):
                self._slots = file.slots
            for path, column in columns.items():
                mapped = taken[path]
                if mapped is not None and self._columns.peek(path) is column:
                    column.read = mapped.read

    def forget_named(self) -> None:
        """Forget which fields filters named; what the records keep of that is read again."""
        self._named: dict[Path, None] = {}
        self.__dict__.pop("_kept", None)

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
        while not self._unsaved and len(self._columns) > 1 and self.nbytes > self._most_bytes:
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


def _in_order_of(slots: IntArray, found: IntArray, values: list[Json]) -> list[Json]:
    """The values of ``found`` as those of ``slots``, NaN where one was not found."""
    if np.array_equal(found, slots):
        return values
    held = dict(zip(found.tolist(), values, strict=True))
    return [held.get(slot, np.nan) for slot in slots.tolist()]


def _read_kept(raw: bytes | None) -> tuple[dict[Path, bool], str]:
    """The names of fields and the token in a value of the records; nothing where it is damaged: it is only a hint."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        held = json.loads(raw or b"{}")
        return {tuple(str(part) for part in path): bool(moments) for path, moments in held["fields"]}, held["columns"]
    return {}, ""


def _ints(values: list[int]) -> IntArray:
    return np.asarray(values, dtype=np.int64)
