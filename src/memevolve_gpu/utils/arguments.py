"""Checks of what callers pass in: every message names the parameter and shows a bounded part of the value."""

from __future__ import annotations

import errno
import ipaddress
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from ..errors import ConfigurationError, EmbeddingError, InvalidQueryError, MemEvolveError
from ..types import Json

T = TypeVar("T")
_SHOWN = 60


def shown(value: object) -> str:
    """``repr(value)``, cut to 60 characters; the type's name where the value cannot be shown."""
    try:
        text = repr(value)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def whole_number(
    name: str, value: object, *, least: int = 1, error: type[MemEvolveError] = InvalidQueryError, remedy: str = ""
) -> int:
    """The value as an int, once it is known to be a whole number (int or NumPy's, no bool) of at least ``least``.

    Raises:
        MemEvolveError: ``error``, naming ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise error(f"{name} must be a whole number of at least {least}, got {shown(value)}{remedy and f'; {remedy}'}")
    return int(value)


def real_number(name: str, value: object, allowed: str, low: float, high: float, error: type[MemEvolveError]) -> float:
    """The value as a float, once it is known to be a finite number (no bool) from ``low`` to ``high``.

    Args:
        name: of the parameter.
        value: what was given.
        allowed: the range in words, for the message.
        low: least value.
        high: largest value.
        error: what is raised otherwise.

    Raises:
        MemEvolveError: ``error``, naming ``name``.
    """
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and low <= number <= high:
            return number
    raise error(f"{name} must be {allowed}, got {shown(value)}")


def switch(name: str, value: object) -> bool:
    """The value as a bool, once it is known to be one, or 0 or 1; else InvalidQueryError, naming ``name``."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise InvalidQueryError(f"{name} must be True or False, got {shown(value)}")


def listed(name: str, values: object, error: type[MemEvolveError] = InvalidQueryError) -> list[Any]:
    """The values as a list, once they are known to be several: a text or bytes are not. ``error`` names ``name``."""
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, type)):
        try:
            return list(values)
        except TypeError:  # an array without dimensions
            pass
    raise error(f"{name} must be a list, got {shown(values)}")


def callback(name: str, value: T) -> T:
    """The value, once it is known to be None or callable; else InvalidQueryError, naming ``name``."""
    if value is None or callable(value):
        return value
    raise InvalidQueryError(f"{name} must be a function or None, got {shown(value)}")


def change(name: str, value: object) -> int | None:
    """A change number, or None; else InvalidQueryError, naming ``name``. One beyond all changes is the largest."""
    return None if value is None else min(whole_number(name, value, least=0), 2**62)


def path_text(name: str, value: Any) -> str:
    """The value as the text of a path that the system can look at; else ConfigurationError, naming ``name``."""
    try:
        text = os.fspath(value)
        if isinstance(text, str) and text and "\0" not in text:
            os.lstat(text)
            return text
    except FileNotFoundError:
        return str(text)
    except (TypeError, ValueError):
        pass
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return str(text)
    raise ConfigurationError(f"{name} must be a path that is not empty nor too long, got {shown(value)}")


def word(name: str, value: object, allowed: Iterable[str], error: type[MemEvolveError] = InvalidQueryError) -> None:
    """Raise ``error``, naming ``name``, unless the value is one of these words."""
    if not isinstance(value, str) or value not in allowed:
        raise error(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def optional_text(name: str, value: object) -> str | None:
    """The value, once it is known to be None or a text; else ConfigurationError, naming ``name``."""
    if value is None or isinstance(value, str):
        return value
    raise ConfigurationError(f"{name} must be a text or None, got {shown(value)}")


def texts_of(values: object) -> list[str]:
    """The texts to embed as a list; EmbeddingError where they are not several strings."""
    given = listed("texts", values, EmbeddingError)
    for one in given:
        if not isinstance(one, str):
            raise EmbeddingError(f"a text must be a string, got {shown(one)}")
    return given


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def mapping(name: str, value: object, error: type[MemEvolveError] = InvalidQueryError) -> Mapping[str, Json]:
    """The value, once it is known to be a mapping; else ``error``, naming ``name``."""
    if isinstance(value, Mapping):
        return value
    raise error(f"{name} must be a mapping, got {shown(value)}")


def having(name: str, value: T, method: str, what: str) -> T:
    """The value, once it is known to have a method; else ConfigurationError: ``name`` must be ``what``."""
    if callable(getattr(value, method, None)) and not isinstance(value, type):
        return value
    raise ConfigurationError(f"{name} must be {what}, got {shown(value)}")
