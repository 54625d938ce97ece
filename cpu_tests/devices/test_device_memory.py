"""What may be taken of a card: by cupy, by torch, by the driver; beside others; before and after CUDA is in use."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from gpu_kit import MB, Card, FakeProber, line, machine_with
from support import as_child

from memevolve_gpu.devices.gpu_probe import Gpu, Prober
from memevolve_gpu.devices.memory import (
    CONTEXT_BYTES,
    Holdings,
    HostMemory,
    MemoryBudget,
    device_budget,
    free_bytes,
    host_budget,
    loaded_module,
)
from memevolve_gpu.devices.selection import Machine

GB = 1 << 30
GPU = Gpu(0, "Test GPU", (9, 0), 80 * GB, 60 * GB)


class Body:
    """Something that holds memory."""

    def __init__(self, size: int, device: str = "cuda:0") -> None:
        self.device_bytes, self.device = size, device


def cupy(free: int, total: int = 80 * GB, pool: tuple[int, int] = (0, 0)) -> Any:
    used, held = pool
    return SimpleNamespace(
        cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0, memGetInfo=lambda: (free, total))),
        get_default_memory_pool=lambda: SimpleNamespace(used_bytes=lambda: used, total_bytes=lambda: held),
    )


class CupyOfTwo:
    """cupy on two devices, where each thread has a current one, as CUDA has it."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(runtime=self)
        self.contexts: list[int] = []
        self._thread = threading.local()

    def getDevice(self) -> int:  # noqa: N802 - the names of CUDA
        return getattr(self._thread, "device", 0)

    def setDevice(self, index: int) -> None:  # noqa: N802
        if index > 1:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self.contexts.append(index)
        self._thread.device = index

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return (10 + self.getDevice()) * GB, 80 * GB

    def get_default_memory_pool(self) -> Any:
        held = (3 + self.getDevice()) * GB
        return SimpleNamespace(used_bytes=lambda: GB, total_bytes=lambda: held)


def torch(free: int, total: int = 80 * GB, pool: tuple[int, int] = (0, 0)) -> Any:
    used, held = pool
    return SimpleNamespace(
        cuda=SimpleNamespace(
            mem_get_info=lambda _index: (free, total),
            memory_allocated=lambda _index: used,
            memory_reserved=lambda _index: held,
        )
    )


def raising(_index: Any = None) -> Any:
    raise RuntimeError("CUDA error: initialization error")


def nothing(_name: str) -> Any:
    """No library is installed."""
    return None


def budget(modules: dict[str, Any], *, used: int = 0, active: bool = True, fraction: float = 0.8) -> MemoryBudget:
    holdings, index = Holdings(), Body(used)
    holdings.add(index, GPU.device)
    if active:
        holdings.begin()
    return device_budget(GPU, fraction, holdings=holdings, load=modules.get)


def test_cupy_is_asked_first_then_torch_then_the_driver() -> None:
    everything = {"cupy": cupy(50 * GB), "torch": torch(40 * GB)}
    assert (budget(everything).source, budget(everything).free) == ("cupy", 50 * GB)
    assert (budget({"torch": torch(40 * GB)}).source, budget({"torch": torch(40 * GB)}).free) == ("torch", 40 * GB)
    assert (budget({}).source, budget({}).free) == ("driver", 60 * GB)


def test_a_library_that_fails_gives_way_to_the_next() -> None:
    broken = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=raising), mem_get_info=raising))
    assert budget({"cupy": broken, "torch": torch(40 * GB)}).source == "torch"
    assert budget({"cupy": broken, "torch": broken}).source == "driver"
    assert budget({"cupy": SimpleNamespace(), "torch": SimpleNamespace()}).source == "driver"


def test_another_device_is_asked_without_a_context_on_the_current_one() -> None:
    """Setting a device makes a context there since CUDA 12; a process on cuda:1 must leave cuda:0 alone."""
    library: Any = CupyOfTwo()
    assert free_bytes(1, {"cupy": library}.get) == 11 * GB
    assert library.contexts == [1]
    assert library.getDevice() == 0
    second = Gpu(1, "Test GPU", (9, 0), 80 * GB, 60 * GB)
    holdings = Holdings()
    holdings.begin()
    found = device_budget(second, 0.8, holdings=holdings, load={"cupy": library}.get)
    assert (found.free, found.cached) == (11 * GB, 3 * GB)
    assert free_bytes(0, {"cupy": library}.get) == 10 * GB
    assert set(library.contexts) == {1}
    assert free_bytes(2, {"cupy": library}.get) is None
    assert free_bytes(2, {"cupy": library, "torch": torch(5 * GB)}.get) == 5 * GB


