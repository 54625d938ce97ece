"""Whose bytes are on the card: those of a resting index, of scratch, of cuBLAS and of the CUDA context."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from gpu_kit import MB, Card, FakeProber
from index.torch_gpu.conftest import card, torch  # noqa: F401 - fixtures
from torch_gpu_kit import on_card, some

from memevolve_gpu.devices.gpu_probe import Gpu, GpuList, Prober
from memevolve_gpu.devices.memory import CONTEXT_BYTES, Holdings
from memevolve_gpu.devices.selection import Machine
from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index.faiss_gpu.sizes import TEMPORARY_BYTES
from memevolve_gpu.index.torch_gpu.memory_accounting import WORKSPACE, Account
from memevolve_gpu.live.device_manager import DeviceManager
from memevolve_gpu.monitoring.events import EventLog
from memevolve_gpu.types import IndexPlan

GB = 1 << 30


class Held:
    """An index of ``size`` bytes on cuda:0."""

    kind, n, device = "exact", 1, "cuda:0"

    def __init__(self, plan: IndexPlan, size: int) -> None:
        self.plan, self.device_bytes = plan, size


def managed(gpu: Any, torch_pool: Any = None, fraction: float = 0.8) -> DeviceManager:
    """A manager of the card that ``gpu`` simulates; ``torch_pool`` reports its memory once CUDA is in use."""
    given: dict[str, Any] = {"trial": lambda *_: "", "present": lambda _: "", "load": {"torch": torch_pool}.get}
    machine = Machine("cuda", fraction, prober=cast("Prober", gpu), holdings=Holdings(), **given)
    device_manager = DeviceManager(machine, EventLog())
    device_manager.look(10)
    return device_manager


def pool(free: int, total: int, reserved: int = 0, allocated: int = 0) -> Any:
    memory = {"mem_get_info": (free, total), "memory_reserved": reserved, "memory_allocated": allocated}
    return SimpleNamespace(cuda=SimpleNamespace(**{name: lambda _i, v=value: v for name, value in memory.items()}))


@pytest.mark.usefixtures("torch")
def test_a_resting_torch_index_is_still_ours(card: Account) -> None:  # noqa: F811
    """It searches on the CPU for a while, and its rows stay on the card: they are not a neighbour's."""
    index, holdings = on_card("exact", some(1)), Holdings()
    holdings.add(index, index.plan.device)
    held = holdings.on(index.plan.device)
    assert held == index.device_bytes > 0
    index._failover.refuse(DeviceError("a passing fault", "device-error"))
    assert index.device == "cpu", "it rests"
    assert holdings.on(index.plan.device) == held


def test_the_bytes_of_a_resting_index_are_room_for_its_successor() -> None:
    device_manager = managed(FakeProber(Card(10 * GB)), pool(free=GB, total=10 * GB), fraction=1.0)
    plan = IndexPlan("exact", engine="torch", device="cuda:0", device_bytes=4 * GB)
    resting = cast("Any", Held(plan, 4 * GB))
    resting.device = "cpu"
    device_manager.machine.holdings.begin()
    assert device_manager.admit(plan, resting) is False, "it fits once the resting index has left"
    with pytest.raises(DeviceError, match="9216 MB are needed"):
        device_manager.admit(replace(plan, device_bytes=9 * GB), resting)


@pytest.mark.parametrize(("engine", "kept"), [("faiss", TEMPORARY_BYTES), ("torch", WORKSPACE)])
def test_scratch_that_an_engine_keeps_is_counted_once(engine: Any, kept: int) -> None:
    """After the first build it is on the card: ours, and no longer needed by the plan of the next index."""
    free = 2 * GB
    device_manager = managed(FakeProber(Card(10 * GB)), pool(free, 10 * GB), fraction=1.0)
    plan = IndexPlan("exact", engine=engine, device="cuda:0", device_bytes=kept + GB)
    first = cast("Any", Held(plan, GB))
    device_manager.machine.holdings.begin()
    device_manager.built(first)
    budget = device_manager.machine.budget()
    assert budget.used == GB + kept
    fits = replace(plan, device_bytes=kept + free)
    nothing = cast("Any", Held(IndexPlan("exact"), 0))
    assert device_manager.admit(fits, nothing)
    with pytest.raises(DeviceError, match="its budget has room for"):
        device_manager.admit(replace(fits, device_bytes=kept + free + MB), nothing)


class Driver:
    """A card on which ``free`` changes as the process begins to use CUDA."""

    def __init__(self, free: int) -> None:
        self.free = free

    def look(self, _max_age: float = 0.0) -> GpuList:
        return GpuList((Gpu(0, "Test GPU", (9, 0), 10 * GB, self.free),), "", "580.65.06")


@pytest.mark.parametrize(("context", "counted"), [(577 * MB, 577 * MB), (-MB, CONTEXT_BYTES), (5 * GB, CONTEXT_BYTES)])
def test_the_context_is_measured_before_the_first_build(context: int, counted: int) -> None:
    """What the card has less once CUDA has begun here; the guess stays where other processes moved more."""
    device_manager = managed(Driver(9 * GB), pool(free=9 * GB - context, total=10 * GB))
    nothing, plan = cast("Any", Held(IndexPlan("exact"), 0)), IndexPlan("exact", engine="torch", device="cuda:0")
    assert device_manager.machine.budget().coming == CONTEXT_BYTES
    device_manager.admit(replace(plan, device_bytes=GB), nothing)
    assert device_manager.budget_before is not None
    assert (device_manager.budget_before.context, device_manager.budget_before.coming) == (counted, 0)


def test_the_workspace_of_cublas_is_on_the_account_of_every_gpu() -> None:
    assert Account("cuda:0").used == WORKSPACE
    assert Account("cpu").used == 0
    small = Account("cuda:0")
    small.limit = WORKSPACE + MB
    with pytest.raises(DeviceError, match="gpu_max_memory_mb"):
        small.take(2 * MB, "a search")
    assert np.isclose(small.used, WORKSPACE)
