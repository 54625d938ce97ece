"""The contract of a storage backend, and the adapter for backends that know MemEvolve's methods only.

A backend must implement the ten abstract methods of :class:`StorageBackend`. Everything else has a default, built on
these ten. ``capabilities`` names the optional methods that a backend implements itself, so that callers can tell what
is fast, or possible at all.
"""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from itertools import islice
from typing import Any, Literal

from ...errors import ConfigurationError, MemEvolveError, StorageError
from ...records.filters import canonical, matches
from ...types import FloatArray, Hit, MemoryUnit
from ...utils.timestamps import age_stamp
from .namespaces import NamespaceInfo
from .report_types import Inventory, MaintenanceReport, OperationEntry, StorageHealth

__all__ = [
    "OPTIONAL",
    "ForeignBackend",
    "MetadataMixin",
    "Progress",
    "StorageBackend",
    "UnitMapping",
    "as_backend",
    "delete_units",
    "register_operation",
    "score_of",
]

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the share of it that is done, 0..1."""

_log = logging.getLogger("memevolve_gpu.management")


class UnitMapping(Mapping[str, MemoryUnit]):
    """id -> unit, read from the backend at each access."""

    def __init__(self, backend: StorageBackend, ids: Callable[[], Iterator[str]]) -> None:
        self._backend = backend
        self._ids = ids

    def __getitem__(self, unit_id: str) -> MemoryUnit:
        unit = self._backend.retrieve_batch([unit_id]).get(unit_id) if unit_id in self._backend else None
        if unit is None:
            raise KeyError(unit_id)
        return unit

    def __contains__(self, unit_id: object) -> bool:
        return unit_id in self._backend

    def __iter__(self) -> Iterator[str]:
        return self._ids()

    def __len__(self) -> int:
        return self._backend.count()

    def __repr__(self) -> str:
        return f"<{len(self)} memory units>"


class StorageBackend(ABC):
    """The contract of a store of memory units, which are JSON objects with an ``id``.

    A subclass implements the ten abstract methods. The other methods have defaults, which read every unit where they
    must, do nothing where nothing is needed, or raise ConfigurationError where a backend cannot do it at all (search by
    meaning, vectors).

    Examples:
        >>> from memevolve_gpu import StorageBackend
        >>> class ListStore(StorageBackend):
        ...     def __init__(self):
        ...         self.held = {}
        ...     def store(self, unit):
        ...         self.held[unit["id"]] = unit
        ...         return unit["id"]
        ...     def store_batch(self, units):
        ...         return [self.store(unit) for unit in units]
        ...     def retrieve(self, unit_id):
        ...         return self.held.get(unit_id)
        ...     def retrieve_all(self):
        ...         return list(self.held.values())
        ...     def update(self, unit_id, unit):
        ...         return unit_id in self.held and bool(self.store({**unit, "id": unit_id}))
        ...     def delete(self, unit_id):
        ...         return self.held.pop(unit_id, None) is not None
        ...     def exists(self, unit_id):
        ...         return unit_id in self.held
        ...     def count(self):
        ...         return len(self.held)
        ...     def clear(self):
        ...         self.held.clear()
        ...     def get_metadata(self, unit_id):
        ...         return self.held.get(unit_id, {}).get("metadata")
        >>> backend = ListStore()
        >>> backend.store_batch([{"id": "a", "type": "tool"}, {"id": "b", "type": "lesson"}])
        ['a', 'b']
        >>> [unit["id"] for unit in backend.units({"type": "tool"})]
        ['a']
        >>> backend.inventory()["types"]
        {'tool': 1, 'lesson': 1}
        >>> sorted(backend.capabilities)
        []
    """

    @abstractmethod
    def store(self, unit: MemoryUnit) -> str:
        """Store a unit.

        Args:
            unit: The unit. An existing unit of the same id is replaced.

        Returns:
            The unit's id.
        """

    @abstractmethod
    def store_batch(self, units: Sequence[MemoryUnit]) -> list[str]:
        """Store several units.

        Args:
            units: The units, as for :meth:`store`.

        Returns:
            Their ids, in order.
        """

    @abstractmethod
    def retrieve(self, unit_id: str) -> MemoryUnit | None:
        """Read a unit.

        Args:
            unit_id: Its id.

        Returns:
            The unit; None when there is none.
        """

    @abstractmethod
    def retrieve_all(self) -> list[MemoryUnit]:
        """Read every unit.

        Returns:
            The units, oldest first.
        """

    @abstractmethod
    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        """Replace a unit.

        Args:
            unit_id: The id of the unit to replace.
            unit: The new unit.

        Returns:
            False when there is no unit of that id.
        """

    @abstractmethod
    def delete(self, unit_id: str) -> bool:
        """Delete a unit.

        Args:
            unit_id: Its id.

        Returns:
            False when there is no unit of that id.
        """

    @abstractmethod
    def exists(self, unit_id: str) -> bool:
        """Check for a unit.

        Args:
            unit_id: Its id.

        Returns:
            Whether there is a unit of that id.
        """

    @abstractmethod
    def count(self) -> int:
        """Count the units.

        Returns:
            The number of units.
        """

    @abstractmethod
    def clear(self) -> None:
        """Delete every unit."""

    @abstractmethod
    def get_metadata(self, unit_id: str) -> dict[str, Any] | None:
        """Read the metadata of a unit.

        Args:
            unit_id: The unit's id.

        Returns:
            The unit's ``metadata``; None when there is no unit or it has none.
        """

    @property
    def capabilities(self) -> frozenset[str]:
        """Names of the optional methods that this backend implements itself."""
        return frozenset(name for name in OPTIONAL if getattr(type(self), name) is not getattr(StorageBackend, name))

    @property
    def metric(self) -> str:
        """The distance of searches: l2, cosine or ip."""
        return "l2"

    @property
    def change_number(self) -> int | None:
        """The number of the newest change by anyone; None where changes are not numbered."""
        return None

    # Many units

    def units(self, filters: Mapping[str, Any] | None = None) -> Iterator[MemoryUnit]:
        """Read units one by one.

        Args:
            filters: Limits the units to those that match, see ``docs/reference/filters.md``; None for all.

        Returns:
            An iterator over the units, oldest first.

        Raises:
            InvalidFilterError: The filter is malformed. Raised by the call itself.
        """
        canonical(filters)
        return (unit for unit in self.retrieve_all() if matches(filters, unit))

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """Read several units without recording an access.

        Args:
            ids: Ids; those of no unit are skipped.

        Returns:
            The units by id, in the order of ``ids``.
        """
        found = ((unit_id, self.retrieve(unit_id)) for unit_id in dict.fromkeys(ids))
        return {unit_id: unit for unit_id, unit in found if unit is not None}

    def delete_batch(self, ids: Iterable[str], *, unchanged_since: int | None = None) -> int:
        """Delete several units, in one transaction where the backend has transactions.

        Args:
            ids: Ids; those of no unit are skipped.
            unchanged_since: A :attr:`change_number`. Units that changed after it stay. Ignored where changes are not
                numbered.

        Returns:
            The number of deleted units.
        """
        del unchanged_since
        return sum(self.delete(unit_id) for unit_id in ids)

    def replace_batch(
        self,
        delete_ids: Iterable[str],
        units: Sequence[MemoryUnit],
        embeddings: Any = None,
        *,
        unchanged_since: int | None = None,
    ) -> list[str]:
        """Delete some units and store others, in one transaction where the backend has transactions.

        The default stores first and deletes afterwards: an interruption leaves units twice rather than not at all.

        Args:
            delete_ids: Ids of the units to delete.
            units: The units to store.
            embeddings: float32 (len(units), dim), one row per unit; None to embed their text.
            unchanged_since: A :attr:`change_number`. Ignored where changes are not numbered.

        Returns:
            The ids of ``units``, in order.

        Raises:
            ConflictError: A unit to delete changed after ``unchanged_since``; nothing was done.
        """
        del unchanged_since
        given = () if embeddings is None else (embeddings,)
        ids = list(self.store_batch(list(units), *given))
        kept = set(ids)
        for unit_id in delete_ids:
            if unit_id not in kept:
                self.delete(unit_id)
        return ids

    # Searches

    def search(
        self,
        query: str,
        top_k: int = 5,
        filters: Mapping[str, Any] | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
    ) -> list[tuple[float, str]]:
        """Find the units nearest to a text.

        Args:
            query: The text.
            top_k: Most results.
            filters: Limits the search to units that match, see ``docs/reference/filters.md``.
            recall: Share of the true neighbours to find, above 0 and at most 1 (exact); None for the store's target.
            record: Whether the results count as accesses.

        Returns:
            (distance, id) pairs, nearest first; never more than there are units.

        Raises:
            ConfigurationError: The backend has no search by meaning.
        """
        raise self._missing("search by meaning")

    def search_units(
        self,
        query: str,
        top_k: int = 5,
        filters: Mapping[str, Any] | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
    ) -> list[Hit]:
        """Find the units nearest to a text, and read them.

        Args:
            query: The text.
            top_k: Most results.
            filters: As for :meth:`search`.
            recall: As for :meth:`search`.
            record: Whether the results count as accesses.

        Returns:
            Hits with unit, id, distance and score, nearest first.

        Raises:
            ConfigurationError: The backend has no search by meaning.
        """
        found = self.search(query, top_k, filters, recall, record=record)
        units = self.retrieve_batch([unit_id for _, unit_id in found])
        return [
            Hit(units[unit_id], unit_id, distance, score_of(distance, self.metric))
            for distance, unit_id in found
            if unit_id in units
        ]

    def search_vectors(
        self, queries: Any, top_k: int = 5, filters: Mapping[str, Any] | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        """Find the units nearest to each of several vectors.

        Args:
            queries: float32 (n, dim).
            top_k: Results for each query.
            filters: As for :meth:`search`.
            recall: As for :meth:`search`.

        Returns:
            Distances, float32 (n, top_k), and n lists of top_k ids; +inf and None where there are fewer units.

        Raises:
            ConfigurationError: The backend has no vectors.
        """
        raise self._missing("search by vector")

    def search_keywords(
        self, query: str, top_k: int = 5, filters: Mapping[str, Any] | None = None
    ) -> list[tuple[float, str]]:
        """Find the units that share words with a text.

        Args:
            query: The text.
            top_k: Most results.
            filters: As for :meth:`search`.

        Returns:
            (BM25 score, id) pairs, best first.

        Raises:
            ConfigurationError: The backend has no keyword index.
        """
        raise self._missing("search by keywords")

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        """Compare given units with a text.

        Args:
            query: The text.
            ids: Ids; those of no unit are skipped.

        Returns:
            The cosine of each unit by id, whatever the metric.

        Raises:
            ConfigurationError: The backend has no vectors.
        """
        raise self._missing("compare units with a text")

    # Vectors

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """Read the vectors of units.

        Args:
            ids: Ids; those of no unit are skipped.

        Returns:
            The vectors as they were given, float32 (dim,) by id, in the order of ``ids``.

        Raises:
            ConfigurationError: The backend has no vectors.
        """
        raise self._missing("give vectors")

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        """Read the vectors of some units, spread evenly over their age.

        Args:
            count: Most vectors.

        Returns:
            Vectors, float32 (dim,) by id.

        Raises:
            ConfigurationError: The backend has no vectors.
        """
        raise self._missing("give vectors")

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        """Read every unit with its vector, one by one.

        Args:
            page_size: Units that are read at once.

        Returns:
            An iterator over (unit, float32 (dim,)), oldest first.

        Raises:
            ConfigurationError: The backend has no vectors.
        """
        raise self._missing("give vectors")

    # Access statistics

    def record_access(self, ids: Iterable[str]) -> None:
        """Count an access to each of these units. The default keeps no access statistics.

        Args:
            ids: Ids; those of no unit are skipped.
        """
        del ids

    def access_order(self, kind: Literal["lru", "lfu"], limit: int) -> list[str]:
        """List units by their accesses. Without access statistics, by age.

        Args:
            kind: lru for those read longest ago first, lfu for those read least often; units that were never read come
                before both, by age.
            limit: Most ids.

        Returns:
            Ids, the first to forget first.
        """
        del kind
        return [unit["id"] for unit in islice(self.units(), limit)]

    def access_counts(self) -> dict[str, int]:
        """Read how often units were accessed.

        Returns:
            Counts by id, of the units that were accessed at all.
        """
        return {}

    # Maintenance and reports

    def inventory(self) -> Inventory:
        """Describe the units. The default reads each of them.

        Returns:
            Count, bytes, types, and the time stamps of the oldest and newest unit.
        """
        size, types = 0, Counter[str]()
        stamps: list[tuple[float, str]] = []
        for unit in self.units():
            size += len(json.dumps(unit, ensure_ascii=False, default=str).encode())
            types[str(unit.get("type") or "unknown")] += 1
            moment = age_stamp(unit)
            if moment is not None:
                stamps.append((moment, unit["metadata"]["created_at"]))
        oldest, newest = (min(stamps)[1], max(stamps)[1]) if stamps else (None, None)
        return {"count": types.total(), "bytes": size, "types": dict(types), "oldest": oldest, "newest": newest}

    def register_management_operation(self, operation_type: str, details: Any) -> OperationEntry:
        """Report a management operation that is done. The default keeps no history.

        Args:
            operation_type: prune, consolidate, deduplicate or forget.
            details: What is known of it; ``removed`` is the number of deleted units.

        Returns:
            The entry of the history, with the ``decision`` on what the index does next.
        """
        kept = dict(details) if isinstance(details, Mapping) else {"details": details}
        return {"operation": operation_type, "at": time.time(), "details": kept, "decision": "nothing"}

    def get_storage_health(self) -> StorageHealth:
        """Report the health of the backend.

        Returns:
            ``current_count`` by default; a store reports fill level, memory, index quality and recommendations.
        """
        return {"current_count": self.count()}

    def run_maintenance(self, progress: Progress | None = None) -> MaintenanceReport:
        """Do the maintenance that is due. The default has none to do.

        Args:
            progress: Called with (stage, share done).

        Returns:
            What was done.
        """
        del progress
        return {"actions": [], "reason": ""}

    def refresh(self) -> None:
        """See from here on all writes of others that are acknowledged. The default always sees them."""

    # Namespaces and expiry

    def namespace(self, *path: str) -> StorageBackend:
        """Give a view of one namespace: a backend of its own that sees and changes nothing else.

        Args:
            path: The parts of its name, the outermost first, below the namespace of this backend.

        Returns:
            The view.

        Raises:
            ConfigurationError: A part is no text that can be one, or the backend has no namespaces.
        """
        raise self._missing("keep namespaces")

    def namespaces(self, prefix: Sequence[str] | str = ()) -> list[NamespaceInfo]:
        """List the namespaces that hold units or have limits, in the order of their paths.

        Args:
            prefix: Lists only this one and those below it; relative to the namespace of this backend.

        Returns:
            Path, count and limits of each.

        Raises:
            ConfigurationError: The backend has no namespaces.
        """
        raise self._missing("keep namespaces")

    def delete_namespace(self, *path: str) -> int:
        """Delete a namespace with its units and limits, in one transaction; those below it stay.

        Args:
            path: As for :meth:`namespace`; none for the namespace of this backend.

        Returns:
            The number of deleted units.

        Raises:
            ConfigurationError: The backend has no namespaces.
        """
        raise self._missing("keep namespaces")

    def set_limits(self, *, max_units: int | None = None, default_ttl: Any = None) -> NamespaceInfo:
        """Set the limits of the namespace of this backend; both at once, None for no limit.

        Args:
            max_units: Most units. Those beyond a lower limit stay, and no new one is taken.
            default_ttl: Seconds, or a timedelta, after which units expire that are stored from now on without a time
                of their own.

        Returns:
            The namespace with its new limits.

        Raises:
            ConfigurationError: The backend has no namespaces.
        """
        raise self._missing("keep namespaces")

    def set_expiry(self, ids: Iterable[str], *, ttl: Any = None, expires_at: Any = None) -> int:
        """Set when units expire, in one transaction.

        Args:
            ids: Ids; those of no unit are skipped.
            ttl: Seconds from now, or a timedelta.
            expires_at: Unix time in seconds, or a datetime with its zone. Neither: the units do not expire.

        Returns:
            The number of units found.

        Raises:
            ConfigurationError: Units of this backend do not expire.
        """
        raise self._missing("let units expire")

    def expiry(self, unit_id: str) -> float | None:
        """Read when a unit expires.

        Args:
            unit_id: Its id.

        Returns:
            Unix time in seconds; None for a unit that does not expire, and where there is no unit of that id.
        """
        del unit_id
        return None

    # State

    def save_state(self) -> dict[str, Any]:
        """Describe the state for another instance to take over.

        Returns:
            JSON values for :meth:`restore_state`; empty for a backend without state.
        """
        return {}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another instance. The default ignores it.

        Args:
            state: What :meth:`save_state` of that instance returned.
        """
        del state

    def __bool__(self) -> bool:
        """Return True, with units or without: MemEvolve checks ``if not self.storage`` for a missing backend."""
        return True

    def __len__(self) -> int:
        """Return the number of units."""
        return self.count()

    def __iter__(self) -> Iterator[MemoryUnit]:
        """Iterate over the units, oldest first."""
        return self.units()

    def __contains__(self, unit_id: object) -> bool:
        """Return whether there is a unit of that id."""
        return isinstance(unit_id, str) and self.exists(unit_id)

    def _missing(self, ability: str) -> ConfigurationError:
        return ConfigurationError(f"a {type(self).__name__} cannot {ability}; use a VectorStore")


