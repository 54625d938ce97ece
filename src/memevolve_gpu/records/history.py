"""The history of changes: what each transaction replaced or removed, kept for a while, and what is read from it.

The log and the history are one table. Each change has a row in ``changes``, written in its transaction. Followers of
the log read its first three columns, after ``counters.horizon``; the others hold the operation and the version that
the change replaced, edited or removed. So nothing is written twice: the version that a change made is either alive or
the old one of the next change of that unit. The vector of an old version stays in ``vectors``, under its slot.

The index by unit holds no row of a new unit, so that storing one changes a page less. Such a row is found by ``since``,
which units and old versions carry.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple
from zlib import crc32

import apsw

from ..errors import ConflictError, HistoryError
from ..types import MemoryUnit, Op
from .connections import all_rows, first_row
from .damage import read_unit
from .filters import Filter, matches

REPLACED = 5
"""For ``Op.DROP``, where the next change of the unit in the same transaction stores a new version."""

ERASED = -1
"""``since`` of a row whose content was erased."""

ALL_SPACES = -1
"""The namespace of an operation that changes units of several."""

CHANGES_TABLE = """
CREATE TABLE changes (                  -- the log and the history, one row for each change
    seq INTEGER PRIMARY KEY,
    op INTEGER NOT NULL,                -- 1 put, 2 drop, 3 edit, 4 clear, 5 drop before a put of the same unit
    slot INTEGER NOT NULL,              -- that came, went or was edited
    operation INTEGER,                  -- the first change of its transaction; NULL from here on without a history
    kind TEXT,                          -- of the operation
    at REAL,                            -- its Unix time, never before that of the operation before it
    ns INTEGER,
    id TEXT,                            -- NULL where it was erased
    since INTEGER,                      -- the change that put the old version there; 0: see the index, -1: erased
    expires_at REAL,                    -- of the version that the change replaced, edited or removed, as in units
    unit_crc INTEGER,
    vector_crc INTEGER,
    unit TEXT
) STRICT;
CREATE INDEX changes_units ON changes (ns, id) WHERE since IS NOT NULL
"""

ADD = "INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, CAST(? AS TEXT))"
ADD_NEW = f"""
INSERT INTO changes (seq, op, slot, operation, kind, at, ns, id)
SELECT slot + ?1, {Op.PUT}, slot, ?3, ?4, ?5, iif(?3 IS NULL, NULL, ns), iif(?3 IS NULL, NULL, id)
FROM units WHERE slot > ?2
"""
ADD_CLEARED = f"""
INSERT INTO changes SELECT ?1 + row_number() OVER (ORDER BY slot), {Op.DROP}, slot, ?2, ?3, ?4, ns, id,
    ifnull(since, 0), expires_at, unit_crc, vector_crc, CAST(unit AS TEXT)
