"""The history of changes: what each transaction replaced or removed, kept for a while, and what is read from it.

Every log entry has a row in ``history`` with the same number, written in the same transaction. It holds the version
that the change replaced or removed, so that nothing is written twice: the version that a change made is either alive or
the old one of the next change of that unit. The vector of an old version stays in ``vectors``, under its slot.
``operations`` has a row for each transaction; it goes up to the next one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import apsw

from ..errors import ConflictError, HistoryError
from ..types import MemoryUnit, Op
from .connections import all_rows, first_row
from .damage import read_unit
from .filters import Filter, matches

REPLACED = 5
"""Kind of a row: the version went because the next change of the same transaction is a new one of the unit."""

ERASED = 6
"""Kind of a row whose content was erased."""

ALL_SPACES = -1
"""The namespace of an operation that changes units of several."""

HISTORY_TABLES = """
CREATE TABLE operations (               -- one row for each transaction that changed units
    seq INTEGER PRIMARY KEY,            -- its first log entry; it goes up to the next operation
    kind TEXT NOT NULL,
    at REAL NOT NULL,                   -- Unix time, never before that of the operation before it
    ns INTEGER NOT NULL                 -- key of the namespace, -1 for several
) STRICT;
CREATE TABLE history (                  -- one row for each change
    seq INTEGER PRIMARY KEY,            -- its log entry
    kind INTEGER NOT NULL,              -- as in the log, 5: replaced, 6: erased
    ns INTEGER NOT NULL,
    id TEXT NOT NULL,
    slot INTEGER,                       -- of the version that was replaced or removed; NULL where there was none
    unit TEXT,
    vector BLOB,                        -- only in rows of early files: it stays in vectors, under the slot
    expires_at REAL
) STRICT;
CREATE INDEX history_units ON history (ns, id);
CREATE TABLE history_floor (            -- one row
    one INTEGER PRIMARY KEY CHECK (one = 1),
    seq INTEGER NOT NULL,               -- newest change that the history no longer holds
    feed INTEGER NOT NULL,              -- newest one that the change feed no longer holds, because of an erasure
    at REAL NOT NULL                    -- Unix time of the former
) STRICT
"""

ADD = "INSERT INTO history (seq, kind, ns, id) VALUES (?, ?, ?, ?)"
ADD_NEW = f"""
INSERT INTO history (seq, kind, ns, id) SELECT slot + ?1, {Op.PUT}, ns, id FROM units WHERE slot > ?2
"""
ADD_EDITED = """
INSERT INTO history SELECT ?, ?, ns, id, slot, CAST(unit AS TEXT), NULL, expires_at, unit_crc, NULL
FROM units WHERE slot = ?
"""
ADD_REMOVED = "INSERT INTO history VALUES (?, ?, ?, ?, ?, CAST(? AS TEXT), NULL, ?, ?, ?)"
ADD_CLEARED = f"""
INSERT INTO history SELECT ?1 + row_number() OVER (ORDER BY u.slot), {Op.DROP}, u.ns, u.id, u.slot,
    CAST(u.unit AS TEXT), NULL, u.expires_at, u.unit_crc, u.vector_crc
FROM units AS u {{}}
"""
ADD_OPERATION = """
INSERT OR IGNORE INTO operations
SELECT ?, ?, max(?, ifnull((SELECT at FROM operations ORDER BY seq DESC LIMIT 1), 0)), ?
"""
ERASE = (
    f"kind = {ERASED}, slot = NULL, unit = NULL, vector = NULL, expires_at = NULL, unit_crc = NULL, vector_crc = NULL"
)
OLD_SLOTS = f"SELECT slot FROM history WHERE kind IN ({REPLACED}, {Op.DROP}) AND slot IS NOT NULL"
"""Slots of versions that are gone, whose vectors are kept; an edit leaves the slot to the unit."""

_DROP_NAMESPACES = """
DELETE FROM namespaces WHERE key > 0 AND count = 0 AND max_units IS NULL AND default_ttl IS NULL AND (
    next_auto = 0 OR key IN (
        SELECT ns FROM (SELECT ns, kind, max(seq) FROM operations WHERE seq <= ? AND ns > 0 GROUP BY ns)
        WHERE kind = 'delete_namespace'
    )
) AND NOT EXISTS (SELECT 1 FROM history AS h WHERE h.ns = key)
"""
"""Those whose deletion the history has just forgotten, and that nothing came after; one that is only empty stays, for
the number of its next automatic id."""

MOVE_FLOOR = "UPDATE history_floor SET seq = max(seq, ?1), feed = max(feed, ?1), at = max(at, ?2)"

_KINDS = {Op.PUT: "put", Op.EDIT: "edit", Op.DROP: "delete", ERASED: "erased"}
_END = "ifnull((SELECT n.seq - 1 FROM operations AS n WHERE n.seq > {} ORDER BY n.seq LIMIT 1), {})"
_LAST = "(SELECT last_seq FROM counters)"


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
        SELECT seq, kind, at, ns, (SELECT count(*) FROM history AS h WHERE h.kind <> {REPLACED} AND h.ns = ?1
            AND h.seq BETWEEN o.seq AND {_END.format("o.seq", _LAST)})
        FROM operations AS o WHERE ns IN (?1, {ALL_SPACES}) AND seq > (SELECT seq FROM history_floor) AND seq < ?2
        ORDER BY seq DESC LIMIT ?3
        """
    return [OperationRow._make(row) for row in all_rows(con, sql, (ns, before, limit))]


