"""Bytes that the stores of this process may take, on a device and on the host.

``limit = fraction * (free + ours)``, where *ours* is what indexes of this process hold, what allocators keep in
reserve, and the CUDA context. What other processes hold, and what the same process holds for other ends, is in neither,
so several workers on one card each plan with what the others have left.

A container sees the whole machine in ``/proc/meminfo`` but is killed at the limit of its control group, so both are
read and the smaller answer counts. Missing, odd or unreadable files are ignored; nothing here raises.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, Protocol

from ..types import JsonObject
from ..utils.forking import lock, renew_in_child
from .gpu_probe import Gpu, natural

_Source = Literal["cgroup2", "cgroup1", "meminfo", "sysconf", "assumed"]

_ASSUMED = 1 << 30
"""Bytes assumed where the system reports nothing: what the smallest usual machine can spare."""

_LONGEST_FILE = 1 << 16
"""Bytes read of any one file; the real ones are far shorter."""


def trim_heap() -> None:
    """Give the system back what the C library keeps of freed memory, where it can (glibc).

    Bulk writes and builds free blocks of all sizes, of which glibc keeps what lies between blocks in use: without this
    a store of a million units kept 303 MB that cannot be dropped instead of 180 (``benchmarks/million.py``).
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class HostMemory(NamedTuple):
    """Memory of the host, or of the control group that confines this process, in bytes.

    ``limit_source`` names what set ``available``: a control group (``cgroup2``, ``cgroup1``), the kernel's estimate
    (``meminfo``), the page counts of ``sysconf``, or ``assumed`` where the system reports nothing.
    """

    total: int
    available: int
    limit_source: _Source


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Return the tightest answer of the system and of every control group around this process.

    Args:
        proc: where procfs is mounted.
        cgroups: where the control groups are mounted, version 2, or version 1 with a folder ``memory``.
    """
    host = _meminfo(proc) or _sysconf()
    groups = [*_version_2(proc, cgroups), *_version_1(proc, cgroups)]
    confining = [group for group in groups if group.total < host.total]
    tightest = min([host, *confining], key=lambda memory: memory.available)
    total = min(memory.total for memory in [host, *confining])
    return HostMemory(total, max(0, min(tightest.available, total)), tightest.limit_source)


def _meminfo(proc: Path) -> HostMemory | None:
    fields = _fields(_read(proc / "meminfo"))
    total, available = fields.get("MemTotal:"), fields.get("MemAvailable:")
    if not total or available is None:
        return None
    return HostMemory(total * 1024, available * 1024, "meminfo")


def _sysconf() -> HostMemory:
    """Page counts where there is no procfs; half of the memory where the free pages are not counted (macOS)."""
    page, pages = _sysconf_value("SC_PAGE_SIZE"), _sysconf_value("SC_PHYS_PAGES")
    if page is None or pages is None:
        return HostMemory(_ASSUMED, _ASSUMED, "assumed")
    free = _sysconf_value("SC_AVPHYS_PAGES")
    return HostMemory(page * pages, page * (pages // 2 if free is None else free), "sysconf")


def _sysconf_value(name: str) -> int | None:
    try:
        value = os.sysconf(name)
    except (AttributeError, OSError, ValueError):
        return None
    return value if value > 0 else None


def _version_2(proc: Path, mount: Path) -> Iterator[HostMemory]:
    for folder in _groups(proc, mount, controller=""):
        limits = [natural(_read(folder / name)) for name in ("memory.max", "memory.high")]
        limit = min((value for value in limits if value is not None), default=None)
        yield from _group(limit, natural(_read(folder / "memory.current")), folder, "inactive_file", "cgroup2")


def _version_1(proc: Path, mount: Path) -> Iterator[HostMemory]:
    for folder in _groups(proc, mount / "memory", controller="memory"):
        limit, used = (natural(_read(folder / f"memory.{name}_in_bytes")) for name in ("limit", "usage"))
        yield from _group(limit, used, folder, "total_inactive_file", "cgroup1")


def _group(limit: int | None, used: int | None, folder: Path, droppable: str, source: _Source) -> Iterator[HostMemory]:
    """Yield what one group leaves free, if it has a limit.

    ``used`` counts the page cache. The part of it that was not used lately is dropped before a process
    is killed, so it counts as free (Kubernetes' working set leaves it out in the same way).
    """
    if limit is not None and used is not None:
        cache = _fields(_read(folder / "memory.stat")).get(droppable, 0)
        yield HostMemory(limit, max(0, limit - max(0, used - cache)), source)


def _groups(proc: Path, mount: Path, controller: str) -> Iterator[Path]:
    """Yield the folder of this process's group and of each group around it, up to the mount.

    Inside a container the path may be the host's and not exist below the mount; then only the mount itself answers.
    """
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # the group lies outside this namespace
            parts = []
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth])
        return


def _fields(text: str) -> dict[str, int]:
    """Parse lines of a name and a number; units and other lines are ignored."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        number = natural(value.strip().partition(" ")[0])
        if number is not None:
            found[name] = number
    return found


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_LONGEST_FILE).decode("ascii", "replace").strip()
    except (OSError, ValueError):
        return ""


