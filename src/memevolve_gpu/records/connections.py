"""SQLite connections: set-up, and helpers that read a row or every row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast
from urllib.parse import quote

import apsw

from .filters import holds
from .sqlite_errors import SQLITE_ERRORS

SqlRow: TypeAlias = Any
"""A row that a statement selects: a tuple of None, int, float, bytes and str, as the columns hold."""


def all_rows(con: apsw.Connection, sql: str, parameters: apsw.Bindings = ()) -> list[SqlRow]:
    """Every row of a query, as tuples."""
    return con.execute(sql, parameters).fetchall()


def first_row(con: apsw.Connection, sql: str, parameters: apsw.Bindings = ()) -> tuple[Any, ...]:
    """The first row of a query that has one; the statement is closed, without a step to its end.

    Raises apsw.CorruptError when there is none: a table that must hold one row is empty.
    """
    cursor = con.execute(sql, parameters)
    row: tuple[Any, ...] | None = cursor.fetchone()
    cursor.close()
    if row is None:
        raise apsw.CorruptError(f"a table that must hold one row is empty ({sql})")
    return row


def checked_counters(values: Sequence[object]) -> tuple[int, ...]:
    """The counters of a store, if they can be some; raises apsw.CorruptError."""
    for value in values:
        if type(value) is not int or not 0 <= value < _MOST_COUNTED:
            raise apsw.CorruptError(f"the counters are damaged: {', '.join(map(repr, values))}")
    return cast("tuple[int, ...]", tuple(values))


_MOST_COUNTED = 2**62

Durability = Literal["full", "normal"]

BUSY_SECONDS = 30.0
"""How long a foreign program (a shell, a backup tool) may keep the database locked before a call fails."""

CHECKPOINT_BYTES = 4000 * 4096
"""A commit that leaves more than this in the write-ahead log copies it into the database.

Measured on single durable inserts with pages of 4 KiB: the 99th percentile falls from 1.4 ms at SQLite's 1,000 pages to
0.6 ms, because the copying commits come a quarter as often; the median stays, the longest stays at 15 ms; 8,000 is
slower again. SQLite's index of the log keeps the first 4,062 pages in one hash table, so readers lose nothing."""

LOG_BYTES = 32 << 20
"""A larger write-ahead log, as a bulk write leaves it, is cut to this when it starts over."""


def connect(
    path: Path,
    *,
    create: bool = False,
    mode_of: Path | None = None,
    read_only: bool = False,
    immutable: bool = False,
    vfs: str | None = None,
) -> apsw.Connection:
    """Open the file and make waiting interruptible. Reads nothing yet. mode_of: whose mode a new file takes."""
    flags = apsw.SQLITE_OPEN_READONLY if read_only else apsw.SQLITE_OPEN_READWRITE
    flags |= apsw.SQLITE_OPEN_CREATE if create else 0
    name = str(path)
    if mode_of is not None:
        name, flags = f"{path.as_uri()}?modeof={quote(str(mode_of))}", flags | apsw.SQLITE_OPEN_URI
    if immutable:
        name, flags = f"{path.as_uri()}?immutable=1", flags | apsw.SQLITE_OPEN_URI
    con = apsw.Connection(name, flags=flags, vfs=vfs)
    with shut_on_failure(con):
        con.set_busy_handler(Patience())
        con.execute("PRAGMA trusted_schema = OFF")
        con.execute("PRAGMA temp_store = MEMORY")
        con.create_scalar_function("holds", holds, 2, deterministic=True)
    return con


class Patience:
    """SQLite's busy handler in Python, so that Ctrl-C ends the wait."""

    def __init__(self) -> None:
        self._since = 0.0

    def __call__(self, calls: int) -> bool:
        now = time.monotonic()
        if calls == 0:
            self._since = now
        time.sleep(0.0005 if calls < 10 else 0.005)
        return now - self._since < BUSY_SECONDS


def set_up_writer(con: apsw.Connection, durability: Durability) -> None:
    """The pragmas of the connection that writes."""
    con.execute(f"PRAGMA synchronous = {durability}")
    page = first_row(con, "PRAGMA page_size")[0]
    con.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_BYTES // page}")
    con.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
    con.execute("PRAGMA cache_size = -4096")  # 16 MiB stored 160,000 units with random ids no faster


def shut(con: apsw.Connection) -> None:
    """Close the connection and ignore errors of the disk.

    The last connection that closes a file copies the write-ahead log into it. SQLite ignores it when that fails, and
    the next opening does it; only a VFS written in Python raises.
    """
    with suppress(*SQLITE_ERRORS):
        con.close(True)


@contextmanager
def shut_on_failure(con: apsw.Connection) -> Iterator[None]:
    """Close the connection when the block raises."""
    try:
        yield
    except BaseException:
        shut(con)
        raise


def try_to_empty_log(con: apsw.Connection) -> None:
    """Copy the write-ahead log into the database and cut it to nothing, unless a reader still needs it."""
    con.set_busy_handler(None)
    try:
        con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.BusyError:
        return
    finally:
        con.set_busy_handler(Patience())


def keep_log_on_close(con: apsw.Connection, keep: bool) -> None:
    """Whether closing the last connection leaves the write-ahead log as it is."""
    con.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, int(keep))
