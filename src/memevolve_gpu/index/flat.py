"""The flat index: exact search over all rows."""

from __future__ import annotations

from typing import ClassVar

from ..types import Effort, FloatArray, IndexPlan, IntArray, Metric, Rows
from .base import Arrays, Body, BuildJob
from .bitmap import Allowed

__all__ = ["ExactBody"]


class ExactBody(Body):
    """Vectors and nothing else."""

    kind: ClassVar[str] = "exact"

    @classmethod
    def build(cls, job: BuildJob) -> ExactBody:
        """Keep the vectors; nothing is trained."""
        body = cls(job.plan, job.metric, job.rows, job.table())
        job.progress("add", 1.0)
        return body

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> ExactBody:
        rows = cls._rows_of(parts)
        return cls(plan, metric, rows, cls._table_of(metric, rows, parts))

    def _extended(self, rows: Rows) -> ExactBody:
        table = self.table.extended(rows.vectors)
        return ExactBody(self.plan, self.metric, self._slot_table_with(rows), table)

    def _search(
        self,
        queries: FloatArray,
        k: int,
        effort: Effort,  # noqa: ARG002 - there is nothing to choose
        allowed: Allowed | None,
    ) -> tuple[FloatArray, IntArray]:
        return self.table.scan(queries, k, allowed)
