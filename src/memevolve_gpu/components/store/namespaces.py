"""Namespaces and expiry as callers give them: paths, times to live and moments."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from ...errors import InvalidUnitError
from ...utils.arguments import real_number, shown
from ...utils.config import namespace_path

Path = tuple[str, ...]
"""The parts of a namespace's name, the outermost first; empty for the default namespace."""

Expiry = float | int | datetime | timedelta | None
"""A time to live (seconds or a timedelta) or a moment (Unix seconds or a datetime with its zone); None for never."""

_LONGEST = 10_000 * 365 * 86_400.0
"""Ten thousand years; what lies beyond is a mistake, such as milliseconds given as seconds."""


class Unchanged(Enum):
    """The default of a limit: it stays as it is."""

    UNCHANGED = "unchanged"


UNCHANGED = Unchanged.UNCHANGED


@dataclass(frozen=True, slots=True)
class NamespaceInfo:
    """A namespace: its path, the number of its units, and its limits.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> with VectorStore("memory", HashingEmbedder()) as store:
        ...     _ = store.namespace("org", "alice").store({"content": "Rebase before you push"})
        ...     store.namespaces()
        [NamespaceInfo(path=('org', 'alice'), count=1, max_units=None, default_ttl=None)]
    """

    path: Path
    count: int
    """Units that have not expired."""
    max_units: int | None = None
    """Most units; None for no limit but the store's."""
    default_ttl: float | None = None
    """Seconds after which a unit expires that is stored without a time of its own; None for never."""


def subtree_path(prefix: object) -> Path:
    """The path of a subtree, from a sequence of parts or a text with slashes. Raises ConfigurationError."""
    return namespace_path(prefix, "prefix")


def seconds(name: str, value: object) -> float:
    """A time to live in seconds, once it is known to be above 0 and at most 10,000 years. Raises InvalidUnitError."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    return real_number(
        name, value, "a number of seconds above 0, or a timedelta", math.ulp(0.0), _LONGEST, InvalidUnitError
    )


def expiry_of(ttl: object, expires_at: object, now: float, default: float | None = None) -> float | None:
    """The Unix time at which a unit expires; None for never. default: the time to live where neither is given.

    An ``expires_at`` of infinity is never, whatever the default. Raises InvalidUnitError for both at once, and for
    values that are no time.
    """
    if ttl is not None and expires_at is not None:
        raise InvalidUnitError("ttl and expires_at were both given; give one of them")
    if ttl is not None:
        return now + seconds("ttl", ttl)
    if expires_at is None:
        return None if default is None else now + default
    if isinstance(expires_at, float) and expires_at == math.inf:
        return None
    if isinstance(expires_at, datetime):
        if expires_at.tzinfo is None:
            raise InvalidUnitError(
                f"expires_at must name its zone, got {shown(expires_at)}; write datetime.now(timezone.utc)"
            )
        return expires_at.timestamp()
    words = "Unix time in seconds, or a datetime with its zone"
    return real_number("expires_at", expires_at, words, -_LONGEST, _LONGEST, InvalidUnitError)


def moments(
    ttl: object, expires_at: object, now: float, count: int, default: float | None = None
) -> list[float | None]:
    """As :func:`expiry_of` for each of ``count`` units; ``ttl`` and ``expires_at`` may be lists with one value each."""
    if _is_one(ttl) and _is_one(expires_at):
        return [expiry_of(ttl, expires_at, now, default)] * count
    both = [_each("ttl", ttl, count), _each("expires_at", expires_at, count)]
    return [expiry_of(one, moment, now, default) for one, moment in zip(*both, strict=True)]


def _is_one(value: object) -> bool:
    return value is None or isinstance(value, (numbers.Real, datetime, timedelta, str, bytes))


def _each(name: str, value: object, count: int) -> Sequence[object]:
    if _is_one(value):
        return [value] * count
    if not isinstance(value, Sequence) or len(value) != count:
        raise InvalidUnitError(f"{name} must be one value, or a list of {count}, one for each unit, got {shown(value)}")
    return value
