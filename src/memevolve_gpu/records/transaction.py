"""One write transaction: rows, vectors, log, keyword notes and counters change together or not at all.

The access figures of units (when they were read, how often) are derived: the newest may be lost in a crash. They are
kept for live units only.
"""

from __future__ import annotations

import json
import math
import re
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import apsw

from ..errors import DimensionMismatchError, InvalidUnitError, InvalidVectorError, StorageError
from ..types import Head, Json, MemoryUnit, Op
from ..utils.plain import json_text
from . import history
from .connections import SqlRow, all_rows, checked_counters, first_row
from .damage import noted, read_unit
from .fulltext_buffer import (
    FOLD_AT,
    TextOf,
    add_terms,
    default_text,
    drop_terms,
    forget_all,
    index_rows,
    merge_pending,
    tokenizer_of,
)
from .lineage import NO_TOKEN, next_link
from .sqlite_errors import SQLITE_ERRORS
from .tokenizer import TOKENIZER

_ENTER = """
INSERT INTO access (ns, id, last_access, count)
SELECT u.ns, u.id, j.value ->> 2, j.value ->> 3 FROM json_each(?) AS j
JOIN units AS u ON u.ns = j.value ->> 0 AND u.id = j.value ->> 1 WHERE true
ON CONFLICT (ns, id) DO UPDATE SET
    last_access = max(last_access, excluded.last_access), count = count + excluded.count
"""

_WRITTEN = """ifnull(unixepoch(substr(coalesce(
    u.unit ->> '$.metadata.updated_at', u.unit ->> '$.metadata.created_at'), 1, 19)), 0)"""
"""Unix time of a row's own time stamp, to the second and without regard to its offset; 0 where it has none."""

_ORDERS = {
    "lru": "a.last_access, u.slot",
    "lfu": "ifnull(a.count, 0), a.last_access, u.slot",
    "used": f"max(ifnull(a.last_access, 0), {_WRITTEN}), u.slot",
    "oldest": "u.slot",
}


def enter(con: apsw.Connection, reads: Mapping[tuple[int, str], tuple[float, int]]) -> None:
    """Add reads: (namespace, id) to (Unix time of the newest, how many). Call inside a write transaction."""
    con.execute(_ENTER, (json.dumps([[*unit, *read] for unit, read in reads.items()]),))


def in_order(con: apsw.Connection, kind: Literal["lru", "lfu", "used", "oldest"], limit: int, ns: int = 0) -> list[str]:
    """Ids of ``limit`` live units of a namespace: read longest ago, or least often, first; before them never read ones,
    by slot.

    used: read or written longest ago first; oldest: by slot alone.
    """
    sql = (
        "SELECT u.id FROM units AS u LEFT JOIN access AS a ON a.ns = u.ns AND a.id = u.id "
        f"WHERE u.ns = ? ORDER BY {_ORDERS[kind]} LIMIT ?"
    )
    return [row[0] for row in all_rows(con, sql, (ns, limit))]


def read_counts(con: apsw.Connection, ns: int = 0) -> dict[str, int]:
    """How often each unit of a namespace was read, of those that were."""
    found: dict[str, int] = dict(all_rows(con, "SELECT id, count FROM access WHERE ns = ?", (ns,)))
    for unit_id, count in found.items():
        if not isinstance(count, int):
            raise apsw.CorruptError(f"the access figures of {unit_id!r} are damaged")
    return found


_CHANGED = (
    "SELECT u.id FROM changes AS l JOIN units AS u ON u.slot = l.slot WHERE l.seq > ? AND l.op IN (?, ?) AND u.ns = ?"
)


def changed_since(con: apsw.Connection, seq: int, ns: int = 0) -> set[str] | None:
    """Ids of live units that were stored, replaced or edited after log entry ``seq``; None when the log was purged
    beyond it, so that this is unknown.
    """
    last, horizon = first_row(con, "SELECT last_seq, horizon FROM counters")
    if seq == last:
        return set()
    if seq < horizon:
        return None
    return {row[0] for row in all_rows(con, _CHANGED, (seq, Op.PUT, Op.EDIT, ns))}


T = TypeVar("T")

MISSING = -1
"""The key of a namespace that does not exist."""


