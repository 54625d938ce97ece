"""A store on the torch engine: indexes, newest rows and deaths on a device whose tensors lie on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_kit import Card, machine_with, timed_as
from support import SEED, FakeBatchEmbedder

from memevolve_gpu import VectorStore
from memevolve_gpu.index.exact_scan import exact_scan
from memevolve_gpu.index.torch_gpu import index, ivf, runtime
from memevolve_gpu.index.torch_gpu.memory_accounting import account_of
from memevolve_gpu.live import scheduler
from memevolve_gpu.types import FloatArray, Metric, SearchParams
from memevolve_gpu.utils.vectors import DeviceQueries

DIM = 16
DELTA = 150


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torch, whose ``cuda:0`` is the CPU here; a few rows are many, and the device is asked for all of them."""
    module = pytest.importorskip("torch", reason="torch is not installed")
    for one in (index, ivf):
        monkeypatch.setattr(one, "open_device", lambda _: module.device("cpu"))
    monkeypatch.setattr(runtime, "current", lambda _: nullcontext())
    monkeypatch.setattr(runtime, "_release", lambda _: None)
    monkeypatch.setattr(index, "_DEVICE_CALL", 0.0)
    monkeypatch.setattr(scheduler, "DELTA_ROWS", DELTA)
    monkeypatch.setattr(scheduler, "DELTA_FRACTION", 0.0)
    yield module
    account_of("cuda:0").limit = None


class Model:
    """What the store should hold, and what it should answer."""

    def __init__(self, metric: Metric, seed: int) -> None:
        self.rng, self.metric, self.made = np.random.default_rng(seed), metric, 0
        self.vectors: dict[str, FloatArray] = {}

    def batch(self, count: int) -> tuple[list[dict[str, Any]], FloatArray]:
        """New units, a fifth of them in the place of old ones."""
        ids = [f"u{self.made + i}" for i in range(count)]
        self.made += count
        if self.vectors:
            ids[: count // 5] = self.some(count // 5)
        vectors = self.rng.standard_normal((count, DIM)).astype(np.float32)
        self.vectors |= dict(zip(ids, vectors, strict=True))
        kinds = ["skill" if is_skill(one) else "tool" for one in ids]
        units = [{"id": one, "content": f"about {one}", "type": kind} for one, kind in zip(ids, kinds, strict=True)]
        return units, vectors

    def some(self, count: int) -> list[str]:
        found: list[str] = self.rng.choice(sorted(self.vectors), count, replace=False).tolist()
        return found

    def truth(self, queries: FloatArray, *, skills: bool = False) -> tuple[FloatArray, list[list[str]]]:
        """The distances and ids of the ten nearest."""
        ids = [one for one in self.vectors if not skills or is_skill(one)]
        rows = np.stack([self.vectors[one] for one in ids])
        if self.metric == "cosine":
            rows, queries = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (rows, queries))
        distances, places = exact_scan(queries, rows, 10, self.metric)
        return distances, [[ids[place] for place in row] for row in places]

    def queries(self) -> FloatArray:
        return self.rng.standard_normal((40, DIM)).astype(np.float32)

    def check(self, store: VectorStore, *, skills: bool = False) -> None:
        queries = self.queries()
        truth, ids = self.truth(queries, skills=skills)
        found = store.search_vectors(queries, 10, {"type": "skill"} if skills else None, recall=1.0)
        np.testing.assert_allclose(found[0], truth, rtol=1e-4, atol=1e-4)
        assert found[1] == ids


def is_skill(one: str) -> bool:
    return int(one[1:]) % 2 == 0


def opened(folder: Path, metric: str, index_type: str, card: Card | None = None, request: str = "cuda") -> VectorStore:
    chosen = {"background": False, "min_training_units": 100, "index_type": index_type, "metric": metric}
    machine = machine_with(card, "cpu" if card is None else request)
    return VectorStore(folder / "memory", FakeBatchEmbedder(DIM), storage_config=chosen, machine=machine)


