"""What the integrations share, without an import of a framework: a store opened on first use, documents as units.

A document's metadata is the unit's ``metadata``, to which a store adds time stamps. Under the framework's own name the
unit keeps what the document had itself in their place, so that it is read and filtered as it was given.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
from collections.abc import Callable, Coroutine, Mapping
from datetime import datetime, timezone
from typing import Any, ParamSpec, TypeVar

from ..components.store import VectorStore
from ..components.store.base import StorageBackend
from ..types import Filters, Json, JsonObject, MemoryUnit, Vectors
from ..utils.forking import lock
from ..utils.timestamps import moment_of

NOTHING: JsonObject = {"or": []}
"""The filter that no unit matches."""

STAMPS = ("created_at", "updated_at")

_P = ParamSpec("_P")
_T = TypeVar("_T")


class LazyStore:
    """A store that is opened on first use, once for all threads. A copy or a pickle of it is not open.

    A relative path counts from the folder in which the process is when it is named.
    """

    def __init__(
        self, index_file: str | os.PathLike[str], dim: int, metric: str, config: Mapping[str, object] | None
    ) -> None:
        self._place, self._config = (_from_root(index_file), dim, metric), dict(config or {})
        self._opened: VectorStore | None = None
        self.lock = lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyStore, (*self._place, self._config)

    def get(self) -> VectorStore:
        with self.lock:
            if self._opened is None:
                self._opened = self._open(*self._place)
            return self._opened

    def switch(self, index_file: str | os.PathLike[str], dim: int, metric: str) -> None:
        """Open another store, then close this one; an error leaves this one in use."""
        place = (_from_root(index_file), dim, metric)
        opened = self._open(*place)
        with self.lock:
            former, self._opened, self._place = self._opened, opened, place
        if former is not None:
            former.close()

    def close(self) -> None:
        """Close the files; the next :meth:`get` opens them again."""
        with self.lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def _open(self, index_file: str | os.PathLike[str], dim: int, metric: str) -> VectorStore:
        return VectorStore(index_file, None, dim, storage_config={**self._config, "metric": metric})


def _from_root(path: str | os.PathLike[str]) -> str:
    """The path from the root on; an end that names a folder stays, for the store to refuse."""
    name = os.fspath(path)
    return name if os.path.isabs(name) else os.path.join(os.getcwd(), name)  # noqa: PTH109, PTH117, PTH118


def in_a_thread(method: Callable[_P, _T]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """The method of that name, run in a thread and awaited."""

    @functools.wraps(method)
    async def call(*arguments: _P.args, **named: _P.kwargs) -> _T:
        result: _T = await asyncio.to_thread(getattr(arguments[0], method.__name__), *arguments[1:], **named)
        return result

    call.__doc__ = f"As ``{method.__name__}``, in a thread."
    return call


def path(*keys: str) -> str:
    """The path of a filter to a value below these keys, whatever they hold."""
    return ".".join('"' + re.sub(r'(["\\])', r"\\\1", key) + '"' for key in keys)


def stamps_in(metadata: Mapping[str, object]) -> JsonObject:
    """What the metadata says under the names that a store writes itself; kept for :func:`own_metadata`."""
    return {stamp: metadata[stamp] for stamp in STAMPS if stamp in metadata}


def own_metadata(unit: MemoryUnit, mark: str) -> JsonObject:
    """The metadata as it was given; all of it for a unit that was stored another way."""
    metadata: JsonObject = unit.get("metadata") or {}
    note = unit.get(mark)
    if not isinstance(note, dict):
        return dict(metadata)
    own: JsonObject = note.get("own") or {}
    return {key: own.get(key, value) for key, value in metadata.items() if key not in STAMPS or key in own}


def metadata_path(mark: str, *keys: str) -> str:
    """The path of a filter to a value in the document's own metadata."""
    return path(mark, "own", *keys) if keys[0] in STAMPS else path("metadata", *keys)


def moment(value: Json) -> datetime | None:
    """The moment that an ISO 8601 text or a datetime says, UTC where it has no offset; None for anything else."""
    if isinstance(value, datetime):
        return value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)
    return moment_of(value)


def placeholder(dim: int) -> list[float]:
    """The vector (dim,) of a document without one; every metric accepts it, and searches by vector leave it out."""
    return [1.0, *([0.0] * (dim - 1))]


def nearest(
    backend: StorageBackend, vector: Vectors, top_k: int, filters: Filters | None
) -> list[tuple[MemoryUnit, float]]:
    """At most top_k units with their distances, nearest first."""
    distances, ids = backend.search_vectors([vector], min(top_k, max(1, backend.count())), filters)
    units = backend.retrieve_batch([unit_id for unit_id in ids[0] if unit_id is not None])
    backend.record_access(list(units))
    pairs = zip(ids[0], distances[0].tolist(), strict=True)
    return [(units[unit_id], distance) for unit_id, distance in pairs if unit_id is not None and unit_id in units]
