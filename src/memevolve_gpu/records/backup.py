"""A consistent copy of a database that is in use."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import apsw

from ..errors import StorageError
from .failures import FOREIGN, translated
from .sql import first_row

__all__ = ["backup"]

PAGES_PER_STEP = 256
"""So that Ctrl-C is heard every megabyte."""


def backup(source: apsw.Connection, target: Path, vfs: str | None) -> Path:
    """Copy what ``source`` reads, as of one moment, into the new file ``target``.

    The copy is written beside the target and takes its name when it is complete and synced.
    """
    _refuse_target(target)
    draft = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _copy(source, draft, vfs)
        _publish(draft, target)
    except FOREIGN as error:
        raise translated(error, target) from error
    finally:
        draft.unlink(missing_ok=True)
        for ending in ("-journal", "-wal", "-shm"):
            draft.with_name(draft.name + ending).unlink(missing_ok=True)
    return target


def _refuse_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise StorageError(f"the folder {target.parent} does not exist; create it first")
    for name in (target.name, target.name + "-wal", target.name + "-journal"):
        if target.with_name(name).exists():
            raise StorageError(f"{target.with_name(name)} exists; choose another target for the backup")


def _copy(source: apsw.Connection, draft: Path, vfs: str | None) -> None:
    copy = apsw.Connection(str(draft), vfs=vfs)
    try:
        source.execute("BEGIN")
        source.execute("SELECT 1 FROM store").fetchall()
        with copy.backup("main", source, "main") as steps:
            while not steps.done:
                steps.step(PAGES_PER_STEP)
        if first_row(copy, "PRAGMA journal_mode = delete")[0] != "delete":  # how SQLite says that a write failed
            raise StorageError(f"{draft}: the copy could not be finished; look at the disk and the system log")
        copy.execute("UPDATE store SET store_id = ?", (uuid.uuid4().hex,))
    finally:
        if source.in_transaction:
            source.execute("ROLLBACK")
        copy.close()


def _publish(draft: Path, target: Path) -> None:
    """Give the draft its name, unless another file took it meanwhile; make the name durable."""
    try:
        os.link(draft, target)
    except FileExistsError as error:
        raise StorageError(f"{target} exists; choose another target for the backup") from error
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
