"""The filter grammar: what a filter means, by definition in Python.

A filter maps dotted paths to conditions, all of which must hold::

    {"type": "skill", "tags": ["git", "linux"], "metadata.score": {"gte": 0.5, "lt": 1}}

A condition is a value (equal), a list of values (any of them), or a mapping of operators: ``eq``, ``ne``, ``in``,
``nin``, ``gt``, ``gte``, ``lt``, ``lte``, ``exists``. Values are None, booleans, finite numbers and strings, and
compare as JSON does: 1 equals 1.0, but neither True nor "1". Ranges compare numbers with numbers and strings with
strings, by code point. A list in the unit matches when any of its elements does, each operator by itself. A missing
field matches only ``ne``, ``nin`` and ``exists: False``; JSON null equals None. ``{}`` or None matches every unit,
``[]`` as any-of none. Integers beyond 64 bits compare as doubles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from ..errors import InvalidFilterError
from ..utils.plain import plain_scalar, plain_text

__all__ = ["Condition", "Filters", "Scalar", "canonical", "kind_of", "matches", "parse"]

Filters = Mapping[str, Any]
Scalar = None | bool | int | float | str

RANGES: dict[str, Callable[[Any, Any], bool]] = {"gt": gt, "gte": ge, "lt": lt, "lte": le}
OPERATORS = ("eq", "ne", "in", "nin", *RANGES, "exists")
MAX_VALUES, MAX_CONDITIONS = 30_000, 100
"""Most values and operators in one filter. SQLite takes 32,766 parameters and a tree 1,000 deep in one statement."""

_MISSING = object()

_KNOWN: dict[tuple[Any, ...], str] = {}
"""Canonical texts of filters that were seen, by their form; forgotten all at once when they are many."""
_MOST_KEPT, _LONGEST_KEPT, _DEEPEST_KEPT = 512, 16, 2
_PLAIN = frozenset({str, int, float, bool, type(None)})


@dataclass(frozen=True, slots=True)
class Condition:
    """One operator on one path. ``op`` is in, nin, a range or exists; ``values`` has one element but for in and nin."""

    path: tuple[str, ...]
    op: str
    values: tuple[Any, ...]


def parse(filters: Filters | None) -> list[Condition]:
    """The conditions of a filter, all of which must hold.

    Raises InvalidFilterError, naming the key, for everything outside the grammar.
    """
    if filters is None:
        return []
    if not isinstance(filters, Mapping):
        raise InvalidFilterError(f"filters must be a mapping of paths to conditions, not {type(filters).__name__}")
    conditions = [one for key, value in filters.items() for one in _conditions(key, value)]
    if len(conditions) > MAX_CONDITIONS or sum(len(one.values) for one in conditions) > MAX_VALUES:
        raise InvalidFilterError(
            f"filters hold more than {MAX_CONDITIONS} operators or {MAX_VALUES:,} values, {_named(conditions)}; "
            "split the query"
        )
    return conditions


def canonical(filters: Filters | None) -> str:
    """A text that is equal for filters which mean the same by form (order and repetition aside): a cache key.

    Raises InvalidFilterError as :func:`parse` does.
    """
    form = _form(filters)
    if form is None:
        return _canonical(filters)
    known = _KNOWN.get(form)
    if known is None:
        known = _canonical(filters)
        if len(_KNOWN) >= _MOST_KEPT:
            _KNOWN.clear()
        _KNOWN[form] = known
    return known


def _form(value: Any, depth: int = 0) -> tuple[Any, ...] | None:
    """Values and their types, to look a filter up by in a tenth of the time; None for a large or an unusual one."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind not in (dict, list) or len(value) > _LONGEST_KEPT or depth > _DEEPEST_KEPT:
        return None
    parts: list[Any] = [kind, *[_form(one, depth + 1) for one in value]]
    if kind is dict:
        parts += [_form(one, depth + 1) for one in value.values()]
    return None if None in parts else tuple(parts)


def _canonical(filters: Filters | None) -> str:
    parts = []
    for one in parse(filters):
        values = sorted({json.dumps(value, ensure_ascii=False) for value in one.values})
        parts.append(json.dumps([one.path, one.op, values], ensure_ascii=False))
    return "\n".join(sorted(set(parts)))


def matches(filters: Filters | None, unit: Mapping[str, Any]) -> bool:
    """Does the unit match? The reference that every backend must agree with."""
    return all(_holds(one, unit) for one in parse(filters))


