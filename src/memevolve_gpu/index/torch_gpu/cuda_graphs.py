"""CUDA graphs for single queries: recorded once, replayed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import ModuleType

from ...errors import first_line
from ...types import Device, Stream, Tensor
from ...utils.lru import LruCache
from ..device_failover import cause_of
from .runtime import load_torch

_KEPT = 4
_COUNTED = 64
_MOST_RECORDED = 16
"""Recording takes some hundredths of a second: where shapes change all the time, plain launches are better."""
Shape = tuple[int, int, int, bool]
"""Candidates, groups, lists to read, and whether tombstones are looked at."""
_WARM = 2
"""Searches of a shape before it is recorded: they compile the kernels."""


class _Recording:
    """One graph with the buffers that it reads and writes; used under the device's lock."""

    def __init__(self, columns: int, device: Device, search: Callable[[Tensor], Tensor]) -> None:
        torch = load_torch()
        self._reads = search  # keep it alive: the graph knows only addresses
        self.query = torch.zeros((1, columns), dtype=torch.float32, device=device)
        before, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(before)
        with torch.cuda.stream(side):
            search(self.query)
            side.synchronize()
        self.graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.found = search(self.query)
        except RuntimeError:
            _undo(torch, before, pool)
            raise
        before.wait_stream(side)

    def run(self, query: Tensor) -> Tensor:
        self.query.copy_(query, non_blocking=True)
        self.graph.replay()
        return self.found.cpu()


def _undo(torch: ModuleType, before: Stream, pool: tuple[int, int]) -> None:
    """Leave the caller on the stream where it was, and torch's allocator as it was: a recording that broke off leaves
    neither (torch 2.13)."""
    torch.cuda.set_stream(before)
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)  # noqa: SLF001 - there is no public way
    if end is not None:
        with suppress(RuntimeError):
            end(before.device_index, pool)


class _Switch:
    """Whether this process records searches."""

    on = False


def record_searches(on: bool) -> None:
    """Whether the indexes of this process record their single queries from now on.

    A recording takes a few milliseconds, once for each index and shape. Meanwhile CUDA refuses every call that waits
    for the device (``torch.cuda.synchronize()``) in every thread of the process, so the user has to rule those out.
    torch's ``capture_error_mode`` does not change that: it decides about calls that are unsafe (allocations, queries of
    events), while to wait for a device on which a stream records is an error in each mode, and ends the recording.
    """
    _Switch.on = on


class CudaGraphCache:
    """Recordings of one index's single queries, by their shape. Used under the device's lock.

    A search that cannot be recorded is not tried again; its kernels are launched one by one.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._seen: LruCache[Shape, int] = LruCache(_COUNTED)
        self._kept: LruCache[Shape, _Recording] = LruCache(_KEPT)
        self._works = True
        self._recorded = 0

    def run(self, shape: Shape, query: Tensor, device: Device, search: Callable[[Tensor], Tensor]) -> Tensor:
        """``search(query)`` on the host: int64 (1, w); ``query`` float32 (1, columns) on the host or ``device``.

        ``search`` computes the same from any query of that ``shape``.
        """
        if not (_Switch.on and self._works) or device.type != "cuda" or not self._warm(shape):
            return search(query.to(device)).cpu()
        recording = self._kept.get(shape)
        if recording is None and self._recorded < _MOST_RECORDED:
            recording = self._record(shape, int(query.shape[1]), device, search)
        return search(query.to(device)).cpu() if recording is None else recording.run(query)

    def clear(self) -> None:
        """Drop all recordings with the memory that they hold."""
        self._kept.clear()

    def _warm(self, shape: Shape) -> bool:
        return self._seen.put(shape, (self._seen.get(shape) or 0) + 1) > _WARM

    def _record(
        self, shape: Shape, columns: int, device: Device, search: Callable[[Tensor], Tensor]
    ) -> _Recording | None:
        try:
            recording = _Recording(columns, device, search)
        except RuntimeError as error:
            self.clear()
            if cause_of(error) == "out-of-memory":
                raise
            self._works = False
            load_torch().cuda.current_stream(device).synchronize()  # raises if it was more than the recording
            self._note(f"single queries are not recorded ({first_line(error)}); each kernel is launched")
            return None
        self._recorded += 1
        return self._kept.put(shape, recording)
