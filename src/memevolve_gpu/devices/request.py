"""Which device a store searches on: the setting DEVICE held against what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .gpu import Gpu, GpuList

__all__ = ["DeviceChoice", "resolve"]


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """device: ``cpu`` or ``cuda:N``; reason: why, one sentence; gpu: the GPU, None on the CPU.

    wanted: a GPU was asked for in so many words; present: there is one, or most likely. Where ``device`` is the CPU all
    the same, somebody should be told.
    """

    device: str
    reason: str
    gpu: Gpu | None = None
    wanted: bool = False
    present: bool = False

    @property
    def disappointed(self) -> bool:
        """A GPU was asked for and there is none."""
        return self.wanted and self.gpu is None

    @property
    def failed(self) -> bool:
        """There is no GPU where there should be one: it was asked for, or is there and cannot be used."""
        return self.gpu is None and (self.wanted or self.present)


def resolve(request: str, look: Callable[[], GpuList]) -> DeviceChoice:
    """The device for ``request``: auto, cpu, cuda or cuda:N.

    Args:
        request: the setting DEVICE; ``cpu`` never looks.
        look: finds the GPUs.
    """
    if request == "cpu":
        return DeviceChoice("cpu", "DEVICE=cpu")
    found, wanted = look(), request != "auto"
    if request.startswith("cuda:"):
        return _numbered(request, found)
    if not found.usable:
        return DeviceChoice("cpu", found.problem or "there is no usable GPU", None, wanted, found.present)
    gpu = max(found.usable, key=lambda each: (each.free, -each.index))
    others = f", of {len(found.usable)} GPUs the one with most memory free" if len(found.usable) > 1 else ""
    return DeviceChoice(gpu.device, f"DEVICE={request}: {gpu.name}{others}{_doubt(found)}", gpu, wanted, True)


def _numbered(request: str, found: GpuList) -> DeviceChoice:
    number = int(request.partition(":")[2])
    gpu = next((each for each in found.gpus if each.index == number), None)
    if gpu is None:
        there = f"there are {len(found.gpus)}, numbered from 0" if found.gpus else found.problem
        return DeviceChoice("cpu", f"DEVICE={request}: no such GPU; {there}", None, True, found.present)
    if gpu.problem:
        return DeviceChoice("cpu", f"DEVICE={request}: {gpu.problem}", None, True, True)
    return DeviceChoice(gpu.device, f"DEVICE={request}: {gpu.name}{_doubt(found)}", gpu, True, True)


def _doubt(found: GpuList) -> str:
    return f"; {found.doubt}" if found.doubt else ""
