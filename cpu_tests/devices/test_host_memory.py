"""Host memory out of fake system files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memevolve_gpu.devices.memory import HostMemory, available_memory

MB = 1 << 20
UNLIMITED_1 = "9223372036854771712"


class Machine:
    """A made-up /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.cgroups = root / "cgroup"
        self.write(self.proc / "meminfo", "MemTotal:        1024000 kB\nMemFree: 5 kB\nMemAvailable:  512000 kB\nBad\n")

    def write(self, path: Path, text: str | bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def member_of(self, lines: str) -> None:
        self.write(self.proc / "self" / "cgroup", lines)

    def group_2(self, name: str, limit: object, used: object, inactive: int = 0) -> None:
        self.write(self.cgroups / name / "memory.max", f"{limit}\n")
        self.write(self.cgroups / name / "memory.current", f"{used}\n")
        self.write(self.cgroups / name / "memory.stat", f"anon 1\ninactive_file {inactive}\n")

    def group_1(self, name: str, limit: object, used: object, inactive: int = 0) -> None:
        folder = self.cgroups / "memory" / name
        self.write(folder / "memory.limit_in_bytes", f"{limit}\n")
        self.write(folder / "memory.usage_in_bytes", f"{used}\n")
        self.write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {inactive}\n")

    def ask(self) -> HostMemory:
        return available_memory(self.proc, self.cgroups)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


HOST = HostMemory(1_024_000 * 1024, 512_000 * 1024, "meminfo")


def test_without_control_groups_the_kernel_estimate_counts(machine: Machine) -> None:
    assert machine.ask() == HOST


def test_version_2_group(machine: Machine) -> None:
    machine.member_of("0::/app\n")
    machine.group_2("app", 100 * MB, 60 * MB)
    assert machine.ask() == (100 * MB, 40 * MB, "cgroup2")


def test_version_2_page_cache_that_can_be_dropped_is_free(machine: Machine) -> None:
    machine.member_of("0::/app\n")
    machine.group_2("app", 100 * MB, 60 * MB, inactive=25 * MB)
    assert machine.ask().available == 65 * MB


def test_version_2_soft_limit_counts(machine: Machine) -> None:
    machine.member_of("0::/app\n")
    machine.group_2("app", "max", 60 * MB)
    machine.write(machine.cgroups / "app" / "memory.high", f"{80 * MB}\n")
    assert machine.ask() == (80 * MB, 20 * MB, "cgroup2")


def test_the_tightest_group_around_the_process_counts(machine: Machine) -> None:
    machine.member_of("0::/team/app/worker\n")
    machine.group_2("team/app/worker", "max", 10 * MB)
    machine.group_2("team/app", 90 * MB, 10 * MB)
    machine.group_2("team", 300 * MB, 290 * MB)
    assert machine.ask() == (90 * MB, 10 * MB, "cgroup2")


def test_a_group_with_room_does_not_hide_a_full_host(machine: Machine) -> None:
    machine.member_of("0::/app\n")
    machine.group_2("app", 900 * MB, 1 * MB)
    assert machine.ask() == (900 * MB, HOST.available, "meminfo")


@pytest.mark.parametrize("limit", ["max", 1 << 50])
def test_a_group_without_a_limit_below_the_host_is_no_limit(machine: Machine, limit: object) -> None:
    machine.member_of("0::/app\n")
    machine.group_2("app", limit, 1000 * MB)
    assert machine.ask() == HOST


@pytest.mark.parametrize("path", ["/docker/abc", "/../../other", "/"])
def test_in_a_container_the_mount_itself_answers(machine: Machine, path: str) -> None:
    machine.member_of(f"0::{path}\n")
    machine.group_2("", 100 * MB, 30 * MB)
    assert machine.ask() == (100 * MB, 70 * MB, "cgroup2")


def test_version_1_group(machine: Machine) -> None:
    machine.member_of("12:cpu,cpuacct:/app\n5:memory,hugetlb:/app\n0::/\n")
    machine.group_1("app", 100 * MB, 60 * MB, inactive=5 * MB)
    machine.group_1("", UNLIMITED_1, 500 * MB)
    assert machine.ask() == (100 * MB, 45 * MB, "cgroup1")


def test_version_1_without_a_limit(machine: Machine) -> None:
    machine.member_of("5:memory:/app\n")
    machine.group_1("app", UNLIMITED_1, 60 * MB)
    assert machine.ask() == HOST


def test_a_group_over_its_limit_leaves_nothing(machine: Machine) -> None:
    machine.member_of("0::/app\n")
    machine.group_2("app", 100 * MB, 120 * MB)
    assert machine.ask() == (100 * MB, 0, "cgroup2")


@pytest.mark.parametrize(
    "junk", [b"", b"\n", b"-5\n", b"1e9\n", b"\xff\xfe\x00", b"max max\n", b"9" * 5000, "²".encode(), b"12 34 56\n"]
)
def test_odd_files_are_passed_over(machine: Machine, junk: bytes) -> None:
    machine.member_of("0::/app\n5:memory:/app\n")
    for folder, names in (
        ("app", ["memory.max", "memory.high", "memory.current", "memory.stat"]),
        ("memory/app", ["memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"]),
    ):
        for name in names:
            machine.write(machine.cgroups / folder / name, junk)
    assert machine.ask() == HOST
    machine.member_of(junk.decode("latin-1"))
    assert machine.ask() == HOST


def test_a_folder_in_the_place_of_a_file_is_passed_over(machine: Machine) -> None:
    machine.member_of("0::/app\n")
    (machine.cgroups / "app" / "memory.max").mkdir(parents=True)
    assert machine.ask() == HOST


def test_an_odd_meminfo_falls_back_to_page_counts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.write(machine.proc / "meminfo", "MemTotal: lots kB\n")
    counts = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000, "SC_AVPHYS_PAGES": 300}
    monkeypatch.setattr(os, "sysconf", counts.__getitem__)
    assert machine.ask() == (4096 * 1000, 4096 * 300, "sysconf")
    counts["SC_AVPHYS_PAGES"] = -1
    assert machine.ask() == (4096 * 1000, 4096 * 500, "sysconf")


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert available_memory(tmp_path, tmp_path) == (1 << 30, 1 << 30, "assumed")


def test_this_machine_answers() -> None:
    memory = available_memory()
    assert 0 <= memory.available <= memory.total
    assert memory.limit_source != "assumed"
