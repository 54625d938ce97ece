"""What changed since a reader looked: the log, asked by unit."""

from __future__ import annotations

import apsw

from ..types import Op
from .sql import all_rows, first_row

__all__ = ["changed_since"]

_CHANGED = "SELECT u.id FROM log AS l JOIN units AS u ON u.slot = l.slot WHERE l.seq > ? AND l.op IN (?, ?)"


def changed_since(con: apsw.Connection, seq: int) -> set[str] | None:
    """Ids of live units that were stored, replaced or edited after log entry ``seq``; None when the log was purged
    beyond it, so that nobody can say.
    """
    last, horizon = first_row(con, "SELECT last_seq, horizon FROM counters")
    if seq == last:
        return set()
    if seq < horizon:
        return None
    return {row[0] for row in all_rows(con, _CHANGED, (seq, Op.PUT, Op.EDIT))}
