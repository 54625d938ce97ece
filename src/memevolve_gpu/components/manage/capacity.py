"""Room is made before a store refuses: which limits there are, and how many units must go."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import ConfigurationError
from ..store.base import StorageBackend
from ..store.capabilities import StorageHealth

__all__ = ["Capacity", "Room"]

_BELOW_WARNING = 0.1
_BELOW_THRESHOLD = 0.9
_DEFAULT_WARNING, _DEFAULT_PRUNE = 0.8, 0.9


@dataclass(frozen=True)
class Room:
    """``excess``: units that must go before the new ones come, 0 when all is well; ``cause`` says why."""

    excess: int
    cause: str = ""
    for_memory: bool = False


@dataclass
class Capacity:
    """When to make room, and how much.

    threshold: most units; None for the backend's own limits, of which ``prune_threshold`` may be used. level: share of
    the limit to go down to; None for the warning threshold less 0.1, or for 0.9 of ``threshold``.
    """

    threshold: int | None = None
    level: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.threshold < 1:
            raise ConfigurationError(f"auto_prune_threshold must be at least 1 unit, got {self.threshold}")
        if self.level is not None and not 0 <= self.level < 1:
            raise ConfigurationError(f"prune_to must be a share of at least 0 and below 1, got {self.level}")

    def room(self, backend: StorageBackend, new: int) -> Room:
        """What must go so that ``new`` units can come."""
        if self.threshold is not None:
            share = _BELOW_THRESHOLD if self.level is None else self.level
            bounds = (math.floor(self.threshold * share), self.threshold, self.threshold)
            return _within(backend.count(), new, bounds)
        if not isinstance(backend, StorageHealth):
            return Room(0)
        return self._by_limits(backend, new)

    def _by_limits(self, backend: StorageHealth, new: int) -> Room:
        config = getattr(backend, "config", None)
        warning = float(getattr(config, "warning_threshold", _DEFAULT_WARNING))
        share = float(getattr(config, "prune_threshold", _DEFAULT_PRUNE))
        level = self.level if self.level is not None else max(0.0, warning - _BELOW_WARNING)
        health = backend.get_storage_health()
        count, limit = int(health["current_count"]), int(health["max_units"])
        by_units = _within(count, new, (math.floor(level * limit), math.ceil(share * limit) - 1, limit))
        used, most = float(health["memory_usage_mb"]), float(health["max_memory_mb"])
        if by_units.excess or used < share * most:
            return by_units
        excess = max(0, math.ceil(count * (1 - level * most / used)))
        return Room(excess, f"index memory is {used:.0f} of at most {most:.0f} MiB", for_memory=True)


def _within(count: int, new: int, bounds: tuple[int, int, int]) -> Room:
    """bounds: where to go down to, most units before room is made, and the limit.

    A batch that is larger than the first bound goes by the next: as little as needed is deleted for it, and nothing for
    one that does not fit at all.
    """
    if count + new <= bounds[1]:
        return Room(0)
    bound = next((bound for bound in bounds if new <= bound), count + new)
    return Room(min(count, max(0, count + new - bound)), f"{count} units of at most {bounds[2]}, and {new} to come")
