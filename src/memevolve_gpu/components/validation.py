"""Try a new component on a real round trip before it replaces the old one."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigurationError
from ..types import JsonObject, MemoryUnit
from .manage.base import HealthMetrics, ManagementStrategy
from .retrieve.base import RetrievalStrategy
from .store.base import MetadataMixin, StorageBackend
from .store.units import checked_unit


class ScratchStore(StorageBackend, MetadataMixin):
    """Units in a dict, with the abstract methods of ``StorageBackend`` only. Not safe to use from several threads."""

    def __init__(self, units: Sequence[MemoryUnit] = ()) -> None:
        self._units: dict[str, MemoryUnit] = {}
        self._next = 0
        self.store_batch(units)

    def store(self, unit: MemoryUnit) -> str:
        unit_id = unit.get("id") or self._fresh_id()
        self._units[unit_id] = copy.deepcopy({**self._add_metadata(unit), "id": unit_id})
        return str(unit_id)

    def store_batch(self, units: Sequence[MemoryUnit]) -> list[str]:
        return [self.store(unit) for unit in units]

    def retrieve(self, unit_id: str) -> MemoryUnit | None:
        return copy.deepcopy(self._units.get(unit_id))

    def retrieve_all(self) -> list[MemoryUnit]:
        return copy.deepcopy(list(self._units.values()))

    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        if unit_id not in self._units:
            return False
        self.store({**unit, "id": unit_id})
        return True

    def delete(self, unit_id: str) -> bool:
        return self._units.pop(unit_id, None) is not None

    def exists(self, unit_id: str) -> bool:
        return unit_id in self._units

    def count(self) -> int:
        return len(self._units)

    def clear(self) -> None:
        self._units.clear()

    def get_metadata(self, unit_id: str) -> JsonObject | None:
        unit = self._units.get(unit_id)
        return None if unit is None else copy.deepcopy(unit.get("metadata"))

    def _fresh_id(self) -> str:
        while f"unit_{self._next}" in self._units:
            self._next += 1
        return f"unit_{self._next}"


_EXPERIENCE = {"action": "try an encoder", "result": "it works", "context": "a trial before it is used"}


def try_storage(backend: Any) -> None:
    """Store a unit, read it, change it, delete it. The unit is removed even if the trial fails.

    Raises ConfigurationError when the backend lacks a method or returns something wrong; its own errors pass through.
    """
    _methods(backend, "storage", StorageBackend)
    unit_id = f"trial-{uuid.uuid4().hex}"
    unit = {"id": unit_id, "type": "lesson", "content": "a trial of this storage", "tags": [], "metadata": {}}
    before = backend.count()
    try:
        _expect(backend.store(unit) == unit_id, "storage", "store() returned another id")
        found = backend.retrieve(unit_id)
        _expect(found is not None and found.get("content") == unit["content"], "storage", "retrieve() lost the unit")
        _expect(backend.exists(unit_id) and backend.count() == before + 1, "storage", "the unit is not counted")
        _expect(backend.update(unit_id, {**unit, "content": "changed"}), "storage", "update() did not find the unit")
        _expect((backend.retrieve(unit_id) or {}).get("content") == "changed", "storage", "update() changed nothing")
    finally:
        deleted = backend.delete(unit_id)
    _expect(deleted and not backend.exists(unit_id), "storage", "delete() left the unit")


def try_retrieval(strategy: Any, backend: StorageBackend) -> None:
    """Run a query with the strategy on the backend that it will use. Raises as :func:`try_storage`."""
    _methods(strategy, "retrieval", RetrievalStrategy)
    results = strategy.retrieve("a trial of this strategy", backend, top_k=1)
    fields = ("unit_id", "unit", "score")
    well_formed = isinstance(results, list) and all(hasattr(one, name) for one in results for name in fields)
    _expect(well_formed and len(results) <= 1, "retrieval", "retrieve() returned no list of at most one result")


def try_management(strategy: Any) -> None:
    """Let the strategy prune and describe a temporary memory of three units. Raises as :func:`try_storage`."""
    _methods(strategy, "management", ManagementStrategy)
    units = [{"id": f"trial-{n}", "type": "lesson", "content": f"trial number {n}"} for n in range(3)]
    scratch = ScratchStore(units)
    figures: HealthMetrics = strategy.get_health_metrics(scratch)
    _expect(figures.total_units == 3, "management", "get_health_metrics() counted wrong")
    count, ids = strategy.prune(scratch, {"max_count": 2})
    _expect(count == 1 and list(ids) == ["trial-0"], "management", "prune() did not delete the oldest of three units")
    _expect(scratch.count() == 2, "management", "prune() did not do what it said")


def try_encoder(encoder: Any) -> None:
    """Encode a small experience. Raises as :func:`try_storage`, and InvalidUnitError."""
    for name in ("encode_experience", "encode_trajectory"):
        _expect(callable(getattr(encoder, name, None)), "encoder", f"it has no {name}()")
    encoded_units(encoder.encode_experience(dict(_EXPERIENCE)))


def encoded_units(encoded: object) -> list[MemoryUnit]:
    """Return what an encoder returned, one unit or several, as a list of valid units. Raises InvalidUnitError."""
    listed = list(encoded) if isinstance(encoded, (list, tuple)) else [encoded]
    return [checked_unit(unit, f"encoded[{number}]") for number, unit in enumerate(listed)]


def _methods(component: object, what: str, contract: type) -> None:
    for name in sorted(getattr(contract, "__abstractmethods__", ())):
        _expect(callable(getattr(component, name, None)), what, f"it has no {name}()")


def _expect(holds: object, what: str, problem: str) -> None:
    if not holds:
        raise ConfigurationError(f"{what}: {problem}; the component was not replaced")
