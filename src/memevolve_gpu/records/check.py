"""Verify and repair a store. Each probe finds one kind of disagreement between its tables; some can repair it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import apsw
import numpy as np

from ..types import IntArray, Op
from . import fulltext_buffer
from .connections import all_rows, first_row
from .fulltext_buffer import TextOf, default_text, terms_of_folded
from .history import ERASED, FORGET, OLD, OLD_SLOTS, REPLACED
from .transaction import AUTO_LIMIT


@dataclass(frozen=True, slots=True)
class Finding:
    """One disagreement. code: a stable word for programs; message: what it means; fixed: whether it was repaired."""

    code: str
    message: str
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class _Case:
    con: apsw.Connection
    dim: int
    text_of: TextOf


@dataclass(frozen=True, slots=True)
class _Probe:
    code: str
    look: Callable[[_Case], str | None]
    mend: Callable[[_Case], None] | None = None


def examine(con: apsw.Connection, dim: int) -> list[Finding]:
    """Every disagreement, changing nothing. Call inside a read transaction."""
    case = _Case(con, dim, default_text)
    return [Finding(probe.code, message) for probe in _PROBES if (message := _look(probe, case))]


def repair(con: apsw.Connection, dim: int, text_of: TextOf) -> list[Finding]:
    """Every disagreement, repaired where possible. Call inside a write transaction.

    After a repair the log starts again behind its horizon, so that every index reloads.
    """
    case = _Case(con, dim, text_of)
    findings = []
    for probe in _PROBES:
        message = _look(probe, case)
        if message is None:
            continue
        trouble = "" if probe.mend is None else _mend(probe.mend, case)
        findings.append(Finding(probe.code, message + trouble, fixed=_look(probe, case) is None))
    if any(finding.fixed and finding.code != "damaged_versions" for finding in findings):
        _restart_log(case)
    return findings


def _look(probe: _Probe, case: _Case) -> str | None:
    try:
        return probe.look(case)
    except (apsw.CorruptError, apsw.SQLError, UnicodeDecodeError, ValueError, TypeError, OverflowError) as error:
        return f"the check {probe.code} could not be made: {error}"


def _mend(mend: Callable[[_Case], None], case: _Case) -> str:
    """Repair completely or not at all; returns why it failed, or ""."""
    case.con.execute("SAVEPOINT mend")
    try:
        mend(case)
    except (apsw.CorruptError, apsw.ConstraintError, apsw.SQLError) as error:
        case.con.execute("ROLLBACK TO mend")
        return f"; mending failed: {error}"
    finally:
        case.con.execute("RELEASE mend")
    return ""


# -- the file ---------------------------------------------------------------------------------------------------------


def _file(case: _Case) -> str | None:
    # A query makes FTS5 see what other connections changed; the integrity check alone would compare old with new.
    with suppress(apsw.CorruptError, apsw.SQLError):
        for table in ("words", "space_words"):
            all_rows(case.con, f"SELECT rowid FROM {table} WHERE {table} MATCH 'a' LIMIT 1")
    rows = [str(row[0]) for row in all_rows(case.con, "PRAGMA integrity_check(20)")]
    return None if rows == ["ok"] else "SQLite finds damage: " + "; ".join(rows)


def _rebuild_indexes(case: _Case) -> None:
    case.con.execute("REINDEX")
    if _file(case) is not None:
        _rebuild_words(case)  # the keyword index is derived too


# -- rows -------------------------------------------------------------------------------------------------------------


def _listed(case: _Case, what: str, sql: str, parameters: tuple[apsw.SQLiteValue, ...] = ()) -> str | None:
    total = first_row(case.con, f"SELECT count(*) FROM ({sql})", parameters)[0]
    if not total:
        return None
    some = [str(row[0]) for row in all_rows(case.con, f"{sql} LIMIT 5", parameters)]
    return f"{total} {what}: {', '.join(some)}{', ...' if total > len(some) else ''}"


def _orphan_vectors(case: _Case) -> str | None:
    return _listed(case, "vectors without a unit, slots", f"SELECT slot FROM vectors WHERE {_NO_UNIT}")


def _drop_orphans(case: _Case) -> None:
    case.con.execute(f"DELETE FROM vectors WHERE {_NO_UNIT}")


_NO_UNIT = f"slot NOT IN (SELECT slot FROM units UNION ALL {OLD_SLOTS})"


def _missing_vectors(case: _Case) -> str | None:
    sql = "SELECT id FROM units WHERE slot NOT IN (SELECT slot FROM vectors)"
    return _listed(case, "units without a vector (store them again), ids", sql)


def _wrong_vectors(case: _Case) -> str | None:
    sql = "SELECT u.id FROM units AS u JOIN vectors AS v ON v.slot = u.slot WHERE length(v.vector) <> ?"
    return _listed(case, "units with a vector of wrong length (store them again), ids", sql, (4 * case.dim,))


def _unreadable_units(case: _Case) -> str | None:
    sql = f"SELECT id FROM units WHERE {_UNREADABLE}"
    return _listed(case, "units that are no JSON objects (store them again, or delete them), ids", sql)


_UNREADABLE = f"NOT ({fulltext_buffer.READABLE})"


def _wrong_checksums(case: _Case) -> str | None:
    sql = """
        SELECT u.id FROM units AS u LEFT JOIN vectors AS v ON v.slot = u.slot
        WHERE u.unit_crc <> crc32_of(CAST(u.unit AS BLOB)) OR u.vector_crc <> crc32_of(v.vector)
        """
    case.con.create_scalar_function("crc32_of", _crc32, 1, deterministic=True)
    return _listed(case, "units whose text or vector changed by itself (store them again, or delete them), ids", sql)


def _crc32(*raw: Any) -> int | None:
    return None if raw[0] is None else zlib.crc32(raw[0])


def _renamed_units(case: _Case) -> str | None:
    return _listed(case, "units whose JSON holds another id, ids", f"SELECT id FROM units WHERE {_RENAMED}")


_OTHER_ID = "CASE WHEN json_valid(unit) THEN json_extract(unit, '$.id') IS NOT id ELSE 0 END"
_RENAMED = f"{fulltext_buffer.READABLE} AND {_OTHER_ID}"


def _rename_units(case: _Case) -> None:
    case.con.execute(f"UPDATE units SET unit = json_set(unit, '$.id', id), unit_crc = NULL WHERE {_RENAMED}")


# -- counters and log -------------------------------------------------------------------------------------------------


def _counters(case: _Case) -> str | None:
    kept = first_row(case.con, f"SELECT {', '.join(_COUNTED)} FROM counters")
    wrong = [
        f"{name} is {had}, should be {is_}"
        for name, had, is_ in zip(_COUNTED, kept, _true_counters(case), strict=True)
        if had != is_
    ]
    return "counters: " + "; ".join(wrong) if wrong else None


_COUNTED = ("count", "backlog", "last_slot", "last_seq", "horizon", "next_auto", "others")


def _true_counters(case: _Case) -> tuple[int, ...]:
    sql = """
        SELECT (SELECT count(*) FROM units),
               (SELECT count(*) FROM units WHERE slot > folded) + (SELECT count(*) FROM stale),
               max(last_slot, ifnull((SELECT max(slot) FROM units), 0), ifnull((SELECT max(slot) FROM vectors), 0),
                   ifnull((SELECT max(slot) FROM changes), 0)),
               max(last_seq, horizon, ifnull((SELECT max(seq) FROM changes), 0)),
               max(0, min(horizon, last_seq)),
               max(next_auto, ifnull((SELECT 1 + max(CAST(substr(id, 6) AS INTEGER)) FROM units
                   WHERE ns = 0 AND id GLOB 'unit_[0-9]*' AND id = 'unit_' || CAST(substr(id, 6) AS INTEGER)
                   AND CAST(substr(id, 6) AS INTEGER) < ?), 0)),
               (SELECT count(*) FROM units WHERE ns <> 0)
        FROM counters
        """
    return first_row(case.con, sql, (AUTO_LIMIT,))


def _set_counters(case: _Case) -> None:
    case.con.execute(f"UPDATE counters SET {', '.join(f'{name} = ?' for name in _COUNTED)}", _true_counters(case))


def _log(case: _Case) -> str | None:
    last, horizon = first_row(case.con, "SELECT last_seq, horizon FROM counters")
    sql = "SELECT min(seq), max(seq), count(*) FROM changes WHERE seq > ?"
    first, newest, entries = first_row(case.con, sql, (horizon,))
    if entries != last - horizon or (entries and (first, newest) != (horizon + 1, last)):
        return f"the log holds {entries} entries from {first} to {newest}, the counters say {horizon + 1} to {last}"
    sql = "SELECT seq FROM changes WHERE seq <= min(?, (SELECT seq FROM history_floor)) AND operation IS NULL"
    return _listed(case, "log entries that were purged, numbers", sql, (horizon,)) or _log_against_units(case, horizon)


def _log_against_units(case: _Case, horizon: int) -> str | None:
    """A slot that the log brought and did not take away is live; a live one at or above the first brought is in it."""
    put, drop, clear = (
        _column(case, "SELECT slot FROM changes WHERE seq > ? AND op IN (?, ?)", horizon, *ops)
        for ops in ((Op.PUT, Op.PUT), (Op.DROP, REPLACED), (Op.CLEAR, Op.CLEAR))
    )
    live = _column(case, "SELECT slot FROM units WHERE slot >= ?", int(put.min()) if len(put) else 2**62)
    cleared = int(clear.max()) if len(clear) else 0
    expected = np.setdiff1d(put[put > cleared], drop)
    lost, unlogged = np.setdiff1d(expected, live), np.setdiff1d(live, expected)
    if len(lost) or len(unlogged):
        return f"log and units disagree: {len(lost)} slots logged and absent, {len(unlogged)} present and not logged"
    return None


def _column(case: _Case, sql: str, *parameters: object) -> IntArray:
    return np.array([row[0] for row in case.con.execute(sql, parameters)], dtype=np.int64)


def _restart_log(case: _Case) -> None:
    """Skip one sequence number and forget the past: every watermark is below the horizon now.

    Undo and the change feed begin at the present, and followers are told to read again.
    """
    case.con.execute("UPDATE counters SET last_seq = last_seq + 1, horizon = last_seq + 1")
    sql = "INSERT OR REPLACE INTO history_floor SELECT 1, last_seq, last_seq, ? FROM counters"
    case.con.execute(sql, (time.time(),))
    case.con.execute("DELETE FROM changes")
    _drop_orphans(case)


# -- namespaces -------------------------------------------------------------------------------------------------------


def _namespaces(case: _Case) -> str | None:
    sql = """
        SELECT ifnull(n.path, u.ns) FROM (SELECT ns, count(*) AS held FROM units WHERE ns <> 0 GROUP BY ns) AS u
        FULL JOIN namespaces AS n ON n.key = u.ns WHERE ifnull(n.key, 1) <> 0 AND n.count IS NOT ifnull(u.held, 0)
        """
    return _listed(case, "namespaces that are missing or miscounted", sql)


def _recount(case: _Case) -> None:
    """Count again; units of a namespace without a name are found under ("lost", its key)."""
    case.con.execute(
        """
        INSERT INTO namespaces (key, path) SELECT DISTINCT ns, json_array('lost', CAST(ns AS TEXT)) FROM units
        WHERE ns <> 0 AND ns NOT IN (SELECT key FROM namespaces);
        UPDATE namespaces SET count = (SELECT count(*) FROM units AS u WHERE u.ns = namespaces.key),
            next_auto = max(next_auto, ifnull((SELECT 1 + max(CAST(substr(id, 6) AS INTEGER)) FROM units AS u
                WHERE u.ns = namespaces.key AND id GLOB 'unit_[0-9]*'
                AND id = 'unit_' || CAST(substr(id, 6) AS INTEGER)), 0))
        WHERE key <> 0
        """
    )


# -- history ----------------------------------------------------------------------------------------------------------


def _unreadable_versions(case: _Case) -> str | None:
    """The old units and vectors that the history keeps, with the checksums that they were written with."""
    case.con.create_scalar_function("crc32_of", _crc32, 1, deterministic=True)
    what = "old versions of units are damaged (to fix that removes them from the history)"
    sql = f"SELECT ifnull(id, ns) || ' (change ' || seq || ')' FROM changes WHERE {_DAMAGED_VERSION}"
    return _listed(case, what, sql, (4 * case.dim,))


_OLD_VECTOR = "(SELECT v.vector FROM vectors AS v WHERE v.slot = changes.slot)"
_DAMAGED_VERSION = f"""
    seq > (SELECT seq FROM history_floor) AND {OLD} AND (
        unit IS NULL OR {_UNREADABLE} OR ({_RENAMED}) OR unit_crc <> crc32_of(CAST(unit AS BLOB))
        OR (op <> {Op.EDIT} AND (length({_OLD_VECTOR}) IS NOT ? OR vector_crc <> crc32_of({_OLD_VECTOR}))))