def versions(con: apsw.Connection, ns: int, unit_id: str) -> list[VersionRow]:
    """Every version of a unit, oldest first. Call inside a read transaction."""
    sql = """
        SELECT h.seq, h.kind, h.slot, CAST(h.unit AS BLOB), o.seq, o.kind, o.at FROM history AS h
        LEFT JOIN operations AS o ON o.seq = (SELECT max(seq) FROM operations WHERE seq <= h.seq)
        WHERE h.ns = ? AND h.id = ? AND h.seq > (SELECT seq FROM history_floor) ORDER BY h.seq
        """
    found: list[VersionRow] = []
    for seq, kind, slot, raw, operation, name, at in all_rows(con, sql, (ns, unit_id)):
        old = None if raw is None else read_unit(raw, unit_id)
        if slot is not None and found and found[-1].change in ("put", "edit"):
            found[-1] = found[-1]._replace(unit=old)
        elif not found and slot is not None:
            found.append(VersionRow(0, "put", None, "", None, old))
        if kind != REPLACED:
            found.append(VersionRow(seq, _KINDS.get(kind, "erased"), operation, name or "", at, None))
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
        rows = all_rows(con, "SELECT at FROM operations WHERE seq <= ? ORDER BY seq DESC LIMIT 1", (seq,))
        return seq, rows[0][0] if rows else floor.at
    if at is None or at < floor.at:
        raise HistoryError(
            f"as_of={at} is before the history, which begins at Unix time {floor.at:.3f}; see HISTORY_DAYS"
        )
    rows = all_rows(con, "SELECT seq - 1 FROM operations WHERE at > ? ORDER BY seq LIMIT 1", (at,))
    return max(floor.seq, rows[0][0] if rows else last), at


def units_at(
    con: apsw.Connection, ns: int, moment: tuple[int, float], filters: Filter, unit_id: str | None = None
) -> list[MemoryUnit]:
    """The units of a namespace, or that of one id, as of a moment, by slot. Call inside a read transaction."""
    seq, at = moment
    one = "" if unit_id is None else "AND u.id = ?4"
    sql = f"""
        SELECT slot, id, CAST(unit AS BLOB) FROM (
            SELECT u.slot, u.id, u.unit, u.expires_at FROM units AS u WHERE u.ns = ?1 {one} AND NOT EXISTS (
                SELECT 1 FROM history AS h WHERE h.ns = ?1 AND h.id = u.id AND h.seq > ?2)
            UNION ALL
            SELECT u.slot, u.id, u.unit, u.expires_at FROM history AS u WHERE u.ns = ?1 {one} AND u.seq > ?2
            AND u.unit IS NOT NULL AND NOT EXISTS (
                SELECT 1 FROM history AS h WHERE h.ns = ?1 AND h.id = u.id AND h.seq > ?2 AND h.seq < u.seq)
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
        SELECT h.seq, h.kind, h.id, h.ns, CASE WHEN h.kind IN ({Op.PUT}, {Op.EDIT}) THEN CAST(ifnull(
            (SELECT n.unit FROM history AS n WHERE n.ns = h.ns AND n.id = h.id AND n.seq > h.seq
                ORDER BY n.seq LIMIT 1),
            (SELECT u.unit FROM units AS u WHERE u.ns = h.ns AND u.id = h.id)) AS BLOB) END
        FROM history AS h WHERE h.seq > ? AND h.kind IN ({Op.PUT}, {Op.EDIT}, {Op.DROP})
        AND (? IS NULL OR h.ns IN (SELECT value FROM json_each(?2))) ORDER BY h.seq LIMIT ?
        """
    bound = (after, None if spaces is None else json.dumps(list(spaces)), limit)
    return [
        ChangeRow(seq, _KINDS[kind], unit_id, ns, None if raw is None else read_unit(raw, unit_id))
        for seq, kind, unit_id, ns, raw in all_rows(con, sql, bound)
    ]


