"""The failover rule that both GPU engines share, by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support import as_child

from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index import device_failover
from memevolve_gpu.index.device_failover import BusyError, DeviceFailover, lost_devices, mark_lost

DEVICE = "cuda:5"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def failover(clock: Clock) -> Iterator[DeviceFailover]:
    yield DeviceFailover(DEVICE, clock)
    device_failover._lost.pop(DEVICE, None)


def fits(most: int, asked: list[int]) -> Callable[[int], str]:
    """Work that has memory for ``most`` queries at once."""

    def work(batch: int) -> str:
        asked.append(batch)
        if batch > most:
            raise DeviceError("full", "out-of-memory")
        return "found"

    return work


def fails(cause: str) -> Callable[[int], str]:
    def work(batch: int) -> str:
        raise DeviceError("it failed", cause)  # type: ignore[arg-type]

    return work


def told(failover: DeviceFailover) -> list[tuple[str, str]]:
    return [(incident.cause, incident.action) for incident in failover.incidents()]


def test_out_of_memory_halves_the_batch_and_frees_memory_each_time(failover: DeviceFailover) -> None:
    asked: list[int] = []
    freed: list[int] = []
    assert failover.attempt(fits(6, asked), 40, lambda: freed.append(asked[-1])) == "found"
    assert asked == [40, 20, 10, 5]
    assert freed == [40, 20, 10]
    assert told(failover) == [("out-of-memory", "smaller-batch")] * 3
    assert failover.attempt(fits(6, asked), 40) == "found"
    assert asked[-1] == 5, "what was learnt is kept"
    assert told(failover) == []


def test_a_cut_batch_doubles_every_fifteen_seconds(failover: DeviceFailover, clock: Clock) -> None:
    asked: list[int] = []
    failover.attempt(fits(32, asked), 64)
    for _ in range(4):
        clock.now += 15.0
        failover.attempt(fits(1000, asked), 200)
    assert asked == [64, 32, 32, 64, 128, 200]


@pytest.mark.parametrize("cause", ["out-of-memory", "limit", "device-error"])
def test_the_cpu_answers_with_a_growing_back_off(cause: str, failover: DeviceFailover, clock: Clock) -> None:
    tried = []
    for _ in range(30_000):
        clock.now += 0.1
        if failover.serving:
            tried.append(clock.now)
            assert failover.attempt(fails(cause), 1) is None
    pauses = np.diff(tried)
    assert pauses[:4] == pytest.approx([15, 30, 60, 120], abs=0.3)
    assert max(pauses) == pytest.approx(600, abs=0.3)
    assert set(told(failover)) == {(cause, "cpu")}


def test_the_device_is_used_again_after_the_back_off(failover: DeviceFailover, clock: Clock) -> None:
    asked: list[int] = []
    assert failover.attempt(fits(0, asked), 1) is None
    assert failover.attempt(fits(9, asked), 1) is None
    assert asked == [1], "a device in back-off is left alone"
    clock.now += 16.0
    assert failover.attempt(fits(9, asked), 1) == "found"
    assert told(failover) == [("out-of-memory", "cpu"), ("recovered", "device-again")]
    assert failover.attempt(fits(0, asked), 1) is None
    clock.now += 16.0
    assert failover.serving, "the next back-off is the first again"


def test_a_sticky_error_keeps_every_index_off_the_device(failover: DeviceFailover, clock: Clock) -> None:
    other, elsewhere = DeviceFailover(DEVICE, clock), DeviceFailover("cuda:6", clock)
    assert failover.attempt(fails("device-lost"), 8) is None
    clock.now += 1e6
    asked: list[int] = []
    for _ in range(2):
        assert failover.attempt(fits(9, asked), 8) is other.attempt(fits(9, asked), 8) is None
    assert asked == []
    assert elsewhere.attempt(fits(9, asked), 8) == "found"
    assert told(failover) == told(other) == [("device-lost", "cpu-until-restart")]
    assert lost_devices()[DEVICE] == "it failed"
    mark_lost(DEVICE, "something that follows from it")
    assert lost_devices()[DEVICE] == "it failed", "the first error is the cause"


def test_two_threads_that_fail_at_once_back_off_once(failover: DeviceFailover, clock: Clock) -> None:
    def work(batch: int) -> str:
        failover.attempt(fails("device-error"), 1)
        raise DeviceError("and again")

    assert failover.attempt(work, 1) is None
    assert told(failover) == [("device-error", "cpu")]
    clock.now += 15.0
    assert failover.serving


def test_a_busy_device_is_no_incident(failover: DeviceFailover) -> None:
    def work(batch: int) -> str:
        raise BusyError(DEVICE)

    assert failover.attempt(work, 8) is None
    assert failover.serving
    assert told(failover) == []


def test_a_forked_child_leaves_the_device_alone(failover: DeviceFailover) -> None:
    def child() -> None:
        asked: list[int] = []
        for _ in range(2):
            assert failover.attempt(fits(9, asked), 8) is None
        assert (asked, failover.serving) == ([], False)
        assert told(failover) == [("fork", "cpu-until-restart")]

    assert as_child(child) == 0
    assert failover.serving
    assert told(failover) == []


def test_incidents_are_bounded(failover: DeviceFailover, clock: Clock) -> None:
    for _ in range(500):
        failover.attempt(fails("out-of-memory"), 2)
        clock.now += 1e4
    assert len(failover.incidents()) == 64
