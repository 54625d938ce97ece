"""Conditions as SQL over ``units.unit`` (JSON text), everything parameterised.

The agreement with :func:`memevolve_gpu.records.filters.matches` is a property test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .filters import Condition, kind_of

__all__ = ["INDEXED_FIELDS", "is_indexed", "places", "where"]

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
