"""Management of a memory: the contract of a strategy, its figures, and the manager that runs one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...types import MemoryUnit
from ...utils.timestamps import now_text
from ..store.base import StorageBackend

__all__ = ["HealthMetrics", "ManagementStrategy", "MemoryManager", "Removal"]

HISTORY_KEPT = 1000
"""Operations that a manager remembers."""

IDS_KEPT = 100
"""Ids that an entry of the history names at most; the count is exact."""


class Removal(tuple[int, list[str]]):  # noqa: SLOT001 - a tuple has no room for slots
    """What an operation removed: the pair (count, ids), which unpacks as one, with ``notes`` on how it was done.

    ``notes`` holds plain JSON values, for instance how many units had no readable time stamp.
    """

    notes: dict[str, Any]

    def __new__(cls, ids: Iterable[str], notes: Mapping[str, Any] | None = None) -> Removal:
        listed = list(ids)
        made = super().__new__(cls, (len(listed), listed))
        made.notes = dict(notes or {})
        return made

    @property
    def ids(self) -> list[str]:
        """The ids of the units that went."""
        return self[1]


@dataclass
class HealthMetrics:
    """Figures of a memory. Times are ISO 8601; sizes in bytes.

    total_size_bytes: what the units take on the disk, vectors and log included, where the backend knows; else of their
    JSON. oldest and newest: ``created_at`` of the first and the last unit in the backend's order. duplicate_count:
    units that say what another one says; from a sample where ``duplicate_count_is_exact`` is False.
    """

    total_units: int
    total_size_bytes: int
    average_unit_size: float
    oldest_unit_timestamp: str | None
    newest_unit_timestamp: str | None
    unit_types_distribution: dict[str, int]
    duplicate_count: int
    last_operation: str
    last_operation_time: str
    duplicate_count_is_exact: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class ManagementStrategy(ABC):
    """Decides which units go, and which become one."""

    @abstractmethod
    def prune(
        self, storage_backend: StorageBackend, criteria: Mapping[str, Any] | None = None
    ) -> tuple[int, list[str]]:
        """Delete the units that the criteria name: (count, ids)."""

    @abstractmethod
    def consolidate(self, storage_backend: StorageBackend, units: Sequence[str] | None = None) -> list[MemoryUnit]:
        """Merge units, those of the given ids or all: the merged ones."""

    @abstractmethod
    def deduplicate(self, storage_backend: StorageBackend, similarity_threshold: float = 0.9) -> tuple[int, list[str]]:
        """Delete units that say what another one says: (count, ids)."""

    @abstractmethod
    def apply_forgetting(
        self, storage_backend: StorageBackend, strategy: str = "lru", count: int | None = None
    ) -> tuple[int, list[str]]:
        """Delete ``count`` units by ``strategy``: (count, ids)."""

    @abstractmethod
    def get_health_metrics(self, storage_backend: StorageBackend) -> HealthMetrics:
        """Figures of the memory."""

    def save_state(self) -> dict[str, Any]:
        """What another instance needs to take over, as JSON values."""
        return {}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``save_state`` of another instance gave."""
        del state


@dataclass
class MemoryManager:
    """Runs a strategy on a backend and remembers the last thousand operations."""

    storage_backend: StorageBackend
    management_strategy: ManagementStrategy
    operation_history: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=HISTORY_KEPT))

    def set_strategy(self, strategy: ManagementStrategy) -> None:
        """Use another strategy from now on."""
        self.management_strategy = strategy

    def prune(self, criteria: Mapping[str, Any] | None = None, **options: Any) -> tuple[int, list[str]]:
        """Delete the units that the criteria name. ``options`` go to the strategy."""
        removed = self.management_strategy.prune(self.storage_backend, criteria, **options)
        return self._removed("prune", removed, options, criteria=dict(criteria or {}))

    def consolidate(self, units: Sequence[str] | None = None, **options: Any) -> list[MemoryUnit]:
        """Merge units. ``options`` go to the strategy."""
        merged = self.management_strategy.consolidate(self.storage_backend, units, **options)
        self._log("consolidate", {"count": len(merged), **options})
        return merged

    def deduplicate(self, similarity_threshold: float = 0.9, **options: Any) -> tuple[int, list[str]]:
        """Delete near-duplicates. ``options`` go to the strategy."""
        removed = self.management_strategy.deduplicate(self.storage_backend, similarity_threshold, **options)
        return self._removed("deduplicate", removed, options, threshold=similarity_threshold)

    def apply_forgetting(
        self, strategy: str = "lru", count: int | None = None, **options: Any
    ) -> tuple[int, list[str]]:
        """Delete ``count`` units, or a tenth. ``options`` go to the strategy."""
        removed = self.management_strategy.apply_forgetting(self.storage_backend, strategy, count, **options)
        return self._removed("forget", removed, options, strategy=strategy, asked=count)

    def get_health_metrics(self) -> HealthMetrics:
        """Figures of the memory, with the last operation that this manager ran."""
        metrics = self.management_strategy.get_health_metrics(self.storage_backend)
        if self.operation_history:
            newest = self.operation_history[-1]
            metrics.last_operation, metrics.last_operation_time = newest["operation"], newest["timestamp"]
        return metrics

    def get_operation_history(self) -> list[dict[str, Any]]:
        """``operation``, ``details`` and ``timestamp`` of each operation, newest last."""
        return list(self.operation_history)

    def clear_history(self) -> None:
        """Forget the history."""
        self.operation_history.clear()

    def _removed(
        self, operation: str, removed: tuple[int, list[str]], options: Mapping[str, Any], **details: Any
    ) -> tuple[int, list[str]]:
        count, ids = removed
        notes = getattr(removed, "notes", {})
        self._log(operation, {"count": count, "unit_ids": ids[:IDS_KEPT], **details, **options, **notes})
        return removed

    def _log(self, operation: str, details: Mapping[str, Any]) -> None:
        self.operation_history.append({"operation": operation, "details": dict(details), "timestamp": now_text()})
