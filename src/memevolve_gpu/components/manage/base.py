"""Memory management: the contract of a strategy, its metrics, and the manager that runs one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from ...types import JsonObject, MemoryUnit
from ...utils.arguments import having
from ...utils.timestamps import now_text
from ..store.base import StorageBackend

__all__ = ["HealthMetrics", "ManagementStrategy", "MemoryManager", "Merged", "Operation", "Removal"]

HISTORY_KEPT = 1000
"""Entries of a manager's history."""

IDS_KEPT = 100
"""Most ids in an entry of the history; its count is exact."""


class Operation(TypedDict):
    """An entry of a history of operations.

    ``timestamp`` is ISO 8601 in UTC. ``details`` holds JSON values; its keys depend on the operation.
    """

    operation: str
    details: JsonObject
    timestamp: str


class Removal(tuple[int, list[str]]):  # noqa: SLOT001 - a tuple has no room for slots
    """The result of an operation that deletes units: the pair (count, ids), with ``notes``.

    ``notes`` holds JSON values about the operation, for instance how many units have no readable time stamp.

    Examples:
        >>> from memevolve_gpu.components.manage import Removal
        >>> count, ids = Removal(["a", "b"], {"left": 1})
        >>> count, ids
        (2, ['a', 'b'])
    """

    notes: JsonObject

    def __new__(cls, ids: Iterable[str], notes: Mapping[str, object] | None = None) -> Removal:
        """Create the result of a removal.

        Args:
            ids: The ids of the deleted units.
            notes: JSON values about the operation; None for none.
        """
        listed = list(ids)
        made = super().__new__(cls, (len(listed), listed))
        made.notes = dict(notes or {})
        return made

    @property
    def ids(self) -> list[str]:
        """The ids of the deleted units."""
        return self[1]


class Merged(list[MemoryUnit]):
    """The result of a consolidation: the list of merged units, with ``notes``.

    ``notes`` holds JSON values: ``conflicts`` (pairs that were kept apart, each ``ids``, ``cosine`` and ``reason``) and
    ``conflict_count`` if there are any.

    Examples:
        >>> from memevolve_gpu.components.manage import Merged
        >>> merged = Merged([{"content": "a"}], {"conflict_count": 1})
        >>> len(merged), merged.notes
        (1, {'conflict_count': 1})
    """

    def __init__(self, units: Iterable[MemoryUnit], notes: Mapping[str, object] | None = None) -> None:
        """Create the result of a merge.

        Args:
            units: The merged units.
            notes: JSON values about the operation; None for none.
        """
        super().__init__(units)
        self.notes: JsonObject = dict(notes or {})


