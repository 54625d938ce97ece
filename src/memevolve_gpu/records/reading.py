"""Reading the truth: every method is one statement or one snapshot, from any thread."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import apsw
import numpy as np

from ..errors import CorruptStoreError, StorageError
from ..types import Change, Head, IntArray, MemoryUnit, Row
from .check import TextOf, default_text
from .damage import noted, read_unit
from .failures import FOREIGN
from .filter_sql import where
from .filters import Filters, parse
from .folding import FOLD_AT
from .frequency import WordCache
from .inventory import Inventory, take_inventory
from .keyword import keyword
from .matching import matching
from .pool import ReaderPool

__all__ = ["Reading"]

T = TypeVar("T")

_ATTEMPTS = 100

_HEAD = "SELECT last_seq, horizon, last_slot, count FROM counters"
_READ_AFTER = """
SELECT l.seq, l.op, l.slot, u.id, v.vector
FROM log AS l LEFT JOIN units AS u ON u.slot = l.slot LEFT JOIN vectors AS v ON v.slot = l.slot
WHERE l.seq > ? ORDER BY l.seq LIMIT ?
"""
_SCAN = """
SELECT u.slot, u.id, v.vector FROM units AS u JOIN vectors AS v ON v.slot = u.slot
WHERE u.slot > ? AND u.slot <= ? ORDER BY u.slot LIMIT ?
"""
_UNITS_OF = "SELECT id, CAST(unit AS BLOB) FROM units WHERE id IN (SELECT value FROM json_each(?))"
_UNITS_AT = "SELECT slot, CAST(unit AS BLOB), id FROM units WHERE slot IN (SELECT value FROM json_each(?))"
_VECTORS_OF = """
SELECT u.id, v.vector FROM units AS u JOIN vectors AS v ON v.slot = u.slot
WHERE u.id IN (SELECT value FROM json_each(?))
"""


class Reading:
    """The reading half of ``Records``."""

    def __init__(self, path: Path, pool: ReaderPool) -> None:
        self.path = path
        self._pool = pool
        self._words = WordCache()

    def head(self) -> Head:
        """The counters, in one read."""
        return Head._make(self._rows(_HEAD)[0])

    def read_after(self, seq: int, limit: int) -> list[Change]:
        """At most ``limit`` log entries after ``seq``, in order, as of one moment.

        Entries up to ``head().horizon`` are purged: when the first one is not ``seq + 1``, or none comes although
        ``head().last_seq`` is larger, the reader is below the horizon and must reload with :meth:`scan`.
        """
        return list(map(Change._make, self._rows(_READ_AFTER, (seq, limit))))

    def scan(self, after_slot: int, upto_slot: int, limit: int) -> list[Row]:
        """At most ``limit`` live rows with after_slot < slot <= upto_slot, slots ascending, as of one moment."""
        return list(map(Row._make, self._rows(_SCAN, (after_slot, upto_slot, limit))))

    def spread(self, count: int) -> list[Row]:
        """At most ``count`` live rows, spread evenly over their age, oldest first."""
        last = self.head().last_slot
        first = [row.slot - 1 for row in self.scan(0, last, 1)]
        probes = np.linspace(first[0], last, count, endpoint=False).astype(int).tolist() if first else []
        rows = [row for probe in dict.fromkeys(probes) for row in self.scan(probe, last, 1)]
        return list({row.slot: row for row in rows}.values())

    def get(self, unit_id: str) -> MemoryUnit | None:
        """The unit of that id, or None."""
        rows = self._rows("SELECT CAST(unit AS BLOB) FROM units WHERE id = ?", (unit_id,))
        return self._unit(rows[0][0], unit_id) if rows else None

    def get_many(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``."""
        found = dict(self._rows(_UNITS_OF, (json.dumps(list(ids)),)))
        return {unit_id: self._unit(found[unit_id], unit_id) for unit_id in ids if unit_id in found}

    def units_at(self, slots: Sequence[int] | IntArray) -> dict[int, MemoryUnit]:
        """The live units of the slots, by slot; slots that are gone are missing."""
        numbers = slots.tolist() if isinstance(slots, np.ndarray) else slots
        listed = "[" + ",".join([str(int(slot)) for slot in numbers]) + "]"
        return {slot: self._unit(raw, unit_id) for slot, raw, unit_id in self._rows(_UNITS_AT, (listed,))}

    def vectors_of(self, ids: Sequence[str]) -> dict[str, bytes]:
        """The vectors of the ids that exist, by id: ``dim`` little-endian float32 each."""
        return dict(self._rows(_VECTORS_OF, (json.dumps(list(ids)),)))

    def exists(self, unit_id: str) -> bool:
        """Is there a live unit of that id?"""
        return bool(self._rows("SELECT 1 FROM units WHERE id = ?", (unit_id,)))

    def count(self) -> int:
        """Live units."""
        return self.head().count

    def ids(self, page_size: int = 1000) -> Iterator[str]:
        """Every id in slot order, in short transactions: rows that change meanwhile may or may not be seen."""
        return (unit_id for _, unit_id in self._pages("u.slot, u.id", page_size, None))

    def units(self, page_size: int = 1000, filters: Filters | None = None) -> Iterator[MemoryUnit]:
        """Every unit that matches, in slot order, in short transactions. Raises InvalidFilterError at once."""
        parse(filters)
        pages = self._pages("u.slot, u.id, CAST(u.unit AS BLOB)", page_size, filters)
        return (self._unit(raw, unit_id) for _, unit_id, raw in pages)

    def matching(self, filters: Filters | None, slots: IntArray | None = None) -> IntArray:
        """Slots of the live units that match, int64 (n,), ascending; among ``slots`` (ascending too) when given.

        Raises InvalidFilterError.
        """
        conditions = parse(filters)
        return self._snapshot(lambda con: matching(con, conditions, slots))

    def keyword(
        self, text: str, limit: int, filters: Filters | None = None, *, text_of: TextOf = default_text
    ) -> list[tuple[float, str]]:
        """The best ``limit`` units that hold a telling word of ``text``: (BM25 score, id), best first.

        Any text is safe to ask. Frequent words find nothing unless there is no other, see ``frequency.py``. text_of:
        what was given to ``Transaction.put`` as the text of a unit. Raises InvalidFilterError.
        """
        conditions = parse(filters)
        if len(self._words.pending) > 4 * FOLD_AT:
            self._words.pending = {}
        cache = self._words
        return self._snapshot(lambda con: keyword(con, text, limit, conditions, cache, text_of))

    def inventory(self) -> Inventory:
        """How many units of which types there are, and from when, without reading them."""
        return self._snapshot(take_inventory)

    def get_meta(self, key: str) -> bytes | None:
        """The named value, or None."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        return bytes(rows[0][0]) if rows else None

    def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._read(lambda con: con.execute(sql, parameters).fetchall())
        except UnicodeEncodeError:
            return []  # text that UTF-8 cannot hold equals nothing here

    def _snapshot(self, read: Callable[[apsw.Connection], T]) -> T:
        """Several statements on one state of the database."""

        def act(con: apsw.Connection) -> T:
            con.execute("BEGIN")
            try:
                return read(con)
            finally:
                if con.in_transaction:
                    con.execute("ROLLBACK")

        return self._read(act)

    def _unit(self, raw: object, name: object) -> MemoryUnit:
        try:
            return read_unit(raw, name)
        except CorruptStoreError as error:
            raise noted(error, self.path) from error

    def _read(self, act: Callable[[apsw.Connection], T]) -> T:
        """What ``act`` reads; done again when the file changed under a connection that takes no locks."""
        for _ in range(_ATTEMPTS):
            con = self._pool.take()
            try:
                result = act(con)
                if self._pool.is_current(con):
                    return result
            except UnicodeDecodeError as error:
                if self._pool.is_current(con):
                    message = f"{self.path} holds a text that is not UTF-8 ({error}); run check()"
                    raise noted(CorruptStoreError(message), self.path) from error
            except (*FOREIGN, CorruptStoreError) as error:
                if self._pool.is_current(con):
                    raise noted(error, self.path) from error
            finally:
                self._pool.give(con)
        raise StorageError(f"{self.path} changes too often to be read without write permission; grant it on the folder")

    def _pages(self, columns: str, size: int, filters: Filters | None) -> Iterator[Any]:
        bound: list[Any] = [0, size]
        condition = where(parse(filters), bound)
        sql = f"SELECT {columns} FROM units AS u WHERE u.slot > ?1 AND {condition} ORDER BY u.slot LIMIT ?2"
        full = True
        while full:
            rows = self._rows(sql, bound)
            yield from rows
            full = len(rows) == size
            bound[0] = rows[-1][0] if rows else bound[0]
