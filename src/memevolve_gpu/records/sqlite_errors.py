"""Translate errors of SQLite and the operating system to ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import apsw

from ..errors import (
    CorruptStoreError,
    MemEvolveError,
    NotAStoreError,
    ReadOnlyError,
    StorageError,
    StorageFullError,
    StoreClosedError,
    TooManyFilesError,
)

SQLITE_ERRORS = (apsw.Error, OSError, UnicodeDecodeError)
"""What a call into SQLite may raise: its own errors, those of a virtual file system written in Python, and, for a text
that is damaged, that it is not UTF-8."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def translate_error(error: BaseException, path: Path, con: apsw.Connection | None = None) -> MemEvolveError:
    """The error of ours that says what happened to the database file ``path`` and what to do about it.

    con: where it happened; SQLite takes a quota or a file size limit for any I/O error, but keeps the system's number.
    """
    kind, remedy = _verdict(error)
    if con is not None and isinstance(error, apsw.IOError) and con.system_errno in _FULL:
        kind, remedy = StorageFullError, _FREE_SPACE
    what = "cannot be opened" if remedy is CLOSE_FILES else _text(error)  # SQLite blames what it tried to open
    return kind(f"{path}: {what}; {remedy}")


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _verdict(error: BaseException) -> tuple[type[StorageError], str]:
    if isinstance(error, OSError):
        return _system_verdict(error.errno)
    if getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_SHMSIZE:
        return StorageFullError, _FREE_SPACE  # the shared memory file could not grow; SQLite has no better word for it
    if type(error) in _MAY_LACK_DESCRIPTORS and _out_of_descriptors():
        return TooManyFilesError, CLOSE_FILES
    for foreign, kind, remedy in _VERDICTS:
        if isinstance(error, foreign):
            return kind, remedy
    return StorageError, "close the store, look at the disk and the system log, then run check()"


def _system_verdict(number: int | None) -> tuple[type[StorageError], str]:
    if number in _FULL:
        return StorageFullError, _FREE_SPACE
    if number in _NO_DESCRIPTORS:
        return TooManyFilesError, CLOSE_FILES
    if number in _READ_ONLY:
        return ReadOnlyError, _MAKE_WRITABLE
    return StorageError, "look at the disk and the system log"


_MAY_LACK_DESCRIPTORS = (apsw.CantOpenError, apsw.SQLError, apsw.NoFTS5Error)
"""What apsw raises, among other things, when SQLite cannot open a file; it does not say why."""


def _out_of_descriptors() -> bool:
    """Whether fewer files can be opened than an open store has."""
    taken: list[int] = []
    try:
        while len(taken) < _FILES_OF_A_STORE:
            taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in _NO_DESCRIPTORS
    finally:
        for handle in taken:
            os.close(handle)
    return False


_FILES_OF_A_STORE = 7
"""Descriptors of a store that one thread writes and reads; each further thread that reads at once takes two more."""


_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
CLOSE_FILES = (
    f"this process, or the machine, has too many files open: a store takes {_FILES_OF_A_STORE}, and 2 more for each "
    "thread that reads at once; close stores that are not in use, or raise the limit (ulimit -n)"
)
_FREE_SPACE = "free disk space or raise the quota; what was acknowledged is safe"
_MAKE_WRITABLE = "make the file, its folder and its file system writable for this user, or copy the store elsewhere"

_VERDICTS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], type[StorageError], str], ...] = (
    (apsw.FullError, StorageFullError, _FREE_SPACE),
    ((apsw.ReadOnlyError, apsw.PermissionsError), ReadOnlyError, _MAKE_WRITABLE),
    (apsw.NotADBError, NotAStoreError, "choose another prefix; the file was left as it is"),
    (
        (apsw.CorruptError, apsw.FormatError),
        CorruptStoreError,
        "run check(fix=True); if damage remains, restore a backup and keep the damaged file",
    ),
    (
        (apsw.ConnectionClosedError, apsw.CursorClosedError),
        StoreClosedError,
        "open the store again",
    ),
    (
        (apsw.BusyError, apsw.LockedError),
        StorageError,
        "another program holds the database locked; end its transaction and try again",
    ),
    (apsw.CantOpenError, StorageError, "check that the folder exists and that this user may write to it"),
    ((apsw.IOError, apsw.ProtocolError), StorageError, "look at the disk and the system log, then run check()"),
    (
        (apsw.ConstraintError, apsw.SQLError),
        CorruptStoreError,
        "the records contradict each other; run check(fix=True)",
    ),
    (UnicodeDecodeError, CorruptStoreError, "a text in it is not UTF-8; run check()"),
    (apsw.NoMemError, StorageError, "free memory and try again"),
    (apsw.TooBigError, StorageError, "the row is too large for SQLite; store a smaller unit"),
)
