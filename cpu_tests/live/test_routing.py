"""Which side answers a call under DEVICE=auto: both are timed after a build, on clocks that the tests set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_kit import Card, OnCard, machine_with, timed_as
from support import SEED, FakeBatchEmbedder

from memevolve_gpu import VectorStore
from memevolve_gpu.index import registry
from memevolve_gpu.planner.routing import BATCHES, SideTimings, measured_sides

DIM, COUNT = 16, 600


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    made = Card()
    for kind in ("exact", "ivf"):
        monkeypatch.setitem(registry.ENGINES, ("torch", kind), OnCard)
    monkeypatch.setattr(OnCard, "card", made, raising=False)
    yield made
    made.holders.clear()


def vectors_of(count: int, seed: int = SEED) -> Any:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def filled(folder: Path, card: Card, request: str = "auto", **settings: Any) -> VectorStore:
    chosen = {"background": False, "min_training_units": 100, "index_type": "flat", "device": request, **settings}
    machine = machine_with(card, request)
    store = VectorStore(folder / "memory", FakeBatchEmbedder(DIM), storage_config=chosen, machine=machine)
    units = [{"id": f"u{i}", "content": f"number {i}"} for i in range(COUNT)]
    store.store_batch(units, embeddings=vectors_of(COUNT))
    store.run_maintenance()
    return store


def answered_by_the_card(store: VectorStore, card: Card, nq: int) -> bool:
    before = card.searches
    queries = vectors_of(nq, SEED + nq)
    _, ids = store.search_vectors(queries, 5)
    truth = np.argsort(((queries[:, None] - vectors_of(COUNT)) ** 2).sum(2), axis=1)[:, :5]
    assert [[f"u{i}" for i in row] for row in truth] == [list(row) for row in ids]
    return card.searches > before


def test_calls_go_to_the_side_that_measured_faster_for_their_size(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose call costs 1 ms whatever its size, and a host that takes 0.2 ms a query: they meet at 5."""
    timed_as(monkeypatch, lambda _: 1e-3, lambda nq: 0.2e-3 * nq)
    with filled(tmp_path, card) as store:
        shown = store.statistics()["device"]
        assert shown["crossover"] == 6
        assert shown["timings"] == {
            "device_ms": {"1": 1.0, "16": 1.0, "256": 1.0},
            "host_ms": {"1": pytest.approx(0.2), "16": pytest.approx(3.2), "256": pytest.approx(3.2)},
        }, "3.2 ms for 16 are more than the device's 1.0 for 256: the host is not timed with 256"
        by_card = {nq: answered_by_the_card(store, card, nq) for nq in (1, 2, 4, 7, 16, 256, 1000)}
        assert by_card == {1: False, 2: False, 4: False, 7: True, 16: True, 256: True, 1000: True}
        health = store.get_storage_health()
        assert health["device"]["crossover"] == shown["crossover"]
        assert health["device"]["problem"] is None


