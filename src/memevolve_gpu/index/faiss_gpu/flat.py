"""The flat faiss GPU index: every vector on the device."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ...types import Effort, FloatArray, IndexPlan, IntArray, Metric, Precision, Rows
from ..base import Arrays, BuildJob
from ..bitmap import Allowed
from ..faiss_helpers import metric_of
from ..sample import ADD_ROWS
from ..vector_table import VectorTable
from .index import Ask, FaissGpuBody, doubled
from .resources import Resident, owner_of
from .sizes import flat_bytes, flat_query_bytes

__all__ = ["FaissGpuExactBody"]

_FLOAT16_MAX = 65504.0
_FLOAT16_NORMAL = 2.0**-14
_SQUARED_MAX = 255.0
_SQUARED_MIN = 2.0**-5
"""For l2 faiss squares components in float16 (``Math<half2>::mul`` in its L2Norm.cu) before it adds them up in float32:
from 256 on they become infinite, and their row is never found; in rows whose largest is below 2**-5 too many vanish."""
_FEW_SMALL = 16
"""Such small rows may be: they are confused with each other alone, and so many candidates are fetched beyond k."""


class FaissGpuExactBody(FaissGpuBody):
    """A flat index: float32 for float32 plans, else float16 where the vectors fit its range."""

    kind: ClassVar[str] = "exact"

    def __init__(
        self,
        plan: IndexPlan,
        metric: Metric,
        rows: Rows,
        table: VectorTable,
        vectors: FloatArray,
        *,
        beside: bool = False,
    ) -> None:
        """``vectors`` float32 (n, dim): those of ``table``, rounded or not; they are not kept. ``beside``: only where
        as much stays free as the body takes, since the one that it follows lies there too."""
        self._half = _half(plan.precision, metric, vectors)
        self._largest = _SQUARED_MAX if metric == "l2" else _FLOAT16_MAX
        super().__init__(plan, metric, rows, table, _uploaded(plan.device, table, vectors, self._half, beside))

    @classmethod
    def build(cls, job: BuildJob) -> FaissGpuExactBody:
        body = cls(job.plan, job.metric, job.rows, job.table(), job.rows.vectors)
        job.progress("add", 1.0)
        return body

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FaissGpuExactBody:
        rows = cls._rows_of(parts)
        table = cls._table_of(metric, rows, parts)
        return cls(plan, metric, rows, table, table.gather(slice(0, table.n)))

    def _extended(self, rows: Rows) -> FaissGpuExactBody | None:
        table = self.table.extended(rows.vectors)
        vectors, slots = table.gather(slice(0, table.n)), self._slot_table_with(rows)
        return FaissGpuExactBody(self._plan_with(table), self.metric, slots, table, vectors, beside=True)

    def _search(
        self, queries: FloatArray, k: int, effort: Effort, allowed: Allowed | None
    ) -> tuple[FloatArray, IntArray]:
        if self._half and np.abs(queries).max(initial=0.0) > self._largest:
            return self.table.scan(queries, k, allowed)
        return super()._search(queries, k, effort, allowed)

    def _probes(self, effort: Effort, allowed: Allowed | None) -> int | None:
        del effort, allowed
        return 0

    def _wider(self, ask: Ask, exhausted: bool) -> Ask | None:
        return None if exhausted else doubled(ask, self.n)

    def _query_bytes(self, ask: Ask) -> int:
        return flat_query_bytes(self.n, self.dim, ask.fetch, half=self._half)


def _half(precision: Precision, metric: Metric, vectors: FloatArray) -> bool:
    """Whether the device keeps float16: not for float32 plans, nor where float16 or its squares cannot hold them."""
    if precision == "float32":
        return False
    low, high = (_SQUARED_MIN, _SQUARED_MAX) if metric == "l2" else (_FLOAT16_NORMAL, _FLOAT16_MAX)
    small = 0
    for start in range(0, len(vectors), ADD_ROWS):
        largest = np.abs(vectors[start : start + ADD_ROWS]).max(axis=1)
        small += int(np.count_nonzero((largest < low) & (largest > 0)))
        if small > _FEW_SMALL or not bool((largest <= high).all()):
            return False
    return True


def _uploaded(device: str, table: VectorTable, vectors: FloatArray, half: bool, beside: bool) -> Resident | None:
    """A flat index of ``vectors`` float32 (n, dim), added at once, so that it never grows."""
    if not table.n:
        return None
    owner, size = owner_of(device), flat_bytes(table.n, table.dim, half)
    with owner.building("loading vectors", 2 * size if beside else size, keep=True) as (resources, held):
        config = owner.config("GpuIndexFlatConfig")
        config.useFloat16 = half
        held.append(owner.made("GpuIndexFlat", resources, table.dim, metric_of(owner.faiss, table.metric), config))
        held[0].add(np.ascontiguousarray(vectors))
    return Resident(owner, held, size)
