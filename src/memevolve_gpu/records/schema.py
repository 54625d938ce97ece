"""The tables of the database file: their creation and their migrations."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import NamedTuple

import apsw

from ..errors import ConfigurationError, DimensionMismatchError, NewerSchemaError, NotAStoreError
from ..types import Metric, Op
from .connections import all_rows, first_row
from .history import CHANGES_TABLE, ERASED, REPLACED
from .lineage import NO_TOKEN, first_link, next_link
from .tokenizer import STEMMING, TOKENCHARS, TOKENIZER

APPLICATION_ID = 0x4D456756
"""Marks our files ("MEgV"); the Unix ``file`` command shows it too."""

METRICS = ("l2", "cosine", "ip")
MAX_DIM = 65_536

MODEL_KEY = "embedding_model"
"""The key of ``meta`` under which the name of the embedding model is kept, UTF-8."""

FIELDS_KEY, STATS_KEY = "filtered_fields", "index_statistics"
"""Keys of ``meta``: the fields that filters named and the token of the file of columns; statistics of the index in the
snapshot that are newer than it. JSON, and only hints."""

TOKENIZER_KEY = "tokenizer"
"""The key of ``meta`` under which the name and version of the tokenizer and its stemming are kept, UTF-8."""

_TOKENIZE = f"content='', contentless_delete=1, tokenize=\"ascii tokenchars '{TOKENCHARS}'\""

WORDS_TABLE = f"CREATE VIRTUAL TABLE words USING fts5(text, more, {_TOKENIZE})"
"""``text``: the words in their order; ``more``: other forms of them, see ``tokenizer.py``."""

SPACE_WORDS_TABLE = f"CREATE VIRTUAL TABLE space_words USING fts5(text, more, space, {_TOKENIZE})"
"""The keyword index of the namespaces but the default one; ``space`` holds one word, ``n`` and the key."""

UNITS_TABLE = """
CREATE TABLE units (
    slot INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    unit TEXT NOT NULL,
    unit_crc INTEGER,                   -- CRC-32 of the text; NULL in rows that were written before version 2
    vector_crc INTEGER,                 -- and of the vector
    ns INTEGER NOT NULL DEFAULT 0,      -- key of the namespace, 0 for the default one
    expires_at REAL,                    -- Unix time from which the unit is gone; NULL for never
    UNIQUE (ns, id)
) STRICT
"""

ACCESS_TABLE = """
CREATE TABLE access (                   -- when units were read; no index needs it, so it is not in the log
    ns INTEGER NOT NULL,
    id TEXT NOT NULL,
    last_access REAL NOT NULL,          -- Unix time
    count INTEGER NOT NULL,
    PRIMARY KEY (ns, id)
) STRICT, WITHOUT ROWID
"""

_TABLES = (
    """