def test_what_torch_puts_off_and_then_refuses_gives_way_too() -> None:
    class LateError(Exception):
        pass

    def refusing(_index: int) -> Any:
        raise LateError("CUDA call failed lazily")

    late = SimpleNamespace(cuda=SimpleNamespace(mem_get_info=refusing, DeferredCudaCallError=LateError))
    assert budget({"torch": late}).source == "driver"


@pytest.mark.parametrize(
    "failure", ["ValueError('numpy.dtype size changed')", "KeyError('CUDA_PATH')", "NameError('_C')", "OSError('so')"]
)
def test_a_library_that_cannot_be_imported_is_none(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text(f"raise {failure}\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded_module.cache_clear()
    assert loaded_module("half_installed") is None


def test_no_library_is_asked_before_cuda_is_in_use() -> None:
    runtime = SimpleNamespace(getDevice=pytest.fail)
    broken = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, mem_get_info=pytest.fail))
    assert budget({"cupy": broken, "torch": broken}, active=False).source == "driver"


def test_the_limit_is_a_share_of_what_is_free_or_ours() -> None:
    found = budget({"torch": torch(30 * GB, pool=(12 * GB, 14 * GB))}, used=10 * GB)
    assert (found.used, found.cached, found.context) == (10 * GB, 2 * GB, CONTEXT_BYTES)
    ours = 10 * GB + 2 * GB + CONTEXT_BYTES
    assert found.reserved == 2 * GB + CONTEXT_BYTES
    assert found.limit == int(0.8 * (30 * GB + ours))
    assert found.room == found.limit - 10 * GB - CONTEXT_BYTES
    assert found.as_dict()["limit"] == found.limit


def test_the_reserve_of_cupy_is_ours_and_no_room_for_an_engine() -> None:
    """It is not free for torch or faiss to allocate; nor is it somebody else's."""
    found = budget({"cupy": cupy(10 * GB, pool=(0, 10 * GB)), "torch": torch(10 * GB, pool=(0, 2 * GB))}, used=GB)
    assert (found.cached, found.foreign) == (12 * GB, 10 * GB)
    assert found.limit == int(0.8 * (10 * GB + GB + 12 * GB + CONTEXT_BYTES))
    assert found.room == found.limit - GB - CONTEXT_BYTES - 10 * GB
    assert found.room <= 10 * GB + 2 * GB
    whole = budget({"cupy": cupy(10 * GB, pool=(0, 10 * GB))}, fraction=1.0)
    assert whole.room == 10 * GB


def test_what_the_process_holds_for_other_ends_is_not_ours() -> None:
    """Somebody's model in the same process: allocated by torch, held by no index."""
    found = budget({"torch": torch(20 * GB, pool=(40 * GB, 40 * GB))})
    assert found.limit == int(0.8 * (20 * GB + CONTEXT_BYTES))


def test_the_context_is_counted_before_it_is_there_and_after() -> None:
    before = budget({}, active=False)
    assert (before.context, before.coming) == (0, CONTEXT_BYTES)
    assert before.room == int(0.8 * 60 * GB) - CONTEXT_BYTES
    after = budget({"torch": torch(60 * GB - CONTEXT_BYTES)})
    assert abs(after.room - before.room) <= 1
    assert after.limit == before.limit


