"""Inverted lists of 4-bit codes without residuals, reranked by exact distance.

Visiting a list has a price of its own (``costs.LIST``). Up to ``WHOLE_ROWS`` rows a search that probes most of the
lists would be faster if there were none; so there the codes are kept a second time in one piece (half a byte a code),
and each search takes the cheaper way for its parameters.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from ..errors import EngineError
from ..types import FloatArray, IndexPlan, IntArray, Metric, Rows, SearchParams
from .base import Arrays, BuildJob, Index, chunks
from .bitmap import RowFilter
from .costs import LIST, WHOLE_ROWS, codes_cost, scan_cost
from .exact_scan import padded
from .faiss_helpers import aligned_bytes, check_codes, emptied, from_bytes, metric_of, quiet, to_bytes, with_rows
from .faiss_support import load_faiss, one_thread, translate_error
from .fastscan import CodeScan, candidate_width
from .sample import (
    ADD_ROWS,
    CODE_ROUNDS,
    CODE_TRAINING_POINTS,
    LIST_ROUNDS,
    POINTS_PER_LIST,
    code_shape,
    padded_columns,
    training_sample,
)
from .vector_table import VectorTable

__all__ = ["IVFIndex"]

_LIST_AFTER_LIST = 11
"""faiss' variant that scans list after list into a reservoir: a fifth faster for single queries (measured)."""


