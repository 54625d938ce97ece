"""When and how often each unit was read: figures for forgetting, outside the log because no index needs them.

They are no truth: the newest may be lost in a crash. Ids that are no live unit are never entered, and a unit's figures
go with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

import apsw

from .sql import all_rows

__all__ = ["enter", "in_order", "read_counts"]

_ENTER = """
INSERT INTO access (id, last_access, count)
SELECT u.id, j.value ->> 0, j.value ->> 1 FROM json_each(?) AS j JOIN units AS u ON u.id = j.key WHERE true
ON CONFLICT (id) DO UPDATE SET
    last_access = max(last_access, excluded.last_access), count = count + excluded.count
"""

_WRITTEN = """ifnull(unixepoch(substr(coalesce(
    u.unit ->> '$.metadata.updated_at', u.unit ->> '$.metadata.created_at'), 1, 19)), 0)"""
"""Unix time of a row's own time stamp, to the second and without regard to its offset; 0 where it has none."""

_ORDERS = {
    "lru": "a.last_access, u.slot",
    "lfu": "ifnull(a.count, 0), a.last_access, u.slot",
    "used": f"max(ifnull(a.last_access, 0), {_WRITTEN}), u.slot",
    "oldest": "u.slot",
}


def enter(con: apsw.Connection, reads: Mapping[str, tuple[float, int]]) -> None:
    """Add reads: id to (Unix time of the newest, how many). Call inside a write transaction."""
    con.execute(_ENTER, (json.dumps(reads),))


def in_order(con: apsw.Connection, kind: Literal["lru", "lfu", "used", "oldest"], limit: int) -> list[str]:
    """Ids of ``limit`` live units: read longest ago, or least often, first; before them never read ones, by slot.

    used: read or written longest ago first; oldest: by slot alone.
    """
    sql = f"SELECT u.id FROM units AS u LEFT JOIN access AS a ON a.id = u.id ORDER BY {_ORDERS[kind]} LIMIT ?"
    return [row[0] for row in all_rows(con, sql, (limit,))]


def read_counts(con: apsw.Connection) -> dict[str, int]:
    """How often each unit was read, of those that were."""
    return {unit_id: int(count) for unit_id, count in all_rows(con, "SELECT id, count FROM access")}
