"""Inverted lists of 4-bit codes without residuals, reranked by exact distance."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from ..errors import EngineError
from ..types import Effort, FloatArray, IndexPlan, IntArray, Metric, Rows
from .allowed import Allowed
from .base import Arrays, Body, BuildJob, chunks
from .costs import LIST, codes_cost, scan_cost
from .engine import aligned_bytes, check_codes, emptied, from_bytes, metric_of, quiet, to_bytes
from .faiss_door import load_faiss, one_thread, translated
from .rerank import VectorTable
from .sample import (
    CODE_TRAINING_POINTS,
    POINTS_PER_LIST,
    default_codes,
    padded_columns,
    padded_dim,
    training_sample,
)
from .scan import padded
from .two_stage import ADD_ROWS, candidate_width

__all__ = ["IVFBody"]

_LIST_AFTER_LIST = 11
"""faiss' variant that scans list after list into a reservoir: a fifth faster for single queries (measured)."""


class IVFBody(Body):
    """``plan.nlist`` lists; an effort without ``nprobe`` probes all of them."""

    kind: ClassVar[str] = "ivf"

    def __init__(self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, engine: Any) -> None:
        super().__init__(plan, metric, rows, table)
        self._engine = engine
        self._width = int(engine.d)
        self._codes = int(engine.pq.M)
        self._nlist = int(engine.nlist)

    @classmethod
    def build(cls, job: BuildJob) -> IVFBody:
        table, plan = job.table(), job.plan
        if not 1 <= plan.nlist <= len(job.source):
            raise EngineError(f"nlist is {plan.nlist} with {len(job.source)} training vectors; keep the exact body")
        width = padded_dim(table.dim, _codes(plan, table.dim))
        engine = job.like.emptied_engine() if isinstance(job.like, IVFBody) else cls._fresh(job, width)
        with translated("filling inverted lists"):
            for block in job.blocks(ADD_ROWS, width):
                engine.add(block)
        return cls(plan, job.metric, job.rows, table, engine)

    @staticmethod
    def _fresh(job: BuildJob, width: int) -> Any:
        plan = job.plan
        limit = max(CODE_TRAINING_POINTS, POINTS_PER_LIST * plan.nlist)
        sample = padded_columns(training_sample(job.source, limit, job.seed), width)
        job.progress("train", 0.0)
        with translated("training inverted lists"), one_thread():
            engine = _trained(job, sample, _codes(plan, job.rows.vectors.shape[1]))
        job.progress("train", 1.0)
        return engine

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> IVFBody:
        rows = cls._rows_of(parts)
        table = cls._table_of(plan, metric, rows, parts)
        engine = from_bytes(parts, "IndexIVFPQFastScan", table.n, metric)
        check_codes(engine, table.dim)
        if engine.nlist != plan.nlist:
            raise EngineError(f"{engine.nlist} lists where the plan has {plan.nlist}; rebuild the index")
        return cls(plan, metric, rows, table, engine)

    @property
    def nlist(self) -> int:
        return self._nlist

    def emptied_engine(self) -> Any:
        """A copy of what was trained, without rows."""
        return emptied(self._engine)

    def _engine_parts(self) -> Arrays:
        return {"faiss": to_bytes(self._engine)}

    def _engine_bytes(self) -> int:
        engine = self._engine
        lists = engine.invlists
        block = 32 * ((engine.pq.M + 1) // 2)
        codes = sum(aligned_bytes(-(-lists.list_size(i) // 32) * block) for i in range(self._nlist))
        centroids = self._nlist * self._width * 4 + engine.pq.centroids.size() * 4
        return int(codes + 8 * self.n + centroids)

    def _search(
        self, queries: FloatArray, k: int, effort: Effort, allowed: Allowed | None
    ) -> tuple[FloatArray, IntArray]:
        want = candidate_width(k, effort)
        nprobe = self._lists_to_probe(effort, allowed)
        if self._scan_wins(want, nprobe, allowed):
            return self.table.scan(queries, k, allowed)
        nq = len(queries)
        distances, positions = padded(nq, k)
        for part in chunks(nq, 32 * want + 4 * self.nlist):
            mine = queries[part]
            candidates = self._candidates(mine, k, want, nprobe, allowed)
            distances[part], positions[part] = self.table.rerank(mine, candidates, k)
        return distances, positions

    def _candidates(self, queries: FloatArray, k: int, want: int, nprobe: int, allowed: Allowed | None) -> IntArray:
        """Candidates (nq, want); queries whose lists hold too few probe twice as many, finally all."""
        enough = min(k, self.n) if allowed is None else min(want, allowed.count)
        candidates = self._propose(queries, want, nprobe, allowed)
        todo = np.flatnonzero(candidates[:, enough - 1] < 0)
        while todo.size and nprobe < self._nlist:
            nprobe = min(2 * nprobe, self._nlist)
            candidates[todo] = self._propose(queries[todo], want, nprobe, allowed)
            todo = todo[candidates[todo, enough - 1] < 0]
        return candidates

    def _propose(self, queries: FloatArray, width: int, nprobe: int, allowed: Allowed | None) -> IntArray:
        """The ``width`` nearest allowed rows by codes, int64 (nq, width), -1 at the end where fewer were met."""
        faiss, nq = load_faiss(), len(queries)
        queries = padded_columns(queries, self._width)
        distances, positions = np.empty((nq, width), np.float32), np.empty((nq, width), np.int64)
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = nprobe
        selector = None if allowed is None else allowed.bitmap(faiss)
        parameters.sel = selector
        ptr = faiss.swig_ptr
        with translated("searching inverted lists"):
            self._engine.search_c(nq, ptr(queries), width, ptr(distances), ptr(positions), parameters)
        return positions

    def _lists_to_probe(self, effort: Effort, allowed: Allowed | None) -> int:
        """The effort's lists, all of them where it names none; more under a mask, whose results lie further away."""
        wanted = min(effort.nprobe or self._nlist, self._nlist)
        if allowed is None:
            return wanted
        return min(self._nlist, math.ceil(wanted * math.sqrt(self.n / allowed.count)))

    def _scan_wins(self, want: int, nprobe: int, allowed: Allowed | None) -> bool:
        """Whether reading every allowed vector is cheaper than lists, codes and rerank."""
        count, precision = self.n if allowed is None else allowed.count, self.table.precision
        if want >= count:
            return True
        reads = (
            self.n * nprobe / self._nlist * self._codes + nprobe * LIST + scan_cost(self._nlist, self.dim, "float32")
        )
        return scan_cost(count, self.dim, precision) < codes_cost(reads, want, want, self.dim, precision)


def _codes(plan: IndexPlan, dim: int) -> int:
    return min(plan.codes or default_codes(dim), dim)


def _trained(job: BuildJob, sample: FloatArray, codes: int) -> Any:
    """An empty, trained index that owns its coarse quantiser."""
    faiss = load_faiss()
    width, nlist, kind = sample.shape[1], job.plan.nlist, metric_of(faiss, job.metric)
    quantiser = faiss.IndexFlat(width, kind)
    engine = faiss.IndexIVFPQFastScan(quantiser, width, nlist, codes, 4, kind)
    quantiser.this.disown()
    engine.own_fields = True
    engine.by_residual = False
    engine.implem = _LIST_AFTER_LIST
    quiet(engine.cp, job.seed)
    quiet(engine.pq.cp, job.seed)
    engine.train(sample)
    return engine
