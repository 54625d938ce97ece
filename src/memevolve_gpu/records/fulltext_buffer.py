"""The keyword index and the terms index, kept a bounded number of rows behind.

Adding one row to FTS5 changes seven of the 18 pages that a commit writes, and each tag another one. So a transaction
only appends new texts to ``pending`` and removed rows to ``stale``, and the transaction that reaches ``FOLD_AT`` such
notes merges them into the indexes. Queries read the indexes up to ``counters.folded`` and the notes after it, so
nothing is missing. All of it happens inside the transactions that write the rows.
"""

from __future__ import annotations

import apsw

__all__ = ["FOLD_AT", "add_terms", "drop_terms", "forget_all", "merge_pending", "terms_of_folded"]

FOLD_AT = 256
"""Notes after which a transaction merges. Measured: merging 256 takes about 1 ms, a query reads a note in 10 us."""

# json_each yields a scalar itself (no key), the elements of a list (integer keys), members of an object (text keys).
_STRINGS = """
SELECT j.field, e.atom, {slot}
FROM (SELECT 'type' AS field, '$.type' AS path UNION ALL SELECT 'tags', '$.tags') AS j
JOIN {source} AS u
JOIN json_each(CASE WHEN json_valid(u.unit) THEN u.unit ELSE '{{}}' END, j.path) AS e
WHERE e.type = 'text' AND typeof(e.key) <> 'text' AND {condition}
"""

_ADD = "INSERT OR IGNORE INTO terms " + _STRINGS + " ORDER BY 1, 2, 3"
_DROP = "DELETE FROM terms WHERE (field, value, slot) IN (" + _STRINGS + ")"

_FOLD = (
    _DROP.format(slot="u.slot", source="stale", condition="1"),
    "DELETE FROM stale",
    "INSERT INTO words (rowid, text) SELECT slot, text FROM pending WHERE ns = 0 ORDER BY slot",
    (
        "INSERT INTO space_words (rowid, text, space) "
        "SELECT slot, text, 'n' || ns FROM pending WHERE ns <> 0 ORDER BY slot"
    ),
    _ADD.format(slot="u.slot", source="units", condition="u.slot > (SELECT folded FROM counters)"),
    "DELETE FROM pending",
)
_ADD_ONE = _ADD.format(slot="u.slot", source="(SELECT ?1 AS slot, ?2 AS unit)", condition="1")
_DROP_ONE = _DROP.format(slot="u.slot", source="(SELECT ?1 AS slot, ?2 AS unit)", condition="1")


def merge_pending(con: apsw.Connection) -> None:
    """Bring ``words`` and ``terms`` up to every row. The caller updates ``folded`` and ``backlog`` with it."""
    for table, sign in (("words", "="), ("space_words", "<>")):
        stale = con.execute(f"SELECT slot FROM stale WHERE ns {sign} 0").fetchall()
        con.executemany(f"DELETE FROM {table} WHERE rowid = ?", stale)  # for a subquery FTS5 would read every row
    for statement in _FOLD:
        con.execute(statement)


def add_terms(con: apsw.Connection, slot: int, unit: str) -> None:
    """Add the terms of one merged row."""
    con.execute(_ADD_ONE, (slot, unit))


def drop_terms(con: apsw.Connection, slot: int, unit: str) -> None:
    """Remove the terms of one merged row, given its old JSON text."""
    con.execute(_DROP_ONE, (slot, unit))


def terms_of_folded() -> str:
    """A query for the (field, value, slot) that ``terms`` should hold: of folded rows, live or stale."""
    live = _STRINGS.format(slot="u.slot", source="units", condition="u.slot <= (SELECT folded FROM counters)")
    return f"{live} UNION {_STRINGS.format(slot='u.slot', source='stale', condition='1')}"


def forget_all(con: apsw.Connection) -> None:
    """Empty both indexes and the notes."""
    for table in ("words", "space_words"):
        con.execute(f"INSERT INTO {table} ({table}) VALUES ('delete-all')")
    con.execute("DELETE FROM terms; DELETE FROM pending; DELETE FROM stale")
