"""Which GPUs are here, as their driver tells it to another process.

Nothing in this module loads CUDA: not into a process that asked for the CPU, and not into one that will fork. The
driver is asked through ``nvidia-smi``, or where that tool is missing through its library NVML, in a child with a time
limit; a driver that hangs or crashes costs that child.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..utils.forking import renew_in_child
from .asking import Answer, ask
from .nvml_child import PROGRAM

__all__ = ["Gpu", "GpuList", "Prober"]

_SIGNS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Without the first there is no NVIDIA driver on Linux; the second is its counterpart inside WSL."""

_FIELDS = "index,name,uuid,compute_cap,memory.total,memory.free,driver_version"
TIMEOUT = 15.0
"""Seconds; without persistence mode a driver initialises every card anew for each question, seconds on large hosts."""

_OLDEST_DRIVER = (525, 60)
"""The first branch for CUDA 12 (NVIDIA, "CUDA Compatibility", table of minimum drivers); CUDA 13 wants 580."""
_OLDEST_CAPABILITY = (7, 0)
"""Volta, the first with half-precision matrix units; the libraries for CUDA 13 begin at 7.5 and say so themselves."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. index: N of ``cuda:N`` in this process; capability: compute capability, (0, 0) when not told; total and
    free: bytes; problem: why it cannot serve, else empty."""

    index: int
    name: str
    capability: tuple[int, int]
    total: int
    free: int
    uuid: str = ""
    problem: str = ""

    @property
    def device(self) -> str:
        """``cuda:N``."""
        return f"cuda:{self.index}"

    @property
    def total_mb(self) -> int:
        return self.total >> 20

    @property
    def free_mb(self) -> int:
        return self.free >> 20


@dataclass(frozen=True, slots=True)
class GpuList:
    """What was found. problem: one sentence when there is no usable GPU, else empty; driver: its version, or empty.

    silent: there is a driver, which hangs, crashes or fails, so that nobody knows what it would list.
    """

    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    driver: str = ""
    silent: bool = False

    @property
    def present(self) -> bool:
        """Is there a GPU, or most likely one, whether it can be used or not?"""
        return bool(self.gpus) or self.silent

    @property
    def usable(self) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus if not gpu.problem)


class Prober:
    """Asks the driver once and remembers the answer. Safe from any thread."""

    def __init__(
        self,
        visible: str | None = None,
        *,
        command: Sequence[str] | None = None,
        timeout: float = TIMEOUT,
        signs: Sequence[Path] = _SIGNS,
    ) -> None:
        """
        Args:
            visible: CUDA_VISIBLE_DEVICES, which the driver's own list ignores; None for all.
            command: what prints a line for each GPU, ``index, name, uuid, capability, total MiB, free MiB, driver``;
                None for nvidia-smi, else NVML.
            timeout: seconds to wait for it.
            signs: files of which one exists where an NVIDIA driver is loaded.
        """
        self._visible = visible
        self._command = command
        self._timeout = timeout
        self._signs = signs
        self._found: GpuList | None = None
        self._at = 0.0
        self.after_fork()
        renew_in_child(self)

    def after_fork(self) -> None:
        """In a forked child: a lock that nobody holds."""
        self._lock = threading.Lock()

    def look(self, max_age: float = float("inf")) -> GpuList:
        """The GPUs, as they were at most ``max_age`` seconds ago. Raises nothing; takes ``timeout`` at the worst.

        A driver that did not answer is not asked again in this process.
        """
        with self._lock:
            found = self._found
            silent = found is not None and not found.gpus
            if found is None or (not silent and time.monotonic() - self._at > max_age):
                found = self._found = self._ask()
                self._at = time.monotonic()
            return found

    def _ask(self) -> GpuList:
        command = self._command or _command(self._signs)
        if command is None:
            return GpuList(problem="there is no NVIDIA driver on this machine")
        answer = ask(command, self._timeout)
        if answer.code != 0:
            silent = answer.code is None or answer.code < 0 or any(sign.exists() for sign in self._signs)
            return GpuList(problem=f"the GPU driver gives no answer: {answer.problem}", silent=silent)
        return _visible_ones(_parsed(answer), self._visible)


def _command(signs: Sequence[Path]) -> Sequence[str] | None:
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        return [tool, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    if any(sign.exists() for sign in signs) and sys.executable:
        return [sys.executable, "-I", "-S", "-c", PROGRAM]
    return None


def _parsed(answer: Answer) -> GpuList:
    gpus, driver = [], ""
    for line in answer.out.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) >= 7 and cells[0].isdigit():
            driver = cells[-1]
            gpu = Gpu(
                int(cells[0]),
                ", ".join(cells[1:-5]),
                _pair(cells[-4]),
                _mebibytes(cells[-3]),
                _mebibytes(cells[-2]),
                cells[-5],
            )
            gpus.append(replace(gpu, problem=_problem(gpu)))
    if not gpus:
        return GpuList(problem="the GPU driver lists no GPU", driver=driver)
    old = _old_driver(driver)
    if old:
        return GpuList(tuple(replace(gpu, problem=old) for gpu in gpus), old, driver)
    return _judged(GpuList(tuple(gpus), "", driver))


def _judged(found: GpuList) -> GpuList:
    return found if found.usable else replace(found, problem=found.gpus[0].problem if found.gpus else found.problem)


def _problem(gpu: Gpu) -> str:
    if gpu.capability != (0, 0) and gpu.capability < _OLDEST_CAPABILITY:
        have, want = (".".join(map(str, pair)) for pair in (gpu.capability, _OLDEST_CAPABILITY))
        return f"{gpu.name} has compute capability {have}; at least {want} is needed"
    return "" if gpu.total else f"{gpu.name} does not tell its memory"


def _old_driver(version: str) -> str:
    numbers = _pair(version)
    if numbers == (0, 0) or numbers >= _OLDEST_DRIVER:
        return ""
    return f"the GPU driver {version} is too old; CUDA 12 needs {_OLDEST_DRIVER[0]}.{_OLDEST_DRIVER[1]} or newer"


def _visible_ones(found: GpuList, visible: str | None) -> GpuList:
    """The list as CUDA shows it to this process: entries of CUDA_VISIBLE_DEVICES in order, up to the first unknown."""
    if visible is None or not found.gpus:
        return found
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        matching = [gpu for gpu in found.gpus if _names(entry, gpu)]
        if len(matching) != 1:
            break
        chosen.append(replace(matching[0], index=len(chosen)))
    if chosen:
        return _judged(GpuList(tuple(chosen), found.problem, found.driver))
    return GpuList(
        problem=f"CUDA_VISIBLE_DEVICES={visible!r} leaves none of {len(found.gpus)} GPUs", driver=found.driver
    )


def _names(entry: str, gpu: Gpu) -> bool:
    if entry.isdigit():
        return int(entry) == gpu.index
    return len(entry) > 4 and entry.startswith("GPU-") and gpu.uuid.startswith(entry)


def _pair(text: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) for anything else."""
    first, _, rest = text.partition(".")
    second = rest.partition(".")[0]
    return (int(first), int(second)) if first.isdigit() and second.isdigit() else (0, 0)


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdigit() else 0
