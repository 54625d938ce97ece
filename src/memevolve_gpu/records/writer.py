"""The writing connection, the write context, and what happens to open stores at a fork.

SQLite keeps, per process and file, a record of the POSIX locks that it holds. A child inherits the record but not the
locks: a connection that it opens to the same file believes in locks that do not exist, and the parent may delete the
write-ahead log under it. So every connection is closed before the fork, and opened again afterwards on both sides when
it is needed. Where a call of another thread does not end in time, the child may not touch those files.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw

from ..errors import CorruptStoreError, ReadOnlyError, StorageError, StoreClosedError
from ..utils import forking
from .connections import (
    Durability,
    connect,
    first_row,
    keep_log_on_close,
    set_up_writer,
    shut,
    shut_on_failure,
    try_to_empty_log,
)
from .damage import noted
from .file_lock import WriteLock
from .lineage import NO_TOKEN, TOKEN_BYTES, beside, next_link, why_foreign
from .pool import FileId, ReaderPool, refuse_replaced
from .sqlite_errors import SQLITE_ERRORS
from .transaction import Transaction

__all__ = ["Session", "WriteContext", "no_fork"]


_stranded_paths: set[Path] = set()
_inherited: list[object] = []
"""In a child: connections of the parent, which must be neither used nor closed."""


@contextmanager
def no_fork(path: Path) -> Iterator[None]:
    """No fork happens inside the block. Raises StoreClosedError when this process must not touch the file."""
    if path in _stranded_paths:
        raise StoreClosedError(
            f"{path} was in use by another thread, or inside write(), when this process was forked from it; "
            "fork while no call is running, or start the process with spawn"
        )
    with forking.no_fork():
        yield


FORK_PATIENCE = 2.0
"""Seconds that a fork waits for calls of other threads; after that the child cannot use the store."""


class Session:
    """The lock, the writing connection and the reading connections of an open store."""

    def __init__(
        self,
        path: Path,
        lock: WriteLock,
        con: apsw.Connection,
        pool: ReaderPool,
        durability: Durability,
        read_only: bool,
    ) -> None:
        self.path = path
        self.lock = lock
        self.pool = pool
        self.read_only = read_only
        self._durability: Durability = durability
        self._con: apsw.Connection | None = con
        self._name, self._wal = str(path), str(beside(path, "-wal"))
        self._checked: FileId | None = None
        """The database file when its log was last found to be its own."""
        self.floor = NO_TOKEN
        """The newest token that this session knows to be in the database file, see ``lineage.py``."""
        forking.close_for_fork(self)

    def connection(self) -> apsw.Connection:
        """The writing connection, opened when needed. Call with the lock held."""
        self.refuse_writing()
        if self._con is None:
            con = connect(self.path, vfs=self.pool.vfs)
            with shut_on_failure(con):
                set_up_writer(con, self._durability)
            self._con = con
        return self._con

    def begin(self, con: apsw.Connection) -> None:
        """Begin a transaction on the writing connection. Call with the lock held; the caller rolls back.

        Raises CorruptStoreError when the database file was changed under its log, StorageError when it was
        replaced.
        """
        if not self._is_checked():
            file = refuse_replaced(self.path, self.pool.file)
            why = why_foreign(self.path, self.pool.vfs)
            if why is not None:
                raise CorruptStoreError(f"{why}; close the store in every process, then restore a backup")
            self._checked = file
        if _is_empty(self._wal):
            self._mark_file(con)
        con.execute("BEGIN IMMEDIATE")

    def commit(self, con: apsw.Connection) -> None:
        """Commit. When that copies the log into the database file, the file need not be checked again."""
        was_checked = self._is_checked()
        con.execute("COMMIT")
        if was_checked and not self._is_checked():
            self._checked = refuse_replaced(self.path, self.pool.file)

    def _is_checked(self) -> bool:
        """Is the database file as it was when its log was last found to be its own?"""
        try:
            at = os.stat(self._name)  # noqa: PTH116 - a third of the time that a Path takes
        except FileNotFoundError:
            return False
        return (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns) == self._checked

    def _mark_file(self, con: apsw.Connection) -> None:
        """Before a log begins, put a token into the database file that no copy of it from before has."""
        con.execute("BEGIN IMMEDIATE")
        link = next_link(first_row(con, "SELECT link FROM counters")[0], NO_TOKEN)
        con.execute("UPDATE counters SET link = ?", (link,))
        con.execute("COMMIT")
        in_log, copied = con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        if in_log == copied:
            self.floor = link[:TOKEN_BYTES]

    def refuse_writing(self) -> None:
        """Raise StoreClosedError or ReadOnlyError where they apply."""
        self.pool.refuse_if_closed()
        if self.read_only:
            raise ReadOnlyError(f"{self.path} is read-only; make the file and its folder writable and open it again")

    def drop_connection(self) -> None:
        """Close the writing connection; the next transaction opens another."""
        con, self._con = self._con, None
        if con is not None:
            shut(con)

    def empty_log(self) -> None:
        """Copy the write-ahead log into the database and cut it to nothing, unless a reader still needs it."""
        self.refuse_writing()
        self.lock.refuse_nesting()
        try:
            self.lock.acquire()
            try_to_empty_log(self.connection())
        except SQLITE_ERRORS as error:
            raise noted(error, self.path) from error
        finally:
            self.lock.release()

    def rewrite(self, seconds: float) -> None:
        """Write the database file anew, without free pages, and empty the log; waits so long for readers of the log.

        Raises StorageError when a reader does not end.
        """
        self.refuse_writing()
        self.lock.refuse_nesting()
        deadline = time.monotonic() + seconds
        try:
            self.lock.acquire()
            con = self.connection()
            con.execute("VACUUM")
            try_to_empty_log(con)
            while not _is_empty(self._wal):
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"{self.path}: a reader of another process keeps the old log; end it, then call again"
                    )
                time.sleep(0.02)
                try_to_empty_log(con)
        except SQLITE_ERRORS as error:
            raise noted(error, self.path) from error
        finally:
            self.lock.release()

    def close(self) -> None:
        """Close everything; waits for a running write."""
        if self.lock.held_here():
            raise StorageError("close() inside write() would lose the open transaction; leave the block first")
        self.lock.exclude()
        try:
            self.pool.close()
            self.drop_connection()
            self.lock.close_file()
        finally:
            self.lock.release()

    def before_fork(self) -> bool:
        """Close every connection, so that the child inherits none; False when calls in other threads do not end."""
        if not self.lock.exclude(FORK_PATIENCE):
            return False
        if not self.pool.pause(FORK_PATIENCE):
            self.lock.release()
            return False
        if self._con is not None:
            keep_log_on_close(self._con, True)
        self.drop_connection()
        self.lock.close_file()
        return True

    def after_fork(self) -> None:
        """Go on after :meth:`before_fork`, in the parent and in the child; connections open when they are needed."""
        self.pool.resume()
        self.lock.release()

    def disable_in_child(self) -> None:
        """In a child where :meth:`before_fork` failed: refuse all use."""
        _inherited.extend([*self.pool.disable_in_child(), self._con])
        _stranded_paths.add(self.path)
        self._con = None
        self.lock.close_file()
        self.lock = WriteLock(self.lock.path, self.lock.timeout, self.lock.new_mode)


def _is_empty(file: str) -> bool:
    try:
        return not os.stat(file).st_size  # noqa: PTH116 - a third of the time that a Path takes
    except FileNotFoundError:
        return True


class WriteContext:
    """The context of one write transaction; ``Records.write()`` makes it."""

    __slots__ = ("__weakref__", "_clock", "_dim", "_hold", "_operation", "_session", "_space", "_timeout")

    def __init__(
        self,
        session: Session,
        dim: int,
        timeout: float | None = None,
        space: tuple[str, ...] = (),
        clock: Callable[[], float] = time.time,
        operation: str | None = None,
    ) -> None:
        self._space, self._clock, self._operation = space, clock, operation
        self._timeout = timeout
        self._session = session
        self._dim = dim
        self._hold = _WriteHold(session)

    def __enter__(self) -> Transaction:
        session = self._session
        self._hold = hold = _WriteHold(session)
        session.refuse_writing()
        session.lock.refuse_nesting()
        try:
            hold.guard = weakref.ref(self, hold.abandon)
            session.lock.acquire(self._timeout)
            hold.con = session.connection()
            session.begin(hold.con)
            hold.tx = Transaction(
                hold.con, session.path, self._dim, session.floor, self._space, self._clock, self._operation
            )
            return hold.tx
        except SQLITE_ERRORS as error:
            hold.failed = True
            raise noted(error, session.path, hold.con) from error
        finally:
            if hold.tx is None:
                hold.leave()

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        hold = self._hold
        try:
            hold.failed = kind is None or issubclass(kind, (*SQLITE_ERRORS, StorageError))
            if kind is None and hold.tx is not None and hold.con is not None:
                hold.tx.finish()
                self._session.commit(hold.con)
                hold.failed = False
        except SQLITE_ERRORS as error:
            raise noted(error, self._session.path, hold.con) from error
        finally:
            hold.leave()


class _WriteHold:
    """What a write transaction holds, and how it is given back.

    Ctrl-C may arrive between any two steps, even where no ``with`` statement can look after them. Then ``guard`` gives
    everything back when the context is forgotten, which is at once.
    """

    __slots__ = ("con", "failed", "guard", "session", "tx")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.con: apsw.Connection | None = None
        self.tx: Transaction | None = None
        self.failed = False
        self.guard: weakref.ref[WriteContext] | None = None

    def abandon(self, _: object) -> None:
        """The context was garbage-collected without :meth:`leave`."""
        self.failed = True
        self.leave()

    def leave(self) -> None:
        """Roll back what was not committed, and give the lock back; doing it twice does no harm.

        After SQLite or the disk failed the connection is closed, so that the next transaction opens another and starts
        from what the disk holds.
        """
        try:
            if self.tx is not None:
                self.tx.end()
            if self.con is not None and self.con.in_transaction:
                self.con.execute("ROLLBACK")
        except SQLITE_ERRORS:
            self.failed = True
        finally:
            if self.failed:
                self.session.drop_connection()
            self.session.lock.release()
            self.con = self.guard = None