CONTEXT_BYTES = 640 << 20
"""Device memory of one process's CUDA context with the kernels of its libraries, until the first build has measured it.
Assumed: 500 to 650 MB are expected of torch on data centre cards."""

HOST_SHARE = 0.8
"""Share of the available host memory that MAX_MEMORY_MB=auto allows: some is left for other processes."""

Load = Callable[[str], ModuleType | None]
"""Gives a module by name, or None where it cannot be had."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The memory of a device, in bytes, as ``source`` reports it.

    total, free: of the device. used: by indexes of this process. cached: in reserve in allocators of this process;
    foreign: the part of it that no engine can have, since it allocates elsewhere (cupy's pool). context: held by this
    process's CUDA context; coming: what it will hold once CUDA is in use.
    """

    device: str
    total: int
    free: int
    used: int
    cached: int
    context: int
    coming: int
    fraction: float
    source: str
    foreign: int = 0

    @property
    def reserved(self) -> int:
        """Held for us beyond ``used``."""
        return self.cached + self.context

    @property
    def limit(self) -> int:
        """The most that the stores of this process may hold together, context included."""
        return int(self.fraction * (self.free + self.used + self.reserved))

    @property
    def room(self) -> int:
        """What may be added to ``used`` now; since fraction is at most 1, never more than is free or in our reserve."""
        return max(0, self.limit - self.used - self.context - self.foreign - self.coming)

    def as_dict(self) -> JsonObject:
        """Plain values, with what follows from them."""
        return {**asdict(self), "reserved": self.reserved, "limit": self.limit, "room": self.room}


class Holder(Protocol):
    """An object that holds memory on a device."""

    @property
    def device_bytes(self) -> int:
        """Bytes of it."""


class Holdings:
    """What all stores of this process hold on devices, by weak references."""

    def __init__(self) -> None:
        self._holders: weakref.WeakKeyDictionary[Holder, str] = weakref.WeakKeyDictionary()
        self._kept: dict[tuple[str, str], int] = {}
        self.contexts: dict[str, int] = {}
        """Measured bytes of this process's CUDA context, by device."""
        self.active = False
        """Whether this process uses CUDA. From then on its context exists, and reading free memory is cheap."""
        self.forked = False
        """Whether this process was forked from one that does; CUDA cannot be used in it."""
        self._lock = lock()
        renew_in_child(self)

    def add(self, holder: Holder, device: str) -> None:
        """Count the bytes that ``holder`` reports on ``device`` while it lives, whether it searches there or rests."""
        with self._lock:
            self._holders[holder] = device

    def keep(self, device: str, engine: str, amount: int) -> None:
        """``engine`` keeps ``amount`` bytes on ``device`` for all its indexes, until the process ends."""
        self._kept[device, engine] = amount

    def kept(self, device: str, engine: str | None = None) -> int:
        """Bytes that ``engine`` keeps on ``device``: the part of its next plan that is there already; None: of all."""
        return sum(size for (at, name), size in list(self._kept.items()) if at == device and engine in (name, None))

    def on(self, device: str) -> int:
        """Bytes of indexes on ``device``."""
        with self._lock:
            holders = [holder for holder, place in self._holders.items() if place == device]
        return sum(int(holder.device_bytes) for holder in holders)

    def begin(self) -> None:
        """CUDA is about to be used in this process."""
        self.active = True

    def after_fork(self) -> None:
        """In a forked child nothing on a device is ours."""
        self.forked |= self.active
        self.active = False
        self._holders = weakref.WeakKeyDictionary()
        self._kept, self.contexts = {}, {}


HOLDINGS = Holdings()
"""The holdings of this process."""


def host_budget(memory: HostMemory | None = None) -> MemoryBudget:
    """The host's memory as this process may use it; see :mod:`.memory`."""
    found = memory or available_memory()
    return MemoryBudget("cpu", found.total, found.available, 0, 0, 0, 0, HOST_SHARE, found.limit_source)


@cache
def loaded_module(name: str) -> ModuleType | None:
    """The module, imported if need be; None when it is missing or cannot be imported, which is remembered."""
    try:
        return sys.modules.get(name) or importlib.import_module(name)
    except _IMPORTS_FAIL:
        return None


