"""Every vector on the device, compared with every query."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ...types import Effort, FloatArray, IndexPlan, IntArray, Metric, Rows
from ..allowed import Allowed
from ..base import Arrays, BuildJob
from ..engine import metric_of
from ..rerank import Int8Table, VectorTable
from .body import Ask, FaissGpuBody, doubled
from .owner import Resident, owner_of
from .sizes import flat_bytes, flat_query_bytes

__all__ = ["FaissGpuExactBody"]

_FLOAT16_MAX = 65504.0
_FLOAT16_NORMAL = 2.0**-14


class FaissGpuExactBody(FaissGpuBody):
    """A flat index: float32 for float32 tables, else float16 where the vectors fit its range."""

    kind: ClassVar[str] = "exact"

    def __init__(
        self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, resident: Resident | None
    ) -> None:
        super().__init__(plan, metric, rows, table, resident)
        self._half = _half(table)

    @classmethod
    def build(cls, job: BuildJob) -> FaissGpuExactBody:
        table = job.table()
        resident = _uploaded(job.plan.device, table, job.rows.vectors)
        job.progress("add", 1.0)
        return cls(job.plan, job.metric, job.rows, table, resident)

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FaissGpuExactBody:
        rows = cls._rows_of(parts)
        table = cls._table_of(plan, metric, rows, parts)
        return cls(plan, metric, rows, table, _uploaded(plan.device, table, table.gather(slice(0, table.n))))

    def _search(
        self, queries: FloatArray, k: int, effort: Effort, allowed: Allowed | None
    ) -> tuple[FloatArray, IntArray]:
        if self._half and np.abs(queries).max(initial=0.0) > _FLOAT16_MAX:
            return self.table.scan(queries, k, allowed)
        return super()._search(queries, k, effort, allowed)

    def _probes(self, effort: Effort, allowed: Allowed | None) -> int | None:
        del effort, allowed
        return 0

    def _wider(self, ask: Ask, exhausted: bool) -> Ask | None:
        return None if exhausted else doubled(ask, self.n)

    def _query_bytes(self, ask: Ask) -> int:
        return flat_query_bytes(self.n, self.dim, ask.fetch, half=self._half)


def _half(table: VectorTable) -> bool:
    """Whether the device keeps float16: not for float32 tables, nor where int8 was taken because float16 cannot."""
    if not isinstance(table, Int8Table):
        return table.precision == "float16"
    largest = table.scales[table.rows.any(axis=1)] * np.float32(127)
    return bool((largest <= _FLOAT16_MAX).all() and (largest >= _FLOAT16_NORMAL).all())


def _uploaded(device: str, table: VectorTable, vectors: FloatArray) -> Resident | None:
    """A flat index of ``vectors`` float32 (n, dim), added at once, so that it never grows."""
    if not table.n:
        return None
    owner, half = owner_of(device), _half(table)
    size = flat_bytes(table.n, table.dim, half)
    with owner.building("loading vectors", size, keep=True) as (resources, held):
        config = owner.config("GpuIndexFlatConfig")
        config.useFloat16 = half
        held.append(owner.faiss.GpuIndexFlat(resources, table.dim, metric_of(owner.faiss, table.metric), config))
        held[0].add(np.ascontiguousarray(vectors))
    return Resident(owner, held, size)
