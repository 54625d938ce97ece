"""The reading connections that all threads share."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import apsw

from ..errors import StorageError, StoreClosedError
from . import fulltext
from .connections import connect, shut, shut_on_failure
from .lineage import beside, token_bytes
from .sqlite_errors import SQLITE_ERRORS, translate_error

__all__ = ["IDLE_READERS", "FileId", "ReaderPool", "refuse_replaced"]

IDLE_READERS = 8
"""Most idle connections that stay open."""


class FileId(NamedTuple):
    """Which file it is, and which content it has as far as the file system tells."""

    device: int
    inode: int
    size: int
    changed_ns: int


def refuse_replaced(path: Path, file: FileId | None) -> FileId:
    """What is at ``path`` now. Raises StorageError when it is not the file that was opened."""
    try:
        at = path.stat()
    except FileNotFoundError as error:
        raise StorageError(
            f"{path} was deleted or moved while it was open; close this store and open it again"
        ) from error
    now = FileId(at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns)
    if file is not None and now[:2] != file[:2]:
        raise StorageError(f"{path} was replaced by another file while it was open; close this store and open it again")
    return now


class ReaderPool:
    """Connections for reading. Any thread may take one; a connection is used by one thread at a time.

    A connection that an interrupt keeps from being given back is closed when it is garbage-collected.

    ``unshared``: this user may create no shared memory beside the file. While there is no log, the file alone is read
    without locks, and each result counts only when the file did not change meanwhile, see :meth:`is_current`.
    """

    def __init__(self, path: Path, *, vfs: str | None, unshared: bool) -> None:
        self.path = path
        self.vfs = vfs
        self.file = refuse_replaced(path, None)
        self._unshared = unshared
        self._states: weakref.WeakKeyDictionary[apsw.Connection, object] = weakref.WeakKeyDictionary()
        self._idle: list[apsw.Connection] = []
        self._all: weakref.WeakSet[apsw.Connection] = weakref.WeakSet()
        self._opening = threading.RLock()
        self._barred = False
        self._refusal: str | None = None

    def take(self) -> apsw.Connection:
        """An idle connection, or a new one. Raises StoreClosedError."""
        if self._barred:
            self._wait()
        refuse_replaced(self.path, self.file)
        while True:
            try:
                con = self._idle.pop()
            except IndexError:
                return self._new()
            if self.is_current(con):
                return con
            self._drop(con)

    def give(self, con: apsw.Connection) -> None:
        """Hand a connection back."""
        self._idle.append(con)
        if self._barred or len(self._idle) > IDLE_READERS:
            self._close_one()

    def is_current(self, con: apsw.Connection) -> bool:
        """Is what this connection has just read what the store holds? Where it takes locks it always is."""
        state = self._states.get(con)
        return state is None or state == self._state()

    def _state(self) -> object:
        """Two equal values mean that nothing was written in between; None while there is a log."""
        wal = beside(self.path, "-wal")
        if wal.exists() and wal.stat().st_size:
            return None
        return self.path.stat().st_ctime_ns, refuse_replaced(self.path, self.file), token_bytes(self.path, self.vfs)

    def refuse_if_closed(self) -> None:
        """Raise StoreClosedError when the pool may no longer be used."""
        if self._refusal is not None:
            raise StoreClosedError(f"{self.path}: {self._refusal}")

    def close(self) -> None:
        """Close what is idle now, and what is handed back later."""
        self._bar("the store was closed; open it again")
        while self._close_one():
            pass

    def pause(self, timeout: float) -> bool:
        """Close every connection, waiting for those in use, and open no other until :meth:`resume`."""
        deadline = time.monotonic() + timeout
        if not self._opening.acquire(timeout=timeout):
            return False
        self._barred = True
        while self._all:
            if self._close_one():
                continue
            if time.monotonic() > deadline:
                self.resume()
                return False
            time.sleep(0.0005)
        return True

    def resume(self) -> None:
        """End :meth:`pause`."""
        self._barred = self._refusal is not None
        self._opening.release()

    def disable_in_child(self) -> list[apsw.Connection]:
        """In a forked child that could not be prepared: refuse use, and return what must be neither used nor closed."""
        inherited, self._idle, self._all = list(self._all), [], weakref.WeakSet()
        self._opening = threading.RLock()
        self._bar("the process was forked while the store was in use; fork while no call is running, or use spawn")
        return inherited

    def _bar(self, refusal: str) -> None:
        self._refusal = refusal
        self._barred = True

    def _wait(self) -> None:
        """Wait until a pause ends."""
        self.refuse_if_closed()
        with self._opening:
            self.refuse_if_closed()

    def _new(self) -> apsw.Connection:
        with self._opening:
            try:
                con = self._connected()
                with shut_on_failure(con):
                    fulltext.register(con)
            except SQLITE_ERRORS as error:
                raise translate_error(error, self.path) from error
            self._all.add(con)
            return con

    def _connected(self) -> apsw.Connection:
        if self._unshared:
            state = self._state()
            if state is not None:
                con = connect(self.path, read_only=True, immutable=True, vfs=self.vfs)
                self._states[con] = state
                return con
        return connect(self.path, read_only=True, vfs=self.vfs)

    def _drop(self, con: apsw.Connection) -> None:
        shut(con)
        self._all.discard(con)

    def _close_one(self) -> bool:
        try:
            con = self._idle.pop()
        except IndexError:
            return False
        self._drop(con)
        return True
