"""``MemorySystem``: store, retrieve and manage memory units through one object."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar

from .backends import AnyStore, open_store
from .components.manage import HealthMetrics, ManagementStrategy, MemoryManager, Operation, SimpleManagementStrategy
from .components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    RetrievalContext,
    RetrievalResult,
    RetrievalStrategy,
)
from .components.store.base import StorageBackend
from .components.store.foreign import as_backend
from .components.store.ranking import HalfLife, Ranking
from .components.validation import encoded_units, try_encoder, try_management, try_retrieval, try_storage
from .errors import ConfigurationError, InvalidUnitError, MemEvolveError
from .types import Each, Filters, MemoryUnit, Moment, Ttl, Vectors
from .utils.arguments import (
    callback,
    listed,
    mapping,
    optional_text,
    path_text,
    real_number,
    shown,
    switch,
    whole_number,
    word,
)
from .utils.config import EmbeddingConfig, StorageConfig, is_milvus_uri
from .utils.embeddings import EmbeddingFunction, embedder_from_config
from .utils.forking import lock
from .utils.report_types import StorageHealth
from .utils.timestamps import now_text

__all__ = ["Capacity", "ComponentType", "Memory", "MemorySystem", "MemorySystemConfig", "Operation"]

_BELOW_WARNING = 0.1
_BELOW_THRESHOLD = 0.9
_DEFAULT_WARNING, _DEFAULT_PRUNE = 0.8, 0.9


@dataclass(frozen=True)
class Excess:
    """``units`` to delete before the new ones are stored, 0 for none; ``cause`` says why."""

    units: int
    cause: str = ""
    for_memory: bool = False


@dataclass
class Capacity:
    """When to delete units to make room, and how many.

    threshold: the most units; None uses ``prune_threshold`` of the backend's own limits. level: the share of the limit
    to prune down to; None is the warning threshold minus 0.1, or 0.9 of ``threshold``.
    """

    threshold: int | None = None
    level: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            whole_number("auto_prune_threshold", self.threshold, error=ConfigurationError)
        if self.level is not None:
            below = math.nextafter(1, 0)
            real_number("prune_to", self.level, "a share of at least 0 and below 1", 0, below, ConfigurationError)

    def excess(self, backend: StorageBackend, new: int) -> Excess:
        """Return how many units to delete so that ``new`` units fit."""
        if self.threshold is not None:
            share = _BELOW_THRESHOLD if self.level is None else self.level
            bounds = (math.floor(self.threshold * share), self.threshold, self.threshold)
            return _within(backend.count(), new, bounds)
        return self._by_limits(backend, new)

    def _by_limits(self, backend: StorageBackend, new: int) -> Excess:
        health = as_backend(backend).get_storage_health()
        if "max_units" not in health:
            return Excess(0)
        config = getattr(backend, "config", None)
        warning = float(getattr(config, "warning_threshold", _DEFAULT_WARNING))
        share = float(getattr(config, "prune_threshold", _DEFAULT_PRUNE))
        level = self.level if self.level is not None else max(0.0, warning - _BELOW_WARNING)
        count, limit = int(health["current_count"]), int(health["max_units"])
        by_units = _within(count, new, (math.floor(level * limit), math.ceil(share * limit) - 1, limit))
        used, most = float(health["memory_usage_mb"]), float(health["max_memory_mb"])
        if by_units.units or used < share * most:
            return by_units
        excess = max(0, math.ceil(count * (1 - level * most / used)))
        return Excess(excess, f"index memory is {used:.0f} of at most {most:.0f} MiB", for_memory=True)


def _within(count: int, new: int, bounds: tuple[int, int, int]) -> Excess:
    """Compare ``count + new`` with bounds: the target after pruning, the most units before pruning, and the limit.

    A batch larger than the first bound uses the next one, so that no more than needed is deleted. Nothing is deleted
    for a batch that cannot fit at all.
    """
    if count + new <= bounds[1]:
        return Excess(0)
    bound = next((bound for bound in bounds if new <= bound), count + new)
    return Excess(min(count, max(0, count + new - bound)), f"{count} units of at most {bounds[2]}, and {new} new")


POLICIES = ("lru", "lfu", "random", "oldest")

PrunePolicy = Literal["lru", "lfu", "random", "oldest"]


class ComponentType(Enum):
    """What ``MemorySystem.reconfigure_component`` can replace."""

    ENCODER = "encoder"
    STORAGE = "storage"
    RETRIEVAL = "retrieval"
    MANAGER = "manager"

    @classmethod
    def parse(cls, value: ComponentType | str) -> ComponentType:
        """Return the component of that name. Raises ConfigurationError."""
        if not isinstance(value, cls):
            word("component_type", value, [kind.value for kind in cls], ConfigurationError)
        return cls(value)


@dataclass
class MemorySystemConfig:
    """The settings and components of a :class:`MemorySystem`. Field names are MemEvolve's where it has them.

    The ``memory_*`` fields configure MemEvolve's encoder; this package does not read them.

    Raises:
        ConfigurationError: A field has a value that is not allowed.

    Examples:
        >>> from memevolve_gpu import MemorySystemConfig
        >>> MemorySystemConfig(auto_prune_threshold=10_000, prune_policy="oldest").default_retrieval_top_k
        5
    """

    memory_base_url: str = ""
    memory_api_key: str = field(default="", repr=False)
    memory_model: str | None = None
    memory_timeout: int = 600
    storage_backend: StorageBackend | None = None
    """The store. ``close()`` leaves it open. None: a ``VectorStore`` configured by the environment."""
    retrieval_strategy: RetrievalStrategy | None = None
    """None: hybrid where the backend has a vector index and a keyword index, else keyword."""
    management_strategy: ManagementStrategy | None = None
    """None: ``SimpleManagementStrategy``."""
    default_retrieval_top_k: int = 5
    """Results of a query that names no ``top_k``."""
    enable_auto_management: bool = True
    """Whether units are deleted automatically before a limit is reached."""
    auto_prune_threshold: int | None = None
    """Most units before automatic pruning; None: MEMEVOLVE_STORAGE_PRUNE_THRESHOLD of the backend's limits."""
    prune_policy: PrunePolicy = "lru"
    """Units to delete first: least recently read, least frequently read, random, or oldest."""
    prune_to: float | None = None
    """Share of the limit to prune down to; None: MEMEVOLVE_STORAGE_WARNING_THRESHOLD minus 0.1."""
    log_level: str | None = None
    """Level of this package's loggers; None leaves it unchanged."""
    on_encode_complete: Callable[[str, MemoryUnit], object] | None = None
    """Called with (id, unit) for each encoded unit that was stored."""
    on_retrieve_complete: Callable[[str, list[RetrievalResult]], object] | None = None
    """Called with (query, results) after each query."""
    on_manage_complete: Callable[[str, Any], object] | None = None
    """Called with (operation, result) after each management operation."""

    def __post_init__(self) -> None:
        whole_number("default_retrieval_top_k", self.default_retrieval_top_k, error=ConfigurationError)
        word("prune_policy", self.prune_policy, POLICIES, ConfigurationError)
        level = optional_text("log_level", self.log_level)
        if level is not None and not isinstance(logging.getLevelName(level.upper()), int):
            raise ConfigurationError(f"log_level must be a level of Python's logging, got {shown(level)}")
        for name in ("on_encode_complete", "on_retrieve_complete", "on_manage_complete"):
            callback(name, getattr(self, name))
        Capacity(self.auto_prune_threshold, self.prune_to)


