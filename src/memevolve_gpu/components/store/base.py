"""The contract of a storage backend, its optional capabilities, and one function for each operation.

An optional capability is a small protocol, checked with ``isinstance``; ``VectorStore`` has them all. A backend with
none of them is served through the methods of ``StorageBackend`` alone.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal, Protocol, runtime_checkable

from ...errors import MemEvolveError, StorageError
from ...records.filters import canonical, matches
from ...types import FloatArray, Hit, MemoryUnit

__all__ = [
    "AccessFigures",
    "AtomicReplace",
    "BulkDelete",
    "BulkRetrieve",
    "ChangeNumber",
    "Inventory",
    "KeywordSearch",
    "Maintainable",
    "MetadataMixin",
    "OperationRegister",
    "Similarities",
    "StorageBackend",
    "StorageHealth",
    "TextSearch",
    "UnitStream",
    "VectorDoors",
    "change_number",
    "register",
    "remove",
    "replace",
    "retrieve_many",
    "units_of",
]


@runtime_checkable
class BulkDelete(Protocol):
    """Deletes many units in one transaction."""

    def delete_batch(self, ids: Iterable[str]) -> int:
        """Delete the units that exist; their number."""
        ...  # pragma: no cover


@runtime_checkable
class ChangeNumber(Protocol):
    """Numbers every change, so that a unit that changed since it was read is not deleted by mistake."""

    @property
    def change_number(self) -> int:
        """The number of the newest change by anyone."""
        ...  # pragma: no cover

    def delete_batch(self, ids: Iterable[str], *, unchanged_since: int | None = None) -> int:
        """As ``BulkDelete``; units that changed after that number stay."""
        ...  # pragma: no cover


@runtime_checkable
class AtomicReplace(Protocol):
    """Deletes some units and stores others in one transaction."""

    def replace_batch(
        self,
        delete_ids: Iterable[str],
        units: Sequence[MemoryUnit],
        embeddings: Any = None,
        *,
        unchanged_since: int | None = None,
    ) -> list[str]:
        """The ids of the stored units, in order; ConflictError when a unit to delete changed after that number."""
        ...  # pragma: no cover


@runtime_checkable
class UnitStream(Protocol):
    """Reads units one by one."""

    def units(self, filters: Mapping[str, Any] | None = None) -> Iterator[MemoryUnit]:
        """The matching units, oldest first."""
        ...  # pragma: no cover


@runtime_checkable
class BulkRetrieve(Protocol):
    """Reads many units in one go."""

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``. Leaves the access figures alone."""
        ...  # pragma: no cover


