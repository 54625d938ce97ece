"""Lock files: one writer among threads and processes, one maintainer among processes."""

from __future__ import annotations

import errno
import fcntl
import io
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from ..errors import (
    LockTimeoutError,
    NetworkFilesystemError,
    ReadOnlyError,
    ReentrantCallError,
    StorageError,
    TooManyFilesError,
)
from ..utils.drafts import PRIVATE
from ..utils.forking import renew_in_child
from .sqlite_errors import CLOSE_FILES

LOCK_SECONDS = 30.0
"""How long a write waits for others unless a setting says otherwise."""


class LockFile:
    """A file that one process, or one object of a process, holds at a time. It names the holder's process id.

    Waiting is fair among processes and ends with Ctrl-C. Two locks of the same file are taken one after the other: the
    process that waits for the second holds the first, so one that has just released both cannot overtake it. A forked
    child closes its copy, so that it does not keep the lock of its parent.
    """

    def __init__(self, path: Path, mode: Callable[[], int]) -> None:
        self.path = path
        self._mode = mode
        self._file: io.FileIO | None = None
        renew_in_child(self)

    def take(self, deadline: float) -> bool:
        """Wait for the lock until ``time.monotonic()`` reaches ``deadline``; False when another one still holds it."""
        if not self._wait(deadline):
            return False
        number, mine = self.fileno(), b"%-19d\n" % os.getpid()
        with suppress(OSError):  # a full disk has no room for the name, but the lock is taken
            if os.pread(number, 20, 0) != mine:  # a write would change the time stamp of the file, which costs more
                os.pwrite(number, mine, 0)
        return True

    def give(self) -> None:
        """Release the lock; nothing when it is not held. A child that has the file open does not keep it."""
        if self._file is not None:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)

    def holder(self) -> int | None:
        """The process that took the lock last."""
        with suppress(ValueError, OSError):
            return int(os.pread(self.fileno(), 20, 0))
        return None

    def close(self) -> None:
        """Close the file until it is needed again. In a child this leaves the parent's lock alone."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    after_fork = close

    def fileno(self) -> int:
        """The descriptor of the file, opened when needed. Raises ReadOnlyError, StorageError."""
        if self._file is None:
            self._file = _open(self.path, self._mode())
        return self._file.fileno()

    def _wait(self, deadline: float) -> bool:
        number = self.fileno()
        try:
            entered = _waited(
                lambda: fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB, 1),
                deadline,
                lambda: _free(lambda: fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1)),
            )
            return entered and _waited(lambda: fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB), deadline)
        finally:
            fcntl.lockf(number, fcntl.LOCK_UN, 2)


def file_mode(path: Path) -> int:
    """The mode of the files that belong to the database file ``path``: its own, and its owner may always write.

    Where there is no such file yet, only the owner may read and write.
    """
    try:
        return path.stat().st_mode & 0o666 | PRIVATE
    except FileNotFoundError:
        return PRIVATE


def _opened(path: Path, mode: int) -> int:
    """A descriptor of a lock file, which has this mode as far as this user may say so."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    with suppress(OSError):
        held = os.fstat(handle)
        if not stat.S_ISREG(held.st_mode):
            os.close(handle)
            raise StorageError(f"{path} is no regular file, and locks nothing; move it away")
        if held.st_uid == os.geteuid() and held.st_mode & 0o777 != mode:
            os.fchmod(handle, mode)
    return handle


@contextmanager
def one_process(path: Path, wait: bool, mode: int = PRIVATE) -> Iterator[bool]:
    """Hold the maintenance lock of a store; yields False when another process has it and ``wait`` is off.

    On a read-only file system nobody else can write a snapshot either, so the lock is granted without a file. Raises
    StorageError (TooManyFilesError) where the file cannot be opened for another reason.
    """
    lock = LockFile(path, lambda: mode)
    try:
        lock.fileno()
    except ReadOnlyError:
        yield True
        return
    try:
        yield lock.take(math.inf if wait else 0.0)
    finally:
        lock.give()
        lock.close()


NETWORK_FILESYSTEMS = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "pvfs2"),
        *("orangefs", "glusterfs", "9p", "coda", "davfs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.davfs"),
        *("fuse.davfs2", "fuse.s3fs", "fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.juicefs", "fuse.mfs"),
        *("fuse.smbnetfs", "fuse.curlftpfs", "fuse.blobfuse", "fuse.blobfuse2", "fuse.mount-s3", "fuse.cephfs"),
    }
)
"""Names as the kernel shows them in ``mountinfo``. SQLite's write-ahead log needs shared memory and POSIX locks that
all users of a file see; over a network neither can be relied on."""

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")


def refuse_network_filesystem(folder: Path, mounts: Path = _MOUNTS) -> None:
    """Raise NetworkFilesystemError when ``folder`` lies on one of ``NETWORK_FILESYSTEMS``."""
    name = filesystem_of(folder, mounts)
    if name in NETWORK_FILESYSTEMS:
        raise NetworkFilesystemError(
            f"{folder} lies on a network file system ({name}), where file locks and shared memory cannot be trusted; "
            "choose a prefix on a local disk and copy backups to the network"
        )


