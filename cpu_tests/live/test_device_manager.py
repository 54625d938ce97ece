"""When a device that had no room is tried again: not at once, when it has more, and in any case later."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from gpu_kit import MB, Card, FakeProber, machine_with

from memevolve_gpu.devices.gpu_probe import Prober
from memevolve_gpu.devices.memory import Holdings
from memevolve_gpu.devices.selection import Machine
from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index.registry import build
from memevolve_gpu.live.device_manager import DeviceManager
from memevolve_gpu.monitoring.events import EventLog
from memevolve_gpu.types import IndexPlan, Rows

PLAN = IndexPlan("exact", engine="torch", device="cuda:0", device_bytes=100 * MB)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def index() -> Any:
    slots = np.arange(3)
    rows = Rows(slots, np.zeros(3, np.uint8), slots + 1, np.eye(3, dtype=np.float32))
    return build(IndexPlan("exact"), rows, "l2", seed=0)


@pytest.fixture
def card() -> Card:
    return Card(2000 * MB)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def looked_at(card: Card, clock: Clock, request: str = "cuda") -> DeviceManager:
    device_manager = DeviceManager(machine_with(card, request), EventLog(), clock=clock)
    device_manager.look(10)
    return device_manager


def problem(device_manager: DeviceManager) -> str:
    state = device_manager.state(10, index())
    assert state is not None
    return state.problem


def test_facts_are_there_after_a_look_and_not_before(card: Card, clock: Clock) -> None:
    device_manager = DeviceManager(machine_with(card), EventLog(), clock=clock)
    assert device_manager.state(10, index()) is None
    assert device_manager.needs_look
    device_manager.look(10)
    assert not device_manager.needs_look
    state = device_manager.state(10, index())
    assert state is not None
    assert (state.device, state.name, state.requested, state.engines) == ("cuda:0", "Test GPU", True, ("torch",))
    assert state.missing == "faiss is not installed"
    assert 0 < state.limit_bytes <= card.free


def test_a_device_without_room_rests_longer_each_time(card: Card, clock: Clock) -> None:
    device_manager = looked_at(card, clock)
    rested = []
    for _ in range(10):
        device_manager.refused(DeviceError("no room", "out-of-memory"), PLAN)
        started = clock.now
        while problem(device_manager):
            clock.now += 1
            device_manager.look(10)
        rested.append(clock.now - started)
    assert rested[:4] == [30, 60, 120, 240]
    assert rested[-1] == 1800
    assert device_manager.incidents == {"out-of-memory": 10}
    device_manager.built(index())
    device_manager.refused(DeviceError("no room", "limit"), PLAN)
    clock.now += 30
    device_manager.look(10)
    assert not problem(device_manager), "a success makes the first rest short again"


def test_more_room_ends_the_rest(card: Card, clock: Clock) -> None:
    device_manager = looked_at(card, clock)
    card.taken = 1000 * MB
    device_manager.refused(DeviceError("no room", "out-of-memory"), PLAN)
    device_manager.look(10)
    assert "no room" in problem(device_manager)
    card.taken = 990 * MB
    device_manager.look(10)
    assert problem(device_manager), "a tenth of more room is not worth a try"
    card.taken = 500 * MB
    device_manager.look(10)
    assert not problem(device_manager)


def test_looks_are_due_every_half_minute_while_there_is_no_memory(card: Card, clock: Clock) -> None:
    device_manager = looked_at(card, clock)
    state = device_manager.state(10, index())
    device_manager.note(IndexPlan("exact", notes=("no room",), refusal="limit"), state)
    looks = []
    for second in range(100):
        clock.now += 1
        if device_manager.needs_look:
            looks.append(second)
            device_manager.look(10)
            assert device_manager.needs_look, "a report has looked, and no round has acted on it"
            device_manager.postpone_look()
    assert looks == [29, 59, 89]


def test_a_plan_without_room_is_looked_at_again_after_a_while(card: Card, clock: Clock) -> None:
    device_manager = looked_at(card, clock)
    state = device_manager.state(10, index())
    refused = IndexPlan("exact", notes=("no room",), refusal="limit")
    device_manager.note(refused, state)
    assert not device_manager.needs_look, "it was looked at a moment ago"
    clock.now += 31
    assert device_manager.needs_look
    device_manager.postpone_look()
    assert not device_manager.needs_look
    clock.now += 31
    device_manager.note(PLAN, state)
    assert not device_manager.needs_look, "there is room"


@pytest.mark.parametrize("cause", ["device-lost", "fork"])
def test_a_lost_device_is_not_asked_again(cause: Any, card: Card, clock: Clock) -> None:
    device_manager = looked_at(card, clock)
    device_manager.refused(DeviceError("gone", cause), PLAN)
    clock.now += 1e6
    device_manager.look(10)
    assert "until restart: gone" in problem(device_manager)
    assert not device_manager.needs_look


def test_a_failing_engine_leaves_the_other_one(card: Card, clock: Clock) -> None:
    device_manager = DeviceManager(machine_with(card, present={}), EventLog(), clock=clock)
    device_manager.look(10)
    device_manager.refused(DeviceError("torch has a fault", "device-error"), PLAN)
    state = device_manager.state(10, index())
    assert state is not None
    assert (state.engines, state.missing, state.problem) == (("faiss",), "torch has a fault", "")


def test_a_card_that_was_filled_meanwhile_is_not_touched(card: Card, clock: Clock) -> None:
    """Neither a trial nor CUDA's context in this process is started on it."""
    device_manager = looked_at(card, clock)
    device_manager.machine._trial = lambda _engine, _index: pytest.fail("tried")
    card.taken = card.total
    with pytest.raises(DeviceError, match="100 MB are needed on cuda:0, its budget has room for 0") as caught:
        device_manager.admit(PLAN, index())
    assert caught.value.cause == "limit"
    assert not device_manager.machine.holdings.active


