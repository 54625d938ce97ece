"""Milvus filter expressions over hashed field values; no user text reaches the server.

Every fact about a unit is hashed by the client: that a path exists, and which values it has. For ranges the least and
the greatest value at a path is kept in hexadecimal digits whose alphabetical order is the order of the values. So an
expression consists of fixed words and hashes, and nothing in a filter can change its meaning. The server's own
JSON operators are not used: they split paths at brackets, and compare 1 and "1", or integers beyond 2**53, differently.

Layout of the column ``facts``::

    {"has": [token, ...],                    one for each path, one for each value at it
     "n<path>": digits, "s<path>": digits,   the only number, the only text
     "nh<path>": ..., "nl<path>": ...,       greatest and least number of a list with several; sh, sl for texts
    }
"""

from __future__ import annotations

import json
import math
import struct
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b

from ..records.filters import (
    Condition,
    Every,
    Filter,
    Instant,
    Node,
    Not,
    composed,
    doubled,
    is_plain,
    kind_of,
    parse,
)
from ..types import Filters, Json, JsonObject

MAX_FACTS_BYTES = 60_000
"""A JSON column of Milvus takes 65,536 bytes. A unit with more facts is marked ``vague`` and checked by its content."""

_TEXT_BYTES = 24
"""Bytes of a text that ranges compare on the server; those that agree in them are told apart by the client."""

_SIGN = 1 << 63
_ALL = (1 << 64) - 1


def facts_of(unit: Mapping[str, object]) -> tuple[JsonObject, bool]:
    """Return the value of the column ``facts``, and whether it was too large and left out."""
    tokens: dict[str, None] = {}
    facts: JsonObject = {}
    for path, value in _paths(unit, ()):
        tokens[path_token(path)] = None
        elements = list(value) if isinstance(value, (list, tuple)) else [value]
        scalars = [one for one in elements if kind_of(one) not in ("array", "object")]
        scalars += [composed(one) for one in scalars if isinstance(one, str) and composed(one) != one]
        tokens.update(dict.fromkeys(value_token(path, one) for one in scalars))
        _add_bounds(facts, path, scalars)
    facts["has"] = list(tokens)
    if len(json.dumps(facts, separators=(",", ":"))) > MAX_FACTS_BYTES:
        return {"has": []}, True
    return facts, False


def path_token(path: tuple[str, ...]) -> str:
    """Return the token of "this path exists"."""
    return _hashed(["path", *path])


def value_token(path: tuple[str, ...], value: Json) -> str:
    """Return the token of "this path has this value"; equal numbers, such as 1 and 1.0, have one token."""
    kind = kind_of(value)
    text = _number_text(value) if kind == "number" else value if kind == "text" else ""
    return _hashed(["value", kind, text, *path])


def digits_below(value: Json) -> str:
    """Digits of the greatest double that is not above the number, or of a text's beginning."""
    if isinstance(value, str):
        return value.encode()[:_TEXT_BYTES].hex()
    number = float(doubled(value))
    return _ordered(math.nextafter(number, -math.inf) if number > doubled(value) else number)


def digits_above(value: Json) -> str:
    """Digits of the least double that is not below the number, or of a text's beginning."""
    if isinstance(value, str):
        return value.encode()[:_TEXT_BYTES].hex()
    number = float(doubled(value))
    return _ordered(math.nextafter(number, math.inf) if number < doubled(value) else number)


def _add_bounds(facts: JsonObject, path: tuple[str, ...], scalars: list[Json]) -> None:
    for kind, letter in (("number", "n"), ("text", "s")):
        highs = [digits_above(one) for one in scalars if kind_of(one) == kind]
        lows = [digits_below(one) for one in scalars if kind_of(one) == kind]
        token = path_token(path)
        if len(highs) == 1 and highs == lows:
            facts[letter + token] = highs[0]
        elif highs:
            facts[f"{letter}h{token}"] = max(highs)
            facts[f"{letter}l{token}"] = min(lows)


def _paths(value: Mapping[str, object], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Json]]:
    """The paths that expressions name: those with a key that is empty or has a dot are left to the client."""
    for key, inner in value.items():
        if not key or "." in key:
            continue
        yield (*above, key), inner
        if isinstance(inner, Mapping):
            yield from _paths(inner, (*above, key))


