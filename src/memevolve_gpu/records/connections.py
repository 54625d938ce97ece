"""SQLite connections: how they are set up, and the pool that readers share."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Literal

import apsw

from ..errors import StoreClosedError
from . import keyword
from .failures import FOREIGN, translated

__all__ = [
    "BUSY_SECONDS",
    "Durability",
    "ReaderPool",
    "connect",
    "keep_log_on_close",
    "set_up_writer",
    "try_to_empty_log",
]

Durability = Literal["full", "normal"]

BUSY_SECONDS = 30.0
"""How long a foreign program (a shell, a backup tool) may keep the database locked before a call fails."""

CHECKPOINT_PAGES = 1000
"""A commit that leaves more pages than this in the write-ahead log copies them into the database."""

IDLE_READERS = 8


def connect(
    path: Path, *, create: bool = False, read_only: bool = False, immutable: bool = False, vfs: str | None = None
) -> apsw.Connection:
    """Open the file and make waiting interruptible. Reads nothing yet."""
    flags = apsw.SQLITE_OPEN_READONLY if read_only else apsw.SQLITE_OPEN_READWRITE
    flags |= apsw.SQLITE_OPEN_CREATE if create else 0
    name = str(path)
    if immutable:
        name, flags = f"{path.as_uri()}?immutable=1", flags | apsw.SQLITE_OPEN_URI
    con = apsw.Connection(name, flags=flags, vfs=vfs)
    con.set_busy_handler(_Patience())
    con.execute("PRAGMA trusted_schema = OFF")
    con.execute("PRAGMA temp_store = MEMORY")
    keyword.register(con)
    return con


class _Patience:
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
    con.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    con.execute("PRAGMA cache_size = -16384")


def try_to_empty_log(con: apsw.Connection) -> None:
    """Copy the write-ahead log into the database and cut it to nothing, unless a reader still needs it."""
    con.set_busy_handler(None)
    try:
        con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.BusyError:
        return
    finally:
        con.set_busy_handler(_Patience())


def keep_log_on_close(con: apsw.Connection, keep: bool) -> None:
    """Whether closing the last connection leaves the write-ahead log as it is."""
    con.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, int(keep))


class ReaderPool:
    """Connections for reading. Any thread may take one; a connection is used by one thread at a time."""

    def __init__(self, path: Path, *, vfs: str | None, immutable: bool) -> None:
        self.path = path
        self.vfs = vfs
        self._immutable = immutable
        self._idle: list[apsw.Connection] = []
        self._opening = threading.Lock()
        self._all: set[apsw.Connection] = set()
        self._refusal: str | None = None

    def take(self) -> apsw.Connection:
        """An idle connection, or a new one."""
        if self._refusal is not None:
            self.refuse_if_closed()
        try:
            return self._idle.pop()
        except IndexError:
            return self._new()

    def refuse_if_closed(self) -> None:
        """Raise StoreClosedError when the pool may no longer be used."""
        if self._refusal is not None:
            raise StoreClosedError(f"{self.path}: {self._refusal}")

    def give(self, con: apsw.Connection) -> None:
        """Hand a connection back."""
        self._idle.append(con)
        if self._refusal is not None or len(self._idle) > IDLE_READERS:
            self._close_one()

    def close(self) -> None:
        """Close what is idle now, and what is handed back later."""
        self._refusal = "the store was closed; open it again"
        while self._close_one():
            pass

    def pause(self, timeout: float) -> bool:
        """Close every connection, waiting for those in use, and open no other until :meth:`resume`."""
        deadline = time.monotonic() + timeout
        if not self._opening.acquire(timeout=timeout):
            return False
        while self._all:
            if not self._close_one() and time.monotonic() > deadline:
                self._opening.release()
                return False
            if self._all and not self._idle:
                time.sleep(0.0005)
        return True

    def resume(self) -> None:
        """End :meth:`pause`."""
        self._opening.release()

    def strand(self) -> list[apsw.Connection]:
        """In a forked child that could not be prepared: refuse use, and return what must be neither used nor closed."""
        inherited, self._idle, self._all = list(self._all), [], set()
        self._opening = threading.Lock()
        self._refusal = "the process was forked while the store was in use; fork while no call is running, or use spawn"
        return inherited

    def _new(self) -> apsw.Connection:
        with self._opening:
            try:
                con = connect(self.path, read_only=True, immutable=self._immutable, vfs=self.vfs)
            except FOREIGN as error:
                raise translated(error, self.path) from error
            self._all.add(con)
            return con

    def _close_one(self) -> bool:
        try:
            con = self._idle.pop()
        except IndexError:
            return False
        con.close()
        self._all.discard(con)
        return True
