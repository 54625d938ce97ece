"""Conditions as SQL over ``units.unit`` (JSON text), everything parameterised.

The agreement with :func:`memevolve_gpu.records.filters.matches` is a property test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .filters import Condition, kind_of

__all__ = ["INDEXED_FIELDS", "is_indexed", "where"]

INDEXED_FIELDS = ("type", "tags")
"""Top-level fields whose strings, or lists of strings, are kept in the ``terms`` table."""

_RANGE_SIGNS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_JSON_KINDS = {
    "number": "IN ('integer', 'real')",
    "text": "= 'text'",
    "true": "= 'true'",
    "false": "= 'false'",
    "null": "= 'null'",
}


def is_indexed(one: Condition) -> bool:
    """Can the ``terms`` table alone answer the condition?"""
    return one.op == "in" and one.path in _INDEXED_PATHS and all(isinstance(value, str) for value in one.values)


_INDEXED_PATHS = {(field,) for field in INDEXED_FIELDS}


def where(conditions: Sequence[Condition]) -> tuple[str, list[Any]]:
    """An SQL expression over the row ``u`` of ``units`` and its parameters; "1" when there is no condition."""
    parts, parameters = ["1"], []
    for one in conditions:
        sql, bound = _expression(one)
        parts.append(f"({sql})")
        parameters += bound
    return " AND ".join(parts), parameters


def _expression(one: Condition) -> tuple[str, list[Any]]:
    if one.path == ("id",) and one.op == "in":
        texts = [value for value in one.values if isinstance(value, str)]
        return f"u.id IN ({_marks(len(texts))})", texts
    path = "$" + "".join("." + json.dumps(part, ensure_ascii=False) for part in one.path)
    if one.op == "exists":
        return f"json_type(u.unit, ?) IS {'NOT ' if one.values[0] else ''}NULL", [path]
    scalar, values = _test(one, "json_type(u.unit, ?)", "json_extract(u.unit, ?)", path)
    element, more = _test(one, "e.type", "e.atom", None)
    sql = (
        f"ifnull(CASE json_type(u.unit, ?) WHEN 'array' "
        f"THEN EXISTS (SELECT 1 FROM json_each(u.unit, ?) AS e WHERE {element}) ELSE {scalar} END, 0)"
    )
    return f"NOT {sql}" if one.op == "nin" else sql, [path, path, *more, *values]


def _test(one: Condition, kind: str, value: str, path: str | None) -> tuple[str, list[Any]]:
    """The test of one scalar; ``path`` is bound wherever ``kind`` or ``value`` occurs."""
    here = [] if path is None else [path]
    choices, parameters = [], []
    for name, values in _by_kind(one.values).items():
        clause, bound = f"{kind} {_JSON_KINDS[name]}", list(here)
        if name in ("number", "text"):
            sign = _RANGE_SIGNS.get(one.op)
            clause += f" AND {value} {sign} ?" if sign else f" AND {value} IN ({_marks(len(values))})"
            bound += [*here, *values]
        choices.append(f"({clause})")
        parameters += bound
    return " OR ".join(choices) or "0", parameters


def _by_kind(values: Sequence[Any]) -> dict[str, list[Any]]:
    kinds: dict[str, list[Any]] = {}
    for value in values:
        kinds.setdefault(kind_of(value), []).append(value)
    return kinds


def _marks(count: int) -> str:
    return ", ".join("?" * count)
