"""The source of record: units, vectors, ids and the log of every change, in one SQLite file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import apsw
import numpy as np

from ..errors import CorruptStoreError, MemEvolveError, StorageError
from ..types import Change, Head, IntArray, MemoryUnit, Metric, Op, Row
from ..utils.arguments import path_text
from ..utils.drafts import PRIVATE, remove_abandoned_drafts
from . import writer
from .backup import backup, backup_path, restore
from .check import Finding, TextOf, default_text, examine, repair
from .connections import Durability, all_rows, checked_counters, first_row
from .damage import clear_damage, damage_of, noted, read_unit, with_name_of_unit
from .file_lock import LOCK_SECONDS, WriteLock, file_mode
from .filter_sql import matching, where
from .filters import Filters, parse
from .fulltext import WordCache, keyword
from .fulltext_buffer import FOLD_AT
from .opening import OpenOptions, database_path, lock_path, open_store, peek
from .pool import ReaderPool
from .schema import StoreInfo
from .sqlite_errors import SQLITE_ERRORS
from .writer import Session, WriteContext

__all__ = ["Records"]

_OF_ROWS = """
SELECT e.atom, {sign}count(*) FROM {rows} AS u
JOIN json_each(CASE WHEN json_valid(u.unit) THEN u.unit ELSE '{{}}' END, '$.type') AS e
WHERE e.type = 'text' AND typeof(e.key) <> 'text' AND {condition} GROUP BY e.atom
"""
_TYPES = f"""
SELECT value, sum(number) FROM (
    SELECT value, count(*) AS number FROM terms WHERE field = 'type' GROUP BY value
    UNION ALL {_OF_ROWS.format(sign="", rows="units", condition="u.slot > (SELECT folded FROM counters)")}
    UNION ALL {_OF_ROWS.format(sign="-", rows="stale", condition="1")}
) GROUP BY value HAVING sum(number) > 0 ORDER BY value
"""
_END = """
SELECT CASE WHEN json_valid(unit) THEN unit ->> '$.metadata.created_at' END FROM units ORDER BY slot {direction} LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Inventory:
    """count: live units; types: how many are of each type, one of several types under each; oldest and newest:
    ``metadata.created_at`` of the first and the last slot, None where it is no text.
    """

    count: int
    types: dict[str, int]
    oldest: str | None
    newest: str | None


def take_inventory(con: apsw.Connection) -> Inventory:
    """Call inside a read transaction."""
    count = int(first_row(con, "SELECT count FROM counters")[0])
    types = {str(value): int(number) for value, number in all_rows(con, _TYPES)}
    ends = [_text(all_rows(con, _END.format(direction=direction))) for direction in ("ASC", "DESC")]
    return Inventory(count, types, ends[0], ends[1])


def _text(rows: list[tuple[object]]) -> str | None:
    return rows[0][0] if rows and isinstance(rows[0][0], str) else None


T = TypeVar("T")

_ATTEMPTS = 100

_OPS = (Op.PUT, Op.DROP, Op.CLEAR, Op.EDIT)

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


