"""The server's filter expressions: made of our own words, of hashes, and of ids in quotes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ....records.filters import Condition, parse
from .facts import digits_above, digits_below, path_token, value_token

__all__ = ["NOTHING", "born_between", "filter_expression", "ids_expression", "joined", "quoted"]

NOTHING = "born < 0"
"""No row is older than the epoch."""

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-.:/@")


def quoted(text: str) -> str:
    """The text as a literal: everything but plain letters, digits and a few signs as an escape of its code point."""
    return '"' + "".join(one if one in _PLAIN else _escaped(ord(one)) for one in text) + '"'


def ids_expression(ids: Iterable[str]) -> str:
    """True of the units with these ids."""
    return f"id in [{', '.join(map(quoted, ids))}]"


def born_between(low: int, high: int) -> str:
    """True of the rows written at ``low`` or later and before ``high``."""
    return f"born >= {low:d} and born < {high:d}"


def filter_expression(filters: Mapping[str, Any] | None) -> str:
    """True of every unit that matches the filter, and of few others; "" for every unit.

    Exact for in, nin and exists. Ranges compare doubles and the first bytes of texts, and a unit with too many
    facts is let through: whoever uses the expression holds the units against the filter again. Raises
    InvalidFilterError.
    """
    conditions = parse(filters)
    if not conditions:
        return ""
    if any(one.op == "in" and not one.values for one in conditions):
        return NOTHING
    parts = [part for part in map(_condition, conditions) if part]
    return f"({' and '.join(parts)}) or vague == true" if parts else ""


def joined(*parts: str) -> str:
    """All of them at once; empty ones are left out."""
    return " and ".join(f"({part})" for part in parts if part)


def _condition(one: Condition) -> str:
    if one.op == "exists":
        return _any_of([path_token(one.path)], negated=not one.values[0])
    if one.op in ("in", "nin"):
        tokens = dict.fromkeys(value_token(one.path, value) for value in one.values)
        return _any_of(list(tokens), negated=one.op == "nin") if tokens else ""
    return _range(one)


def _any_of(tokens: list[str], negated: bool) -> str:
    listed = ", ".join(f'"{token}"' for token in tokens)
    return f'{"not " if negated else ""}json_contains_any(facts["has"], [{listed}])'


def _range(one: Condition) -> str:
    """Some element lies above a bound when the greatest does, and below one when the least does."""
    bound, token = one.values[0], path_token(one.path)
    letter = "s" if isinstance(bound, str) else "n"
    upward = one.op in ("gt", "gte")
    sign = (">" if upward else "<") + ("" if one.op in ("gt", "lt") and letter == "n" else "=")
    digits = digits_below(bound) if upward else digits_above(bound)
    side = "h" if upward else "l"
    names = (letter + token, letter + side + token)
    return "(" + " or ".join(f'facts["{name}"] {sign} "{digits}"' for name in names) + ")"


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