def to_undo(con: apsw.Connection, ns: int, operation: int) -> list[Step]:
    """What takes back an operation of this namespace, a step for each unit.

    Raises HistoryError where there is no such operation, ConflictError where units changed after it.
    """
    sql = f"SELECT ns, {_END.format('o.seq', _LAST)} FROM operations AS o WHERE seq = ? AND seq > ?"
    rows = all_rows(con, sql, (operation, floor_of(con).seq))
    if not rows or rows[0][0] != ns:
        why = "there is none of that number" if not rows else "it changed another namespace, or several"
        raise HistoryError(
            f"operation {operation} cannot be undone here: {why}; operations() and history() give those that can"
        )
    last = rows[0][1]
    sql = """
        SELECT DISTINCT h.id FROM history AS h JOIN history AS n ON n.ns = h.ns AND n.id = h.id AND n.seq > ?2
        WHERE h.seq BETWEEN ?1 AND ?2 ORDER BY h.id
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
    sql = f"SELECT DISTINCT id FROM history WHERE ns = ? AND seq > ? AND kind = {ERASED}"
    erased = {row[0] for row in all_rows(con, sql, (ns, last))}
    return [one for one in ids if one in erased or not _equal(then[one], now.get(one, Step(one, None, None, None)))]


def _equal(then: Step, now: Step) -> bool:
    """Whether a unit is as it was; then.vector is None where it stayed."""
    if then.vector is None and then.unit is not None:
        then = then._replace(vector=now.vector)
    return then[2:] == now[2:] and json.dumps(then.unit) == json.dumps(now.unit)


def _before(con: apsw.Connection, ns: int, first: int, last: int, names: str | None = None) -> dict[str, Step]:
    """How the units that changed from ``first`` to ``last`` were before; names: a JSON list, None for all."""
    steps: dict[str, Step] = {}
    sql = """
        SELECT h.seq, h.kind, h.id, CAST(h.unit AS BLOB), ifnull(h.vector, v.vector), h.expires_at, h.unit_crc,
            h.vector_crc
        FROM history AS h LEFT JOIN vectors AS v ON v.slot = h.slot AND h.kind <> ?1
        WHERE h.ns = ?2 AND h.seq BETWEEN ?3 AND ?4 AND (?5 IS NULL OR h.id IN (SELECT value FROM json_each(?5)))
        ORDER BY h.seq
        """
    for seq, kind, unit_id, raw, vector, expires_at, *sums in all_rows(con, sql, (Op.EDIT, ns, first, last, names)):
        if kind == ERASED:
            continue
        if raw is not None and kind != Op.EDIT and vector is None:
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
    rows = all_rows(con, "SELECT at FROM operations ORDER BY seq LIMIT 1")
    return rows[0][0] if rows else None


def purge(con: apsw.Connection, before: float, limit: int) -> int:
    """Forget operations from before a Unix time, at most ``limit`` of their changes; returns the number of changes."""
    old = all_rows(con, "SELECT seq, at FROM operations WHERE at < ? ORDER BY seq DESC LIMIT 1", (before,))
    if not old:
        return 0
    last = first_row(con, f"SELECT {_END.format('?1', _LAST)}", (old[0][0],))[0]
    sql = "SELECT max(seq), count(*) FROM (SELECT seq FROM history WHERE seq <= ? ORDER BY seq LIMIT ?)"
    reached, count = first_row(con, sql, (last, limit))
    reached = reached if count == limit else last
    at = first_row(con, "SELECT max(at) FROM operations WHERE seq <= ?", (reached,))[0]
    con.execute(f"DELETE FROM vectors WHERE slot IN ({OLD_SLOTS} AND seq <= ?)", (reached,))
    con.execute("DELETE FROM history WHERE seq <= ?", (reached,))
    con.execute(_DROP_NAMESPACES, (reached,))
    con.execute(f"DELETE FROM operations WHERE {_END.format('operations.seq', _LAST)} <= ?", (reached,))
    con.execute(MOVE_FLOOR, (reached, old[0][1] if at is None else at))
    return int(count)
