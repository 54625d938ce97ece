"""The contract of every storage backend; the same verbs as MemEvolve's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from ...types import MemoryUnit

__all__ = ["MetadataMixin", "StorageBackend"]


class StorageBackend(ABC):
    """Keeps memory units by id."""

    @abstractmethod
    def store(self, unit: MemoryUnit) -> str:
        """Keep a unit and return its id; an existing id is replaced."""

    @abstractmethod
    def store_batch(self, units: Sequence[MemoryUnit]) -> list[str]:
        """Keep several units and return their ids in order."""

    @abstractmethod
    def retrieve(self, unit_id: str) -> MemoryUnit | None:
        """The unit, or None."""

    @abstractmethod
    def retrieve_all(self) -> list[MemoryUnit]:
        """Every unit, oldest first."""

    @abstractmethod
    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        """Replace the unit of that id; False when there is none."""

    @abstractmethod
    def delete(self, unit_id: str) -> bool:
        """Delete the unit of that id; False when there is none."""

    @abstractmethod
    def exists(self, unit_id: str) -> bool:
        """Is there a unit of that id?"""

    @abstractmethod
    def count(self) -> int:
        """The number of units."""

    @abstractmethod
    def clear(self) -> None:
        """Delete every unit."""

    @abstractmethod
    def get_metadata(self, unit_id: str) -> dict[str, Any] | None:
        """The unit's ``metadata``, or None."""

    def __bool__(self) -> bool:
        """True, with units or without: MemEvolve asks ``if not self.storage`` whether there is a backend at all."""
        return True

    def save_state(self) -> dict[str, Any]:
        """What another instance needs to take over, as JSON values. A backend without state has none."""
        return {}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``save_state`` of another instance gave. A backend without state ignores it."""
        del state


class MetadataMixin:
    """Time stamps in ``unit["metadata"]``."""

    def _generate_timestamp(self) -> str:
        """Now, as ISO 8601 in UTC with its offset."""
        return datetime.now(timezone.utc).isoformat()

    def _add_metadata(self, unit: MemoryUnit) -> MemoryUnit:
        """A copy of the unit whose metadata has ``created_at``; one that is there already stays."""
        metadata = unit.get("metadata")
        stamped = dict(metadata) if isinstance(metadata, Mapping) else {}
        stamped.setdefault("created_at", self._generate_timestamp())
        return {**unit, "metadata": stamped}