@runtime_checkable
class VectorDoors(Protocol):
    """Knows vectors and finds their neighbours."""

    @property
    def metric(self) -> str:
        """l2, cosine or ip."""
        ...  # pragma: no cover

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        """(unit, float32 (dim,)), oldest first."""
        ...  # pragma: no cover

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """The vectors of the units that exist, float32 (dim,) each, by id, in the order of ``ids``."""
        ...  # pragma: no cover

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        """The vectors of at most ``count`` units, spread evenly over their age, by id."""
        ...  # pragma: no cover

    def search_vectors(
        self, queries: Any, top_k: int = 5, filters: Mapping[str, Any] | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        """queries (n, dim) -> distances (n, top_k), ids."""
        ...  # pragma: no cover


@runtime_checkable
class TextSearch(Protocol):
    """Embeds a query and finds its neighbours. ``record=False`` leaves the access figures alone."""

    def search(
        self,
        query: str,
        top_k: int = 5,
        filters: Mapping[str, Any] | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
    ) -> list[tuple[float, str]]:
        """[(distance, id), ...], nearest first."""
        ...  # pragma: no cover

    def search_units(
        self,
        query: str,
        top_k: int = 5,
        filters: Mapping[str, Any] | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
    ) -> list[Hit]:
        """The same with units and scores."""
        ...  # pragma: no cover


@runtime_checkable
class Similarities(Protocol):
    """Compares given units with a text."""

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        """The cosine of each unit that exists, by id."""
        ...  # pragma: no cover


@runtime_checkable
class KeywordSearch(Protocol):
    """Ranks units by the words that they share with a query."""

    def search_keywords(
        self, query: str, top_k: int = 5, filters: Mapping[str, Any] | None = None
    ) -> list[tuple[float, str]]:
        """[(score, id), ...], best first."""
        ...  # pragma: no cover


@runtime_checkable
class AccessFigures(Protocol):
    """Knows when and how often each unit was read."""

    def record_access(self, ids: Iterable[str]) -> None:
        """The units of these ids were given to somebody."""
        ...  # pragma: no cover

    def access_order(self, kind: Literal["lru", "lfu"], limit: int) -> list[str]:
        """The ``limit`` ids that were read longest ago, or least often; never read ones first, by age."""
        ...  # pragma: no cover

    def access_counts(self) -> dict[str, int]:
        """How often each unit was read, of those that ever were."""
        ...  # pragma: no cover


@runtime_checkable
class Inventory(Protocol):
    """Describes its units without reading them."""

    def inventory(self) -> dict[str, Any]:
        """``count``, ``bytes``, ``types`` (type to number), and ``oldest`` and ``newest`` (``created_at`` or None)."""
        ...  # pragma: no cover


@runtime_checkable
class OperationRegister(Protocol):
    """Wants to hear of every management operation."""

    def register_management_operation(self, operation_type: str, details: Any) -> Any:
        """Called once an operation is done."""
        ...  # pragma: no cover


@runtime_checkable
class StorageHealth(Protocol):
    """Judges itself."""

    def get_storage_health(self) -> dict[str, Any]:
        """See docs/how-to/operations.md."""
        ...  # pragma: no cover


@runtime_checkable
class Maintainable(Protocol):
    """Does its upkeep when asked."""

    def run_maintenance(self) -> dict[str, Any]:
        """What was done."""
        ...  # pragma: no cover


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


_log = logging.getLogger("memevolve_gpu.management")


def units_of(backend: StorageBackend, filters: Mapping[str, Any] | None = None) -> Iterator[MemoryUnit]:
    """The matching units, oldest first. Raises InvalidFilterError at once."""
    if isinstance(backend, UnitStream):
        return backend.units(filters)
    canonical(filters)
    return (unit for unit in backend.retrieve_all() if matches(filters, unit))


def retrieve_many(backend: StorageBackend, ids: Sequence[str]) -> dict[str, MemoryUnit]:
    """The units that exist, by id, in the order of ``ids``."""
    if isinstance(backend, BulkRetrieve):
        return backend.retrieve_batch(ids)
    found = ((unit_id, backend.retrieve(unit_id)) for unit_id in dict.fromkeys(ids))
    return {unit_id: unit for unit_id, unit in found if unit is not None}


def change_number(backend: StorageBackend) -> int | None:
    """The number of the newest change, for :func:`remove` and :func:`replace`; None where changes have none."""
    return backend.change_number if isinstance(backend, ChangeNumber) else None


def remove(backend: StorageBackend, ids: Sequence[str], since: int | None) -> list[str]:
    """Delete the units, in one transaction where the backend can, and return the ids of those that went.

    A unit that changed after ``since`` stays where the backend numbers its changes.
    """
    if not ids:
        return []
    if not isinstance(backend, BulkDelete):
        return [unit_id for unit_id in ids if backend.delete(unit_id)]
    if isinstance(backend, ChangeNumber):
        gone = backend.delete_batch(ids, unchanged_since=since)
    else:
        gone = backend.delete_batch(ids)
    try:
        return list(ids) if gone == len(ids) else [unit_id for unit_id in ids if not backend.exists(unit_id)]
    except StorageError as error:
        _log.warning("%d of %d units were deleted; which ones cannot be read: %s", gone, len(ids), error)
        return list(ids)


def replace(
    backend: StorageBackend, delete_ids: Sequence[str], units: Sequence[MemoryUnit], since: int | None
) -> list[str]:
    """Store ``units`` in the place of those of ``delete_ids``; the new ids, in order.

    One transaction where the backend can, which raises ConflictError when one to delete changed after ``since``.
    Elsewhere the new ones are stored first: an interruption leaves units twice rather than not at all.
    """
    if isinstance(backend, AtomicReplace):
        return backend.replace_batch(delete_ids, units, unchanged_since=since)
    ids = list(backend.store_batch(list(units)))
    kept = set(ids)
    for unit_id in delete_ids:
        if unit_id not in kept:
            backend.delete(unit_id)
    return ids


def register(backend: StorageBackend, operation: str, details: Mapping[str, Any]) -> None:
    """Tell the backend of an operation that is done, if it wants to know.

    Should it be unable to note that, a warning is logged: the operation is done all the same.
    """
    if not isinstance(backend, OperationRegister):
        return
    try:
        backend.register_management_operation(operation, dict(details))
    except (MemEvolveError, OSError, MemoryError, RuntimeError) as error:
        _log.warning("%s is done, but could not be noted: %s", operation, error)
