"""Adapts a backend that has the methods of StorageBackend without deriving from it; management through any backend."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ...errors import MemEvolveError, StorageError
from ...types import Filters, FloatArray, JsonObject, MemoryUnit, Vectors
from ...utils.arguments import having
from .base import OPTIONAL, StorageBackend

_log = logging.getLogger("memevolve_gpu.management")


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

    def store_batch(self, units: Sequence[MemoryUnit], *embeddings: Vectors | None, **times: Any) -> list[str]:
        return list(self._foreign.store_batch(list(units), *embeddings, **times))

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

    def count(self, filters: Filters | None = None) -> int:
        return int(self._foreign.count()) if filters is None else sum(1 for _ in self.units(filters))

    def clear(self) -> None:
        self._foreign.clear()

    def get_metadata(self, unit_id: str) -> JsonObject | None:
        found: JsonObject | None = self._foreign.get_metadata(unit_id)
        return found

    @property
    def _kind(self) -> str:
        return type(self._foreign).__name__


def as_backend(storage: Any) -> StorageBackend:
    """Return the backend itself, or an adapter where it does not derive from this package's ``StorageBackend``.

    Virtual subclasses (``ABCMeta.register``) have none of the defaults, so they are adapted too.
    """
    if StorageBackend in type(storage).__mro__:
        return storage  # type: ignore[no-any-return]
    return ForeignBackend(having("storage_backend", storage, "retrieve", "a store, with the methods of StorageBackend"))


def with_vectors(
    backend: StorageBackend, units: Iterable[MemoryUnit], page_size: int = 1000
) -> Iterator[tuple[MemoryUnit, FloatArray]]:
    """Each unit that is still there with its vector, float32 (dim,), read a page at a time."""
    left = iter(units)
    while page := list(islice(left, page_size)):
        vectors = backend.vectors_of([unit["id"] for unit in page])
        yield from ((unit, np.asarray(vectors[unit["id"]])) for unit in page if unit["id"] in vectors)


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


def register_operation(backend: StorageBackend, operation: str, details: Mapping[str, object]) -> None:
    """Register an operation that is done; log a warning where that fails, for the operation is done all the same."""
    try:
        backend.register_management_operation(operation, dict(details))
    except (MemEvolveError, OSError, MemoryError, RuntimeError) as error:
        _log.warning("%s is done, but could not be registered: %s", operation, error)