CREATE TABLE store (                    -- one row, never changed
    one INTEGER PRIMARY KEY CHECK (one = 1),
    store_id TEXT NOT NULL,
    dim INTEGER NOT NULL,
    metric TEXT NOT NULL,
    created_at REAL NOT NULL
) STRICT;
CREATE TABLE counters (                 -- one row, changed by every transaction
    one INTEGER PRIMARY KEY CHECK (one = 1),
    last_seq INTEGER NOT NULL,          -- newest log entry
    horizon INTEGER NOT NULL,           -- newest purged log entry
    last_slot INTEGER NOT NULL,         -- newest slot ever given out
    count INTEGER NOT NULL,             -- live units
    next_auto INTEGER NOT NULL,         -- number of the next unit_<n>
    folded INTEGER NOT NULL,            -- slots up to here are in words and terms, later ones in pending
    backlog INTEGER NOT NULL,           -- rows of pending and stale
    others INTEGER NOT NULL DEFAULT 0,  -- live units of other namespaces than the default one
    link BLOB NOT NULL DEFAULT x''      -- which log belongs to the file, see lineage.py; the last column
) STRICT;
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE vectors (slot INTEGER PRIMARY KEY, vector BLOB NOT NULL) STRICT;
CREATE TABLE log (seq INTEGER PRIMARY KEY, op INTEGER NOT NULL, slot INTEGER NOT NULL) STRICT;
CREATE TABLE terms (field TEXT, value TEXT, slot INTEGER, PRIMARY KEY (field, value, slot)) STRICT, WITHOUT ROWID;
CREATE TABLE pending (slot INTEGER PRIMARY KEY, text TEXT NOT NULL, ns INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE stale (slot INTEGER PRIMARY KEY, unit TEXT NOT NULL, ns INTEGER NOT NULL DEFAULT 0) STRICT;
"""
    + WORDS_TABLE
)

_SINCE_VERSION_2 = f"""
{UNITS_TABLE};
CREATE INDEX units_ns ON units (ns) WHERE ns <> 0;
CREATE INDEX units_expiry ON units (expires_at) WHERE expires_at IS NOT NULL;
{ACCESS_TABLE};
CREATE TABLE namespaces (
    key INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused; row 0, the default namespace, only while it has limits
    path TEXT NOT NULL UNIQUE,              -- a JSON list of the parts
    count INTEGER NOT NULL DEFAULT 0,       -- live units; not kept for row 0
    next_auto INTEGER NOT NULL DEFAULT 0,   -- number of the next unit_<n>; not kept for row 0
    max_units INTEGER,
    default_ttl REAL                        -- seconds
) STRICT;
{SPACE_WORDS_TABLE};
CREATE TABLE operations (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, at REAL NOT NULL, ns INTEGER NOT NULL) STRICT;
CREATE TABLE history (
    seq INTEGER PRIMARY KEY,
    kind INTEGER NOT NULL,
    ns INTEGER NOT NULL,
    id TEXT NOT NULL,
    slot INTEGER,
    unit TEXT,
    vector BLOB,
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

_SINCE_VERSION_3 = """
ALTER TABLE history ADD COLUMN unit_crc INTEGER;
ALTER TABLE history ADD COLUMN vector_crc INTEGER
"""

_SINCE_VERSION_4 = f"""
ALTER TABLE units ADD COLUMN since INTEGER;         -- the change that put the unit there; NULL in rows of before
{CHANGES_TABLE};
INSERT OR IGNORE INTO vectors SELECT slot, vector FROM history WHERE vector IS NOT NULL AND kind IN (2, {REPLACED});
INSERT INTO changes
SELECT h.seq, CASE WHEN l.op = {Op.CLEAR} THEN l.op WHEN h.kind = 6 THEN ifnull(l.op, {Op.DROP}) ELSE h.kind END,
    coalesce(h.slot, l.slot, 0), o.seq, o.kind, o.at, h.ns, h.id, iif(h.kind = 6, {ERASED}, 0),
    h.expires_at, h.unit_crc, h.vector_crc, h.unit
FROM history AS h LEFT JOIN log AS l ON l.seq = h.seq
LEFT JOIN operations AS o ON o.seq = (SELECT max(seq) FROM operations WHERE seq <= h.seq) ORDER BY h.seq;
INSERT OR IGNORE INTO changes (seq, op, slot, operation, kind, at, ns, since)
SELECT seq, {Op.DROP}, 0, seq, kind, at, ns, {ERASED} FROM operations WHERE seq > (SELECT seq FROM history_floor);
INSERT OR IGNORE INTO changes (seq, op, slot) SELECT seq, op, slot FROM log;
DROP TABLE log;
DROP TABLE history;
DROP TABLE operations;
DROP TABLE pending                                  -- whose rows are made from the units when they are needed
"""

MIGRATIONS: tuple[str, ...] = (
    f"""
ALTER TABLE counters ADD COLUMN others INTEGER NOT NULL DEFAULT 0;
ALTER TABLE counters ADD COLUMN link BLOB NOT NULL DEFAULT x'';
ALTER TABLE pending ADD COLUMN ns INTEGER NOT NULL DEFAULT 0;
ALTER TABLE stale ADD COLUMN ns INTEGER NOT NULL DEFAULT 0;
ALTER TABLE units RENAME TO units_1;
ALTER TABLE access RENAME TO access_1;
{_SINCE_VERSION_2};
INSERT INTO units (slot, id, unit) SELECT slot, id, unit FROM units_1 ORDER BY slot;
INSERT INTO access (ns, id, last_access, count) SELECT 0, id, last_access, count FROM access_1;
DROP TABLE units_1;
DROP TABLE access_1;
INSERT INTO history_floor SELECT 1, last_seq, last_seq, unixepoch() FROM counters
""",
    _SINCE_VERSION_3,
    _SINCE_VERSION_4,
)
"""Scripts that migrate a file from version i + 1 to i + 2, oldest first. Never edit one that was released."""

VERSION = 1 + len(MIGRATIONS)

_FIRST_WITH_LINK = 2


class StoreInfo(NamedTuple):
    """What a store is; ``model`` is the embedding model's name when one was recorded."""

    dim: int
    metric: Metric
    store_id: str
    model: str | None


_MARK_AND_TABLES = "SELECT application_id, (SELECT count(*) FROM sqlite_schema) FROM pragma_application_id"
"""In one statement, so of one moment: between two, another process may create the store."""


def state_of(con: apsw.Connection, path: Path) -> int:
    """The schema version of the open file, 0 for an empty one.

    Raises NotAStoreError for a file of another program, NewerSchemaError for one of a later version of this package.
    """
    mark, tables = first_row(con, _MARK_AND_TABLES)
    if mark == 0 and tables == 0:
        return 0
    if mark != APPLICATION_ID:
        raise NotAStoreError(f"{path} is an SQLite file of another program; choose another prefix")
    version = int(first_row(con, "PRAGMA user_version")[0])
    if version > VERSION:
        raise NewerSchemaError(
            f"{path} has schema version {version}, this package knows {VERSION}; upgrade memevolve-gpu to open it"
        )
    return version


def create(con: apsw.Connection, dim: int, metric: Metric, stemming: str = STEMMING) -> None:
    """Write the tables of a new store. Call inside a transaction on an empty file."""
    con.execute(_TABLES)
    for script in (_SINCE_VERSION_2, _SINCE_VERSION_3, _SINCE_VERSION_4):
        con.execute(script)
    con.execute("INSERT INTO counters VALUES (1, 0, 0, 0, 0, 0, 0, 0, 0, ?)", (first_link(),))
    con.execute("INSERT INTO history_floor VALUES (1, 0, 0, 0)")
    con.execute("INSERT INTO store VALUES (1, ?, ?, ?, ?)", (uuid.uuid4().hex, dim, metric, time.time()))
    con.execute("INSERT INTO meta VALUES (?, ?)", (TOKENIZER_KEY, f"{TOKENIZER} {stemming}".encode()))
    con.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    con.execute(f"PRAGMA user_version = {VERSION}")


def migrate(con: apsw.Connection, version: int) -> None:
    """Migrate the file from ``version`` to ``VERSION``. Call inside a transaction."""
    for script in MIGRATIONS[version - 1 :]:
        con.execute(script)
    if version < _FIRST_WITH_LINK:
        counters = first_row(
            con, "SELECT last_seq, horizon, last_slot, count, next_auto, folded, backlog FROM counters"
        )
        link = first_link(counters)
    else:
        link = next_link(first_row(con, "SELECT link FROM counters")[0], NO_TOKEN)
    con.execute("UPDATE counters SET link = ?", (link,))
    con.execute(f"PRAGMA user_version = {VERSION}")


def facts_of(con: apsw.Connection) -> StoreInfo:
    """Read what the store is."""
    dim, metric, store_id = first_row(con, "SELECT dim, metric, store_id FROM store")
    if not isinstance(dim, int) or not 1 <= dim <= MAX_DIM or metric not in METRICS or not isinstance(store_id, str):
        raise apsw.CorruptError(f"what the store is cannot be: dim {dim!r}, metric {metric!r}, store_id {store_id!r}")
    model = all_rows(con, "SELECT CAST(value AS BLOB) FROM meta WHERE key = ?", (MODEL_KEY,))
    return StoreInfo(dim, metric, store_id, model[0][0].decode() if model and model[0][0] is not None else None)


def refuse_mismatch(info: StoreInfo, dim: int | None, metric: Metric | None, path: Path) -> None:
    """Raise when the caller expects another dimension or metric than the store has."""
    if dim is not None and dim != info.dim:
        raise DimensionMismatchError(
            info.dim, dim, f"{path} holds vectors of {info.dim} numbers; use the embedding model that filled it"
        )
    if metric is not None and metric != info.metric:
        raise ConfigurationError(
            f"metric {metric!r} was asked for, but {path} was created with metric {info.metric!r}; "
            f"open it with metric={info.metric!r}, or import its units into a new store"
        )
