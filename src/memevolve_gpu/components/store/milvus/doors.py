"""The doors of ``MilvusStore`` for management and for copying; see ``capabilities.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ....records.filters import matches
from ....types import FloatArray, MemoryUnit
from ....utils.arguments import whole_number
from ....utils.plain import plain_text
from ..units import checked_id, is_id
from .core import Core
from .expressions import filter_expression
from .rows import unit_of, vector_of

__all__ = ["Doors", "UnitsById"]

_MEASURED = 256
"""Units whose length is taken for that of all."""


class UnitsById(Mapping[str, MemoryUnit]):
    """id -> unit, read from the server at each access."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def __getitem__(self, unit_id: str) -> MemoryUnit:
        found = self._core.table.units([unit_id]) if is_id(unit_id) else {}
        if unit_id not in found:
            raise KeyError(unit_id)
        return found[unit_id]

    def __contains__(self, unit_id: object) -> bool:
        return is_id(unit_id) and bool(self._core.table.get([unit_id], []))

    def __iter__(self) -> Iterator[str]:
        return (str(row["id"]) for row in self._core.table.in_order([]))

    def __len__(self) -> int:
        return self._core.table.count()

    def __repr__(self) -> str:
        return f"<{len(self)} memory units>"


class Doors:
    """Bulk operations on the store that ``_open`` gives."""

    @property
    def _open(self) -> Core:
        raise NotImplementedError

    def delete_batch(self, ids: Iterable[str]) -> int:
        """Delete several units; how many went. Not one transaction: an error leaves some of them deleted."""
        wanted = [checked_id(unit_id, f"ids[{i}]") for i, unit_id in enumerate(ids)]
        return self._open.drop(list(dict.fromkeys(wanted)))

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``."""
        return self._open.table.units(_looked_up(ids))

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """The vectors, as they were given, of the units that exist: float32 (dim,) by id, in the order of ``ids``."""
        return self._open.table.vectors(_looked_up(ids))

    def units(self, filters: Mapping[str, Any] | None = None) -> Iterator[MemoryUnit]:
        """Units one by one, oldest first, read in pages. Raises InvalidFilterError at once."""
        expression = filter_expression(filters)
        rows = self._open.table.in_order(["body"], expression)
        found = (unit_of(row["body"]) for row in rows)
        return (unit for unit in found if matches(filters, unit)) if expression else found

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        """(unit, vector as it was given, float32 (dim,)) one by one, oldest first."""
        rows = self._open.table.in_order(["body", "vector"], page=whole_number("page_size", page_size))
        return ((unit_of(row["body"]), vector_of(row["vector"])) for row in rows)

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        """The vectors of at most ``count`` units, spread evenly over their age: float32 (dim,) by id."""
        most = whole_number("count", count, least=0)
        ids = [str(row["id"]) for row in self._open.table.in_order([])]
        spread = np.linspace(0, len(ids), min(most, len(ids)), endpoint=False).astype(int)
        return self.vectors_of([ids[at] for at in np.unique(spread).tolist()] if ids else [])

    def inventory(self) -> dict[str, Any]:
        """What units there are: ``count``; ``bytes``, estimated from the newest units and the vectors; ``types``, type
        to number, those without one under ``unknown``; ``oldest`` and ``newest``, ``created_at`` of the first and the
        last unit in the order of writing.
        """
        rows = [(str(row["id"]), str(row["kind"])) for row in self._open.table.in_order(["kind"])]
        types = Counter(kind or "unknown" for _, kind in rows)
        newest = [unit_id for unit_id, _ in rows[-_MEASURED:]]
        bodies = self._open.table.get([*[unit_id for unit_id, _ in rows[:1]], *newest], ["body"])
        sizes = [len(row["body"].encode()) for row in bodies.values()]
        stamps = [_created(bodies.get(unit_id)) for unit_id in (rows[0][0], rows[-1][0])] if rows else [None, None]
        width = 4 * self._open.facts.dim + (float(np.mean(sizes)) if sizes else 0.0)
        return {
            "count": len(rows),
            "bytes": int(len(rows) * width),
            "types": dict(types),
            "oldest": stamps[0],
            "newest": stamps[1],
        }


def _created(row: Mapping[str, Any] | None) -> str | None:
    metadata = unit_of(row["body"]).get("metadata") if row else None
    created = metadata.get("created_at") if isinstance(metadata, dict) else None
    return created if isinstance(created, str) else None


def _looked_up(ids: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(plain_text(unit_id) for unit_id in ids if is_id(unit_id)))
