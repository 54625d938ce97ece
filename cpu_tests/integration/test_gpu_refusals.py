"""A GPU that is not used although it should be: an event when it comes up, health while it lasts, and the way back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_kit import MB, Card, OnCard, line, machine_with, others_take_all, printing, timed_as
from support import SEED, FakeBatchEmbedder, as_child

from memevolve_gpu import VectorStore
from memevolve_gpu.devices.gpu_probe import Prober
from memevolve_gpu.devices.memory import Holdings
from memevolve_gpu.devices.selection import Machine
from memevolve_gpu.index import registry

DIM, COUNT = 16, 400


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """The only card of the machine."""
    made = Card()
    monkeypatch.setitem(registry.ENGINES, ("torch", "exact"), OnCard)
    monkeypatch.setattr(OnCard, "card", made, raising=False)
    timed_as(monkeypatch, lambda _: 0.001, lambda _: 1.0)
    yield made
    made.holders.clear()


def filled(folder: Path, machine: Machine, **settings: Any) -> VectorStore:
    """A store that has done one round of maintenance; DEVICE=auto takes a GPU from 100 units on."""
    chosen = {"background": False, "min_training_units": 100, "index_type": "flat", "device": machine.request}
    store = VectorStore(
        folder / "memory", FakeBatchEmbedder(DIM), storage_config={**chosen, **settings}, machine=machine
    )
    vectors = np.random.default_rng(SEED).standard_normal((COUNT, DIM)).astype(np.float32)
    store.store_batch([{"id": f"u{i}", "content": f"number {i}"} for i in range(COUNT)], embeddings=vectors)
    store.run_maintenance()
    return store


def refusals(store: VectorStore) -> list[tuple[str, str]]:
    """(level, sentence) of each."""
    told = [event for event in store.statistics()["events"] if event["kind"] == "device-refused"]
    return [(event["level"], event["cause"]) for event in told]


def shown(store: VectorStore) -> Any:
    """The section on the device, which health and statistics share."""
    device: Any = store.get_storage_health()["device"]
    assert store.statistics()["device"]["problem"] == device["problem"]
    return device


@pytest.mark.parametrize("request_", ["cuda", "cuda:0", "auto"])
def test_a_card_that_others_filled_is_told_of_once_each_time(request_: str, tmp_path: Path, card: Card) -> None:
    card.taken = card.total
    with filled(tmp_path, machine_with(card, request_)) as store:
        for _ in range(3):
            store.run_maintenance()
            store.store({"content": "one more"})
        ((level, said),) = refusals(store)
        assert level == "WARNING"
        assert "do not fit the 0 MB allowed there" in said
        assert said.endswith("allowed there by GPU_MEMORY_FRACTION; the CPU instead, until there is room")
        assert shown(store)["problem"].endswith("do not fit the 0 MB allowed there by GPU_MEMORY_FRACTION")
        assert shown(store)["incidents"] == {"limit": 1}
        assert "do not fit the 0 MB" in store.get_storage_health()["recommendations"][0]
        card.taken = 0
        store.run_maintenance()
        assert shown(store)["device"] == "cuda:0"
        assert shown(store)["problem"] is None
        store._open.live.leave_device()
        card.taken = card.total
        store.run_maintenance()
        store.run_maintenance()
        assert len(refusals(store)) == 2, "it had room in between"
        assert shown(store)["incidents"] == {"limit": 2}


def test_a_report_shows_the_problem_that_its_own_plan_met(tmp_path: Path, card: Card) -> None:
    """A process that only asks has made no plan before."""
    filled(tmp_path, machine_with(None, "cpu"), device="cpu").close()
    card.taken = card.total
    settings = {"background": False, "min_training_units": 100, "device": "cuda"}
    reports: tuple[Any, ...] = (VectorStore.statistics, VectorStore.get_storage_health)
    for report in reports:
        with VectorStore(tmp_path / "memory", None, storage_config=settings, machine=machine_with(card)) as store:
            assert "do not fit" in report(store)["device"]["problem"]


def test_the_background_goes_back_by_itself_when_there_is_room(tmp_path: Path, card: Card) -> None:
    card.taken = card.total
    now = [1000.0]
    with filled(tmp_path, machine_with(card)) as store:
        live, maintenance = store._open.live, store._open.maintenance
        assert not live.device_manager.needs_look, "it was looked at a moment ago"
        live.device_manager._clock = lambda: now[0]
        live.device_manager._look_at = now[0] + 30
        assert not maintenance.notify("written")
        card.taken = 0
        now[0] += 31
        assert maintenance.notify("written"), "nobody would have looked"
        maintenance.run_if_due()
        assert shown(store)["device"] == "cuda:0"


def test_room_is_seen_as_soon_as_it_is_there(tmp_path: Path, card: Card) -> None:
    """What the driver said a moment ago, when the card was full, is not good enough for a store that waits."""
    state = tmp_path / "card"
    free, full = (line(total=4000, free=room) for room in (3900, 10))
    for number, first in enumerate((full, free)):
        state.write_text(first)
        machine = asked_of("cuda:0", ["/bin/cat", str(state)])
        machine._trial = lambda _engine, _index: ""
        folder = tmp_path / str(number)
        folder.mkdir()
        config = {"background": False, "min_training_units": 100, "index_type": "flat", "device": "cuda:0"}
        with VectorStore(folder / "memory", FakeBatchEmbedder(DIM), storage_config=config, machine=machine) as store:
            store.store_batch([{"content": f"number {i}"} for i in range(COUNT)])
            store.get_storage_health()
            state.write_text(full)
            store.run_maintenance()
            assert shown(store)["device"] == "cpu"
            assert len(refusals(store)) == 1
            state.write_text(free)
            store.run_maintenance()
            assert shown(store)["device"] == "cuda:0"
        assert card.free == card.total


def test_a_snapshot_does_not_keep_what_stood_against_its_plan(tmp_path: Path, card: Card) -> None:
    card.taken = card.total
    with filled(tmp_path, machine_with(card), index_type="ivf") as store:
        assert store._open.live.view.index.plan.refusal == "limit"
    assert b"refusal" not in (tmp_path / "memory.snapshot").read_bytes()
    with VectorStore(tmp_path / "memory", None, storage_config={"background": False, "device": "cpu"}) as store:
        assert [event["kind"] for event in store.statistics()["events"]] == ["snapshot-loaded"]
        assert store.statistics()["plan"]["refusal"] == ""


def test_room_that_a_setting_leaves_none_of_is_not_waited_for(tmp_path: Path, card: Card) -> None:
    assert card.free > 1000 * MB
    with filled(tmp_path, machine_with(card), gpu_max_memory_mb=100) as store:
        ((_level, said),) = refusals(store)
        assert "do not fit the 100 MB allowed there by GPU_MAX_MEMORY_MB" in said
        store._open.live.device_manager._look_at = 0.0
        assert not store._open.live.device_manager.needs_look


def test_a_build_that_ran_out_and_a_plan_without_room_are_one_state(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    others_take_all(monkeypatch)
    with filled(tmp_path, machine_with(card)) as store:
        assert len(refusals(store)) == 1
        store._open.live.device_manager._retry.reset()
        store.run_maintenance()
        assert len(refusals(store)) == 1
        assert "no room" in shown(store)["problem"] or "do not fit" in shown(store)["problem"]


@pytest.mark.parametrize("request_", ["cuda", "cuda:0", "auto"])
def test_another_card_is_taken_when_the_first_has_no_room(request_: str, tmp_path: Path, card: Card) -> None:
    del card
    state = tmp_path / "cards"
    state.write_text(f"{line(0, 'First', free=20)}\n{line(1, 'Second', free=10)}\n")
    machine = asked_of(request_, ["/bin/cat", str(state)])
    with filled(tmp_path, machine) as store:
        assert machine.choice.device == "cuda:0"
        assert len(refusals(store)) == 1
        state.write_text(f"{line(0, 'First', free=20)}\n{line(1, 'Second', total=8000, free=7000)}\n")
        machine._trial = lambda _engine, _index: ""
        store.run_maintenance()
        there = "cpu" if request_ == "cuda:0" else "cuda:1"
        assert store.statistics()["index"]["device"] == there


@pytest.mark.parametrize(("request_", "level"), [("cuda", "WARNING"), ("auto", "INFO")])
def test_an_engine_that_is_missing_is_told_of(request_: str, level: str, tmp_path: Path, card: Card) -> None:
    missing = {"torch": "torch is not installed", "faiss": "this faiss was built without GPU support"}
    with filled(tmp_path, machine_with(card, request_, present=missing)) as store:
        store.run_maintenance()
        ((told_at, said),) = refusals(store)
        assert told_at == level
        assert "no GPU engine can be used" in said
        assert "torch is not installed" in shown(store)["problem"]
        assert shown(store)["incidents"] == {"engine": 1}


def test_an_engine_that_breaks_is_in_health_until_restart(tmp_path: Path, card: Card) -> None:
    with filled(tmp_path, machine_with(card, trial={"torch": "torch does not work on this GPU: too old"})) as store:
        store.run_maintenance()
        assert len(refusals(store)) == 1
        assert "too old" in shown(store)["problem"]
        assert "too old" in store.get_storage_health()["recommendations"][0]


def test_a_kind_that_no_engine_has_is_told_of_only_where_a_gpu_was_asked_for(tmp_path: Path, card: Card) -> None:
    with filled(tmp_path, machine_with(card), index_type="hnsw") as store:
        ((_level, said),) = refusals(store)
        assert "no GPU engine has graphs" in said
        assert "no GPU engine has graphs" in shown(store)["problem"]
    (tmp_path / "auto").mkdir()
    with filled(tmp_path / "auto", machine_with(card, "auto"), index_type="hnsw") as store:
        assert refusals(store) == []
        assert shown(store)["problem"] is None


def asked_of(request: str, command: list[str], visible: str | None = None, signs: tuple[Path, ...] = ()) -> Machine:
    """A machine whose driver is this command."""
    prober = Prober(visible, command=command, timeout=0.3 if command == HANGS else 120.0, signs=signs)
    return Machine(request, prober=prober, holdings=Holdings(), load=lambda _name: None, present=lambda _engine: "")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("request_", ["cuda", "auto"])
def test_the_child_of_a_fork_tells_that_it_stays_on_the_cpu(request_: str, tmp_path: Path, card: Card) -> None:
    with filled(tmp_path, machine_with(card, request_)) as store:
        assert shown(store)["device"] == "cuda:0"

        def act() -> None:
            assert store._open.live.device_manager.needs_look
            store.run_maintenance()
            store.run_maintenance()
            told, health = refusals(store), shown(store)
            assert len(told) == 1
            assert "use spawn" in told[0][1]
            assert "use spawn" in health["problem"]
            assert health["device"] == "cpu"

        assert as_child(act) == 0
        assert refusals(store) == []
        assert shown(store)["device"] == "cuda:0"


OLD = printing(line(driver="470.223.02"))
SMALL = printing(line(capability="6.1"))
HANGS = ["/bin/sh", "-c", "sleep 60"]
FAILS = ["/bin/sh", "-c", "echo no driver is loaded >&2; exit 9"]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("command", "said"), [(OLD, "470.223.02 is too old"), (SMALL, "at least 7.0"), (HANGS, "did not answer")]
)
@pytest.mark.parametrize(("request_", "level"), [("cuda", "WARNING"), ("cuda:0", "WARNING"), ("auto", "INFO")])
def test_a_card_that_cannot_be_used_is_told_of(
    command: list[str], said: str, request_: str, level: str, tmp_path: Path
) -> None:
    with filled(tmp_path, asked_of(request_, command)) as store:
        store.run_maintenance()
        ((told_at, why),) = refusals(store)
        assert told_at == level
        assert said in why
        assert said in shown(store)["problem"]
        assert shown(store)["incidents"] == {"no-device": 1}
        assert said in store.get_storage_health()["recommendations"][0]


@pytest.mark.usefixtures("card")
def test_machines_without_a_gpu_are_silent_under_auto(tmp_path: Path) -> None:
    sign = tmp_path / "nvidiactl"
    cases = [
        asked_of("auto", FAILS),
        asked_of("auto", printing("No devices were found")),
        asked_of("auto", printing(line()), visible=""),
        asked_of("auto", printing(line()), visible="-1"),
        machine_with(None, "auto"),
    ]
    for number, machine in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with filled(folder, machine) as store:
            assert refusals(store) == []
            assert shown(store)["problem"] is None
            assert store.get_storage_health()["recommendations"] == []
    sign.touch()
    with filled(tmp_path, asked_of("auto", FAILS, signs=(sign,))) as store:
        assert "no driver is loaded" in refusals(store)[0][1], "there is a driver, and it fails"


@pytest.mark.usefixtures("card")
def test_a_store_below_the_border_tells_nothing(tmp_path: Path) -> None:
    with filled(tmp_path, asked_of("auto", OLD), min_training_units=COUNT + 1) as store:
        assert refusals(store) == []


def test_events_are_logged_at_their_level(tmp_path: Path, card: Card, caplog: pytest.LogCaptureFixture) -> None:
    card.taken = card.total - 100 * MB
    with caplog.at_level(logging.WARNING, logger="memevolve_gpu"), filled(tmp_path, machine_with(card)):
        assert any("device-refused" in record.getMessage() for record in caplog.records)