def test_a_full_card_has_no_room_and_no_negative_one() -> None:
    assert budget({"torch": torch(0)}, used=10 * GB).room == 0
    assert budget({"torch": torch(100 * MB)}, fraction=1.0).room == 100 * MB


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("fraction", [0.1, 0.8, 1.0])
def test_room_is_never_more_than_what_is_there(fraction: float, active: bool) -> None:
    """Free, or in torch's reserve; whatever indexes, cupy and others hold. All parts together stay within the limit."""
    sizes = (0, 300 * MB, 7 * GB, 60 * GB)
    for free, used, kept, foreign in itertools.product(sizes, repeat=4):
        modules = {"cupy": cupy(free, pool=(0, foreign)), "torch": torch(free, pool=(used, used + kept))}
        found = budget(modules, used=used, active=active, fraction=fraction)
        assert found.limit == int(fraction * (found.free + found.used + found.cached + found.context))
        assert 0 <= found.room <= max(0, found.free + found.cached - found.foreign)
        if found.room:
            assert found.used + found.room + found.context + found.coming + found.foreign <= found.limit


def test_a_card_that_has_gone_has_no_memory(tmp_path: Path) -> None:
    state = tmp_path / "cards"
    state.write_text(f"{line(0, 'A', free=10)}\n{line(1, 'B', free=900)}\n")
    prober = Prober(command=["/bin/cat", str(state)])
    machine = Machine("auto", 1.0, prober=prober, holdings=Holdings(), load=nothing)
    assert (machine.choice.device, machine.budget().free) == ("cuda:1", 900 * MB)
    state.write_text(f"{line(0, 'A', free=10)}\n")
    assert machine.budget(fresh=True).free == 0


def test_workers_on_one_card_share_it() -> None:
    """Each new worker takes all the memory that it is offered; together they never ask for more than the card has."""
    card, indexes = Card(40 * GB), []
    taken = []
    for _ in range(6):
        machine = Machine("cuda", 0.5, prober=cast("Prober", FakeProber(card)), holdings=Holdings(), load=nothing)
        room = machine.budget().room
        index = Body(room)
        machine.holdings.add(index, "cuda:0")
        indexes.append(index)
        card.taken += room + CONTEXT_BYTES
        taken.append(room)
        assert card.free >= 0
    assert taken == sorted(taken, reverse=True)
    assert taken[0] == 20 * GB - CONTEXT_BYTES
    assert sum(taken) < 40 * GB


def test_stores_of_one_process_share_its_budget() -> None:
    holdings, first = Holdings(), Body(8 * GB)
    holdings.begin()
    load = {"torch": torch(20 * GB)}.get
    holdings.add(first, "cuda:0")
    alone = device_budget(GPU, 0.8, holdings=holdings, load=load)
    second = Body(4 * GB)
    holdings.add(second, "cuda:0")
    elsewhere = Body(4 * GB)
    holdings.add(elsewhere, "cuda:1")
    assert device_budget(GPU, 0.8, holdings=holdings, load=load).used == alone.used + 4 * GB
    del second
    assert device_budget(GPU, 0.8, holdings=holdings, load=load).used == alone.used


def test_free_bytes_come_from_a_library_or_not_at_all() -> None:
    assert free_bytes(0, {"cupy": cupy(3 * GB)}.get) == 3 * GB
    assert free_bytes(0, {"torch": torch(2 * GB)}.get) == 2 * GB
    assert free_bytes(0, nothing) is None
    assert machine_with(Card()).free_now(0) is None


def test_the_host_has_a_budget_of_the_same_shape() -> None:
    found = host_budget(HostMemory(10 * GB, 5 * GB, "cgroup2"))
    assert (found.device, found.total, found.free, found.source) == ("cpu", 10 * GB, 5 * GB, "cgroup2")
    assert found.limit == found.room == 4 * GB
    assert machine_with(None, "auto").budget().device == "cpu"


def in_child(work: Callable[[], bool]) -> bool:
    def act() -> None:
        assert work()

    return as_child(act) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_a_process_that_uses_cuda_stays_off_it() -> None:
    machine = machine_with(Card())
    index = Body(GB)
    machine.holdings.add(index, "cuda:0")
    assert in_child(lambda: machine.choice.device == "cuda:0" and not machine.forked)
    machine.holdings.begin()
    assert in_child(
        lambda: (
            machine.forked
            and machine.choice.device == "cpu"
            and "spawn" in machine.choice.reason
            and machine.holdings.on("cuda:0") == 0
        )
    )
    assert machine.choice.device == "cuda:0"
    assert machine.holdings.on("cuda:0") == GB
