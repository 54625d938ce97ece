"""The management strategy that comes with the store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ...errors import ConfigurationError, ConflictError
from ...types import MemoryUnit
from ...utils.arguments import real_number, whole_number
from ..store.base import StorageBackend
from ..store.capabilities import AccessFigures
from ..store.doors import change_number, register, remove, replace, retrieve_many, units_of
from .base import HealthMetrics, ManagementStrategy, Removal
from .criteria import PruneCriteria
from .figures import health_metrics
from .forgetting import first_to_go
from .merge import MAX_CHARACTERS, merged_unit, portions
from .near import near_groups

__all__ = ["SimpleManagementStrategy"]

Grouping = Literal["similarity", "type"]
Keep = Literal["oldest", "accessed"]

_ATTEMPTS = 5
"""How often merging begins anew without the units that changed while it was prepared."""


class SimpleManagementStrategy(ManagementStrategy):
    """Prunes, consolidates, deduplicates and forgets on any backend, in one transaction where the backend has such.

    Each method takes ``dry_run``: it then says what it would do, and changes nothing. A unit that somebody changes
    while an operation is being prepared is left alone, where the backend numbers its changes.
    """

    def prune(
        self, storage_backend: StorageBackend, criteria: Mapping[str, Any] | None = None, *, dry_run: bool = False
    ) -> Removal:
        """Delete what the criteria name: (count, ids); nothing without criteria.

        ``type`` (one or a list) and ``filters`` (docs/reference/filters.md) say which units are looked at. Of these go
        all, or those that break a bound: older than ``max_age`` days by ``metadata.created_at``, or beyond the newest
        ``max_count``. Units without a readable time stamp never go by age; ``notes["undated"]`` counts them. Raises
        ConfigurationError, InvalidFilterError.
        """
        wanted = PruneCriteria.parse(criteria)
        if wanted is None:
            return Removal([])
        since = change_number(storage_backend)
        chosen = wanted.choose(storage_backend)
        notes = {"undated": chosen.undated} if wanted.max_age is not None else {}
        return self._remove(storage_backend, "prune", chosen.ids, since, dry_run, notes, dict(criteria or {}))

    def consolidate(
        self,
        storage_backend: StorageBackend,
        units: Sequence[str] | None = None,
        *,
        by: Grouping = "similarity",
        similarity_threshold: float = 0.85,
        max_characters: int = MAX_CHARACTERS,
        dry_run: bool = False,
    ) -> list[MemoryUnit]:
        """Merge units, those of the ids ``units`` or all, and return the merged ones, with their ids.

        by similarity: units of one type whose cosine with the oldest of them reaches ``similarity_threshold`` (equal
        text on a backend without vectors). by type: all units of one type, oldest first. A merged content has at most
        ``max_characters``; where there is more, several units come of it. Sources are deleted in the transaction that
        stores what they became; see ``merge.merged_unit`` for what that says of them. Raises ConfigurationError,
        EmbeddingError, ConflictError (units changed each time they were looked at).
        """
        if by not in ("similarity", "type"):
            raise ConfigurationError(f"by must be 'similarity' or 'type', got {by!r}")
        _check_threshold(similarity_threshold)
        whole_number("max_characters", max_characters, error=ConfigurationError)
        changed: set[str] = set()
        for attempt in range(_ATTEMPTS):
            since = change_number(storage_backend)
            groups = _to_merge(storage_backend, units, by, similarity_threshold, max_characters, changed)
            merged = [merged_unit(group) for group in groups]
            if dry_run or not merged:
                return merged
            sources = [unit["id"] for group in groups for unit in group]
            try:
                ids = replace(storage_backend, sources, merged, since)
            except ConflictError as error:
                changed.update(error.ids)
                if attempt == _ATTEMPTS - 1:
                    raise
                continue
            details = {"by": by, "threshold": similarity_threshold, "merged": len(ids), "removed": len(sources)}
            register(storage_backend, "consolidate", details)
            if isinstance(storage_backend, AccessFigures):
                storage_backend.record_access(ids)  # else what came of well-read units would be the first to go
            return [{**unit, "id": unit_id} for unit, unit_id in zip(merged, ids, strict=True)]
        return []

    def deduplicate(
        self,
        storage_backend: StorageBackend,
        similarity_threshold: float = 0.9,
        *,
        keep: Keep = "oldest",
        dry_run: bool = False,
    ) -> Removal:
        """Delete each unit whose cosine with one that stays reaches the threshold: (count, ids).

        Of units that are alike the oldest stays, or the most accessed (the oldest of these). A backend without vectors
        is searched for equal texts. Raises ConfigurationError.
        """
        if keep not in ("oldest", "accessed"):
            raise ConfigurationError(f"keep must be 'oldest' or 'accessed', got {keep!r}")
        _check_threshold(similarity_threshold)
        since = change_number(storage_backend)
        groups = near_groups(storage_backend, similarity_threshold, rank=_rank(storage_backend, keep))
        ids = [unit_id for group in groups for unit_id in group[1:]]
        notes = {"groups": len(groups)}
        details = {"threshold": similarity_threshold, "keep": keep}
        return self._remove(storage_backend, "deduplicate", ids, since, dry_run, notes, details)

    def apply_forgetting(
        self,
        storage_backend: StorageBackend,
        strategy: str = "lru",
        count: int | None = None,
        *,
        seed: int | None = None,
        dry_run: bool = False,
    ) -> Removal:
        """Delete ``count`` units, or a tenth of all (at least one): (count, ids).

        lru: those read longest ago; lfu: least often; units never read go first, by age. random: by ``seed``. On a
        backend without access figures lru and lfu go by age. Raises ConfigurationError.
        """
        since = change_number(storage_backend)
        ids = first_to_go(storage_backend, strategy, count, seed)
        notes = {} if isinstance(storage_backend, AccessFigures) or strategy == "random" else {"by": "age"}
        return self._remove(storage_backend, "forget", ids, since, dry_run, notes, {"strategy": strategy})

    def get_health_metrics(self, storage_backend: StorageBackend) -> HealthMetrics:
        """Figures; of a backend that can describe itself no unit is read, but for a sample."""
        return health_metrics(storage_backend)

    def _remove(
        self,
        backend: StorageBackend,
        operation: str,
        ids: list[str],
        since: int | None,
        dry_run: bool,
        notes: dict[str, Any],
        details: Mapping[str, Any],
    ) -> Removal:
        if dry_run:
            return Removal(ids, {**notes, "dry_run": True})
        gone = remove(backend, ids, since)
        if len(gone) != len(ids):
            notes["left"] = len(ids) - len(gone)
        if gone:
            register(backend, operation, {**details, **notes, "removed": len(gone)})
        return Removal(gone, notes)


def _to_merge(
    backend: StorageBackend,
    only: Sequence[str] | None,
    by: Grouping,
    threshold: float,
    most: int,
    without: set[str],
) -> list[list[MemoryUnit]]:
    """Groups of two or more units, oldest first in each."""
    groups = _by_type(backend, only) if by == "type" else _by_meaning(backend, only, threshold)
    kept = ([unit for unit in group if unit["id"] not in without] for group in groups)
    return [part for group in kept for part in portions(group, most)]


def _by_type(backend: StorageBackend, only: Sequence[str] | None) -> list[list[MemoryUnit]]:
    listed = units_of(backend) if only is None else iter(retrieve_many(backend, only).values())
    types: dict[str, list[MemoryUnit]] = {}
    for unit in listed:
        types.setdefault(_type(unit), []).append(unit)
    return list(types.values())


def _by_meaning(backend: StorageBackend, only: Sequence[str] | None, threshold: float) -> list[list[MemoryUnit]]:
    groups = near_groups(backend, threshold, only=only, apart=_type)
    units = retrieve_many(backend, [unit_id for group in groups for unit_id in group])
    return [[units[unit_id] for unit_id in group if unit_id in units] for group in groups]


def _type(unit: MemoryUnit) -> str:
    return str(unit.get("type"))


def _rank(backend: StorageBackend, keep: Keep) -> Callable[[str], int] | None:
    """The most accessed first; None for the oldest."""
    if keep == "oldest" or not isinstance(backend, AccessFigures):
        return None
    counts = backend.access_counts()
    return lambda unit_id: -counts.get(unit_id, 0)


def _check_threshold(value: Any) -> None:
    real_number(
        "similarity_threshold", value, "a cosine above 0 and at most 1", sys.float_info.min, 1, ConfigurationError
    )
