"""Conditions as SQL over ``units.unit`` (JSON text), everything parameterised, and the slots that match.

The agreement with :func:`memevolve_gpu.records.filters.matches` is a property test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import apsw
import numpy as np

from ..types import IntArray
from .connections import first_row
from .filters import Condition, kind_of

__all__ = ["INDEXED_FIELDS", "is_indexed", "matching", "places", "where"]

INDEXED_FIELDS = ("type", "tags")
"""Top-level fields whose strings, or lists of strings, are kept in the ``terms`` table."""

MOST_PLACES = 50
"""SQLite takes time with the square of the numbered places in a statement."""

_INDEXED_PATHS = {(field,) for field in INDEXED_FIELDS}
_RANGE_SIGNS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_JSON_TYPES = {
    "number": ("integer", "real"),
    "text": ("text",),
    "true": ("true",),
    "false": ("false",),
    "null": ("null",),
}


def is_indexed(one: Condition) -> bool:
    """Can the ``terms`` table alone answer the condition?"""
    return one.op == "in" and one.path in _INDEXED_PATHS and all(isinstance(value, str) for value in one.values)


def where(conditions: Sequence[Condition], bound: list[Any]) -> str:
    """An SQL expression over the row ``u`` of ``units``; "1" when there is no condition.

    ``bound`` holds the parameters that the statement has before the expression; those of the expression are appended.
    """
    return " AND ".join(["1", *(f"({_expression(one, bound)})" for one in conditions)])


def _expression(one: Condition, bound: list[Any]) -> str:
    if one.path == ("id",) and one.op == "in":
        return f"u.id IN ({places([value for value in one.values if isinstance(value, str)], bound)})"
    bound.append("$" + "".join("." + json.dumps(part, ensure_ascii=False) for part in one.path))
    path = f"?{len(bound)}"
    if one.op == "exists":
        return f"json_type(u.unit, {path}) IS {'NOT ' if one.values[0] else ''}NULL"
    tests = _tests(one, bound)
    element = _case("e.type", {name: test.format(value="e.atom") for name, test in tests.items()})
    scalar = {name: test.format(value=f"json_extract(u.unit, {path})") for name, test in tests.items()}
    found = f"EXISTS (SELECT 1 FROM json_each(u.unit, {path}) AS e WHERE {element})"
    return f"{'NOT ' if one.op == 'nin' else ''}{_case(f'json_type(u.unit, {path})', {**scalar, 'array': found})}"


def _case(kind: str, tests: dict[str, str]) -> str:
    """The test that belongs to the JSON type; 0 for every other type, and for a missing field."""
    cases = "".join(f" WHEN '{name}' THEN {test}" for name, test in tests.items())
    return f"CASE {kind}{cases} ELSE 0 END" if cases else "0"


def _tests(one: Condition, bound: list[Any]) -> dict[str, str]:
    """For each JSON type, what must hold of ``{value}``."""
    kinds: dict[str, list[Any]] = {}
    for value in one.values:
        kinds.setdefault(kind_of(value), []).append(value)
    tests = {}
    for kind, values in kinds.items():
        test = "1"
        if kind in ("number", "text"):
            sign = _RANGE_SIGNS.get(one.op)
            test = f"{{value}} {sign} ({places(values, bound)})" if sign else f"{{value}} IN ({places(values, bound)})"
        tests.update(dict.fromkeys(_JSON_TYPES[kind], test))
    return tests


def places(values: Sequence[Any], bound: list[Any]) -> str:
    """Numbered places for the values, which are bound once however often they are named; many are bound as one list."""
    if len(values) > MOST_PLACES:
        bound.append(json.dumps(values, ensure_ascii=False))
        return f"SELECT value FROM json_each(?{len(bound)})"
    bound.extend(values)
    return ", ".join(f"?{number}" for number in range(len(bound) - len(values) + 1, len(bound) + 1))


FEW_SLOTS = 4096
_FEW = 4
"""Slots are looked up one by one while they are fewer than a quarter of all units, else all units are scanned."""


def matching(con: apsw.Connection, conditions: Sequence[Condition], slots: IntArray | None) -> IntArray:
    """Ascending slots of the live units for which every condition holds, among ``slots`` (ascending) when given.

    Runs several statements: call inside a read transaction.
    """
    indexed = [one for one in conditions if is_indexed(one)]
    if not indexed or (slots is not None and len(slots) <= FEW_SLOTS):
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
    try:
        found = np.fromstring(text, dtype=np.int64, sep=",")
    except ValueError as error:
        raise apsw.CorruptError("the index of types and tags holds a slot that is no number") from error
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
