"""Which side answers a call: seconds of a GPU index and of the CPU index beside it, measured on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..types import JsonObject

BATCHES = (1, 16, 256)
"""Queries at once for which both sides are timed."""
_REPEATS, _ENOUGH_SECONDS = 5, 0.05


@dataclass(frozen=True, slots=True)
class SideTimings:
    """Seconds of a call with each number of :data:`BATCHES` queries, by an index of ``rows`` rows on either side.

    The host is not timed with more queries than those that already take it longer than the device needs for the next
    size; the seconds of the smaller batch stand in for it there.
    """

    rows: int
    device: tuple[float, ...]
    host: tuple[float, ...]

    def device_wins(self, nq: int) -> bool:
        """Whether the device answers ``nq`` queries sooner; between the sizes, by interpolation of the logarithms."""
        gains = [
            math.log(max(host, 1e-9) / max(device, 1e-9)) for device, host in zip(self.device, self.host, strict=True)
        ]
        return float(np.interp(math.log(max(1, nq)), [math.log(size) for size in BATCHES], gains)) > 0

    @property
    def crossover(self) -> int | None:
        """The fewest queries from which on the device wins; None where it loses at the largest size."""
        lost = next((nq for nq in range(BATCHES[-1], 0, -1) if not self.device_wins(nq)), 0)
        return None if lost == BATCHES[-1] else lost + 1

    def as_dict(self) -> JsonObject:
        """Plain values for reports: milliseconds by the number of queries."""
        sides = {"device_ms": self.device, "host_ms": self.host}
        return {name: dict(zip(map(str, BATCHES), (1e3 * s for s in own), strict=True)) for name, own in sides.items()}


def seconds_of(call: Callable[[], object]) -> float:
    """The median of up to five calls after one that warms up; fewer where they take long."""
    call()
    taken: list[float] = []
    while len(taken) < _REPEATS and sum(taken) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measured_sides(rows: int, device: Callable[[int], float], host: Callable[[int], float]) -> SideTimings:
    """Time both sides, each of which gives its seconds for a number of queries."""
    there = [device(size) for size in BATCHES]
    here = [host(BATCHES[0])]
    for size, seconds in zip(BATCHES[1:], there[1:], strict=True):
        here.append(here[-1] if here[-1] > seconds else host(size))
    return SideTimings(rows, tuple(there), tuple(here))