_log = logging.getLogger("memevolve_gpu.memory_system")


def notify(callback: Callable[..., object] | None, *arguments: object) -> None:
    """Call the callback, if there is one, and log what it raises: the operation it reports is complete."""
    if callback is None:
        return
    try:
        callback(*arguments)
    except Exception:  # noqa: BLE001 - a user's callback may raise anything
        _log.exception("the callback failed; the operation completed")


LOG_KEPT = 1000
"""Entries of the operation log."""

MEMORY_GROWTH = 1.05
"""After pruning for memory, prune again only when the number of units has grown by this factor."""


_System = TypeVar("_System", bound="MemorySystem")


class MemorySystem:
    """Encodes, stores, finds and manages memory units. Safe to use from several threads.

    Errors of this package derive from ``MemEvolveError``; errors of an encoder pass through unchanged. Callbacks run
    after the operation is complete; an exception of a callback is logged.

    Examples:
        >>> import tempfile
        >>> from memevolve_gpu import HashingEmbedder, MemorySystem, MemorySystemConfig, VectorStore
        >>> with (
        ...     tempfile.TemporaryDirectory() as folder,
        ...     VectorStore(f"{folder}/memory", HashingEmbedder()) as store,
        ...     MemorySystem(MemorySystemConfig(storage_backend=store)) as system,
        ... ):
        ...     system.add_units([{"id": "bisect", "type": "skill", "content": "git bisect finds the bad commit"}])
        ...     [unit["id"] for unit in system.query_memory("find the bad commit", top_k=1)]
        ['bisect']
        ['bisect']
    """

    def __init__(self, config: MemorySystemConfig | None = None, encoder: object = None) -> None:
        """Create a memory system.

        Args:
            config: Settings and components; None for the defaults.
            encoder: An object with ``encode_experience`` and ``encode_trajectory``; None if only units are added.

        Raises:
            ConfigurationError: A setting is not allowed.
            MemEvolveError: ``config`` names no storage backend, and the ``VectorStore`` of the environment's settings
                cannot be opened.
        """
        if config is not None and not isinstance(config, MemorySystemConfig):
            raise ConfigurationError(f"config must be a MemorySystemConfig or None, got {shown(config)}")
        self.config = MemorySystemConfig() if config is None else config
        self._capacity = Capacity(self.config.auto_prune_threshold, self.config.prune_to)
        if self.config.log_level is not None:
            logging.getLogger("memevolve_gpu").setLevel(self.config.log_level.upper())
        self.encoder = encoder
        self._owned: list[AnyStore] = []
        storage = self.config.storage_backend
        if storage is None:
            storage = _store_from_env(None)
            self._owned.append(storage)
        self.storage: StorageBackend = storage
        strategy = self.config.retrieval_strategy
        if strategy is None:
            both = {"search", "search_keywords"} <= as_backend(storage).capabilities
            strategy = HybridRetrievalStrategy() if both else KeywordRetrievalStrategy()
        self.retrieval_context = RetrievalContext(strategy, self.config.default_retrieval_top_k)
        management = self.config.management_strategy
        management = SimpleManagementStrategy() if management is None else management
        self.memory_manager = MemoryManager(self.storage, management)
        self.operation_log: deque[Operation] = deque(maxlen=LOG_KEPT)
        self._swapping = lock()
        self._making_room = lock()
        self._makes_room = 0
        """The process in which a call makes room."""
        self._room_for_memory_at = 0

    @classmethod
    def from_env(
        cls,
        index_file: str | os.PathLike[str] | None = None,
        encoder: object = None,
        *,
        namespace: Sequence[str] | str | None = None,
        **settings: Any,
    ) -> MemorySystem:
        """Create a system with the store and embedder of MEMEVOLVE_STORAGE_* and MEMEVOLVE_EMBEDDING_*.

        ``close()`` closes the store.

        Args:
            index_file: Path prefix of the store, or ``milvus://host:port/collection``; None as in :func:`open_store`.
            encoder: As in the constructor.
            namespace: As in :func:`open_store`.
            settings: Fields of :class:`MemorySystemConfig`.

        Returns:
            The system.

        Raises:
            MemEvolveError: The store cannot be opened, or a setting is not allowed.
        """
        store = _store_from_env(index_file, namespace)
        try:
            system = cls(MemorySystemConfig(storage_backend=store, **settings), encoder)
        except BaseException:
            store.close()
            raise
        system._owned.append(store)
        return system

    # Keeping

    def add_experience(self, experience: Mapping[str, object]) -> str | None:
        """Encode an experience and store its units, all or none.

        Args:
            experience: What the encoder's ``encode_experience`` takes.

        Returns:
            The id of the first unit; None when the encoder returned none.

        Raises:
            ConfigurationError: There is no encoder.
            InvalidUnitError: The encoder returned something that is no unit.
            MemEvolveError: As :meth:`add_units`. The encoder's own errors pass through.
        """
        units = encoded_units(self._encoder().encode_experience(experience))
        ids = self._keep(units)
        self._note("add_experience", {"experience_id": experience.get("id"), "unit_count": len(ids), "unit_ids": ids})
        self._tell_encoded(ids, units)
        return ids[0] if ids else None

    def add_trajectory(self, trajectory: Sequence[Mapping[str, object]]) -> list[str]:
        """Encode a trajectory and store its units, all or none.

        Args:
            trajectory: Experiences, as the encoder's ``encode_trajectory`` takes them.

        Returns:
            The ids of the units, in order.

        Raises:
            MemEvolveError: As :meth:`add_experience`.
        """
        return self._add_encoded("add_trajectory", trajectory, self._encoder().encode_trajectory(trajectory))

    def add_trajectory_batch(
        self,
        trajectory: Sequence[Mapping[str, object]],
        use_parallel: bool = True,
        max_workers: int = 4,
        batch_size: int = 10,
    ) -> list[str]:
        """Encode a trajectory with ``encode_trajectory_batch``, if the encoder has it, and store its units.

        Args:
            trajectory: As for :meth:`add_trajectory`.
            use_parallel: False always uses ``encode_trajectory``.
            max_workers: Passed to the encoder.
            batch_size: Passed to the encoder.

        Returns:
            The ids of the units, in order.

        Raises:
            ConfigurationError: ``max_workers`` or ``batch_size`` is not a positive whole number.
            MemEvolveError: As :meth:`add_experience`.
        """
        encoder = self._encoder()
        whole_number("max_workers", max_workers, error=ConfigurationError)
        whole_number("batch_size", batch_size, error=ConfigurationError)
        if use_parallel and hasattr(encoder, "encode_trajectory_batch"):
            encoded = encoder.encode_trajectory_batch(trajectory, max_workers=max_workers, batch_size=batch_size)
        else:
            encoded = encoder.encode_trajectory(trajectory)
        return self._add_encoded("add_trajectory_batch", trajectory, encoded)

    def add_units(
        self,
        units: Sequence[MemoryUnit],
        embeddings: Vectors | None = None,
        *,
        ttl: Each[Ttl] = None,
        expires_at: Each[Moment] = None,
    ) -> list[str]:
        """Store units, all or none.

        Units are pruned first when the new ones would pass the threshold.

        Args:
            units: JSON objects; a unit whose id exists is replaced.
            embeddings: float32 (n, dim), one row per unit; None embeds their text.
            ttl: When the units expire, as for :meth:`VectorStore.store_batch`.
            expires_at: Likewise.

        Returns:
            The ids, in order.

        Raises:
            InvalidUnitError: A unit cannot be stored.
            ConfigurationError: Units of this backend do not expire.
            CapacityError: The units do not fit.
            MemEvolveError: Embedding or storing failed.
        """
        given = listed("units", units, InvalidUnitError)
        ids = self._keep(given, embeddings, ttl=ttl, expires_at=expires_at)
        self._note("add_units", {"unit_count": len(ids)})
        return ids

    # Finding

    def query_memory(
        self,
        query: str,
        top_k: int | None = None,
        filters: Filters | None = None,
        *,
        recency: HalfLife | None = None,
        importance: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> list[MemoryUnit]:
        """Find the units that match a query best.

        Args:
            query: The text to search for.
            top_k: Most results; None for ``default_retrieval_top_k``.
            filters: Limits the search to units that match, see ``docs/reference/filters.md``.
            recency: How fast units fade, such as ``HalfLife("30d")``; None for what the strategy has.
            importance: The path of a number from 0 to 1, such as ``"metadata.importance"``.
            weights: How much ``"recency"`` and ``"importance"`` count, 0..1; 1 each when they are not given.

        Returns:
            The units, best first, each with the keys ``score`` and ``retrieval_metadata`` added.

        Raises:
            InvalidQueryError: ``query`` or ``top_k`` cannot be used.
            InvalidFilterError: ``filters`` is malformed.
            EmbeddingError: The query cannot be embedded.
        """
        ranking = Ranking.of(recency, importance, weights)
        results = self.retrieval_context.retrieve(query, self.storage, top_k, filters, ranking=ranking)
        self._note("query_memory", {"query": query, "top_k": top_k, "results_count": len(results)})
        notify(self.config.on_retrieve_complete, query, results)
        return [_as_dict(result) for result in results]

    def retrieve_by_ids(self, unit_ids: Sequence[str]) -> list[MemoryUnit]:
        """Return the units of these ids that exist.

        Args:
            unit_ids: Ids; those of no unit are skipped.

        Returns:
            The units, in the order of ``unit_ids``, each with ``score`` 1.0 and ``retrieval_metadata``.
        """
        return [_as_dict(result) for result in self.retrieval_context.retrieve_by_ids(unit_ids, self.storage)]

    # Managing

    def manage_memory(self, operation: str, **options: Any) -> tuple[int, list[str]] | list[MemoryUnit]:
        """Run a management operation.

        Args:
            operation: ``prune``, ``consolidate``, ``deduplicate`` or ``forget``.
            options: Arguments of the method of :class:`MemoryManager` (``criteria``, ``units``,
                ``similarity_threshold``, ``strategy`` and ``count``), and of the strategy, such as ``dry_run=True``.

        Returns:
            (count, ids) of the deleted units; for ``consolidate`` the merged units.

        Raises:
            ConfigurationError: There is no such operation.
            MemEvolveError: The strategy failed.
        """
        manager = self.memory_manager
        operations: dict[str, Callable[..., tuple[int, list[str]] | list[MemoryUnit]]] = {
            "prune": manager.prune,
            "consolidate": manager.consolidate,
            "deduplicate": manager.deduplicate,
            "forget": manager.apply_forgetting,
        }
        word("operation", operation, operations, ConfigurationError)
        result = operations[operation](**options)
        count = int(result[0]) if isinstance(result, tuple) else len(result)
        self._note(f"manage_{operation}", {**options, "count": count})
        notify(self.config.on_manage_complete, operation, result)
        return result

    def get_health_metrics(self) -> HealthMetrics:
        """Describe the memory.

        Returns:
            Counts, sizes, times and the number of duplicates.
        """
        return self.memory_manager.get_health_metrics()

    def get_storage_health(self) -> StorageHealth:
        """Describe the storage.

        Returns:
            The backend's report, see docs/how-to/operations.md; ``current_count`` alone if it has none.
        """
        return as_backend(self.storage).get_storage_health()

    def get_operation_log(self) -> list[Operation]:
        """Read the operation log.

        Returns:
            The last 1,000 operations, newest last.
        """
        return list(self.operation_log)

    def clear_operation_log(self) -> None:
        """Empty the operation log."""
        self.operation_log.clear()

    # Changing parts

    def reconfigure_component(
        self,
        component_type: ComponentType | str,
        new_component: object,
        validate: bool = True,
        save_state: bool = False,
    ) -> bool:
        """Replace a component while the system is in use.

        The new component is tried first: a unit is stored, changed and deleted; a query is answered; a small memory is
        pruned; an experience is encoded. If the trial fails, the old component stays in use.

        Args:
            component_type: ``encoder``, ``storage``, ``retrieval`` or ``manager``.
            new_component: The component; for ``manager`` a strategy or a :class:`MemoryManager`.
            validate: False skips the trial.
            save_state: Pass ``save_state()`` of the old component to ``restore_state()`` of the new one. For a
                ``VectorStore`` this copies its units.

        Returns:
            True.

        Raises:
            ConfigurationError: ``component_type`` is unknown, ``new_component`` is None, or the trial failed. Other
                errors of the component pass through.
        """
        kind = ComponentType.parse(component_type)
        validate, save_state = switch("validate", validate), switch("save_state", save_state)
        with self._swapping:
            old = self._component(kind)
            if new_component is None:
                raise ConfigurationError(f"new_component is None; give a {kind.value}")
            if validate:
                self._try(kind, new_component)
            if save_state and hasattr(old, "save_state") and hasattr(new_component, "restore_state"):
                new_component.restore_state(old.save_state())
            self._install(kind, new_component)
        self._note("reconfigure", {"component": kind.value, "type": type(new_component).__name__})
        return True

    def close(self) -> None:
        """Close the store and its embedder's connections, if this system opened them. May be called twice."""
        while self._owned:
            store = self._owned.pop()
            store.close()
            close = getattr(store.embedding_function, "close", None)
            if callable(close):
                close()

    def __enter__(self: _System) -> _System:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # Inside

    def _keep(self, units: list[MemoryUnit], embeddings: Vectors | None = None, **times: Any) -> list[str]:
        storage = self.storage
        if not units:
            return []
        times = {name: time for name, time in times.items() if time is not None}
        if times and "set_expiry" not in as_backend(storage).capabilities:
            raise ConfigurationError(
                f"{' and '.join(times)}: units of a {type(storage).__name__} do not expire; use a VectorStore"
            )
        if self.config.enable_auto_management:
            self._make_room(storage, units)
        if embeddings is not None or times:
            return list(storage.store_batch(units, embeddings, **times))  # type: ignore[call-arg]
        return [storage.store(units[0])] if len(units) == 1 else list(storage.store_batch(units))

    def _make_room(self, storage: StorageBackend, units: list[MemoryUnit]) -> None:
        with self._making_room:
            if self._makes_room == os.getpid():  # a handler or callback inside this call: the backend decides
                return
            self._makes_room = os.getpid()
            try:
                excess = self._excess_with(storage, units)
                removed = self._free(storage, excess) if excess.units else None
            finally:
                self._makes_room = 0
        if removed is not None:  # outside the lock: a callback may add units
            details = {"policy": self.config.prune_policy, "count": removed[0], "cause": excess.cause}
            self._note("auto_prune", details)
            notify(self.config.on_manage_complete, "auto_prune", removed)

    def _excess_with(self, storage: StorageBackend, units: list[MemoryUnit]) -> Excess:
        excess = self._capacity.excess(storage, len(units))
        if excess.units:
            excess = self._capacity.excess(storage, sum(not _is_known(storage, unit) for unit in units))
        if excess.for_memory and storage.count() < MEMORY_GROWTH * self._room_for_memory_at:
            return Excess(0)
        return excess

    def _free(self, storage: StorageBackend, excess: Excess) -> tuple[int, list[str]] | None:
        """Delete ``excess.units`` units; None when that failed: the backend then decides whether the new units fit."""
        manager, policy = self.memory_manager, self.config.prune_policy
        if manager.storage_backend is not storage:
            return None  # the backend was replaced meanwhile
        try:
            if policy == "oldest":
                removed = manager.prune({"max_count": storage.count() - excess.units})
            else:
                removed = manager.apply_forgetting(policy, excess.units)
            if excess.for_memory:
                as_backend(storage).run_maintenance()
        except MemEvolveError as error:
            _log.warning("units could not be deleted to make room (%s): %s", excess.cause, error)
            return None
        if excess.for_memory:
            self._room_for_memory_at = storage.count()
        return removed

    def _add_encoded(self, operation: str, trajectory: Sequence[object], encoded: object) -> list[str]:
        units = encoded_units(encoded)
        ids = self._keep(units)
        self._note(operation, {"trajectory_length": len(trajectory), "units_stored": len(ids)})
        self._tell_encoded(ids, units)
        return ids

    def _tell_encoded(self, ids: list[str], units: list[MemoryUnit]) -> None:
        for unit_id, unit in zip(ids, units, strict=True):
            notify(self.config.on_encode_complete, unit_id, unit)

    def _encoder(self) -> Any:
        if self.encoder is None:
            raise ConfigurationError("encoder is None: create the MemorySystem with one, or use add_units")
        return self.encoder

    def _component(self, kind: ComponentType) -> object:
        return {
            ComponentType.ENCODER: self.encoder,
            ComponentType.STORAGE: self.storage,
            ComponentType.RETRIEVAL: self.retrieval_context.strategy,
            ComponentType.MANAGER: self.memory_manager.management_strategy,
        }[kind]

    def _try(self, kind: ComponentType, component: Any) -> None:
        if kind is ComponentType.ENCODER:
            try_encoder(component)
        elif kind is ComponentType.STORAGE:
            try_storage(component)
            try_retrieval(self.retrieval_context.strategy, component)
        elif kind is ComponentType.RETRIEVAL:
            try_retrieval(component, self.storage)
        else:
            try_management(_strategy_of(component))

    def _install(self, kind: ComponentType, component: Any) -> None:
        if kind is ComponentType.ENCODER:
            self.encoder = component
        elif kind is ComponentType.STORAGE:
            self.storage = self.memory_manager.storage_backend = component
        elif kind is ComponentType.RETRIEVAL:
            self.retrieval_context.set_strategy(component)
        else:
            self.memory_manager.set_strategy(_strategy_of(component))

    def _note(self, operation: str, details: Mapping[str, object]) -> None:
        self.operation_log.append({"operation": operation, "details": dict(details), "timestamp": now_text()})


class Memory(MemorySystem):
    """A memory in three calls: a :class:`MemorySystem` whose store and embedder need no configuration.

    The embedder is that of the settings: a service if MEMEVOLVE_EMBEDDING_BASE_URL is set, else a local model if one is
    installed, else the hashing embedder, which compares words only.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, Memory
        >>> with Memory("notes", HashingEmbedder()) as memory:
        ...     unit_id = memory.add("git bisect finds the bad commit")
        ...     memory.search("which commit is bad")[0]["content"]
        'git bisect finds the bad commit'
    """

    def __init__(
        self,
        place: str | os.PathLike[str] = "memory",
        embedding_function: EmbeddingFunction | None = None,
        **settings: Any,
    ) -> None:
        """Open the memory, or create it and its folder.

        Args:
            place: Path prefix of the store, or ``milvus://host:port/collection``.
            embedding_function: Maps a text to a 1-D array; None for that of the settings.
            settings: Fields of :class:`MemorySystemConfig`.

        Raises:
            MemEvolveError: The store cannot be opened, or a setting is not allowed.
        """
        if not is_milvus_uri(place):
            Path(path_text("place", place)).expanduser().parent.mkdir(parents=True, exist_ok=True)
        if embedding_function is None:
            embedding_function = embedder_from_config(EmbeddingConfig())
        store = open_store(place, embedding_function)
        try:
            super().__init__(MemorySystemConfig(storage_backend=store, **settings))
        except BaseException:
            store.close()
            raise
        self._owned.append(store)

    def add(self, content: str | MemoryUnit, **fields: object) -> str:
        """Store one memory.

        Args:
            content: Its text, or a whole unit.
            fields: More of the unit, such as ``type="skill"``, ``tags=[...]``, ``metadata={...}`` or ``id="..."``.

        Returns:
            The id. An id that exists is replaced.

        Raises:
            MemEvolveError: As :meth:`add_units`.
        """
        unit = {"content": content} if isinstance(content, str) else dict(mapping("content", content, InvalidUnitError))
        return self.add_units([{**unit, **fields}])[0]

    def search(self, query: str, top_k: int | None = None, filters: Filters | None = None) -> list[MemoryUnit]:
        """Find the memories that match best: :meth:`query_memory` under the name that most stores use.

        Args:
            query: The text to search for.
            top_k: Most results; None for ``default_retrieval_top_k``.
            filters: Limits the search to units that match, see ``docs/reference/filters.md``.

        Returns:
            The units, best first, each with the keys ``score`` and ``retrieval_metadata`` added.

        Raises:
            MemEvolveError: As :meth:`query_memory`.
        """
        return self.query_memory(query, top_k, filters)


def _store_from_env(
    index_file: str | os.PathLike[str] | None, namespace: Sequence[str] | str | None = None
) -> AnyStore:
    function = embedder_from_config(EmbeddingConfig())
    return open_store(index_file, function, storage_config=StorageConfig(), namespace=namespace)


def _is_known(storage: StorageBackend, unit: object) -> bool:
    """Whether the unit replaces an existing one, so that it needs no room."""
    unit_id = unit.get("id") if isinstance(unit, Mapping) else None
    return isinstance(unit_id, str) and storage.exists(unit_id)


def _strategy_of(component: object) -> Any:
    """Return a strategy itself, or the strategy of a manager."""
    return getattr(component, "management_strategy", component)


def _as_dict(result: RetrievalResult) -> MemoryUnit:
    return {**result.unit, "score": result.score, "retrieval_metadata": result.metadata or {}}