def kind_of(value: Any) -> str:
    """The JSON kind of a value: null, true, false, number, text, array or object."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "text"
    return "array" if isinstance(value, (list, tuple)) else "object"


def _named(conditions: list[Condition]) -> str:
    largest = max(conditions, key=lambda one: len(one.values))
    return f"most of them under {'.'.join(largest.path)!r}"


def _conditions(key: Any, value: Any) -> list[Condition]:
    path = _path(key)
    if isinstance(value, Mapping):
        if not value:
            raise InvalidFilterError(f"filters[{key!r}] names no operator; use one of {', '.join(OPERATORS)}")
        return [_condition(key, path, op, operand) for op, operand in value.items()]
    if isinstance(value, (list, tuple)):
        return [_condition(key, path, "in", value)]
    return [_condition(key, path, "eq", value)]


def _condition(key: str, path: tuple[str, ...], op: Any, operand: Any) -> Condition:
    if op not in OPERATORS:
        raise InvalidFilterError(f"filters[{key!r}]: unknown operator {op!r}; use one of {', '.join(OPERATORS)}")
    if op in ("in", "nin"):
        if not isinstance(operand, (list, tuple)):
            raise InvalidFilterError(f"filters[{key!r}]: {op} takes a list, not {type(operand).__name__}")
        return Condition(path, op, tuple(_scalar(key, op, one) for one in operand))
    if op == "exists":
        operand = plain_scalar(operand)
        if not isinstance(operand, bool):
            raise InvalidFilterError(f"filters[{key!r}]: exists takes True or False, not {operand!r}")
        return Condition(path, op, (operand,))
    value = _scalar(key, op, operand)
    if op in RANGES and kind_of(value) not in ("number", "text"):
        raise InvalidFilterError(f"filters[{key!r}]: {op} compares numbers or strings, not {value!r}")
    return Condition(path, {"eq": "in", "ne": "nin"}.get(op, op), (value,))


def _path(key: Any) -> tuple[str, ...]:
    if not isinstance(key, str):
        raise InvalidFilterError(f"filters[{key!r}]: a path must be a string, not {type(key).__name__}")
    path = tuple(plain_text(key).split("."))
    if not all(path):
        raise InvalidFilterError(
            f"filters[{key!r}]: an empty path or an empty part of one; write 'field' or 'field.part'"
        )
    _refuse_surrogates(key, key)
    return path


def _scalar(key: str, op: str, value: Any) -> Scalar:
    given, value = value, plain_scalar(value)
    kind = kind_of(value)
    if kind == "text":
        _refuse_surrogates(key, value)
        return str(value)
    if kind == "number":
        return _number(key, op, value)
    if kind in ("array", "object"):
        raise InvalidFilterError(
            f"filters[{key!r}]: {op} takes None, True, False, a number or a string, not {type(given).__name__}"
        )
    return bool(value) if value is not None else None


def _number(key: str, op: str, value: float) -> float:
    number = doubled(value)
    if not math.isfinite(number):
        raise InvalidFilterError(f"filters[{key!r}]: {op} takes a finite number, not {number}; leave the bound out")
    return number


def _refuse_surrogates(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidFilterError(f"filters[{key!r}]: the text is not valid Unicode ({error.reason})") from error


def doubled(value: float) -> float:
    """The number as it is compared: a 64-bit integer or a double."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def _holds(one: Condition, unit: Mapping[str, Any]) -> bool:
    found = _lookup(unit, one.path)
    if one.op == "exists":
        return (found is not _MISSING) is one.values[0]
    elements = [] if found is _MISSING else found if isinstance(found, (list, tuple)) else [found]
    if one.op == "in":
        return any(_equal(element, value) for element in elements for value in one.values)
    if one.op == "nin":
        return not any(_equal(element, value) for element in elements for value in one.values)
    return any(_in_range(one.op, element, one.values[0]) for element in elements)


def _lookup(unit: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if not isinstance(unit, Mapping) or part not in unit:
            return _MISSING
        unit = unit[part]
    return unit


def _equal(element: Any, value: Scalar) -> bool:
    element = plain_scalar(element)
    kind = kind_of(element)
    if kind != kind_of(value) or kind in ("array", "object"):
        return False
    return bool(doubled(element) == value) if kind == "number" else bool(element == value)


def _in_range(op: str, element: Any, bound: float | str) -> bool:
    element = plain_scalar(element)
    kind = kind_of(element)
    if kind != kind_of(bound):
        return False
    return RANGES[op](doubled(element) if kind == "number" else element, bound)
