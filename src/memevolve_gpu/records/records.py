"""The source of record: units, vectors, ids and the log of every change, in one SQLite file."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw
import numpy as np
import numpy.typing as npt

from ..errors import CorruptStoreError, MemEvolveError, StorageError
from ..types import Change, Filters, Head, IntArray, Json, MemoryUnit, Metric, Op, Row
from ..utils.arguments import path_text as checked_path
from ..utils.drafts import PRIVATE, remove_abandoned_drafts
from . import history, writer
from .backup import backup, backup_path, restore
from .check import Finding, examine, repair
from .connections import Durability, SqlRow, all_rows, checked_counters, first_row
from .damage import clear_damage, damage_of, derived_paths, noted, read_unit, with_name_of_unit
from .file_lock import LOCK_SECONDS, WriteLock, file_mode
from .filter_sql import changed_slots, declare_fields, field_is_short, field_values, matching, where
from .filters import Filter, parse
from .fulltext import WordCache, keyword
from .fulltext_buffer import FOLD_AT, TextOf, default_text, stemming_of
from .keyword_query import parse_query
from .opening import OpenOptions, database_path, lock_path, open_store, peek
from .pool import CONFIRM_SECONDS, ReaderPool
from .schema import StoreInfo
from .sqlite_errors import SQLITE_ERRORS
from .transaction import MISSING, path_text
from .writer import Session, WriteContext

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
SELECT CASE WHEN json_valid(u.unit) THEN u.unit ->> '$.metadata.created_at' END FROM units AS u
WHERE {space} AND ifnull(u.expires_at > ?, 1) ORDER BY u.slot {direction} LIMIT 1
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


def take_inventory(con: apsw.Connection, ns: int = 0, now: float = 0.0) -> Inventory:
    """Of the units of a namespace that are alive at Unix time ``now``. Call inside a read transaction."""
    alone = ns == 0 and not first_row(con, "SELECT others FROM counters")[0]
    if alone and not all_rows(con, "SELECT 1 FROM units WHERE expires_at IS NOT NULL LIMIT 1"):
        types = all_rows(con, _TYPES)
    else:
        condition = f"{_space(ns)} AND {_ALIVE.format(now)}"
        types = all_rows(con, _OF_ROWS.format(sign="", rows="units", condition=condition) + " ORDER BY 1")
    found = {str(value): int(number) for value, number in types}
    ends = [
        _text(all_rows(con, _END.format(direction=direction, space=_space(ns)), (now,)))
        for direction in ("ASC", "DESC")
    ]
    count = all_rows(con, _COUNT if ns == 0 else _COUNT_OF, (now, ns))
    return Inventory(int(count[0][0]) if count else 0, found, ends[0], ends[1])


def _text(rows: list[tuple[object]]) -> str | None:
    return rows[0][0] if rows and isinstance(rows[0][0], str) else None


T = TypeVar("T")

_ATTEMPTS = 100
_DAY = 86_400.0

PURGED_AT_ONCE = 1000
"""Changes that are forgotten in one transaction."""

_GONE = "(SELECT count(*) FROM units AS u WHERE u.expires_at <= ?1 AND +u.ns = ?2)"
_COUNT = f"SELECT count - others - {_GONE} FROM counters"
_COUNT_OF = f"SELECT count - {_GONE} FROM namespaces WHERE key = ?2"
_LIMITS = "SELECT max_units, default_ttl FROM namespaces WHERE key = ?"

_OPS = (Op.PUT, Op.DROP, Op.CLEAR, Op.EDIT)

_HEAD = "SELECT last_seq, horizon, last_slot, count FROM counters"
_READ_AFTER = f"""
SELECT l.seq, iif(l.op = {history.REPLACED}, {Op.DROP}, l.op), l.slot, u.id, v.vector, ifnull(u.ns, 0), u.expires_at
FROM changes AS l LEFT JOIN units AS u ON u.slot = l.slot LEFT JOIN vectors AS v ON v.slot = l.slot
WHERE l.seq > max(?, (SELECT horizon FROM counters)) AND l.seq <= (SELECT last_seq FROM counters)
ORDER BY l.seq LIMIT ?
"""
_SCAN = """
SELECT u.slot, u.id, v.vector, u.ns, u.expires_at FROM units AS u JOIN vectors AS v ON v.slot = u.slot
WHERE u.slot > ?1 AND u.slot <= ?2 AND {space} ORDER BY u.slot LIMIT ?3
"""
_ALIVE = "ifnull(u.expires_at > {}, 1)"
_ONE = f"WHERE u.ns = ? AND u.id = ? AND {_ALIVE.format('?')}"
_UNITS_OF = f"""
SELECT u.id, CAST(u.unit AS BLOB) FROM units AS u
WHERE u.ns = ? AND u.id IN (SELECT value FROM json_each(?)) AND {_ALIVE.format("?")}
"""
_EXPIRIES_OF = """
SELECT id, expires_at FROM units WHERE ns = ? AND id IN (SELECT value FROM json_each(?)) AND expires_at > ?
"""
_UNITS_AT = "SELECT slot, CAST(unit AS BLOB), id FROM units WHERE slot IN (SELECT value FROM json_each(?))"
_VECTORS_AT = """
SELECT slot, vector FROM vectors JOIN units USING (slot) WHERE slot IN (SELECT value FROM json_each(?))
"""
_VECTORS_OF = """
SELECT u.id, v.vector FROM units AS u JOIN vectors AS v ON v.slot = u.slot
WHERE u.ns = ? AND u.id IN (SELECT value FROM json_each(?)) AND ifnull(u.expires_at > ?, 1)
"""


def _space(ns: int | None) -> str:
    """The condition on the row ``u`` that it is of a namespace; such that slots come in order."""
    return "1" if ns is None else f"u.ns = {int(ns)} AND u.ns <> 0" if ns else "+u.ns = 0"


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
            store_id = opened.info.store_id
            pool = ReaderPool(path, vfs=options.vfs, unshared=opened.unshared, lock=lock, store_id=store_id)
            durable, text_of = options.durability, options.text_of
            self._session = Session(path, lock, opened.con, pool, durable, opened.read_only, text_of)
            if not opened.read_only:
                remove_abandoned_drafts([path, *derived_paths(path)])
        self.path = path
        self.clock: Callable[[], float] = time.time
        """Gives the Unix time at which expiry is judged."""
        self.history_days = 0.0
        """Days for which replaced and removed versions are kept; 0 keeps none."""
        self._pool = pool
        self._words: dict[str, WordCache] = {}
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
        stemming: str | None = None,
        text_of: TextOf = default_text,
    ) -> Records:
        """Open ``<prefix>.db``, or create it.

        dim: length of the vectors; None reads it from an existing file. metric: l2, cosine or ip; None likewise.
        durability: full syncs every commit; under normal a power cut may lose the last commits, a crash of the
        process none. vfs: name of an apsw VFS. lock_timeout: seconds that a write waits for others.
        file_mode: of a new file, as ``chmod`` takes it. stemming: of the keyword index, see ``tokenizer.py``; None
        takes that of the file. An index that an older tokenizer or another stemming made is made again, in one
        transaction. text_of: the text of a unit for the index, always the same for one file.
        Raises ConfigurationError, DimensionMismatchError, StorageError,
        NotAStoreError, NewerSchemaError, ReadOnlyError (when creating), NetworkFilesystemError, CorruptStoreError.
        """
        options = OpenOptions(dim, metric, durability, create, vfs, stemming, text_of)
        return cls(database_path(prefix), options, lock_timeout, file_mode)

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

    def refuse_if_closed(self) -> None:
        """Raise StoreClosedError where it applies."""
        self._pool.refuse_if_closed()

    def write(
        self,
        timeout: float | None = None,
        namespace: tuple[str, ...] = (),
        operation: str = "write",
        *,
        grouped: bool = False,
    ) -> WriteContext:
        """A context manager that yields a :class:`Transaction`: committed on success, rolled back on any exception.

        Waits for other writers, at most ``timeout`` seconds, by default those given to :meth:`open`; Ctrl-C ends the
        wait. operation: its kind in the history. grouped: for short transactions; those of threads that write at once
        are committed together, each one is durable when its block ends, and one that fails takes no other with it.
        Raises ReadOnlyError, StorageFullError, LockTimeoutError, StorageError.
        """
        kept = operation if self.history_days > 0 else None
        return WriteContext(self._session, self.dim, timeout, namespace, self.clock, kept, grouped)

    def purge(self, upto_seq: int) -> int:
        """Forget the log entries up to ``upto_seq``, record the horizon, and return how many went."""
        with self.write() as tx:
            return tx.purge(upto_seq)

    def history_is_due(self) -> bool:
        """Whether versions are kept that should not be any more; a tenth of the retention late at most."""
        at = self._read(history.oldest)
        if at is None or not self.history_days:  # without a retention no clock decides
            return at is not None
        return at < self.clock() - 1.1 * _DAY * self.history_days

    def purge_history(self, steps: int = 2**62) -> int:
        """Forget versions beyond the retention, a thousand changes in a transaction; returns their number."""
        gone = count = 0
        for _ in range(steps):
            before = math.inf if not self.history_days else self.clock() - _DAY * self.history_days
            with self.write() as tx:
                count = tx.outside(partial(history.purge, before=before, limit=PURGED_AT_ONCE))
            gone += count
            if count < PURGED_AT_ONCE:
                break
        return gone

    def past(self, read: Callable[[apsw.Connection], list[T]]) -> list[T]:
        """What a function of ``records/history.py`` reads, as of one moment."""
        try:
            return self._snapshot(read)
        except UnicodeEncodeError:
            return []  # as in _rows

    def checkpoint(self) -> None:
        """Fold the keyword index, and copy the write-ahead log into the database as far as readers allow."""
        with self.write() as tx:
            tx.merge_pending()
        self._session.empty_log()

    def rewrite(self, seconds: float) -> None:
        """Rewrite the database file, so that nothing that was deleted is left in it or in its log."""
        self._session.rewrite(seconds)

    def backup(self, target: str | os.PathLike[str]) -> Path:
        """Write a consistent copy while the store is in use, and return its path: ``target``, ending in ``.db``.

        The copy is a store of its own with its own ``store_id``, so that no snapshot of the original is ever taken
        for its. Raises StorageError when the target exists.
        """
        goal = database_path(checked_path("path", target).removesuffix(".db"))
        return self._read(lambda con: backup(con, self.path, goal, self._pool.vfs, self._pool.is_current))

    def check(self, fix: bool = False) -> list[Finding]:
        """Verify the store; with ``fix`` repair what can be repaired, under the write lock.

        After a repair every index finds itself below the horizon and reloads.
        """
        if not fix:
            found = self._snapshot(lambda con: examine(con, self.dim))
        else:
            with self.write() as tx:
                found = tx.outside(lambda con: repair(con, self.dim, self._session.text_of))
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
    def columns_path(self) -> Path:
        """The file of the columns of fields, which filters use."""
        return derived_paths(self.path)[1]

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
        head = self._read(lambda con: Head._make(checked_counters(first_row(con, _HEAD))), CONFIRM_SECONDS)
        self._pool.seen = max(self._pool.seen, head.last_seq)
        return head

    def read_after(self, seq: int, limit: int) -> list[Change]:
        """At most ``limit`` log entries after ``seq``, in order, as of one moment.

        Entries up to ``head().horizon`` are purged: when the first one is not ``seq + 1``, or none comes although
        ``head().last_seq`` is larger, the reader is below the horizon and must reload with :meth:`scan`.
        """
        return [self._change(row) for row in self._rows(_READ_AFTER, (seq, limit))]

    def scan(self, after_slot: int, upto_slot: int, limit: int, ns: int | None = None) -> list[Row]:
        """At most ``limit`` live rows with after_slot < slot <= upto_slot, slots ascending, as of one moment."""
        bound: list[apsw.Binding] = [after_slot, upto_slot, limit]
        if ns is not None:
            bound.append(self.clock())
        sql = _SCAN.format(space=_space(ns) + ("" if ns is None else f" AND {_ALIVE.format('?4')}"))
        return [self._row(row) for row in self._rows(sql, bound)]

    def namespace_slots(self) -> tuple[IntArray, npt.NDArray[np.int32]]:
        """Slots, int64 (m,) ascending, of the live units of other namespaces than the default one, and the keys of
        those, int32 (m,)."""
        rows = self._rows("SELECT ns, group_concat(slot) FROM units WHERE ns <> 0 GROUP BY ns")
        parts = [np.fromstring(slots, np.int64, sep=",") for _, slots in rows]
        slots = np.concatenate([np.empty(0, np.int64), *parts])
        keys = np.repeat(np.array([ns for ns, _ in rows], np.int32), [len(part) for part in parts])
        order = np.argsort(slots, kind="stable")
        return slots[order], keys[order]

    def expiring(self) -> tuple[IntArray, npt.NDArray[np.float64]]:
        """Slots, int64 (m,), of the units that expire, and when, Unix time float64 (m,)."""
        rows = self._rows("SELECT slot, expires_at FROM units WHERE expires_at IS NOT NULL")
        slots, times = zip(*rows, strict=True) if rows else ((), ())
        return np.array(slots, np.int64), np.array(times, np.float64)

    def namespace_key(self, path: tuple[str, ...]) -> int:
        """The key of a namespace; MISSING where it does not exist."""
        if not path:
            return 0
        rows = self._rows("SELECT key FROM namespaces WHERE path = ?", (path_text(path),))
        return int(rows[0][0]) if rows else MISSING

    def namespaces(
        self, prefix: Sequence[str] = ()
    ) -> list[tuple[tuple[str, ...], int, int, int | None, float | None]]:
        """(path, key, count, max_units, default_ttl) of each namespace with units or limits, by path."""
        rows = self._rows("SELECT path, key, count, max_units, default_ttl FROM namespaces WHERE key <> 0")
        rows.append(("[]", 0, None, *(self._rows(_LIMITS, (0,)) or [(None, None)])[0]))
        paths = ((tuple(json.loads(row[0])), *row[1:]) for row in rows)
        gone = dict(self._rows("SELECT ns, count(*) FROM units WHERE expires_at <= ? GROUP BY +ns", (self.clock(),)))
        head = self._rows("SELECT count - others FROM counters")[0][0]
        found = [
            (path, key, (head if key == 0 else count) - gone.get(key, 0), most, ttl)
            for path, key, count, most, ttl in paths
            if path[: len(prefix)] == tuple(prefix)
        ]
        return sorted(one for one in found if one[2] or one[3] is not None or one[4] is not None)

    def all_namespaces(self, prefix: Sequence[str] = ()) -> dict[int, tuple[str, ...]]:
        """The paths of a subtree by key, of namespaces without units too."""
        rows = [(0, "[]"), *self._rows("SELECT key, path FROM namespaces WHERE key <> 0")]
        paths = {key: tuple(json.loads(path)) for key, path in rows}
        return {key: path for key, path in paths.items() if path[: len(prefix)] == tuple(prefix)}

    def namespace_info(self, ns: int) -> tuple[int, int | None, float | None]:
        """(count, max_units, default_ttl) of a namespace."""
        limits = (self._rows(_LIMITS, (ns,)) or [(None, None)])[0]
        return self.count(ns), *limits

    def namespaces_at(self, slots: Sequence[int]) -> dict[int, int]:
        """The keys of the namespaces of these slots."""
        sql = "SELECT slot, ns FROM units WHERE slot IN (SELECT value FROM json_each(?))"
        return dict(self._rows(sql, (json.dumps(list(slots)),)))

    def expiry_of(self, unit_id: str, ns: int = 0) -> float | None:
        """When a live unit expires."""
        rows = self._rows(f"SELECT expires_at FROM units AS u {_ONE}", (ns, unit_id, self.clock()))
        return rows[0][0] if rows else None

    def expiries_of(self, ids: Sequence[str], ns: int = 0) -> dict[str, float]:
        """When the live units of these ids expire, of those that do."""
        return dict(self._rows(_EXPIRIES_OF, (ns, json.dumps(list(ids)), self.clock())))

    def spread(self, count: int, ns: int | None = None) -> list[Row]:
        """At most ``count`` live rows, spread evenly over their age, oldest first."""
        last = self.head().last_slot
        first = [row.slot - 1 for row in self.scan(0, last, 1, ns)]
        probes = np.linspace(first[0], last, count, endpoint=False).astype(int).tolist() if first else []
        rows = [row for probe in dict.fromkeys(probes) for row in self.scan(probe, last, 1, ns)]
        return list({row.slot: row for row in rows}.values())

    def get(self, unit_id: str, ns: int = 0) -> MemoryUnit | None:
        """The unit of that id, or None."""
        found = self.get_with_json(unit_id, ns)
        return None if found is None else found[1]

    def get_with_json(self, unit_id: str, ns: int = 0) -> tuple[bytes, MemoryUnit] | None:
        """The JSON text of the unit of that id, and the unit; None when there is none."""
        rows = self._rows(f"SELECT CAST(unit AS BLOB) FROM units AS u {_ONE}", (ns, unit_id, self.clock()))
        return (rows[0][0], self._unit(rows[0][0], unit_id)) if rows else None

    def get_many(self, ids: Sequence[str], ns: int = 0) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``."""
        found = dict(self._rows(_UNITS_OF, (ns, json.dumps(list(ids)), self.clock())))
        return {unit_id: self._unit(found[unit_id], unit_id) for unit_id in ids if unit_id in found}

    def units_at(self, slots: Sequence[int] | IntArray) -> dict[int, MemoryUnit]:
        """The live units of the slots, by slot; slots that are gone are missing."""
        numbers = slots.tolist() if isinstance(slots, np.ndarray) else slots
        listed = "[" + ",".join([str(int(slot)) for slot in numbers]) + "]"
        return {slot: self._unit(raw, unit_id) for slot, raw, unit_id in self._rows(_UNITS_AT, (listed,))}

    def vectors_at(self, slots: Sequence[int]) -> dict[int, bytes]:
        """The vectors of the live units of the slots, by slot."""
        found = dict(self._rows(_VECTORS_AT, (json.dumps(list(slots)),)))
        for slot, vector in found.items():
            self._check_vector(vector, str(slot))
        return found

    def vectors_of(self, ids: Sequence[str], ns: int = 0) -> dict[str, bytes]:
        """The vectors of the ids that exist, by id: ``dim`` little-endian float32 each."""
        found = dict(self._rows(_VECTORS_OF, (ns, json.dumps(list(ids)), self.clock())))
        for unit_id, vector in found.items():
            self._check_vector(vector, unit_id)
        return found

    def exists(self, unit_id: str, ns: int = 0) -> bool:
        """Is there a live unit of that id?"""
        return bool(self._rows(f"SELECT 1 FROM units AS u {_ONE}", (ns, unit_id, self.clock())))

    def count(self, ns: int = 0) -> int:
        """Live units of a namespace."""
        rows = self._rows(_COUNT if ns == 0 else _COUNT_OF, (self.clock(), ns))
        return int(rows[0][0]) if rows else 0

    def ids(self, page_size: int = 1000, ns: int = 0) -> Iterator[str]:
        """Every id in slot order, in short transactions: rows that change meanwhile may or may not be seen."""
        return (unit_id for _, unit_id in self._pages("u.slot, u.id", page_size, None, ns))

    def units(
        self, page_size: int = 1000, filters: Filters | Filter | None = None, ns: int = 0
    ) -> Iterator[MemoryUnit]:
        """Every unit that matches, in slot order, in short transactions. Raises InvalidFilterError at once."""
        pages = self._pages("u.slot, u.id, CAST(u.unit AS BLOB)", page_size, parse(filters), ns)
        return (self._unit(raw, unit_id) for _, unit_id, raw in pages)

    def matching(self, filters: Filters | Filter | None, slots: IntArray | None = None) -> IntArray:
        """Slots of the live units that match, int64 (n,), ascending; among ``slots`` (ascending too) when given.

        Raises InvalidFilterError.
        """
        parsed = parse(filters)
        return self._snapshot(lambda con: matching(con, parsed, slots))

    def field_values(
        self,
        paths: Sequence[tuple[str, ...]],
        slots: IntArray | None = None,
        *,
        within: tuple[int, int] | None = None,
    ) -> tuple[IntArray, list[list[Json]]]:
        """The slots of the live units, int64 (n,), ascending, and for each path the value in each, NaN where there is
        none; among ``slots``, or from the first to the last of ``within``, when given.
        """
        return self._read(lambda con: field_values(con, paths, slots, within))

    def changed_slots(self, seq: int) -> IntArray | None:
        """The slots that were added or changed after log entry ``seq``, int64 (n,), ascending; None where the log was
        purged beyond it, or everything was removed since.
        """
        return self._snapshot(lambda con: changed_slots(con, seq))

    def field_is_short(self, path: tuple[str, ...]) -> bool:
        """Are the values at the path short enough to be kept in memory?"""
        return self._read(lambda con: field_is_short(con, path))

    def declare_fields(self, paths: Sequence[tuple[str, ...]]) -> None:
        """Keep an index of each of these fields in the file, and no other."""
        with self.write() as tx:
            tx.outside(lambda con: declare_fields(con, paths))

    def keyword(
        self,
        text: str,
        limit: int,
        filters: Filters | Filter | None = None,
        *,
        ns: int = 0,
        within: IntArray | None = None,
        relative: bool = False,
    ) -> list[tuple[float, str]]:
        """The best ``limit`` units that hold a selective word of ``text``: (BM25 score, id), best first.

        Any text is allowed. Frequent words find nothing unless there is no other, see ``records/fulltext.py``.
        within: the slots that match ``filters``, if they are known. relative: scores as shares of a full match. Raises
        InvalidFilterError.
        """
        parsed = parse(filters)
        caches, now = self._words, self.clock()

        def read(con: apsw.Connection) -> list[tuple[float, str]]:
            stemming = stemming_of(con, self.path)
            cache = caches.setdefault(stemming, WordCache())
            if len(cache.pending) > 4 * FOLD_AT:
                cache.pending = {}
            query = parse_query(text, stemming)
            text_of = self._session.text_of
            return keyword(con, query, limit, parsed, cache, text_of, ns, now, stemming, within, relative)

        return self._snapshot(read)

    def inventory(self, ns: int = 0) -> Inventory:
        """How many units of which types there are, and from when, without reading them."""
        now = self.clock()
        return self._snapshot(lambda con: take_inventory(con, ns, now))

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

    def _change(self, row: SqlRow) -> Change:
        seq, op, slot, unit_id, vector, ns, expires_at = row
        if op not in _OPS or not isinstance(slot, int) or slot < 0:
            raise self._damaged(f"entry {seq} of the log is not a change")
        if unit_id is not None:
            self._check_id(unit_id, slot)
            if op == Op.PUT:
                self._check_vector(vector, unit_id)
        return Change(seq, op, slot, unit_id, vector, ns, expires_at)

    def _row(self, row: SqlRow) -> Row:
        slot, unit_id, vector, ns, expires_at = row
        self._check_id(unit_id, slot)
        self._check_vector(vector, unit_id)
        return Row(slot, unit_id, vector, ns, expires_at)

    def _check_id(self, unit_id: object, slot: int) -> None:
        if not isinstance(unit_id, str):
            raise self._damaged(f"the unit in slot {slot} has no id")

    def _check_vector(self, vector: object, unit_id: str) -> None:
        if not isinstance(vector, bytes) or len(vector) != 4 * self.dim:
            raise self._damaged(f"the vector of {unit_id!r} is damaged; store the unit again or delete it")

    def _damaged(self, what: str) -> MemEvolveError:
        """The error to raise; it is recorded as damage."""
        return noted(CorruptStoreError(f"{self.path}: {what}; run check(fix=True)"), self.path)

    def _rows(self, sql: str, parameters: apsw.Bindings = ()) -> list[SqlRow]:
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

    def _read(self, act: Callable[[apsw.Connection], T], trusted: float = 0.0) -> T:
        """What ``act`` reads; done again when the file changed under a connection that takes no locks.

        trusted: as for ``ReaderPool.take``.
        """
        for _ in range(_ATTEMPTS):
            con = self._pool.take(trusted)
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

    def _pages(self, columns: str, size: int, filters: Filters | Filter | None, ns: int = 0) -> Iterator[SqlRow]:
        bound: list[apsw.Binding] = [0, size, 0.0]
        scope = f"u.slot > ?1 AND {_space(ns)} AND {_ALIVE.format('?3')} AND {where(parse(filters), bound)}"
        sql = f"SELECT {columns} FROM units AS u WHERE {scope} ORDER BY u.slot LIMIT ?2"
        full = True
        while full:
            bound[2] = self.clock()
            rows = self._rows(sql, bound)
            yield from rows
            full = len(rows) == size
            bound[0] = rows[-1][0] if rows else bound[0]