def _number_text(value: Json) -> str:
    number: Json = doubled(value)
    if isinstance(number, float) and number.is_integer() and -(2.0**63) <= number < 2.0**63:
        return str(int(number))
    return repr(number)


def _ordered(number: float) -> str:
    """16 digits whose alphabetical order is the order of doubles."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", number + 0.0))
    return f"{(bits ^ _ALL) if bits & _SIGN else (bits | _SIGN):016x}"


def _hashed(parts: list[str]) -> str:
    digest = blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return urlsafe_b64encode(digest).rstrip(b"=").decode()


NOTHING = "born < 0"
"""No row is older than the epoch."""

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-.:/@")


def quoted(text: str) -> str:
    """The text as a literal: everything but plain letters, digits and a few signs as an escape of its code point."""
    return '"' + "".join(one if one in _PLAIN else _escaped(ord(one)) for one in text) + '"'


def ids_expression(ids: Iterable[str]) -> str:
    """Return an expression for the units with these ids."""
    return f"id in [{', '.join(map(quoted, ids))}]"


def born_between(low: int, high: int) -> str:
    """Return an expression for the rows written at ``low`` or later and before ``high``."""
    return f"born >= {low:d} and born < {high:d}"


def filter_expression(filters: Filters | Filter | None) -> str:
    """Return an expression for every unit that matches the filter, and few others; "" for every unit.

    Exact for equality, ``exists`` and what joins them. Ranges compare doubles and the first bytes of texts; operators
    on texts, times, lengths, and keys with dots are left to the client, and units with too many facts always match:
    callers check the units against the filter again. Raises InvalidFilterError.
    """
    found = _superset(parse(filters).root, negated=False)
    return found if found in ("", NOTHING) else f"({found}) or vague == true"


def _superset(node: Node, *, negated: bool) -> str:
    """An expression that holds for every unit for which the node holds, or does not if ``negated``; "" for all."""
    if isinstance(node, Not):
        return _superset(node.part, negated=not negated)
    if isinstance(node, Condition):
        return _condition(node, negated=negated)
    parts = [_superset(part, negated=negated) for part in node.parts]
    if isinstance(node, Every) is not negated:
        return NOTHING if NOTHING in parts else " and ".join(_bracketed(part) for part in parts if part)
    parts = [part for part in parts if part != NOTHING]
    if not parts:
        return NOTHING
    return "" if "" in parts else " or ".join(_bracketed(part) for part in parts)


def _bracketed(part: str) -> str:
    return f"({part})" if " and " in part or " or " in part else part


def joined(*parts: str) -> str:
    """Return the conjunction of the expressions that are not empty."""
    return " and ".join(f"({part})" for part in parts if part)


def _condition(one: Condition, *, negated: bool) -> str:
    if any(not part or "." in part for part in one.path):
        return ""
    if one.op == "exists":
        return _any_of([path_token(one.path)], negated=one.values[0] is negated)
    if one.op == "in" and not any(isinstance(value, Instant) for value in one.values):
        tokens = dict.fromkeys(value_token(one.path, value) for value in one.values)
        if not tokens:
            return "" if negated else NOTHING
        sure = one.nfc or is_plain(replace(one, nfc=True))  # tokens are of texts as they are, and in NFC
        return _any_of(list(tokens), negated=negated) if sure or not negated else ""
    return _range(one) if one.op in ("gt", "gte", "lt", "lte") and not negated else ""


def _any_of(tokens: list[str], negated: bool) -> str:
    listed = ", ".join(f'"{token}"' for token in tokens)
    return f'{"not " if negated else ""}json_contains_any(facts["has"], [{listed}])'


def _range(one: Condition) -> str:
    """Compare the greatest element with a lower bound, and the least with an upper bound."""
    bound, token = one.values[0], path_token(one.path)
    if isinstance(bound, Instant):
        return ""
    letter = "s" if isinstance(bound, str) else "n"
    upward = one.op in ("gt", "gte")
    sign = (">" if upward else "<") + ("" if one.op in ("gt", "lt") and letter == "n" else "=")
    digits = digits_below(bound) if upward else digits_above(bound)
    side = "h" if upward else "l"
    names = (letter + token, letter + side + token)
    return "(" + " or ".join(f'facts["{name}"] {sign} "{digits}"' for name in names) + ")"


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
