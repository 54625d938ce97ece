"""The flat torch index: float16 or int8 rows on the device propose, float32 decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ...types import FloatArray, IndexPlan, IntArray, Metric, Rows
from ..base import Arrays, BuildJob
from ..vector_table import VectorTable
from .device_rows import GROUP, Quantization, measured_quantization, padded_groups
from .index import TorchIndex
from .runtime import building, device_lock, open_device
from .upload import DeviceIndex, Layout

__all__ = ["TorchFlatIndex"]


class TorchFlatIndex(TorchIndex):
    """Rows in the order of their positions; recall@10 against float32 at least 0.999."""

    kind: ClassVar[str] = "exact"

    @classmethod
    def build(cls, job: BuildJob) -> TorchFlatIndex:
        """Bring the rows to the device; nothing is trained.

        Raises:
            DeviceError: the device refuses.
        """
        table = job.table()
        with building(job.plan.device):
            with device_lock(job.plan.device):
                open_device(job.plan.device)
            quantization = (
                measured_quantization(table, job.plan.precision)
                if table.n
                else Quantization(np.zeros(table.dim, np.float32), 1.0)
            )
            index = cls(job.plan, job.metric, job.rows, table, quantization)
            index._load(lambda fraction: job.progress("add", fraction))
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> TorchFlatIndex:
        rows = cls._rows_of(parts)
        table = cls._table_of(metric, rows, parts)
        index = cls(plan, metric, rows, table, cls._space_of(parts, table.dim))
        index._load_or_fail_over()
        return index

    def _layout(self, device: Any) -> Layout:  # noqa: ARG002 - TorchIVFIndex keeps centroids there
        return _in_order(self.n)

    def _longer(
        self,
        plan: IndexPlan,
        rows: Rows,
        table: VectorTable,
        vectors: FloatArray,  # noqa: ARG002 - TorchIVFIndex assigns them
        held: DeviceIndex,  # noqa: ARG002 - as above
    ) -> tuple[TorchFlatIndex, Layout]:
        moved = np.arange(-(-self.n // GROUP), dtype=np.int64)
        layout = replace(_in_order(table.n), kept=self.n, moved=moved)
        return TorchFlatIndex(plan, self.metric, rows, table, self._quantization), layout


def _in_order(n: int) -> Layout:
    """n rows, each at its position."""

    def places(start: int, stop: int) -> IntArray:
        return np.arange(start, stop, dtype=np.int64)

    return Layout(padded_groups(-(-n // GROUP)), places, [])
