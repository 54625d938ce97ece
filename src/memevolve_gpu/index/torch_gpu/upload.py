"""Upload rows to a device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...types import Device, IntArray, Metric, Precision, Tensor
from ..vector_table import VectorTable
from .device_masks import Tombstones
from .device_rows import DeviceRows, Quantization, Queries, blocks_of
from .kernel_ops import MEASURED_QUERIES, Lists, Operations
from .memory_accounting import SCRATCH, bytes_in_groups
from .runtime import DeviceLock, host_tensor, load_torch, sent
from .search import LEAST_CANDIDATES, SPARE_GROUPS, Probe, propose, scratch_each


@dataclass(frozen=True, slots=True)
class Layout:
    """Where rows go on the device, in ``groups`` of 32 in all: each at its position, or at ``places``.

    With lists, ``lists`` holds the groups of each, ``places`` int32 (n - kept,) say where the rows from ``kept`` on go,
    and ``centroids`` float32 (nlist, columns) lie in the index's space. Where the first ``kept`` rows lie there
    already, ``moved`` int64 (their groups,) says where each group goes.
    """

    groups: int
    lists: list[int]
    places: npt.NDArray[np.int32] | None = None
    centroids: Tensor = None
    kept: int = 0
    moved: IntArray | None = None


@dataclass(frozen=True, slots=True)
class DeviceIndex:
    """What an index holds on its device."""

    rows: DeviceRows
    device: Device
    operations: Operations
    tombstones: Tombstones
    lists: Lists | None
    centroids: Tensor | None
    norms: Tensor | None

    def probe(self, nprobe: int) -> Probe | None:
        """How to read ``nprobe`` lists; None for all rows."""
        if self.lists is None or nprobe == 0:
            return None
        return Probe(self.lists, self.centroids, self.norms, nprobe)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        lists = (self.centroids, self.norms, None if self.lists is None else self.lists.start)
        return self.rows.nbytes + sum(int(one.numel() * one.element_size()) for one in lists if one is not None)


@dataclass(frozen=True, slots=True)
class Upload:
    """Rows to bring to a device, as int8 where ``precision`` says so, else as float16; ``float32_rows``: float32
    beside."""

    table: VectorTable
    precision: Precision
    quantization: Quantization
    metric: Metric
    layout: Layout
    float32_rows: bool

    @property
    def nbytes(self) -> int:
        """Bytes that they take on the device."""
        table, layout = self.table, self.layout
        return bytes_in_groups(
            layout.groups, table.n, table.dim, self.precision, nlist=len(layout.lists), float32_rows=self.float32_rows
        )

    def run(
        self,
        device: Device,
        lock: DeviceLock,
        note: Callable[[str], None],
        progress: Callable[[float], None],
        before: DeviceRows | None = None,
    ) -> DeviceIndex:
        """Upload them; rows that the layout keeps are copied from ``before``, which is on the device already."""
        int8, listed = self.precision == "int8", bool(self.layout.lists)
        shape = (self.table.n, self.table.dim, self.layout.groups)
        with lock:
            rows = DeviceRows.empty(
                self.metric, self.quantization, shape, device, int8=int8, float32_rows=self.float32_rows, listed=listed
            )
            if before is not None and self.layout.moved is not None:
                rows.take_over(before, host_tensor(self.layout.moved).to(device))
        self._fill(rows, device, lock, progress)
        with lock:
            loaded = self._finished(rows, device, Operations(device, note))
        self._warm(loaded, lock)
        return loaded

    def _fill(self, rows: DeviceRows, device: Device, lock: DeviceLock, progress: Callable[[float], None]) -> None:
        """Each row travels once, as float32 through pinned memory: the device rounds it to what it keeps."""
        if self.layout.places is not None:
            with lock:
                rows.places[self.layout.kept :] = host_tensor(self.layout.places).to(device)
        for first, block in blocks_of(self.table, self.layout.kept):
            stop = first + len(block)
            with lock:
                vectors = sent(block, device)
                rows.put(first, self.quantization.enter(vectors, rows.columns, device), vectors)
            if stop < self.table.n:
                progress(stop / self.table.n)

    def _finished(self, rows: DeviceRows, device: Device, operations: Operations) -> DeviceIndex:
        layout, tombstones = self.layout, Tombstones(rows)
        if not layout.lists:
            return DeviceIndex(rows, device, operations, tombstones, None, None, None)
        norms = layout.centroids.square().sum(1)
        if rows.metric == "ip":
            norms = norms.zero_()
        lists = Lists.of(layout.lists, device)
        return DeviceIndex(rows, device, operations, tombstones, lists, layout.centroids, norms)

    def _warm(self, loaded: DeviceIndex, lock: DeviceLock) -> None:
        """Measure, compile and verify the kernels now rather than in the first search, with the first rows as queries,
        and wait for the rows: it may use another stream.

        Only this thread's stream is waited for: to wait for the whole device would break what another thread records.
        """
        if loaded.device.type != "cuda":
            return
        torch = load_torch()
        with lock:
            loaded.operations.tune(loaded.rows, _seconds_on_device)
        widths = LEAST_CANDIDATES, 10 + SPARE_GROUPS
        each = scratch_each(loaded.rows, widths, loaded.rows.groups)
        sizes = [nq for nq in MEASURED_QUERIES if nq == 1 or nq * each <= SCRATCH]
        for nq in sizes:
            own = self.table.gather(np.arange(nq, dtype=np.int64) % self.table.n)
            for nprobe in self._probes(nq, most=nq == sizes[-1]):
                with lock:
                    queries = Queries.prepare(host_tensor(own).to(loaded.device), loaded.rows)
                    propose(loaded.rows, queries, widths, loaded.operations, loaded.probe(nprobe))
                    torch.cuda.current_stream(loaded.device).synchronize()

    def _probes(self, nq: int, *, most: bool) -> list[int]:
        """Numbers of lists to warm up with; 0: all. For the largest batch those for which different kernels are used:
        1, 17 and 33 queries to a list."""
        nlist = len(self.layout.lists)
        each = [-(-queries * nlist // nq) for queries in (1, 17, 33)] if most else [1]
        return [0, *(nprobe for nprobe in each if nprobe <= nlist)]


def _seconds_on_device(call: Callable[[], object]) -> float:
    """The median of nine calls between CUDA events, after two that compile and warm up."""
    torch = load_torch()
    taken: list[float] = []
    for _ in range(11):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        taken.append(before.elapsed_time(after) / 1e3)
    return statistics.median(taken[2:])