@dataclass
class HealthMetrics:
    """Metrics of a memory. Times are ISO 8601, sizes are bytes.

    Attributes:
        total_units: Number of units.
        total_size_bytes: Size on disk, vectors and log included; the size of the units' JSON if the backend reports
            none.
        average_unit_size: ``total_size_bytes`` per unit.
        oldest_unit_timestamp: ``created_at`` of the first unit in the backend's order.
        newest_unit_timestamp: ``created_at`` of the last one.
        unit_types_distribution: Number of units by ``type``.
        duplicate_count: Units whose vector (or text, without vectors) equals that of another one.
        last_operation: The newest operation of the manager, or ``metrics``.
        last_operation_time: When that was.
        duplicate_count_is_exact: False where ``duplicate_count`` is estimated from a sample.

    Examples:
        >>> from memevolve_gpu.components.manage import SimpleManagementStrategy
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> units = [{"id": "a", "type": "tool", "content": "git"}, {"id": "b", "type": "tool", "content": "Git"}]
        >>> metrics = SimpleManagementStrategy().get_health_metrics(ScratchStore(units))
        >>> metrics.total_units, metrics.unit_types_distribution, metrics.duplicate_count
        (2, {'tool': 2}, 1)
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

    def as_dict(self) -> dict[str, object]:
        """Convert the metrics.

        Returns:
            JSON values by the names of the attributes.
        """
        return asdict(self)


class ManagementStrategy(ABC):
    """The contract of a management strategy: what to delete and what to merge.

    Examples:
        >>> from memevolve_gpu.components.manage import ManagementStrategy, SimpleManagementStrategy
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> class NeverForget(SimpleManagementStrategy):
        ...     def apply_forgetting(self, storage_backend, strategy="lru", count=None):
        ...         return 0, []
        >>> strategy: ManagementStrategy = NeverForget()
        >>> strategy.apply_forgetting(ScratchStore([{"id": "a", "content": "kept"}]), count=1)
        (0, [])
    """

    @abstractmethod
    def prune(
        self, storage_backend: StorageBackend, criteria: Mapping[str, object] | None = None
    ) -> tuple[int, list[str]]:
        """Delete the units that match criteria.

        Args:
            storage_backend: The store.
            criteria: Which units; None for none.

        Returns:
            (count, ids) of the deleted units.
        """

    @abstractmethod
    def consolidate(self, storage_backend: StorageBackend, units: Sequence[str] | None = None) -> list[MemoryUnit]:
        """Merge units.

        Args:
            storage_backend: The store.
            units: Ids of the units to consider; None for all.

        Returns:
            The merged units.
        """

    @abstractmethod
    def deduplicate(self, storage_backend: StorageBackend, similarity_threshold: float = 0.75) -> tuple[int, list[str]]:
        """Delete near-duplicates.

        Args:
            storage_backend: The store.
            similarity_threshold: Cosine from which two units are duplicates.

        Returns:
            (count, ids) of the deleted units.
        """

    @abstractmethod
    def apply_forgetting(
        self, storage_backend: StorageBackend, strategy: str = "lru", count: int | None = None
    ) -> tuple[int, list[str]]:
        """Delete the units that are needed least.

        Args:
            storage_backend: The store.
            strategy: How to choose them.
            count: How many; None for the strategy's default.

        Returns:
            (count, ids) of the deleted units.
        """

    @abstractmethod
    def get_health_metrics(self, storage_backend: StorageBackend) -> HealthMetrics:
        """Describe the memory.

        Args:
            storage_backend: The store. Of one that can describe itself no unit is read, but for a sample.

        Returns:
            The metrics.
        """

    def save_state(self) -> JsonObject:
        """Describe the state that another instance needs to continue.

        Returns:
            JSON values for :meth:`restore_state`.
        """
        return {}

    def restore_state(self, state: Mapping[str, object]) -> None:
        """Take over the state of another instance.

        Args:
            state: What :meth:`save_state` of that instance returned.
        """
        del state


@dataclass
class MemoryManager:
    """Runs a strategy on a backend and keeps a history of the last 1,000 operations.

    Examples:
        >>> from memevolve_gpu.components.manage import MemoryManager, SimpleManagementStrategy
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> units = [{"id": "a", "content": "old"}, {"id": "b", "content": "new"}]
        >>> manager = MemoryManager(ScratchStore(units), SimpleManagementStrategy())
        >>> manager.prune({"max_count": 1})
        (1, ['a'])
        >>> [entry["operation"] for entry in manager.get_operation_history()]
        ['prune']
    """

    storage_backend: StorageBackend
    management_strategy: ManagementStrategy
    operation_history: deque[Operation] = field(default_factory=lambda: deque(maxlen=HISTORY_KEPT))

    def __post_init__(self) -> None:
        having("storage_backend", self.storage_backend, "retrieve", "a store")
        having("operation_history", self.operation_history, "append", "a deque")
        self.set_strategy(self.management_strategy)

    def set_strategy(self, strategy: ManagementStrategy) -> None:
        """Use another strategy for later operations.

        Args:
            strategy: The strategy.

        Raises:
            ConfigurationError: It has no method ``prune``.
        """
        self.management_strategy = having("strategy", strategy, "prune", "a management strategy")

    def prune(self, criteria: Mapping[str, object] | None = None, **options: Any) -> tuple[int, list[str]]:
        """Delete the units that match the criteria.

        Args:
            criteria: As :meth:`SimpleManagementStrategy.prune` takes them.
            **options: Further arguments of the strategy, such as ``dry_run=True``.

        Returns:
            (count, ids) of the deleted units.

        Raises:
            MemEvolveError: As the strategy.
        """
        removed = self.management_strategy.prune(self.storage_backend, criteria, **options)
        return self._removed("prune", removed, options, criteria=dict(criteria or {}))

    def consolidate(self, units: Sequence[str] | None = None, **options: Any) -> list[MemoryUnit]:
        """Merge units.

        Args:
            units: Ids of the units to consider; None for all.
            **options: Further arguments of the strategy.

        Returns:
            The merged units.

        Raises:
            MemEvolveError: As the strategy.
        """
        merged = self.management_strategy.consolidate(self.storage_backend, units, **options)
        self._log("consolidate", {"count": len(merged), **options, **getattr(merged, "notes", {})})
        return merged

    def deduplicate(self, similarity_threshold: float = 0.75, **options: Any) -> tuple[int, list[str]]:
        """Delete near-duplicates.

        Args:
            similarity_threshold: Cosine from which two units are duplicates.
            **options: Further arguments of the strategy.

        Returns:
            (count, ids) of the deleted units.

        Raises:
            MemEvolveError: As the strategy.
        """
        removed = self.management_strategy.deduplicate(self.storage_backend, similarity_threshold, **options)
        return self._removed("deduplicate", removed, options, threshold=similarity_threshold)

    def apply_forgetting(
        self, strategy: str = "lru", count: int | None = None, **options: Any
    ) -> tuple[int, list[str]]:
        """Delete the units that are needed least.

        Args:
            strategy: ``lru``, ``lfu`` or ``random``.
            count: How many; None for a tenth of all.
            **options: Further arguments of the strategy.

        Returns:
            (count, ids) of the deleted units.

        Raises:
            MemEvolveError: As the strategy.
        """
        removed = self.management_strategy.apply_forgetting(self.storage_backend, strategy, count, **options)
        return self._removed("forget", removed, options, strategy=strategy, asked=count)

    def get_health_metrics(self) -> HealthMetrics:
        """Describe the memory.

        Returns:
            The metrics, with the last operation of this manager.
        """
        metrics = self.management_strategy.get_health_metrics(self.storage_backend)
        if self.operation_history:
            newest = self.operation_history[-1]
            metrics.last_operation, metrics.last_operation_time = newest["operation"], newest["timestamp"]
        return metrics

    def get_operation_history(self) -> list[Operation]:
        """Read what was done.

        Returns:
            The last 1,000 operations, newest last.
        """
        return list(self.operation_history)

    def clear_history(self) -> None:
        """Empty the history."""
        self.operation_history.clear()

    def _removed(
        self, operation: str, removed: tuple[int, list[str]], options: Mapping[str, object], **details: object
    ) -> tuple[int, list[str]]:
        count, ids = removed
        notes = getattr(removed, "notes", {})
        self._log(operation, {"count": count, "unit_ids": ids[:IDS_KEPT], **details, **options, **notes})
        return removed

    def _log(self, operation: str, details: Mapping[str, object]) -> None:
        self.operation_history.append({"operation": operation, "details": dict(details), "timestamp": now_text()})
