"""A hypothesis state machine drives a store on a stand-in for a GPU and a plain dict side by side, through failures of
the device, restarts, another process on the same files, and views that are searched long after they were taken."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from gpu_kit import Card, machine_with
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import FakeBatchEmbedder

from memevolve_gpu import VectorStore
from memevolve_gpu.errors import DeviceError, StorageError
from memevolve_gpu.index import device_failover
from memevolve_gpu.index.torch_gpu import delta_buffer, ivf, runtime, search
from memevolve_gpu.index.torch_gpu import index as index_module
from memevolve_gpu.index.torch_gpu.device_rows import DeviceRows
from memevolve_gpu.index.torch_gpu.index import TorchIndex
from memevolve_gpu.index.torch_gpu.memory_accounting import account_of
from memevolve_gpu.live import live_index, rebuild, scheduler
from memevolve_gpu.live.view import View, ViewFilter
from memevolve_gpu.records.filters import parse
from memevolve_gpu.types import FloatArray, IntArray, SearchParams

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.slow

DIM, DEVICE = 8, "cuda:0"
IDS = [f"u{i}" for i in range(500)]
KINDS = ("skill", "tool")
FAULTS: dict[str, Callable[[], Exception]] = {
    "full": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "limit": lambda: DeviceError("its budget has no room", "limit"),
    "passing": lambda: RuntimeError("CUDA error: invalid argument"),
    "lost": lambda: RuntimeError("CUDA error: an illegal memory access was encountered"),
}
STEPS = ("propose", "empty", "put", "half a put", "index_fill_", "only", "take_over")


class Row(NamedTuple):
    vector: FloatArray
    kind: str


@dataclass(frozen=True)
class Held:
    """A view, a mask for those of kind "skill" made for it, and what the store held then."""

    view: View
    mask: ViewFilter | None
    model: dict[str, Row]


class Faults:
    """The next call of ``step`` fails with ``error``, once."""

    def __init__(self) -> None:
        self.step, self.error = "", ""

    def strike(self, step: str) -> None:
        if step == self.step:
            self.step = ""
            error = FAULTS[self.error]()
            raise error

    def before(self, step: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kinds: Any) -> Any:
            self.strike(step)
            return real(*args, **kinds)

        return call

    def put(self, real: Callable[..., None]) -> Callable[..., None]:
        """Half-way: all of it is there but the last, the float32 rows."""

        def call(rows: DeviceRows, start: int, block: Any, vectors: Any = None) -> None:
            self.strike("put")
            real(rows, start, block, vectors)
            if self.step == "half a put" and rows.float32_rows is not None:
                rows.float32_rows[start : start + len(block)] = 0
                self.strike("half a put")

        return call


def patched(faults: Faults) -> ExitStack:
    """``cuda:0`` is the CPU and fails as it is told; a few rows are many, and the device is asked for all of them."""
    stack = ExitStack()
    propose, empty = search.propose, DeviceRows.empty
    for one in (index_module, ivf):
        stack.enter_context(patch.object(one, "open_device", lambda _: torch.device("cpu")))
    for one in (index_module, search):
        stack.enter_context(patch.object(one, "propose", faults.before("propose", propose)))
    for owner, name, changed in (
        (runtime, "current", lambda _: nullcontext()),
        (runtime, "_release", lambda _: None),
        (index_module, "_DEVICE_CALL", 0.0),
        (delta_buffer, "_LEAST_ROWS", 16),
        (scheduler, "DELTA_ROWS", 30),
        (scheduler, "DELTA_FRACTION", 0.0),
        (scheduler, "DEAD_ROWS", 120),
        (live_index, "PAGE", 16),
        (rebuild, "_training", lambda *_: None),
        (DeviceRows, "empty", faults.before("empty", empty)),
        (DeviceRows, "put", faults.put(DeviceRows.put)),
        (DeviceRows, "only", faults.before("only", DeviceRows.only)),
        (DeviceRows, "take_over", faults.before("take_over", DeviceRows.take_over)),
        (torch.Tensor, "index_fill_", faults.before("index_fill_", torch.Tensor.index_fill_)),
    ):
        stack.enter_context(patch.object(owner, name, changed))
    return stack


class DeviceAgreesWithDict(RuleBasedStateMachine):
    @initialize(
        index_type=st.sampled_from(["flat", "ivf"]),
        metric=st.sampled_from(["l2", "cosine", "ip"]),
        seed=st.integers(0, 99),
        float32_rows=st.booleans(),
    )
    def open(self, index_type: str, metric: str, seed: int, float32_rows: bool) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.faults = Faults()
        self.stack = patched(self.faults)
        self.stack.enter_context(patch.object(TorchIndex, "_float32_rows_fit", lambda *_: float32_rows))
        self.metric, self.used = metric, account_of(DEVICE).used
        self.config = {"background": False, "min_training_units": 60, "index_type": index_type, "metric": metric}
        self.rng = np.random.default_rng(seed)
        self.model: dict[str, Row] = {}
        self.held: list[Held] = []
        self.store, self.other = self.opened(Card()), self.opened(None)
        self.put(IDS[:240])
        self.store.run_maintenance()
        assert self.store._open.live.view.index.device == DEVICE

    def opened(self, card: Card | None) -> VectorStore:
        machine = machine_with(card, "cpu" if card is None else "cuda")
        return VectorStore(self.folder / "store", FakeBatchEmbedder(DIM), storage_config=self.config, machine=machine)

    def put(self, ids: list[str], by: str = "store") -> None:
        vectors = self.rng.standard_normal((len(ids), DIM)).astype(np.float32)
        kinds = [KINDS[int(self.rng.integers(2))] for _ in ids]
        units = [
            {"id": one, "content": f"about {one}", "metadata": {"kind": k}} for one, k in zip(ids, kinds, strict=True)
        ]
        getattr(self, by).store_batch(units, embeddings=vectors)
        self.model |= {one: Row(v, k) for one, v, k in zip(ids, vectors, kinds, strict=True)}

    # ------------------------------------------------------------------------------------------------- writing

    @rule(count=st.integers(1, 90), start=st.integers(0, len(IDS)))
    def put_many(self, count: int, start: int) -> None:
        self.put([IDS[(start + i) % len(IDS)] for i in range(count)])

    @rule(which=st.sampled_from(IDS), times=st.integers(1, 40))
    def put_one_many_times(self, which: str, times: int) -> None:
        for _ in range(times):
            self.put([which])

    @rule(which=st.sampled_from(IDS), kind=st.sampled_from(KINDS))
    def change_kind(self, which: str, kind: str) -> None:
        """The vector stays where it is."""
        unit = {"id": which, "content": f"about {which}", "metadata": {"kind": kind}}
        assert self.store.update(which, unit) == (which in self.model)
        if which in self.model:
            self.model[which] = Row(self.model[which].vector, kind)

    @rule(start=st.integers(0, len(IDS)), count=st.integers(1, 40), by=st.sampled_from(["store", "other"]))
    def delete(self, start: int, count: int, by: str) -> None:
        ids = [IDS[(start + 3 * i) % len(IDS)] for i in range(count)]
        assert getattr(self, by).delete_batch(ids) == len(set(ids) & set(self.model))
        for one in ids:
            self.model.pop(one, None)

    @rule(refill=st.integers(0, 150))
    def clear(self, refill: int) -> None:
        self.store.clear()
        self.model = {}
        if refill:
            self.put(IDS[:refill])
            self.come_back()

    @rule()
    def maintain(self) -> None:
        self.come_back()

    @rule(count=st.integers(31, 60), start=st.integers(0, len(IDS)), by=st.sampled_from(["store", "other"]))
    def grow(self, count: int, start: int, by: str) -> None:
        self.put([IDS[(start + 7 * i) % len(IDS)] for i in range(count)], by)
        self.agrees()
        getattr(self, by).run_maintenance()

    @rule(how=st.sampled_from(["reload", "leave_device"]), stay=st.booleans())
    def leave(self, how: str, stay: bool) -> None:
        index = self.store._open.live
        index.reload("a test wants it") if how == "reload" else index.leave_device()
        if not stay:
            self.agrees()
            self.come_back()

    def come_back(self) -> None:
        """What rests has rested, and what is due is done."""
        index = self.store._open.live
        index.device_manager._backoff_reason = ""
        index.device_manager._broken.clear()
        for view in [index.view, *(one.view for one in self.held)]:
            if isinstance(view.index, TorchIndex):
                view.index._failover._until = float("-inf")
        self.store.run_maintenance()

    # ------------------------------------------------------------------------------------------------- failing

    @rule(
        step=st.sampled_from(STEPS),
        error=st.sampled_from(["full", "limit", "passing"]),
        count=st.integers(1, 60),
        start=st.integers(0, len(IDS)),
    )
    def fail(self, step: str, error: str, count: int, start: int) -> None:
        """Within what follows: rows come and go, are looked for, and move into the index."""
        self.faults.step, self.faults.error = step, error
        self.put([IDS[(start + 5 * i) % len(IDS)] for i in range(count)])
        self.agrees()
        self.store.run_maintenance()
        self.agrees()
        self.faults.step = ""
        self.come_back()

    @rule(step=st.sampled_from(STEPS))
    def lose_the_device(self, step: str) -> None:
        self.faults.step, self.faults.error = step, "lost"
        self.agrees()
        self.store.run_maintenance()
        self.agrees()
        self.restart(device=True)

    @rule(pages=st.integers(0, 2), count=st.integers(1, 60), start=st.integers(0, len(IDS)))
    def abandon_a_draft(self, pages: int, count: int, start: int) -> None:
        """The log cannot be read to its end: what was applied of it must leave no trace."""
        index = self.store._open.live
        real, left = index.records.read_after, [pages]

        def read_after(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise StorageError("the disk is slow today")
            return real(*args)

        before = index.catch_up()
        gone = IDS[start : start + 5]
        self.other.delete_batch(gone)
        self.model = {one: row for one, row in self.model.items() if one not in gone}
        self.put([IDS[(start + 2 * i) % len(IDS)] for i in range(count)], "other")
        with patch.object(index.records, "read_after", read_after), suppress(StorageError):
            index.catch_up()
            assert left[0] >= 0
        assert index.view is before or left[0] >= 0

    @rule(device=st.booleans())
    def restart(self, device: bool) -> None:
        self.store.close()
        device_failover._lost.clear()
        self.faults.step = ""
        self.store = self.opened(Card() if device else None)
        if device:
            self.come_back()

    # ----------------------------------------------------------------------------------------------- searching

    @rule()
    def hold(self) -> None:
        view, view_filter = self.store._open.live._view_and_mask(parse({"metadata.kind": "skill"}))
        self.held = [*self.held[-3:], Held(view, view_filter, dict(self.model))]

    @precondition(lambda self: bool(getattr(self, "held", None)))
    @rule(which=st.integers(0, 3), k=st.integers(1, 50), nq=st.sampled_from([1, 7]), filtered=st.booleans())
    def search_held(self, which: int, k: int, nq: int, filtered: bool) -> None:
        self.check_view(self.held[which % len(self.held)], self.queries(nq), k, filtered)

    @rule(k=st.integers(1, 50))
    def search_views_at_once(self, k: int) -> None:
        self.hold()
        jobs = [(one, self.queries(3), filtered) for one in self.held * 2 for filtered in (False, True)]
        with ThreadPoolExecutor(4) as pool:
            for job in [pool.submit(self.check_view, one, queries, k, filtered) for one, queries, filtered in jobs]:
                job.result()

    @rule(k=st.integers(1, 50), nq=st.sampled_from([1, 7]), filtered=st.booleans())
    def search(self, k: int, nq: int, filtered: bool) -> None:
        for store in (self.store, self.other):
            queries = self.queries(nq)
            found = store.search_vectors(queries, k, {"metadata.kind": "skill"} if filtered else None, recall=1.0)
            self.check(self.model, queries, k, filtered, found[0], [[one for one in row if one] for row in found[1]])

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "store"):
            assert self.store.count() == len(self.model)
            view, view_filter = self.store._open.live._view_and_mask(parse({"metadata.kind": "skill"}))
            assert view.count == len(self.model)
            self.check_view(Held(view, view_filter, self.model), self.queries(2), 10, False)
            self.check_view(Held(view, view_filter, self.model), self.queries(1), 5, True)

    def queries(self, nq: int) -> FloatArray:
        found = self.rng.standard_normal((nq, DIM)).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True) if self.metric == "cosine" else found

    def check_view(self, held: Held, queries: FloatArray, k: int, filtered: bool) -> None:
        params = SearchParams() if isinstance(held.view.index, TorchIndex) else SearchParams(exact=True)
        found = held.view.search(queries, k, params, held.mask if filtered else None)
        ids = [found.ids(row) for row in range(len(queries))]
        self.check(held.model, queries, k, filtered, found.distances, ids)

    def check(
        self, model: dict[str, Row], queries: FloatArray, k: int, filtered: bool, distances: FloatArray, ids: Any
    ) -> None:
        """Distances are the least there are, and belong to the rows that are named."""
        known = {one: row.vector for one, row in model.items() if not filtered or row.kind == "skill"}
        names, truth = list(known), self.truth(queries, np.array(list(known.values())).reshape(-1, DIM))
        place: dict[str, IntArray | int] = {one: at for at, one in enumerate(names)}
        for row, found in enumerate(ids):
            n = min(k, len(names))
            assert len(found) == len(set(found)) == n, f"{len(found)} of {n} rows"
            assert set(found) <= set(known)
            np.testing.assert_allclose(distances[row, :n], np.sort(truth[row])[:n], rtol=1e-4, atol=1e-4)
            own = truth[row, [place[one] for one in found]]
            np.testing.assert_allclose(distances[row, :n], own, rtol=1e-4, atol=1e-4)
            assert np.isinf(distances[row, n:]).all()

    def truth(self, queries: FloatArray, rows: FloatArray) -> Any:
        if self.metric == "l2":
            return ((queries[:, None].astype(float) - rows[None]) ** 2).sum(2)
        if self.metric == "cosine":
            queries, rows = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (queries, rows))
        return (1.0 if self.metric == "cosine" else 0.0) - queries.astype(float) @ rows.T

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.other.close()
            self.held, self.faults.step = [], ""
            del self.store, self.other
            gc.collect()
            assert account_of(DEVICE).used <= self.used, "bytes are counted that nobody holds"
            self.stack.close()
            device_failover._lost.clear()
            account_of(DEVICE).limit = None
            shutil.rmtree(self.folder)


TestDeviceAgreesWithDict = DeviceAgreesWithDict.TestCase
TestDeviceAgreesWithDict.settings = settings(
    max_examples=12,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