def filesystem_of(folder: Path, mounts: Path = _MOUNTS) -> str | None:
    """The type of the file system that holds ``folder``; None where the system does not tell.

    A ``9p`` mount counts as local when the root is 9p too: then the whole machine is a sandbox whose kernel mediates
    every file (gVisor), not a share of another machine (WSL, QEMU).
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    types = dict(filter(None, map(_mount, lines)))
    place = next((str(p) for p in (folder, *folder.parents) if str(p) in types), None)
    name = types.get(place) if place is not None else None
    return "9p sandbox" if name == "9p" and types.get("/") == "9p" else name


def _mount(line: str) -> tuple[str, str] | None:
    """(mount point, type) of a line such as ``36 35 98:0 /mnt1 /mnt2 rw shared:1 - ext3 /dev/root rw``."""
    before, dash, after = line.partition(" - ")
    fields = before.split(" ")
    if not dash or len(fields) < 5:
        return None
    point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4])
    return os.path.normpath(point), after.split(" ", 1)[0]


def _mode_of(lock_path: Path, new_mode: int) -> int:
    """The mode of the database, or of the one that is about to be made."""
    database = lock_path.with_name(lock_path.name.removesuffix(".lock") + ".db")
    return file_mode(database) if database.exists() else new_mode


class _Here(threading.local):
    """What the calling thread has to do with a lock."""

    inside = False


class WriteLock:
    """Held around every write transaction: a lock among threads, then a :class:`LockFile` among processes.

    Among threads a re-entrant lock is used only because it knows its owner: an interrupt that arrives at any point of
    :meth:`acquire` or :meth:`release` leaves nothing behind that the same thread's next release would not undo.

    A thread counts as inside from the moment when it begins to wait: a signal handler that runs during the wait would
    otherwise take the lock a second time and give back both.
    """

    def __init__(self, path: Path, timeout: float = LOCK_SECONDS, new_mode: int = PRIVATE) -> None:
        self.path = path
        self.new_mode = new_mode
        self.timeout = timeout
        self.kept = False
        """Does the process keep the lock file between two threads, for a commit that they share?"""
        self._threads = threading.RLock()
        self._here = _Here()
        self._file = LockFile(path, partial(_mode_of, path, new_mode))

    def made(self) -> Path:
        """The path of the lock file, which exists now."""
        self._file.fileno()
        return self.path

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
            if not self.kept and not self._file.take(deadline):
                self._give_up(patience, self._file.holder())
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give back what the calling thread holds; nothing when it holds nothing."""
        try:
            if self._threads.acquire(blocking=False):
                try:
                    if not self.kept:
                        self._file.give()
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

    def take_over(self) -> None:
        """Go on inside, until :meth:`release`, where a thread has left the lock file to others."""
        self._threads.acquire()

    def close_file(self) -> None:
        """Close the lock file until it is needed again."""
        self._file.close()

    def _release_threads(self) -> None:
        try:
            while True:
                self._threads.release()
        except RuntimeError:
            return

    def _give_up(self, patience: float, holder: int | None) -> NoReturn:
        who = "another process" if holder is None else f"process {holder}"
        raise LockTimeoutError(
            f"{self.path}: {who} has held the writer lock for more than {patience:g} s; wait for it or end it, or "
            "raise MEMEVOLVE_STORAGE_LOCK_TIMEOUT"
        )


_PAUSES = ((0.05, 0.0001), (0.5, 0.0005), (math.inf, 0.005))
_PAUSES_OF_OLDEST = ((2.0, 0.0001), (math.inf, 0.001))
"""Up to how many seconds of waiting, how many seconds pass between two attempts; the second: of the one
who has waited longest.

Polled, because a blocking wait has no timeout. Measured with four processes that do nothing but durable writes on a
busy machine (median of three: writes a second, 99th percentile of the wait): 580 and 40 ms; with a blocking lock 280
and 44 ms; with pauses that double up to 5 ms 230 and 145 ms.
"""


def _waited(take: Callable[[], object], deadline: float, is_oldest: Callable[[], bool] = bool) -> bool:
    """Try until a lock is taken; False when the deadline has passed.

    ``is_oldest`` is asked after the first of the pauses: one who has waited long looks as often as those who come.
    """
    began, oldest = time.monotonic(), False
    while not _free(take):
        waited = time.monotonic() - began
        if began + waited >= deadline:
            return False
        oldest = oldest or (waited > _PAUSES[0][0] and is_oldest())
        time.sleep(next(pause for until, pause in (_PAUSES_OF_OLDEST if oldest else _PAUSES) if waited < until))
    return True


def _free(take: Callable[[], object]) -> bool:
    """Try once to take a lock; False when another one holds it."""
    try:
        take()
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _open(path: Path, mode: int) -> io.FileIO:
    try:
        return io.FileIO(_opened(path, mode), "r+")
    except OSError as error:
        kind = ReadOnlyError if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else StorageError
        remedy = "make it and its folder writable"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            kind = TooManyFilesError
            remedy = CLOSE_FILES
        message = f"{path}: the lock file cannot be opened ({error.strerror}); {remedy}"
        raise kind(message) from error
