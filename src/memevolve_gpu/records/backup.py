"""A consistent copy of a database that is in use."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import apsw

from ..errors import StorageError
from .failures import FOREIGN, translated
from .lineage import beside, first_link, sync_folder
from .schema import VERSION, migrate, state_of
from .sql import first_row

__all__ = ["backup", "copy_database", "drop_draft"]

PAGES_PER_STEP = 256
"""So that Ctrl-C is heard every megabyte."""


def backup(
    source: apsw.Connection, target: Path, vfs: str | None, is_current: Callable[[apsw.Connection], bool]
) -> Path:
    """Copy what ``source`` reads, as of one moment, into the new file ``target``.

    Makes nothing when ``source`` is not current any more.

    The copy is written beside the target and takes its name when it is complete and synced.
    """
    _refuse_target(target)
    draft = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        copy_database(source, draft, vfs)
        if is_current(source):
            _publish(draft, target)
    except FOREIGN as error:
        raise translated(error, target) from error
    finally:
        drop_draft(draft)
    return target


def drop_draft(draft: Path) -> None:
    """Remove a database file and what SQLite leaves beside it."""
    for file in (draft, *(beside(draft, ending) for ending in ("-journal", "-wal", "-shm"))):
        file.unlink(missing_ok=True)


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