class IVFIndex(Index):
    """``plan.nlist`` lists; without ``nprobe`` a search probes all of them."""

    kind: ClassVar[str] = "ivf"

    def __init__(
        self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, lists: Any, whole: Any = None
    ) -> None:
        super().__init__(plan, metric, rows, table)
        self._lists = lists
        self._whole = None if whole is None else CodeScan(whole, table)
        self._columns = int(lists.d)
        self._codes = int(lists.pq.M)
        self._nlist = int(lists.nlist)

    @classmethod
    def build(cls, job: BuildJob) -> IVFIndex:
        table, plan = job.table(), job.plan
        if not 1 <= plan.nlist <= len(job.source):
            raise EngineError(f"nlist is {plan.nlist} with {len(job.source)} training vectors; keep the exact index")
        lists = job.reuse_from.emptied_engine() if isinstance(job.reuse_from, IVFIndex) else _trained(job)
        whole = _in_one_piece(lists) if table.n <= WHOLE_ROWS else None
        with translate_error("filling inverted lists"):
            for block in job.blocks(ADD_ROWS, lists.d):
                lists.add(block)
                if whole is not None:
                    whole.add(block)
        return cls(plan, job.metric, job.rows, table, lists, whole)

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> IVFIndex:
        rows = cls._rows_of(parts)
        table = cls._table_of(metric, rows, parts)
        lists = from_bytes(parts, "faiss", "IndexIVFPQFastScan", table.n, metric)
        check_codes(lists, table.dim)
        if lists.nlist != plan.nlist:
            raise EngineError(f"{lists.nlist} lists where the plan has {plan.nlist}; rebuild the index")
        whole = None
        if "whole" in parts:
            whole = from_bytes(parts, "whole", "IndexPQFastScan", table.n, metric)
            check_codes(whole, table.dim)
        return cls(plan, metric, rows, table, lists, whole)

    @property
    def nlist(self) -> int:
        return self._nlist

    @property
    def list_sizes(self) -> list[int]:
        inverted = self._lists.invlists
        return [int(inverted.list_size(i)) for i in range(self._nlist)]

    def emptied_engine(self) -> Any:
        """A copy of what was trained, without rows."""
        return emptied(self._lists)

    def _extended(self, rows: Rows) -> IVFIndex | None:
        table, whole = self.table.extended(rows.vectors), None
        lists = with_rows(self._lists, rows.vectors, ADD_ROWS)
        if self._whole is not None and self.n + len(rows.slots) <= WHOLE_ROWS:
            whole = with_rows(self._whole.engine, rows.vectors, ADD_ROWS)
        return IVFIndex(self.plan, self.metric, self._slot_table_with(rows), table, lists, whole)

    def _engine_parts(self) -> Arrays:
        parts: Arrays = {"faiss": to_bytes(self._lists)}
        if self._whole is not None:
            parts["whole"] = to_bytes(self._whole.engine)
        return parts

    def _engine_bytes(self) -> int:
        block = 32 * ((self._codes + 1) // 2)
        codes = sum(aligned_bytes(-(-size // 32) * block) for size in self.list_sizes)
        centroids = 4 * (self._nlist * self._columns + self._lists.pq.centroids.size())
        return int(codes + 8 * self.n + centroids) + (0 if self._whole is None else self._whole.nbytes)

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        """By the cheapest of three ways: the vectors, the codes in one piece, the lists."""
        want = candidate_width(k, params)
        nprobe = self._lists_to_probe(params, row_filter)
        count = self.n if row_filter is None else row_filter.count
        scan = scan_cost(count, self.dim)
        lists = self._lists_cost(want, nprobe)
        whole = math.inf if self._whole is None else self._whole.cost(want, row_filter)
        if want >= count or scan < min(lists, whole):
            return self.table.scan(queries, k, row_filter)
        if self._whole is not None and whole < lists:
            return self._whole.search(queries, k, want, row_filter)
        return self._search_lists(queries, k, (want, nprobe), row_filter)

    def _search_lists(
        self, queries: FloatArray, k: int, widths: tuple[int, int], row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        want, nprobe = widths
        distances, positions = padded(len(queries), k)
        for part in chunks(len(queries), 32 * want + 4 * self._nlist):
            mine = queries[part]
            candidates = self._candidates(mine, k, want, nprobe, row_filter)
            distances[part], positions[part] = self.table.rerank(mine, candidates, k)
        return distances, positions

    def _candidates(
        self, queries: FloatArray, k: int, want: int, nprobe: int, row_filter: RowFilter | None
    ) -> IntArray:
        """Candidates (nq, want); queries whose lists hold too few probe twice as many, finally all."""
        enough = min(k, self.n) if row_filter is None else min(want, row_filter.count)
        candidates = self._propose(queries, want, nprobe, row_filter)
        todo = np.flatnonzero(candidates[:, enough - 1] < 0)
        while todo.size and nprobe < self._nlist:
            nprobe = min(2 * nprobe, self._nlist)
            candidates[todo] = self._propose(queries[todo], want, nprobe, row_filter)
            todo = todo[candidates[todo, enough - 1] < 0]
        return candidates

    def _propose(self, queries: FloatArray, width: int, nprobe: int, row_filter: RowFilter | None) -> IntArray:
        """The ``width`` nearest allowed rows by codes, int64 (nq, width), -1 at the end where fewer were met."""
        faiss, nq = load_faiss(), len(queries)
        queries = padded_columns(queries, self._columns)
        distances, positions = np.empty((nq, width), np.float32), np.empty((nq, width), np.int64)
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = nprobe
        selector = None if row_filter is None else row_filter.bitmap(faiss)
        parameters.sel = selector
        ptr = faiss.swig_ptr
        with translate_error("searching inverted lists"):
            self._lists.search_c(nq, ptr(queries), width, ptr(distances), ptr(positions), parameters)
        return positions

    def _lists_to_probe(self, params: SearchParams, row_filter: RowFilter | None) -> int:
        """``params.nprobe`` lists, all of them for 0; more under a filter, whose results lie further away."""
        wanted = min(params.nprobe or self._nlist, self._nlist)
        if row_filter is None:
            return wanted
        return min(self._nlist, math.ceil(wanted * math.sqrt(self.n / row_filter.count)))

    def _lists_cost(self, want: int, nprobe: int) -> float:
        reads = self.n * nprobe / self._nlist * self._codes + nprobe * LIST + scan_cost(self._nlist, self.dim)
        return codes_cost(reads, want, want, self.dim)


def _trained(job: BuildJob) -> Any:
    """An empty, trained index that owns its coarse quantiser."""
    faiss, nlist = load_faiss(), job.plan.nlist
    codes, width = code_shape(job.plan, job.rows.vectors.shape[1])
    limit = max(CODE_TRAINING_POINTS, POINTS_PER_LIST * nlist)
    sample = padded_columns(training_sample(job.source, limit, job.seed), width)
    kind = metric_of(faiss, job.metric)
    job.progress("train", 0.0)
    with translate_error("training inverted lists"), one_thread():
        quantiser = faiss.IndexFlat(width, kind)
        lists = faiss.IndexIVFPQFastScan(quantiser, width, nlist, codes, 4, kind)
        quantiser.this.disown()
        lists.own_fields = True
        lists.by_residual = False
        lists.implem = _LIST_AFTER_LIST
        quiet(lists.cp, job.seed, LIST_ROUNDS)
        quiet(lists.pq.cp, job.seed, CODE_ROUNDS)
        lists.train(sample)
    job.progress("train", 1.0)
    return lists


def _in_one_piece(lists: Any) -> Any:
    """An empty index without lists that shares their codes' centroids."""
    faiss = load_faiss()
    whole = faiss.IndexPQFastScan(lists.d, lists.pq.M, 4, lists.metric_type)
    faiss.copy_array_to_vector(faiss.vector_to_array(lists.pq.centroids), whole.pq.centroids)
    whole.is_trained = True
    return whole
