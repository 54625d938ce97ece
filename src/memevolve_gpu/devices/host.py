"""How much memory this process may still use on the host.

A container sees the whole machine in ``/proc/meminfo`` but is killed at the limit of its control group, so both are
read and the smaller answer counts. Files that are missing, odd or unreadable are passed over; nothing here raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["HostMemory", "available_memory"]

_Source = Literal["cgroup2", "cgroup1", "meminfo", "sysconf", "assumed"]

_ASSUMED = 1 << 30
"""Bytes taken for granted where the system tells nothing: what the smallest usual machine can spare."""

_LONGEST_FILE = 1 << 16
"""Bytes read of any one file; the real ones are far shorter."""


class HostMemory(NamedTuple):
    """Memory of the host, or of the control group that confines this process, in bytes.

    ``limit_source`` names what set ``available``: a control group (``cgroup2``, ``cgroup1``), the kernel's estimate
    (``meminfo``), the page counts of ``sysconf``, or ``assumed`` where the system told nothing.
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
        limits = [_number(_read(folder / name)) for name in ("memory.max", "memory.high")]
        limit = min((value for value in limits if value is not None), default=None)
        yield from _group(limit, _number(_read(folder / "memory.current")), folder, "inactive_file", "cgroup2")


def _version_1(proc: Path, mount: Path) -> Iterator[HostMemory]:
    for folder in _groups(proc, mount / "memory", controller="memory"):
        limit, used = (_number(_read(folder / f"memory.{name}_in_bytes")) for name in ("limit", "usage"))
        yield from _group(limit, used, folder, "total_inactive_file", "cgroup1")


def _group(limit: int | None, used: int | None, folder: Path, droppable: str, source: _Source) -> Iterator[HostMemory]:
    """Yield what one group leaves free, if it has a limit.

    ``used`` counts the page cache. The part of it that nobody has touched lately is given up before anything is
    killed, so it counts as free (what Kubernetes calls the working set leaves it out in the same way).
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
    """Parse lines of a name and a number; a unit behind them and other lines are passed over."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        number = _number(value.strip().partition(" ")[0])
        if number is not None:
            found[name] = number
    return found


def _number(text: str) -> int | None:
    """Return a whole number from 0, or None for ``max`` and everything else."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_LONGEST_FILE).decode("ascii", "replace")
    except (OSError, ValueError):
        return ""
