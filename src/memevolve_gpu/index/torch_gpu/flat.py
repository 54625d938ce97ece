"""The flat torch index: float16 or int8 rows on the device propose, float32 decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ...types import FloatArray, IndexPlan, IntArray, Metric, Rows
from ..base import Arrays, BuildJob
from ..vector_table import VectorTable
from .device_rows import GROUP, Space, measured_space, padded_groups
from .failover import building
from .index import TorchBody
from .runtime import open_device, turn_on
from .upload import Layout, Loaded

__all__ = ["TorchExactBody"]


class TorchExactBody(TorchBody):
    """Rows in the order of their positions; recall@10 against float32 at least 0.999."""

    kind: ClassVar[str] = "exact"

    @classmethod
    def build(cls, job: BuildJob) -> TorchExactBody:
        """Bring the rows to the device; nothing is trained.

        Raises:
            DeviceError: the device refuses.
        """
        table = job.table()
        with building(job.plan.device):
            with turn_on(job.plan.device):
                device = open_device(job.plan.device)
            space = (
                measured_space(table, job.plan.precision, device, turn_on(job.plan.device))
                if table.n
                else Space(np.zeros(table.dim, np.float32), 1.0)
            )
            body = cls(job.plan, job.metric, job.rows, table, space)
            body._load(lambda fraction: job.progress("add", fraction))
        return body

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> TorchExactBody:
        rows = cls._rows_of(parts)
        table = cls._table_of(metric, rows, parts)
        body = cls(plan, metric, rows, table, cls._space_of(parts, table.dim))
        body._load_or_remark()
        return body

    def _layout(self, device: Any) -> Layout:  # noqa: ARG002 - bodies with lists keep centroids there
        return _in_order(self.n)

    def _longer(
        self,
        plan: IndexPlan,
        rows: Rows,
        table: VectorTable,
        vectors: FloatArray,  # noqa: ARG002 - bodies with lists assign them
        held: Loaded,  # noqa: ARG002 - as above
    ) -> tuple[TorchExactBody, Layout]:
        moved = np.arange(-(-self.n // GROUP), dtype=np.int64)
        layout = replace(_in_order(table.n), kept=self.n, moved=moved)
        return TorchExactBody(plan, self.metric, rows, table, self._space), layout


def _in_order(n: int) -> Layout:
    """n rows, each at its position."""

    def places(start: int, stop: int) -> IntArray:
        return np.arange(start, stop, dtype=np.int64)

    return Layout(padded_groups(-(-n // GROUP)), places, [])
