"""Spills: files without a name that hold rows of vectors until a snapshot takes them over.

A spill is the draft of the next snapshot: each row lies where that snapshot has it, ``FIRST_ROW`` bytes behind its
place in the allocation. What comes before, such as the rows that are mapped from an older snapshot, is a hole. A
snapshot of the rows copies only those of the hole, adds its header and its other sections, and gives the file a name.
Where the file system cannot name such files, the snapshot copies all rows.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from pathlib import Path

FIRST_ROW = 65_536
"""Where the first row lies in a file: a multiple of the size of every page."""
KEPT_FREE = 64 << 20
"""Bytes that a spill leaves free on the disk besides room for a snapshot: the records come first, and must be able to
copy a full log (see ``LOG_BYTES`` in ``records/connections.py``)."""
_OTHERS_SHARE = 4
"""The other sections of a snapshot take at most this part of its vectors: codes, slots and ids."""
_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02


class Descriptor:
    """A file that stays open as long as this object lives."""

    def __init__(self, file: int) -> None:
        self.file = os.dup(file)
        weakref.finalize(self, os.close, self.file)


class Spill(Descriptor):
    """Holds what an allocation has from ``start`` bytes on, and is given back with it.

    Blocks of the disk are reserved before rows are written, since a full disk would end the process at the write.
    """

    sealed = False
    """Whether no rows may follow: a snapshot has taken the file over, or is about to."""

    def __init__(self, folder: Path, start: int, size: int) -> None:
        """``size`` bytes is the whole allocation.

        Raises:
            OSError: the folder takes no file, or the system cannot reserve blocks.
        """
        if not hasattr(os, "posix_fallocate"):
            raise OSError("this system reserves no blocks")
        self.start, self._size, self._process = start, size, os.getpid()
        try:
            file, self._nameable = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), True
        except OSError:
            with tempfile.TemporaryFile(dir=folder) as other:
                file, self._nameable = os.dup(other.fileno()), False
        try:
            super().__init__(file)
        finally:
            os.close(file)
        os.truncate(self.file, FIRST_ROW + size)

    @property
    def may_become_a_snapshot(self) -> bool:
        """Whether this process may give the file a name; a forked child only reads it."""
        return self._nameable and os.getpid() == self._process

    def reserve(self, low: int, high: int) -> bool:
        """Whether the bytes ``low`` to ``high`` of the allocation may be written; a forked child may write none.

        Where the disk would keep no room for a snapshot of them and for the log of the records, none may.
        """
        if os.getpid() != self._process:
            return False
        low = max(low, self.start)
        copied = self.start + high // _OTHERS_SHARE if self._nameable else high
        try:
            if high > low:
                disk = os.fstatvfs(self.file)
                if disk.f_bavail * disk.f_frsize < high - low + copied + KEPT_FREE:
                    return False
                os.posix_fallocate(self.file, FIRST_ROW + low, high - low)
        except OSError:
            return False
        return True

    def give_back(self, end: int) -> None:
        """Undo what a failed snapshot has written around the rows, which end at byte ``end``; rows may follow again.

        A file that has a name by now stays as it is.

        Raises:
            OSError: the system cannot.
        """
        if os.fstat(self.file).st_nlink:
            return
        os.truncate(self.file, FIRST_ROW + end)
        os.truncate(self.file, FIRST_ROW + self._size)
        punch = ctypes.CDLL(None).fallocate
        punch.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        punch(self.file, _KEEP_SIZE_PUNCH_HOLE, 0, FIRST_ROW + self.start)  # a file system without holes keeps them
        self.sealed = False
