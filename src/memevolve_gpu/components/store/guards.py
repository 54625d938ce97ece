"""Deleting only what is still as it was when somebody decided to delete it."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConflictError
from ...records.changes import changed_since
from ...records.transaction import Transaction

__all__ = ["drop_all", "drop_unchanged"]


def drop_unchanged(tx: Transaction, ids: Sequence[str], since: int | None) -> int:
    """Delete the units that exist and did not change after log entry ``since`` (None: in any case); their number.

    Where the log no longer says what changed, nothing is deleted.
    """
    if since is None:
        return tx.drop_many(ids)
    changed = tx.outside(lambda con: changed_since(con, since))
    return 0 if changed is None else tx.drop_many(unit_id for unit_id in ids if unit_id not in changed)


def drop_all(tx: Transaction, ids: Sequence[str], since: int | None) -> None:
    """Delete the units; with ``since`` raise ConflictError when one of them changed after it or is gone."""
    if since is None:
        tx.drop_many(ids)
        return
    changed = tx.outside(lambda con: changed_since(con, since))
    conflicts = list(ids) if changed is None else [unit_id for unit_id in ids if unit_id in changed]
    conflicts += [unit_id for unit_id in ids if not tx.drop(unit_id)] if not conflicts else []
    if conflicts:
        raise ConflictError(conflicts)
