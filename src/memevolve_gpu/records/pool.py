"""The reading connections that all threads share."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import apsw

from ..errors import CorruptStoreError, LockTimeoutError, ReadOnlyError, StorageError, StoreClosedError
from . import fulltext
from .connections import connect, first_row, shut, shut_on_failure
from .damage import noted
from .file_lock import WriteLock
from .lineage import beside, token_bytes, why_foreign
from .sqlite_errors import SQLITE_ERRORS, translate_error

IDLE_READERS = 8
"""Most idle connections that stay open."""

CONFIRM_SECONDS = 0.002
"""How long a look at the counters trusts the last look at the file. Each ``stat`` lets another thread take Python's
lock, which cost searches of two and eight threads a sixth of their rate (measured)."""

LOOK_SECONDS = 1.0
"""How long a reader waits for the writer lock, to look once more at a file that seems to be another one's."""


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

    def __init__(self, path: Path, *, vfs: str | None, unshared: bool, lock: WriteLock, store_id: str) -> None:
        self.path = path
        self.vfs = vfs
        self.file = self.confirmed = refuse_replaced(path, None)
        """The database file when it was opened, and when it was last found to be this store's."""
        self.seen = 0
        """The largest number of a log entry that was read."""
        self._lock = lock
        self._store_id = store_id
        self._token = b""
        self._unshared = unshared
        self._confirmed_at = time.monotonic()
        self._states: weakref.WeakKeyDictionary[apsw.Connection, object] = weakref.WeakKeyDictionary()
        self._idle: list[apsw.Connection] = []
        self._all: weakref.WeakSet[apsw.Connection] = weakref.WeakSet()
        self._opening = threading.RLock()
        self._barred = False
        self._refusal: str | None = None

    def take(self, trusted: float = 0.0) -> apsw.Connection:
        """An idle connection, or a new one; the file is not looked at again for ``trusted`` seconds after a look.

        Raises StoreClosedError, and what :meth:`confirm` raises.
        """
        if self._barred:
            self._wait()
        now = time.monotonic()
        if now - self._confirmed_at >= trusted:
            self.confirm()
            self._confirmed_at = now
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

    def confirm(self) -> None:
        """Nothing but its own log changed the file since the last look.

        Raises StorageError when another file is in its place, CorruptStoreError when a copy was written into it.
        """
        file = refuse_replaced(self.path, self.file)
        if file == self.confirmed:
            return
        try:
            token = token_bytes(self.path, self.vfs)
            why = None if token == self._token else self._why_other()
        except SQLITE_ERRORS as error:
            raise noted(error, self.path) from error
        if why is not None:
            raise noted(CorruptStoreError(f"{why}; close the store in every process, then restore a backup"), self.path)
        self.confirmed, self._token = file, token

    def accept(self) -> None:
        """This process has just changed the file itself. Raises as :meth:`confirm` when another one is in its place."""
        self.confirmed, self._token = refuse_replaced(self.path, self.file), b""

    def _why_other(self) -> str | None:
        """Why the file is not what this store left there. A reader looks again while nobody writes, if it can."""
        why = self._difference()
        if why is None or self._lock.held_here():
            return why
        try:
            self._lock.acquire(LOOK_SECONDS)
            return self._difference()
        except (LockTimeoutError, ReadOnlyError):
            return why
        finally:
            self._lock.release()

    def _difference(self) -> str | None:
        if self._has_log():
            return why_foreign(self.path, self.vfs)
        con = connect(self.path, read_only=True, immutable=self._unshared, vfs=self.vfs)
        try:
            (store_id,) = first_row(con, "SELECT store_id FROM store")
            (last_seq,) = first_row(con, "SELECT last_seq FROM counters")
        finally:
            shut(con)
        if store_id == self._store_id and last_seq >= self.seen:
            return None
        return f"another store or an older copy was written into {self.path} while it was open"

    def _has_log(self) -> bool:
        wal = beside(self.path, "-wal")
        return wal.exists() and wal.stat().st_size > 0

    def is_current(self, con: apsw.Connection) -> bool:
        """Is what this connection has just read what the store holds? Where it takes locks it always is."""
        if not self._unshared:
            return True
        state = self._states.get(con)
        return state is None or state == self._state()

    def _state(self) -> object:
        """Two equal values mean that nothing was written in between; None while there is a log."""
        if self._has_log():
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

    def connections(self) -> list[apsw.Connection]:
        """Those that are open, in use or idle."""
        return list(self._all)

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
