"""The keyword index and the terms index, kept a bounded number of rows behind.

Adding one row to FTS5 changes seven pages, and each tag another one. So the indexes lack the units after slot
``counters.folded``, whose texts are made from the units when they are needed, and hold removed rows, which ``stale``
names. The transaction that brings the number of both, ``counters.backlog``, to ``FOLD_AT`` merges them. Queries read
the indexes and what they lack, so nothing is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import apsw

from ..errors import CorruptStoreError, NewerSchemaError, ReadOnlyError
from ..types import Json, MemoryUnit
from ..utils.plain import plain_text
from .connections import all_rows
from .damage import read_unit
from .schema import SPACE_WORDS_TABLE, TOKENIZER_KEY, WORDS_TABLE
from .tokenizer import STEMMING, TOKENIZER, Words, words_of

TextOf = Callable[[MemoryUnit], str]

FOLD_AT = 256
"""Rows after which a transaction merges. Measured: merging 256 takes about 1 ms, a query reads a note in 10 us."""

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

_ADD_UNFOLDED = _ADD.format(slot="u.slot", source="units", condition="u.slot > ?1")
_DROP_STALE = _DROP.format(slot="u.slot", source="stale", condition="1")
_ADD_ONE = _ADD.format(slot="u.slot", source="(SELECT ?1 AS slot, ?2 AS unit)", condition="1")
_DROP_ONE = _DROP.format(slot="u.slot", source="(SELECT ?1 AS slot, ?2 AS unit)", condition="1")


_ADD_WORDS = "INSERT INTO words (rowid, text, more) VALUES (?, ?, ?)"
_ADD_SPACE_WORDS = "INSERT INTO space_words (rowid, text, more, space) VALUES (?, ?, ?, ?)"

READABLE = "CASE WHEN json_valid(unit) THEN json_type(unit) = 'object' ELSE 0 END"
"""The condition on a row of ``units`` that its text is a JSON object."""


def tokenizer_of(con: apsw.Connection) -> str:
    """The tokenizer and the stemming by which the index was made, such as ``words-1 light``; "" before version 1."""
    rows = all_rows(con, "SELECT CAST(value AS BLOB) FROM meta WHERE key = ?", (TOKENIZER_KEY,))
    return rows[0][0].decode(errors="replace") if rows and isinstance(rows[0][0], bytes) else ""


def kept_stemming(con: apsw.Connection) -> str:
    """The stemming of the index, also where another version of the tokenizer made it."""
    return tokenizer_of(con).partition(" ")[2] or STEMMING


def stemming_of(con: apsw.Connection, path: Path) -> str:
    """The stemming of the index. Raises NewerSchemaError or ReadOnlyError when another tokenizer made it."""
    held = tokenizer_of(con)
    name, _, stemming = held.partition(" ")
    if name == TOKENIZER:
        return stemming or STEMMING
    refuse_newer(held, path)
    raise ReadOnlyError(
        f"the keyword index of {path} was made by an older version of this package; open the store once with the right "
        "to write, and it is made again"
    )


def refuse_newer(held: str, path: Path) -> None:
    """Raise NewerSchemaError when ``held`` is what a later version of this package writes."""
    number = held.partition(" ")[0].rpartition("-")[2]
    if held and not (number.isdigit() and int(number) <= int(TOKENIZER.rpartition("-")[2])):
        raise NewerSchemaError(
            f"the keyword index of {path} was made by the tokenizer {held!r}, this package knows {TOKENIZER!r}; "
            "upgrade memevolve-gpu, and restart the processes that have the store open"
        )


def _add_texts(con: apsw.Connection, text_of: TextOf, stemming: str, after: int = 0) -> None:
    """Add the texts of the units after a slot to the keyword indexes, one at a time."""
    sql = "SELECT slot, CAST(unit AS BLOB), ns FROM units WHERE slot > ? AND ns {} 0 ORDER BY slot"
    own = ((slot, *_words_in(raw, text_of, stemming)) for slot, raw, _ in con.execute(sql.format("="), (after,)))
    con.executemany(_ADD_WORDS, own)
    rows = con.execute(sql.format("<>"), (after,))
    others = ((slot, *_words_in(raw, text_of, stemming), f"n{ns}") for slot, raw, ns in rows)
    con.executemany(_ADD_SPACE_WORDS, others)


def _words_in(raw: object, text_of: TextOf, stemming: str) -> Words:
    """The words of a row; none where it is damaged, so that it hinders no other."""
    try:
        return words_of(text_of(read_unit(raw, 0)), stemming)
    except CorruptStoreError:
        return words_of("", stemming)


def rebuild_words(con: apsw.Connection, text_of: TextOf, stemming: str) -> None:
    """Make the keyword and terms indexes again from the units, in the transaction that is open."""
    con.execute("DROP TABLE IF EXISTS words; DROP TABLE IF EXISTS space_words")
    con.execute(WORDS_TABLE)
    con.execute(SPACE_WORDS_TABLE)
    con.execute("DELETE FROM terms; DELETE FROM stale; UPDATE counters SET folded = 0")
    value = f"{TOKENIZER} {stemming}".encode()
    con.execute("INSERT INTO meta VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = ?2", (TOKENIZER_KEY, value))
    _add_texts(con, text_of, stemming)
    con.execute(_ADD_UNFOLDED, (0,))
    con.execute("UPDATE counters SET folded = last_slot, backlog = 0")


def default_text(unit: MemoryUnit) -> str:
    """The strings of the fields that are worth finding: content, reasoning, query, tags, type."""
    values = [unit.get(field) for field in ("content", "reasoning", "query", "tags", "type")]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return " ".join(one for one in flat if isinstance(one, str))


def merge_pending(con: apsw.Connection, path: Path, folded: int, text_of: TextOf) -> None:
    """Bring ``words`` and ``terms``, which hold the slots up to ``folded``, up to every row.

    The caller updates ``folded`` and ``backlog`` with it. Raises NewerSchemaError or ReadOnlyError when another
    tokenizer made the index.
    """
    stemming = stemming_of(con, path)
    for table, sign in (("words", "="), ("space_words", "<>")):
        stale = con.execute(f"SELECT slot FROM stale WHERE ns {sign} 0").fetchall()
        con.executemany(f"DELETE FROM {table} WHERE rowid = ?", stale)  # for a subquery FTS5 would read every row
    _add_texts(con, text_of, stemming, folded)
    con.execute(_DROP_STALE)
    con.execute("DELETE FROM stale")
    con.execute(_ADD_UNFOLDED, (folded,))


def index_rows(con: apsw.Connection, path: Path, ns: int, rows: Sequence[tuple[int, str, Json, Json]]) -> None:
    """Add new rows (slot, text, type, tags) of a namespace to the keyword and terms indexes.

    These lack nothing before the rows. The caller updates ``folded``. Raises as
    :func:`merge_pending`.
    """
    stemming = stemming_of(con, path)
    words = ((slot, *words_of(text, stemming)) for slot, text, *_ in rows)
    if ns == 0:
        con.executemany(_ADD_WORDS, words)
    else:
        con.executemany(_ADD_SPACE_WORDS, ((*one, f"n{ns}") for one in words))
    terms = [("type", value, slot) for slot, _, kind, _ in rows for value in _strings_in(kind)]
    terms += [("tags", value, slot) for slot, _, _, tags in rows for value in _strings_in(tags)]
    con.executemany("INSERT OR IGNORE INTO terms VALUES (?, ?, ?)", sorted(terms))


def _strings_in(held: Json) -> list[str]:
    """The terms in the type or the tags of a unit, as ``_STRINGS`` finds them in its JSON text."""
    if type(held) is str:
        return [held]
    values = held if isinstance(held, (list, tuple)) else (held,)
    return [plain_text(value) for value in values if isinstance(value, str)]


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
    con.execute("DELETE FROM terms; DELETE FROM stale")
