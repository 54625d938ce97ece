"""The default management strategy: prune, consolidate, deduplicate, forget, and health figures."""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np

from ...errors import ConfigurationError, ConflictError
from ...types import FloatArray, MemoryUnit
from ...utils.arguments import real_number, whole_number
from ...utils.timestamps import age_stamp, now_text, parse_stamp
from ..store.base import StorageBackend, as_backend, delete_units, register_operation
from .base import HealthMetrics, ManagementStrategy, Removal
from .near_duplicates import near_groups

__all__ = ["SimpleManagementStrategy"]

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
            return Chosen([unit["id"] for unit in islice(backend.units(), excess)])
        chosen = Chosen()
        kept = [unit_id for unit_id, old in self._judged(backend.units(self.filters), chosen, now) if not old]
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


SAMPLE = 64
"""Units asked how often they occur, when there are more."""

_SAME = 16
"""Occurrences of one unit that the sample can tell apart."""

_ALIKE = 0.9999
"""Cosine from which a unit counts as said twice."""


def health_metrics(backend: StorageBackend) -> HealthMetrics:
    """The figures; ``last_operation`` is this one."""
    known = backend.inventory()
    count = known["count"]
    duplicates, exact = _duplicates(backend, count)
    return HealthMetrics(
        total_units=count,
        total_size_bytes=known["bytes"],
        average_unit_size=known["bytes"] / count if count else 0.0,
        oldest_unit_timestamp=known["oldest"],
        newest_unit_timestamp=known["newest"],
        unit_types_distribution=known["types"],
        duplicate_count=duplicates,
        last_operation="metrics",
        last_operation_time=now_text(),
        duplicate_count_is_exact=exact,
    )


def _duplicates(backend: StorageBackend, count: int) -> tuple[int, bool]:
    """How many units say what another one says, and whether that is counted or estimated.

    A unit that occurs m times is 1 - 1/m of a duplicate, which adds up to units less distinct units; a sample of units
    gives the mean.
    """
    if count <= SAMPLE or "search_vectors" not in backend.capabilities:
        return sum(len(group) - 1 for group in near_groups(backend, _ALIKE)), True
    sample = backend.sample_vectors(SAMPLE)
    if not sample:
        return 0, True
    vectors = np.array(list(sample.values()))
    ids = backend.search_vectors(vectors, _SAME)[1]
    found = backend.vectors_of(list({name for row in ids for name in row if name is not None}))
    shares = []
    for vector, row in zip(vectors, ids, strict=True):
        near = [found[name] for name in row if name is not None and name in found]
        alike = sum(_cosine(vector, other) >= _ALIKE for other in near)
        shares.append(1.0 - 1.0 / max(1, alike))
    return round(count * float(np.mean(shares))), False


def _cosine(one: FloatArray, other: FloatArray) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else 0.0


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
        ids = sorted(backend.access_order("lru", held))  # a VectorStore reads no unit for it
        return random.Random(seed).sample(ids, min(wanted, len(ids)))  # noqa: S311 - a sample, no secret
    return backend.access_order("lru" if strategy == "lru" else "lfu", wanted)


MAX_CHARACTERS = 8000
"""Characters of a merged content: about what embedding models read of a text before they cut it off."""

SOURCES_NAMED = 1000
"""Ids of sources that a merged unit names at most; their number is exact."""

_TEXTS = ("content", "reasoning", "query")
_OWN = ("consolidated_from", "consolidated_count", "consolidated_at", "first_created_at", "last_created_at")


def merged_unit(units: Sequence[MemoryUnit]) -> MemoryUnit:
    """One unit, without an id, of two or more, oldest first.

    Distinct texts are joined by an empty line, tags are united, ``type`` is the most frequent. Of other fields, and of
    ``metadata``, the newest value stays. ``metadata`` says whence: ``consolidated_from`` (ids, those of earlier merges
    included), ``consolidated_count``, ``first_created_at`` and ``last_created_at`` (the span of the sources),
    ``consolidated_at``. ``created_at`` is that of the newest source, so that merging makes nothing younger.
    """
    merged: MemoryUnit = {}
    for unit in units:
        merged.update({key: value for key, value in unit.items() if key != "id"})
    merged.update({key: _joined(units, key) for key in _TEXTS if any(unit.get(key) for unit in units)})
    types = Counter(unit["type"] for unit in units if isinstance(unit.get("type"), str))
    if types:
        merged["type"] = types.most_common(1)[0][0]
    tags = [tag for unit in units if isinstance(unit.get("tags"), list) for tag in unit["tags"]]
    merged["tags"] = list({repr(tag): tag for tag in tags}.values())
    merged["metadata"] = _metadata(units)
    return merged


def portions(units: Iterable[MemoryUnit], most: int = MAX_CHARACTERS) -> Iterator[list[MemoryUnit]]:
    """Cut into runs of two or more whose joined contents have at most ``most`` characters; others are left out."""
    run: list[MemoryUnit] = []
    length = 0
    for unit in units:
        size = len(str(unit.get("content") or "")) + 2
        if run and length + size > most:
            if len(run) > 1:
                yield run
            run, length = [], 0
        run.append(unit)
        length += size
    if len(run) > 1:
        yield run