@lru_cache(10_000)
def path_text(path: tuple[str, ...]) -> str:
    """A path as the database keeps it."""
    return json.dumps(list(path), ensure_ascii=False)


AUTO_LIMIT = 10**12
"""Explicit ids ``unit_<n>`` with n below this move the counter of automatic ids; one above would use the counter up."""

MAX_NESTING = 900
"""SQLite's JSON functions refuse text nested 1,000 deep; one such row would break every filter."""

_AUTO_ID = re.compile(r"unit_(0|[1-9][0-9]{0,11})", re.ASCII)
_CHUNK = 1000

_COUNTERS = """
SELECT last_seq, horizon, last_slot, c.count, c.next_auto, folded, backlog, others, link, max_units, default_ttl,
    ifnull((SELECT at FROM changes WHERE seq = last_seq), (SELECT at FROM history_floor))
FROM counters AS c LEFT JOIN namespaces AS n ON n.key = 0
"""
"""With the limits of the default namespace and the time of the newest operation, so that a write needs no other
statement for them."""

_KEEP = (
    "UPDATE counters SET last_seq = ?, horizon = ?, last_slot = ?, count = ?, next_auto = ?, folded = ?, backlog = ?"
    ", others = ?, link = ?"
)
_ADD_UNIT = "INSERT INTO units VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_FIND = "SELECT slot, CAST(unit AS BLOB), ifnull(since, 0), expires_at, unit_crc FROM units WHERE ns = ? AND id = ?"
_DELETE = """
DELETE FROM units WHERE ns = ? AND id = ? AND ifnull(expires_at > ?, 1)
RETURNING slot, ifnull(since, 0), expires_at, unit_crc, vector_crc, CAST(unit AS BLOB)
"""
_NOTED = """
CASE WHEN json_valid({0}) THEN json_object('type', {0} -> '$.type', 'tags', {0} -> '$.tags') ELSE '{{}}' END
"""
"""Type and tags of a unit's JSON: all that the indexes hold of it besides its text."""

_ADD_STALE = f"INSERT INTO stale SELECT ?1, {_NOTED.format('?2')}, ?3"
_ADD_STALE_OF = (
    f"INSERT INTO stale SELECT slot, {_NOTED.format('unit')}, ns FROM units WHERE ns = ?1 AND slot <= ?2 RETURNING 1"
)

_ADD_VECTOR = "INSERT INTO vectors VALUES (?, ?)"
_LOG_CLEARED = f"""
INSERT INTO changes (seq, op, slot)
SELECT ?1 + row_number() OVER (ORDER BY slot), {Op.DROP}, slot FROM units WHERE ns = ?2
"""


class EncodedUnit(NamedTuple):
    """The JSON text of a unit, which :func:`encode_unit` made or could have made, and its labels.

    The unit itself is not kept: while a batch is written, Python's garbage collector would visit every part of each.
    """

    json: str
    unit_id: Json
    """The ``id`` in the text; NO_ID where there is none."""
    kind: Json
    tags: Json
    dated: bool = False
    """Whether ``metadata.created_at`` is not the caller's."""

    @classmethod
    def of(cls, unit: MemoryUnit, text: str, dated: bool = False) -> EncodedUnit:
        """text: the JSON text of ``unit``."""
        return cls(text, unit.get("id", NO_ID), *_labels_of(unit), dated)


NO_ID = ""


_Checked = tuple[str, str, bytes, float | None, Json, Json]
"""A checked row of :meth:`Transaction.put_many`: JSON, text, vector, expiry, type, tags."""

NewUnit = MemoryUnit | EncodedUnit
NewRow = tuple[NewUnit, str, bytes, str] | tuple[NewUnit, str, bytes, str, "float | None"]
"""(unit, its text for the keyword index, vector, id, Unix time from which it is gone)"""

_NO_HISTORY, _NO_OLD_VERSION = (None,) * 10, (None,) * 5


class Limits(NamedTuple):
    """Of a namespace."""

    max_units: int | None = None
    default_ttl: float | None = None


class Stored(NamedTuple):
    """A live unit and its slot."""

    slot: int
    unit: MemoryUnit
    expires_at: float | None = None


