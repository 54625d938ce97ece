"""Two-stage search: 4-bit product quantisation (FAISS fast-scan) proposes, exact distances decide."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from ..types import FaissIndex, FloatArray, IndexPlan, IntArray, Metric, Rows, SearchParams
from .base import Arrays, BuildJob, Index, Parts, chunks
from .bitmap import RowFilter
from .codes import Codes, with_room
from .costs import codes_cost, scan_cost
from .exact_scan import padded
from .faiss_helpers import in_one_piece, metric_of, quiet
from .faiss_support import load_faiss, one_thread, translate_error
from .sample import ADD_ROWS, CODE_ROUNDS, CODE_TRAINING_POINTS, code_shape, padded_columns, training_sample
from .vector_table import VectorTable


def candidate_width(k: int, params: SearchParams) -> int:
    """How many candidates are reranked: ``params.rerank``, but at least 2k; by default 60 + 4k.

    On 39,320 real embeddings 60 + 4k reached recall 0.996 to 1.0 for k from 1 to 100, in distribution and out of it.
    """
    return max(params.rerank or 60 + 4 * k, 2 * k)


WIDER = 4
"""By how much a search goes on for queries that are not sure of their results."""
_LATE_SHARE, _STRICT_FROM = 10, 20
"""A query is not sure once more than a tenth of its results lie in the further half of its candidates; from twenty
candidates a result on, which high targets take, once any of them does."""


def unsure(candidates: IntArray, positions: IntArray, k: int) -> list[int]:
    """The queries whose results lie so late among their candidates that some were probably cut off.

    Codes put the true neighbours of most queries first. Where they do not, because a query is unlike the vectors that
    they were trained on, the results spread over all candidates, which shows without any truth. What it brings is
    in docs/decisions/0008-quarter-codes-held-once.md, measured by ``benchmarks/unsure.py``.

    Args:
        candidates: int64 (nq, r), nearest by their codes first.
        positions: int64 (nq, k), those of them that are nearest.
        k: results per query.
    """
    width = candidates.shape[1]
    half, allowed = width // 2, 0 if width >= _STRICT_FROM * k else k // _LATE_SHARE
    found = []
    for query, (mine, best) in enumerate(zip(candidates, positions, strict=True)):
        if mine[-1] >= 0 and len(set(best.tolist()).intersection(mine[half:].tolist())) > allowed:
            found.append(query)
    return found


class CodeScan:
    """The first stage over all rows of ``table``, and the second through it.

    faiss scans codes without a filter, so under one it proposes more and more rows until enough of them
    are allowed or a scan of the allowed rows is cheaper.
    """

    def __init__(self, codes: Codes, table: VectorTable) -> None:
        self.codes = codes
        self.table = table
        self._reads = float(table.n * codes.m)

    def nearest(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        """The k nearest allowed rows of each query (nq, dim), by codes or by a scan, whichever is cheaper."""
        want = candidate_width(k, params)
        count = self.table.n if row_filter is None else row_filter.count
        if scan_cost(count, self.table.dim) < self._cost(want, self._first_width(want, row_filter)):
            return self.table.scan(queries, k, row_filter)
        return self.search(queries, k, params, row_filter)

    def search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        """The k nearest allowed rows of each query (nq, dim), by codes."""
        want = candidate_width(k, params)
        if len(queries) == 1 and row_filter is None:
            return self._reranked(queries, self.codes.nearest(queries, want), k, params, None)
        distances, positions = padded(len(queries), k)
        width = self._first_width(want, row_filter)
        for part in chunks(len(queries), 32 * width):
            mine = queries[part]
            candidates, starved = self._candidates(mine, want, width, row_filter)
            distances[part], positions[part] = self._reranked(mine, candidates, k, params, row_filter)
            if starved.size:
                rows = part.start + starved
                distances[rows], positions[rows] = self.table.scan(queries[rows], k, row_filter)
        return distances, positions

    def _candidates(
        self, queries: FloatArray, want: int, width: int, row_filter: RowFilter | None
    ) -> tuple[IntArray, IntArray]:
        """Candidates (nq, want), fewer columns where fewer rows are allowed, and the queries that found too few."""
        if row_filter is None:
            return self.codes.nearest(queries, want), np.empty(0, np.int64)
        if len(queries) == 1:
            proposed = self.codes.nearest(queries, width)
            allowed = proposed[row_filter.test(proposed)][:want]
            if allowed.size >= min(want, row_filter.count):
                return allowed[None], np.empty(0, np.int64)
        return self._allowed_candidates(queries, want, width, row_filter)

    def _reranked(
        self, queries: FloatArray, candidates: IntArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        """The k nearest of the candidates (nq, want); queries that are not sure of theirs take more candidates."""
        distances, positions = self.table.rerank(queries, candidates, k)
        more = unsure(candidates, positions, k) if params.goes_on else []
        if more:
            wider = SearchParams(rerank=WIDER * candidates.shape[1])
            distances[more], positions[more] = self.nearest(queries[more], k, wider, row_filter)
        return distances, positions

    def _allowed_candidates(
        self, queries: FloatArray, want: int, width: int, row_filter: RowFilter
    ) -> tuple[IntArray, IntArray]:
        """Candidates (nq, want), and the queries for which too few were found before a scan became cheaper."""
        candidates = np.full((len(queries), want), -1, np.int64)
        enough, todo = min(want, row_filter.count), np.arange(len(queries))
        scan = scan_cost(row_filter.count, self.table.dim)
        while todo.size and self._cost(want, width) < scan:
            proposed = self.codes.nearest(queries[todo], width)
            hits = row_filter.test(proposed)
            short = []
            for row, own, hit in zip(todo.tolist(), proposed, hits, strict=True):
                kept = own[hit][:want]
                candidates[row, : kept.size] = kept
                if kept.size < enough:
                    short.append(row)
            todo = np.asarray(short, dtype=np.int64)
            width *= 2
        return candidates, todo

    def _first_width(self, want: int, row_filter: RowFilter | None) -> int:
        """Wide enough that, were the mask independent of the query, three standard deviations would do."""
        if row_filter is None:
            return want
        return int((want + 3 * math.sqrt(want)) * self.table.n / row_filter.count) + 1

    def _cost(self, want: int, width: int) -> float:
        if 4 * width >= self.table.n:
            return math.inf
        return codes_cost(self._reads, width, want, self.table.dim)


class TwoStageIndex(Index):
    """4-bit codes over all rows, no lists."""

    kind: ClassVar[str] = "two_stage"

    def __init__(self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, codes: Codes) -> None:
        super().__init__(plan, metric, rows, table)
        self._codes = CodeScan(codes, table)

    @classmethod
    def build(cls, job: BuildJob) -> TwoStageIndex:
        table = job.table()
        engine = job.reuse_from.emptied_engine() if isinstance(job.reuse_from, TwoStageIndex) else _trained(job)
        with translate_error("adding 4-bit codes"):
            with_room(engine, table.n)
            for block in job.blocks(ADD_ROWS, engine.d):
                engine.add(block)
        return cls(job.plan, job.metric, job.rows, table, Codes.of(engine))

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> TwoStageIndex:
        rows, table = cls._stored(metric, parts)
        return cls(plan, metric, rows, table, Codes.from_parts(parts, "faiss", table.n, table.dim, metric))

    def emptied_engine(self) -> FaissIndex:
        """A copy of what was trained, without rows."""
        return in_one_piece(self._codes.codes.trained)

    def candidates(self, queries: FloatArray, width: int) -> IntArray:
        return self._codes.codes.nearest(queries, width)

    def _extended(self, rows: Rows) -> TwoStageIndex | None:
        table = self.table.extended(rows.vectors)
        codes = self._codes.codes.extended(table.vectors)
        return TwoStageIndex(self.plan, self.metric, self.slot_table_with(rows), table, codes)

    def _engine_parts(self) -> Parts:
        return self._codes.codes.parts("faiss")

    def _engine_bytes(self) -> int:
        return self._codes.codes.nbytes

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        return self._codes.nearest(queries, k, params, row_filter)


def _trained(job: BuildJob) -> FaissIndex:
    """An empty index whose codes are trained."""
    faiss = load_faiss()
    codes, width = code_shape(job.plan, job.rows.vectors.shape[1])
    sample = padded_columns(training_sample(job.source, CODE_TRAINING_POINTS, job.seed), width)
    job.progress("train", 0.0)
    with translate_error("training 4-bit codes"), one_thread():
        engine = faiss.IndexPQFastScan(width, codes, 4, metric_of(faiss, job.metric))
        quiet(engine.pq.cp, job.seed, CODE_ROUNDS)
        engine.train(sample)
    job.progress("train", 1.0)
    return engine
