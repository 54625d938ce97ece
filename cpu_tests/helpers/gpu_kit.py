"""A simulated GPU: a card with a limit in bytes, its driver, and indexes on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from memevolve_gpu.devices.gpu_probe import Gpu, GpuList, Prober
from memevolve_gpu.devices.memory import Holdings
from memevolve_gpu.devices.selection import Machine
from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index.base import Arrays, BuildJob, FlatIndex
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.live import device_manager
from memevolve_gpu.types import DeviceIncident, FloatArray, IndexPlan, IntArray, Metric, SearchParams

__all__ = [
    "MB",
    "Card",
    "FakeProber",
    "OnCard",
    "line",
    "machine_with",
    "on_disk",
    "others_take_all",
    "printing",
    "timed_as",
]

MB = 1 << 20


def line(index: int = 0, name: str = "Test GPU", total: int | str = 1000, free: int | str = 900, **other: str) -> str:
    """What a driver prints for a card; sizes in MiB."""
    uuid, capability = other.get("uuid", f"GPU-{index}aaaa"), other.get("capability", "9.0")
    mig, driver = other.get("mig", "[N/A]"), other.get("driver", "580.65.06")
    return f"{index}, {name}, {uuid}, {capability}, {total}, {free}, {mig}, {driver}"


def printing(*lines: str) -> list[str]:
    """A command that prints these lines."""
    return ["/bin/sh", "-c", "".join(f"echo '{each}';" for each in lines)]


class Card:
    """A card of ``total`` bytes of which other processes hold ``taken``; broken when ``lost`` is set."""

    def __init__(self, total: int = 4000 * MB) -> None:
        self.total = total
        self.taken = 0
        self.lost = False
        self.holders: weakref.WeakSet[OnCard] = weakref.WeakSet()
        self.searches = 0
        self.tensors: list[Any] = []
        """What searches were given that was no numpy array."""

    @property
    def free(self) -> int:
        return self.total - self.taken - sum(holder.held for holder in self.holders)

    def allocate(self, holder: OnCard, size: int) -> None:
        if self.lost:
            raise DeviceError("CUDA error: device lost", "device-lost")
        if size > self.free:
            raise DeviceError(f"out of memory: {size} wanted, {self.free} free", "out-of-memory")
        holder.held = size
        self.holders.add(holder)


class FakeProber:
    """The driver of one card."""

    def __init__(self, card: Card | None, problem: str = "there is no NVIDIA driver on this machine") -> None:
        self.card, self.problem = card, problem
        self.looks = 0

    def look(self, max_age: float = float("inf")) -> GpuList:
        del max_age
        self.looks += 1
        if self.card is None:
            return GpuList(problem=self.problem)
        return GpuList((Gpu(0, "Test GPU", (9, 0), self.card.total, self.card.free),), "", "580.65.06")


class OnCard(FlatIndex):
    """An exact index that claims to live on ``card``; one instance of the class attribute serves all of a test."""

    accepts_device_queries: ClassVar[bool] = True
    card: ClassVar[Card]
    held = 0

    @classmethod
    def build(cls, job: BuildJob) -> OnCard:
        index = cls(job.plan, job.metric, job.rows, job.table())
        cls.card.allocate(index, job.plan.device_bytes)
        job.progress("add", 1.0)
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> OnCard:
        raise AssertionError("nothing is restored to a device")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._told: list[DeviceIncident] = []
        self._over = False

    @property
    def device(self) -> str:
        return "cpu" if self._over else self.plan.device

    @property
    def device_bytes(self) -> int:
        return 0 if self._over else self.held

    def incidents(self) -> list[DeviceIncident]:
        told, self._told = self._told, []
        return told

    def search(
        self, queries: Any, k: int, effort: SearchParams, allowed: RowFilter | None = None
    ) -> tuple[FloatArray, IntArray]:
        if hasattr(queries, "detach"):
            self.card.tensors.append(queries)
            queries = queries.numpy()
        if self.card.lost and not self._over:
            self._over = True
            self._told.append(DeviceIncident(self.plan.device, "device-lost", "cpu-until-restart", "the card is gone"))
        self.card.searches += not self._over
        return super().search(queries, k, replace(effort, exact=True), allowed)


def others_take_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[Card, OnCard, int], None]:
    """Other processes fill a card in the moment in which an index asks for memory; returns ``allocate`` as it was."""
    allocate = Card.allocate

    def taken_meanwhile(self: Card, holder: OnCard, size: int) -> None:
        self.taken = self.total
        allocate(self, holder, size)

    monkeypatch.setattr(Card, "allocate", taken_meanwhile)
    return allocate


def machine_with(
    card: Card | None,
    request: str = "cuda",
    *,
    fraction: float = 0.8,
    trial: dict[str, str] | None = None,
    present: dict[str, str] | None = None,
) -> Machine:
    """A machine with this card, on which the given engines fail, when tried or at first sight."""
    missing = {"faiss": "faiss is not installed"} if present is None else present
    return Machine(
        request,
        fraction,
        prober=cast("Prober", FakeProber(card)),
        holdings=Holdings(),
        load=lambda _name: None,
        trial=lambda engine, _index: (trial or {}).get(engine, ""),
        present=lambda engine: missing.get(engine, ""),
    )


def timed_as(monkeypatch: pytest.MonkeyPatch, there: Callable[[int], float], here: Callable[[int], float]) -> None:
    """Builds time both sides by these clocks, which give seconds for a number of queries: ``there`` on the card."""

    def timer(index: Any, queries: Any, _params: Any) -> float:
        return (there if index.plan.engine != "cpu" else here)(len(queries))

    monkeypatch.setattr(device_manager, "_timed", timer)


def on_disk(folder: Path, name: str, text: str) -> str:
    """An executable file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)
