"""Two stages: 4-bit product quantisation (FAISS fast-scan) proposes, exact distances decide."""

from __future__ import annotations

from typing import Any, ClassVar

from ..types import Effort, FloatArray, IndexPlan, IntArray, Metric, Rows
from .allowed import Allowed
from .base import Arrays, Body, BuildJob
from .codes import CodeScan, candidate_width
from .costs import scan_cost
from .engine import check_codes, emptied, from_bytes, metric_of, quiet, to_bytes, with_rows
from .faiss_door import load_faiss, one_thread, translated
from .rerank import VectorTable
from .sample import ADD_ROWS, CODE_ROUNDS, CODE_TRAINING_POINTS, code_shape, padded_columns, training_sample

__all__ = ["TwoStageBody"]


class TwoStageBody(Body):
    """4-bit codes over all rows, no lists."""

    kind: ClassVar[str] = "two_stage"

    def __init__(self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, engine: Any) -> None:
        super().__init__(plan, metric, rows, table)
        self._codes = CodeScan(engine, table)

    @classmethod
    def build(cls, job: BuildJob) -> TwoStageBody:
        table = job.table()
        engine = job.like.emptied_engine() if isinstance(job.like, TwoStageBody) else _trained(job)
        with translated("adding 4-bit codes"):
            for block in job.blocks(ADD_ROWS, engine.d):
                engine.add(block)
        return cls(job.plan, job.metric, job.rows, table, engine)

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> TwoStageBody:
        rows = cls._rows_of(parts)
        table = cls._table_of(metric, rows, parts)
        engine = from_bytes(parts, "faiss", "IndexPQFastScan", table.n, metric)
        check_codes(engine, table.dim)
        return cls(plan, metric, rows, table, engine)

    def emptied_engine(self) -> Any:
        """A copy of what was trained, without rows."""
        return emptied(self._codes.engine)

    def _extended(self, rows: Rows) -> TwoStageBody | None:
        table = self.table.extended(rows.vectors)
        engine = with_rows(self._codes.engine, rows.vectors, ADD_ROWS)
        return TwoStageBody(self.plan, self.metric, self._slot_table_with(rows), table, engine)

    def _engine_parts(self) -> Arrays:
        return {"faiss": to_bytes(self._codes.engine)}

    def _engine_bytes(self) -> int:
        return self._codes.nbytes

    def _search(
        self, queries: FloatArray, k: int, effort: Effort, allowed: Allowed | None
    ) -> tuple[FloatArray, IntArray]:
        want = candidate_width(k, effort)
        count = self.n if allowed is None else allowed.count
        if scan_cost(count, self.dim) < self._codes.cost(want, allowed):
            return self.table.scan(queries, k, allowed)
        return self._codes.search(queries, k, want, allowed)


def _trained(job: BuildJob) -> Any:
    """An empty index whose codes are trained."""
    faiss = load_faiss()
    codes, width = code_shape(job.plan, job.rows.vectors.shape[1])
    sample = padded_columns(training_sample(job.source, CODE_TRAINING_POINTS, job.seed), width)
    job.progress("train", 0.0)
    with translated("training 4-bit codes"), one_thread():
        engine = faiss.IndexPQFastScan(width, codes, 4, metric_of(faiss, job.metric))
        quiet(engine.pq.cp, job.seed, CODE_ROUNDS)
        engine.train(sample)
    job.progress("train", 1.0)
    return engine
