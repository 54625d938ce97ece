"""The connection that writes, and the context of one write transaction."""

from __future__ import annotations

from pathlib import Path

import apsw

from ..errors import ReadOnlyError, StorageError
from .connections import (
    Durability,
    connect,
    keep_log_on_close,
    set_up_writer,
    shut,
    shut_on_failure,
    try_to_empty_log,
)
from .failures import FOREIGN, translated
from .lock import WriteLock
from .pool import ReaderPool
from .transaction import Transaction

__all__ = ["Session", "Writing"]

FORK_PATIENCE = 2.0
"""Seconds that a fork waits for calls of other threads; after that the child cannot use the store."""


class Session:
    """Everything that an open store holds of the operating system: lock, writing connection, reading connections."""

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

    def connection(self) -> apsw.Connection:
        """The writing connection, opened when needed. Call with the lock held."""
        self.refuse_writing()
        if self._con is None:
            con = connect(self.path, vfs=self.pool.vfs)
            with shut_on_failure(con):
                set_up_writer(con, self._durability)
            self._con = con
        return self._con

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
        except FOREIGN as error:
            raise translated(error, self.path) from error
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

    def strand(self) -> list[object]:
        """In a child that could not be prepared: refuse all use; returns what must live on unused."""
        inherited: list[object] = [*self.pool.strand(), self._con]
        self._con = None
        self.lock.close_file()
        self.lock = WriteLock(self.lock.path)
        return inherited


class Writing:
    """The context of one write transaction; ``Records.write()`` makes it.

    Ctrl-C may arrive between any two steps, even where no ``with`` statement can look after them. Whatever is held then
    is given back when the object is forgotten, which is at once.
    """

    __slots__ = ("_con", "_dim", "_failed", "_holding", "_session", "_tx")

    def __init__(self, session: Session, dim: int) -> None:
        self._session = session
        self._dim = dim
        self._con: apsw.Connection | None = None
        self._tx: Transaction | None = None
        self._holding = False
        self._failed = False

    def __enter__(self) -> Transaction:
        session = self._session
        session.refuse_writing()
        session.lock.refuse_nesting()
        try:
            self._holding = True
            session.lock.acquire()
            self._con = session.connection()
            self._con.execute("BEGIN IMMEDIATE")
            self._tx = Transaction(self._con, session.path, self._dim)
            return self._tx
        except FOREIGN as error:
            self._failed = True
            raise translated(error, session.path) from error
        finally:
            if self._tx is None:
                self._leave()

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            self._failed = kind is not None and issubclass(kind, (*FOREIGN, StorageError))
            if kind is None and self._tx is not None and self._con is not None:
                self._failed = True
                self._tx.finish()
                self._con.execute("COMMIT")
                self._failed = False
        except FOREIGN as error:
            raise translated(error, self._session.path) from error
        finally:
            self._leave()

    def __del__(self) -> None:
        if getattr(self, "_holding", False):  # an interrupt may come before __init__ has set it
            self._failed = True
            self._leave()

    def _leave(self) -> None:
        """Roll back what was not committed, and give the lock back. What was done already is not done twice.

        After SQLite or the disk failed the connection is closed, so that the next transaction opens another and starts
        from what the disk holds.
        """
        try:
            if self._tx is not None:
                self._tx.end()
            if self._con is not None and self._con.in_transaction:
                self._con.execute("ROLLBACK")
        except FOREIGN:
            self._failed = True
        finally:
            if self._failed:
                self._session.drop_connection()
            self._session.lock.release()
            self._con = None
            self._holding = False
