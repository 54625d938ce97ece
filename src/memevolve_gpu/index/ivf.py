"""Inverted lists and 4-bit codes without residuals, reranked by exact distance.

The codes are held once. Up to ``WHOLE_ROWS`` rows they lie in one piece, which is read faster than most of the lists
are visited, one after another; of the lists an index then holds the centroids and the list of each row. Above that the
codes lie in the lists.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..types import FaissIndex, FloatArray, IndexPlan, IntArray, Metric, Rows, SearchParams
from .base import CENTROIDS, Arrays, BuildJob, Index, Parts, chunks, part
from .bitmap import RowFilter
from .codes import Codes, with_room
from .costs import WHOLE_ROWS, lists_cost, scan_cost
from .exact_scan import padded
from .faiss_helpers import (
    Serialised,
    aligned_bytes,
    check_codes,
    from_bytes,
    in_one_piece,
    metric_of,
    quiet,
    searched,
    with_rows,
)
from .faiss_support import load_faiss, one_thread, translate_error
from .fastscan import WIDER, CodeScan, candidate_width, unsure
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
from .vector_table import VectorTable, growable, grown, in_memory

_LIST_AFTER_LIST = 11
"""faiss' variant that scans list after list into a reservoir: a fifth faster for single queries (measured)."""


_NO_ROWS, _NO_CENTROIDS = np.empty(0, np.int32), np.empty((0, 0), np.float32)


