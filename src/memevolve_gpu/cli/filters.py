"""``--filter KEY=VALUE`` and ``--filters JSON`` become one filter of the store's grammar."""

from __future__ import annotations

import json
import re
from typing import Any

from .codes import InputError
from .reading import json_value

__all__ = ["parse_filters"]

_CONDITION = re.compile(r"(?P<key>[^=<>!]+)(?P<operator>>=|<=|!=|=|>|<)(?P<value>.*)", re.DOTALL)
_OPERATORS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt", "!=": "ne"}


def parse_filters(conditions: list[str] | None, text: str | None) -> dict[str, Any] | None:
    """None when nothing is asked for, else what ``VectorStore.search(filters=...)`` takes.

    conditions: ``type=skill``, ``metadata.score>=0.5``, ``tags!=git``; the same key with = several times means any of
    the values, with < and > a range. A value that is a JSON number, true, false, null or list is taken as that; quote
    it to make it a text (``id='"123"'``). text: a filter as JSON.

    Raises InputError; operators and paths that the store does not know are left to the store.
    """
    found = _from_json(text) if text is not None else {}
    for condition in conditions or []:
        _add(found, condition)
    return found or None


def _from_json(text: str) -> dict[str, Any]:
    value = json_value(text, "--filters")
    if not isinstance(value, dict):
        raise InputError(f'--filters: must be a JSON object such as {{"type": "skill"}}, got {text!r}')
    return value


def _add(found: dict[str, Any], condition: str) -> None:
    match = _CONDITION.fullmatch(condition)
    key = match["key"].strip() if match else ""
    if match is None or not key:
        raise InputError(
            f"--filter {condition!r}: write KEY=VALUE, KEY!=VALUE, KEY>=VALUE or KEY<VALUE, as in type=skill"
        )
    value = _value(match["value"].strip())
    if match["operator"] == "=":
        _add_value(found, key, value, condition)
    else:
        _add_bound(found, key, _OPERATORS[match["operator"]], value, condition)


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict) else value


def _add_value(found: dict[str, Any], key: str, value: Any, condition: str) -> None:
    if key not in found:
        found[key] = value
        return
    if isinstance(found[key], dict):
        raise InputError(f"--filter {condition!r}: {key} has another condition; only = and = go together")
    held = found[key] if isinstance(found[key], list) else [found[key]]
    found[key] = [*held, *(value if isinstance(value, list) else [value])]


def _add_bound(found: dict[str, Any], key: str, operator: str, value: Any, condition: str) -> None:
    bounds = found.setdefault(key, {})
    if not isinstance(bounds, dict):
        raise InputError(f"--filter {condition!r}: {key} has a value already; only = goes with =")
    if operator in bounds:
        raise InputError(f"--filter {condition!r}: {key} has a {operator} already; for more write --filters JSON")
    bounds[operator] = value
