"""The one writer: a lock among threads and, through a lock file, among processes."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import threading
from pathlib import Path

from ..errors import ReadOnlyError, ReentrantCallError, StorageError

__all__ = ["WriteLock"]


class _Here(threading.local):
    """What the calling thread has to do with a lock."""

    inside = False


class WriteLock:
    """Held around every write transaction. Waiting is fair among processes and ends with Ctrl-C.

    Two locks of the same file, taken one after the other: whoever waits for the second holds the first, so a process
    that has just released both cannot overtake it. SQLite's own waiting polls and starves one side.

    Among threads a re-entrant lock is used only because it knows its owner: an interrupt that arrives at any point of
    :meth:`acquire` or :meth:`release` leaves nothing behind that the same thread's next release would not undo.

    A thread counts as inside from the moment when it begins to wait: a signal handler that runs during the wait would
    otherwise take the lock a second time and give back both.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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

    def acquire(self) -> None:
        """Wait for the lock. Call :meth:`refuse_nesting` before."""
        try:
            self._here.inside = True
            self._threads.acquire()
            self._take_files(self._fileno())
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

    @staticmethod
    def _take_files(number: int) -> None:
        fcntl.lockf(number, fcntl.LOCK_EX, 1)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
        finally:
            fcntl.lockf(number, fcntl.LOCK_UN, 1)


def _open(path: Path) -> io.FileIO:
    try:
        return io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    except OSError as error:
        kind = ReadOnlyError if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else StorageError
        message = f"{path}: the lock file cannot be opened ({error.strerror}); make it and its folder writable"
        raise kind(message) from error
