"""Backups, and restoring one: the store is wholly old or wholly restored at every step.

The backup is verified and copied to a draft. The old files get second names (hard links), then the draft takes the
database's name in one step, then the old log and what was derived from the old units go. Killed before that step, the
old store is whole, and the next opening removes the second name. Killed after it, the restored store is whole, and the
next opening removes the old log, which is recognised as another file's.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import apsw

from ..errors import CorruptStoreError, StorageError
from ..utils.arguments import path_text
from ..utils.drafts import Draft, draft_of, remove_abandoned_drafts, sync_folder
from .check import examine
from .connections import connect, first_row, shut
from .damage import damage_path, derived_paths
from .file_lock import WriteLock, file_mode, refuse_network_filesystem
from .lineage import beside, first_link, locked_alone, why_foreign
from .schema import VERSION, facts_of, migrate, state_of
from .sqlite_errors import SQLITE_ERRORS, translate_error

PAGES_PER_STEP = 256
"""So that Ctrl-C is heard every megabyte."""


def backup(
    source: apsw.Connection, path: Path, target: Path, vfs: str | None, is_current: Callable[[apsw.Connection], bool]
) -> Path:
    """Copy what ``source``, a connection to ``path``, reads, as of one moment, into the new file ``target``.

    Makes nothing when ``source`` is not current any more.

    The copy is written beside the target and takes its name when it is complete and synced.
    """
    _refuse_target(target)
    remove_abandoned_drafts([target])
    try:
        with draft_of(target, file_mode(path)) as draft:
            copy_database(source, draft.path, vfs)
            if is_current(source):
                _publish(draft.path, target)
    except SQLITE_ERRORS as error:
        raise translate_error(error, target) from error
    return target


def _refuse_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise StorageError(f"the folder {target.parent} does not exist; create it first")
    for name in (target.name, target.name + "-wal", target.name + "-journal"):
        if target.with_name(name).exists():
            raise StorageError(f"{target.with_name(name)} exists; choose another target for the backup")


def copy_database(source: apsw.Connection, draft: Path, vfs: str | None) -> None:
    """Copy what ``source`` reads, as of one moment, into the new file ``draft``: a store of its own, without a log."""
    copy = apsw.Connection(str(draft), vfs=vfs)
    try:
        source.execute("BEGIN")
        source.execute("SELECT 1 FROM store").fetchall()
        with copy.backup("main", source, "main") as steps:
            while not steps.done:
                steps.step(PAGES_PER_STEP)
        if first_row(copy, "PRAGMA journal_mode = delete")[0] != "delete":  # how SQLite says that a write failed
            raise StorageError(f"{draft}: the copy could not be finished; look at the disk and the system log")
        _rename(copy, draft)
    finally:
        if source.in_transaction:
            source.execute("ROLLBACK")
        copy.close()


def _rename(copy: apsw.Connection, draft: Path) -> None:
    """Give the copy an identity of its own, in the schema of today."""
    copy.execute("BEGIN IMMEDIATE")
    try:
        version = state_of(copy, draft)
        if version < VERSION:
            migrate(copy, version)
        copy.execute("UPDATE store SET store_id = ?", (uuid.uuid4().hex,))
        copy.execute("UPDATE counters SET link = ?", (first_link(),))
        copy.execute("COMMIT")
    finally:
        if copy.in_transaction:
            copy.execute("ROLLBACK")


def _publish(draft: Path, target: Path) -> None:
    """Give the draft its name, unless another file took it meanwhile; make the name durable."""
    try:
        os.link(draft, target)
    except FileExistsError as error:
        raise StorageError(f"{target} exists; choose another target for the backup") from error
    sync_folder(target.parent)


_REPLACED = ".replaced-"


def backup_path(backup: str | os.PathLike[str]) -> Path:
    """The database file of a backup that was named with or without its ending ``.db``. Raises StorageError."""
    given = Path(path_text("backup", backup))
    for path in (given, Path(f"{given}.db")):
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
    lock = WriteLock(path.with_name(path.name.removesuffix(".db") + ".lock"), new_mode=file_mode(backup))
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
    except SQLITE_ERRORS as error:
        raise translate_error(error, path) from error
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
    remove_abandoned_drafts([path])
    with draft_of(path, file_mode(path if path.exists() else backup)) as draft:
        _copy_verified(backup, draft.path, vfs)
        _take_over_owner(draft, path)
        aside = _keep_old(path)
        sync_folder(path.parent)
        draft.path.replace(path)
    of_sqlite = [beside(path, ending) for ending in ("-wal", "-shm", "-journal")]
    for leftover in (*of_sqlite, *derived_paths(path), damage_path(path)):
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
    except SQLITE_ERRORS as error:
        raise translate_error(error, backup) from error
    finally:
        shut(source)
    copy = connect(draft, vfs=vfs)
    try:
        found = examine(copy, facts_of(copy).dim)
    finally:
        shut(copy)
    if found:
        raise CorruptStoreError(f"{backup} is damaged: {found[0].message}; nothing was restored, choose another backup")


def _take_over_owner(draft: Draft, path: Path) -> None:
    """The new file belongs to the owner of the old one, as far as this user may say so; it is on the disk now."""
    if path.exists():
        old = path.stat()
        if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()) and os.geteuid() == 0:
            os.chown(draft.path, old.st_uid, old.st_gid)
    os.fsync(draft.handle)


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
