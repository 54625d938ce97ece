"""The base of the faiss GPU indexes, and the flat one: faiss proposes on the device, the host filters and decides.

Distances of the device are never returned: a flat index expands the square and cancels, narrow codes are rounded. A few
more rows than wanted are fetched, once; a query that is left with too few by a filter is answered by the host.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from ...errors import DeviceError
from ...types import DeviceIncident, FloatArray, IndexPlan, IntArray, Metric, Precision, Rows, SearchParams
from ..base import Arrays, BuildJob, Index
from ..bitmap import RowFilter
from ..device_failover import DeviceFailover
from ..faiss_helpers import metric_of
from ..sample import ADD_ROWS
from ..vector_table import VectorTable
from .resources import GpuIndexHandle, resources_of
from .sizes import MOST, TEMPORARY_BYTES, flat_bytes, flat_query_bytes

_SPARE: dict[Precision, tuple[int, int]] = {"float32": (1, 16), "float16": (2, 16), "int8": (4, 32)}
"""Candidates for so many results, as (times, plus): rounding reorders near neighbours. Search parameters may ask for
fewer; they ask for more than these for coarser codes, so only int8 follows them. Lists hold no float32."""
_SLACK = 1.2
"""Rows that pass a filter are not spread evenly: more are fetched than their share by this factor."""
_LABEL_BYTES, _MOST_LABEL_BYTES = 32, 64 << 20
"""Host bytes for each row fetched (its number, twice, its order, whether it may be returned), and for all at once."""


class FaissGpuIndex(Index):
    """Searches on ``plan.device``; the host answers by an exact scan when the device cannot."""

    def __init__(
        self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, handle: GpuIndexHandle | None
    ) -> None:
        """``handle`` is the index on the device, None for an index without rows."""
        super().__init__(plan, metric, rows, table)
        self.handle = handle
        self._failover = DeviceFailover(plan.device if handle is None else handle.gpu_resources.name)
        if self.n:  # kernel code is loaded while there is memory, and no user waits for it
            self._search(self.vectors_at(np.zeros(1, np.int64)), 10, SearchParams(), None)

    @property
    def device(self) -> str:
        return self.plan.device if self.handle is not None and self._failover.serving else "cpu"

    @property
    def device_bytes(self) -> int:
        return 0 if self.handle is None else self.handle.nbytes

    def incidents(self) -> list[DeviceIncident]:
        return self._failover.incidents()

    @abstractmethod
    def _lists_to_probe(self, params: SearchParams, row_filter: RowFilter | None) -> int | None:
        """How many; 0 where there are none, None where only the host can answer."""

    @abstractmethod
    def _query_bytes(self, fetch: int, nprobe: int) -> int:
        """Scratch bytes of one query on the device."""

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        nprobe, count = self._lists_to_probe(params, row_filter), self.n if row_filter is None else row_filter.count
        precision: Precision = "float16" if nprobe and self.plan.precision == "float32" else self.plan.precision
        times, plus = _SPARE[precision]
        requested = params.rerank or times * k + plus
        want = min(max(k, requested if precision == "int8" else min(requested, times * k + plus)), MOST, count)
        fetch = want if row_filter is None else int(want * self.n / max(1, count) * _SLACK) + 1
        candidates, enough = None, min(k, count) if row_filter is not None else want
        if self.handle is not None and nprobe is not None and len(queries) and k <= MOST and fetch <= MOST and enough:
            fetch = min(fetch, self.n)
            most = min(TEMPORARY_BYTES // self._query_bytes(fetch, nprobe), _MOST_LABEL_BYTES // (_LABEL_BYTES * fetch))
            candidates = self._failover.attempt(
                lambda batch: self._candidates(queries, (want, fetch, nprobe), row_filter, batch),
                max(1, min(most, len(queries))),
            )
        if candidates is None:
            return self.table.scan(queries, k, row_filter)
        distances, positions = self.table.rerank(queries, candidates, k)
        starved = np.flatnonzero(candidates[:, enough - 1] < 0)
        if starved.size:
            distances[starved], positions[starved] = self.table.scan(queries[starved], k, row_filter)
        return distances, positions

    def _candidates(
        self, queries: FloatArray, widths: tuple[int, int, int], row_filter: RowFilter | None, batch: int
    ) -> IntArray:
        """Candidates int64 (nq, want), -1 at the end of a row; widths: (want, rows to fetch, lists to probe)."""
        want, fetch, nprobe = widths
        found: IntArray = np.empty((len(queries), want), np.int64)
        for at in range(0, len(queries), batch):
            labels = self._on_device(np.ascontiguousarray(queries[at : at + batch]), fetch, nprobe)
            good = (labels >= 0) & (labels < self.n)
            if row_filter is not None:
                good &= row_filter.test(np.where(good, labels, -1))
            order = np.argsort(~good, axis=1, kind="stable")[:, :want]
            kept = np.take_along_axis(labels, order, axis=1)
            found[at : at + batch] = np.where(np.take_along_axis(good, order, axis=1), kept, -1)
        return found

    def _on_device(self, queries: FloatArray, fetch: int, nprobe: int) -> IntArray:
        """The nearest ``fetch`` rows by what the device holds, int64 (nq, fetch), -1 where fewer were met."""
        if self.handle is None:
            raise DeviceError(f"{self.plan.device} holds no rows of this index")
        gpu_resources, engine, nq = self.handle.gpu_resources, self.handle.engine, len(queries)
        distances, labels = np.empty((nq, fetch), np.float32), np.empty((nq, fetch), np.int64)
        sizes = (self.n, nq, fetch - 1, nprobe)  # they roughly decide which kernels are launched
        shape = self.kind, self.metric, self.plan.precision, self.dim, *(size.bit_length() for size in sizes)
        with gpu_resources.searching(shape):
            ptr, parameters = gpu_resources.faiss.swig_ptr, None
            if nprobe:
                parameters = gpu_resources.faiss.SearchParametersIVF()
                parameters.nprobe = nprobe
            engine.search_c(nq, ptr(queries), fetch, ptr(distances), ptr(labels), parameters)
        return labels


_LARGEST, _SMALLEST = 65504.0, 2.0**-14
_LARGEST_SQUARED, _SMALLEST_SQUARED = 255.0, 2.0**-5
"""For l2 faiss squares components in float16 (``Math<half2>::mul`` in its L2Norm.cu) before it adds them up in float32:
from 256 on they become infinite, and their row is never found; in rows whose largest is below 2**-5 too many vanish."""


def fits_float16(vectors: FloatArray, *, squared: bool = False) -> bool:
    """Whether float16 holds each row's largest component, or its square; rows of zeros are held."""
    low, high = (_SMALLEST_SQUARED, _LARGEST_SQUARED) if squared else (_SMALLEST, _LARGEST)
    for start in range(0, len(vectors), ADD_ROWS):
        largest = np.abs(vectors[start : start + ADD_ROWS]).max(axis=1, initial=0.0)
        if not bool(((largest == 0) | ((largest >= low) & (largest <= high))).all()):
            return False
    return True


