"""What the vector store needs of a backend, whichever of the optional doors it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..components.store.base import StorageBackend
from ..components.store.capabilities import (
    AccessFigures,
    BulkDelete,
    BulkRetrieve,
    ChangeNumber,
    UnitStream,
    VectorDoors,
)
from ..errors import ConfigurationError
from ..records.filters import matches
from ..types import FloatArray, MemoryUnit
from .filters import Conjunction

__all__ = ["Bridge"]

ATTEMPTS = 3
"""Searches made when others change the store between finding documents and reading them."""

_Read = TypeVar("_Read")


class Bridge:
    """Writes, finds and deletes units of a backend that knows vectors. As thread-safe as the backend."""

    def __init__(self, backend: StorageBackend) -> None:
        """Raises ConfigurationError when the backend cannot search by vector."""
        if not isinstance(backend, VectorDoors):
            raise ConfigurationError(
                f"backend must be able to search by vector, which {type(backend).__name__} is not; "
                "give a VectorStore, or call open(path prefix, embedding)"
            )
        self.backend = backend
        self._doors: VectorDoors = backend
        # Asked once: a protocol with a property reads it, which may be a query of the database.
        self._many = backend if isinstance(backend, BulkRetrieve) else None
        self._changes = backend if isinstance(backend, ChangeNumber) else None
        self._accesses = backend if isinstance(backend, AccessFigures) else None

    @property
    def metric(self) -> str:
        """l2, cosine or ip."""
        return self._doors.metric

    def keep(self, units: Sequence[MemoryUnit], vectors: Any) -> list[str]:
        """Store units with their vectors (n, dim); their ids."""
        return list(self.backend.store_batch(list(units), vectors))  # type: ignore[call-arg]

    def units_of(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``."""
        if self._many is not None:
            return self._many.retrieve_batch(ids)
        found = ((unit_id, self.backend.retrieve(unit_id)) for unit_id in dict.fromkeys(ids))
        return {unit_id: unit for unit_id, unit in found if unit is not None}

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """The vectors of the units that exist, by id, in the order of ``ids``."""
        return self._doors.vectors_of(ids)

    def nearest(
        self, vector: Any, k: int, filters: Sequence[Conjunction], recall: float | None
    ) -> list[tuple[MemoryUnit, float]]:
        """At most k units that match one of the filters with their distances, nearest first."""

        def read() -> tuple[list[tuple[MemoryUnit, float]], bool]:
            near = self._near(vector, k, filters, recall)
            units = self.units_of([unit_id for unit_id, _ in near])
            found = [(units[unit_id], distance) for unit_id, distance in near if unit_id in units]
            return found, len(found) == len(near)

        return self._undisturbed(read)

    def nearest_vectors(
        self, vector: Any, k: int, filters: Sequence[Conjunction], recall: float | None
    ) -> list[tuple[MemoryUnit, FloatArray]]:
        """As ``nearest``, with the units' vectors in place of the distances."""

        def read() -> tuple[list[tuple[MemoryUnit, FloatArray]], bool]:
            ids = [unit_id for unit_id, _ in self._near(vector, k, filters, recall)]
            units, vectors = self.units_of(ids), self.vectors_of(ids)
            found = [(units[unit_id], vectors[unit_id]) for unit_id in ids if unit_id in units and unit_id in vectors]
            return found, len(found) == len(ids)

        return self._undisturbed(read)

    def note_read(self, ids: Sequence[str]) -> None:
        """These units were given to somebody."""
        if self._accesses is not None:
            self._accesses.record_access(ids)

    def drop(self, ids: Sequence[str]) -> None:
        """Delete the units that exist."""
        if isinstance(self.backend, BulkDelete):
            self.backend.delete_batch(ids)
        else:
            for unit_id in ids:
                self.backend.delete(unit_id)

    def drop_matching(self, filters: Sequence[Conjunction]) -> None:
        """Delete what matches one of the filters. Where the backend numbers changes, what changes meanwhile stays."""
        if self._changes is not None:
            number = self._changes.change_number
            self._changes.delete_batch(self._matching(filters), unchanged_since=number)
        else:
            self.drop(self._matching(filters))

    # Inside

    def _matching(self, filters: Sequence[Conjunction]) -> list[str]:
        found: dict[str, None] = {}
        for one in filters:
            units = (
                self.backend.units(one)
                if isinstance(self.backend, UnitStream)
                else (unit for unit in self.backend.retrieve_all() if matches(one, unit))
            )
            found.update((unit["id"], None) for unit in units)
        return list(found)

    def _near(
        self, vector: Any, k: int, filters: Sequence[Conjunction], recall: float | None
    ) -> list[tuple[str, float]]:
        """(id, distance) of the k nearest over all filters: those of a union are among those of its parts."""
        best: dict[str, float] = {}
        k = min(k, max(1, self.backend.count()))
        for one in filters:
            distances, ids = self._doors.search_vectors([vector], k, one or None, recall)
            for unit_id, distance in zip(ids[0], distances[0].tolist(), strict=True):
                if unit_id is not None:
                    best[unit_id] = min(distance, best.get(unit_id, distance))
        return sorted(best.items(), key=lambda found: found[1])[:k]

    def _undisturbed(self, read: Callable[[], tuple[list[_Read], bool]]) -> list[_Read]:
        """Read again while others change the store in between, so that documents and distances belong together.

        The last attempt counts; what it could not find is left out.
        """
        found: list[_Read] = []
        for _ in range(ATTEMPTS):
            before = self._change_number()
            found, complete = read()
            if complete and self._change_number() == before:
                break
        return found

    def _change_number(self) -> int | None:
        return None if self._changes is None else self._changes.change_number