class IVFIndex(Index):
    """``plan.nlist`` lists; without ``nprobe`` a search probes all of them.

    Either ``lists`` holds the codes, or ``codes`` do, in one piece; then ``assigned`` int32 (n,) is the list of each
    row, and ``centroids`` float32 (nlist, columns) are those of the lists, else both are empty.
    """

    kind: ClassVar[str] = "ivf"

    def __init__(
        self,
        plan: IndexPlan,
        metric: Metric,
        rows: Rows,
        table: VectorTable,
        *,
        lists: FaissIndex = None,
        codes: Codes | None = None,
        assigned: npt.NDArray[np.int32] = _NO_ROWS,
        centroids: FloatArray = _NO_CENTROIDS,
    ) -> None:
        super().__init__(plan, metric, rows, table)
        self._lists, self._assigned, self._centroids = lists, assigned, centroids
        self._whole = None if codes is None else CodeScan(codes, table)
        self._columns, self._codes = (int(lists.d), int(lists.pq.M)) if codes is None else (codes.columns, codes.m)
        self._nlist = int(lists.nlist) if codes is None else len(centroids)

    @classmethod
    def build(cls, job: BuildJob) -> IVFIndex:
        table, plan = job.table(), job.plan
        if not 1 <= plan.nlist <= len(job.source):
            raise EngineError(f"nlist is {plan.nlist} with {len(job.source)} training vectors; keep the exact index")
        lists = job.reuse_from.emptied_engine() if isinstance(job.reuse_from, IVFIndex) else _trained(job)
        with translate_error("filling inverted lists"):
            if table.n > WHOLE_ROWS:
                for block in job.blocks(ADD_ROWS, lists.d):
                    lists.add(block)
                return cls(plan, job.metric, job.rows, table, lists=lists)
            engine, assigned = with_room(in_one_piece(lists), table.n), growable((table.n,), np.int32)
            for start, block in zip(range(0, table.n, ADD_ROWS), job.blocks(ADD_ROWS, lists.d), strict=True):
                engine.add(block)
                assigned[start : start + len(block)] = _nearest_lists(lists, block)
        centroids, codes = lists.quantizer.reconstruct_n(0, lists.nlist), Codes.of(engine)
        return cls(plan, job.metric, job.rows, table, codes=codes, assigned=assigned, centroids=centroids)

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> IVFIndex:
        rows, table = cls._stored(metric, parts)
        if "faiss" in parts:
            lists = from_bytes(parts, "faiss", "IndexIVFPQFastScan", table.n, metric)
            check_codes(lists, table.dim)
            if lists.nlist != plan.nlist:
                raise EngineError(f"{lists.nlist} lists where the plan has {plan.nlist}; rebuild the index")
            return cls(plan, metric, rows, table, lists=lists)
        codes = Codes.from_parts(parts, "codes", table.n, table.dim, metric)
        centroids = part(parts, CENTROIDS, np.float32, (plan.nlist, codes.columns))
        assigned = part(parts, "assigned", np.int32, (table.n,))
        if table.n and not 0 <= int(assigned.min()) <= int(assigned.max()) < plan.nlist:
            raise EngineError(f"rows of lists beyond the {plan.nlist} of the plan; rebuild the index")
        return cls(plan, metric, rows, table, codes=codes, assigned=assigned, centroids=centroids)

    @property
    def nlist(self) -> int:
        return self._nlist

    @property
    def reads_lists(self) -> bool:
        return self._whole is None

    @property
    def list_sizes(self) -> list[int]:
        if self._whole is not None:
            sizes: list[int] = np.bincount(self._assigned, minlength=self._nlist).tolist()
            return sizes
        inverted = self._lists.invlists
        return [int(inverted.list_size(i)) for i in range(self._nlist)]

    def emptied_engine(self) -> FaissIndex:
        """A copy of what was trained, without rows."""
        faiss, lists = load_faiss(), _new_lists(self._columns, self._nlist, self._codes, self.metric)
        with translate_error("taking over trained quantisers"):
            if self._whole is None:
                trained, centroids = self._lists, self._lists.quantizer.reconstruct_n(0, self._nlist)
            else:
                trained, centroids = self._whole.codes.trained, np.ascontiguousarray(self._centroids)
            lists.quantizer.add(centroids)
            faiss.copy_array_to_vector(faiss.vector_to_array(trained.pq.centroids), lists.pq.centroids)
        lists.is_trained = True
        return lists

    def moved_to(self, arrays: Arrays) -> None:
        if self._whole is not None:
            self._centroids = part(arrays, CENTROIDS, np.float32, self._centroids.shape)
            self._assigned = part({"assigned": self._assigned} | arrays, "assigned", np.int32, (self.n,))
        super().moved_to(arrays)

    def candidates(self, queries: FloatArray, width: int) -> IntArray | None:
        return None if self._whole is None else self._whole.codes.nearest(queries, width)

    def _extended(self, rows: Rows) -> IVFIndex | None:
        if self._whole is not None and self.n + len(rows.slots) > WHOLE_ROWS:
            return None
        table, slots = self.table.extended(rows.vectors), self.slot_table_with(rows)
        if self._whole is None:
            return IVFIndex(self.plan, self.metric, slots, table, lists=with_rows(self._lists, rows.vectors, ADD_ROWS))
        lists = self.emptied_engine()
        with translate_error("assigning rows to lists"), one_thread():
            new = _nearest_lists(lists, padded_columns(rows.vectors, self._columns))
        return IVFIndex(
            self.plan,
            self.metric,
            slots,
            table,
            codes=self._whole.codes.extended(table.vectors),
            assigned=grown(self._assigned, new),
            centroids=self._centroids,
        )

    def _engine_parts(self) -> Parts:
        if self._whole is None:
            return {"faiss": Serialised(self._lists)}
        own: Arrays = {"assigned": self._assigned, CENTROIDS: self._centroids}
        return own | self._whole.codes.parts("codes")

    def _engine_bytes(self) -> int:
        if self._whole is not None:
            return self._whole.codes.nbytes + in_memory(self._assigned) + in_memory(self._centroids)
        block = 32 * ((self._codes + 1) // 2)
        codes = sum(aligned_bytes(-(-size // 32) * block) for size in self.list_sizes)
        centroids = 4 * (self._nlist * self._columns + self._lists.pq.centroids.size())
        return int(codes + 8 * self.n + centroids)

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        if self._whole is not None:
            return self._whole.nearest(queries, k, params, row_filter)
        nprobe = self._lists_to_probe(params, row_filter)
        return self._search_lists(queries, k, replace(params, nprobe=nprobe), row_filter)

    def _search_lists(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        """The nearest in ``params.nprobe`` lists; queries that are not sure of theirs take more lists and rows."""
        want, nprobe = candidate_width(k, params), params.nprobe
        count = self.n if row_filter is None else row_filter.count
        if want >= count or scan_cost(count, self.dim) < self._lists_cost(want, nprobe):
            return self.table.scan(queries, k, row_filter)
        distances, positions = padded(len(queries), k)
        for chunk in chunks(len(queries), 32 * want + 4 * self._nlist):
            mine = queries[chunk]
            candidates = self._candidates(mine, k, want, nprobe, row_filter)
            distances[chunk], positions[chunk] = self.table.rerank(mine, candidates, k)
            more = unsure(candidates, positions[chunk], k) if params.goes_on else []
            if more:
                rows = chunk.start + np.array(more, np.int64)
                wider = SearchParams(min(2 * nprobe, self._nlist), WIDER * want)
                distances[rows], positions[rows] = self._search_lists(queries[rows], k, wider, row_filter)
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
        faiss = load_faiss()
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = nprobe
        selector = None if row_filter is None else row_filter.bitmap(faiss)
        parameters.sel = selector
        padded = padded_columns(queries, self._columns)
        return searched(self._lists, padded, width, "searching inverted lists", parameters)[1]

    def _lists_to_probe(self, params: SearchParams, row_filter: RowFilter | None) -> int:
        """``params.nprobe`` lists, all of them for 0; more under a filter, whose results lie further away."""
        wanted = min(params.nprobe or self._nlist, self._nlist)
        if row_filter is None:
            return wanted
        return min(self._nlist, math.ceil(wanted * math.sqrt(self.n / row_filter.count)))

    def _lists_cost(self, want: int, nprobe: int) -> float:
        return lists_cost(self.n, self.dim, self._codes, (nprobe, self._nlist), want)


def _trained(job: BuildJob) -> FaissIndex:
    """An empty, trained index that owns its coarse quantiser."""
    nlist = job.plan.nlist
    codes, width = code_shape(job.plan, job.rows.vectors.shape[1])
    limit = max(CODE_TRAINING_POINTS, POINTS_PER_LIST * nlist)
    sample = padded_columns(training_sample(job.source, limit, job.seed), width)
    job.progress("train", 0.0)
    with translate_error("training inverted lists"), one_thread():
        lists = _new_lists(width, nlist, codes, job.metric)
        quiet(lists.cp, job.seed, LIST_ROUNDS)
        quiet(lists.pq.cp, job.seed, CODE_ROUNDS)
        lists.train(sample)
    job.progress("train", 1.0)
    return lists


def _nearest_lists(lists: FaissIndex, block: FloatArray) -> npt.NDArray[np.int32]:
    """The list of each row of float32 (m, columns), int32 (m,); the first for a damaged row, which is near none."""
    found: npt.NDArray[np.int32] = np.maximum(lists.quantizer.assign(block, 1)[:, 0], 0).astype(np.int32)
    return found


def _new_lists(width: int, nlist: int, codes: int, metric: Metric) -> FaissIndex:
    """An index that is not trained and owns its coarse quantiser."""
    faiss = load_faiss()
    kind = metric_of(faiss, metric)
    quantiser = faiss.IndexFlat(width, kind)
    lists = faiss.IndexIVFPQFastScan(quantiser, width, nlist, codes, 4, kind)
    quantiser.this.disown()
    lists.own_fields = True
    lists.by_residual = False
    lists.implem = _LIST_AFTER_LIST
    return lists