_IMPORTS_FAIL = (
    *(ImportError, OSError, RuntimeError, AttributeError, NameError, SyntaxError, SystemError),
    *(TypeError, ValueError, LookupError),  # built for another numpy, which shows in its first array
    Warning,  # where filters make it an error
)


def device_budget(
    gpu: Gpu,
    fraction: float,
    *,
    holdings: Holdings = HOLDINGS,
    load: Load = loaded_module,
    driver: Callable[[], Gpu] | None = None,
) -> MemoryBudget:
    """The memory of ``gpu`` as this process may use it.

    Once CUDA is in use here, free and total come from cupy's ``memGetInfo``, else from torch, and what their pools keep
    in reserve counts as ours. Before that, or where neither is loaded, they come from the driver: a call to CUDA would
    begin to use it.

    Args:
        gpu: the device, with its memory as first read.
        fraction: GPU_MEMORY_FRACTION.
        holdings: what stores hold already.
        load: gives cupy and torch, or None.
        driver: queries the driver for ``gpu`` again; None takes ``gpu`` as it is.
    """
    used = holdings.on(gpu.device) + holdings.kept(gpu.device)
    held = holdings.contexts.get(gpu.device, CONTEXT_BYTES)
    if holdings.active:
        cupy, torch = _cupy(load, gpu.index), _torch(load, gpu.index)
        pool = cupy or torch
        if pool is not None:
            foreign = 0 if cupy is None else cupy.cached
            cached = foreign + (0 if torch is None else torch.cached)
            sizes = (pool.total, pool.free, used, cached, held, 0)
            return MemoryBudget(gpu.device, *sizes, fraction, pool.source, foreign)
    found = gpu if driver is None else driver()
    context, coming = (held, 0) if holdings.active else (0, held)
    return MemoryBudget(gpu.device, found.total, found.free, used, 0, context, coming, fraction, "driver")


def free_bytes(index: int, load: Load = loaded_module) -> int | None:
    """Bytes free on ``cuda:index`` in a process that uses CUDA; None where no library can be asked. Microseconds."""
    pool = _cupy(load, index) or _torch(load, index)
    return None if pool is None else pool.free


class _Pool(NamedTuple):
    """What one library reports of a device."""

    source: str
    free: int
    total: int
    cached: int


def _cupy(load: Load, index: int) -> _Pool | None:
    cupy = load("cupy")
    if cupy is None:
        return None
    try:
        if cupy.cuda.runtime.getDevice() == index:
            return _cupy_here(cupy)
    except _CUPY_FAILS:
        return None
    return _cupy_there(cupy, index)


_CUPY_FAILS = (RuntimeError, AttributeError, ValueError, OSError)
"""CUDARuntimeError is a RuntimeError."""


def _cupy_here(cupy: ModuleType) -> _Pool:
    """Of the current device, which cupy's pool answers for."""
    free, total = cupy.cuda.runtime.memGetInfo()
    pool = cupy.get_default_memory_pool()
    return _Pool("cupy", int(free), int(total), max(0, int(pool.total_bytes()) - int(pool.used_bytes())))


def _cupy_there(cupy: ModuleType, index: int) -> _Pool | None:
    """Of another device, from a thread of its own.

    Since CUDA 12, setting a device makes a context there: to set it here and then back would cost some hundred MB of
    the device that was current, which this process may not use at all.
    """
    found: list[_Pool] = []

    def ask() -> None:
        with suppress(*_CUPY_FAILS):
            cupy.cuda.runtime.setDevice(index)
            found.append(_cupy_here(cupy))

    try:
        thread = threading.Thread(target=ask, name="device-memory", daemon=True)
        thread.start()
    except RuntimeError:  # none can be started any more
        return None
    thread.join()
    return found[0] if found else None


def _torch(load: Load, index: int) -> _Pool | None:
    torch = load("torch")
    if torch is None:
        return None
    try:
        free, total = torch.cuda.mem_get_info(index)
        cached = int(torch.cuda.memory_reserved(index)) - int(torch.cuda.memory_allocated(index))
        return _Pool("torch", int(free), int(total), max(0, cached))
    except _torch_failures(torch):
        return None


def _torch_failures(torch: ModuleType) -> tuple[type[BaseException], ...]:
    """What torch raises: without CUDA it asserts, and calls put off until CUDA is there have an error of their own."""
    late = getattr(getattr(torch, "cuda", None), "DeferredCudaCallError", None)
    usual = (RuntimeError, AttributeError, AssertionError, ValueError, OSError)
    return (*usual, late) if isinstance(late, type) and issubclass(late, Exception) else usual
