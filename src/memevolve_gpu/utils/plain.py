"""Values of callers as the plain JSON values that are stored, compared and embedded."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime, timezone

import numpy as np

from ..types import Json


def plain_text(text: str) -> str:
    """The text itself; of an instance of a subclass, such as a member of a ``str`` enumeration, its characters."""
    return text if type(text) is str else str.__str__(text)


def plain_scalar(value: object) -> Json:
    """A scalar as JSON keeps it: members of enumerations that are strings or numbers, and NumPy's scalars, as the
    string or number that they are; moments in time as ISO 8601 with their offset (a naive one is local time, one of
    NumPy is UTC). Anything else as it is.
    """
    if type(value) in _EXACT:
        return value
    for kind, made_plain in _KINDS:
        if isinstance(value, kind):
            return made_plain(value)
    return value


def _of_numpy(value: np.generic) -> Json:
    if isinstance(value, np.datetime64) and not np.isnat(value):
        moment = value.astype("datetime64[us]").item()
        return moment.replace(tzinfo=timezone.utc).isoformat() if isinstance(moment, datetime) else value
    return plain_scalar(value.item()) if value.dtype.kind in "biuf" else value


def _moment(value: datetime) -> str:
    return (value if value.tzinfo is not None else value.astimezone()).isoformat()


_EXACT = frozenset({str, int, float, bool, type(None), dict, list})
_KINDS: tuple[tuple[type, Callable[[Json], object]], ...] = (
    (str, plain_text),
    (int, int.__int__),
    (float, float.__float__),
    (np.generic, _of_numpy),
    (datetime, _moment),
    (date, date.isoformat),
)


def as_plain(value: object) -> Json:
    """``value`` for ``json.dumps(default=...)``: what JSON has no word for, made plain.

    Raises:
        TypeError: there is no plain value for it.
    """
    plain = plain_scalar(value)
    if plain is value:
        raise TypeError(f"a value of type {type(value).__name__} has no form in JSON")
    return plain


json_text = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"), default=as_plain
).encode
"""The JSON text of a unit as it is stored: no escapes beyond those of JSON, no spaces. RecursionError for a circle."""