@pytest.mark.slow
@pytest.mark.parametrize(("index_type", "faster"), [("ivf", "device"), ("flat", "host"), ("ivf", "by size")])
@pytest.mark.usefixtures("torch")
def test_a_routed_store_that_grows_and_forgets(
    index_type: str, faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under DEVICE=auto both sides follow every write, whichever answers; a restart goes on from the host's index."""
    host = {"device": lambda nq: 1.0, "host": lambda nq: 1e-6, "by size": lambda nq: 1e-3 * nq}[faster]
    timed_as(monkeypatch, lambda _: 5e-3, host)
    model, sides = Model("l2", SEED), set()
    for start in (0, 6):
        with opened(tmp_path, "l2", index_type, Card(), "auto") as store:
            for lock in range(start, start + 6):
                units, vectors = model.batch(400 if lock == 0 else 90)
                store.store_batch(units, embeddings=vectors)
                for gone in model.some(12):
                    assert store.delete(gone)
                    del model.vectors[gone]
                model.check(store)
                model.check(store, skills=True)
                store.run_maintenance()
                view = store._open.live.view
                sides.add((view.index.plan.engine, view.host_side is not None))
                if view.host_side is not None:
                    assert (view.host_side.index.slots == view.index.slots).all()
    assert ("torch", True) in sides or faster == "host"
    assert ("torch", False) not in sides


@pytest.mark.slow
@pytest.mark.parametrize("index_type", ["flat", "ivf"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.usefixtures("torch")
def test_a_store_that_grows_and_forgets(index_type: str, metric: Metric, tmp_path: Path) -> None:
    model, done = Model(metric, SEED), []
    with opened(tmp_path, metric, index_type, Card()) as store:
        for lock in range(12):
            units, vectors = model.batch(400 if lock == 0 else 90)
            store.store_batch(units, embeddings=vectors)
            for gone in model.some(12):
                assert store.delete(gone)
                del model.vectors[gone]
            model.check(store)
            model.check(store, skills=True)
            live = store._open.live
            assert live.view.index.device_bytes == live.device_manager.machine.holdings.on("cuda:0")
            done += store.run_maintenance()["actions"]
            model.check(store)
        figures = store.statistics()
        assert (figures["index"]["engine"], figures["index"]["device"]) == ("torch", "cuda:0")
        assert any(action.startswith("extended") for action in done), done
        assert any(action.startswith("built") for action in done), done
        assert figures["device"]["incidents"] == {}
    with opened(tmp_path, metric, index_type) as store:
        model.check(store)


def test_queries_on_the_device_stay_there(tmp_path: Path, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("l2", SEED)
    with opened(tmp_path, "l2", "flat", Card()) as store:
        for count in (400, 100):
            units, vectors = model.batch(count)
            store.store_batch(units, embeddings=vectors)
            if count == 400:
                store.run_maintenance()
        for gone in model.some(40):
            store.delete(gone)
            del model.vectors[gone]
        view, queries = store._open.live.catch_up(), model.queries()
        assert view.delta_n == 100
        assert view.index_dead
        assert view.delta_dead
        monkeypatch.setattr(DeviceQueries, "host", lambda _: pytest.fail("they came to the host"))
        found = view.search(DeviceQueries(torch.from_numpy(queries)), 10, SearchParams())
        truth, ids = model.truth(queries)
        np.testing.assert_allclose(found.distances, truth, rtol=1e-4, atol=1e-4)
        assert [found.ids(row) for row in range(40)] == ids


@pytest.mark.usefixtures("torch")
def test_nothing_is_held_on_a_device_that_was_left(tmp_path: Path) -> None:
    model = Model("l2", SEED)
    with opened(tmp_path, "l2", "flat", Card()) as store:
        units, vectors = model.batch(400)
        store.store_batch(units, embeddings=vectors)
        store.run_maintenance()
        live = store._open.live
        holdings = live.device_manager.machine.holdings
        model.check(store, skills=True)
        assert holdings.on("cuda:0") == live.view.index.device_bytes > 0
        live.leave_device()
        assert holdings.on("cuda:0") == 0
        model.check(store, skills=True)
        store.run_maintenance()
        model.check(store, skills=True)
        for gone in model.some(300):
            store.delete(gone)
            del model.vectors[gone]
        assert store.run_maintenance()["actions"] == ["built exact of 100 rows"]
        assert holdings.on("cuda:0") == live.view.index.device_bytes > 0
        model.check(store, skills=True)


ENDS = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
import numpy as np, torch
from gpu_kit import Card, machine_with, timed_as
from support import FakeBatchEmbedder
from memevolve_gpu import VectorStore
from memevolve_gpu.index.torch_gpu import index as index, runtime, ivf
for one in (index, ivf):
    one.open_device = lambda _: torch.device("cpu")
runtime.current, runtime._release = lambda _: nullcontext(), lambda _: None
ivf._ENOUGH = -1.0  # as long as it may
chosen = {"index_type": "ivf", "min_training_units": 100}
memory, machine = Path(sys.argv[1]) / "memory", machine_with(Card())
store = VectorStore(memory, FakeBatchEmbedder(96), storage_config=chosen, machine=machine)
vectors = np.random.default_rng(1).standard_normal((20_000, 96)).astype(np.float32)
store.store_batch([{"id": f"u{i}", "content": f"fact {i}"} for i in range(20_000)], embeddings=vectors)
while not store._open.maintenance.running:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))
print("end", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", ["0.05", "0.4"])
def test_a_program_may_end_while_its_store_builds(after: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ENDS, str(tmp_path), after]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (found.returncode, found.stdout) == (0, "end\n"), found.stderr[-2000:]
    with opened(tmp_path, "l2", "ivf") as store:
        assert store.count() == 20_000
