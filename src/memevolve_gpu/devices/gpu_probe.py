"""Detect the GPUs of this machine in a child process, without loading CUDA here.

Nothing in this module loads CUDA: not into a process that uses the CPU, and not into one that will fork. The
driver is queried in a child with a time limit, by nvidia-ml-py (module ``pynvml``, in the extras ``gpu`` and ``torch``)
or, where that is not installed, by ``nvidia-smi``. A driver that hangs or crashes costs that child. Both print one line
of FIELDS for each GPU.

CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are NVIDIA's (CUDA C++ Programming Guide, "CUDA Environment Variables"); the
driver's own lists, which are in the order of the PCI bus, obey neither.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..utils.forking import lock
from .subprocess_query import Answer, run_subprocess

_NVML_QUERY = """
import sys
sys.path.append(sys.argv[1])
import pynvml as nvml
sys.stdout.reconfigure(errors="replace")

def ask(function, *arguments):
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None

nvml.nvmlInit()
driver = nvml.nvmlSystemGetDriverVersion()
for number in range(nvml.nvmlDeviceGetCount()):
    gpu = ask(nvml.nvmlDeviceGetHandleByIndex, number)
    if gpu is None:
        continue  # lost, or not for this container
    memory = ask(nvml.nvmlDeviceGetMemoryInfo, gpu)
    sizes = ("[N/A]", "[N/A]") if memory is None else (memory.total >> 20, memory.free >> 20)
    capability = ".".join(map(str, ask(nvml.nvmlDeviceGetCudaComputeCapability, gpu) or ()))
    mig = "Enabled" if (ask(nvml.nvmlDeviceGetMigMode, gpu) or [0])[0] else "Disabled"
    name, uuid = nvml.nvmlDeviceGetName(gpu), nvml.nvmlDeviceGetUUID(gpu)
    print(number, name, uuid, capability, *sizes, mig, driver, sep=", ")
"""

BY_BUS = "PCI_BUS_ID"
"""CUDA_DEVICE_ORDER under which CUDA numbers GPUs as the driver lists them; by default the fastest comes first."""

_NUMBER = re.compile(r"\s*\+?([0-9]{1,9})")


def is_by_number(visible: str | None) -> bool:
    """Whether the variable names GPUs by number, which depends on the order in which CUDA counts."""
    return visible is None or not visible.strip().startswith("GPU-")


def names_slices(visible: str | None) -> bool:
    """Whether the variable names MIG slices."""
    return visible is not None and visible.strip().startswith("MIG-")


def chosen(visible: str | None, uuids: list[str]) -> list[int]:
    """Places in ``uuids`` of the GPUs that CUDA shows, in its order.

    Entries count up to the first that names no GPU: a number out of range or below 0, a text, a start of an UUID that
    fits none or several. The same entry twice leaves nothing. ``1gpu`` is 1, as C's strtoul reads it.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None shows all.
        uuids: of all GPUs, in the order of their numbers.
    """
    if visible is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in visible.split(","):
        place = _numbered(entry, len(uuids)) if is_by_number(visible) else _named(entry.strip(), uuids)
        if place in found:
            return []
        if place is None:
            break
        found.append(place)
    return found


def _numbered(entry: str, count: int) -> int | None:
    number = _NUMBER.match(entry)
    return int(number[1]) if number is not None and int(number[1]) < count else None


def _named(entry: str, uuids: list[str]) -> int | None:
    matching = [place for place, uuid in enumerate(uuids) if uuid.startswith(entry)]
    return matching[0] if len(entry) > len("GPU-") and len(matching) == 1 else None


_SIGNS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Without the first there is no NVIDIA driver on Linux; the second is its counterpart inside WSL, for all makers."""

_WSL_TOOL = "/usr/lib/wsl/lib/nvidia-smi"
"""Where WSL puts the tool; not on every PATH."""

FIELDS = ["index", "name", "uuid", "compute_cap", "memory.total", "memory.free", "mig.mode.current", "driver_version"]
"""Printed for each GPU; sizes in MiB. Every driver that is new enough knows them."""
_UNKNOWN_FIELD = "not a valid field"
_NO_DEVICES = "No devices were found"

