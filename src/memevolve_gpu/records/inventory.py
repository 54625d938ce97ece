"""What units there are, by the indexes alone: no more than a bounded number of units is read."""

from __future__ import annotations

from dataclasses import dataclass

import apsw

from .sql import all_rows, first_row

__all__ = ["Inventory", "take_inventory"]

_OF_ROWS = """
SELECT e.atom, {sign}count(*) FROM {rows} AS u
JOIN json_each(CASE WHEN json_valid(u.unit) THEN u.unit ELSE '{{}}' END, '$.type') AS e
WHERE e.type = 'text' AND typeof(e.key) <> 'text' AND {condition} GROUP BY e.atom
"""
_TYPES = f"""
SELECT value, sum(number) FROM (
    SELECT value, count(*) AS number FROM terms WHERE field = 'type' GROUP BY value
    UNION ALL {_OF_ROWS.format(sign="", rows="units", condition="u.slot > (SELECT folded FROM counters)")}
    UNION ALL {_OF_ROWS.format(sign="-", rows="stale", condition="1")}
) GROUP BY value HAVING sum(number) > 0 ORDER BY value
"""
_END = """
SELECT CASE WHEN json_valid(unit) THEN unit ->> '$.metadata.created_at' END FROM units ORDER BY slot {direction} LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Inventory:
    """count: live units; types: how many are of each type, one of several types under each; oldest and newest:
    ``metadata.created_at`` of the first and the last slot, None where it is no text.
    """

    count: int
    types: dict[str, int]
    oldest: str | None
    newest: str | None


def take_inventory(con: apsw.Connection) -> Inventory:
    """Call inside a read transaction."""
    count = int(first_row(con, "SELECT count FROM counters")[0])
    types = {str(value): int(number) for value, number in all_rows(con, _TYPES)}
    ends = [_text(all_rows(con, _END.format(direction=direction))) for direction in ("ASC", "DESC")]
    return Inventory(count, types, ends[0], ends[1])


def _text(rows: list[tuple[object]]) -> str | None:
    return rows[0][0] if rows and isinstance(rows[0][0], str) else None