def test_the_reserve_of_torch_is_room_for_torch_alone(clock: Clock) -> None:
    """faiss allocates beside it: what torch keeps is not there for it."""
    gpu = cast("Prober", FakeProber(Card(2000 * MB)))
    memory = {"mem_get_info": (200 * MB, 2000 * MB), "memory_reserved": 1000 * MB, "memory_allocated": 0}
    calls = {name: lambda _index, value=value: value for name, value in memory.items()}
    library = SimpleNamespace(cuda=SimpleNamespace(**calls))
    given: dict[str, Any] = {
        "prober": gpu,
        "load": {"torch": library}.get,
        "trial": lambda *_: "",
        "present": lambda _: "",
    }
    device_manager = DeviceManager(Machine("cuda", 1.0, holdings=Holdings(), **given), EventLog(), clock=clock)
    plan = IndexPlan("exact", device="cuda:0", device_bytes=500 * MB)
    assert device_manager.admit(replace(plan, engine="torch"), index())
    with pytest.raises(DeviceError, match="500 MB are needed on cuda:0, its budget has room for 200"):
        device_manager.admit(replace(plan, engine="faiss"), index())


def test_admission_names_what_is_lacking(card: Card, clock: Clock) -> None:
    device_manager = looked_at(card, clock)
    assert device_manager.admit(PLAN, index())
    with pytest.raises(DeviceError, match="9000 MB are needed on cuda:0, its budget has room for") as caught:
        device_manager.admit(IndexPlan("exact", engine="torch", device="cuda:0", device_bytes=9000 * MB), index())
    assert caught.value.cause == "limit"
    busy = DeviceManager(machine_with(card, trial={"torch": "another process fills the GPU"}), EventLog(), clock=clock)
    with pytest.raises(DeviceError, match="another process") as caught:
        busy.admit(PLAN, index())
    assert caught.value.cause == "out-of-memory"
