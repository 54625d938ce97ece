"""Lock files: one writer among threads and processes, one maintainer among processes."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from ..errors import LockTimeoutError, NetworkFilesystemError, ReadOnlyError, ReentrantCallError, StorageError
from ..utils.drafts import PRIVATE

__all__ = ["LOCK_SECONDS", "WriteLock", "file_mode", "filesystem_of", "one_process", "refuse_network_filesystem"]

_held: set[int] = set()
"""Open descriptors of lock files."""


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
        if held.st_uid == os.geteuid() and held.st_mode & 0o777 != mode:
            os.fchmod(handle, mode)
    return handle


@contextmanager
def one_process(path: Path, wait: bool, mode: int = PRIVATE) -> Iterator[bool]:
    """Hold the maintenance lock of a store; yields False when another process has it and ``wait`` is off.

    On a read-only file system nobody else can write a snapshot either, so the lock is granted without a file.
    """
    try:
        handle = _opened(path, mode)
    except OSError:
        yield True
        return
    _held.add(handle)
    try:
        yield _locked(handle, wait)
    finally:
        if handle in _held:  # not in a child forked meanwhile
            _held.discard(handle)
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing would not do: such a child has the file open too
            os.close(handle)


def _locked(handle: int, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _in_child() -> None:
    """The round goes on in the parent; its lock must not live as long as the child does."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


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

    def __init__(self, path: Path, timeout: float = LOCK_SECONDS, new_mode: int = PRIVATE) -> None:
        self.path = path
        self.new_mode = new_mode
        self.timeout = timeout
        self._threads = threading.RLock()
        self._here = _Here()
        self._file: io.FileIO | None = None

    def made(self) -> Path:
        """The path of the lock file, which is there now."""
        self._fileno()
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
            self._file = _open(self.path, self._mode())
        return self._file.fileno()

    def _mode(self) -> int:
        """That of the database, or of the one that is about to be made."""
        database = self.path.with_name(self.path.name.removesuffix(".lock") + ".db")
        return file_mode(database) if database.exists() else self.new_mode

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


def _open(path: Path, mode: int) -> io.FileIO:
    try:
        return io.FileIO(_opened(path, mode), "r+")
    except OSError as error:
        kind = ReadOnlyError if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else StorageError
        remedy = "make it and its folder writable"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "too many files are open; close some or raise the limit (ulimit -n)"
        message = f"{path}: the lock file cannot be opened ({error.strerror}); {remedy}"
        raise kind(message) from error
