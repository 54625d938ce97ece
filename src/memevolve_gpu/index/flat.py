"""The flat index: exact search over all rows."""

from __future__ import annotations

from typing import ClassVar

from ..types import FloatArray, IndexPlan, IntArray, Metric, Rows, SearchParams
from .base import Arrays, BuildJob, Index
from .bitmap import RowFilter

__all__ = ["FlatIndex"]


class FlatIndex(Index):
    """Vectors and nothing else."""

    kind: ClassVar[str] = "exact"

    @classmethod
    def build(cls, job: BuildJob) -> FlatIndex:
        """Keep the vectors; nothing is trained."""
        index = cls(job.plan, job.metric, job.rows, job.table())
        job.progress("add", 1.0)
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FlatIndex:
        rows = cls._rows_of(parts)
        return cls(plan, metric, rows, cls._table_of(metric, rows, parts))

    def _extended(self, rows: Rows) -> FlatIndex:
        table = self.table.extended(rows.vectors)
        return FlatIndex(self.plan, self.metric, self._slot_table_with(rows), table)

    def _search(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,  # noqa: ARG002 - there is nothing to choose
        row_filter: RowFilter | None,
    ) -> tuple[FloatArray, IntArray]:
        return self.table.scan(queries, k, row_filter)
