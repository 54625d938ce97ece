"""What a filter means, written a second time and as simply as possible: the judge of every way to evaluate one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

__all__ = ["means"]

_MISSING = object()
_ISO = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?")
_ZONED = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d.*(Z|[+-]\d\d:\d\d)")


def means(filters: Any, unit: Mapping[str, Any]) -> bool:
    """Does the unit match?"""
    if isinstance(filters, list):
        return all(means(one, unit) for one in filters)
    return all(_entry(key.removeprefix("$") if key != "$" else key, value, unit) for key, value in filters.items())


def _entry(key: str, value: Any, unit: Mapping[str, Any]) -> bool:
    if key == "and":
        return all(means(one, unit) for one in value)
    if key in ("or", "nor"):
        return bool(any(means(one, unit) for one in value)) is (key == "or")
    if key == "not":
        return not means(value, unit)
    found: Any = unit
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) and part in found else _MISSING
    return _conditions(value, found, key == "id")


def _conditions(value: Any, found: Any, is_id: bool) -> bool:
    if isinstance(value, list):
        value = {"in": value}
    if not isinstance(value, dict):
        value = {"eq": value}
    return all(_condition(op.removeprefix("$"), operand, found, is_id) for op, operand in value.items())


def _condition(op: str, value: Any, found: Any, is_id: bool) -> bool:
    if op == "not":
        return not _conditions(value, found, is_id)
    if op in ("ne", "nin", "not_contains"):
        return not _condition({"ne": "eq", "nin": "in", "not_contains": "contains"}[op], value, found, is_id)
    if op == "exists":
        return (found is not _MISSING) is bool(value)
    if op == "is_null":
        return (found is _MISSING or found is None) is bool(value)
    if op == "size":
        return isinstance(found, list) and len(found) == int(value)
    if op == "all":
        return all(_condition("eq", one, found, is_id) for one in value)
    if op == "between":
        return _condition("gte", value[0], found, is_id) and _condition("lte", value[1], found, is_id)
    if op == "in":
        return any(_condition("eq", one, found, is_id) for one in value)
    if op == "contains" and isinstance(found, list):
        return any(_same(_scalar(element), _scalar(value)) for element in found)
    elements = found if isinstance(found, list) else [] if found is _MISSING else [found]
    return any(_element(op, value, element, is_id) for element in elements)


def _element(op: str, value: Any, element: Any, is_id: bool) -> bool:
    if op in ("eq", "gt", "gte", "lt", "lte"):
        if isinstance(value, str) and _is_zoned(value) and not is_id:
            element, value = _instant(element), _instant(value)
        left, right = (element, value) if is_id else (_scalar(element), _scalar(value))
        if op == "eq":
            return _same(left, right)
        alike = isinstance(left, str) is isinstance(right, str)
        if left is None or isinstance(left, (bool, list, dict)) or not alike:
            return False
        return bool({"gt": left > right, "gte": left >= right, "lt": left < right, "lte": left <= right}[op])
    if not isinstance(element, str) or not isinstance(value, str):
        return False
    text, value = _scalar(element), _scalar(value)
    if op in ("ieq", "ilike"):
        text, value = _scalar(text.casefold()), _scalar(value.casefold())
    if op in ("like", "ilike"):
        pattern = "".join(".*" if one == "%" else "." if one == "_" else re.escape(one) for one in value)
        return re.fullmatch(pattern, text, re.DOTALL) is not None
    return bool(
        {
            "ieq": text == value,
            "contains": value in text,
            "startswith": text[: len(value)] == value,
            "endswith": text[len(text) - len(value) :] == value if len(value) <= len(text) else False,
        }[op]
    )


def _same(one: Any, other: Any) -> bool:
    return not isinstance(one, (list, dict)) and type(one) is type(other) and bool(one == other)


def _scalar(value: Any) -> Any:
    """Numbers as one type, texts in NFC."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _Number(value)
    return _Number(value) if isinstance(value, float) else value


class _Number:
    """Integers of 64 bits compare exactly, others as doubles."""

    def __init__(self, value: Any) -> None:
        self.value = value if isinstance(value, float) or -(2**63) <= value < 2**63 else float(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Number) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]

    def __lt__(self, other: _Number) -> bool:
        return self.value < other.value

    def __gt__(self, other: _Number) -> bool:
        return self.value > other.value

    def __le__(self, other: _Number) -> bool:
        return self.value <= other.value

    def __ge__(self, other: _Number) -> bool:
        return self.value >= other.value


def _is_zoned(text: str) -> bool:
    return bool(_ZONED.fullmatch(text)) and _instant(text) is not None


def _instant(value: Any) -> Any:
    """A moment as the text of a number that sorts as it does; None for anything else."""
    if not isinstance(value, str) or not _ISO.fullmatch(value):
        return None
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return moment.timestamp()
