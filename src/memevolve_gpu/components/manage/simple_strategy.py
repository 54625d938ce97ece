"""The default management strategy: prune, consolidate, deduplicate, forget, and health metrics."""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np

from ...errors import ConfigurationError, ConflictError, InvalidFilterError
from ...types import Filters, JsonObject, MemoryUnit
from ...utils.arguments import listed, mapping, real_number, shown, switch, whole_number, word
from ...utils.timestamps import age_stamp, now_text, parse_stamp
from ...utils.vectors import cosines
from ..store.base import StorageBackend
from ..store.foreign import as_backend, delete_units, register_operation
from ..store.history import named_operation
from ..store.units import unit_to_text
from .base import HealthMetrics, ManagementStrategy, Merged, Removal
from .near_duplicates import Judge, near_groups

__all__ = ["SimpleManagementStrategy"]

_DAY = 86_400.0
_KEYS = ("max_age", "max_count", "type", "filters")


@dataclass
class Chosen:
    """Ids to delete, and the number of units without a readable time stamp."""

    ids: list[str] = field(default_factory=list)
    undated: int = 0


@dataclass(frozen=True)
class PruneCriteria:
    """``filters`` limits the units. Of these, all are deleted, or those beyond ``max_age`` or ``max_count``.

    max_age: seconds since ``created_at``; max_count: how many of the newest stay.
    """

    filters: Filters | None
    max_age: float | None
    max_count: int | None

    @classmethod
    def parse(cls, criteria: Mapping[str, object] | None) -> PruneCriteria | None:
        """Check the criteria of :meth:`SimpleManagementStrategy.prune`; None when they are empty.

        Raises ConfigurationError for an unknown key or a value that cannot be used.
        """
        if criteria is None:
            return None
        for key in mapping("criteria", criteria, ConfigurationError):
            if key not in _KEYS:
                raise ConfigurationError(f"criteria[{shown(key)}] is not known; use {', '.join(_KEYS)}")
        given = criteria.get("filters")
        if given is not None and not isinstance(given, Mapping):
            raise ConfigurationError(
                f"criteria['filters'] must be a mapping, got {type(given).__name__}; "
                "see https://memevolve-gpu.example/docs/reference/filters/"
            )
        filters = {} if given is None else {**given}
        if criteria.get("type") is not None:
            if "type" in filters:
                raise ConfigurationError("criteria['type'] and criteria['filters']['type'] are both given; give one")
            filters["type"] = criteria["type"]
        days, most = criteria.get("max_age"), criteria.get("max_count")
        if days is not None:
            allowed = "a number of days of at least 0"
            days = real_number("criteria['max_age']", days, allowed, 0, math.inf, ConfigurationError) * _DAY
        if most is not None:
            most = whole_number("criteria['max_count']", most, least=0, error=ConfigurationError)
        return None if not filters and days is None and most is None else cls(filters or None, days, most)

    def choose(self, backend: StorageBackend) -> Chosen:
        """Find the units to delete."""
        if self.max_age is None and self.filters is None:
            excess = max(0, backend.count() - (self.max_count or 0))
            return Chosen([unit["id"] for unit in islice(backend.units(), excess)])
        chosen, kept = Chosen(), list[str]()
        bound = None if self.max_age is None else time.time() - self.max_age
        alone = self.max_age is None and self.max_count is None
        for unit in backend.units(self.filters):
            stamp = None if bound is None else age_stamp(unit)
            chosen.undated += bound is not None and stamp is None
            goes = alone or (bound is not None and stamp is not None and stamp < bound)
            (chosen.ids if goes else kept).append(unit["id"])
        if self.max_count is not None and len(kept) > self.max_count:
            chosen.ids += kept[: len(kept) - self.max_count]
        return chosen


SAMPLE = 64
"""Larger memories estimate their duplicates from a sample of this many units."""

_SAME = 16
"""Neighbours read for each unit of the sample: the most duplicates of one unit that are counted."""

_ALIKE = 0.9999
"""Cosine from which two units count as duplicates."""


