"""Erasing units for good: what the transaction does, and the rewriting of the file that follows it.

The transaction removes units, versions and index entries and leaves a note in ``meta``. What they left behind in free
pages, in the write-ahead log and in the snapshot goes afterwards; the note makes the next opening do it where that was
interrupted. The note holds counts only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import apsw

from ..errors import CorruptStoreError
from ..types import MemoryUnit
from .connections import all_rows, first_row
from .damage import damage_path, derived_paths, read_unit
from .filter_sql import matching
from .filters import Filter, matches
from .history import ERASED, FORGET, OLD_SLOTS, of_units
from .records import Records
from .transaction import Transaction

_NOTE = "erasure"


class Erased(NamedTuple):
    """What one transaction erased: live units, versions in the history, and its newest change."""

    units: int
    versions: int
    seq: int


def erase(tx: Transaction, spaces: Sequence[int], filters: Filter, forgotten: Sequence[str]) -> Erased:
    """Remove the units of the namespaces that match now, and the kept versions of units that matched once.

    forgotten: keys of ``meta`` that are emptied, for they may repeat content.
    """
    listed = json.dumps(list(spaces))
    live = tx.outside(lambda con: _live(con, listed, filters))
    past = tx.outside(lambda con: _past(con, listed, filters))
    versions = tx.outside(lambda con: _mark(con, [*dict.fromkeys([*live, *past])]))
    for ns, unit_id in live:
        tx.drop_from(ns, unit_id)
    tx.merge_pending()
    tx.outside(lambda con: _forget(con, forgotten))
    seq = tx.outside(lambda con: int(first_row(con, "SELECT last_seq FROM counters")[0]))
    tx.purge(seq)
    found = Erased(len(live), versions, seq)
    tx.set_meta(_NOTE, json.dumps(found._asdict()).encode())
    return found


def _live(con: apsw.Connection, spaces: str, filters: Filter) -> list[tuple[int, str]]:
    slots = json.dumps(matching(con, filters, None).tolist())
    sql = """
        SELECT ns, id FROM units WHERE slot IN (SELECT value FROM json_each(?))
        AND ns IN (SELECT value FROM json_each(?)) ORDER BY slot
        """
    return list(all_rows(con, sql, (slots, spaces)))


def _past(con: apsw.Connection, spaces: str, filters: Filter) -> list[tuple[int, str]]:
    sql = """
        SELECT ns, id, CAST(unit AS BLOB) FROM changes
        WHERE unit IS NOT NULL AND ns IN (SELECT value FROM json_each(?))
        """
    found: dict[tuple[int, str], None] = {}
    for ns, unit_id, raw in con.execute(sql, (spaces,)):
        try:
            unit: MemoryUnit = read_unit(raw, unit_id)
        except CorruptStoreError:  # nobody can tell whose it was
            found[ns, unit_id] = None
            continue
        if matches(filters, unit):
            found[ns, unit_id] = None
    return list(found)


_THEIRS = "(ns, id) IN (SELECT ns, id FROM temp.erased)"


def _mark(con: apsw.Connection, units: list[tuple[int, str]]) -> int:
    """Note which units are erased; returns how many old versions of them the history holds."""
    con.execute("CREATE TEMP TABLE IF NOT EXISTS erased (ns INTEGER, id TEXT, PRIMARY KEY (ns, id))")
    con.execute("DELETE FROM temp.erased")
    con.executemany("INSERT INTO temp.erased VALUES (?, ?)", units)
    kept = f"SELECT count(*) FROM changes WHERE since IS NOT NULL AND unit IS NOT NULL AND {_THEIRS}"
    return int(first_row(con, kept)[0])


def _forget(con: apsw.Connection, forgotten: Sequence[str]) -> None:
    """Empty the history of the noted units, which stays known only for those that are alive."""
    con.execute(f"DELETE FROM vectors WHERE slot IN ({OLD_SLOTS} AND {_THEIRS})")
    kept = "iif((ns, id) IN (SELECT ns, id FROM units), id, NULL)"
    con.execute(f"UPDATE changes SET {FORGET.format(ERASED)}, id = {kept} WHERE seq IN ({of_units(_THEIRS)})")
    con.execute(f"DELETE FROM access WHERE {_THEIRS} AND (ns, id) NOT IN (SELECT ns, id FROM units)")
    con.execute("DELETE FROM temp.erased")
    con.executemany("DELETE FROM meta WHERE key = ?", [(key,) for key in forgotten])
    con.execute("UPDATE history_floor SET feed = (SELECT last_seq FROM counters)")
    for table in ("words", "space_words"):
        con.execute(f"INSERT INTO {table} ({table}) VALUES ('optimize')")


def is_unfinished(records: Records) -> bool:
    """Was an erasure interrupted after its transaction?"""
    return records.get_meta(_NOTE) is not None


def finish_erasure(records: Records, seconds: float) -> list[str]:
    """Remove what an erasure left in the files; returns the paths of those that were rewritten or removed.

    Can be repeated. Raises StorageError while a reader of another process keeps the old log longer than ``seconds``.
    """
    derived = [*derived_paths(records.path), damage_path(records.path)]
    gone = [file for file in derived if file.exists()]
    for file in gone:
        file.unlink(missing_ok=True)
    with records.write() as tx:  # the first frame of the log names the file that it belongs to
        tx.set_meta(_NOTE, tx.get_meta(_NOTE) or b"{}")
    records.rewrite(seconds)
    with records.write() as tx:
        tx.delete_meta(_NOTE)
    return [str(file) for file in (records.path, records.path.with_name(records.path.name + "-wal"), *gone)]


def leftovers(path: Path, prefix: str) -> list[str]:
    """Files beside the store that may hold copies: stores that a restore replaced, logs set aside, imported pickles."""
    stem = Path(prefix).name
    patterns = (f"{stem}.replaced-*", f"{path.name}-wal.foreign-*", f"{stem}.pkl*", f"{stem}.data*", f"{stem}.index*")
    return sorted(str(file) for pattern in patterns for file in path.parent.glob(pattern) if file.is_file())
