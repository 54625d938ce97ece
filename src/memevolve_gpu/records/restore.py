"""Put a backup in a store's place, so that a process killed at any step leaves one whole store.

The backup is verified and copied to a draft. The old files get second names (hard links), then the draft takes the
database's name in one step, then the old log and what was derived from the old units go. Killed before that step, the
old store is whole, and the next opening removes the second name. Killed after it, the restored store is whole, and the
next opening removes the old log, which is recognised as another file's.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from ..errors import CorruptStoreError, StorageError
from .backup import copy_database, drop_draft
from .check import examine
from .connections import connect, shut
from .damage import damage_path
from .failures import FOREIGN, translated
from .lineage import beside, locked_alone, sync_folder, why_foreign
from .lock import WriteLock
from .network import refuse_network_filesystem
from .schema import facts_of, state_of

__all__ = ["backup_path", "drop_second_name", "has_second_name", "restore"]

_REPLACED = ".replaced-"


def backup_path(backup: str | os.PathLike[str]) -> Path:
    """The database file of a backup that was named with or without its ending ``.db``. Raises StorageError."""
    given = Path(os.fspath(backup))
    for path in (given, given.with_name(given.name + ".db")):
        if path.is_file():
            return path.resolve()
    raise StorageError(f"there is no backup at {given}; check the path")


def restore(backup: Path, path: Path, vfs: str | None = None) -> Path | None:
    """Replace the store at ``path`` by a copy of ``backup``; returns the new name of the old database file, if any.

    The old store stays whole under that name. Raises StorageError while any process has the store open, and
    CorruptStoreError when the backup is damaged; nothing is changed then.
    """
    if backup == path:
        raise StorageError(f"{backup} is the store itself; name a backup of it")
    if not path.parent.is_dir():
        raise StorageError(f"the folder {path.parent} does not exist; create it first")
    refuse_network_filesystem(path.parent)
    lock = WriteLock(path.with_name(path.name.removesuffix(".db") + ".lock"))
    try:
        lock.acquire()
        drop_second_name(path)
        if not path.exists():
            return _replace(backup, path, vfs)
        refusal = f"{path} is open in another process, or in this one; close it everywhere, then restore"
        try:
            with locked_alone(path, vfs, refusal):
                return _replace(backup, path, vfs)
        except CorruptStoreError as error:
            raise (StorageError(refusal) if str(error) == refusal else error) from error
    except FOREIGN as error:
        raise translated(error, path) from error
    finally:
        lock.release()
        lock.close_file()


def drop_second_name(path: Path) -> None:
    """Remove the second name that a restore gave to the database file before it was killed; the store is untouched.

    Call with the writer lock held: a restore may be at work.
    """
    if not has_second_name(path):
        return
    for other in list(path.parent.iterdir()):
        is_old = other.name.startswith(path.name.removesuffix(".db") + _REPLACED) and other.name.endswith(".db")
        if is_old and other.samefile(path):
            beside(other, "-wal").unlink(missing_ok=True)
            other.unlink()


def has_second_name(path: Path) -> bool:
    """Does the database file have another name too?"""
    return path.exists() and path.stat().st_nlink > 1


def _replace(backup: Path, path: Path, vfs: str | None) -> Path | None:
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _copy_verified(backup, draft, vfs)
        _take_over_rights(draft, path)
        aside = _keep_old(path)
        sync_folder(path.parent)
        draft.replace(path)
    finally:
        drop_draft(draft)
    for leftover in (*(beside(path, ending) for ending in ("-wal", "-shm", "-journal")), *_derived(path)):
        leftover.unlink(missing_ok=True)
    sync_folder(path.parent)
    return aside


def _copy_verified(backup: Path, draft: Path, vfs: str | None) -> None:
    """Raises CorruptStoreError when the backup, or the copy, contradicts itself; NotAStoreError for another file."""
    why = why_foreign(backup, vfs)
    if why is not None:
        raise CorruptStoreError(f"{why}; nothing was restored")
    has_log = beside(backup, "-wal").exists()
    source = connect(backup, read_only=True, immutable=not has_log, vfs=vfs)
    try:
        if state_of(source, backup) == 0:
            raise StorageError(f"{backup} is empty; choose another backup")
        copy_database(source, draft, vfs)
    except FOREIGN as error:
        raise translated(error, backup) from error
    finally:
        shut(source)
    copy = connect(draft, vfs=vfs)
    try:
        found = examine(copy, facts_of(copy).dim)
    finally:
        shut(copy)
    if found:
        raise CorruptStoreError(f"{backup} is damaged: {found[0].message}; nothing was restored, choose another backup")


def _take_over_rights(draft: Path, path: Path) -> None:
    """The new file is as readable as the old one was."""
    if path.exists():
        old = path.stat()
        draft.chmod(old.st_mode & 0o777)
        if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()) and os.geteuid() == 0:
            os.chown(draft, old.st_uid, old.st_gid)
    with draft.open("rb+") as file:
        os.fsync(file.fileno())


def _keep_old(path: Path) -> Path | None:
    """Give database file and log second names, which stay when the first are taken over."""
    stamp = f"{path.name.removesuffix('.db')}{_REPLACED}{time.strftime('%Y%m%d-%H%M%S')}"
    names = (path.with_name(f"{stamp}{more}.db") for more in ("", *(f"-{n}" for n in range(1, 1000))))
    aside = next(name for name in names if not name.exists() and not beside(name, "-wal").exists())
    was_there = path.exists()
    if was_there:
        os.link(path, aside)  # first: by this name an opening finds what a killed restore left
    if beside(path, "-wal").exists():
        os.link(beside(path, "-wal"), beside(aside, "-wal"))
    return aside if was_there else None


def _derived(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name.removesuffix(".db") + ".snapshot"), damage_path(path)
