"""The base of the torch indexes: load, search, and answer from the host when the device does not."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ...errors import DeviceError, EngineError
from ...types import DeviceIncident, Effort, FloatArray, IndexPlan, IntArray, Metric, Rows
from ...utils.vectors import DeviceQueries
from ..base import Arrays, Body, NewerRows
from ..bitmap import Allowed
from ..costs import scan_cost
from ..exact_scan import padded
from ..vector_table import VectorTable
from .cuda_graphs import Replays
from .delta_buffer import DeviceTail
from .device_masks import Masks
from .device_rows import Queries, Resident, Space
from .failover import Guard, building
from .memory_accounting import account_of, predicted_bytes
from .runtime import device_tensor, host_tensor, open_device, settled, turn_on
from .search import (
    LEAST_CANDIDATES,
    Search,
    columns,
    found_in_batches,
    on_host,
    on_some_device,
    part,
    propose,
    some,
    widened,
)
from .upload import Layout, Load, Loaded

__all__ = ["TorchBody", "candidate_width"]

_INT8_SPARE = (4, 32)
"""int8 rows reorder near neighbours: at least so many times as many candidates as results, and so many more."""
_DEVICE_CALL = 15_000_000.0
"""Asking a device costs about 150 microseconds, in units of ``costs``: what a host scan does in less, it does."""


def candidate_width(k: int, effort: Effort) -> int:
    """How many rows the device proposes: what the effort says, but at least 2k and 32, so that float16 loses none."""
    return max(effort.rerank, 2 * k, LEAST_CANDIDATES)


class TorchBody(Body):
    """Rows on a device in float16 (int8 for int8 plans), and in float32 on the host.

    The device proposes, float32 distances decide: those of the host's rows, or of float32 rows on the device when
    ``plan.device_bytes`` leaves room for them. When the device fails the host answers by an exact scan; see
    :class:`~.failover.Guard`. A body read from a snapshot where its device cannot be used answers from the host,
    reports
    ``cpu`` as its device, and says so as an incident; building one there raises DeviceError instead.
    """

    accepts_device_queries: ClassVar[bool] = True

    def __init__(self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable, space: Space) -> None:
        super().__init__(plan, metric, rows, table)
        self._space = space
        self._masks = Masks()
        self._guard = guard = Guard(plan.device)
        self._account = account_of(plan.device)
        self._loaded: Loaded | None = None
        self._loading = threading.Lock()
        self._loader: threading.Thread | None = None
        self._replays = Replays(guard.remark)
        guard.relieved_by(self._masks.clear, self._replays.clear)
        self._tail: DeviceTail | None = None

    @property
    def device(self) -> str:
        return self.plan.device if self._loaded is not None and self._guard.serving else "cpu"

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device, newer rows beside it included, also while it rests; without the scratch that all
        searches share. 0 when the rows are not there."""
        loaded, tail = self._loaded, self._tail
        if loaded is None or self.plan.device == "cpu":
            return 0
        return loaded.nbytes + (0 if tail is None else tail.nbytes)

    def incidents(self) -> list[DeviceIncident]:
        return self._guard.incidents()

    def search(
        self, queries: Any, k: int, effort: Effort, allowed: Allowed | None = None
    ) -> tuple[FloatArray, IntArray]:
        """As :meth:`~memevolve_gpu.index.base.Body.search`; ``queries`` may also lie on a device: DeviceQueries, torch
        tensors, what has
        ``__cuda_array_interface__`` or ``__dlpack__``. They are not copied to the host unless the host answers.
        """
        given = queries.tensor if isinstance(queries, DeviceQueries) else queries
        tensor = self._lying_there(given, k, effort, allowed)
        if tensor is None:
            return super().search(on_host(queries), k, effort, allowed)
        return self._search(tensor, k, effort, None if allowed is None or allowed.count == self.n else allowed)

    def search_newer(
        self, newer: NewerRows, n: int, queries: Any, k: int, allowed: Allowed | None = None
    ) -> tuple[FloatArray, IntArray] | None:
        given = queries.tensor if isinstance(queries, DeviceQueries) else queries
        nq, count = int(given.shape[0]), n if allowed is None else allowed.count
        if self._loaded is None or not nq:
            return None
        here = isinstance(given, np.ndarray)
        if here and nq * scan_cost(count, self.dim) < _DEVICE_CALL:
            return None

        def ask(batch: int) -> tuple[FloatArray, IntArray] | None:
            tensor = given if here else device_tensor(given, self._ready().device)
            return self._tail_of(newer).search(n, tensor, k, allowed, batch)

        return self._guard.attempt(ask, nq)

    def _tail_of(self, newer: NewerRows) -> DeviceTail:
        if self._tail is None or self._tail.newer is not newer:
            self._tail = None  # its memory first
            note = self._guard.remark
            self._tail = DeviceTail(newer, self.metric, self._space, self._ready(), self._account, note)
        return self._tail

    def _lying_there(self, queries: Any, k: int, effort: Effort, allowed: Allowed | None) -> Any:
        """``queries`` on this body's device, when they lie on some device and this one is to answer; else None."""
        if isinstance(queries, np.ndarray) or not on_some_device(queries):
            return None
        if self._loaded is None or effort.exact or k < 1 or tuple(getattr(queries, "shape", ()))[1:] != (self.dim,):
            return None
        if allowed is not None and (allowed.n != self.n or allowed.count == 0):
            return None
        return self._guard.attempt(lambda _: settled(device_tensor(queries, self._ready().device), queries), 1)

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
                with turn_on(self.plan.device):
                    device = open_device(self.plan.device)
                self._loaded = self._brought(device, progress)
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
            try:
                self._loader.start()
            except RuntimeError as error:  # no thread to be had, or the process ends
                self._loading.release()
                self._guard.refuse(DeviceError(f"the index is not brought back to {self.plan.device}: {error}"))

    def _loaded_behind(self) -> None:
        try:
            self._load()
        except EngineError as error:
            self._guard.refuse(error)
        finally:
            self._loading.release()

    def _brought(self, device: Any, progress: Callable[[float], None]) -> Loaded:
        layout = self._layout(device)
        return self._run(self._load_of(layout, full=self._room_for_full(layout)), device, progress)

    def _extended(self, rows: Rows) -> TorchBody | None:
        """A body whose rows are copied on the device from those of this one; only the new ones come from the host."""
        held = self._loaded
        if held is None or not self._guard.serving or not self._space.holds(rows.vectors):
            return None
        table = self.table.extended(rows.vectors)
        full = held.rows.full is not None
        size = predicted_bytes(table.n, self.dim, self.plan.precision, nlist=self.nlist, full=full)
        with building(self.plan.device):
            plan = replace(self.plan, device_bytes=size)
            body, layout = self._longer(plan, self._slot_table_with(rows), table, rows.vectors, held)
            body.follow(held, layout, full=full)
        return body

    def follow(self, held: Loaded, layout: Layout, *, full: bool) -> None:
        """Bring the rows to the device where the first of them are ``held``, by another body: those are copied there.

        Raises:
            DeviceError: it refuses; a RuntimeError of torch where the caller is not :func:`~.failover.building`.
        """
        self._loaded = self._run(self._load_of(layout, full=full), held.device, lambda _: None, held.rows)

    def _longer(
        self, plan: IndexPlan, rows: Rows, table: VectorTable, vectors: FloatArray, held: Loaded
    ) -> tuple[TorchBody, Layout]:
        """A body over ``rows`` and ``table``, which end with the new ``vectors``, not on the device yet, and where its
        rows go if those that are ``held`` are kept."""
        raise NotImplementedError

    def _load_of(self, layout: Layout, *, full: bool) -> Load:
        return Load(self.table, self.plan.precision, self._space, self._device_metric, layout, full)

    def _run(
        self, load: Load, device: Any, progress: Callable[[float], None], before: Resident | None = None
    ) -> Loaded:
        self._account.take(load.nbytes, f"an index over {self.n} rows")
        giving = weakref.finalize(self, self._account.give, load.nbytes)
        try:
            return load.run(device, turn_on(self.plan.device), self._guard.remark, progress, before)
        except (RuntimeError, MemoryError):
            giving()
            raise

    def _room_for_full(self, layout: Layout) -> bool:
        whole = predicted_bytes(self.n, self.dim, "float32", nlist=len(layout.lists), full=True)
        return self.plan.precision == "float32" and self.plan.device_bytes >= whole

    @property
    def _device_metric(self) -> Metric:
        """Vectors of length one are as near as their dot product is large, and lists are made by distance."""
        return "ip" if self.metric == "ip" else "l2"

    def _ready(self) -> Loaded:
        if self._loaded is None:
            raise DeviceError(f"device {self.plan.device} does not hold this index", "device-error")
        return self._loaded

    # ------------------------------------------------------------------------------------------------ searching

    def _search(self, queries: Any, k: int, effort: Effort, allowed: Allowed | None) -> tuple[FloatArray, IntArray]:
        want, nq = candidate_width(k, effort), len(queries)
        if self.plan.precision == "int8":
            want = max(want, _INT8_SPARE[0] * k + _INT8_SPARE[1])
        count = self.n if allowed is None else allowed.count
        if nq == 0:
            return padded(0, k)
        if want >= count or nq * scan_cost(count, self.dim) < _DEVICE_CALL:
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
        rows = self._shown(loaded, allowed)
        cosine = self.metric == "cosine"
        search = Search(rows, loaded.device, loaded.operations, loaded.probe(nprobe), self._account, cosine)
        if len(queries) == 1 and (rows is loaded.rows or rows is loaded.tombstones.rows):
            with self._account.scratch(search.scratch_each(want), "a search"):
                return None, self._one(search, queries, want)
        return found_in_batches(search, queries, want, batch)

    def _shown(self, loaded: Loaded, allowed: Allowed | None) -> Resident:
        """The rows without those that are hidden."""
        if allowed is None:
            return loaded.rows
        if loaded.tombstones.show(allowed):
            return loaded.tombstones.rows
        return self._masks.rows(loaded.rows, allowed)

    def _one(self, search: Search, query: Any, want: int) -> IntArray:
        rows, probe = search.rows, search.probe
        some_more = 1 << (want - 1).bit_length()  # so that few numbers of candidates are in use

        def found(wide: Any) -> Any:
            return propose(rows, Queries.entered(None, wide, rows), some_more, search.operations, probe)

        here = isinstance(query, np.ndarray)
        wide = host_tensor(rows.entered(query, self._space)) if here else Queries.prepare(query, rows).wide
        shape = (some_more, 0 if probe is None else probe.nprobe, rows is self._ready().rows)
        return widened(self._replays.run(shape, wide, search.device, found).numpy(), want)

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
