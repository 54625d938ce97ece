"""A backend in memory: for trying a strategy out before it is let near a real memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from ..types import MemoryUnit
from .store.base import MetadataMixin, StorageBackend

__all__ = ["ScratchStore"]


class ScratchStore(StorageBackend, MetadataMixin):
    """Units in a dict, with the verbs of ``StorageBackend`` and nothing else. Not safe for threads."""

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

    def get_metadata(self, unit_id: str) -> dict[str, Any] | None:
        unit = self._units.get(unit_id)
        return None if unit is None else copy.deepcopy(unit.get("metadata"))

    def _fresh_id(self) -> str:
        while f"unit_{self._next}" in self._units:
            self._next += 1
        return f"unit_{self._next}"