def _duplicates(backend: StorageBackend, count: int) -> tuple[int, bool]:
    """Return the number of duplicates, and whether it is exact.

    A unit that occurs m times counts as 1 - 1/m of a duplicate; the sum is the number of units minus the number of
    distinct units. A sample of units gives the mean.
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
        near = {name: found[name] for name in row if name is not None and name in found}
        alike = sum(cosine >= _ALIKE for cosine in cosines(vector, near).values())
        shares.append(1.0 - 1.0 / max(1, alike))
    return round(count * float(np.mean(shares))), False


STRATEGIES = ("lru", "lfu", "random")

_SHARE = 10
"""Without a count, one unit in this many is deleted."""


def first_to_go(backend: StorageBackend, strategy: str, count: object, seed: int | None) -> list[str]:
    """Return the ids of ``count`` units, or of a tenth (at least one), first to delete first.

    lru: least recently read; lfu: least frequently read; units never read come first, oldest first. random: the same
    ``seed`` and ids give the same choice. A backend without access counts goes by age. Raises ConfigurationError.
    """
    word("strategy", strategy, STRATEGIES, ConfigurationError)
    held = backend.count()
    if count is None:
        wanted = max(1, held // _SHARE)
    else:
        remedy = "None deletes a tenth"
        wanted = min(held, whole_number("count", count, least=0, error=ConfigurationError, remedy=remedy))
    if wanted == 0:
        return []
    if strategy == "random":
        ids = sorted(backend.access_order("lru", held))  # a VectorStore reads no unit for it
        return random.Random(seed).sample(ids, min(wanted, len(ids)))  # noqa: S311 - a sample, no secret
    return backend.access_order("lru" if strategy == "lru" else "lfu", wanted)


MAX_CHARACTERS = 8000
"""Most characters of a merged content: embedding models truncate a text at about this length."""

SOURCES_NAMED = 1000
"""Most source ids that a merged unit lists; ``consolidated_count`` is exact."""

_TEXTS = ("content", "reasoning", "query")
_OWN = ("consolidated_from", "consolidated_count", "consolidated_at", "first_created_at", "last_created_at")


def merged_unit(units: Sequence[MemoryUnit]) -> MemoryUnit:
    """Merge two or more units, oldest first, into one without an id.

    Distinct texts are joined by an empty line, tags are united, ``type`` is the most frequent one. Other fields, and
    those of ``metadata``, keep their newest value. ``metadata`` names the sources: ``consolidated_from`` (ids, those of
    earlier merges included), ``consolidated_count``, ``first_created_at`` and ``last_created_at`` (the time span of the
    sources), ``consolidated_at``. ``created_at`` is that of the newest source, so that merging makes nothing newer.
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
    """Split into runs of two or more whose joined contents have at most ``most`` characters; drop single units."""
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


def _metadata(units: Sequence[MemoryUnit]) -> JsonObject:
    found: JsonObject = {}
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


def _metadata_of(unit: MemoryUnit) -> JsonObject:
    metadata = unit.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _sources(unit: MemoryUnit) -> list[str]:
    """Return the ids of the units that it was merged from, else its own id."""
    sources = _metadata_of(unit).get("consolidated_from")
    named = [source for source in sources if isinstance(source, str)] if isinstance(sources, list) else []
    return named or [str(unit.get("id", ""))]


def _merged_count(unit: MemoryUnit) -> int:
    count = _metadata_of(unit).get("consolidated_count")
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else len(_sources(unit))


def _span(units: Sequence[MemoryUnit]) -> tuple[str | None, str | None]:
    """Return ``created_at`` of the oldest and of the newest unit that was ever merged into these."""
    stamps: list[tuple[float, str]] = []
    for unit in units:
        held = _metadata_of(unit)
        for key in ("first_created_at", "created_at", "last_created_at"):
            moment = parse_stamp(held.get(key))
            if moment is not None:
                stamps.append((moment, held[key]))
    return (min(stamps)[1], max(stamps)[1]) if stamps else (None, None)


Grouping = Literal["similarity", "type"]
Keep = Literal["newest", "oldest", "longest", "accessed"]
Compare = Literal["text", "cosine"]

