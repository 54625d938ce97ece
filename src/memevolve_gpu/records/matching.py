"""Which slots match a filter: the terms index where it can answer, JSON where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw
import numpy as np

from ..types import IntArray
from .filter_sql import is_indexed, places, where
from .filters import Condition
from .sql import first_row

__all__ = ["matching", "slot_list"]

_FEW = 4
"""Slots are looked up one by one while they are fewer than a quarter of all units, else all units are scanned."""


def matching(con: apsw.Connection, conditions: Sequence[Condition], slots: IntArray | None) -> IntArray:
    """Ascending slots of the live units for which every condition holds, among ``slots`` (ascending) when given.

    Runs several statements: call inside a read transaction.
    """
    indexed = [one for one in conditions if is_indexed(one)]
    if not indexed:
        return _scan(con, conditions, slots)
    folded, backlog = first_row(con, "SELECT folded, backlog FROM counters")
    found = _with_term(con, indexed[0]) if slots is None else _intersection(slots, _with_term(con, indexed[0]))
    for one in indexed[1:]:
        found = _intersection(found, _with_term(con, one))
    rest = [one for one in conditions if not is_indexed(one)]
    if backlog:
        found = _difference(found, _slots(con, "SELECT slot FROM stale", ()))
    if rest:
        found = _scan(con, rest, found)
    if backlog:
        found = np.concatenate([found, _scan(con, conditions, slots, after=folded)])
    return found


def slot_list(slots: IntArray) -> tuple[str, Any]:
    """A subquery that yields the slots, and the value to bind for it."""
    if _HAS_CARRAY and len(slots):
        return "SELECT value FROM carray(?)", apsw.carray(np.ascontiguousarray(slots, dtype=np.int64))
    return "SELECT value FROM json_each(?)", "[" + ",".join(map(str, slots.tolist())) + "]"


_HAS_CARRAY = hasattr(apsw, "carray") and "ENABLE_CARRAY" in apsw.compile_options


def _with_term(con: apsw.Connection, one: Condition) -> IntArray:
    bound: list[Any] = [one.path[0]]
    return _slots(con, f"SELECT slot FROM terms WHERE field = ?1 AND value IN ({places(one.values, bound)})", bound)


def _scan(con: apsw.Connection, conditions: Sequence[Condition], slots: IntArray | None, after: int = 0) -> IntArray:
    """Test the units of the slots, or all of them, by their JSON text."""
    bound: list[Any] = [after]
    sql = f"SELECT u.slot FROM units AS u WHERE u.slot > ?1 AND {where(conditions, bound)}"
    if slots is None:
        return _slots(con, sql, bound)
    slots = slots[np.searchsorted(slots, after, side="right") :]
    if after == 0 and len(slots) * _FEW > first_row(con, "SELECT count FROM counters")[0]:
        return _intersection(slots, _slots(con, sql, bound))
    subquery, listed = slot_list(slots)
    return _slots(con, f"{sql} AND u.slot IN ({subquery})", (*bound, listed))


def _slots(con: apsw.Connection, sql: str, parameters: Sequence[Any]) -> IntArray:
    """The one integer column of a query, ascending and distinct.

    SQLite writes the numbers into one text and NumPy parses it: a quarter of the time that rows take.
    """
    text = first_row(con, f"SELECT group_concat(slot) FROM ({sql})", parameters)[0]
    if text is None:
        return np.empty(0, dtype=np.int64)
    found = np.fromstring(text, dtype=np.int64, sep=",")
    return found if bool(np.all(found[1:] > found[:-1])) else np.unique(found)


def _intersection(one: IntArray, other: IntArray) -> IntArray:
    few, many = (one, other) if len(one) < len(other) else (other, one)
    if not len(few):
        return few
    places = np.searchsorted(many, few)
    common: IntArray = few[many[np.minimum(places, len(many) - 1)] == few]
    return common


def _difference(one: IntArray, gone: IntArray) -> IntArray:
    return one if not len(gone) else one[~np.isin(one, gone)]
