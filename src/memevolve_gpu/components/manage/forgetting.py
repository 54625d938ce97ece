"""Which units are forgotten first."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

from ...errors import ConfigurationError
from ...utils.arguments import whole_number
from ..store.base import StorageBackend
from ..store.capabilities import AccessFigures
from ..store.doors import units_of

__all__ = ["STRATEGIES", "first_to_go"]

STRATEGIES = ("lru", "lfu", "random")

_SHARE = 10
"""Without a count, one unit in so many is forgotten."""


def first_to_go(backend: StorageBackend, strategy: str, count: Any, seed: int | None) -> list[str]:
    """``count`` ids, or those of a tenth of the units (at least one), in the order in which they are to go.

    lru: read longest ago; lfu: read least often; in both those never read come first, by age. random: by ``seed``, the
    same for the same ids. A backend without access figures is taken by age. Raises ConfigurationError.
    """
    if strategy not in STRATEGIES:
        raise ConfigurationError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    held = backend.count()
    if count is None:
        wanted = max(1, held // _SHARE)
    else:
        remedy = "None takes a tenth"
        wanted = min(held, whole_number("count", count, least=0, error=ConfigurationError, remedy=remedy))
    if wanted == 0:
        return []
    if strategy == "random":
        ids = sorted(_all_ids(backend))
        return random.Random(seed).sample(ids, min(wanted, len(ids)))  # noqa: S311 - a sample, no secret
    if isinstance(backend, AccessFigures):
        return backend.access_order("lru" if strategy == "lru" else "lfu", wanted)
    return _by_age(backend, wanted)


def _all_ids(backend: StorageBackend) -> list[str]:
    if isinstance(backend, AccessFigures):
        return backend.access_order("lru", backend.count())  # which reads no unit
    return _by_age(backend, None)


def _by_age(backend: StorageBackend, count: int | None) -> list[str]:
    return [unit["id"] for unit in islice(units_of(backend), count)]
