"""Single queries without launching each kernel by itself: recorded once as a CUDA graph, replayed afterwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from .door import load_torch

__all__ = ["Replays"]

_KEPT = 4
_MOST_RECORDED = 16
"""Recording takes some hundredths of a second: where shapes change all the time, plain launches are better."""
Shape = tuple[int, int, bool]
"""Candidates, lists to read, and whether tombstones are looked at."""
_WARM = 2
"""Searches of a shape that go the plain way before it is recorded: they compile the kernels."""


class _Recording:
    """One graph with the buffers that it reads and writes; used under the device's lock."""

    def __init__(self, columns: int, device: Any, search: Callable[[Any], Any]) -> None:
        torch = load_torch()
        self.query = torch.zeros((1, columns), dtype=torch.float32, device=device)
        self.host_query = torch.zeros((1, columns), dtype=torch.float32, device="cpu", pin_memory=True)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            found = search(self.query)
            self.host_found = torch.empty(found.shape, dtype=found.dtype, device="cpu", pin_memory=True)
            side.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
            self.found = search(self.query)
        torch.cuda.current_stream(device).wait_stream(side)

    def run(self, query: Any) -> Any:
        torch = load_torch()
        if query.device.type == "cpu":
            self.host_query.copy_(query)
            query = self.host_query
        self.query.copy_(query, non_blocking=True)
        self.graph.replay()
        self.host_found.copy_(self.found, non_blocking=True)
        torch.cuda.current_stream(self.query.device).synchronize()
        return self.host_found.clone()


class Replays:
    """Recordings of one body's single queries, by their shape. Used under the device's lock.

    A search that cannot be recorded is not tried again, and goes the plain way.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._seen: dict[Shape, int] = {}
        self._kept: OrderedDict[Shape, _Recording] = OrderedDict()
        self._works = True
        self._recorded = 0

    def run(self, shape: Shape, query: Any, device: Any, search: Callable[[Any], Any]) -> Any:
        """``search(query)`` on the host: int64 (1, w); ``query`` float32 (1, columns) on the host or ``device``.

        ``search`` computes the same from any query of that ``shape``.
        """
        if not self._works or device.type != "cuda" or not self._warm(shape):
            return search(query.to(device)).cpu()
        recording = self._kept.get(shape)
        if recording is None and self._recorded < _MOST_RECORDED:
            recording = self._record(shape, int(query.shape[1]), device, search)
        if recording is None:
            return search(query.to(device)).cpu()
        self._kept.move_to_end(shape)
        return recording.run(query)

    def clear(self) -> None:
        """Drop all recordings with the memory that they hold."""
        self._kept.clear()

    def _warm(self, shape: Shape) -> bool:
        if len(self._seen) > 64:
            self._seen.clear()
        self._seen[shape] = self._seen.get(shape, 0) + 1
        return self._seen[shape] > _WARM

    def _record(self, shape: Shape, columns: int, device: Any, search: Callable[[Any], Any]) -> _Recording | None:
        try:
            recording = _Recording(columns, device, search)
        except RuntimeError as error:
            self._works = False
            self.clear()
            load_torch().cuda.synchronize(device)  # raises if it was more than the recording
            self._note(f"single queries are not recorded ({str(error).splitlines()[0][:200]}); each kernel is launched")
            return None
        self._recorded += 1
        self._kept[shape] = recording
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return recording