SCOPE = ("user", "agent", "session")
"""Fields of ``metadata`` whose differing values keep units apart; each stands for its ``_id`` form too."""

_ATTEMPTS = 5
"""How often merging starts over without the units that changed while it was prepared."""


class SimpleManagementStrategy(ManagementStrategy):
    """The default strategy; works on any backend, in one transaction where the backend has transactions.

    With ``dry_run=True`` a method returns what it would do and changes nothing. A unit that changes while an operation
    is prepared is left unchanged, if the backend numbers its changes.

    Examples:
        >>> import tempfile
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> from memevolve_gpu.components.manage import SimpleManagementStrategy
        >>> strategy = SimpleManagementStrategy()
        >>> with tempfile.TemporaryDirectory() as folder, VectorStore(f"{folder}/m", HashingEmbedder()) as store:
        ...     ids = store.store_batch([{"content": f"use git {word}"} for word in ("bisect", "bisect", "worktree")])
        ...     removed = strategy.deduplicate(store, 0.99)
        ...     removed.ids == [ids[0]], store.count()
        (True, 2)
    """

    def __init__(self, scope: Sequence[str] = SCOPE) -> None:
        """Create a strategy.

        Args:
            scope: Fields of ``metadata``: units in which one of them differs, or is missing in one, are neither merged
                nor duplicates. ``user`` is ``user_id`` too. Empty: none.

        Raises:
            ConfigurationError: ``scope`` is no list of texts.
        """
        names = listed("scope", scope)
        self.scope = tuple(names)

    def prune(
        self, storage_backend: StorageBackend, criteria: Mapping[str, object] | None = None, *, dry_run: bool = False
    ) -> Removal:
        """Delete the units that match criteria.

        Args:
            storage_backend: The store.
            criteria: ``type`` (one or a list) and ``filters`` (docs/reference/filters.md) limit the units. Of these,
                all are deleted, or only those older than ``max_age`` days by ``metadata.created_at`` and those beyond
                the newest ``max_count``. Units without a readable time stamp are not deleted by age. None or empty
                deletes nothing.
            dry_run: True changes nothing.

        Returns:
            (count, ids) of the deleted units. ``notes["undated"]`` counts units without a readable time stamp.

        Raises:
            ConfigurationError: A criterion is unknown or cannot be used.
            InvalidFilterError: ``filters`` is malformed.
        """
        dry_run = switch("dry_run", dry_run)
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
        filters: Filters | None = None,
        compare: Compare = "text",
        dry_run: bool = False,
    ) -> Merged:
        """Merge similar units, or all units of a type.

        Opposites and statements with other values are not merged by similarity but reported in ``conflicts``.

        The sources are deleted in the transaction that stores the merged units; ``metadata`` of a merged unit names
        its sources, see docs/how-to/management.md.

        Args:
            storage_backend: The store.
            units: Ids of the units to consider; None for all.
            by: ``similarity`` merges units of one type whose cosine with the oldest of them reaches
                ``similarity_threshold`` (units of equal text on a backend without vectors). ``type`` merges all units
                of one type, oldest first.
            similarity_threshold: A cosine above 0 and at most 1.
            max_characters: Most characters of a merged content; more text gives several units.
            filters: Only units that match are considered; None for all.
            compare: ``text`` keeps conflicts apart; ``cosine`` goes by the cosine alone.
            dry_run: True changes nothing.

        Returns:
            The list of merged units, with their ids unless ``dry_run``. Its ``notes`` have ``conflicts`` and
            ``conflict_count`` if there are any, and with ``dry_run`` the ``pairs``.

        Raises:
            ConfigurationError: An argument is not allowed.
            InvalidFilterError: ``filters`` is malformed.
            EmbeddingError: A merged unit cannot be embedded.
            ConflictError: Units changed during each of five attempts.
        """
        word("by", by, ("similarity", "type"), ConfigurationError)
        word("compare", compare, ("text", "cosine"), ConfigurationError)
        dry_run = switch("dry_run", dry_run)
        units = None if units is None else listed("units", units)
        _check_threshold(similarity_threshold)
        whole_number("max_characters", max_characters, error=ConfigurationError)
        backend = as_backend(storage_backend)
        changed: set[str] = set()
        for attempt in range(_ATTEMPTS):
            since = backend.change_number
            judge = Judge(related=True) if compare == "text" else None
            only = _chosen(backend, units, filters)
            if by == "type":
                found = _by_type(backend, only, self._apart)
            else:
                found = _by_meaning(backend, only, similarity_threshold, self._apart, judge)
            kept = ([unit for unit in group if unit["id"] not in changed] for group in found)
            groups = [part for group in kept for part in portions(group, max_characters)]
            merged = [merged_unit(group) for group in groups]
            if dry_run or not merged:
                return Merged(merged, _report(judge, dry_run))
            sources = [unit["id"] for group in groups for unit in group]
            try:
                with named_operation("consolidate"):
                    ids = backend.replace_batch(sources, merged, unchanged_since=since)
            except ConflictError as error:
                changed.update(error.ids)
                if attempt == _ATTEMPTS - 1:
                    raise
                continue
            details = {"by": by, "threshold": similarity_threshold, "merged": len(ids), "removed": len(sources)}
            register_operation(backend, "consolidate", details)
            backend.record_access(ids)  # else what came of well-read units would be the first to go
            stored = [{**unit, "id": unit_id} for unit, unit_id in zip(merged, ids, strict=True)]
            return Merged(stored, _report(judge, dry_run))
        return Merged([])

    def deduplicate(
        self,
        storage_backend: StorageBackend,
        similarity_threshold: float = 0.75,
        *,
        keep: Keep = "newest",
        filters: Filters | None = None,
        compare: Compare = "text",
        dry_run: bool = False,
    ) -> Removal:
        """Delete each unit that says the same as a unit that stays.

        The cosine proposes pairs and their texts decide: other numbers, names, flags, paths, versions or words, a
        negation or an opposite keep both units. Such pairs are reported in ``notes["conflicts"]``.

        Args:
            storage_backend: The store. Without vectors, units of equal text are duplicates.
            similarity_threshold: A cosine above 0 and at most 1.
            keep: Which of several duplicates stays: the ``newest`` by the order of writing, the ``oldest``, the one
                with the ``longest`` text, or the most ``accessed``; among equals the newest (``accessed``: the oldest).
            filters: Only units that match are considered; None for all.
            compare: ``text``, or ``cosine`` for the cosine alone, which deletes opposites too.
            dry_run: True changes nothing.

        Returns:
            (count, ids) of the deleted units. ``notes`` have ``groups``, ``conflicts`` (at most 100, each ``ids``,
            ``cosine`` and ``reason``) and ``conflict_count`` if there are any, and with ``dry_run`` the ``pairs``.

        Raises:
            ConfigurationError: An argument is not allowed.
            InvalidFilterError: ``filters`` is malformed.
        """
        word("keep", keep, ("newest", "oldest", "longest", "accessed"), ConfigurationError)
        word("compare", compare, ("text", "cosine"), ConfigurationError)
        dry_run = switch("dry_run", dry_run)
        _check_threshold(similarity_threshold)
        backend = as_backend(storage_backend)
        since = backend.change_number
        judge = Judge() if compare == "text" else None
        groups = near_groups(
            backend,
            similarity_threshold,
            only=_chosen(backend, None, filters),
            rank=_rank(backend, keep),
            apart=self._scope_of,
            judge=judge,
            newest=keep in ("newest", "longest"),
        )
        ids = [unit_id for group in groups for unit_id in group[1:]]
        notes = {"groups": len(groups), **_report(judge, dry_run)}
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
        """Delete the units that are needed least.

        Args:
            storage_backend: The store. If it counts no accesses, ``lru`` and ``lfu`` delete the oldest units.
            strategy: ``lru`` (least recently read), ``lfu`` (least frequently read) or ``random``. Units never read
                come first, oldest first.
            count: How many; None for a tenth of all, at least one.
            seed: Makes ``random`` repeatable.
            dry_run: True changes nothing.

        Returns:
            (count, ids) of the deleted units.

        Raises:
            ConfigurationError: An argument is not allowed.
        """
        dry_run = switch("dry_run", dry_run)
        backend = as_backend(storage_backend)
        since = backend.change_number
        ids = first_to_go(backend, strategy, count, seed)
        notes = {} if "access_order" in backend.capabilities or strategy == "random" else {"by": "age"}
        return self._remove(backend, "forget", ids, since, dry_run, notes, {"strategy": strategy})

    def _scope_of(self, unit: MemoryUnit) -> tuple[str, ...]:
        held = _metadata_of(unit)
        values = (held.get(key) for name in self.scope for key in (name, f"{name}_id"))
        return tuple("" if value is None else repr(value) for value in values)

    def _apart(self, unit: MemoryUnit) -> tuple[str, ...]:
        return (str(unit.get("type")), *self._scope_of(unit))

    def get_health_metrics(self, storage_backend: StorageBackend) -> HealthMetrics:
        backend = as_backend(storage_backend)
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

    def _remove(
        self,
        backend: StorageBackend,
        operation: str,
        ids: list[str],
        since: int | None,
        dry_run: bool,
        notes: JsonObject,
        details: Mapping[str, object],
    ) -> Removal:
        if dry_run:
            return Removal(ids, {**notes, "dry_run": True})
        with named_operation(operation):
            gone = delete_units(backend, ids, since)
        if len(gone) != len(ids):
            notes["left"] = len(ids) - len(gone)
        if gone:
            register_operation(backend, operation, {**details, **notes, "removed": len(gone)})
        return Removal(gone, notes)


