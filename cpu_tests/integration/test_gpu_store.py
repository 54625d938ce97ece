"""A store whose index lives on a GPU: the same answers as on the CPU, and nobody notices when the GPU fails."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_kit import MB, Card, OnCard, machine_with, others_take_all, timed_as
from support import HANGS, SEED, FakeBatchEmbedder, as_child

from memevolve_gpu import VectorStore
from memevolve_gpu.devices import memory
from memevolve_gpu.devices.memory import CONTEXT_BYTES
from memevolve_gpu.devices.selection import DeviceChoice, Machine
from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index import registry
from memevolve_gpu.index.torch_gpu.memory_accounting import WORKSPACE
from memevolve_gpu.types import DeviceIncident

DIM = 16
COUNT = 400


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """The only card of the machine, on which exact torch indexes live that are no torch indexes."""
    made = Card()
    monkeypatch.setitem(registry.ENGINES, ("torch", "exact"), OnCard)
    monkeypatch.setattr(OnCard, "card", made, raising=False)
    timed_as(monkeypatch, lambda _: 0.001, lambda _: 1.0)
    yield made
    made.holders.clear()


def vectors_of(count: int, seed: int = SEED) -> Any:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def units_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"u{i}", "content": f"number {i}", "type": ("skill", "tool")[i % 2]} for i in range(start, count)]


def opened(folder: Path, machine: Machine | None, name: str = "memory", **settings: Any) -> VectorStore:
    chosen = {"background": False, "min_training_units": 100, "index_type": "flat", **settings}
    return VectorStore(folder / name, FakeBatchEmbedder(DIM), storage_config=chosen, machine=machine)


def filled(folder: Path, machine: Machine | None, name: str = "memory", **settings: Any) -> VectorStore:
    store = opened(folder, machine, name, **settings)
    store.store_batch(units_of(COUNT), embeddings=vectors_of(COUNT))
    store.run_maintenance()
    return store


def events(store: VectorStore, kind: str) -> list[str]:
    return [event["cause"] for event in store.statistics()["events"] if event["kind"] == kind]


def wait_until(true: Callable[[], object]) -> None:
    """Give the background its time."""
    deadline = time.monotonic() + HANGS
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


# The plan is followed, and shown


def test_a_device_that_is_there_is_used_and_shown(tmp_path: Path, card: Card) -> None:
    with filled(tmp_path, machine_with(card)) as store:
        figures = store.statistics()
        assert (figures["index"]["engine"], figures["index"]["device"]) == ("torch", "cuda:0")
        assert figures["plan"]["engine"] == "torch"
        assert "Test GPU (cuda:0)" in figures["index"]["reason"]
        assert any("engine torch" in note for note in figures["plan"]["notes"])
        shown = store.get_storage_health()["device"]
        assert shown["device"] == "cuda:0"
        assert shown["predicted_bytes"] == shown["measured_bytes"] > shown["scratch_bytes"] > 0
        old, new, now = (shown["budget"][when] or {} for when in ("before", "after", "now"))
        assert old["used"] == 0
        assert new["used"] == shown["measured_bytes"] + WORKSPACE
        assert now["limit"] <= 0.8 * (card.total + CONTEXT_BYTES + WORKSPACE)
        assert shown["incidents"] == {}
        before = card.searches
        store.search_vectors(vectors_of(3), 5)
        assert card.searches == before + 1


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_answers_are_those_of_the_cpu(metric: str, tmp_path: Path, card: Card) -> None:
    gpu, cpu = machine_with(card), machine_with(None, "cpu")
    with (
        filled(tmp_path, gpu, "gpu", metric=metric) as ours,
        filled(tmp_path, cpu, "cpu", metric=metric, device="cpu") as theirs,
    ):
        extra, questions = vectors_of(40, SEED + 1), vectors_of(25, SEED + 2)
        for store in (ours, theirs):
            store.store_batch(units_of(COUNT + 40, COUNT), embeddings=extra)
            for gone in range(0, COUNT, 7):
                store.delete(f"u{gone}")
            store.update("u1", {"content": "something else"})
        assert ours.statistics()["index"]["device"] == "cuda:0"
        for filters in (None, {"type": "skill"}):
            for k in (1, 10, 600):
                distances, ids = ours.search_vectors(questions, k, filters)
                true_distances, true_ids = theirs.search_vectors(questions, k, filters)
                assert ids == true_ids
                np.testing.assert_allclose(distances, true_distances, rtol=1e-5)
        assert card.searches > 0


def test_the_cpu_never_asks_the_driver(tmp_path: Path, card: Card) -> None:
    machine = machine_with(card, "cpu")
    with filled(tmp_path, machine, device="cpu") as store:
        assert store.get_storage_health()["device"]["device"] == "cpu"
        assert machine._prober.looks == 0  # type: ignore[attr-defined]


def test_a_small_store_on_auto_never_asks_the_driver_and_a_large_one_does(tmp_path: Path, card: Card) -> None:
    machine = machine_with(card, "auto")
    with filled(tmp_path, machine, device="auto", min_training_units=COUNT + 1) as store:
        assert machine._prober.looks == 0  # type: ignore[attr-defined]
        assert store.statistics()["index"]["engine"] == "cpu"
        store.store_batch(units_of(COUNT + 1, COUNT), embeddings=vectors_of(1, SEED + 1))
        store.run_maintenance()
        assert store.statistics()["index"]["engine"] == "torch"


def test_the_background_looks_for_the_device_and_moves_there(tmp_path: Path, card: Card) -> None:
    machine = machine_with(card, "auto")
    with opened(tmp_path, machine, device="auto", background=True) as store:
        store.store_batch(units_of(COUNT), embeddings=vectors_of(COUNT))
        wait_until(lambda: card.holders and store.index.kind == "exact" and not store.index.is_building)
        store.search_vectors(vectors_of(3), 5)
        assert card.searches > 0


def test_the_budget_of_the_gpu_is_its_own(tmp_path: Path, card: Card) -> None:
    """MAX_MEMORY_MB bounds the host alone: a plan of more than 512 MB on the card fits a limit of 2 MB."""
    with filled(tmp_path, machine_with(card), max_memory_mb=2) as store:
        assert store.statistics()["index"]["device"] == "cuda:0"
        assert store.statistics()["device"]["measured_bytes"] > 2 * MB
    with filled(tmp_path, machine_with(card), "other", gpu_max_memory_mb=100) as store:
        assert store.statistics()["index"]["device"] == "cpu"
        assert "do not fit the 100 MB allowed there by GPU_MAX_MEMORY_MB" in store.statistics()["plan"]["reason"]


def test_asking_for_a_gpu_that_is_not_there_warns_and_auto_does_not(tmp_path: Path) -> None:
    with filled(tmp_path, machine_with(None, "cuda"), device="cuda") as store:
        (warning,) = events(store, "device-refused")
        assert "no NVIDIA driver" in warning
        health = store.get_storage_health()
        assert health["device"]["unmet"]
        assert any("No GPU is used" in sentence for sentence in health["recommendations"])
    with filled(tmp_path, machine_with(None, "auto"), "other", device="auto") as store:
        assert events(store, "device-refused") == []
        assert store.get_storage_health()["recommendations"] == []


def test_the_real_machine_is_looked_at_by_default(tmp_path: Path) -> None:
    with filled(tmp_path, None, device="cpu") as store:
        assert store.get_storage_health()["device"]["reason"] == "nothing here calls for a GPU yet"


# What can go wrong


def test_an_engine_that_does_not_work_is_left_alone(tmp_path: Path, card: Card) -> None:
    machine = machine_with(card, trial={"torch": "torch does not work on this GPU: driver too old"})
    with filled(tmp_path, machine) as store:
        assert store.statistics()["index"]["device"] == "cpu"
        (refusal,) = events(store, "device-refused")
        assert "driver too old" in refusal
        store.retrain()
        assert len(events(store, "device-refused")) == 1
        assert "driver too old" in store.statistics()["plan"]["reason"]
        assert store.get_storage_health()["device"]["incidents"] == {"device-error": 1}


def test_an_engine_that_is_not_installed_is_named(tmp_path: Path, card: Card) -> None:
    machine = machine_with(card, present={"torch": "torch is not installed", "faiss": "faiss has no GPU support"})
    with filled(tmp_path, machine, gpu_engine="faiss") as store:
        reason = store.statistics()["plan"]["reason"]
        assert "GPU_ENGINE=faiss cannot be used" in reason
        assert "faiss has no GPU support" in reason
        store.retrain()
        (refusal,) = events(store, "device-refused")
        assert "faiss has no GPU support" in refusal


def test_a_full_card_is_used_once_it_has_room(tmp_path: Path, card: Card) -> None:
    card.taken = card.total
    with filled(tmp_path, machine_with(card)) as store:
        figures = store.statistics()
        assert figures["index"]["device"] == "cpu"
        assert "do not fit" in figures["plan"]["reason"]
        assert card.searches == 0
        card.taken = 0
        report = store.run_maintenance()
        assert "the CPU is replaced by torch on cuda:0" in report["reason"]
        assert store.statistics()["index"]["device"] == "cuda:0"


def test_memory_that_goes_while_a_body_is_built_sends_it_to_the_cpu_and_back(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = others_take_all(monkeypatch)
    with filled(tmp_path, machine_with(card)) as store:
        assert store.statistics()["index"]["device"] == "cpu"
        (refusal,) = events(store, "device-refused")
        assert "until there is room" in refusal
        health = store.get_storage_health()
        assert health["device"]["incidents"] == {"out-of-memory": 1}
        assert any("The GPU is not used" in sentence for sentence in health["recommendations"])
        monkeypatch.setattr(Card, "allocate", allocate)
        store.run_maintenance()
        assert store.statistics()["index"]["device"] == "cpu", "it was tried again at once, without more room"
        card.taken = 0
        card.total *= 2
        store.run_maintenance()
        assert store.statistics()["index"]["device"] == "cuda:0"
        assert store.get_storage_health()["recommendations"] == []


def test_an_index_that_fits_but_not_beside_the_old_one_takes_its_place(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CONTEXT_BYTES", 0)
    with filled(tmp_path, machine_with(card, fraction=1.0)) as store:
        held = card.total - card.free
        card.total = int(1.5 * held)
        for rebuild in (store.retrain, store.run_maintenance):
            store.store_batch(units_of(3 * COUNT, COUNT), embeddings=vectors_of(2 * COUNT, SEED + 1))
            store.store_batch(units_of(3 * COUNT, COUNT), embeddings=vectors_of(2 * COUNT, SEED + 2))
            rebuild()
            figures = store.statistics()
            assert figures["index"]["device"] == "cuda:0"
            assert figures["tail_rows"] == 0
            assert card.total - card.free == figures["device"]["measured_bytes"]
            assert events(store, "device-refused") == []


def test_a_card_that_others_fill_keeps_what_it_has(tmp_path: Path, card: Card) -> None:
    with filled(tmp_path, machine_with(card)) as store:
        card.taken = card.free
        store.run_maintenance()
        assert store.statistics()["index"]["device"] == "cuda:0"
        assert (store.statistics()["device"]["budget"]["now"] or {})["room"] == 0


def test_a_lost_device_answers_the_query_and_is_left_until_restart(tmp_path: Path, card: Card) -> None:
    with filled(tmp_path, machine_with(card)) as store:
        expected = store.search_vectors(vectors_of(5), 3)[1]
        card.lost = True
        assert store.search_vectors(vectors_of(5), 3)[1] == expected
        (incident,) = events(store, "device-incident")
        assert "device-lost, cpu-until-restart" in incident
        health: Any = store.get_storage_health()
        assert health["device"]["incidents"] == {"device-lost": 1}
        assert "until restart" in health["device"]["problem"]
        report = store.run_maintenance()
        assert "torch on cuda:0 is replaced by the CPU" in report["reason"]
        assert store.search_vectors(vectors_of(5), 3)[1] == expected
        card.lost = False
        store.run_maintenance()
        assert store.statistics()["index"]["engine"] == "cpu"
    with opened(tmp_path, machine_with(card)) as store:
        store.run_maintenance()
        assert store.statistics()["index"]["device"] == "cuda:0", "a new process does not bear a grudge"


@pytest.mark.parametrize("filters", [None, {"type": "skill"}])
@pytest.mark.parametrize("cause", ["device-error", "out-of-memory"])
def test_an_error_that_the_body_did_not_catch_is_answered_all_the_same(
    cause: Any, filters: Any, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: OnCard, queries: Any, k: int, params: Any, row_filter: Any = None) -> Any:
        raise DeviceError("something new", cause)

    with filled(tmp_path, machine_with(card)) as store:
        store.delete("u3")
        store.store({"id": "late", "content": "late"})
        expected = store.search_vectors(vectors_of(5), 3, filters)[1]
        monkeypatch.setattr(OnCard, "search", failing)
        assert store.search_vectors(vectors_of(5), 3, filters)[1] == expected
        assert store.search_vectors(vectors_of(5), 3, filters)[1] == expected
        assert len(events(store, "device-refused")) == 1
        assert store.get_storage_health()["device"]["incidents"] == {cause: 1}
        assert store.statistics()["index"]["device"] == "cpu"
        assert card.free == card.total


def test_incidents_are_counted_and_recovery_is_told(tmp_path: Path, card: Card) -> None:
    with filled(tmp_path, machine_with(card)) as store:
        (index,) = card.holders
        index._told += [
            DeviceIncident("cuda:0", "out-of-memory", "smaller-batch", "1,024 queries at once"),
            DeviceIncident("cuda:0", "out-of-memory", "cpu", "not one query"),
            DeviceIncident("cuda:0", "recovered", "device-again", "there is room"),
        ]
        store.search_vectors(vectors_of(1), 1)
        assert len(events(store, "device-incident")) == 3
        shown: Any = store.get_storage_health()["device"]
        assert shown["incidents"] == {"out-of-memory": 2, "recovered": 1}
        assert "there is room" in shown["last_incident"]
        assert shown["problem"] is None


def test_a_body_that_finds_too_little_gives_way_to_the_plan_of_the_cpu(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OnCard.search

    def wrong(self: OnCard, queries: Any, k: int, params: Any, row_filter: Any = None) -> Any:
        if params.exact:
            return right(self, queries, k, params, row_filter)
        return right(self, queries + np.float32(3), k, params, row_filter)

    monkeypatch.setattr(OnCard, "search", wrong)
    with filled(tmp_path, machine_with(card)) as store:
        assert store.statistics()["index"]["engine"] == "cpu"
        assert "fell short" in events(store, "device-refused")[0]
        assert not card.holders or card.free == card.total


def test_closing_gives_the_device_back_at_once_and_the_next_worker_takes_it(tmp_path: Path, card: Card) -> None:
    """Two processes, which share nothing but the card: the second finds no room until the first has gone."""
    gc.disable()
    try:
        first = filled(tmp_path, machine_with(card), "first")
        held = card.total - card.free
        card.total = held + 1000 * MB
        with filled(tmp_path, machine_with(card), "second") as second:
            assert second.statistics()["index"]["device"] == "cpu"
            assert first.statistics()["index"]["device"] == "cuda:0"
            first.close()
            assert card.free == card.total
            second.run_maintenance()
            assert second.statistics()["index"]["device"] == "cuda:0"
        assert card.free == card.total
    finally:
        gc.enable()


def test_threads_search_on_while_the_device_comes_and_goes(tmp_path: Path, card: Card) -> None:
    questions = vectors_of(8)
    with filled(tmp_path, machine_with(card)) as store:
        expected = store.search_vectors(questions, 4)[1]
        stop, wrong = threading.Event(), []

        def search() -> None:
            while not stop.is_set():
                found = store.search_vectors(questions, 4)[1]
                if found != expected:
                    wrong.append(found)

        threads = [threading.Thread(target=search) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                store.retrain()
                store._open.live.leave_device()
                store.run_maintenance()
            card.lost = True
            assert store.search_vectors(questions, 4)[1] == expected
            store.run_maintenance()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert wrong == []
        assert store.statistics()["index"]["engine"] == "cpu"


# Snapshots, processes


def test_opening_needs_no_device_and_a_store_travels_between_machines(tmp_path: Path, card: Card) -> None:
    with filled(tmp_path, machine_with(card)) as store:
        expected = store.search_vectors(vectors_of(5), 3)[1]
    looked = card.searches
    with opened(tmp_path, machine_with(None, "auto")) as store:
        assert store.statistics()["events"][0]["kind"] == "snapshot-loaded"
        assert store.search_vectors(vectors_of(5), 3)[1] == expected
        assert store.run_maintenance()["actions"] == []
    assert card.searches == looked
    with opened(tmp_path, machine_with(card)) as store:
        assert store.statistics()["index"]["device"] == "cpu"
        store.run_maintenance()
        assert store.statistics()["index"]["device"] == "cuda:0"


def test_moving_to_the_device_writes_no_snapshot_of_what_is_saved(tmp_path: Path, card: Card) -> None:
    snapshot = tmp_path / "memory.snapshot"
    cpu = machine_with(None, "cpu")
    with filled(tmp_path, cpu, device="cpu", index_type="ivf", min_training_units=100) as store:
        assert store.index.kind == "ivf"
    written = snapshot.stat().st_mtime_ns
    with opened(tmp_path, machine_with(card)) as store:
        store.run_maintenance()
        assert store.statistics()["index"]["device"] == "cuda:0"
    assert snapshot.stat().st_mtime_ns == written, "lists that a process without a GPU trained are gone"
    with opened(tmp_path, machine_with(card)) as store:
        store.store_batch(units_of(2 * COUNT, COUNT), embeddings=vectors_of(COUNT, SEED + 1))
        store.retrain()
        assert store.statistics()["index"]["device"] == "cuda:0"
    assert snapshot.stat().st_mtime_ns > written
    with opened(tmp_path, cpu, device="cpu") as store:
        assert store.statistics()["index"]["rows"] == 2 * COUNT
        assert store.search_vectors(vectors_of(1), 1)[1] == [["u0"]]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_answers_from_the_host(tmp_path: Path, card: Card) -> None:
    with filled(tmp_path, machine_with(card)) as store:
        expected = store.search_vectors(vectors_of(5), 3)[1]
        searches = card.searches

        def act() -> None:
            assert store.search_vectors(vectors_of(5), 3)[1] == expected
            assert card.searches == searches
            store.run_maintenance()
            figures = store.statistics()
            assert figures["index"]["engine"] == "cpu"
            assert "spawn" in figures["device"]["reason"]
            gc.collect()
            assert len(card.holders) == 1  # freed in the child, it would be a call to the parent's device

        assert as_child(act) == 0
        assert store.search_vectors(vectors_of(5), 3)[1] == expected
        assert card.searches == searches + 1


# Vectors that lie on the device


class Lying:
    """What a cupy array looks like: on a device by its own word, shared by DLPack, copied by ``get``."""

    def __init__(self, array: Any) -> None:
        self._tensor = pytest.importorskip("torch").from_numpy(array)
        self.copies = 0

    def __dlpack__(self, **arguments: Any) -> Any:
        del arguments
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self._tensor.shape}

    def get(self) -> Any:
        self.copies += 1
        return self._tensor.numpy()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_queries_on_the_device_stay_there(metric: str, tmp_path: Path, card: Card) -> None:
    questions = 3 * vectors_of(5)
    with filled(tmp_path, machine_with(card), metric=metric) as store:
        expected, ids = store.search_vectors(questions, 3)
        given = Lying(questions)
        found, same = store.search_vectors(given, 3)
        assert same == ids
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        assert given.copies == 0
        (tensor,) = card.tensors
        if metric == "l2":
            assert tensor.data_ptr() == given._tensor.data_ptr()
        store.store({"id": "new", "content": "new"})  # a delta buffer, which the host scans
        assert "new" in store.search_vectors(Lying(FakeBatchEmbedder(DIM)("new")[None]), 1)[1][0]


@pytest.mark.parametrize(
    ("broken", "reason"), [(np.nan, "contains NaN or infinity"), (np.inf, "contains NaN or infinity"), (1e30, "1e18")]
)
def test_odd_queries_on_the_device_meet_the_checks_of_the_host(
    broken: float, reason: str, tmp_path: Path, card: Card
) -> None:
    questions = vectors_of(2)
    questions[1, 3] = broken
    with filled(tmp_path, machine_with(card)) as store:
        given = Lying(questions)
        with pytest.raises(ValueError, match=rf"queries\[1\] .*{reason}"):
            store.search_vectors(given, 1)
        with pytest.raises(ValueError, match="expected 16, got 3"):
            store.search_vectors(Lying(np.ones((2, 3), np.float32)), 1)
        assert given.copies == 1
        assert card.tensors == []


def test_vectors_to_store_and_queries_for_the_cpu_come_to_the_host(tmp_path: Path, card: Card) -> None:
    del card
    with opened(tmp_path, machine_with(None, "cpu"), device="cpu") as store:
        given = Lying(vectors_of(4))
        store.store_batch(units_of(4), embeddings=given)
        assert store.search_vectors(given, 1)[1] == [["u0"], ["u1"], ["u2"], ["u3"]]
        assert given.copies == 2


# The engine itself, on tensors of the CPU


class TensorsOfTheCpu(Machine):
    """A machine that calls its CPU a GPU, as torch can: the same code runs on its tensors."""

    @property
    def choice(self) -> DeviceChoice:
        found = super().choice
        return replace(found, device="cpu")


@pytest.mark.parametrize("index_type", ["flat", "ivf"])
def test_the_torch_engine_answers_like_the_cpu(index_type: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    made = machine_with(Card())
    machine = TensorsOfTheCpu(
        "cuda", prober=made._prober, holdings=made.holdings, load=made._load, trial=made._trial, present=made._present
    )
    count, questions = 3000, vectors_of(20, SEED + 5)
    results = []
    for name, one, device in (("gpu", machine, "cuda"), ("cpu", machine_with(None, "cpu"), "cpu")):
        with opened(tmp_path, one, name, index_type=index_type, device=device, target_recall=0.9) as store:
            store.store_batch(units_of(count), embeddings=vectors_of(count))
            store.run_maintenance()
            figures = store.statistics()
            assert figures["index"]["engine"] == ("torch" if device == "cuda" else "cpu")
            assert figures["index"]["kind"] == ("ivf" if index_type == "ivf" else "exact")
            store.delete("u5")
            results.append((store.search_vectors(questions, 10), store.search_vectors(questions, 10, recall=1.0)))
    (ours, exact), (_theirs, truth) = results
    assert exact[1] == truth[1]
    np.testing.assert_allclose(exact[0], truth[0], rtol=1e-5)
    hits = sum(len(set(a) & set(b)) for a, b in zip(ours[1], truth[1], strict=True))
    assert hits >= (0.85 if index_type == "ivf" else 0.999) * 200