TIMEOUT = 15.0
"""Seconds; without persistence mode a driver initialises every card for each query, seconds on large hosts."""

_REST = 60.0
"""Seconds before a driver that has stopped answering is queried again."""

_OLDEST_DRIVER = (525, 60)
"""The first branch for CUDA 12 (NVIDIA, "CUDA Compatibility", table of minimum drivers); CUDA 13 wants 580."""
_NEEDED_DRIVER = "CUDA 12 needs {}.{} or newer".format(*_OLDEST_DRIVER)
_OLDEST_CAPABILITY = (7, 0)
"""Volta, the first with half-precision matrix units; the libraries for CUDA 13 begin at 7.5 and say so themselves."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. index: N of ``cuda:N`` in this process; capability: compute capability, (0, 0) when unknown; total and
    free: bytes; problem: why it cannot be used, else empty."""

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

    unlisted: there is a GPU, or most likely one, that is not in the list: its driver hangs, crashes or fails, or only
    slices of it are shown. doubt: why the numbers may not be those of CUDA, else empty.
    """

    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    driver: str = ""
    unlisted: bool = False
    doubt: str = ""

    @property
    def detected(self) -> bool:
        """Whether there is a GPU, or most likely one, usable or not."""
        return bool(self.gpus) or self.unlisted

    @property
    def usable(self) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus if not gpu.problem)


class Prober:
    """Queries the driver once and remembers the answer. Any thread may call."""

    def __init__(
        self,
        visible: str | None = None,
        order: str | None = None,
        *,
        command: Sequence[str] | None = None,
        timeout: float = TIMEOUT,
        signs: Sequence[Path] = _SIGNS,
    ) -> None:
        """Say where to look; nothing is read yet.

        Args:
            visible: CUDA_VISIBLE_DEVICES, which the driver's own list ignores; None for all.
            order: CUDA_DEVICE_ORDER, which it ignores as well.
            command: prints a line for each GPU with the values of FIELDS; None for nvidia-ml-py, else nvidia-smi.
            timeout: seconds to wait for it.
            signs: files of which one exists where an NVIDIA driver is loaded.
        """
        self._visible = visible
        self._order = order
        self._command = command
        self._timeout = timeout
        self._signs = signs
        self._found: GpuList | None = None
        self._at = 0.0
        self._lock = lock()

    def look(self, max_age: float = float("inf")) -> GpuList:
        """The GPUs, as they were at most ``max_age`` seconds ago. Raises nothing; takes ``timeout`` at the worst.

        A driver that did not answer the first time is not queried again in this process. One that answered before and
        does not now counts as full, and is queried again after a minute.
        """
        with self._lock:
            found = self._found
            silent = found is not None and not found.gpus
            if found is None or (not silent and time.monotonic() - self._at > max_age):
                found = self._found = self._query_again(found)
            return found

    def _query_again(self, before: GpuList | None) -> GpuList:
        found = self._ask()
        self._at = time.monotonic()
        if before is None or found.gpus:
            return found
        self._at += _REST
        return replace(before, gpus=tuple(replace(gpu, free=0) for gpu in before.gpus))

    def _ask(self) -> GpuList:
        command = self._command or _command(self._signs)
        if command is None:
            if not any(sign.exists() for sign in self._signs):
                return GpuList(problem="there is no NVIDIA driver on this machine")
            return GpuList(problem="nothing here can query the GPU driver; install nvidia-ml-py", unlisted=True)
        answer = run_subprocess(command, self._timeout)
        gpus = tuple(_parsed(answer.out))
        if gpus:  # whatever the status: one lost card fails the whole query
            return self._shown(_judged(gpus))
        if answer.code == 0 or _NO_DEVICES in answer.problem:
            return GpuList(problem="the GPU driver lists no GPU")
        if _UNKNOWN_FIELD in answer.out + answer.problem:
            return GpuList(problem=f"the GPU driver is too old; {_NEEDED_DRIVER}", unlisted=True)
        return GpuList(problem=f"the GPU driver gives no answer: {answer.problem}", unlisted=self._is_there(answer))

    def _is_there(self, answer: Answer) -> bool:
        """Whether a driver that fails suggests a GPU: its tool, and WSL's sign, may be there without one."""
        started = answer.code is not None or answer.late
        crashed = answer.late or (answer.code is not None and answer.code < 0)
        return started and (crashed or any(sign.exists() and sign.name != "dxg" for sign in self._signs))

    def _shown(self, found: GpuList) -> GpuList:
        """The list as CUDA shows it to this process."""
        if names_slices(self._visible):
            problem = (
                f"CUDA_VISIBLE_DEVICES={self._visible!r} names MIG slices, which are not supported; name whole GPUs"
            )
            return GpuList(problem=problem, driver=found.driver, unlisted=True)
        places = chosen(self._visible, [gpu.uuid for gpu in found.gpus])
        if not places:
            problem = f"CUDA_VISIBLE_DEVICES={self._visible!r} leaves none of {len(found.gpus)} GPUs"
            return GpuList(problem=problem, driver=found.driver)
        doubt = ""
        if (
            self._order != BY_BUS
            and is_by_number(self._visible)
            and len({(gpu.name, gpu.total) for gpu in found.gpus}) > 1
        ):
            doubt = f"CUDA may count these GPUs in another order; set CUDA_DEVICE_ORDER={BY_BUS}"
        gpus = tuple(replace(found.gpus[place], index=number) for number, place in enumerate(places))
        return replace(found, gpus=gpus, problem=_common_problem(gpus), doubt=doubt)