def test_the_index_on_the_cpu_is_a_trained_one_and_follows_writes(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_as(monkeypatch, lambda _: 1e-3, lambda nq: 0.2e-3 * nq)
    with filled(tmp_path, card, index_type="ivf") as store:
        view = store._open.live.view
        assert view.host_side is not None
        assert (view.index.plan.engine, view.host_side.index.kind) == ("torch", "ivf")
        assert view.host_side.index.plan.engine == "cpu"
        assert view.host_side.index.table.vectors is view.index.table.vectors, "the vectors are there once"
        new = vectors_of(3, SEED + 9) * 50
        store.store_batch([{"id": f"n{i}", "content": "new"} for i in range(3)], embeddings=new)
        store.delete("u7")
        before = card.searches
        assert [row[0] for row in store.search_vectors(new, 1)[1]] == ["n0", "n1", "n2"]
        assert store.search_vectors(vectors_of(8)[7:], 1)[1][0][0] != "u7"
        assert card.searches == before, "three queries and one are for the host"


def test_an_append_extends_both_sides(tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_as(monkeypatch, lambda _: 1e-3, lambda nq: 0.2e-3 * nq)
    monkeypatch.setattr("memevolve_gpu.live.scheduler.DELTA_ROWS", 10)
    monkeypatch.setattr(OnCard, "_extended", _extended, raising=False)
    with filled(tmp_path, card) as store:
        first = store._open.live.view.host_side
        timed_as(monkeypatch, lambda _: pytest.fail("timed again"), lambda _: 1.0)
        units = [{"id": f"n{i}", "content": "new"} for i in range(200)]
        store.store_batch(units, embeddings=vectors_of(200, SEED + 1))
        store.run_maintenance()
        view = store._open.live.view
        assert (view.index.n, view.delta_n) == (800, 0)
        assert view.host_side is not None
        assert view.host_side.index.n == 800
        assert first is not None
        assert view.host_side.timings is first.timings


def _extended(self: OnCard, rows: Any) -> OnCard:
    longer = OnCard(self.plan, self.metric, self.slot_table_with(rows), self.table.extended(rows.vectors))
    self.card.allocate(longer, self.held)
    return longer


def test_a_device_that_rests_leaves_all_calls_to_the_cpus_index(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_as(monkeypatch, lambda _: 1e-3, lambda _: 1.0)
    with filled(tmp_path, card, index_type="ivf") as store:
        assert answered_by_the_card(store, card, 1)
        card.lost = True
        store.search_vectors(vectors_of(2), 3)  # the index meets the error, and answers from the host
        live = store._open.live
        assert live.view.faster_for(256).index is live.view.host_side.index  # type: ignore[union-attr]
        live.leave_device()
        assert live.view.index.kind == "ivf", "not an exact scan"
        assert live.view.index.plan.engine == "cpu"


def test_a_device_that_is_slower_for_every_batch_is_left_until_the_store_has_doubled(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_as(monkeypatch, lambda _: 1.0, lambda _: 1e-3)
    with filled(tmp_path, card) as store:
        shown = store.statistics()
        assert shown["index"]["engine"] == "cpu"
        assert card.free == card.total
        assert shown["device"]["problem"] is None
        assert "the CPU is faster for every batch" in shown["plan"]["reason"]
        assert f"until {2 * COUNT} units" in next(e["cause"] for e in shown["events"] if e["kind"] == "device-slower")
        timed_as(monkeypatch, lambda _: 1e-3, lambda _: 1.0)
        store._open.live.device_manager._timer = lambda index, *_: 1e-3 if index.plan.engine != "cpu" else 1.0
        units = [{"id": f"n{i}", "content": "new"} for i in range(COUNT)]
        store.store_batch(units[:-1], embeddings=vectors_of(COUNT, SEED + 1)[:-1])
        store.run_maintenance()
        assert store.statistics()["index"]["engine"] == "cpu"
        store.store_batch(units[-1:], embeddings=vectors_of(COUNT, SEED + 1)[-1:])
        store.run_maintenance()
        assert store.statistics()["index"]["engine"] == "torch"


def test_a_gpu_requested_by_name_answers_everything(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_as(monkeypatch, lambda _: pytest.fail("timed"), lambda _: pytest.fail("timed"))
    with filled(tmp_path, card, "cuda") as store:
        assert answered_by_the_card(store, card, 1)
        assert store.statistics()["device"]["crossover"] is None


def test_the_snapshot_keeps_the_cpus_index(tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart answers from the trained index at once, and training it again is not needed on the way back."""
    timed_as(monkeypatch, lambda _: 1e-3, lambda nq: 0.2e-3 * nq)
    with filled(tmp_path, card, index_type="ivf") as store:
        store.run_maintenance()
        view = store._open.live.view
        assert view.host_side is not None
        held = (view.index.table.vectors, view.host_side.index.table.vectors)
        assert held[0] is held[1], "both read the file's rows, and none keeps its own"
    config = {"background": False, "min_training_units": 100, "index_type": "ivf", "device": "cpu"}
    with VectorStore(tmp_path / "memory", FakeBatchEmbedder(DIM), storage_config=config) as again:
        assert again.statistics()["index"]["kind"] == "ivf"


@pytest.mark.parametrize(
    ("device", "host", "crossover"),
    [
        ((1, 1, 1), (2, 9, 9), 1),
        ((1, 1, 1), (0.5, 0.9, 0.95), None),
        ((1, 1, 4), (0.25, 4, 64), 5),
        ((1, 1, 1), (0.5, 0.5, 2), 65),
        ((1, 2, 1), (2, 1, 9), 32),
    ],
)
def test_the_crossover_is_the_size_from_which_on_the_device_wins(device: Any, host: Any, crossover: Any) -> None:
    timings = SideTimings(1, device, host)
    assert timings.crossover == crossover
    for nq in BATCHES:
        at = BATCHES.index(nq)
        assert timings.device_wins(nq) == (device[at] < host[at])
    if crossover is not None:
        assert all(timings.device_wins(nq) for nq in (*range(crossover, 257), 10_000))


def test_the_host_is_not_timed_where_it_has_lost_already() -> None:
    asked: list[int] = []

    def host(nq: int) -> float:
        asked.append(nq)
        return 0.01 * nq

    assert measured_sides(5, lambda nq: 0.02, host) == SideTimings(5, (0.02, 0.02, 0.02), (0.01, 0.16, 0.16))
    assert asked == [1, 16]
