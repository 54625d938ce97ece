"""What a backend may offer beyond ``StorageBackend``: fast doors that management and retrieval use where they exist.

Each is a small protocol, checked with ``isinstance``; ``VectorStore`` has them all. Whoever asks must do without:
a backend with none of them is served through the verbs of ``StorageBackend`` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

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
    "OperationRegister",
    "Similarities",
    "StorageHealth",
    "TextSearch",
    "UnitStream",
    "VectorDoors",
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