class FaissGpuFlatIndex(FaissGpuIndex):
    """A flat index: float32 for float32 plans, else float16 where the vectors fit its range."""

    kind: ClassVar[str] = "exact"

    def __init__(self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, vectors: FloatArray) -> None:
        """``vectors`` float32 (n, dim): those of ``table``, rounded or not; they are not kept."""
        self._half = plan.precision != "float32" and fits_float16(vectors, squared=metric == "l2")
        self._most = _LARGEST_SQUARED if metric == "l2" else _LARGEST
        super().__init__(plan, metric, rows, table, self._uploaded(plan.device, table, vectors))

    @classmethod
    def build(cls, job: BuildJob) -> FaissGpuFlatIndex:
        index = cls(job.plan, job.metric, job.rows, job.table(), job.rows.vectors)
        job.progress("add", 1.0)
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FaissGpuFlatIndex:
        rows, table = cls._stored(metric, parts)
        return cls(plan, metric, rows, table, table.gather(slice(0, table.n)))

    def _uploaded(self, device: str, table: VectorTable, vectors: FloatArray) -> GpuIndexHandle | None:
        """The rows, added at once, so that what holds them never grows."""
        if not table.n:
            return None
        gpu_resources, size = resources_of(device), flat_bytes(table.n, table.dim, self._half)
        kind = metric_of(gpu_resources.faiss, table.metric)
        with gpu_resources.building("loading vectors", size, keep=True) as handle:
            handle.make("GpuIndexFlat", table.dim, kind, useFloat16=self._half).add(np.ascontiguousarray(vectors))
        return handle

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        if self._half and np.abs(queries).max(initial=0.0) > self._most:
            return self.table.scan(queries, k, row_filter)
        return super()._search(queries, k, params, row_filter)

    def _lists_to_probe(self, params: SearchParams, row_filter: RowFilter | None) -> int | None:
        del params, row_filter
        return 0

    def _query_bytes(self, fetch: int, nprobe: int) -> int:
        del nprobe
        return flat_query_bytes(self.n, self.dim, fetch)
