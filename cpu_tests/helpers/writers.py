"""Several processes on one store: each writes, searches, and reads what the others say that they wrote.

A process says what was acknowledged in a file of its own, after the call returned: a published unit is never changed
again, a deleted id never used again. A process that reads that line must find the unit, or must not find it.

    python cpu_tests/helpers/writers.py --processes 2 --seconds 60
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from endurance import DIM, Model, contents, embed, verify

from memevolve_gpu import MemEvolveError, StorageConfig, VectorStore
from memevolve_gpu.records.writer import WriteContext

NEAR = 1e-4


def open_store(prefix: str) -> VectorStore:
    config = StorageConfig(index_type="ivf", min_training_units=300, max_memory_units=10**6)
    return VectorStore(prefix, embed, DIM, storage_config=config)


def text_of(unit: dict[str, Any]) -> str:
    return f"{unit['content']} {unit['type']}"


@contextmanager
def timed_entry(waits: list[float]) -> Any:
    """Note how many seconds every write transaction of this process takes to begin."""
    enter = WriteContext.__enter__

    def measured(writing: WriteContext) -> Any:
        started = time.perf_counter()
        transaction = enter(writing)
        waits.append(time.perf_counter() - started)
        return transaction

    WriteContext.__enter__ = measured  # type: ignore[method-assign]
    try:
        yield
    finally:
        WriteContext.__enter__ = enter  # type: ignore[method-assign]


class Others:
    """What the other processes said since the last look."""

    def __init__(self, folder: Path, me: int) -> None:
        self._folder = folder
        self._me = f"said{me}"
        self._read: dict[Path, int] = {}

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """The newest complete lines of each: (published or gone, unit)."""
        lines: list[bytes] = []
        for path in sorted(self._folder.glob("said*")):
            if path.name != self._me:
                with path.open("rb") as file:
                    file.seek(self._read.get(path, 0))
                    fresh = file.read()
                whole = fresh[: fresh.rfind(b"\n") + 1]
                self._read[path] = self._read.get(path, 0) + len(whole)
                lines += whole.splitlines()[-3:]
        return [(word, unit) for word, unit in map(json.loads, lines)]


class Writer:
    """One process at work; ``live`` holds its units as they must be, ``given`` every id that it was given."""

    def __init__(self, prefix: str, folder: Path, me: int, seed: int) -> None:
        self.me = me
        self.rng = random.Random(f"{seed}:{me}")
        self.store = open_store(prefix)
        self.others = Others(folder, me)
        self.said = os.open(folder / f"said{me}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.live: Model = {}
        self.movable: list[str] = []
        self.given: list[str] = []
        self.done: Counter[str] = Counter()
        self.missed: list[str] = []
        self.errors: list[str] = []
        self.made = 0

    def work(self, seconds: float) -> None:
        kinds: list[Callable[[], None]] = [
            self.put,
            self.batch,
            self.update,
            self.delete,
            self.search,
            self.read_others,
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            kind = self.rng.choices(kinds, [40, 5, 15, 15, 15, 10])[0]
            try:
                kind()
                self.done[kind.__name__] += 1
            except MemEvolveError as error:
                self.errors.append(f"{kind.__name__}: {error!r}")

    def fresh(self) -> dict[str, Any]:
        self.made += 1
        unit = {"content": f"w{self.rng.randrange(12)} fact {self.made} of {self.me}", "type": "skill"}
        return unit if self.rng.random() < 0.5 else {"id": f"p{self.me}-{self.made}", **unit}

    def say(self, word: str, unit: dict[str, Any]) -> None:
        os.write(self.said, json.dumps([word, unit]).encode() + b"\n")

    def keep(self, unit_id: str, unit: dict[str, Any]) -> None:
        """A call returned: note it, and publish one in four."""
        kept = self.live[unit_id] = {**unit, "id": unit_id}
        self.given.append(unit_id)
        if self.rng.random() < 0.25:
            self.say("published", kept)
        else:
            self.movable.append(unit_id)

    def put(self) -> None:
        unit = self.fresh()
        self.keep(self.store.store(unit), unit)

    def batch(self) -> None:
        units = [self.fresh() for _ in range(self.rng.randrange(2, 12))]
        for unit_id, unit in zip(self.store.store_batch(units), units, strict=True):
            self.keep(unit_id, unit)

    def update(self) -> None:
        if self.movable:
            unit_id = self.rng.choice(self.movable)
            changed = {**self.live[unit_id], "note": self.made}
            if self.rng.random() < 0.5:
                changed["content"] = self.fresh()["content"]
            if not self.store.update(unit_id, changed):
                self.missed.append(f"{unit_id} could not be updated")
            self.live[unit_id] = changed

    def delete(self) -> None:
        if self.movable:
            at = self.rng.randrange(len(self.movable))
            self.movable[at], self.movable[-1] = self.movable[-1], self.movable[at]
            unit_id = self.movable.pop()
            if not self.store.delete(unit_id):
                self.missed.append(f"{unit_id} could not be deleted")
            self.say("gone", self.live.pop(unit_id))

    def search(self) -> None:
        if self.live:
            self.expect(self.rng.choice(list(self.live.values())), there=True)

    def read_others(self) -> None:
        for word, unit in self.others.news():
            self.expect(unit, there=word == "published")
            self.done["units of others read"] += 1

    def expect(self, unit: dict[str, Any], there: bool) -> None:
        held = self.store.retrieve(unit["id"])
        held = held and {key: value for key, value in held.items() if key != "metadata"}
        found = [unit_id for distance, unit_id in self.store.search(text_of(unit), 3) if distance <= NEAR]
        if held != (unit if there else None) or (unit["id"] in found) != there:
            self.missed.append(f"{unit} should{'' if there else ' not'} be there: held {held}, found {found}")

    def report(self, waits: list[float]) -> dict[str, Any]:
        names = ("live", "given", "done", "missed", "errors")
        return {name: getattr(self, name) for name in names} | {"waits": waits}


def child(prefix: str, folder: Path, me: int, seconds: float, seed: int) -> None:
    """Work until the time is up and leave a report."""
    waits: list[float] = []
    writer = Writer(prefix, folder, me, seed)
    (folder / f"ready{me}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
    with timed_entry(waits):
        writer.work(seconds)
    writer.store.close()
    (folder / f"done{me}").write_text(json.dumps(writer.report(waits)))


def run(processes: int, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """Let them work, then hold the store against what they were told. Returns the figures."""
    prefix = str(folder / "store")
    command = [sys.executable, __file__, "--seconds", str(seconds), "--seed", str(seed), "--child", prefix, str(folder)]
    children = [subprocess.Popen([*command, str(me)], stderr=subprocess.PIPE, text=True) for me in range(processes)]
    while len(list(folder.glob("ready*"))) < processes and all(one.poll() is None for one in children):
        time.sleep(0.005)
    (folder / "go").touch()
    complaints = [one.communicate(timeout=seconds + 120)[1] for one in children]
    if any(one.returncode for one in children):
        raise RuntimeError("a process ended by itself:\n" + "\n".join(complaints))
    reports = [json.loads((folder / f"done{me}").read_text()) for me in range(processes)]
    with open_store(prefix) as store:
        return judged(store, reports) | {"processes": processes, "seconds": seconds, "seed": seed}


def judged(store: VectorStore, reports: list[dict[str, Any]]) -> dict[str, Any]:
    expected: Model = {unit_id: unit for report in reports for unit_id, unit in report["live"].items()}
    given = Counter(unit_id for report in reports for unit_id in report["given"])
    held = contents(store)
    if held == expected:
        verify(store, [expected])
    done: Counter[str] = sum((Counter(report["done"]) for report in reports), Counter())
    return {
        "operations": sum(count for kind, count in done.items() if not kind.startswith("units")),
        "done": dict(done),
        "units": len(held),
        "lost": sum(held.get(unit_id) != unit for unit_id, unit in expected.items()),
        "doubled": sum(count > 1 for count in given.values()) + len(held.keys() - expected.keys()),
        "missed": [line for report in reports for line in report["missed"]],
        "lock_errors": [line for report in reports for line in report["errors"]],
        "write_waiting_ms": percentiles([wait for report in reports for wait in report["waits"]]),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.percentile(np.array(seconds) * 1000, [50, 99, 100])
    return {name: round(float(value), 3) for name, value in zip(("p50", "p99", "max"), values, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        prefix, folder, me = arguments.child
        child(prefix, Path(folder), int(me), arguments.seconds, arguments.seed)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(arguments.processes, arguments.seconds, arguments.seed, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
