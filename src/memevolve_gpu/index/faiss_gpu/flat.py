"""The flat faiss GPU index: every vector on the device."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ...types import FloatArray, IndexPlan, IntArray, Metric, Precision, Rows, SearchParams
from ..base import Arrays, BuildJob
from ..bitmap import RowFilter
from ..faiss_helpers import metric_of
from ..sample import ADD_ROWS
from ..vector_table import VectorTable
from .index import FaissGpuIndex, Fetch, doubled
from .resources import GpuIndexHandle, resources_of
from .sizes import flat_bytes, flat_query_bytes

__all__ = ["FaissGpuFlatIndex"]

_FLOAT16_MAX = 65504.0
_FLOAT16_NORMAL = 2.0**-14
_SQUARED_MAX = 255.0
_SQUARED_MIN = 2.0**-5
"""For l2 faiss squares components in float16 (``Math<half2>::mul`` in its L2Norm.cu) before it adds them up in float32:
from 256 on they become infinite, and their row is never found; in rows whose largest is below 2**-5 too many vanish."""
_FEW_SMALL = 16
"""As many small rows are accepted: they are confused only with each other, and as many extra candidates are fetched."""


class FaissGpuFlatIndex(FaissGpuIndex):
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
        """``vectors`` float32 (n, dim): those of ``table``, rounded or not; they are not kept. ``beside``: need
        twice the memory, since the index that this one follows is still there."""
        self._half = _half(plan.precision, metric, vectors)
        self._largest = _SQUARED_MAX if metric == "l2" else _FLOAT16_MAX
        super().__init__(plan, metric, rows, table, _uploaded(plan.device, table, vectors, self._half, beside))

    @classmethod
    def build(cls, job: BuildJob) -> FaissGpuFlatIndex:
        index = cls(job.plan, job.metric, job.rows, job.table(), job.rows.vectors)
        job.progress("add", 1.0)
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FaissGpuFlatIndex:
        rows = cls._rows_of(parts)
        table = cls._table_of(metric, rows, parts)
        return cls(plan, metric, rows, table, table.gather(slice(0, table.n)))

    def _extended(self, rows: Rows) -> FaissGpuFlatIndex | None:
        table = self.table.extended(rows.vectors)
        vectors, slots = table.gather(slice(0, table.n)), self._slot_table_with(rows)
        return FaissGpuFlatIndex(self._plan_with(table), self.metric, slots, table, vectors, beside=True)

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        if self._half and np.abs(queries).max(initial=0.0) > self._largest:
            return self.table.scan(queries, k, row_filter)
        return super()._search(queries, k, params, row_filter)

    def _probes(self, params: SearchParams, row_filter: RowFilter | None) -> int | None:
        del params, row_filter
        return 0

    def _wider(self, fetch: Fetch, exhausted: bool) -> Fetch | None:
        return None if exhausted else doubled(fetch, self.n)

    def _query_bytes(self, fetch: Fetch) -> int:
        return flat_query_bytes(self.n, self.dim, fetch.fetch, half=self._half)


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


def _uploaded(device: str, table: VectorTable, vectors: FloatArray, half: bool, beside: bool) -> GpuIndexHandle | None:
    """A flat index of ``vectors`` float32 (n, dim), added at once, so that it never grows."""
    if not table.n:
        return None
    gpu_resources, size = resources_of(device), flat_bytes(table.n, table.dim, half)
    with gpu_resources.building("loading vectors", 2 * size if beside else size, keep=True) as (resources, held):
        config = gpu_resources.config("GpuIndexFlatConfig")
        config.useFloat16 = half
        held.append(
            gpu_resources.made(
                "GpuIndexFlat", resources, table.dim, metric_of(gpu_resources.faiss, table.metric), config
            )
        )
        held[0].add(np.ascontiguousarray(vectors))
    return GpuIndexHandle(gpu_resources, held, size)
