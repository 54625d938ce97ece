"""One way to each operation on a backend: its fast door when it has one, else the verbs of ``StorageBackend``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import MemEvolveError, StorageError
from ...records.filters import canonical, matches
from ...types import MemoryUnit
from .base import StorageBackend
from .capabilities import (
    AtomicReplace,
    BulkDelete,
    BulkRetrieve,
    ChangeNumber,
    OperationRegister,
    UnitStream,
)

__all__ = ["change_number", "register", "remove", "replace", "retrieve_many", "units_of"]

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
