"""Two stages: 4-bit product quantisation proposes (FAISS fast-scan), exact distances decide."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from ..types import Effort, FloatArray, IndexPlan, IntArray, Metric, Rows
from .allowed import Allowed
from .base import Arrays, Body, BuildJob, chunks
from .costs import codes_cost, scan_cost
from .engine import aligned_bytes, check_codes, emptied, from_bytes, metric_of, quiet, to_bytes
from .faiss_door import load_faiss, one_thread, translated
from .rerank import VectorTable
from .sample import CODE_TRAINING_POINTS, default_codes, padded_columns, padded_dim, training_sample
from .scan import padded

__all__ = ["TwoStageBody", "candidate_width"]

ADD_ROWS = 16_384


def candidate_width(k: int, effort: Effort) -> int:
    """How many candidates are reranked: what the effort says, but at least 2k; without a word, 60 + 4k.

    On 39,320 real embeddings 60 + 4k reached recall 0.996 to 1.0 for k from 1 to 100, in distribution and out of it.
    """
    return max(effort.rerank or 60 + 4 * k, 2 * k)


class TwoStageBody(Body):
    """4-bit codes over all rows, no lists."""

    kind: ClassVar[str] = "two_stage"

    def __init__(self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, engine: Any) -> None:
        super().__init__(plan, metric, rows, table)
        self._engine = engine
        self._width = int(engine.d)
        self._codes = int(engine.pq.M)

    @classmethod
    def build(cls, job: BuildJob) -> TwoStageBody:
        faiss, table, plan = load_faiss(), job.table(), job.plan
        codes = min(plan.codes or default_codes(table.dim), table.dim)
        width = padded_dim(table.dim, codes)
        if isinstance(job.like, TwoStageBody):
            engine = job.like.emptied_engine()
        else:
            sample = padded_columns(training_sample(job.source, CODE_TRAINING_POINTS, job.seed), width)
            job.progress("train", 0.0)
            with translated("training 4-bit codes"), one_thread():
                engine = faiss.IndexPQFastScan(width, codes, 4, metric_of(faiss, job.metric))
                quiet(engine.pq.cp, job.seed)
                engine.train(sample)
            job.progress("train", 1.0)
        with translated("adding 4-bit codes"):
            for block in job.blocks(ADD_ROWS, width):
                engine.add(block)
        return cls(plan, job.metric, job.rows, table, engine)

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> TwoStageBody:
        rows = cls._rows_of(parts)
        table = cls._table_of(plan, metric, rows, parts)
        engine = from_bytes(parts, "IndexPQFastScan", table.n, metric)
        check_codes(engine, table.dim)
        return cls(plan, metric, rows, table, engine)

    def emptied_engine(self) -> Any:
        """A copy of what was trained, without rows."""
        return emptied(self._engine)

    def _engine_parts(self) -> Arrays:
        return {"faiss": to_bytes(self._engine)}

    def _engine_bytes(self) -> int:
        centroids = self._engine.pq.centroids.size() * 4
        return int(aligned_bytes(self._engine.codes.size()) + centroids)

    def _search(
        self, queries: FloatArray, k: int, effort: Effort, allowed: Allowed | None
    ) -> tuple[FloatArray, IntArray]:
        want = candidate_width(k, effort)
        first = self._first_width(want, allowed)
        if self._scan_wins(want, first, allowed):
            return self.table.scan(queries, k, allowed)
        nq = len(queries)
        if nq == 1 and allowed is None:
            return self.table.rerank(queries, self._propose(queries, want), k)
        distances, positions = padded(nq, k)
        for part in chunks(nq, 32 * first):
            found = self._search_chunk(queries[part], k, want, first, allowed)
            distances[part], positions[part] = found
        return distances, positions

    def _search_chunk(
        self, queries: FloatArray, k: int, want: int, width: int, allowed: Allowed | None
    ) -> tuple[FloatArray, IntArray]:
        if allowed is None:
            return self.table.rerank(queries, self._propose(queries, want), k)
        candidates, starved = self._allowed_candidates(queries, want, width, allowed)
        distances, positions = self.table.rerank(queries, candidates, k)
        if starved.size:
            distances[starved], positions[starved] = self.table.scan(queries[starved], k, allowed)
        return distances, positions

    def _allowed_candidates(
        self, queries: FloatArray, want: int, width: int, allowed: Allowed
    ) -> tuple[IntArray, IntArray]:
        """Candidates (nq, want), and the queries for which too few were found before a scan became cheaper."""
        candidates = np.full((len(queries), want), -1, np.int64)
        enough, todo = min(want, allowed.count), np.arange(len(queries))
        while todo.size and not self._scan_wins(want, width, allowed):
            proposed = self._propose(queries[todo], width)
            hits = allowed.test(proposed)
            short = []
            for row, own, hit in zip(todo.tolist(), proposed, hits, strict=True):
                kept = own[hit][:want]
                candidates[row, : kept.size] = kept
                if kept.size < enough:
                    short.append(row)
            todo = np.asarray(short, dtype=np.int64)
            width *= 2
        return candidates, todo

    def _propose(self, queries: FloatArray, width: int) -> IntArray:
        """The ``width`` nearest by 4-bit codes, int64 (nq, width), -1 at the end where fewer exist."""
        nq = len(queries)
        queries = padded_columns(queries, self._width)
        distances, positions = np.empty((nq, width), np.float32), np.empty((nq, width), np.int64)
        ptr = load_faiss().swig_ptr
        with translated("searching 4-bit codes"):
            self._engine.search_c(nq, ptr(queries), width, ptr(distances), ptr(positions))
        return positions

    def _first_width(self, want: int, allowed: Allowed | None) -> int:
        """Wide enough that, were the mask independent of the query, three standard deviations would do."""
        if allowed is None:
            return want
        return int((want + 3 * math.sqrt(want)) * self.n / allowed.count) + 1

    def _scan_wins(self, want: int, width: int, allowed: Allowed | None) -> bool:
        """Whether reading every allowed vector is cheaper than codes, candidates and rerank."""
        if 4 * width >= self.n:
            return True
        count, precision = self.n if allowed is None else allowed.count, self.table.precision
        reads = self.n * self._codes
        return scan_cost(count, self.dim, precision) < codes_cost(reads, width, want, self.dim, precision)