FROM units
"""
FORGET = "since = {}, expires_at = NULL, unit_crc = NULL, vector_crc = NULL, unit = NULL"
OLD = f"op <> {Op.PUT} AND since >= 0"
"""The condition on a row that it holds an old version."""

OLD_SLOTS = f"SELECT slot FROM changes WHERE {OLD} AND op <> {Op.EDIT}"
"""Slots of versions that are gone, whose vectors are kept; an edit leaves the slot to the unit."""

_DROP_NAMESPACES = """
DELETE FROM namespaces WHERE key > 0 AND count = 0 AND max_units IS NULL AND default_ttl IS NULL AND (
    next_auto = 0 OR key IN (
        SELECT ns FROM (SELECT ns, kind, max(seq) FROM changes WHERE seq <= ?1 AND ns > 0 GROUP BY ns)
        WHERE kind = 'delete_namespace'
    )
) AND NOT EXISTS (SELECT 1 FROM changes AS h WHERE h.since IS NOT NULL AND h.ns = key AND h.seq > ?1)
"""
"""Those whose deletion the history is about to forget, and that nothing came after; one that is only empty stays, for
the number of its next automatic id."""

MOVE_FLOOR = "UPDATE history_floor SET seq = max(seq, ?1), feed = max(feed, ?1), at = max(at, ?2)"

_KINDS = {Op.PUT: "put", Op.EDIT: "edit", Op.DROP: "delete", Op.CLEAR: "delete"}
_SCOPE = f"iif(o.kind IN ('sweep', 'forget_subject'), {ALL_SPACES}, o.ns)"
_FLOOR = "(SELECT seq FROM history_floor)"
_END = """ifnull(
    (SELECT n.seq - 1 FROM changes AS n WHERE n.seq > o.seq AND n.operation <> o.seq ORDER BY n.seq LIMIT 1),
    (SELECT last_seq FROM counters))"""


def of_units(theirs: str) -> str:
    """A query for the numbers of all changes of the units that meet a condition on ``ns`` and ``id``."""
    return f"""
        SELECT seq FROM changes WHERE since IS NOT NULL AND {theirs}
        UNION SELECT since FROM changes WHERE since IS NOT NULL AND {theirs}
        UNION SELECT since FROM units WHERE {theirs}
        """


class Floor(NamedTuple):
    """Where the history begins: as in the table."""

    seq: int
    feed: int
    at: float


class OperationRow(NamedTuple):
    """An operation: its number, kind, Unix time, namespace and number of changes."""

    seq: int
    kind: str
    at: float
    ns: int
    changes: int


class VersionRow(NamedTuple):
    """One change of a unit, and the unit after it; seq 0 and no operation for the version from before the history."""

    seq: int
    change: str
    operation: int | None
    kind: str
    at: float | None
    unit: MemoryUnit | None


class ChangeRow(NamedTuple):
    """One change, and the unit after it."""

    seq: int
    change: str
    unit_id: str
    ns: int
    unit: MemoryUnit | None


class Step(NamedTuple):
    """What takes back the changes of one unit: unit is None where there was none; vector is None where it stayed."""

    unit_id: str
    unit: MemoryUnit | None
    vector: bytes | None
    expires_at: float | None


def floor_of(con: apsw.Connection) -> Floor:
    """Where the history begins."""
    return Floor._make(first_row(con, "SELECT seq, feed, at FROM history_floor"))


def operations(con: apsw.Connection, ns: int, limit: int, before: int = 2**62) -> list[OperationRow]:
    """The newest ``limit`` operations of a namespace below number ``before``, newest first."""
    sql = f"""
        SELECT o.seq, o.kind, o.at, {_SCOPE}, (SELECT count(*) FROM changes AS h WHERE h.op <> {REPLACED}
            AND h.ns = ?1 AND h.id IS NOT NULL AND h.seq BETWEEN o.seq AND {_END})
        FROM changes AS o WHERE o.operation = o.seq AND {_SCOPE} IN (?1, {ALL_SPACES})
        AND o.seq > {_FLOOR} AND o.seq < ?2 ORDER BY o.seq DESC LIMIT ?3
        """
    return [OperationRow._make(row) for row in all_rows(con, sql, (ns, before, limit))]


def versions(con: apsw.Connection, ns: int, unit_id: str) -> list[VersionRow]:
    """Every version of a unit, oldest first. Call inside a read transaction."""
    sql = f"""
        SELECT seq, op, since, CAST(unit AS BLOB), operation, kind, at FROM changes
        WHERE seq IN ({of_units("ns = ?1 AND id = ?2")}) AND ns = ?1 AND id = ?2 AND seq > {_FLOOR} ORDER BY seq
        """
    found: list[VersionRow] = []
    for seq, op, since, raw, operation, name, at in all_rows(con, sql, (ns, unit_id)):
        old = None if raw is None else read_unit(raw, unit_id)
        if op != Op.PUT and since != ERASED:
            if not found:
                found.append(VersionRow(0, "put", None, "", None, old))
            elif found[-1].change in ("put", "edit"):
                found[-1] = found[-1]._replace(unit=old)
        change = "erased" if since == ERASED else _KINDS.get(op)
        if change is not None:
            found.append(VersionRow(seq, change, operation, name or "", at, None))
    live = all_rows(con, "SELECT CAST(unit AS BLOB) FROM units WHERE ns = ? AND id = ?", (ns, unit_id))
    if live and found:
        found[-1] = found[-1]._replace(unit=read_unit(live[0][0], unit_id))
    elif live:
        found.append(VersionRow(0, "put", None, "", None, read_unit(live[0][0], unit_id)))
    return found


def moment_of(con: apsw.Connection, seq: int | None, at: float | None) -> tuple[int, float]:
    """The newest change and the Unix time of a past state, given by one of them. Raises HistoryError."""
    floor, last = floor_of(con), first_row(con, "SELECT last_seq FROM counters")[0]
    if seq is not None:
        if not floor.seq <= seq <= last:
            raise HistoryError(
                f"as_of={seq} is outside the history, which holds the states from change {floor.seq} to {last}; "
                "a Unix time is given as a float"
            )
        rows = all_rows(con, "SELECT at FROM changes WHERE seq <= ? ORDER BY seq DESC LIMIT 1", (seq,))
        return seq, rows[0][0] if rows and rows[0][0] is not None else floor.at
    if at is None or at < floor.at:
        raise HistoryError(
            f"as_of={at} is before the history, which begins at Unix time {floor.at:.3f}; see HISTORY_DAYS"
        )
    return max(floor.seq, _last_change(con, at, bisect_right)), at


def _last_change(con: apsw.Connection, at: float, bisect: Callable[..., int]) -> int:
    """The last change of the operations from before a Unix time, and for ``bisect_right`` from that time too."""
    sql = "SELECT at FROM changes WHERE seq >= ? AND at IS NOT NULL ORDER BY seq LIMIT 1"

    def time_of(seq: int) -> float:
        rows = all_rows(con, sql, (seq,))
        return rows[0][0] if rows else math.inf

    first, last = first_row(con, "SELECT ifnull((SELECT min(seq) FROM changes), 1), last_seq FROM counters")
    return int(first - 1 + bisect(range(first, last + 1), at, key=time_of))


def units_at(
    con: apsw.Connection, ns: int, moment: tuple[int, float], filters: Filter, unit_id: str | None = None
) -> list[MemoryUnit]:
    """The units of a namespace, or that of one id, as of a moment, by slot. Call inside a read transaction."""
    seq, at = moment
    one = "" if unit_id is None else "AND u.id = ?4"
    later = "SELECT 1 FROM changes AS h WHERE h.since IS NOT NULL AND h.ns = ?1 AND h.id = u.id AND h.seq > ?2"
    sql = f"""
        SELECT slot, id, CAST(unit AS BLOB) FROM (
            SELECT u.slot, u.id, u.unit, u.expires_at FROM units AS u WHERE u.ns = ?1 {one}
            AND ifnull(u.since, 0) <= ?2 AND NOT EXISTS ({later})
            UNION ALL
            SELECT u.slot, u.id, u.unit, u.expires_at FROM changes AS u WHERE u.ns = ?1 {one} AND u.seq > ?2
            AND u.since IS NOT NULL AND u.since <= ?2 AND u.unit IS NOT NULL AND NOT EXISTS ({later} AND h.seq < u.seq)
        ) WHERE ifnull(expires_at > ?3, 1) ORDER BY slot
        """
    bound = (ns, seq, at) if unit_id is None else (ns, seq, at, unit_id)
    found = (read_unit(raw, name) for _, name, raw in all_rows(con, sql, bound))
    return [unit for unit in found if matches(filters, unit)]


def changes(con: apsw.Connection, after: int, limit: int, spaces: Sequence[int] | None) -> list[ChangeRow]:
    """At most ``limit`` changes after number ``after``, in order; of these namespaces, or of all.

    Raises HistoryError where some are no longer kept. Call inside a read transaction.
    """
    floor, last = floor_of(con), first_row(con, "SELECT last_seq FROM counters")[0]
    least = max(floor.seq, floor.feed)
    if after < least:
        raise HistoryError(
            f"after={after} is older than the changes that are kept, those after {least}; read the store again, and go "
            "on from its change_number"
        )
    if after > last:
        raise HistoryError(f"after={after} is beyond the newest change, {last}; is it a number of another store?")
    sql = f"""
        SELECT h.seq, h.op, h.id, h.ns, CASE WHEN h.op IN ({Op.PUT}, {Op.EDIT}) THEN CAST(ifnull(
            (SELECT n.unit FROM changes AS n WHERE n.since IS NOT NULL AND n.ns = h.ns AND n.id = h.id
                AND n.seq > h.seq ORDER BY n.seq LIMIT 1),
            (SELECT u.unit FROM units AS u WHERE u.ns = h.ns AND u.id = h.id)) AS BLOB) END
        FROM changes AS h WHERE h.seq > ? AND h.op <> {REPLACED} AND h.since IS NOT {ERASED}
        AND (? IS NULL OR h.ns IN (SELECT value FROM json_each(?2))) ORDER BY h.seq LIMIT ?
        """
    bound = (after, None if spaces is None else json.dumps(list(spaces)), limit)
    return [
        ChangeRow(seq, _KINDS[op], unit_id, ns, None if raw is None else read_unit(raw, unit_id))
        for seq, op, unit_id, ns, raw in all_rows(con, sql, bound)
    ]


def to_undo(con: apsw.Connection, ns: int, operation: int) -> list[Step]:
    """What takes back an operation of this namespace, a step for each unit.

    Raises HistoryError where there is no such operation, ConflictError where units changed after it.
    """
    sql = f"SELECT {_SCOPE}, {_END} FROM changes AS o WHERE o.seq = ? AND o.operation = o.seq AND o.seq > {_FLOOR}"
    rows = all_rows(con, sql, (operation,))
    if not rows or rows[0][0] != ns:
        why = "there is none of that number" if not rows else "it changed another namespace, or several"
        raise HistoryError(
            f"operation {operation} cannot be undone here: {why}; operations() and history() give those that can"
        )
    last = rows[0][1]
    sql = """
        SELECT DISTINCT h.id FROM changes AS h WHERE h.seq BETWEEN ?1 AND ?2 AND h.id IS NOT NULL AND (
            EXISTS (SELECT 1 FROM changes AS n
                WHERE n.since IS NOT NULL AND n.ns = h.ns AND n.id = h.id AND n.seq > ?2)
            OR EXISTS (SELECT 1 FROM units AS u WHERE u.ns = h.ns AND u.id = h.id AND u.since > ?2)
        ) ORDER BY h.id
        """
    later = [row[0] for row in all_rows(con, sql, (operation, last))]
    conflicts = _not_as_after(con, ns, last, later) if later else []
    if conflicts:
        raise ConflictError(
            conflicts, f"operation {operation} cannot be undone, its units changed later; undo those changes first"
        )
    return list(_before(con, ns, operation, last).values())


def _not_as_after(con: apsw.Connection, ns: int, last: int, ids: Sequence[str]) -> list[str]:
    """Those units that are not as they were after change ``last``: later changes that were taken back count as none."""
    names = json.dumps(ids)
    then = _before(con, ns, last + 1, 2**62, names)
    sql = """
        SELECT u.id, CAST(u.unit AS BLOB), v.vector, u.expires_at FROM units AS u JOIN vectors AS v ON v.slot = u.slot
        WHERE u.ns = ? AND u.id IN (SELECT value FROM json_each(?))
        """
    now = {name: Step(name, read_unit(raw, name), *rest) for name, raw, *rest in all_rows(con, sql, (ns, names))}
    sql = f"SELECT DISTINCT id FROM changes WHERE ns = ? AND seq > ? AND since = {ERASED}"
    erased = {row[0] for row in all_rows(con, sql, (ns, last))}
    none = Step("", None, None, None)
    same = {one for one in ids if one in then and _equal(then[one], now.get(one, none))}
    return [one for one in ids if one in erased or one not in same]


def _equal(then: Step, now: Step) -> bool:
    """Whether a unit is as it was; then.vector is None where it stayed."""
    if then.vector is None and then.unit is not None:
        then = then._replace(vector=now.vector)
    return then[2:] == now[2:] and json.dumps(then.unit) == json.dumps(now.unit)


def _before(con: apsw.Connection, ns: int, first: int, last: int, names: str | None = None) -> dict[str, Step]:
    """How the units that changed from ``first`` to ``last`` were before; names: a JSON list, None for all."""
    steps: dict[str, Step] = {}
    theirs = f"h.seq IN ({of_units('ns = ?1 AND id IN (SELECT value FROM json_each(?4))')})"
    sql = f"""
        SELECT h.seq, h.op, h.since, h.id, CAST(h.unit AS BLOB), v.vector, h.expires_at, h.unit_crc, h.vector_crc
        FROM changes AS h LEFT JOIN vectors AS v ON v.slot = h.slot AND h.op NOT IN ({Op.PUT}, {Op.EDIT})
        WHERE h.ns = ?1 AND h.seq BETWEEN ?2 AND ?3 AND {"?4 IS NULL" if names is None else theirs} ORDER BY h.seq
        """
    rows = all_rows(con, sql, (ns, first, last, names))
    for seq, op, since, unit_id, raw, vector, expires_at, *sums in rows:
        if since == ERASED:
            continue
        if raw is not None and op != Op.EDIT and vector is None:
            raise apsw.CorruptError(f"the vector of {unit_id!r} from before change {seq} is missing")
        pairs = zip((raw, vector), sums, strict=True)
        if any(held is not None and kept not in (None, crc32(held)) for held, kept in pairs):
            raise apsw.CorruptError(f"the version of {unit_id!r} from before change {seq} changed by itself")
        if unit_id not in steps:
            steps[unit_id] = Step(unit_id, None if raw is None else read_unit(raw, unit_id), vector, expires_at)
        elif steps[unit_id].unit is not None and steps[unit_id].vector is None:
            steps[unit_id] = steps[unit_id]._replace(vector=vector)
    return steps


def oldest(con: apsw.Connection) -> float | None:
    """Unix time of the oldest operation that is kept."""
    rows = all_rows(con, "SELECT at FROM changes WHERE at IS NOT NULL ORDER BY seq LIMIT 1")
    return rows[0][0] if rows else None


def purge(con: apsw.Connection, before: float, limit: int) -> int:
    """Forget operations from before a Unix time, at most ``limit`` of their changes; returns the number of changes."""
    last = _last_change(con, before, bisect_left)
    sql = """
        SELECT max(seq), count(*), max(at) FROM (
            SELECT seq, at FROM changes WHERE seq <= ? AND operation IS NOT NULL ORDER BY seq LIMIT ?)
        """
    reached, count, at = first_row(con, sql, (last, limit))
    if not count:
        return 0
    reached = reached if count == limit else last
    con.execute(_DROP_NAMESPACES, (reached,))
    con.execute(f"DELETE FROM vectors WHERE slot IN ({OLD_SLOTS} AND seq <= ?)", (reached,))
    con.execute("DELETE FROM changes WHERE seq <= min(?, (SELECT horizon FROM counters))", (reached,))
    more = "operation = NULL, kind = NULL, at = NULL, ns = NULL, id = NULL"
    con.execute(
        f"UPDATE changes SET {FORGET.format('NULL')}, {more} WHERE seq <= ? AND operation IS NOT NULL", (reached,)
    )
    con.execute(MOVE_FLOOR, (reached, at))
    return int(count)