def _command(signs: Sequence[Path]) -> Sequence[str] | None:
    library = importlib.util.find_spec("pynvml")
    driver = any(sign.exists() for sign in signs)
    if driver and library is not None and library.origin and sys.executable and not getattr(sys, "frozen", False):
        place = Path(library.origin).parent
        folder = place.parent if library.submodule_search_locations else place
        return [sys.executable, "-I", "-S", "-c", _NVML_QUERY, str(folder)]
    tool = shutil.which("nvidia-smi") or shutil.which(_WSL_TOOL)
    return tool and [tool, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]


def _parsed(text: str) -> Iterator[tuple[Gpu, str]]:
    """Each GPU, and the version of its driver. A value that is not given, such as ``[N/A]``, is 0 or empty."""
    rest = len(FIELDS) - 2
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) < len(FIELDS) or natural(cells[0]) is None:
            continue
        uuid, capability, total, free, mig, driver = cells[-rest:]
        gpu = Gpu(
            int(cells[0]),
            ", ".join(cells[1:-rest]),  # a name may hold commas
            _pair(capability),
            (natural(total) or 0) << 20,
            (natural(free) or 0) << 20,
            uuid,
        )
        yield replace(gpu, problem=_problem(gpu, natural(free) is not None, mig)), driver


def _judged(parsed: Sequence[tuple[Gpu, str]]) -> GpuList:
    gpus, driver = tuple(gpu for gpu, _ in parsed), parsed[-1][1]
    if (0, 0) != _pair(driver) < _OLDEST_DRIVER:
        old = f"the GPU driver {driver} is too old; {_NEEDED_DRIVER}"
        gpus = tuple(replace(gpu, problem=old) for gpu in gpus)
    return GpuList(gpus, _common_problem(gpus), driver)


def _common_problem(gpus: Sequence[Gpu]) -> str:
    """Why none of them can be used; empty when one can."""
    return gpus[0].problem if all(gpu.problem for gpu in gpus) else ""


def _problem(gpu: Gpu, memory_known: bool, slices: str) -> str:
    if gpu.capability != (0, 0) and gpu.capability < _OLDEST_CAPABILITY:
        have, want = (".".join(map(str, pair)) for pair in (gpu.capability, _OLDEST_CAPABILITY))
        return f"{gpu.name} has compute capability {have}; at least {want} is needed"
    if slices == "Enabled":
        return f"{gpu.name} is cut into MIG slices, which are not supported; use a whole GPU"
    return "" if gpu.total and memory_known else f"{gpu.name} does not tell its memory"


def _pair(text: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) for anything else."""
    first, _, rest = text.partition(".")
    major, minor = natural(first), natural(rest.partition(".")[0])
    return (0, 0) if major is None or minor is None else (major, minor)


def natural(text: str) -> int | None:
    """A whole number from 0; None for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
