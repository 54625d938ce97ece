"""The base of the faiss GPU indexes: fetch on the device, filter on the host, fetch more when needed, rerank exactly.

The distances of the device are never shown: a flat index expands the square and cancels, narrow codes are rounded.
They propose a few rows more than wanted, and the host's vectors decide among them.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import DeviceError
from ...types import DeviceIncident, FloatArray, IndexPlan, IntArray, Metric, Precision, Rows, SearchParams
from ..base import Index, chunks
from ..bitmap import RowFilter
from ..vector_table import VectorTable
from .resources import BusyError, GpuIndexHandle
from .sizes import MOST, TEMPORARY_BYTES, plan_device_bytes

__all__ = ["FaissGpuFailover", "FaissGpuIndex", "Fetch", "doubled"]

_SHORTEST_REST = 1.0
_LONGEST_REST = 60.0
"""Seconds until a device that had no room is asked again; doubled each time in vain."""
_KEPT = 32
_LASTING = ("device-lost", "device-error", "fork")


class FaissGpuFailover:
    """Out of memory halves the batch, at one query the device rests a while; anything worse is for good.

    A rest that was in vain doubles the next one. Any thread may call. Incidents are told when a state begins or ends,
    not for each query.
    """

    def __init__(self, device: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._clock = clock
        self._lock = threading.Lock()
        self._incidents: deque[DeviceIncident] = deque(maxlen=_KEPT)
        self._limit: int | None = None
        self._over = False
        self._rest = _SHORTEST_REST
        self._again_at = 0.0

    @property
    def serving(self) -> bool:
        """Whether the device is asked at the moment."""
        return self.batch(1) > 0

    def batch(self, wanted: int) -> int:
        """Queries to ask at once, at most ``wanted``; 0 while the host has to answer."""
        with self._lock:
            if self._over:
                return 0
            if self._limit is None:
                return wanted
            if self._clock() >= self._again_at:
                return max(1, min(wanted, 2 * self._limit))
            return min(wanted, self._limit)

    def worked(self, batch: int, wanted: int) -> None:
        """``batch`` queries were answered; a limit that did not bind any more is forgotten."""
        with self._lock:
            if self._limit is None or batch <= self._limit:
                return
            self._limit = batch
            if batch >= wanted:
                self._limit, self._rest = None, _SHORTEST_REST
                self._tell("recovered", "device-again", f"{self._device} answers {batch} queries at once again")

    def failed(self, error: DeviceError, batch: int) -> None:
        """``batch`` queries at once were refused."""
        with self._lock:
            if self._over:
                return
            if error.cause in _LASTING:
                self._over = True
                self._tell(error.cause, "cpu-until-restart", str(error))
                return
            before, now = self._limit, self._clock()
            if before is not None and now >= self._again_at:
                self._rest = min(2 * self._rest, _LONGEST_REST)
            self._again_at = now + self._rest
            self._limit = batch // 2 if before is None else min(before, batch // 2)
            if before is None or (before and not self._limit):
                self._tell(error.cause, "smaller-batch" if self._limit else "cpu", str(error))

    def incidents(self) -> list[DeviceIncident]:
        """What happened since the last call, oldest first."""
        with self._lock:
            told = list(self._incidents)
            self._incidents.clear()
            return told

    def _tell(self, cause: str, action: str, detail: str) -> None:
        self._incidents.append(DeviceIncident(self._device, cause, action, detail))  # type: ignore[arg-type]


_SPARE: dict[Precision, tuple[int, int]] = {"float32": (1, 16), "float16": (2, 16), "int8": (4, 32)}
"""Candidates for so many results, as (times, plus): rounding reorders near neighbours. An effort may name fewer; it
names more for coarser codes than these, so only int8 heeds that."""
_SLACK = 1.2
"""Allowed rows are not spread evenly: so much more than their share of the rows is fetched at first."""
_LABEL_BYTES = 32
"""What the host takes for each row fetched: its number, twice, its order, and whether it may be returned."""
_USUAL_K = 10


@dataclass(frozen=True, slots=True)
class Fetch:
    """``want`` candidates a query, ``enough`` of which end the search; ``fetch`` rows from ``nprobe`` lists."""

    want: int
    enough: int
    fetch: int
    nprobe: int = 0


class FaissGpuIndex(Index):
    """Searches on ``plan.device``; the host's vectors answer whenever that cannot."""

    def __init__(
        self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, handle: GpuIndexHandle | None
    ) -> None:
        """``handle`` is the index on the device, None for an index without rows."""
        super().__init__(plan, metric, rows, table)
        self._handle = handle
        self._failover = FaissGpuFailover(plan.device if handle is None else handle.gpu_resources.name)
        self._warm_up()

    @property
    def device(self) -> str:
        return self.plan.device if self._handle is not None and self._failover.serving else "cpu"

    @property
    def device_bytes(self) -> int:
        return 0 if self._handle is None else self._handle.nbytes

    @property
    def handle(self) -> GpuIndexHandle | None:
        """The index on the device, for those who measure faiss alone; None for an index without rows."""
        return self._handle

    def incidents(self) -> list[DeviceIncident]:
        return self._failover.incidents()

    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        fetch = self._first_fetch(k, params, row_filter)
        if fetch is None or not len(queries):
            return self.table.scan(queries, k, row_filter)
        try:
            candidates, starved = self._candidates(queries, fetch, row_filter)
        except DeviceError:
            return self.table.scan(queries, k, row_filter)
        distances, positions = self.table.rerank(queries, candidates, k)
        if starved.size:
            rest = np.ascontiguousarray(queries[starved])
            distances[starved], positions[starved] = self.table.scan(rest, k, row_filter)
        return distances, positions

    @abstractmethod
    def _probes(self, params: SearchParams, row_filter: RowFilter | None) -> int | None:
        """Lists to probe at first, 0 where there are none; None where only the host can do what is asked."""

    @abstractmethod
    def _wider(self, fetch: Fetch, exhausted: bool) -> Fetch | None:
        """What to ask where too few were found, ``exhausted`` if all rows that were looked at were returned."""

    @abstractmethod
    def _query_bytes(self, fetch: Fetch) -> int:
        """Scratch of one query on the device."""

    def _plan_with(self, table: VectorTable) -> IndexPlan:
        """The plan of an index like this with the rows of ``table``."""
        return replace(self.plan, device_bytes=plan_device_bytes(self.plan, table.n, table.dim))

    def _warm_up(self) -> None:
        """One search of the usual size: its code is loaded while there is room, and no user waits for that."""
        fetch = self._first_fetch(_USUAL_K, SearchParams(), None)
        if fetch is not None:
            with suppress(DeviceError):  # told by incidents()
                self._propose(self.vectors_at(np.zeros(1, np.int64)), fetch)

    def _parameters(self, fetch: Fetch) -> Any:
        """faiss' search parameters, made on the device's turn."""
        del fetch

    def _first_fetch(self, k: int, params: SearchParams, row_filter: RowFilter | None) -> Fetch | None:
        """None: more than the device gives at once, or so few rows allowed that reading them is less work."""
        nprobe = self._probes(params, row_filter)
        if self._handle is None or nprobe is None:
            return None
        count = self.n if row_filter is None else row_filter.count
        times, plus = _SPARE[self.plan.precision]
        spare = k * times + plus
        asked = params.rerank or spare
        want = min(max(k, asked if self.plan.precision == "int8" else min(asked, spare)), MOST, count)
        fetch = want if row_filter is None else int(want * self.n / count * _SLACK) + 1
        if k > MOST or (fetch > MOST and count < self.n):
            return None
        enough = min(k, count) if row_filter is None else want
        return Fetch(want, enough, min(fetch, self.n, MOST), nprobe)

    def _candidates(self, queries: FloatArray, fetch: Fetch, row_filter: RowFilter | None) -> tuple[IntArray, IntArray]:
        """Candidates int64 (nq, want), -1 at the end of a row, and the queries that only the host can serve.

        Raises:
            DeviceError: the device does not answer, not even one query.
        """
        candidates: IntArray = np.full((len(queries), fetch.want), -1, np.int64)
        todo: IntArray = np.arange(len(queries))
        step: Fetch | None = fetch
        while todo.size and step is not None:
            short, exhausted = np.zeros(todo.size, np.bool_), step.fetch >= self.n
            for part in chunks(todo.size, _LABEL_BYTES * step.fetch):
                rows = todo[part]
                labels = self._propose(queries[rows], step)
                good = _good(labels, self.n, row_filter)
                candidates[rows] = _packed(labels, good, fetch.want)
                short[part] = good.sum(axis=1) < fetch.enough
                exhausted = exhausted or bool((labels[short[part], -1] < 0).any())
            todo, step = todo[short], self._wider(step, exhausted)
        return candidates, todo

    def _propose(self, queries: FloatArray, fetch: Fetch) -> IntArray:
        """The nearest ``ask.fetch`` rows by what the device holds, int64 (nq, fetch), -1 where fewer were met.

        Raises:
            DeviceError: the device does not answer, not even one query.
        """
        nq, tile = len(queries), max(1, TEMPORARY_BYTES // self._query_bytes(fetch))
        labels: IntArray = np.empty((nq, fetch.fetch), np.int64)
        at = 0
        while at < nq:
            wanted = min(tile, nq - at)
            size = self._failover.batch(wanted)
            if not size:
                raise DeviceError(f"{self.plan.device} rests; the CPU answers", "out-of-memory")
            part = slice(at, at + size)
            try:
                labels[part] = self._on_device(np.ascontiguousarray(queries[part]), fetch)
            except BusyError:
                raise
            except DeviceError as error:
                self._failover.failed(error, size)
                continue
            self._failover.worked(size, wanted)
            at += size
        return labels

    def _on_device(self, queries: FloatArray, fetch: Fetch) -> IntArray:
        if self._handle is None:
            raise DeviceError(f"nothing lies on {self.plan.device}")
        gpu_resources, engine, nq = self._handle.gpu_resources, self._handle.engine, len(queries)
        distances, labels = np.empty((nq, fetch.fetch), np.float32), np.empty((nq, fetch.fetch), np.int64)
        with gpu_resources.searching(self._shape(nq, fetch)):
            ptr = gpu_resources.faiss.swig_ptr
            engine.search_c(nq, ptr(queries), fetch.fetch, ptr(distances), ptr(labels), self._parameters(fetch))
        return labels

    def _shape(self, nq: int, fetch: Fetch) -> Hashable:
        """What decides which kernels a search launches, roughly."""
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