def _joined(units: Sequence[MemoryUnit], key: str) -> str:
    texts = [str(unit[key]).strip() for unit in units if unit.get(key)]
    return "\n\n".join(dict.fromkeys(texts))


def _metadata(units: Sequence[MemoryUnit]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for unit in units:
        found.update({key: value for key, value in _metadata_of(unit).items() if key not in _OWN})
    sources = [source for unit in units for source in _sources(unit)]
    found["consolidated_from"] = list(dict.fromkeys(sources))[:SOURCES_NAMED]
    found["consolidated_count"] = sum(_merged_count(unit) for unit in units)
    first, last = _span(units)
    if first is not None and last is not None:
        found.update(created_at=last, first_created_at=first, last_created_at=last)
    found["consolidated_at"] = now_text()
    return found


def _metadata_of(unit: MemoryUnit) -> dict[str, Any]:
    metadata = unit.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _sources(unit: MemoryUnit) -> list[str]:
    """The units that it was merged from, else itself."""
    sources = _metadata_of(unit).get("consolidated_from")
    named = [source for source in sources if isinstance(source, str)] if isinstance(sources, list) else []
    return named or [str(unit.get("id", ""))]


def _merged_count(unit: MemoryUnit) -> int:
    count = _metadata_of(unit).get("consolidated_count")
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else len(_sources(unit))


def _span(units: Sequence[MemoryUnit]) -> tuple[str | None, str | None]:
    """``created_at`` of the oldest and of the newest unit that was ever merged into these."""
    stamps: list[tuple[float, str]] = []
    for unit in units:
        held = _metadata_of(unit)
        for key in ("first_created_at", "created_at", "last_created_at"):
            moment = parse_stamp(held.get(key))
            if moment is not None:
                stamps.append((moment, held[key]))
    return (min(stamps)[1], max(stamps)[1]) if stamps else (None, None)


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
        backend = as_backend(storage_backend)
        since = backend.change_number
        chosen = wanted.choose(backend)
        notes = {"undated": chosen.undated} if wanted.max_age is not None else {}
        return self._remove(backend, "prune", chosen.ids, since, dry_run, notes, dict(criteria or {}))

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
        backend = as_backend(storage_backend)
        changed: set[str] = set()
        for attempt in range(_ATTEMPTS):
            since = backend.change_number
            groups = _to_merge(backend, units, by, similarity_threshold, max_characters, changed)
            merged = [merged_unit(group) for group in groups]
            if dry_run or not merged:
                return merged
            sources = [unit["id"] for group in groups for unit in group]
            try:
                ids = backend.replace_batch(sources, merged, unchanged_since=since)
            except ConflictError as error:
                changed.update(error.ids)
                if attempt == _ATTEMPTS - 1:
                    raise
                continue
            details = {"by": by, "threshold": similarity_threshold, "merged": len(ids), "removed": len(sources)}
            register_operation(backend, "consolidate", details)
            backend.record_access(ids)  # else what came of well-read units would be the first to go
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
        backend = as_backend(storage_backend)
        since = backend.change_number
        groups = near_groups(backend, similarity_threshold, rank=_rank(backend, keep))
        ids = [unit_id for group in groups for unit_id in group[1:]]
        notes = {"groups": len(groups)}
        details = {"threshold": similarity_threshold, "keep": keep}
        return self._remove(backend, "deduplicate", ids, since, dry_run, notes, details)

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
        backend = as_backend(storage_backend)
        since = backend.change_number
        ids = first_to_go(backend, strategy, count, seed)
        notes = {} if "access_order" in backend.capabilities or strategy == "random" else {"by": "age"}
        return self._remove(backend, "forget", ids, since, dry_run, notes, {"strategy": strategy})

    def get_health_metrics(self, storage_backend: StorageBackend) -> HealthMetrics:
        """Figures; of a backend that can describe itself no unit is read, but for a sample."""
        return health_metrics(as_backend(storage_backend))

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
        gone = delete_units(backend, ids, since)
        if len(gone) != len(ids):
            notes["left"] = len(ids) - len(gone)
        if gone:
            register_operation(backend, operation, {**details, **notes, "removed": len(gone)})
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
    listed = backend.units() if only is None else iter(backend.retrieve_batch(only).values())
    types: dict[str, list[MemoryUnit]] = {}
    for unit in listed:
        types.setdefault(_type(unit), []).append(unit)
    return list(types.values())


def _by_meaning(backend: StorageBackend, only: Sequence[str] | None, threshold: float) -> list[list[MemoryUnit]]:
    groups = near_groups(backend, threshold, only=only, apart=_type)
    units = backend.retrieve_batch([unit_id for group in groups for unit_id in group])
    return [[units[unit_id] for unit_id in group if unit_id in units] for group in groups]


def _type(unit: MemoryUnit) -> str:
    return str(unit.get("type"))


def _rank(backend: StorageBackend, keep: Keep) -> Callable[[str], int] | None:
    """The most accessed first; None for the oldest."""
    if keep == "oldest" or "access_counts" not in backend.capabilities:
        return None
    counts = backend.access_counts()
    return lambda unit_id: -counts.get(unit_id, 0)


def _check_threshold(value: Any) -> None:
    real_number(
        "similarity_threshold", value, "a cosine above 0 and at most 1", sys.float_info.min, 1, ConfigurationError
    )
