"""The doors of ``VectorStore`` for management and retrieval; see ``capabilities.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from ...errors import InvalidQueryError
from ...types import FloatArray, MemoryUnit
from ...utils.arguments import shown, whole_number
from ...utils.plain import plain_text
from ...utils.vectors import check_vector, cosines
from .engine import Engine
from .guards import drop_unchanged
from .units import checked_id, is_id

__all__ = ["Managing"]

_PAGE = 1000


class Managing:
    """Bulk operations on the store that ``_open`` gives."""

    @property
    def _open(self) -> Engine:
        raise NotImplementedError

    @property
    def change_number(self) -> int:
        """The number of the newest change by anyone; for ``unchanged_since``."""
        return self._open.records.head().last_seq

    def delete_batch(self, ids: Iterable[str], *, unchanged_since: int | None = None) -> int:
        """Delete several units in one transaction; how many went.

        unchanged_since: a ``change_number``; units that were stored or updated after it stay.
        """
        engine = self._open
        wanted = [checked_id(unit_id, f"ids[{i}]") for i, unit_id in enumerate(ids)]
        with engine.records.write() as tx:
            dropped = drop_unchanged(tx, wanted, unchanged_since)
        if dropped:
            engine.written()
        return dropped

    def record_access(self, ids: Iterable[str]) -> None:
        """The units of these ids were given to somebody. Costs about a microsecond.

        ``retrieve``, ``search`` and ``search_units`` do this themselves. What was read is written down a thousand ids
        at a time, at maintenance and when the store is closed; a crash loses what was not yet.
        """
        self._open.accesses.note([plain_text(unit_id) for unit_id in ids if is_id(unit_id)])

    def access_order(self, kind: Literal["lru", "lfu"], limit: int) -> list[str]:
        """Ids of at most ``limit`` units: read longest ago (lru) or least often (lfu) first, before them those never
        read, by age. Counts every read of this process, and those that others have written down.

        Raises InvalidQueryError.
        """
        if kind not in ("lru", "lfu"):
            raise InvalidQueryError(f"kind must be 'lru' or 'lfu', got {shown(kind)}")
        engine, most = self._open, whole_number("limit", limit, least=0)
        return engine.accesses.in_order(kind, min(most, engine.records.count()))

    def access_counts(self) -> dict[str, int]:
        """How often each unit was read, by id, of those that ever were; counted as for ``access_order``."""
        return self._open.accesses.counts()

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``; leaves the access figures alone."""
        return self._open.records.get_many(_looked_up(ids))

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """The vectors, as they were given, of the units that exist: float32 (dim,) by id, in the order of ``ids``."""
        wanted, records = _looked_up(ids), self._open.records
        found: dict[str, bytes] = {}
        for start in range(0, len(wanted), _PAGE):
            found.update(records.vectors_of(wanted[start : start + _PAGE]))
        return {unit_id: np.frombuffer(found[unit_id], dtype="<f4") for unit_id in wanted if unit_id in found}

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        """The vectors of at most ``count`` units, spread evenly over their age: float32 (dim,) by id."""
        head_count = self._open.records.head().count
        rows = self._open.records.spread(min(whole_number("count", count, least=0), head_count))
        return {row.id: np.frombuffer(row.vector, dtype="<f4") for row in rows}

    def inventory(self) -> dict[str, Any]:
        """What units there are, without reading them: ``count``; ``bytes`` of the database and its log on the disk;
        ``types``, type to number, those without one under ``unknown``; ``oldest`` and ``newest``, ``created_at`` of the
        first and the last unit in the order of writing.
        """
        records = self._open.records
        found = records.inventory()
        unknown = found.count - sum(found.types.values())
        types = {**found.types, "unknown": unknown} if unknown > 0 else found.types
        size = sum(records.file_bytes().values())
        return {**asdict(found), "types": types, "bytes": size}

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        """The cosine between the text and each of the units that exist, by id, whatever the store's metric.

        Raises EmbeddingError.
        """
        engine = self._open
        vector = check_vector(engine.embed_query(query), engine.records.dim, engine.records.metric, name="query")
        return cosines(vector, self.vectors_of(ids))


def _looked_up(ids: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(plain_text(unit_id) for unit_id in ids if is_id(unit_id)))
