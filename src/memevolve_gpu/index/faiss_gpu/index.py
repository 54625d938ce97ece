"""The base of the faiss GPU indexes: fetch on the device, filter on the host, fetch more when needed, rerank exactly.

Distances of the device are never returned: a flat index expands the square and cancels, narrow codes are rounded. They
propose a few more rows than wanted, and the host's vectors decide among them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import DeviceError
from ...types import DeviceIncident, FloatArray, IndexPlan, IntArray, Metric, Precision, Rows, SearchParams
from ..base import Index, chunks
from ..bitmap import RowFilter
from ..device_failover import DeviceFailover
from ..vector_table import VectorTable
from .resources import GpuIndexHandle
from .sizes import MOST, TEMPORARY_BYTES, plan_device_bytes

__all__ = ["FaissGpuIndex", "Fetch", "doubled"]

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
        """faiss' search parameters, made under the device's lock."""
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
