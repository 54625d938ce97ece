"""The base of the torch indexes, and the flat one: load, search, answer from the host otherwise."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, TypeVar

import numpy as np

from ...errors import DeviceError, EngineError
from ...types import Device, DeviceIncident, FloatArray, IndexPlan, IntArray, Matrix, Metric, Rows, SearchParams, Tensor
from ...utils.vectors import DeviceQueries, host_queries
from ..base import Arrays, BuildJob, DeltaRows, Index, Parts, part
from ..bitmap import RowFilter
from ..costs import scan_cost
from ..device_failover import DeviceFailover
from ..exact_scan import padded
from ..vector_table import VectorTable
from .cuda_graphs import CudaGraphCache
from .delta_buffer import DeviceDeltaBuffer
from .device_masks import Masks
from .device_rows import BLOCK_GROUPS, GROUP, DeviceRows, Quantization, Queries, measured_quantization, padded_groups
from .memory_accounting import account_of, predicted_bytes
from .runtime import (
    building,
    device_lock,
    device_tensor,
    free_memory,
    host_tensor,
    on_device,
    open_device,
    settled,
)
from .search import (
    LEAST_CANDIDATES,
    SPARE_GROUPS,
    Search,
    columns,
    found_in_batches,
    propose,
    some,
    widened,
)
from .upload import DeviceIndex, Layout, Upload

T = TypeVar("T")

_INT8_SPARE = (4, 32)
"""int8 rows reorder near neighbours: the fewest candidates for so many results, as (times, plus)."""
_WHOLE = 0.5
"""Share of the lists from which on all rows are read in one sweep: for many queries that costs no more, for one at
most twice as much, and a batch must give the same results as its queries one by one."""
_ARRAY_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__")
_DEVICE_CALL = 15_000_000.0
"""A call to a device takes about 150 microseconds, in units of ``costs``: a scan that is faster runs on the host."""


def candidate_width(k: int, params: SearchParams) -> int:
    """How many rows the device proposes: ``params.rerank``, but at least 2k and 32, so that float16 loses none."""
    return max(params.rerank, 2 * k, LEAST_CANDIDATES)


class TorchIndex(Index):
    """Rows on a device in float16 (int8 for int8 plans), and in float32 on the host.

    The device proposes candidates and float32 distances decide: those of the host's rows, or of float32 rows on the
    device when ``plan.device_bytes`` leaves room for them. When the device fails, the host answers by an exact scan:
    see :class:`~..device_failover.DeviceFailover`. An index read from a snapshot whose device cannot be used answers
    from the host, reports ``cpu`` as its device and records an incident; building one there raises DeviceError.
    """

    accepts_device_queries: ClassVar[bool] = True

    def __init__(
        self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, quantization: Quantization
    ) -> None:
        super().__init__(plan, metric, rows, table)
        self._quantization = quantization
        self._masks = Masks()
        self._failover = DeviceFailover(plan.device)
        self._account = account_of(plan.device)
        self._loaded: DeviceIndex | None = None
        self._loading = threading.Lock()
        self._loader: threading.Thread | None = None
        self._graphs = CudaGraphCache(self._failover.note_slower)
        self._delta: DeviceDeltaBuffer | None = None

    @property
    def device(self) -> str:
        return self.plan.device if self._loaded is not None and self._failover.serving else "cpu"

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device, the delta buffer included, also during a back-off; without the scratch that all
        searches share. 0 when the rows are not there."""
        loaded, delta = self._loaded, self._delta
        if loaded is None or self.plan.device == "cpu":
            return 0
        return loaded.nbytes + (0 if delta is None else delta.nbytes)

    def incidents(self) -> list[DeviceIncident]:
        return self._failover.incidents()

    def search(
        self, queries: Matrix | DeviceQueries, k: int, params: SearchParams, row_filter: RowFilter | None = None
    ) -> tuple[FloatArray, IntArray]:
        """As :meth:`~memevolve_gpu.index.base.Index.search`; ``queries`` may also lie on a device: DeviceQueries, torch
        tensors, arrays with ``__cuda_array_interface__`` or ``__dlpack__``. They are copied to the host only where it
        answers.
        """
        given = queries.tensor if isinstance(queries, DeviceQueries) else queries
        tensor = self._device_tensor_of(given, k, params, row_filter)
        if tensor is None:
            return super().search(host_queries(queries), k, params, row_filter)
        return self._search(tensor, k, params, None if row_filter is None or row_filter.count == self.n else row_filter)

    def search_delta(
        self, newer: DeltaRows, n: int, queries: Matrix | DeviceQueries, k: int, row_filter: RowFilter | None = None
    ) -> tuple[FloatArray, IntArray] | None:
        given = queries.tensor if isinstance(queries, DeviceQueries) else queries
        nq, count = int(given.shape[0]), n if row_filter is None else row_filter.count
        if self._loaded is None or not nq:
            return None
        here = isinstance(given, np.ndarray)
        if here and nq * scan_cost(count, self.dim) < _DEVICE_CALL:
            return None

        def scan(batch: int) -> tuple[FloatArray, IntArray] | None:
            tensor = given if here else device_tensor(given, self._ready().device)
            return self._delta_of(newer).search(n, tensor, k, row_filter, batch)

        return self._attempt(scan, nq)

    def _delta_of(self, newer: DeltaRows) -> DeviceDeltaBuffer:
        if self._delta is None or self._delta.newer is not newer:
            self._delta = None  # free its memory first
            note = self._failover.note_slower
            self._delta = DeviceDeltaBuffer(newer, self.metric, self._quantization, self._ready(), self._account, note)
        return self._delta

    def _device_tensor_of(self, queries: Matrix, k: int, params: SearchParams, row_filter: RowFilter | None) -> Tensor:
        """``queries`` on this index's device, when they lie on a device and this one answers; else None."""
        if isinstance(queries, np.ndarray) or not any(hasattr(queries, name) for name in _ARRAY_PROTOCOLS):
            return None
        if self._loaded is None or params.exact or k < 1 or tuple(getattr(queries, "shape", ()))[1:] != (self.dim,):
            return None
        if row_filter is not None and (row_filter.n != self.n or row_filter.count == 0):
            return None
        return self._attempt(lambda _: settled(device_tensor(queries, self._ready().device), queries), 1)

    def _attempt(self, work: Callable[[int], T], most: int) -> T | None:
        """``work(batch)`` alone on the device; None where the host must answer."""

        def alone(batch: int) -> T:
            with on_device(self.plan.device):
                return work(batch)

        def free() -> None:
            free_memory(self.plan.device, self._masks.clear, self._graphs.clear)

        return self._failover.attempt(alone, most, free)

    # -------------------------------------------------------------------------------------------------- loading

    def _layout(self, device: Device) -> Layout:
        """Where each row goes on the device."""
        raise NotImplementedError

    def _load(self, progress: Callable[[float], None] = lambda _: None) -> None:
        """Upload the rows to the device.

        Raises:
            DeviceError: it refuses.
        """
        with building(self.plan.device):
            if self._loaded is None and self.n:
                self._loaded = self._upload(open_device(self.plan.device), progress)
        progress(1.0)

    def _load_or_fail_over(self) -> None:
        try:
            self._load()
        except DeviceError as error:
            self._failover.refuse(error)

    def _load_in_background(self) -> None:
        """Upload the rows again in one background thread while the host answers."""
        if self._loading.acquire(blocking=False):
            self._loader = threading.Thread(target=self._background_load, name="memevolve-device", daemon=True)
            try:
                self._loader.start()
            except RuntimeError as error:  # no thread can be started, or the process ends
                self._loading.release()
                self._failover.refuse(DeviceError(f"the index is not uploaded to {self.plan.device} again: {error}"))

    def _background_load(self) -> None:
        try:
            self._load()
        except EngineError as error:
            self._failover.refuse(error)
        finally:
            self._loading.release()

    def _upload(self, device: Device, progress: Callable[[float], None]) -> DeviceIndex:
        layout = self._layout(device)
        return self._run(self._load_of(layout, float32_rows=self._float32_rows_fit(layout)), device, progress)

    def _extended(self, rows: Rows) -> TorchIndex | None:
        """A longer index: the rows of this one are copied on the device, only new ones come from the host."""
        held = self._loaded
        if held is None or not self._failover.serving or not self._quantization.holds(rows.vectors):
            return None
        table = self.table.extended(rows.vectors)
        float32_rows = held.rows.float32_rows is not None
        size = predicted_bytes(table.n, self.dim, self.plan.precision, nlist=self.nlist, float32_rows=float32_rows)
        with building(self.plan.device):
            plan = replace(self.plan, device_bytes=size)
            index, layout = self._longer(plan, self.slot_table_with(rows), table, rows.vectors, held)
            index.follow(held, layout, float32_rows=float32_rows)
        return index

    def follow(self, held: DeviceIndex, layout: Layout, *, float32_rows: bool) -> None:
        """Upload the rows; the first of them, which another index holds there as ``held``, are copied on the device.

        Raises:
            DeviceError: it refuses; a RuntimeError of torch where the caller is not :func:`~.runtime.building`.
        """
        self._loaded = self._run(
            self._load_of(layout, float32_rows=float32_rows), held.device, lambda _: None, held.rows
        )

    def _longer(
        self, plan: IndexPlan, rows: Rows, table: VectorTable, vectors: FloatArray, held: DeviceIndex
    ) -> tuple[TorchIndex, Layout]:
        """An index over ``rows`` and ``table``, which end with the new ``vectors``, not on the device yet, and where
        its rows go if those that are ``held`` are kept."""
        raise NotImplementedError

    def _load_of(self, layout: Layout, *, float32_rows: bool) -> Upload:
        return Upload(self.table, self.plan.precision, self._quantization, self._device_metric, layout, float32_rows)

    def _run(
        self, load: Upload, device: Device, progress: Callable[[float], None], before: DeviceRows | None = None
    ) -> DeviceIndex:
        self._account.take(load.nbytes, f"an index over {self.n} rows")
        giving = weakref.finalize(self, self._account.give, load.nbytes)
        try:
            return load.run(device, device_lock(self.plan.device), self._failover.note_slower, progress, before)
        except (RuntimeError, MemoryError):
            giving()
            raise

    def _float32_rows_fit(self, layout: Layout) -> bool:
        whole = predicted_bytes(self.n, self.dim, "float32", nlist=len(layout.lists), float32_rows=True)
        return self.plan.precision == "float32" and self.plan.device_bytes >= whole

    @property
    def _device_metric(self) -> Metric:
        """Vectors of length one are as near as their dot product is large, and lists are made by distance."""
        return "ip" if self.metric == "ip" else "l2"

    def _ready(self) -> DeviceIndex:
        if self._loaded is None:
            raise DeviceError(f"device {self.plan.device} does not hold this index", "device-error")
        return self._loaded

    # ------------------------------------------------------------------------------------------------ searching

    def _search(
        self, queries: Matrix, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        want, nq = candidate_width(k, params), len(queries)
        if self.plan.precision == "int8":
            want = groups = max(want, _INT8_SPARE[0] * k + _INT8_SPARE[1])
        else:
            groups = max(k + SPARE_GROUPS, params.rerank)
        count = self.n if row_filter is None else row_filter.count
        if nq == 0:
            return padded(0, k)
        if want >= count or nq * scan_cost(count, self.dim) < _DEVICE_CALL:
            return self.table.scan(host_queries(queries), k, row_filter)
        if self._loaded is None:
            if self._failover.serving:
                self._load_in_background()
            return self.table.scan(host_queries(queries), k, row_filter)
        return self._ask(queries, k, (want, groups), self._probed(params.nprobe or self.nlist), row_filter)

    def _ask(
        self, queries: Matrix, k: int, widths: tuple[int, int], nprobe: int, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        """Results by the device, or by the host where it does not answer. widths: rows to propose, and groups."""
        nq, count = len(queries), self.n if row_filter is None else row_filter.count
        enough = min(k if row_filter is None else min(widths), count)
        found = self._attempt(lambda batch: self._on_device(queries, widths, nprobe, row_filter, batch), nq)
        if found is None:
            return self.table.scan(host_queries(queries), k, row_filter)
        distances, positions = found
        if distances is None:
            all_positions = positions
            distances, positions = self.table.rerank(host_queries(queries), positions, k)
        else:
            all_positions, distances, positions = positions, *columns(distances, positions, k)
        short = np.flatnonzero(all_positions[:, enough - 1] < 0) if nprobe else np.empty(0, np.int64)
        if short.size:  # their lists hold too few: twice as many, finally all
            again = self._ask(some(queries, short), k, widths, self._probed(2 * nprobe), row_filter)
            distances[short], positions[short] = again
        return distances, positions

    def _probed(self, nprobe: int) -> int:
        """``nprobe`` lists, or 0 for all rows where those are most of the lists, or there are none."""
        return nprobe if nprobe <= _WHOLE * self.nlist else 0

    def _on_device(
        self, queries: Matrix, widths: tuple[int, int], nprobe: int, row_filter: RowFilter | None, batch: int
    ) -> tuple[FloatArray | None, IntArray]:
        """Candidates (nq, want); with their distances, nearest first, where float32 rows lie on the device."""
        loaded = self._ready()
        rows = self._shown(loaded, row_filter)
        cosine = self.metric == "cosine"
        search = Search(rows, loaded.device, loaded.operations, loaded.probe(nprobe), self._account, cosine)
        if len(queries) == 1 and (rows is loaded.rows or rows is loaded.tombstones.rows):
            with self._account.scratch(search.scratch_each(widths), "a search"):
                return None, self._one(search, queries, widths)
        return found_in_batches(search, queries, widths, batch)

    def _shown(self, loaded: DeviceIndex, row_filter: RowFilter | None) -> DeviceRows:
        """The rows without those that are hidden."""
        if row_filter is None:
            return loaded.rows
        if loaded.tombstones.show(row_filter):
            return loaded.tombstones.rows
        return self._masks.rows(loaded.rows, row_filter)

    def _one(self, search: Search, query: Matrix, widths: tuple[int, int]) -> IntArray:
        rows, probe, want = search.rows, search.probe, widths[0]
        # So that few numbers of candidates are in use.
        some_more = 1 << (want - 1).bit_length(), -(-widths[1] // BLOCK_GROUPS) * BLOCK_GROUPS

        def found(wide: Tensor) -> Tensor:
            return propose(rows, Queries.from_wide(None, wide, rows), some_more, search.operations, probe)

        here = isinstance(query, np.ndarray)
        wide = (
            host_tensor(rows.to_device_space(query, self._quantization)) if here else Queries.prepare(query, rows).wide
        )
        shape = (*some_more, 0 if probe is None else probe.nprobe, rows is self._ready().rows)
        return widened(self._graphs.run(shape, wide, search.device, found).numpy(), want)

    # -------------------------------------------------------------------------------------------------- parts

    def _engine_parts(self) -> Parts:
        return {"centre": self._quantization.centre, "scale": np.array([self._quantization.scale], np.float32)}

    def _engine_bytes(self) -> int:
        return self._quantization.centre.nbytes + 4

    @staticmethod
    def _space_of(parts: Arrays, dim: int) -> Quantization:
        centre, scale = part(parts, "centre", np.float32, (dim,)), part(parts, "scale", np.float32, (1,))
        if not np.isfinite(centre).all() or not 0 < float(scale[0]) < np.inf:
            raise EngineError("the index's centre or scale is not finite; rebuild the index")
        return Quantization(centre, float(scale[0]))


class TorchFlatIndex(TorchIndex):
    """Rows in the order of their positions; recall@10 against float32 at least 0.999."""

    kind: ClassVar[str] = "exact"

    @classmethod
    def build(cls, job: BuildJob) -> TorchFlatIndex:
        """Bring the rows to the device; nothing is trained.

        Raises:
            DeviceError: the device refuses.
        """
        table = job.table()
        with building(job.plan.device):
            open_device(job.plan.device)
            quantization = (
                measured_quantization(table, job.plan.precision)
                if table.n
                else Quantization(np.zeros(table.dim, np.float32), 1.0)
            )
            index = cls(job.plan, job.metric, job.rows, table, quantization)
            index._load(lambda fraction: job.progress("add", fraction))
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> TorchFlatIndex:
        rows, table = cls._stored(metric, parts)
        index = cls(plan, metric, rows, table, cls._space_of(parts, table.dim))
        index._load_or_fail_over()
        return index

    def _layout(self, device: Device) -> Layout:  # noqa: ARG002 - TorchIVFIndex keeps centroids there
        return _in_order(self.n)

    def _longer(
        self,
        plan: IndexPlan,
        rows: Rows,
        table: VectorTable,
        vectors: FloatArray,  # noqa: ARG002 - TorchIVFIndex assigns them
        held: DeviceIndex,  # noqa: ARG002 - as above
    ) -> tuple[TorchFlatIndex, Layout]:
        moved = np.arange(-(-self.n // GROUP), dtype=np.int64)
        layout = replace(_in_order(table.n), kept=self.n, moved=moved)
        return TorchFlatIndex(plan, self.metric, rows, table, self._quantization), layout


def _in_order(n: int) -> Layout:
    """Rows 0 to n - 1, each at its position."""
    return Layout(padded_groups(-(-n // GROUP)), [])
