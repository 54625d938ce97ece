"""Checks of what callers pass in: every message names the parameter and shows a bounded part of the value."""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..errors import InvalidQueryError, MemEvolveError

__all__ = ["real_number", "shown", "whole_number"]

_SHOWN = 60


def shown(value: object) -> str:
    """``repr(value)``, cut to 60 characters; the type's name where the value cannot be shown."""
    try:
        text = repr(value)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def whole_number(
    name: str, value: Any, *, least: int = 1, error: type[MemEvolveError] = InvalidQueryError, remedy: str = ""
) -> int:
    """The value as an int, once it is known to be a whole number (int or NumPy's, no bool) of at least ``least``.

    Raises:
        MemEvolveError: ``error``, naming ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise error(f"{name} must be a whole number of at least {least}, got {shown(value)}{remedy and f'; {remedy}'}")
    return int(value)


def real_number(name: str, value: Any, allowed: str, low: float, high: float, error: type[MemEvolveError]) -> float:
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
