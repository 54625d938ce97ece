"""The writing connection, the write context, and what happens to open stores at a fork.

SQLite keeps, per process and file, a record of the POSIX locks that it holds. A child inherits the record but not the
locks: a connection that it opens to the same file believes in locks that do not exist, and the parent may delete the
write-ahead log under it. So every connection is closed before the fork, and opened again afterwards on both sides when
it is needed. Where a call of another thread does not end in time, the child may not touch those files.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import apsw

from ..errors import MemEvolveError, ReadOnlyError, StorageError, StoreClosedError
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
from .fulltext_buffer import TextOf
from .lineage import NO_TOKEN, TOKEN_BYTES, beside, next_link
from .pool import ReaderPool
from .sqlite_errors import SQLITE_ERRORS
from .transaction import Transaction

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


MOST_GROUPED, GROUP_SECONDS = 64, 0.01
"""Most transactions that share a commit, and the time after which none joins any more."""

_LOOK_AGAIN = 0.05
"""Seconds after which a thread looks whether the one that should commit for it has gone."""


class Group:
    """Transactions of several threads that one commit makes durable; ``link`` is the one that it writes."""

    def __init__(self, link: bytes) -> None:
        self.link = link
        self.members = 0
        self.failure: MemEvolveError | None = StorageError(
            "the commit was interrupted, so it is not known whether the change is stored; read it before repeating it"
        )
        self.done = False
        self._running = threading.Lock()
        self._running.acquire()
        self._began = time.monotonic()

    def is_full(self) -> bool:
        """May no other transaction join?"""
        return self.members >= MOST_GROUPED or time.monotonic() - self._began > GROUP_SECONDS

    def end(self) -> None:
        """Let every thread go on; doing it twice does no harm."""
        self.done = True
        with suppress(RuntimeError):
            self._running.release()

    def wait(self, seconds: float) -> bool:
        """Wait until :meth:`end`, at most so long.

        Not an event: one that Ctrl-C interrupts may keep its inner lock, and the thread that sets it would wait for
        ever. Here each thread that wakes up lets the next one go, and where that one was interrupted, time does.
        """
        if not self.done and self._running.acquire(timeout=seconds):
            self.end()
        return self.done


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
        text_of: TextOf,
    ) -> None:
        self.path = path
        self.text_of = text_of
        self.lock = lock
        self.pool = pool
        self.read_only = read_only
        self._durability: Durability = durability
        self._con: apsw.Connection | None = con
        self._name, self._wal = str(path), str(beside(path, "-wal"))
        self.floor = NO_TOKEN
        """The newest token that this session knows to be in the database file, see ``lineage.py``."""
        self.group: Group | None = None
        """What is written but not committed yet."""
        self.waiting: set[int] = set()
        """The threads that wait for the lock and would join a group."""
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
            self.pool.confirm()
        if _is_empty(self._wal):
            self._mark_file(con)
        con.execute("BEGIN IMMEDIATE")

    def commit(self, con: apsw.Connection) -> None:
        """Commit. When that copies the log into the database file, the file need not be checked again."""
        was_checked = self._is_checked()
        self._commit(con)
        if was_checked and not self._is_checked():
            self.pool.accept()

    def _commit(self, con: apsw.Connection) -> None:
        """Commit; where that fails, make sure that no recovery ever takes the transaction for committed.

        When the sync of the log fails, the frames of the transaction lie in it, complete. They may not be on the disk,
        although the system shows them: recovery would go on behind them, and a power cut would then take what was
        acknowledged later. A transaction without content overwrites them, where the disk allows it.
        """
        try:
            con.execute("COMMIT")
        except SQLITE_ERRORS:
            with suppress(*SQLITE_ERRORS):
                if con.in_transaction:
                    con.execute("ROLLBACK")
                _change_link(con)
                con.execute("COMMIT")
            raise

    def settle(self) -> None:
        """Commit the group, if there is one; its threads get the error when that fails. Call with the lock held."""
        group, con = self.group, self._con
        if group is None:
            return
        try:
            if con is None or not con.in_transaction:
                group.failure = StorageError(f"{self.path}: another write of the same commit failed; write again")
            else:
                self.commit(con)
                group.failure = None
        except (*SQLITE_ERRORS, StorageError) as error:
            group.failure = noted(error, self.path, con)
        finally:
            self.group, self.lock.kept = None, False
            if group.failure is not None:
                self.drop_connection()
            group.end()

    def wait_for(self, group: Group) -> None:
        """Wait until another thread has committed the group; when none does, commit it here."""
        while not group.wait(_LOOK_AGAIN):
            try:
                self.lock.take_over()
                self.waiting.clear()  # one that was interrupted may be left; a thread that does wait loses little
                if self.group is group:
                    self.settle()
                group.end()
            finally:
                self.lock.release()

    def _is_checked(self) -> bool:
        """Is the database file as it was when its log was last found to be its own?"""
        try:
            at = os.stat(self._name)  # noqa: PTH116 - a third of the time that a Path takes
        except FileNotFoundError:
            return False
        return (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns) == self.pool.confirmed

    def _mark_file(self, con: apsw.Connection) -> None:
        """Before a log begins, put a token into the database file that no copy of it from before has."""
        link = _change_link(con)
        self._commit(con)
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
            self.settle()
            try_to_empty_log(self.connection())
        except SQLITE_ERRORS as error:
            raise noted(error, self.path) from error
        finally:
            self.lock.release()

    def rewrite(self, seconds: float) -> None:
        """Write the database file again, without free pages, and empty the log; waits so long for readers of the log.

        Raises StorageError when a reader does not end.
        """
        self.refuse_writing()
        self.lock.refuse_nesting()
        deadline = time.monotonic() + seconds
        try:
            self.lock.acquire()
            self.settle()
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
        self._keep_foreign_log()
        self.lock.exclude()
        try:
            self.settle()
            self.pool.close()
            self.drop_connection()
            self.lock.close_file()
        finally:
            self.lock.release()

    def _keep_foreign_log(self) -> None:
        """Where a copy was written into the database file, let no connection that closes copy the log into it."""
        try:
            self.pool.confirm()
        except StorageError:
            for con in filter(None, [self._con, *self.pool.connections()]):
                with suppress(*SQLITE_ERRORS):  # one that another thread uses
                    keep_log_on_close(con, True)

    def before_fork(self) -> bool:
        """Close every connection, so that the child inherits none; False when calls in other threads do not end."""
        if self.lock.held_here():
            return False
        try:
            if not self.lock.exclude(FORK_PATIENCE):
                return False
            self.settle()
            if not self.pool.pause(FORK_PATIENCE):
                self.lock.release()
                return False
            if self._con is not None:
                keep_log_on_close(self._con, True)
            self.drop_connection()
            self.lock.close_file()
        except BaseException:  # of a signal handler
            self.pool.resume()
            self.lock.release()
            raise
        return True

    def after_fork(self) -> None:
        """Go on after :meth:`before_fork`, in the parent and in the child; connections open when they are needed."""
        self.waiting.clear()  # in the child nobody waits; in the parent a commit is not shared
        self.pool.resume()
        self.lock.release()

    def disable_in_child(self) -> None:
        """In a child where :meth:`before_fork` failed: refuse all use."""
        _inherited.extend([*self.pool.disable_in_child(), self._con])
        _stranded_paths.add(self.path)
        self._con = None
        self.lock.close_file()
        self.lock = WriteLock(self.lock.path, self.lock.timeout, self.lock.new_mode)


def _change_link(con: apsw.Connection) -> bytes:
    """Begin a transaction that changes nothing but the link, and return the new one."""
    con.execute("BEGIN IMMEDIATE")
    link = next_link(first_row(con, "SELECT link FROM counters")[0], NO_TOKEN)
    con.execute("UPDATE counters SET link = ?", (link,))
    return link


def _is_empty(file: str) -> bool:
    try:
        return not os.stat(file).st_size  # noqa: PTH116 - a third of the time that a Path takes
    except FileNotFoundError:
        return True


class WriteContext:
    """The context of one write transaction; ``Records.write()`` makes it.

    Transactions of threads that write at once share a commit: a thread that has finished leaves its changes in the open
    transaction of SQLite, lets the next one continue it under a savepoint, and waits. The last one commits for all.
    """

    __slots__ = ("__weakref__", "_clock", "_dim", "_grouped", "_hold", "_operation", "_session", "_space", "_timeout")

    def __init__(
        self,
        session: Session,
        dim: int,
        timeout: float | None = None,
        space: tuple[str, ...] = (),
        clock: Callable[[], float] = time.time,
        operation: str | None = None,
        grouped: bool = False,
    ) -> None:
        self._space, self._clock, self._operation = space, clock, operation
        self._timeout = timeout
        self._session = session
        self._dim = dim
        self._grouped = grouped
        self._hold: _WriteHold

    def __enter__(self) -> Transaction:
        session = self._session
        self._hold = hold = _WriteHold(session)
        session.refuse_writing()
        session.lock.refuse_nesting()
        try:
            hold.guard = weakref.ref(self, hold.abandon)
            self._acquire()
            try:
                hold.con = session.connection()
            except StoreClosedError:
                session.lock.close_file()  # closed during the wait, which opened it again
                raise
            hold.tx = self._begun(hold.con)
            return hold.tx
        except SQLITE_ERRORS as error:
            hold.failed = True
            raise noted(error, session.path, hold.con) from error
        finally:
            if hold.tx is None:
                hold.leave()

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        hold, session = self._hold, self._session
        try:
            hold.failed = kind is None or issubclass(kind, (*SQLITE_ERRORS, StorageError))
            if kind is None and hold.tx is not None and hold.con is not None:
                hold.tx.finish()
                if self._grouped and (session.group is not None or session.waiting):
                    self._commit_together(hold, hold.tx)
                else:
                    session.commit(hold.con)
                hold.failed = False
        except SQLITE_ERRORS as error:
            raise noted(error, session.path, hold.con) from error
        finally:
            hold.leave()

    def _acquire(self) -> None:
        if not self._grouped:
            self._session.lock.acquire(self._timeout)
            self._session.settle()
            return
        me = threading.get_ident()
        try:
            self._session.waiting.add(me)
            self._session.lock.acquire(self._timeout)
        finally:
            self._session.waiting.discard(me)

    def _begun(self, con: apsw.Connection) -> Transaction:
        session = self._session
        if session.group is None:
            session.begin(con)
        else:
            con.execute("SAVEPOINT member")
        settings = self._space, self._clock, self._operation, session.text_of
        tx = Transaction(con, session.path, self._dim, session.floor, *settings)
        if session.group is not None:
            tx.link = session.group.link
        return tx

    def _commit_together(self, hold: _WriteHold, tx: Transaction) -> None:
        """Commit with the group, or leave that to the next thread and wait for it."""
        session = self._session
        joined, group = session.group is not None, session.group or Group(tx.link)
        hold.group = group
        session.group = group
        group.members += 1
        if joined and hold.con is not None:
            hold.con.execute("RELEASE member")
        if session.waiting and not group.is_full():
            hold.failed, hold.con, session.lock.kept = False, None, True
            session.lock.release()
            session.wait_for(group)
        else:
            session.settle()
        if group.failure is not None:
            raise copy.copy(group.failure) from group.failure


class _WriteHold:
    """What a write transaction holds, and how it is given back.

    Ctrl-C may arrive between any two steps, even where no ``with`` statement can look after them. Then ``guard`` gives
    everything back when the context is forgotten, which is at once.
    """

    __slots__ = ("con", "failed", "group", "guard", "session", "tx")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.con: apsw.Connection | None = None
        self.tx: Transaction | None = None
        self.group: Group | None = None
        """The group that commits the transaction; from then on it is no longer this one's to roll back."""
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
            if self.group is not None and (self.session.group is self.group or self.group.done):
                self.session.wait_for(self.group)
                self.failed = False
            elif self.con is not None:
                self._roll_back(self.con)
        except SQLITE_ERRORS:
            self.failed = True
        finally:
            if self.failed and self.con is not None:
                self.session.drop_connection()
            self.session.lock.release()
            self.con = self.guard = None

    def _roll_back(self, con: apsw.Connection) -> None:
        if self.session.group is not None:
            with suppress(apsw.SQLError):  # interrupted before the savepoint, or the transaction is gone
                con.execute("ROLLBACK TO member; RELEASE member")
            self.session.settle()
        elif con.in_transaction:
            con.execute("ROLLBACK")