def _chosen(backend: StorageBackend, ids: Sequence[str] | None, filters: Filters | None) -> Sequence[str] | None:
    """The ids that are given and match; None for all."""
    if filters is None or not mapping("filters", filters, InvalidFilterError):
        return ids
    matching = [unit["id"] for unit in backend.units(filters)]
    return matching if ids is None else list(set(ids).intersection(matching))


def _report(judge: Judge | None, dry_run: bool) -> JsonObject:
    if judge is None:
        return {}
    notes: JsonObject = {"pairs": judge.pairs} if dry_run and judge.pairs else {}
    if judge.conflict_count:
        notes.update(conflicts=judge.conflicts, conflict_count=judge.conflict_count)
    return notes


def _by_type(
    backend: StorageBackend, only: Sequence[str] | None, apart: Callable[[MemoryUnit], object]
) -> list[list[MemoryUnit]]:
    listed = backend.units() if only is None else iter(backend.retrieve_batch(only).values())
    groups: dict[object, list[MemoryUnit]] = {}
    for unit in listed:
        groups.setdefault(apart(unit), []).append(unit)
    return list(groups.values())


def _by_meaning(
    backend: StorageBackend,
    only: Sequence[str] | None,
    threshold: float,
    apart: Callable[[MemoryUnit], object],
    judge: Judge | None,
) -> list[list[MemoryUnit]]:
    groups = near_groups(backend, threshold, only=only, apart=apart, judge=judge)
    units = backend.retrieve_batch([unit_id for group in groups for unit_id in group])
    return [[units[unit_id] for unit_id in group if unit_id in units] for group in groups]


def _rank(backend: StorageBackend, keep: Keep) -> Callable[[str], int] | None:
    """Return a rank that puts the most accessed or the longest unit first; None for the order of writing."""
    if keep == "longest":
        lengths = {unit["id"]: len(unit_to_text(unit)) for unit in backend.units()}
        return lambda unit_id: -lengths.get(unit_id, 0)
    if keep != "accessed" or "access_counts" not in backend.capabilities:
        return None
    counts = backend.access_counts()
    return lambda unit_id: -counts.get(unit_id, 0)


def _check_threshold(value: object) -> None:
    real_number(
        "similarity_threshold", value, "a cosine above 0 and at most 1", sys.float_info.min, 1, ConfigurationError
    )
