"""Results as JSON lines with their machine, and the page and pictures made from them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import machine
from rich.console import Console

from .data import NOISE, SEED, Work, as_json
from .registry import peer, versions
from .remote import THREADS
from .session import TARGETS, K, Plan

__all__ = ["Results", "heading", "newest", "removed", "shown"]

SYNCS = 50
ABOUT = ("machine", "time", "end")
"""Records that are of a run and not of a peer."""


class Results:
    """Appends records to a file, each with the number of the run."""

    def __init__(self, path: Path, run: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.run = run
        self.file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps({"run": self.run, **as_json(record)}) + "\n")
        self.file.flush()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def heading(
    command: str, work: Work, arguments: argparse.Namespace, plan: Plan, names: list[str], core: int, folder: Path
) -> dict[str, Any]:
    """The record that begins a run: everything that is needed to make it again."""
    return {
        "section": "machine",
        "command": command,
        "machine": {**machine(), **hardware(folder)},
        "data": work.name,
        "size": arguments.size,
        "dimension": int(work.vectors.shape[1]),
        "queries": {"calibrated on": len(work.calibration), "judged by": len(work.judged), "k": K, "targets": TARGETS},
        "seed": SEED,
        "noise": NOISE,
        "plan": asdict(plan),
        "threads": {"affinity": f"workers on core {core} alone, one running at a time", **THREADS},
        "peers": {name: {**asdict(peer(name).facts), "versions": versions(name)} for name in names},
    }


def hardware(folder: Path) -> dict[str, Any]:
    names = [line.split(":", 1)[1].strip() for line in read("/proc/cpuinfo").splitlines() if "model name" in line]
    memory = [line.split()[1] for line in read("/proc/meminfo").splitlines() if line.startswith("MemTotal")]
    return {
        "model": names[0] if names else platform.processor(),
        "memory_gb": round(int(memory[0]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "sync_ms": sync_ms(folder),
        "load": round(os.getloadavg()[0], 1),
    }


def read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def sync_ms(folder: Path) -> float:
    """Median milliseconds of appending 4 KB and fdatasync, where the stores are made: no durable write is quicker."""
    taken = []
    with (folder / "sync").open("wb", buffering=0) as file:
        for _ in range(SYNCS):
            started = time.perf_counter()
            file.write(b"x" * 4096)
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - started)
    return sorted(taken)[SYNCS // 2] * 1e3


def newest(path: Path) -> list[dict[str, Any]]:
    """The records that the page shows: for each section and data set those of the newest run that has it.

    What is compared with one another is thus always of one run.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    latest: dict[tuple[str, str], str] = {}
    for record in records:
        if record["section"] not in ABOUT:
            latest[record["section"], record.get("set", "")] = record["run"]
    runs = set(latest.values())
    return [
        record
        for record in records
        if latest.get((record["section"], record.get("set", ""))) == record["run"]
        or (record["section"] in ABOUT and record["run"] in runs)
    ]


def removed(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def shown(path: Path, console: Console) -> None:
    """Make the page and the pictures beside the results, and print the table."""
    from . import report
    from .table import printed

    records = newest(path)
    console.print(printed(records))
    for made in report.write(records, path.with_suffix(".html")):
        console.print(f"written: {made.name}")