"""


def _erase_versions(case: _Case) -> None:
    """Empty the damaged versions; the change feed begins again, for it would lack them."""
    bad = f"SELECT since FROM changes WHERE {_DAMAGED_VERSION}"
    case.con.execute(f"UPDATE changes SET since = 0 WHERE op = {Op.PUT} AND seq IN ({bad})", (4 * case.dim,))
    case.con.execute(f"UPDATE changes SET {FORGET.format(ERASED)} WHERE {_DAMAGED_VERSION}", (4 * case.dim,))
    _drop_orphans(case)
    case.con.execute("UPDATE history_floor SET feed = (SELECT last_seq FROM counters)")


def _history(case: _Case) -> str | None:
    """Each change has its row, and each row a version where there must be one, and its operation, in order."""
    last = first_row(case.con, "SELECT last_seq FROM counters")[0]
    begin, feed = first_row(case.con, "SELECT seq, feed FROM history_floor")
    kept = first_row(case.con, "SELECT count(*) FROM changes WHERE seq > ? AND operation IS NOT NULL", (begin,))[0]
    if max(begin, feed) > last or kept != last - begin:
        return f"the history holds {kept} changes after change {begin}, the counters say {max(0, last - begin)}"
    for what, sql in (
        ("changes that contradict themselves", f"""
            SELECT seq FROM changes WHERE seq > ? AND since IS NOT {ERASED}
            AND (op = {Op.PUT}) <> (unit IS NULL AND ifnull(since, 0) = 0)"""),
        ("changes of a namespace that is not known", """
            SELECT seq FROM changes WHERE seq > ? AND ns <> 0 AND ns NOT IN (SELECT key FROM namespaces)"""),
        ("changes whose operation is out of order", """
            SELECT seq FROM (
                SELECT seq, operation > seq OR kind IS NULL OR at IS NULL OR at < lag(at) OVER past
                    OR operation NOT IN (lag(operation) OVER past, seq) AS wrong
                FROM changes WINDOW past AS (ORDER BY seq)
            ) WHERE seq > ? AND wrong"""),
    ):  # fmt: skip
        found = _listed(case, f"{what}, numbers", sql, (begin,))
        if found:
            return f"the history holds {found}"
    return None


# -- keyword and terms indexes ----------------------------------------------------------------------------------------


def _words(case: _Case) -> str | None:
    folded = "(SELECT folded FROM counters)"
    for name, table, there in (
        ("index", "SELECT id FROM words_docsize", "ns = 0"),
        ("index of namespaces", "SELECT id FROM space_words_docsize", "ns <> 0"),
    ):
        sql = f"SELECT slot FROM units WHERE slot <= {folded} AND {there} UNION SELECT slot FROM stale WHERE {there}"
        has, should = _column(case, table), _column(case, sql)
        lacking, extra = len(np.setdiff1d(should, has)), len(np.setdiff1d(has, should))
        if lacking or extra:
            return f"the keyword {name} lacks {lacking} units and holds {extra} that are gone"
    return None


def _terms(case: _Case) -> str | None:
    should, has = terms_of_folded(), "SELECT field, value, slot FROM terms"
    lacking, extra = (
        first_row(case.con, f"SELECT count(*) FROM (SELECT * FROM ({one}) EXCEPT SELECT * FROM ({other}))")[0]
        for one, other in ((should, has), (has, should))
    )
    return (
        f"the index of types and tags lacks {lacking} entries and holds {extra} too many" if lacking or extra else None
    )


def _rebuild_words(case: _Case) -> None:
    fulltext_buffer.rebuild_words(case.con, case.text_of, fulltext_buffer.kept_stemming(case.con))


_PROBES = (
    _Probe("damaged_file", _file, _rebuild_indexes),
    _Probe("orphan_vectors", _orphan_vectors, _drop_orphans),
    _Probe("missing_vectors", _missing_vectors),
    _Probe("wrong_vectors", _wrong_vectors),
    _Probe("unreadable_units", _unreadable_units),
    _Probe("wrong_checksums", _wrong_checksums),
    _Probe("renamed_units", _renamed_units, _rename_units),
    _Probe("counters", _counters, _set_counters),
    _Probe("namespaces", _namespaces, _recount),
    _Probe("log", _log, _restart_log),
    _Probe("damaged_versions", _unreadable_versions, _erase_versions),
    _Probe("history", _history, _restart_log),
    _Probe("words", _words, _rebuild_words),
    _Probe("terms", _terms, _rebuild_words),
)