OPTIONAL = (
    frozenset(name for name in vars(StorageBackend) if not name.startswith("_"))
    - StorageBackend.__abstractmethods__
    - {"capabilities", "metric", "save_state", "restore_state"}
)
"""The public methods of ``StorageBackend`` that have a default, and ``change_number``."""


class ForeignBackend(StorageBackend):
    """Adapts an object with MemEvolve's ten methods, such as a backend derived from MemEvolve's own base class.

    Optional methods are used where the object declares them in an attribute ``capabilities``, as a proxy of one of our
    stores does.
    """

    def __init__(self, foreign: Any) -> None:
        self._foreign = foreign
        self._declared = OPTIONAL.intersection(getattr(foreign, "capabilities", ()))
        for name in self._declared - {"change_number"}:
            setattr(self, name, getattr(foreign, name))

    def __getattr__(self, name: str) -> Any:
        if name == "_foreign":  # not set yet, while the adapter is copied
            raise AttributeError(name)
        return getattr(self._foreign, name)

    @property
    def capabilities(self) -> frozenset[str]:
        return self._declared

    @property
    def metric(self) -> str:
        return str(getattr(self._foreign, "metric", "l2"))

    @property
    def change_number(self) -> int | None:
        return int(self._foreign.change_number) if "change_number" in self._declared else None

    def store(self, unit: MemoryUnit) -> str:
        return str(self._foreign.store(unit))

    def store_batch(self, units: Sequence[MemoryUnit], *embeddings: Any) -> list[str]:
        return list(self._foreign.store_batch(list(units), *embeddings))

    def retrieve(self, unit_id: str) -> MemoryUnit | None:
        found: MemoryUnit | None = self._foreign.retrieve(unit_id)
        return found

    def retrieve_all(self) -> list[MemoryUnit]:
        return list(self._foreign.retrieve_all())

    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        return bool(self._foreign.update(unit_id, unit))

    def delete(self, unit_id: str) -> bool:
        return bool(self._foreign.delete(unit_id))

    def exists(self, unit_id: str) -> bool:
        return bool(self._foreign.exists(unit_id))

    def count(self) -> int:
        return int(self._foreign.count())

    def clear(self) -> None:
        self._foreign.clear()

    def get_metadata(self, unit_id: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._foreign.get_metadata(unit_id)
        return found

    def _missing(self, ability: str) -> ConfigurationError:
        return ConfigurationError(f"a {type(self._foreign).__name__} cannot {ability}; use a VectorStore")


def as_backend(storage: Any) -> StorageBackend:
    """Return the backend itself, or an adapter where it does not derive from this package's ``StorageBackend``.

    Virtual subclasses (``ABCMeta.register``) have none of the defaults, so they are adapted too.
    """
    return storage if StorageBackend in type(storage).__mro__ else ForeignBackend(storage)


_operation: ContextVar[str | None] = ContextVar("operation", default=None)


@contextmanager
def named_operation(name: str) -> Iterator[None]:
    """What the block writes is of this kind in the history of the store."""
    token = _operation.set(name)
    try:
        yield
    finally:
        _operation.reset(token)


def operation_name(method: str) -> str:
    """The kind of an operation in the history: that of the block, else the method."""
    return _operation.get() or method


class MetadataMixin:
    """Adds time stamps to ``unit["metadata"]``.

    Examples:
        >>> from memevolve_gpu.components.store import MetadataMixin
        >>> class Stamper(MetadataMixin):
        ...     def stamp(self, unit):
        ...         return self._add_metadata(unit)
        >>> Stamper().stamp({"id": "a", "metadata": {"created_at": "2026-01-01"}})["metadata"]
        {'created_at': '2026-01-01'}
        >>> sorted(Stamper().stamp({"id": "b"})["metadata"])
        ['created_at']
    """

    def _generate_timestamp(self) -> str:
        """Return the current time as ISO 8601 in UTC with its offset."""
        return datetime.now(timezone.utc).isoformat()

    def _add_metadata(self, unit: MemoryUnit) -> MemoryUnit:
        """Return a copy of the unit whose metadata has ``created_at``; an existing one is kept."""
        metadata = unit.get("metadata")
        stamped = dict(metadata) if isinstance(metadata, Mapping) else {}
        stamped.setdefault("created_at", self._generate_timestamp())
        return {**unit, "metadata": stamped}

    def _updated_metadata(self, unit: MemoryUnit, old: MemoryUnit) -> MemoryUnit:
        """Return a copy of the unit with ``created_at`` of the old one and ``updated_at`` of now."""
        held = old.get("metadata")
        created = held.get("created_at") if isinstance(held, dict) else None
        given = dict(unit.get("metadata") or {})
        given.setdefault("created_at", created if created is not None else self._generate_timestamp())
        return {**unit, "metadata": {**given, "updated_at": self._generate_timestamp()}}


def score_of(distance: float, metric: str) -> float:
    """Convert a distance to a similarity: 1 / (1 + distance) under l2, the cosine, or the dot product."""
    if metric == "cosine":
        return 1.0 - distance
    return -distance if metric == "ip" else 1.0 / (1.0 + distance)


def delete_units(backend: StorageBackend, ids: Sequence[str], since: int | None) -> list[str]:
    """Delete units as :meth:`StorageBackend.delete_batch` does, and return the ids of those that are gone."""
    if not ids:
        return []
    if "delete_batch" not in backend.capabilities:
        return [unit_id for unit_id in ids if backend.delete(unit_id)]
    gone = backend.delete_batch(ids, unchanged_since=since)
    try:
        return list(ids) if gone == len(ids) else [unit_id for unit_id in ids if not backend.exists(unit_id)]
    except StorageError as error:
        _log.warning("%d of %d units were deleted; which ones cannot be read: %s", gone, len(ids), error)
        return list(ids)


def register_operation(backend: StorageBackend, operation: str, details: Mapping[str, Any]) -> None:
    """Register an operation that is done; log a warning where that fails, for the operation is done all the same."""
    try:
        backend.register_management_operation(operation, dict(details))
    except (MemEvolveError, OSError, MemoryError, RuntimeError) as error:
        _log.warning("%s is done, but could not be registered: %s", operation, error)
