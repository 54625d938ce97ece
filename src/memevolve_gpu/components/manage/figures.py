"""Health figures of a backend, without reading its units where it can describe itself."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from ...types import FloatArray
from ..stamps import age_stamp, now_text
from ..store.base import StorageBackend
from ..store.capabilities import Inventory, VectorDoors
from ..store.doors import units_of
from .base import HealthMetrics
from .near import near_groups

__all__ = ["health_metrics"]

SAMPLE = 64
"""Units asked how often they occur, when there are more."""

_SAME = 16
"""Occurrences of one unit that the sample can tell apart."""

_ALIKE = 0.9999
"""Cosine from which a unit counts as said twice."""


def health_metrics(backend: StorageBackend) -> HealthMetrics:
    """The figures; ``last_operation`` is that of asking."""
    known = backend.inventory() if isinstance(backend, Inventory) else _counted(backend)
    count = int(known["count"])
    duplicates, exact = _duplicates(backend, count)
    return HealthMetrics(
        total_units=count,
        total_size_bytes=int(known["bytes"]),
        average_unit_size=known["bytes"] / count if count else 0.0,
        oldest_unit_timestamp=known["oldest"],
        newest_unit_timestamp=known["newest"],
        unit_types_distribution=dict(known["types"]),
        duplicate_count=duplicates,
        last_operation="metrics",
        last_operation_time=now_text(),
        duplicate_count_is_exact=exact,
    )


def _counted(backend: StorageBackend) -> dict[str, Any]:
    """The same by reading every unit."""
    size, count, types = 0, 0, Counter[str]()
    stamps: list[tuple[float, str]] = []
    for unit in units_of(backend):
        count += 1
        size += len(json.dumps(unit, ensure_ascii=False, default=str).encode())
        types[str(unit.get("type") or "unknown")] += 1
        moment = age_stamp(unit)
        if moment is not None:
            stamps.append((moment, unit["metadata"]["created_at"]))
    ends = (min(stamps)[1], max(stamps)[1]) if stamps else (None, None)
    return {"count": count, "bytes": size, "types": types, "oldest": ends[0], "newest": ends[1]}


def _duplicates(backend: StorageBackend, count: int) -> tuple[int, bool]:
    """How many units say what another one says, and whether that is counted or estimated.

    A unit that occurs m times is 1 - 1/m of a duplicate, which adds up to units less distinct units; a sample of units
    gives the mean.
    """
    if count <= SAMPLE or not isinstance(backend, VectorDoors):
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