class _Found(NamedTuple):
    """A unit that was read, expired or not; seq: of the change before; unit: what :meth:`Transaction.find` parsed."""

    unit_id: str
    seq: int
    slot: int
    raw: object
    since: int
    expires_at: float | None
    crc: int | None
    unit: MemoryUnit | None = None


class Transaction:
    """What ``Records.write()`` hands out. Use it in the thread that opened it, until the ``with`` block ends.

    ``head`` holds the counters as of its beginning, ``link`` what is written with it, see ``lineage.py``. Reads
    through it see its own changes; reads through ``Records`` see the state before it.
    """

    def __init__(
        self,
        con: apsw.Connection,
        path: Path,
        dim: int,
        floor: bytes = NO_TOKEN,
        space: tuple[str, ...] = (),
        clock: Callable[[], float] = time.time,
        operation: str | None = None,
        text_of: TextOf = default_text,
    ) -> None:
        """operation: its kind in the history; None keeps no history. text_of: the keyword text of a unit."""
        self._operation, self._text_of = operation, text_of
        self._at: float | None = None
        """Unix time of the operation, once there is one."""
        self._space, self._clock, self._others = space, clock, 0
        self._key: int | None = None
        self._own = self._next = 0
        self._expired: tuple[int, int] | None = None
        self._limits: Limits | None = None
        self._last: _Found | None = None
        self._absent: set[str] = set()
        """Ids that were looked up and are not in the namespace."""
        self._changed: dict[int, int] = {}
        self._con: apsw.Connection | None = con
        self._path = path
        self._dim = dim
        self._seq = self._horizon = self._slot = self._count = self._auto = self._folded = self._backlog = 0
        self._changes = con.total_changes()
        self._load(con)
        self._enter_space()
        self.link = next_link(self._held, floor)
        self.head = Head(self._seq, self._horizon, self._slot, self._count)

    @property
    def namespace(self) -> int:
        """The key of the namespace; MISSING where it does not exist."""
        return MISSING if self._key is None else self._key

    @property
    def count(self) -> int:
        """Live units of the namespace, this transaction's changes included."""
        key = self.namespace
        held = self._count - self._others if key == 0 else self._own + self._changed.get(key, 0)
        return held - self._gone()[1]

    @property
    def most(self) -> int:
        """At least :attr:`total`, known without a look: units that have expired count until they are deleted."""
        return self._count

    @property
    def total(self) -> int:
        """Live units of the file, this transaction's changes included."""
        return self._count - self._gone()[0]

    def _gone(self) -> tuple[int, int]:
        """How many units of the file, and of the namespace, have expired and are not deleted."""
        if self._expired is None:
            sql = "SELECT count(*), ifnull(sum(ns = ?), 0) FROM units WHERE expires_at <= ?"
            self._expired = self._run(sql, (self.namespace, self._clock()))[0]
        return self._expired

    @property
    def limits(self) -> Limits:
        """Of the namespace, as they were when they were first read or last set in this transaction."""
        if self._limits is None:
            rows = self._run("SELECT max_units, default_ttl FROM namespaces WHERE key = ?", (self.namespace,))
            self._limits = Limits(*rows[0]) if rows else Limits()
        return self._limits

    def set_limits(self, max_units: int | None, default_ttl: float | None) -> None:
        """Set both limits of the namespace."""
        key = self._made()
        if key == 0:
            self._run("INSERT OR IGNORE INTO namespaces (key, path) VALUES (0, '[]')", ())
        self._run("UPDATE namespaces SET max_units = ?, default_ttl = ? WHERE key = ?", (max_units, default_ttl, key))
        self._limits = None

    def delete_namespace(self) -> int:
        """Delete the namespace, its units and limits; returns the number of units."""
        removed = self.clear()
        self._limits = None
        key = self.namespace
        if self._operation is None or key == 0:
            self._changed.pop(key, None)
            self._run("DELETE FROM namespaces WHERE key = ?", (key,))
        else:  # the history needs its key
            self._run("UPDATE namespaces SET max_units = NULL, default_ttl = NULL WHERE key = ?", (key,))
            if not removed:  # no operation says that it was deleted
                self._run("UPDATE namespaces SET next_auto = 0 WHERE key = ?", (key,))
                self._next = 0
        self._run("DELETE FROM meta WHERE key = ?", (f"management_history/{key}",))
        self._key = 0 if key == 0 else None if self._operation is None else self._key
        return removed

    def expire(self, unit_id: str, expires_at: float | None) -> bool:
        """Set when a live unit expires."""
        if self.find(unit_id) is None or self._last is None:
            return False
        self._run("UPDATE units SET expires_at = ? WHERE slot = ?", (expires_at, self._last.slot))
        self._log_edit(self._last)
        return True

    def drop_expired(self, limit: int) -> int:
        """Remove at most ``limit`` units that have expired, of all namespaces; returns their number."""
        sql = "SELECT ns, id FROM units WHERE expires_at <= ? ORDER BY expires_at LIMIT ?"
        rows = self._run(sql, (self._clock(), limit))
        for ns, unit_id in rows:
            self.drop_from(ns, unit_id)
        return len(rows)

    def drop_from(self, ns: int, unit_id: str, now: float = -math.inf) -> bool:
        """Remove a unit of any namespace unless it has expired by ``now``, and its access figures; False for none."""
        removed = self._remove(unit_id, ns, now)
        if removed:
            self._run("DELETE FROM access WHERE ns = ? AND id = ?", (ns, unit_id))
        return removed

    def find(self, unit_id: str, known: tuple[bytes, MemoryUnit] | None = None) -> Stored | None:
        """The live unit of that id, or None.

        known: its JSON text and the unit as they were before; the text is not parsed again where it is the same.
        """
        found = self._read(unit_id)
        if found is None or (found.expires_at is not None and found.expires_at <= self._clock()):
            return None
        unit = known[1] if known is not None and known[0] == found.raw else read_unit(found.raw, unit_id)
        self._last = found._replace(unit=unit)
        return Stored(found.slot, unit, found.expires_at)

    def _read(self, unit_id: str) -> _Found | None:
        rows = self._run(_FIND, (self.namespace, unit_id))
        return _Found(unit_id, self._seq, *rows[0]) if rows else None

    def _found(self, unit_id: str) -> _Found | None:
        """A unit, expired or not; not read again where nothing changed since :meth:`find`."""
        if self._last is not None and self._last[:2] == (unit_id, self._seq):
            return self._last
        return self._read(unit_id)

    def _enter_space(self) -> None:
        if not self._space:
            self._key = 0
            return
        rows = self._run("SELECT key, next_auto, count FROM namespaces WHERE path = ?", (path_text(self._space),))
        self._key, self._next, self._own = rows[0] if rows else (None, 0, 0)

    def _made(self) -> int:
        if self._key is None:
            rows = self._run("INSERT INTO namespaces (path) VALUES (?) RETURNING key", (path_text(self._space),))
            self._key = int(rows[0][0])
        return self._key

    def put(
        self,
        unit: NewUnit,
        vector: bytes,
        unit_id: str,
        expires_at: float | None = None,
        instead: Callable[[], NewUnit] | None = None,
    ) -> int:
        """Store a row version and return its new slot; a live unit of the same id is replaced.

        vector: ``dim`` little-endian float32, kept as given. unit: a JSON object; its ``id`` becomes ``unit_id``.
        instead: gives the unit that is stored where there is one to replace. Raises InvalidUnitError,
        InvalidVectorError (DimensionMismatchError).
        """
        made = self._checked(unit, vector, unit_id).json
        ns, slot, sums = self._made(), self._slot + 1, zlib.crc32(vector)
        known = self._last is not None and self._last[:2] == (unit_id, self._seq)
        try:
            if not known:
                self._raw(_ADD_UNIT, (slot, unit_id, made, crc_of(made), sums, ns, expires_at, self._seq + 1))
        except apsw.ConstraintError:
            known = True
        except SQLITE_ERRORS as error:
            raise noted(error, self._path, self._con) from error
        if known:
            made = made if instead is None else named_unit(instead(), unit_id).json
            self._remove(unit_id, ns, kind=history.REPLACED)
            slot = self._slot + 1
            self._run(_ADD_UNIT, (slot, unit_id, made, crc_of(made), sums, ns, expires_at, self._seq + 1))
        self._run(_ADD_VECTOR, (slot, vector))
        self._absent.discard(unit_id)
        self._slot = slot
        self._counted(1, ns)
        self._backlog += 1
        self._log(Op.PUT, slot, ns, unit_id, *_NO_OLD_VERSION)
        self._reserve(unit_id)
        return slot

    def put_many(self, rows: Iterable[NewRow]) -> None:
        """Store many rows in order, as :meth:`put` would one by one, in memory for a thousand at a time.

        Their texts must be those that ``text_of`` gives: some are made again from the units.
        """
        chunk: dict[str, _Checked] = {}
        for unit, text, vector, unit_id, *expiry in rows:
            made = self._checked(unit, vector, unit_id)
            _refuse_surrogates(text, "the text of", unit_id)
            if unit_id in chunk or len(chunk) == _CHUNK:
                self._put_chunk(chunk)
                chunk = {}
            chunk[unit_id] = (made.json, text, vector, expiry[0] if expiry else None, made.kind, made.tags)
        if chunk:
            self._put_chunk(chunk)

    def edit(self, unit_id: str, unit: NewUnit, expires_at: float | None = None) -> bool:
        """Change the unit in place: its slot, vector and keyword text stay. False when there is no such unit.

        The caller makes sure that its text is still the same.
        """
        found = self._found(unit_id)
        if found is None:
            return False
        new, slot = named_unit(unit, unit_id), found.slot
        sql = "UPDATE units SET unit = ?, unit_crc = ?, expires_at = ? WHERE slot = ?"
        self._run(sql, (new.json, crc_of(new.json), expires_at, slot))
        if slot <= self._folded:
            old = read_unit(found.raw, unit_id) if found.unit is None else found.unit
            if _labels_of(old) != (new.kind, new.tags):
                self._guarded(drop_terms, slot, _text(found.raw))
                self._guarded(add_terms, slot, new.json)
        self._log_edit(found)
        return True

    def drop(self, unit_id: str) -> bool:
        """Remove the unit, and its access figures; False when there is none."""
        return self.drop_from(self.namespace, unit_id, self._clock())

    def drop_many(self, ids: Iterable[str]) -> int:
        """Remove the units that exist and return their number."""
        return sum(self.drop(unit_id) for unit_id in ids)

    def clear(self) -> int:
        """Remove every unit and return their number, with one log entry where there are no other namespaces.

        Slots and sequence numbers go on. With a history each unit has a number of its own, and the log begins again at
        the last one: nothing before it is needed to follow a store that is empty.
        """
        if self._others or self.namespace != 0:
            return self._clear_namespace(self.namespace)
        removed = self._count
        if not removed:
            return 0
        if self._operation is not None:
            self._run(history.ADD_CLEARED, (self._seq, *self._stamp()))
            self._seq += removed
            self._run("UPDATE changes SET op = ? WHERE seq = ?", (Op.CLEAR, self._seq))
            self.purge(self._seq - 1)
        else:
            self._run(f"DELETE FROM vectors WHERE slot NOT IN ({history.OLD_SLOTS})", ())
            self._log(Op.CLEAR, self._slot)
        self._run("DELETE FROM units; DELETE FROM access", ())
        self._guarded(forget_all)
        self._count, self._backlog, self._folded = 0, 0, self._slot
        return removed

    def _clear_namespace(self, ns: int) -> int:
        """Remove every unit of a namespace; the log has an entry for each."""
        if self._operation is not None:
            self._run(f"{history.ADD_CLEARED} WHERE ns = ?5", (self._seq, *self._stamp(), ns))
        else:
            self._run(_LOG_CLEARED, (self._seq, ns))
            self._run("DELETE FROM vectors WHERE slot IN (SELECT slot FROM units WHERE ns = ?)", (ns,))
        stale = len(self._run(_ADD_STALE_OF, (ns, self._folded)))
        removed = len(self._run("DELETE FROM units WHERE ns = ? RETURNING 1", (ns,)))
        self._run("DELETE FROM access WHERE ns = ?", (ns,))
        self._backlog += stale - (removed - stale)
        self._seq += removed
        self._counted(-removed, ns)
        self._expired = None
        return removed

    def next_auto_id(self) -> str:
        """A fresh id ``unit_<n>``: never one that exists, never one handed out by a committed transaction before."""
        return self.next_auto_ids(1)[0]

    def next_auto_ids(self, count: int) -> list[str]:
        """As :meth:`next_auto_id`, so many at once."""
        found: list[str] = []
        while len(found) < count:
            first = self._auto if self.namespace == 0 else self._next
            names = [f"unit_{first + i}" for i in range(min(count - len(found), _CHUNK))]
            if self.namespace == 0:
                self._auto += len(names)
            else:
                self._next += len(names)
            taken = set(self.taken(names))
            found += [name for name in names if name not in taken] if taken else names
        return found

    def taken(self, ids: Iterable[str]) -> list[str]:
        """Those of the ids that exist in the namespace, expired or not, in the order of the database."""
        asked = [unit_id for unit_id in ids if unit_id not in self._absent]
        if not asked:
            return []
        if len(asked) == 1:
            rows = self._run("SELECT id FROM units WHERE ns = ? AND id = ?", (self.namespace, asked[0]))
        else:
            sql = "SELECT id FROM units WHERE ns = ? AND id IN (SELECT value FROM json_each(?))"
            rows = self._run(sql, (self.namespace, json.dumps(asked)))
        found = [unit_id for (unit_id,) in rows]
        self._absent.update(asked)
        self._absent.difference_update(found)
        return found

    def get_meta(self, key: str) -> bytes | None:
        """The named value, this transaction's changes included."""
        rows = self._run("SELECT value FROM meta WHERE key = ?", (key,))
        return rows[0][0] if rows and isinstance(rows[0][0], bytes) else None

    def set_meta(self, key: str, value: bytes) -> None:
        """Store a small named value in the same file."""
        _refuse_surrogates(key, "meta key", key)
        self._run("INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, value))

    def delete_meta(self, key: str) -> None:
        """Remove a named value."""
        self._run("DELETE FROM meta WHERE key = ?", (key,))

    def merge_pending(self) -> None:
        """Bring the keyword and terms indexes up to every row now. Raises NewerSchemaError, see ``fulltext_buffer``."""
        self._guarded(merge_pending, self._path, self._folded, self._text_of)
        self._folded, self._backlog = self._slot, 0

    def finish(self) -> None:
        """Write the counters; ``Records.write()`` calls this before it commits."""
        if self._is_due(0):
            self.merge_pending()
        for key, change in self._changed.items():
            self._run("UPDATE namespaces SET count = count + ? WHERE key = ?", (change, key))
            self._own += change if key == self.namespace else 0
        self._changed = {}
        if self._operation is None and self._seq != self.head.last_seq:
            self._run(history.MOVE_FLOOR, (self._seq, self._clock()))
        if self.namespace > 0:
            self._run("UPDATE namespaces SET next_auto = ? WHERE key = ?", (self._next, self.namespace))
        now = (
            self._seq, self._horizon, self._slot, self._count, self._auto, self._folded, self._backlog, self._others
        )  # fmt: skip
        if now != self._before or (self._con is not None and self._con.total_changes() != self._changes):
            self._run(_KEEP, (*now, self.link))

    def purge(self, upto_seq: int) -> int:
        """Forget the log entries up to ``upto_seq``, record the horizon, and return how many went."""
        horizon = min(upto_seq, self._seq)
        if horizon <= self._horizon:
            return 0
        sql = "DELETE FROM changes WHERE seq <= min(?, (SELECT seq FROM history_floor)) AND operation IS NULL"
        self._run(sql, (horizon,))
        removed, self._horizon = horizon - self._horizon, horizon
        return removed

    def read(self, act: Callable[[apsw.Connection], T]) -> T:
        """What ``act`` reads, this transaction's rows included; for what needs the counters too use :meth:`outside`."""
        return self._guarded(act)

    def outside(self, act: Callable[[apsw.Connection], T]) -> T:
        """Let ``act`` change the tables, counters included, inside this transaction."""
        self.finish()
        result = self._guarded(act)
        self._guarded(self._load)
        return result

    def end(self) -> None:
        """Make every later call raise StorageError."""
        self._con = None

    def _counted(self, by: int, ns: int) -> None:
        self._count += by
        if ns:
            self._others += by
            self._changed[ns] = self._changed.get(ns, 0) + by

    def _log(self, op: int, slot: int, *of_unit: object) -> None:
        """Note a change. of_unit: namespace, id and the old version, which are kept where there is a history."""
        self._seq += 1
        kept = _NO_HISTORY if self._operation is None else (*self._stamp(), *of_unit)
        self._run(history.ADD, (self._seq, op, slot, *kept))

    def _log_edit(self, old: _Found) -> None:
        self._log(Op.EDIT, old.slot, self.namespace, old.unit_id, old.since, old.expires_at, old.crc, None, old.raw)

    def _stamp(self) -> tuple[int | None, str | None, float | None]:
        """First change, kind and Unix time of the operation; None without a history."""
        if self._operation is None:
            return None, None, None
        if self._at is None:
            self._at = max(self._clock(), self._newest)
        return self.head.last_seq + 1, self._operation, self._at

    def _remove(self, unit_id: str, ns: int, now: float = -math.inf, kind: int = Op.DROP) -> bool:
        """Remove a unit unless it has expired by ``now``. kind: of the row in the history."""
        rows = self._run(_DELETE, (ns, unit_id, now))
        if not rows:
            return False
        slot, *old = rows[0]
        if self._operation is None:
            self._run("DELETE FROM vectors WHERE slot = ?", (slot,))
        if slot <= self._folded:
            self._run(_ADD_STALE, (slot, _text(old[-1]), ns))
        self._backlog += 1 if slot <= self._folded else -1
        self._counted(-1, ns)
        self._expired = None
        self._log(kind, slot, ns, unit_id, *old)
        return True

    def _load(self, con: apsw.Connection) -> None:
        *numbers, self._held, most, ttl, self._newest = first_row(con, _COUNTERS)
        self._limits = None if self._space else Limits(most, ttl)
        self._last, self._absent = None, set()
        self._before = checked_counters(numbers)
        (
            self._seq, self._horizon, self._slot, self._count, self._auto, self._folded, self._backlog, self._others
        ) = self._before  # fmt: skip

    def _put_chunk(self, chunk: dict[str, _Checked]) -> None:
        ns = self._made()
        for unit_id in self.taken(chunk):
            self._remove(unit_id, ns, kind=history.REPLACED)
        merges = self._is_due(len(chunk))
        if merges and self._backlog:
            self.merge_pending()
        slots, behind = range(self._slot + 1, self._slot + 1 + len(chunk)), self._seq - self._slot
        rows = list(chunk.values())
        self._many(
            _ADD_UNIT,
            (
                (slot, unit_id, made, crc_of(made), zlib.crc32(vector), ns, expires_at, slot + behind)
                for slot, unit_id, (made, _, vector, expires_at, *_) in zip(slots, chunk, rows, strict=True)
            ),
        )
        self._many(_ADD_VECTOR, ((slot, vector) for slot, (_, _, vector, *_) in zip(slots, rows, strict=True)))
        self._run(history.ADD_NEW, (behind, self._slot, *self._stamp()))
        self._slot, self._seq = slots[-1], slots[-1] + behind
        self._counted(len(rows), ns)
        if merges:
            words = [(slot, text, *labels) for slot, (_, text, _, _, *labels) in zip(slots, rows, strict=True)]
            self._guarded(index_rows, self._path, ns, words)
            self._folded = self._slot
        else:
            self._backlog += len(rows)
        self._absent.difference_update(chunk)
        for unit_id in chunk:
            self._reserve(unit_id)

    def _is_due(self, more: int) -> bool:
        """Would so many more notes make the transaction merge? Never an index that another tokenizer made."""
        return self._backlog + more >= FOLD_AT and self._guarded(tokenizer_of).partition(" ")[0] == TOKENIZER

    def _checked(self, unit: NewUnit, vector: object, unit_id: object) -> EncodedUnit:
        if not isinstance(unit_id, str) or not unit_id:
            raise InvalidUnitError(f"id must be a string that is not empty, not {unit_id!r}")
        if not isinstance(vector, bytes):
            raise InvalidVectorError(f"vector must be bytes of {self._dim} float32, not {type(vector).__name__}")
        if len(vector) != 4 * self._dim:
            raise DimensionMismatchError(
                self._dim, len(vector) // 4, f"the vector of {unit_id!r} has {len(vector)} bytes"
            )
        return named_unit(unit, unit_id)

    def _reserve(self, unit_id: str) -> None:
        if unit_id.startswith("unit_"):
            match = _AUTO_ID.fullmatch(unit_id)
            if match and self.namespace == 0:
                self._auto = max(self._auto, int(match[1]) + 1)
            elif match:
                self._next = max(self._next, int(match[1]) + 1)

    def _raw(self, sql: str, parameters: apsw.Bindings) -> list[SqlRow]:
        if self._con is None:
            raise StorageError("the transaction has ended; open another with write()")
        return self._con.execute(sql, parameters).fetchall()

    def _run(self, sql: str, parameters: apsw.Bindings) -> list[SqlRow]:
        try:
            return self._raw(sql, parameters)
        except SQLITE_ERRORS as error:
            raise noted(error, self._path, self._con) from error
        except UnicodeEncodeError:
            return []  # an id that UTF-8 cannot hold is the id of nothing here

    def _many(self, sql: str, rows: Iterable[apsw.Bindings]) -> None:
        self._guarded(lambda con: con.executemany(sql, rows))

    def _guarded(self, act: Callable[..., T], *arguments: object) -> T:
        if self._con is None:
            raise StorageError("the transaction has ended; open another with write()")
        try:
            return act(self._con, *arguments)
        except SQLITE_ERRORS as error:
            raise noted(error, self._path, self._con) from error


def named_unit(unit: NewUnit, unit_id: str) -> EncodedUnit:
    """The unit with this ``id`` and its JSON text. Raises as :func:`encode_unit`."""
    if not isinstance(unit, EncodedUnit):
        return EncodedUnit(encode_unit(unit, unit_id), unit_id, *_labels_of(unit))
    if unit.unit_id == unit_id:
        return unit
    if unit.unit_id != NO_ID:
        return named_unit(json.loads(unit.json), unit_id)._replace(dated=unit.dated)
    _refuse_surrogates(unit_id, "the id", unit_id)
    rest = f"{unit.json[:-1]}," if unit.json != "{}" else "{"
    return EncodedUnit(f'{rest}"id":{json_text(unit_id)}}}', unit_id, unit.kind, unit.tags, unit.dated)


def encode_unit(unit: MemoryUnit, unit_id: str) -> str:
    """The JSON text of a unit, its ``id`` set to ``unit_id``. Raises InvalidUnitError for what JSON cannot hold."""
    if unit.get("id") != unit_id:
        unit = {**unit, "id": unit_id}
    try:
        text = json_text(unit)
    except RecursionError as error:
        raise InvalidUnitError(f"unit {unit_id!r} is nested more than {MAX_NESTING} levels deep; flatten it") from error
    except (TypeError, ValueError) as error:
        raise InvalidUnitError(f"unit {unit_id!r} cannot be written as JSON: {error}") from error
    _refuse_surrogates(text, "unit", unit_id)
    if text.count("{") + text.count("[") > MAX_NESTING and _depth(unit) > MAX_NESTING:
        raise InvalidUnitError(f"unit {unit_id!r} is nested more than {MAX_NESTING} levels deep; flatten it")
    return text


def crc_of(text: str) -> int:
    """CRC-32 of a text in UTF-8."""
    return zlib.crc32(text.encode())


def _refuse_surrogates(text: str, what: str, name: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        why = f"is not valid Unicode ({error.reason}); remove lone surrogates"
        raise InvalidUnitError(f"{what} {name!r} {why}") from error


def _depth(value: object) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else ())
        ]
    return depth


def _text(raw: object) -> str:
    """The JSON text of a row that is removed or changed, which a damaged row must allow."""
    return raw.decode(errors="replace") if isinstance(raw, bytes) else ""


def _labels_of(unit: MemoryUnit) -> tuple[Json, Json]:
    """Type and tags; a list of tags as a tuple, which the garbage collector leaves alone."""
    tags = unit.get("tags")
    return unit.get("type"), tuple(tags) if isinstance(tags, list) else tags
