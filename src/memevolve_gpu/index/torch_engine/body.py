"""What both bodies on a device share: loading, searching, and answering from the host when the device does not."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import DeviceError, EngineError
from ...types import DeviceIncident, Effort, FloatArray, IndexPlan, IntArray, Metric, Rows
from ...utils.device_arrays import DeviceQueries
from ..allowed import Allowed
from ..base import Arrays, Body
from ..costs import scan_cost
from ..rerank import Int8Table, VectorTable
from ..scan import padded
from .arrays import columns, joined, on_host, on_some_device, part, some, widened
from .door import device_tensor, host_tensor, load_torch, open_device
from .geometry import padded_columns
from .guard import Guard, building, lock_of
from .masks import Masks
from .memory import SCRATCH, account_of, predicted_bytes
from .operations import Operations
from .replay import Replays
from .resident import Queries, Resident, Space
from .search import Probe, decide, propose, scratch_each
from .work import Lists

__all__ = ["Layout", "TorchBody", "blocks_of", "candidate_width", "measured_space"]

_BLOCK_BYTES = 32 << 20
_DEVICE_CALL = 15_000_000.0
"""Asking a device costs about 150 microseconds, in units of ``costs``: what a host scan does in less, it does."""
_LEAST_CANDIDATES = 32
_MOST_QUERIES = 16_384
_USUAL = (1, 16, 32, 64, 128)
"""Numbers of queries at once for which different kernels are compiled."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where rows go on the device: ``places(start, stop)`` gives int64 places of those rows; ``groups`` of 32 in all.

    With lists, ``lists`` holds the groups of each, and ``centroids`` float32 (nlist, columns) lie in the body's space.
    """

    groups: int
    places: Callable[[int, int], IntArray]
    lists: list[int]
    centroids: Any = None


@dataclass(frozen=True, slots=True)
class _Loaded:
    rows: Resident
    device: Any
    operations: Operations
    lists: Lists | None
    centroids: Any
    norms: Any

    def probe(self, nprobe: int) -> Probe | None:
        if self.lists is None or nprobe == 0:
            return None
        return Probe(self.lists, self.centroids, self.norms, nprobe)


def candidate_width(k: int, effort: Effort) -> int:
    """How many rows the device proposes: what the effort says, but at least 2k and 32, so that float16 loses none."""
    return max(effort.rerank, 2 * k, _LEAST_CANDIDATES)


def blocks_of(table: VectorTable) -> Iterator[tuple[int, FloatArray]]:
    """The rows in blocks of 32 MB with the position of the first."""
    step = max(1024, _BLOCK_BYTES // (4 * table.dim))
    for start in range(0, table.n, step):
        yield start, np.ascontiguousarray(table.gather(slice(start, min(start + step, table.n))))


def measured_space(table: VectorTable, device: Any, turn: AbstractContextManager[Any]) -> Space:
    """The space of a table's rows; int8 rows stay where they are, so that their codes can be taken over.

    ``turn``: the device's lock, held step by step.
    """
    least = np.full(table.dim, np.inf, np.float32)
    most = np.full(table.dim, -np.inf, np.float32)
    for _, block in blocks_of(table):
        with turn:
            rows = host_tensor(block).to(device)
            np.minimum(least, rows.amin(0).cpu().numpy(), out=least)
            np.maximum(most, rows.amax(0).cpu().numpy(), out=most)
    step = max(1, table.n // 1024)
    sample = table.gather(np.arange(0, table.n, step, dtype=np.int64))
    return Space.around(sample, least, most, centred=table.precision != "int8")


class TorchBody(Body):
    """Rows on a device in float16 (int8 for int8 plans), and on the host in the plan's precision.

    The device proposes, float32 distances decide: those of the host's rows, or of float32 rows on the device when
    ``plan.device_bytes`` leaves room for them. When the device fails the host answers by an exact scan; see
    :class:`~.guard.Guard`. A body read from a snapshot where its device cannot be used answers from the host, reports
    ``cpu`` as its device, and says so as an incident; building one there raises DeviceError instead.
    """

    accepts_device_queries: ClassVar[bool] = True

    def __init__(self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, space: Space) -> None:
        super().__init__(plan, metric, rows, table)
        self._space = space
        self._masks = masks = Masks()
        self._guard = Guard(plan.device, masks.clear)
        self._account = account_of(plan.device)
        self._loaded: _Loaded | None = None
        self._loading = threading.Lock()
        self._loader: threading.Thread | None = None
        self._replays = Replays(self._guard.remark)

    @property
    def device(self) -> str:
        return self.plan.device if self._loaded is not None and self._guard.serving else "cpu"

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device, also while it rests, without the scratch that searches share; 0 when the rows are
        not there."""
        if self._loaded is None or self.plan.device == "cpu":
            return 0
        return self._held(self._loaded)

    def incidents(self) -> list[DeviceIncident]:
        return self._guard.incidents()

    def search(
        self, queries: Any, k: int, effort: Effort, allowed: Allowed | None = None
    ) -> tuple[FloatArray, IntArray]:
        """As :meth:`~..base.Body.search`; ``queries`` may also lie on a device: DeviceQueries, torch tensors, what has
        ``__cuda_array_interface__`` or ``__dlpack__``. They are not copied to the host unless the host answers.
        """
        given = queries.tensor if isinstance(queries, DeviceQueries) else queries
        tensor = self._lying_there(given, k, effort, allowed)
        if tensor is None:
            return super().search(on_host(queries), k, effort, allowed)
        return self._search(tensor, k, effort, None if allowed is None or allowed.count == self.n else allowed)

    def _lying_there(self, queries: Any, k: int, effort: Effort, allowed: Allowed | None) -> Any:
        """``queries`` on this body's device, when they lie on some device and this one is to answer; else None."""
        if isinstance(queries, np.ndarray) or not on_some_device(queries):
            return None
        if self._loaded is None or effort.exact or k < 1 or tuple(getattr(queries, "shape", ()))[1:] != (self.dim,):
            return None
        if allowed is not None and (allowed.n != self.n or allowed.count == 0):
            return None
        return self._guard.attempt(lambda _: device_tensor(queries, self._ready().device), 1)

    # -------------------------------------------------------------------------------------------------- loading

    def _layout(self, device: Any) -> Layout:
        """Where the rows go."""
        raise NotImplementedError

    def _load(self, progress: Callable[[float], None] = lambda _: None) -> None:
        """Bring the rows to the device.

        Raises:
            DeviceError: it refuses.
        """
        with building(self.plan.device):
            if self._loaded is None and self.n:
                self._loaded = self._brought(open_device(self.plan.device), progress)
        progress(1.0)

    def _load_or_remark(self) -> None:
        try:
            self._load()
        except DeviceError as error:
            self._guard.refuse(error)

    def _load_behind(self) -> None:
        """Bring the rows to the device once more while the host answers; one thread at a time does."""
        if self._loading.acquire(blocking=False):
            self._loader = threading.Thread(target=self._loaded_behind, name="memevolve-device", daemon=True)
            self._loader.start()

    def _loaded_behind(self) -> None:
        try:
            self._load()
        except EngineError as error:
            self._guard.refuse(error)
        finally:
            self._loading.release()

    def _brought(self, device: Any, progress: Callable[[float], None]) -> _Loaded:
        layout = self._layout(device)
        full = self.plan.precision == "float32" and self._room_for_full(layout)
        amount = _bytes_of(self.table, layout, full=full)
        self._account.take(amount, f"an index over {self.n} rows")
        giving = weakref.finalize(self, self._account.give, amount)
        try:
            int8 = isinstance(self.table, Int8Table)
            shape = (self.n, self.dim, layout.groups)
            rows = Resident.empty(self._device_metric, self._space, shape, device, int8=int8, full=full)
            self._fill(rows, layout, device, progress)
            loaded = self._finished(rows, layout, device)
            self._warm(loaded)
            return loaded
        except (RuntimeError, MemoryError):
            giving()
            raise

    def _fill(self, rows: Resident, layout: Layout, device: Any, progress: Callable[[float], None]) -> None:
        for start, block in blocks_of(self.table):
            stop = start + len(block)
            with lock_of(self.plan.device):
                codes = None
                if isinstance(self.table, Int8Table):
                    parts = (self.table.rows[start:stop], self.table.scales[start:stop])
                    codes = tuple(host_tensor(part).to(device) for part in parts)
                places = host_tensor(layout.places(start, stop)).to(device)
                vectors = host_tensor(block).to(device) if rows.full is not None else None
                rows.put(start, self._space.enter(block, rows.columns, device), places, codes, vectors)
            if stop < self.n:
                progress(stop / self.n)

    def _finished(self, rows: Resident, layout: Layout, device: Any) -> _Loaded:
        operations = Operations(device, self._guard.remark)
        if not layout.lists:
            return _Loaded(rows, device, operations, None, None, None)
        norms = layout.centroids.square().sum(1)
        if rows.metric == "ip":
            norms.zero_()
        return _Loaded(rows, device, operations, Lists.of(layout.lists, device), layout.centroids, norms)

    def _warm(self, loaded: _Loaded) -> None:
        """Compile the kernels now rather than in the first search, and wait for the rows: it may use another stream."""
        if loaded.device.type != "cuda":
            return
        each = scratch_each(loaded.rows, _LEAST_CANDIDATES, loaded.rows.groups)
        for nq in [nq for nq in _USUAL if nq == 1 or nq * each <= SCRATCH]:
            raw = load_torch().zeros((nq, self.dim), dtype=load_torch().float32, device=loaded.device)
            asked = Queries.prepare(raw, loaded.rows)
            for nprobe in (0, 1) if loaded.lists is not None else (0,):
                propose(loaded.rows, asked, _LEAST_CANDIDATES, loaded.operations, loaded.probe(nprobe))
        load_torch().cuda.synchronize(loaded.device)

    def _room_for_full(self, layout: Layout) -> bool:
        return self.plan.device_bytes >= predicted_bytes(
            self.n, self.dim, "float32", nlist=len(layout.lists), full=True
        )

    @property
    def _device_metric(self) -> Metric:
        """Vectors of length one are as near as their dot product is large, and lists are made by distance."""
        return "ip" if self.metric == "ip" else "l2"

    def _ready(self) -> _Loaded:
        if self._loaded is None:
            raise DeviceError(f"device {self.plan.device} does not hold this index", "device-error")
        return self._loaded

    def _held(self, loaded: _Loaded) -> int:
        lists = (loaded.centroids, loaded.norms, None if loaded.lists is None else loaded.lists.start)
        return loaded.rows.nbytes + sum(int(one.numel() * one.element_size()) for one in lists if one is not None)

    # ------------------------------------------------------------------------------------------------ searching

    def _search(self, queries: Any, k: int, effort: Effort, allowed: Allowed | None) -> tuple[FloatArray, IntArray]:
        want, nq = candidate_width(k, effort), len(queries)
        count = self.n if allowed is None else allowed.count
        if nq == 0:
            return padded(0, k)
        if want >= count or nq * scan_cost(count, self.dim, self.table.precision) < _DEVICE_CALL:
            return self.table.scan(on_host(queries), k, allowed)
        if self._loaded is None:
            if self._guard.serving:
                self._load_behind()
            return self.table.scan(on_host(queries), k, allowed)
        enough = min(k, count) if allowed is None else min(want, count)
        return self._ask(queries, k, (want, enough, self._lists_to_probe(effort)), allowed)

    def _ask(
        self, queries: Any, k: int, widths: tuple[int, int, int], allowed: Allowed | None
    ) -> tuple[FloatArray, IntArray]:
        """Results by the device, or by the host where it does not answer."""
        want, enough, nprobe = widths
        nq = len(queries)
        found = self._guard.attempt(lambda batch: self._on_device(queries, want, nprobe, allowed, batch), nq)
        if found is None:
            return self.table.scan(on_host(queries), k, allowed)
        distances, positions = found
        if distances is None:
            full = positions
            distances, positions = self.table.rerank(on_host(queries), positions, k)
        else:
            full, distances, positions = positions, *columns(distances, positions, k)
        short = np.flatnonzero(full[:, enough - 1] < 0) if nprobe else np.empty(0, np.int64)
        if short.size:  # their lists hold too few: twice as many, finally all
            wider = self._wider(nprobe)
            again = self._ask(some(queries, short), k, (want, enough, wider), allowed)
            distances[short], positions[short] = again
        return distances, positions

    def _lists_to_probe(self, effort: Effort) -> int:  # noqa: ARG002 - bodies with lists ask
        """How many; 0 for everything."""
        return 0

    def _wider(self, nprobe: int) -> int:  # noqa: ARG002 - as above
        return 0

    def _on_device(
        self, queries: Any, want: int, nprobe: int, allowed: Allowed | None, batch: int
    ) -> tuple[FloatArray | None, IntArray]:
        """Candidates (nq, want); with their distances, nearest first, where float32 rows lie on the device."""
        loaded = self._ready()
        rows = loaded.rows if allowed is None else self._masks.rows(loaded.rows, allowed)
        probe = loaded.probe(nprobe)
        width = loaded.rows.groups if probe is None else probe.lists.widest[nprobe]
        each = scratch_each(rows, want, width)
        if len(queries) == 1 and allowed is None:
            with self._account.scratch(each, "a search"):
                return None, self._one(loaded, queries, want, nprobe)
        step = max(1, min(batch, _MOST_QUERIES, SCRATCH // each))
        found = []
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            with self._account.scratch(each * len(part), "a search"):
                asked = Queries.prepare(device_tensor(part, loaded.device), rows)
                positions = propose(rows, asked, want, loaded.operations, probe)
                found.append(self._decided(rows, asked, positions, want))
        return joined(found, want)

    def _one(self, loaded: _Loaded, query: Any, want: int, nprobe: int) -> IntArray:
        rows, probe, operations = loaded.rows, loaded.probe(nprobe), loaded.operations
        some_more = 1 << (want - 1).bit_length()  # so that few numbers of candidates are in use

        def search(wide: Any) -> Any:
            return propose(rows, Queries.entered(None, wide, rows), some_more, operations, probe)

        here = isinstance(query, np.ndarray)
        wide = host_tensor(rows.entered(query, self._space)) if here else Queries.prepare(query, rows).wide
        return widened(self._replays.run((some_more, nprobe), wide, loaded.device, search).numpy(), want)

    def _decided(self, rows: Resident, asked: Queries, positions: Any, k: int) -> tuple[FloatArray | None, IntArray]:
        if rows.full is None:
            return None, positions.cpu().numpy()
        distances, positions = decide(rows, asked, positions, k, cosine=self.metric == "cosine")
        return distances.cpu().numpy(), positions.cpu().numpy()

    # -------------------------------------------------------------------------------------------------- parts

    def _engine_parts(self) -> Arrays:
        return {"centre": self._space.centre, "scale": np.array([self._space.scale], np.float32)}

    def _engine_bytes(self) -> int:
        return self._space.centre.nbytes + 4

    @staticmethod
    def _space_of(parts: Arrays, dim: int) -> Space:
        centre, scale = part(parts, "centre", np.float32, (dim,)), part(parts, "scale", np.float32, (1,))
        if not np.isfinite(centre).all() or not 0 < float(scale[0]) < np.inf:
            raise EngineError("the index's centre or scale makes no sense; rebuild the index")
        return Space(centre, float(scale[0]))


def _bytes_of(table: VectorTable, layout: Layout, *, full: bool) -> int:
    columns = padded_columns(table.dim)
    row = columns + 12 if table.precision == "int8" else 2 * columns + 8
    lists = len(layout.lists) * (4 * columns + 12)
    return layout.groups * 32 * row + lists + (4 * table.n * table.dim if full else 0)
