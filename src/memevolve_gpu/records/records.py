"""The truth: units, their vectors, their ids and the log of every change, in one SQLite file."""

from __future__ import annotations

import os
from pathlib import Path

from ..types import Metric
from . import fork
from .backup import backup
from .check import Finding, TextOf, default_text, examine, repair
from .connections import Durability
from .damage import clear_damage, damage_of
from .lock import LOCK_SECONDS, WriteLock
from .opening import Wish, database_path, lock_path, open_store, peek
from .pool import ReaderPool
from .reading import Reading
from .restore import backup_path, restore
from .schema import StoreFacts
from .writer import Session, Writing

__all__ = ["Records"]


class Records(Reading):
    """An open store.

    Reading works from any thread at any time; :meth:`write` admits one writer over all threads and processes. After
    ``os.fork`` parent and child each open connections of their own.

    store_id: 32 hex digits; dim: length of the vectors; metric; path: the database file; read_only: whether writing is
    refused.
    """

    def __init__(self, path: Path, wish: Wish, lock_timeout: float = LOCK_SECONDS) -> None:
        lock = WriteLock(lock_path(path), lock_timeout)
        with fork.held_off(path):
            try:
                opened = open_store(path, lock, wish)
            except BaseException:
                lock.close_file()
                raise
            pool = ReaderPool(path, vfs=wish.vfs, unshared=opened.unshared)
            self._session = Session(path, lock, opened.con, pool, wish.durability, opened.read_only)
            fork.watch(self._session)
        super().__init__(path, pool)
        self.store_id: str = opened.facts.store_id
        self.dim: int = opened.facts.dim
        self.metric: Metric = opened.facts.metric
        self.read_only: bool = opened.read_only

    @classmethod
    def open(
        cls,
        prefix: str | os.PathLike[str],
        *,
        dim: int | None = None,
        metric: Metric | None = "l2",
        durability: Durability = "full",
        create: bool = True,
        vfs: str | None = None,
        lock_timeout: float = LOCK_SECONDS,
    ) -> Records:
        """Open ``<prefix>.db``, or create it.

        dim: length of the vectors; None reads it from an existing file. metric: l2, cosine or ip; None likewise.
        durability: full syncs every commit; under normal a power cut may lose the last commits, a crash of the
        process none. vfs: name of an apsw VFS. lock_timeout: seconds that a write waits for others.
        Raises ConfigurationError, DimensionMismatchError, StorageError,
        NotAStoreError, NewerSchemaError, ReadOnlyError (when creating), NetworkFilesystemError, CorruptStoreError.
        """
        return cls(database_path(prefix), Wish(dim, metric, durability, create, vfs), lock_timeout)

    @staticmethod
    def peek(prefix: str | os.PathLike[str]) -> StoreFacts | None:
        """What the store at ``prefix`` is, without keeping it open; None when there is none. Raises as opening does."""
        path = database_path(prefix)
        with fork.held_off(path):
            return peek(path)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; waits for a running write. Every later call but this raises StoreClosedError."""
        self._session.close()

    def write(self, timeout: float | None = None) -> Writing:
        """A context manager that yields a :class:`Transaction`: committed on success, rolled back on any exception.

        Waits for other writers, at most ``timeout`` seconds, by default those given to :meth:`open`; Ctrl-C ends the
        wait. Raises ReadOnlyError, StorageFullError, LockTimeoutError, StorageError.
        """
        return Writing(self._session, self.dim, timeout)

    def purge(self, upto_seq: int) -> int:
        """Forget the log entries up to ``upto_seq``, record the horizon, and return how many went."""
        with self.write() as tx:
            return tx.purge(upto_seq)

    def checkpoint(self) -> None:
        """Fold the keyword index, and copy the write-ahead log into the database as far as readers allow."""
        with self.write() as tx:
            tx.fold()
        self._session.empty_log()

    def backup(self, target: str | os.PathLike[str]) -> Path:
        """Write a consistent copy while the store is in use, and return its path: ``target``, ending in ``.db``.

        The copy is a store of its own with its own ``store_id``, so that no snapshot of the original is ever taken
        for its. Raises StorageError when the target exists.
        """
        goal = database_path(os.fspath(target).removesuffix(".db"))
        return self._read(lambda con: backup(con, goal, self._pool.vfs, self._pool.is_current))

    def check(self, fix: bool = False, *, text_of: TextOf = default_text) -> list[Finding]:
        """Compare everything with everything; with ``fix`` repair what can be repaired, under the write lock.

        text_of: the keyword text of a unit, in case the keyword index must be rebuilt. After a repair every index
        finds itself below the horizon and reloads.
        """
        if not fix:
            found = self._snapshot(lambda con: examine(con, self.dim))
        else:
            with self.write() as tx:
                found = tx.outside(lambda con: repair(con, self.dim, text_of))
        if all(finding.fixed for finding in found):
            clear_damage(self.path)
        return found

    @property
    def damage(self) -> str | None:
        """The first damage that any process met in this store; None since :meth:`check` found or left none."""
        return damage_of(self.path)

    @staticmethod
    def restore(backup: str | os.PathLike[str], prefix: str | os.PathLike[str]) -> Path | None:
        """See :func:`.restore.restore`."""
        path = database_path(prefix)
        with fork.held_off(path):
            return restore(backup_path(backup), path)

    def file_bytes(self) -> dict[str, int]:
        """Sizes in bytes of the ``database`` and of its write-ahead log, ``wal``."""
        files = {"database": self.path, "wal": self.path.with_name(self.path.name + "-wal")}
        return {name: file.stat().st_size if file.exists() else 0 for name, file in files.items()}
