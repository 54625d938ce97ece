"""The base of the faiss GPU indexes: fetch on the device, filter on the host, fetch more when needed, rerank exactly.

Distances of the device are never returned: a flat index expands the square and cancels, narrow codes are rounded. They
propose a few more rows than wanted, and the host's vectors decide among them. The flat index is here too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ...errors import DeviceError
from ...types import DeviceIncident, FloatArray, IndexPlan, IntArray, Metric, Precision, Rows, SearchParams
from ..base import Arrays, BuildJob, Index, chunks
from ..bitmap import RowFilter
from ..device_failover import DeviceFailover
from ..faiss_helpers import metric_of
from ..sample import ADD_ROWS
from ..vector_table import VectorTable
from .resources import GpuIndexHandle, resources_of
from .sizes import MOST, TEMPORARY_BYTES, flat_bytes, flat_query_bytes, plan_device_bytes

_SPARE: dict[Precision, tuple[int, int]] = {"float32": (1, 16), "float16": (2, 16), "int8": (4, 32)}
"""Candidates for so many results, as (times, plus): rounding reorders near neighbours. Search parameters may ask for
fewer; they ask for more than these for coarser codes, so only int8 follows them."""
_SLACK = 1.2
"""Rows that pass a filter are not spread evenly: the first fetch is larger than their share by this factor."""
_LABEL_BYTES = 32
"""Host bytes for each row fetched: its number, twice, its order, and whether it may be returned."""
_USUAL_K = 10


@dataclass(frozen=True, slots=True)
class Fetch:
    """``want`` candidates a query, ``enough`` of which end the search; ``fetch`` rows from ``nprobe`` lists."""

    want: int
    enough: int
    fetch: int
    nprobe: int = 0


class FaissGpuIndex(Index):
    """Searches on ``plan.device``; the host answers by an exact scan when the device cannot."""

    def __init__(
        self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, handle: GpuIndexHandle | None
    ) -> None:
        """``handle`` is the index on the device, None for an index without rows."""
        super().__init__(plan, metric, rows, table)
        self._handle = handle
        self._failover = DeviceFailover(plan.device if handle is None else handle.gpu_resources.name)
        self._warm_up()

    @property
    def device(self) -> str:
        return self.plan.device if self._handle is not None and self._failover.serving else "cpu"

    @property
    def device_bytes(self) -> int:
        return 0 if self._handle is None else self._handle.nbytes

    @property
    def handle(self) -> GpuIndexHandle | None:
        """The index on the device, for benchmarks of faiss alone; None for an index without rows."""
        return self._handle

    def incidents(self) -> list[DeviceIncident]:
        return self._failover.incidents()

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        fetch = self._first_fetch(k, params, row_filter)
        if fetch is None or not len(queries):
            return self.table.scan(queries, k, row_filter)
        found = self._candidates(queries, fetch, row_filter)
        if found is None:
            return self.table.scan(queries, k, row_filter)
        candidates, starved = found
        distances, positions = self.table.rerank(queries, candidates, k)
        if starved.size:
            short = np.ascontiguousarray(queries[starved])
            distances[starved], positions[starved] = self.table.scan(short, k, row_filter)
        return distances, positions

    @abstractmethod
    def _probes(self, params: SearchParams, row_filter: RowFilter | None) -> int | None:
        """Lists to probe at first, 0 where there are none; None where only the host can answer."""

    @abstractmethod
    def _wider(self, fetch: Fetch, exhausted: bool) -> Fetch | None:
        """The next fetch where too few were found; ``exhausted``: every row that was looked at was returned."""

    @abstractmethod
    def _query_bytes(self, fetch: Fetch) -> int:
        """Scratch bytes of one query on the device."""

    def _plan_with(self, table: VectorTable) -> IndexPlan:
        """The plan of an index like this with the rows of ``table``."""
        return replace(self.plan, device_bytes=plan_device_bytes(self.plan, table.n, table.dim))

    def _warm_up(self) -> None:
        """Search once at the usual size: kernel code is loaded while there is memory, and no user waits for it."""
        fetch = self._first_fetch(_USUAL_K, SearchParams(), None)
        if fetch is not None:
            self._propose(self.vectors_at(np.zeros(1, np.int64)), fetch)

    def _parameters(self, fetch: Fetch) -> Any:
        """Search parameters of faiss, made under the device's lock."""
        del fetch

    def _first_fetch(self, k: int, params: SearchParams, row_filter: RowFilter | None) -> Fetch | None:
        """The first fetch; None where the device cannot return as many, or a scan of the few allowed rows is faster."""
        nprobe = self._probes(params, row_filter)
        if self._handle is None or nprobe is None:
            return None
        count = self.n if row_filter is None else row_filter.count
        times, plus = _SPARE[self.plan.precision]
        spare = k * times + plus
        requested = params.rerank or spare
        want = min(max(k, requested if self.plan.precision == "int8" else min(requested, spare)), MOST, count)
        fetch = want if row_filter is None else int(want * self.n / count * _SLACK) + 1
        if k > MOST or (fetch > MOST and count < self.n):
            return None
        enough = min(k, count) if row_filter is None else want
        return Fetch(want, enough, min(fetch, self.n, MOST), nprobe)

    def _candidates(
        self, queries: FloatArray, fetch: Fetch, row_filter: RowFilter | None
    ) -> tuple[IntArray, IntArray] | None:
        """Candidates int64 (nq, want), -1 at the end of a row, and the queries that only the host can serve; None where
        the device does not answer."""
        candidates: IntArray = np.full((len(queries), fetch.want), -1, np.int64)
        todo: IntArray = np.arange(len(queries))
        step: Fetch | None = fetch
        while todo.size and step is not None:
            short, exhausted = np.zeros(todo.size, np.bool_), step.fetch >= self.n
            for part in chunks(todo.size, _LABEL_BYTES * step.fetch):
                rows = todo[part]
                labels = self._propose(queries[rows], step)
                if labels is None:
                    return None
                good = _good(labels, self.n, row_filter)
                candidates[rows] = _packed(labels, good, fetch.want)
                short[part] = good.sum(axis=1) < fetch.enough
                exhausted = exhausted or bool((labels[short[part], -1] < 0).any())
            todo, step = todo[short], self._wider(step, exhausted)
        return candidates, todo

    def _propose(self, queries: FloatArray, fetch: Fetch) -> IntArray | None:
        """The nearest ``fetch.fetch`` rows by what the device holds, int64 (nq, fetch), -1 where fewer were met; None
        where the device does not answer."""
        tile = max(1, TEMPORARY_BYTES // self._query_bytes(fetch))
        most = min(tile, len(queries))
        return self._failover.attempt(lambda batch: self._in_batches(queries, fetch, batch), most)

    def _in_batches(self, queries: FloatArray, fetch: Fetch, batch: int) -> IntArray:
        labels: IntArray = np.empty((len(queries), fetch.fetch), np.int64)
        for at in range(0, len(queries), batch):
            part = slice(at, at + batch)
            labels[part] = self._on_device(np.ascontiguousarray(queries[part]), fetch)
        return labels

    def _on_device(self, queries: FloatArray, fetch: Fetch) -> IntArray:
        if self._handle is None:
            raise DeviceError(f"{self.plan.device} holds no rows of this index")
        gpu_resources, engine, nq = self._handle.gpu_resources, self._handle.engine, len(queries)
        distances, labels = np.empty((nq, fetch.fetch), np.float32), np.empty((nq, fetch.fetch), np.int64)
        with gpu_resources.searching(self._shape(nq, fetch)):
            ptr = gpu_resources.faiss.swig_ptr
            engine.search_c(nq, ptr(queries), fetch.fetch, ptr(distances), ptr(labels), self._parameters(fetch))
        return labels

    def _shape(self, nq: int, fetch: Fetch) -> Hashable:
        """What roughly decides which kernels a search launches."""
        sizes = (self.n, nq, fetch.fetch - 1, fetch.nprobe)
        return self.kind, self.metric, self.plan.precision, self.dim, *(size.bit_length() for size in sizes)


def doubled(fetch: Fetch, n: int) -> Fetch | None:
    """Twice as many rows of as many lists; None where the device gives no more."""
    most = min(n, MOST)
    return None if fetch.fetch >= most else replace(fetch, fetch=min(2 * fetch.fetch, most))


def _good(labels: IntArray, n: int, row_filter: RowFilter | None) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which labels are rows that may be returned."""
    real: np.ndarray[Any, np.dtype[np.bool_]] = (labels >= 0) & (labels < n)
    return real if row_filter is None else real & row_filter.test(np.where(real, labels, -1))


def _packed(labels: IntArray, good: np.ndarray[Any, np.dtype[np.bool_]], want: int) -> IntArray:
    """The first ``want`` good labels of each row, in their order, -1 behind them."""
    order = np.argsort(~good, axis=1, kind="stable")[:, :want]
    kept = np.where(np.take_along_axis(good, order, axis=1), np.take_along_axis(labels, order, axis=1), -1)
    missing = want - kept.shape[1]
    return np.pad(kept, ((0, 0), (0, missing)), constant_values=-1) if missing > 0 else kept


_FLOAT16_MAX = 65504.0
_FLOAT16_NORMAL = 2.0**-14
_SQUARED_MAX = 255.0
_SQUARED_MIN = 2.0**-5
"""For l2 faiss squares components in float16 (``Math<half2>::mul`` in its L2Norm.cu) before it adds them up in float32:
from 256 on they become infinite, and their row is never found; in rows whose largest is below 2**-5 too many vanish."""
_FEW_SMALL = 16
"""As many small rows are accepted: they are confused only with each other, and as many extra candidates are fetched."""


class FaissGpuFlatIndex(FaissGpuIndex):
    """A flat index: float32 for float32 plans, else float16 where the vectors fit its range."""

    kind: ClassVar[str] = "exact"

    def __init__(
        self,
        plan: IndexPlan,
        metric: Metric,
        rows: Rows,
        table: VectorTable,
        vectors: FloatArray,
        *,
        beside: bool = False,
    ) -> None:
        """``vectors`` float32 (n, dim): those of ``table``, rounded or not; they are not kept. ``beside``: need
        twice the memory, since the index that this one follows is still there."""
        self._half = _half(plan.precision, metric, vectors)
        self._largest = _SQUARED_MAX if metric == "l2" else _FLOAT16_MAX
        super().__init__(plan, metric, rows, table, _uploaded(plan.device, table, vectors, self._half, beside))

    @classmethod
    def build(cls, job: BuildJob) -> FaissGpuFlatIndex:
        index = cls(job.plan, job.metric, job.rows, job.table(), job.rows.vectors)
        job.progress("add", 1.0)
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FaissGpuFlatIndex:
        rows = cls._rows_of(parts)
        table = cls._table_of(metric, rows, parts)
        return cls(plan, metric, rows, table, table.gather(slice(0, table.n)))

    def _extended(self, rows: Rows) -> FaissGpuFlatIndex | None:
        table = self.table.extended(rows.vectors)
        vectors, slots = table.gather(slice(0, table.n)), self._slot_table_with(rows)
        return FaissGpuFlatIndex(self._plan_with(table), self.metric, slots, table, vectors, beside=True)

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        if self._half and np.abs(queries).max(initial=0.0) > self._largest:
            return self.table.scan(queries, k, row_filter)
        return super()._search(queries, k, params, row_filter)

    def _probes(self, params: SearchParams, row_filter: RowFilter | None) -> int | None:
        del params, row_filter
        return 0

    def _wider(self, fetch: Fetch, exhausted: bool) -> Fetch | None:
        return None if exhausted else doubled(fetch, self.n)

    def _query_bytes(self, fetch: Fetch) -> int:
        return flat_query_bytes(self.n, self.dim, fetch.fetch, half=self._half)


def _half(precision: Precision, metric: Metric, vectors: FloatArray) -> bool:
    """Whether the device keeps float16: not for float32 plans, nor where float16 or its squares cannot hold them."""
    if precision == "float32":
        return False
    low, high = (_SQUARED_MIN, _SQUARED_MAX) if metric == "l2" else (_FLOAT16_NORMAL, _FLOAT16_MAX)
    small = 0
    for start in range(0, len(vectors), ADD_ROWS):
        largest = np.abs(vectors[start : start + ADD_ROWS]).max(axis=1)
        small += int(np.count_nonzero((largest < low) & (largest > 0)))
        if small > _FEW_SMALL or not bool((largest <= high).all()):
            return False
    return True


def _uploaded(device: str, table: VectorTable, vectors: FloatArray, half: bool, beside: bool) -> GpuIndexHandle | None:
    """A flat index of ``vectors`` float32 (n, dim), added at once, so that it never grows."""
    if not table.n:
        return None
    gpu_resources, size = resources_of(device), flat_bytes(table.n, table.dim, half)
    with gpu_resources.building("loading vectors", 2 * size if beside else size, keep=True) as (resources, held):
        config = gpu_resources.config("GpuIndexFlatConfig")
        config.useFloat16 = half
        held.append(
            gpu_resources.made(
                "GpuIndexFlat", resources, table.dim, metric_of(gpu_resources.faiss, table.metric), config
            )
        )
        held[0].add(np.ascontiguousarray(vectors))
    return GpuIndexHandle(gpu_resources, held, size)
