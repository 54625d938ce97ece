"""What pruning is asked to delete."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ...errors import ConfigurationError
from ...types import MemoryUnit
from ...utils.arguments import real_number, whole_number
from ..stamps import age_stamp
from ..store.base import StorageBackend
from ..store.doors import units_of

__all__ = ["Chosen", "PruneCriteria"]

_DAY = 86_400.0
_KEYS = ("max_age", "max_count", "type", "filters")


@dataclass
class Chosen:
    """Ids to delete, and how many units had no time stamp to judge by."""

    ids: list[str] = field(default_factory=list)
    undated: int = 0


@dataclass(frozen=True)
class PruneCriteria:
    """``filters`` says which units are looked at. Of these go all, or those that break a bound.

    max_age: seconds since ``created_at``; max_count: how many may stay, the newest.
    """

    filters: Mapping[str, Any] | None
    max_age: float | None
    max_count: int | None

    @classmethod
    def parse(cls, criteria: Mapping[str, Any] | None) -> PruneCriteria | None:
        """None when nothing is asked for.

        criteria: ``max_age`` (days), ``max_count``, ``type`` (one or a list), ``filters`` (docs/reference/filters.md).
        Raises ConfigurationError for another key or a value that cannot be used.
        """
        if not criteria:
            return None
        for key in criteria:
            if key not in _KEYS:
                raise ConfigurationError(f"criteria[{key!r}] is not known; use {', '.join(_KEYS)}")
        filters = dict(_filters(criteria.get("filters")))
        if criteria.get("type") is not None:
            if "type" in filters:
                raise ConfigurationError("criteria['type'] and criteria['filters']['type'] are both given; give one")
            filters["type"] = criteria["type"]
        days, most = _days(criteria.get("max_age")), _count(criteria.get("max_count"))
        if not filters and days is None and most is None:
            return None
        return cls(filters or None, None if days is None else days * _DAY, most)

    def choose(self, backend: StorageBackend, now: float | None = None) -> Chosen:
        """The units to delete."""
        if self.max_age is None and self.filters is None:
            excess = max(0, backend.count() - (self.max_count or 0))
            return Chosen([unit["id"] for unit in islice(units_of(backend), excess)])
        chosen = Chosen()
        kept = [unit_id for unit_id, old in self._judged(units_of(backend, self.filters), chosen, now) if not old]
        if self.max_count is not None and len(kept) > self.max_count:
            chosen.ids += kept[: len(kept) - self.max_count]
        return chosen

    def _judged(self, units: Iterable[MemoryUnit], chosen: Chosen, now: float | None) -> Iterable[tuple[str, bool]]:
        """(id, whether it goes by itself); those that go are noted in ``chosen``."""
        bound = None if self.max_age is None else (time.time() if now is None else now) - self.max_age
        alone = self.max_age is None and self.max_count is None
        for unit in units:
            stamp = None if bound is None else age_stamp(unit)
            chosen.undated += bound is not None and stamp is None
            goes = alone or (bound is not None and stamp is not None and stamp < bound)
            if goes:
                chosen.ids.append(unit["id"])
            yield unit["id"], goes


def _filters(value: Any) -> Mapping[str, Any]:
    if value is None or isinstance(value, Mapping):
        return value or {}
    raise ConfigurationError(
        f"criteria['filters'] must be a mapping, got {type(value).__name__}; see docs/reference/filters.md"
    )


def _days(value: Any) -> float | None:
    if value is None:
        return None
    allowed = "a number of days of at least 0"
    return real_number("criteria['max_age']", value, allowed, 0, math.inf, ConfigurationError)


def _count(value: Any) -> int | None:
    if value is None:
        return None
    return whole_number("criteria['max_count']", value, least=0, error=ConfigurationError)
