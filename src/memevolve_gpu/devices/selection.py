"""Select the device of a store from the setting DEVICE and the detected GPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from .engine_probe import ENGINES, installed, try_engine
from .gpu_probe import Gpu, GpuList, Prober
from .memory import HOLDINGS, Holdings, Load, MemoryBudget, device_budget, free_bytes, host_budget, loaded_module


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """device: ``cpu`` or ``cuda:N``; reason: why, one sentence; gpu: the GPU, None on the CPU.

    requested: the setting names a GPU; detected: there is one, or most likely. Where ``device`` is the CPU all the
    same, the store reports it.
    """

    device: str
    reason: str
    gpu: Gpu | None = None
    requested: bool = False
    detected: bool = False

    @property
    def unmet(self) -> bool:
        """Whether a GPU was requested and none can be used."""
        return self.requested and self.gpu is None

    @property
    def failed(self) -> bool:
        """Whether a requested or detected GPU cannot be used."""
        return self.gpu is None and (self.requested or self.detected)


def select_device(request: str, look: Callable[[], GpuList]) -> DeviceChoice:
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
        return DeviceChoice("cpu", found.problem or "there is no usable GPU", None, wanted, found.detected)
    gpu = max(found.usable, key=lambda each: (each.free, -each.index))
    others = f", of {len(found.usable)} GPUs the one with most memory free" if len(found.usable) > 1 else ""
    return DeviceChoice(gpu.device, f"DEVICE={request}: {gpu.name}{others}{_doubt(found)}", gpu, wanted, True)


def _numbered(request: str, found: GpuList) -> DeviceChoice:
    number = int(request.partition(":")[2])
    gpu = next((each for each in found.gpus if each.index == number), None)
    if gpu is None:
        there = f"there are {len(found.gpus)}, numbered from 0" if found.gpus else found.problem
        return DeviceChoice("cpu", f"DEVICE={request}: no such GPU; {there}", None, True, found.detected)
    if gpu.problem:
        return DeviceChoice("cpu", f"DEVICE={request}: {gpu.problem}", None, True, True)
    return DeviceChoice(gpu.device, f"DEVICE={request}: {gpu.name}{_doubt(found)}", gpu, True, True)


def _doubt(found: GpuList) -> str:
    return f"; {found.doubt}" if found.doubt else ""


_FRESH_SECONDS = 5.0
"""Age at which memory figures of the driver are read again: each query costs a process."""

FORKED = "this process was forked from one that uses the GPU, and CUDA does not work in such a child; use spawn"


class Machine:
    """The devices and engines of this machine, detected on first use and remembered. Nothing here loads CUDA."""

    def __init__(
        self,
        request: str = "auto",
        fraction: float = 0.8,
        *,
        prober: Prober | None = None,
        holdings: Holdings = HOLDINGS,
        load: Load = loaded_module,
        trial: Callable[[str, int], str] = try_engine,
        present: Callable[[str], str] = installed,
    ) -> None:
        """Keep what to choose by; no device is looked for yet.

        Args:
            request: the setting DEVICE.
            fraction: the setting GPU_MEMORY_FRACTION.
            prober: finds the GPUs.
            holdings: what the stores of this process hold on devices.
            load: gives cupy and torch by name, or None.
            trial: why an engine does not work on a device, by using it; empty when it does.
            present: why an engine cannot be there, without loading it; empty when it may be.
        """
        self.request = request
        self.fraction = fraction
        self.holdings = holdings
        self._prober = prober or Prober()
        self._load = load
        self._trial = trial
        self._present = present
        self._choice: DeviceChoice | None = None
        self._engines: dict[str, str] = {}

    @property
    def known(self) -> DeviceChoice | None:
        """The device, if it has been detected."""
        return self.choice if self.forked else self._choice

    @property
    def choice(self) -> DeviceChoice:
        """The device that a store uses where a GPU pays; the first call may take seconds."""
        if self.forked:
            return DeviceChoice("cpu", FORKED, None, self.request.startswith("cuda"), True)
        if self._choice is None:
            self._choice = select_device(self.request, self._prober.look)
        return self._choice

    def look_again(self) -> None:
        """Query the driver again, and take the GPU with the most free memory now unless the setting names one.

        Once CUDA is in use here the choice is final, and its libraries report the memory.
        """
        if self.request == "cpu" or self.holdings.active or self.forked:
            return
        found = self._prober.look(0.0)
        if self.request in ("auto", "cuda"):
            self._choice = select_device(self.request, lambda: found)

    @property
    def forked(self) -> bool:
        """Whether CUDA cannot be used because a parent process has used it."""
        if self.holdings.forked:
            return True
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        probe = getattr(cuda, "_is_in_bad_fork", None)
        return bool(probe and probe())

    def gpus(self) -> GpuList:
        """All GPUs that CUDA shows to this process, whatever the setting DEVICE."""
        return self._prober.look()

    def engines(self) -> dict[str, str]:
        """Each engine and why it cannot be used, as far as known without loading it; an empty string where it can."""
        if not self._engines:
            self._engines = {engine: self._present(engine) for engine in ENGINES}
        return dict(self._engines)

    def refusal(self, engine: str) -> str:
        """Why ``engine`` does not work on the device, by trying it once; empty when it does."""
        gpu = self.choice.gpu
        if gpu is None:
            return self.choice.reason
        if engine == "torch" and self.holdings.active and "torch" in sys.modules:
            return ""
        return self._trial(engine, gpu.index)

    def budget(self, *, fresh: bool = False) -> MemoryBudget:
        """The memory of the device, or of the host when searches run there.

        fresh: query the driver even if it answered a moment ago.
        """
        gpu = self.choice.gpu
        if gpu is None:
            return host_budget()
        return device_budget(
            gpu, self.fraction, holdings=self.holdings, load=self._load, driver=lambda: self._queried(gpu, fresh)
        )

    def free_now(self, index: int) -> int | None:
        """Bytes free on ``cuda:index`` once CUDA is in use here, None where unknown; cheap enough for every search."""
        return free_bytes(index, self._load) if self.holdings.active else None

    def _queried(self, gpu: Gpu, fresh: bool) -> Gpu:
        found = self._prober.look(0.0 if fresh else _FRESH_SECONDS).gpus
        return next((each for each in found if each.index == gpu.index), replace(gpu, free=0))
