"""Files that are written under a draft name and take their own name when they are complete.

The process that writes a draft holds a lock on it (``flock``), which the system releases when the process ends.
So a draft that can be locked is abandoned and may be removed, in any process and any container.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

PRIVATE = 0o600
"""Mode of a file that only its owner may read and write."""

_DRAFT = re.compile(r"(?P<target>.+)\.[0-9]+\.[0-9a-f]{8}\.tmp", re.DOTALL)
_SIDECARS = ("-journal", "-wal", "-shm")


class Draft(NamedTuple):
    """path: of the file; handle: its open descriptor, for reading and writing."""

    path: Path
    handle: int


@contextmanager
def draft_of(target: Path, mode: int = PRIVATE) -> Iterator[Draft]:
    """An empty file of this mode beside ``target``. What is still under the draft's name at the end is removed."""
    made = _locked_draft(target, mode)
    try:
        yield made
    finally:
        _give_up(made.path, made.handle)


def name_file(handle: int, target: Path, mode: int = PRIVATE) -> bool:
    """Give a file that has no name (O_TMPFILE), complete and synced, the name and mode, in place of what is there.

    False where the system cannot, and then nothing is changed. The caller syncs the folder.
    """
    path = _draft_path(target)
    try:
        _lock(handle, mode)
        os.link(f"/proc/self/fd/{handle}", path, src_dir_fd=handle, follow_symlinks=True)
        path.replace(target)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    return True


def remove_abandoned_drafts(targets: list[Path]) -> int:
    """Remove the drafts that killed processes left beside these files of one folder; returns how many there were."""
    names, gone = {target.name for target in targets}, 0
    with suppress(OSError):
        for path in list(targets[0].parent.iterdir()):
            match = _DRAFT.fullmatch(path.name)
            if match is not None and match["target"] in names:
                gone += _remove_if_abandoned(path)
    return gone


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    number = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _draft_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _locked_draft(target: Path, mode: int) -> Draft:
    while True:
        path = _draft_path(target)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            _lock(handle, mode)
            if _names(path, handle):  # else another process removed it before it was locked
                return Draft(path, handle)
        except BaseException:
            _give_up(path, handle)
            raise
        os.close(handle)


def _lock(handle: int, mode: int) -> None:
    with suppress(OSError):  # a file system without modes, or without locks
        os.fchmod(handle, mode)
        fcntl.flock(handle, fcntl.LOCK_EX)


def _remove_if_abandoned(path: Path) -> bool:
    with suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _names(path, handle):
                    _remove(path)
                    return True
        finally:
            os.close(handle)
    return False


def _names(path: Path, handle: int) -> bool:
    """Is this still the name of the open file?"""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _give_up(path: Path, handle: int) -> None:
    """Remove a draft and release its lock; where it cannot be removed, the next opening finds it abandoned."""
    try:
        _remove(path)
    finally:
        os.close(handle)


def _remove(draft: Path) -> None:
    """Remove a draft, after what SQLite leaves beside it: killed in between, the draft still shows the way."""
    for ending in _SIDECARS:
        draft.with_name(draft.name + ending).unlink(missing_ok=True)
    draft.unlink(missing_ok=True)