class Records:
    """An open store.

    Reading works from any thread at any time; :meth:`write` admits one writer over all threads and processes. After
    ``os.fork`` parent and child each open connections of their own.

    store_id: 32 hex digits; dim: length of the vectors; metric; path: the database file; read_only: whether writing is
    refused.
    """

    def __init__(
        self, path: Path, options: OpenOptions, lock_timeout: float = LOCK_SECONDS, file_mode: int = PRIVATE
    ) -> None:
        lock = WriteLock(lock_path(path), lock_timeout, file_mode)
        with writer.no_fork(path):
            try:
                opened = open_store(path, lock, options)
            except BaseException:
                lock.close_file()
                raise
            pool = ReaderPool(path, vfs=options.vfs, unshared=opened.unshared)
            self._session = Session(path, lock, opened.con, pool, options.durability, opened.read_only)
            if not opened.read_only:
                remove_abandoned_drafts([path, path.with_name(path.name.removesuffix(".db") + ".snapshot")])
        self.path = path
        self._pool = pool
        self._words = WordCache()
        self.store_id: str = opened.info.store_id
        self.dim = opened.info.dim
        self.metric: Metric = opened.info.metric
        self.read_only: bool = opened.read_only

    @classmethod
    def open(
        cls,
        prefix: str | os.PathLike[str],
        *,
        dim: int | None = None,
        metric: Metric | None = "l2",
        durability: Durability = "full",
        create: bool = True,
        vfs: str | None = None,
        lock_timeout: float = LOCK_SECONDS,
        file_mode: int = PRIVATE,
    ) -> Records:
        """Open ``<prefix>.db``, or create it.

        dim: length of the vectors; None reads it from an existing file. metric: l2, cosine or ip; None likewise.
        durability: full syncs every commit; under normal a power cut may lose the last commits, a crash of the
        process none. vfs: name of an apsw VFS. lock_timeout: seconds that a write waits for others.
        file_mode: of a new file, as ``chmod`` takes it.
        Raises ConfigurationError, DimensionMismatchError, StorageError,
        NotAStoreError, NewerSchemaError, ReadOnlyError (when creating), NetworkFilesystemError, CorruptStoreError.
        """
        return cls(database_path(prefix), OpenOptions(dim, metric, durability, create, vfs), lock_timeout, file_mode)

    @staticmethod
    def peek(prefix: str | os.PathLike[str]) -> StoreInfo | None:
        """What the store at ``prefix`` is, without keeping it open; None when there is none. Raises as opening does."""
        path = database_path(prefix)
        with writer.no_fork(path):
            return peek(path)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; waits for a running write. Every later call but this raises StoreClosedError."""
        self._session.close()

    def write(self, timeout: float | None = None, *, grouped: bool = False) -> WriteContext:
        """A context manager that yields a :class:`Transaction`: committed on success, rolled back on any exception.

        Waits for other writers, at most ``timeout`` seconds, by default those given to :meth:`open`; Ctrl-C ends the
        wait. grouped: for short transactions; those of threads that write at once are committed together, each
        one is durable when its block ends, and one that fails takes no other with it.
        Raises ReadOnlyError, StorageFullError, LockTimeoutError, StorageError.
        """
        return WriteContext(self._session, self.dim, timeout, grouped)

    def purge(self, upto_seq: int) -> int:
        """Forget the log entries up to ``upto_seq``, record the horizon, and return how many went."""
        with self.write() as tx:
            return tx.purge(upto_seq)

    def checkpoint(self) -> None:
        """Fold the keyword index, and copy the write-ahead log into the database as far as readers allow."""
        with self.write() as tx:
            tx.merge_pending()
        self._session.empty_log()

    def backup(self, target: str | os.PathLike[str]) -> Path:
        """Write a consistent copy while the store is in use, and return its path: ``target``, ending in ``.db``.

        The copy is a store of its own with its own ``store_id``, so that no snapshot of the original is ever taken
        for its. Raises StorageError when the target exists.
        """
        goal = database_path(path_text("path", target).removesuffix(".db"))
        return self._read(lambda con: backup(con, self.path, goal, self._pool.vfs, self._pool.is_current))

    def check(self, fix: bool = False, *, text_of: TextOf = default_text) -> list[Finding]:
        """Verify the store; with ``fix`` repair what can be repaired, under the write lock.

        text_of: the keyword text of a unit, in case the keyword index must be rebuilt. After a repair every index
        finds itself below the horizon and reloads.
        """
        if not fix:
            found = self._snapshot(lambda con: examine(con, self.dim))
        else:
            with self.write() as tx:
                found = tx.outside(lambda con: repair(con, self.dim, text_of))
        if all(finding.fixed for finding in found):
            clear_damage(self.path)
        return found

    @property
    def damage(self) -> str | None:
        """The first damage that any process met in this store; None since :meth:`check` found or left none."""
        return damage_of(self.path)

    @staticmethod
    def restore(backup: str | os.PathLike[str], prefix: str | os.PathLike[str]) -> Path | None:
        """See :func:`.backup.restore`."""
        path = database_path(prefix)
        with writer.no_fork(path):
            return restore(backup_path(backup), path)

    @property
    def file_mode(self) -> int:
        """The mode of the files that belong to this store."""
        return file_mode(self.path)

    def file_bytes(self) -> dict[str, int]:
        """Sizes in bytes of the ``database`` and of its write-ahead log, ``wal``."""
        files = {"database": self.path, "wal": self.path.with_name(self.path.name + "-wal")}
        return {name: file.stat().st_size if file.exists() else 0 for name, file in files.items()}

    def head(self) -> Head:
        """The counters, in one read."""
        return self._read(lambda con: Head._make(checked_counters(first_row(con, _HEAD))))

    def read_after(self, seq: int, limit: int) -> list[Change]:
        """At most ``limit`` log entries after ``seq``, in order, as of one moment.

        Entries up to ``head().horizon`` are purged: when the first one is not ``seq + 1``, or none comes although
        ``head().last_seq`` is larger, the reader is below the horizon and must reload with :meth:`scan`.
        """
        return [self._change(row) for row in self._rows(_READ_AFTER, (seq, limit))]

    def scan(self, after_slot: int, upto_slot: int, limit: int) -> list[Row]:
        """At most ``limit`` live rows with after_slot < slot <= upto_slot, slots ascending, as of one moment."""
        return [self._row(row) for row in self._rows(_SCAN, (after_slot, upto_slot, limit))]

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
        found = dict(self._rows(_VECTORS_OF, (json.dumps(list(ids)),)))
        for unit_id, vector in found.items():
            self._check_vector(vector, unit_id)
        return found

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
        """The best ``limit`` units that hold a selective word of ``text``: (BM25 score, id), best first.

        Any text is allowed. Frequent words find nothing unless there is no other, see ``records/fulltext.py``.
        text_of: what was given to ``Transaction.put`` as the text of a unit. Raises InvalidFilterError.
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
        if rows and not isinstance(rows[0][0], bytes):
            raise self._damaged(f"the value {key!r} is not bytes")
        return rows[0][0] if rows else None

    def get_meta_text(self, key: str) -> str | None:
        """The named value, which is a text, or None."""
        raw = self.get_meta(key)
        try:
            return None if raw is None else raw.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"the value {key!r} is not UTF-8") from error

    def note_damage(self, what: str) -> None:
        """Let health show that ``what`` is damaged, on which nothing depends."""
        self._damaged(what)

    def _change(self, row: tuple[Any, ...]) -> Change:
        seq, op, slot, unit_id, vector = row
        if op not in _OPS or not isinstance(slot, int) or slot < 0:
            raise self._damaged(f"entry {seq} of the log is not a change")
        if unit_id is not None:
            self._check_id(unit_id, slot)
            if op == Op.PUT:
                self._check_vector(vector, unit_id)
        return Change(seq, op, slot, unit_id, vector)

    def _row(self, row: tuple[Any, ...]) -> Row:
        slot, unit_id, vector = row
        self._check_id(unit_id, slot)
        self._check_vector(vector, unit_id)
        return Row(slot, unit_id, vector)

    def _check_id(self, unit_id: object, slot: int) -> None:
        if not isinstance(unit_id, str):
            raise self._damaged(f"the unit in slot {slot} has no id")

    def _check_vector(self, vector: object, unit_id: str) -> None:
        if not isinstance(vector, bytes) or len(vector) != 4 * self.dim:
            raise self._damaged(f"the vector of {unit_id!r} is damaged; store the unit again or delete it")

    def _damaged(self, what: str) -> MemEvolveError:
        """The error to raise; it is recorded as damage."""
        return noted(CorruptStoreError(f"{self.path}: {what}; run check(fix=True)"), self.path)

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
            except (*SQLITE_ERRORS, CorruptStoreError) as error:
                if self._pool.is_current(con):
                    raise noted(with_name_of_unit(error, con), self.path) from error
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
