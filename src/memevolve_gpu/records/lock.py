"""The one writer: a lock among threads and, through a lock file, among processes."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ..errors import LockTimeoutError, ReadOnlyError, ReentrantCallError, StorageError

__all__ = ["LOCK_SECONDS", "WriteLock"]

LOCK_SECONDS = 30.0
"""How long a write waits for others unless a setting says otherwise."""


class _Here(threading.local):
    """What the calling thread has to do with a lock."""

    inside = False


class WriteLock:
    """Held around every write transaction. Waiting is fair among processes and ends with Ctrl-C.

    Two locks of the same file, taken one after the other: whoever waits for the second holds the first, so a process
    that has just released both cannot overtake it. SQLite's own waiting polls and starves one side. The holder's
    process id stands in the file.

    Among threads a re-entrant lock is used only because it knows its owner: an interrupt that arrives at any point of
    :meth:`acquire` or :meth:`release` leaves nothing behind that the same thread's next release would not undo.

    A thread counts as inside from the moment when it begins to wait: a signal handler that runs during the wait would
    otherwise take the lock a second time and give back both.
    """

    def __init__(self, path: Path, timeout: float = LOCK_SECONDS) -> None:
        self.path = path
        self.timeout = timeout
        self._threads = threading.RLock()
        self._here = _Here()
        self._file: io.FileIO | None = None

    def refuse_nesting(self) -> None:
        """Raise ReentrantCallError in the thread that holds the lock or waits for it: it would wait for itself."""
        if self.held_here():
            raise ReentrantCallError(
                "write() inside write() in one thread would wait for itself; use the open transaction, and from a "
                "signal handler or finalizer write later"
            )

    def acquire(self, timeout: float | None = None) -> None:
        """Wait for the lock, at most ``timeout`` seconds, by default those of the store.

        Call :meth:`refuse_nesting` before. Raises LockTimeoutError, which names the process that holds the lock.
        """
        patience = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + patience
        try:
            self._here.inside = True
            if not self._threads.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
                self._give_up(patience, os.getpid())
            number = self._fileno()
            if not self._take_files(number, deadline):
                self._give_up(patience, _holder(number))
            os.pwrite(number, f"{os.getpid():<19}\n".encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give back whatever the calling thread holds; nothing when it holds nothing."""
        try:
            if self._threads.acquire(blocking=False):
                try:
                    if self._file is not None:
                        fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)
                finally:
                    self._release_threads()
        finally:
            self._here.inside = False

    def held_here(self) -> bool:
        """Does the calling thread hold the lock, or wait for it?"""
        return self._here.inside

    def exclude(self, timeout: float = -1) -> bool:
        """Keep other threads of this process from writing until :meth:`release`; leaves the lock file alone."""
        return not self.held_here() and self._threads.acquire(timeout=timeout)

    def close_file(self) -> None:
        """Forget the lock file. Closing a descriptor inherited over fork leaves the parent's lock alone."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _release_threads(self) -> None:
        try:
            while True:
                self._threads.release()
        except RuntimeError:
            return

    def _fileno(self) -> int:
        if self._file is None:
            self._file = _open(self.path)
        return self._file.fileno()

    def _give_up(self, patience: float, holder: int | None) -> NoReturn:
        who = "another process" if holder is None else f"process {holder}"
        raise LockTimeoutError(
            f"{self.path}: {who} has held the writer lock for more than {patience:g} s; wait for it or end it, or "
            "raise MEMEVOLVE_STORAGE_LOCK_TIMEOUT"
        )

    @staticmethod
    def _take_files(number: int, deadline: float) -> bool:
        if not _waited(lambda: fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB, 1), deadline):
            return False
        try:
            return _waited(lambda: fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB), deadline)
        finally:
            fcntl.lockf(number, fcntl.LOCK_UN, 1)


def _waited(take: Callable[[], object], deadline: float) -> bool:
    """Try to take a lock, more and more rarely up to 200 times a second; False when the deadline has passed."""
    pause = 0.0001
    while True:
        try:
            take()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        else:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.005)


def _holder(number: int) -> int | None:
    with suppress(ValueError, OSError):
        return int(os.pread(number, 20, 0))
    return None


def _open(path: Path) -> io.FileIO:
    try:
        return io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    except OSError as error:
        kind = ReadOnlyError if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else StorageError
        remedy = "make it and its folder writable"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "too many files are open; close some or raise the limit (ulimit -n)"
        message = f"{path}: the lock file cannot be opened ({error.strerror}); {remedy}"
        raise kind(message) from error
