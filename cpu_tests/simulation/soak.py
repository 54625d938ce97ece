"""Hours of eight processes on one store, as agents use it; nothing may be lost, and nothing may grow.

    python cpu_tests/simulation/soak.py --hours 2

Eight roles write, search, maintain, back up, are stopped by SIGSTOP and killed by SIGKILL. Every call that writes is in
a ledger before and after it. Every few minutes all pause between two calls, and the store must hold exactly what the
ledgers say: no unit lost, none back after its deletion, no vector of another unit. The result is rewritten every
minute, so that a run that is stopped keeps its figures. ``benchmarks/soak_plot.py`` draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

import apsw
import faiss
import numpy as np

from memevolve_gpu import MemEvolveError, StorageConfig, VectorStore, __version__
from memevolve_gpu.components.manage.simple_strategy import SimpleManagementStrategy
from memevolve_gpu.errors import LockTimeoutError
from memevolve_gpu.records.writer import WriteContext

ROOT = Path(__file__).resolve().parents[2]
DIM = 384
MOST, KEPT = 2000, 1500
"""Above ``MOST`` units the role "maintainer" forgets the least recently read, down to ``KEPT``."""

RATES: dict[str, dict[str, float]] = {
    "hook": {"put": 4.0, "search": 4.0},
    "server": {"search": 6.0, "put": 2.0, "update": 1.0, "drop": 0.4, "health": 0.1},
    "reader": {"search": 6.0, "read": 3.0, "keywords": 2.0},
    "maintainer": {"prune": 0.1, "maintain": 0.04, "statistics": 0.03},
    "backup": {"put": 2.0, "backup": 0.01},
    "stopped": {"put": 3.0, "update": 1.0, "drop": 0.4, "stop_inside": 0.01},
    "killed": {"put": 3.0, "update": 1.0, "drop": 0.4, "batch": 0.2},
    "cli": {},
}
"""Calls a second of each role; a "cli" process starts every ``CLI_EVERY`` seconds, stores a few units and leaves."""

CLI_EVERY, SAMPLE_EVERY, REPORT_EVERY = 30.0, 10.0, 60.0
STOP_EVERY, STOP_FOR, KILL_EVERY = (40.0, 120.0), (1.0, 8.0), (30.0, 120.0)
NEAR = 1e-3
RECENT = 500
"""So many of its own units a process remembers, to change and delete them."""


def embed(text: str) -> np.ndarray:
    """A seeded vector for a text; texts with the same first word lie together."""
    near = np.random.default_rng(sum(text.split(" ", 1)[0].encode())).standard_normal(DIM)
    own = np.random.default_rng(list(text.encode())).standard_normal(DIM)
    vector = near + own
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


def open_store(prefix: str) -> VectorStore:
    return VectorStore(prefix, embed, DIM, storage_config=StorageConfig(max_memory_units=10 * MOST))


def embedded(store: VectorStore, contents: list[str]) -> np.ndarray:
    """The vectors that units with these contents must have, float32 (n, DIM)."""
    return np.stack([embed(store._unit_to_text({"type": "skill", "content": text})) for text in contents])


class Waits:
    """How long this process's write transactions took to begin, main thread only; can stop the process inside one."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.stop_inside = False
        enter = WriteContext.__enter__

        def measured(writing: WriteContext) -> Any:
            started = time.perf_counter()
            transaction = enter(writing)
            if threading.current_thread() is threading.main_thread():
                self.taken.append(round((time.perf_counter() - started) * 1e3, 3))
                if self.stop_inside:
                    self.stop_inside = False
                    os.kill(os.getpid(), signal.SIGSTOP)
            return transaction

        WriteContext.__enter__ = measured  # type: ignore[method-assign]


class Ledger:
    """What one role did: a line before each writing call, and one after it was acknowledged or had failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def say(self, line: dict[str, Any]) -> None:
        os.write(self._fd, json.dumps(line).encode() + b"\n")


class Worker:
    """One process of a role; ``live`` holds the contents of its newest units, by id."""

    def __init__(self, role: str, folder: Path, seed: int) -> None:
        self.role, self.folder = role, folder
        self.rng = random.Random(f"{seed}:{role}:{os.getpid()}")
        self.waits = Waits()
        self.ledger = Ledger(folder / f"{role}.ledger")
        self.store = open_store(str(folder / "data" / "store"))
        self.live: dict[str, str] = {}
        self.number = 0
        self.recall()

    def recall(self) -> None:
        """Read the own ledger; the call that was under way when the last process was killed happened, or did not."""
        pending: dict[str, Any] = {}
        for line in lines_of(self.ledger.path, tail=200_000):
            self.number = max(self.number, line["n"])
            pending = line if "op" in line else self.settle(pending, line) if pending else {}
        if pending:
            held = self.store.retrieve_batch([*pending.get("put", {}), *pending.get("drop", [])])
            put = all(unit_id in held and held[unit_id]["content"] == text for unit_id, text in pending["put"].items())
            dropped = not any(unit_id in held for unit_id in pending["drop"])
            answer = {"n": pending["n"], "ok": put and dropped, "asked": True}
            self.ledger.say(answer)
            self.settle(pending, answer)

    def settle(self, pending: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        if answer.get("ok"):
            self.live.update(pending["put"])
            for unit_id in pending["drop"]:
                self.live.pop(unit_id, None)
            for unit_id in list(self.live)[:-RECENT]:
                del self.live[unit_id]
        return {}

    def write(self, call: Callable[[], Any], put: dict[str, str] | None = None, drop: Sequence[str] = ()) -> Any:
        """Make a call that writes, with its lines in the ledger. Returns its result, None when it failed."""
        self.number += 1
        pending = {"n": self.number, "op": True, "put": put or {}, "drop": list(drop)}
        self.ledger.say(pending)
        self.waits.taken.clear()
        started = time.perf_counter()
        answer: dict[str, Any] = {"n": self.number}
        result = None
        try:
            result = call()
        except MemEvolveError as error:
            answer |= {"error": repr(error)[:300], "timeout": isinstance(error, LockTimeoutError)}
        else:
            answer |= {"ok": result is not False, "gone": getattr(result, "ids", [])}
        took = round((time.perf_counter() - started) * 1e3, 3)
        self.ledger.say(answer | {"at": round(time.time(), 3), "waits": self.waits.taken, "took": took})
        self.settle(pending, answer)
        return result

    def fresh(self) -> tuple[str, str]:
        unit_id = f"{self.role}-{self.number + 1}-{self.rng.randrange(10**6)}"
        return unit_id, f"w{self.rng.randrange(40)} {unit_id} learned at {self.rng.randrange(10**6)}"

    def put(self) -> None:
        unit_id, text = self.fresh()
        self.write(lambda: self.store.store({"id": unit_id, "type": "skill", "content": text}), {unit_id: text})
        if self.rng.random() < 0.25:
            self.expect(unit_id, text)

    def batch(self, count: int = 5) -> None:
        new = dict(self.fresh() for _ in range(count))
        units = [{"id": unit_id, "type": "skill", "content": text} for unit_id, text in new.items()]
        self.write(lambda: self.store.store_batch(units), new)

    def update(self) -> None:
        if self.live:
            unit_id, text = self.own(), self.fresh()[1]
            unit = {"id": unit_id, "type": "skill", "content": text}
            if self.write(lambda: self.store.update(unit_id, unit), {unit_id: text}) is False:
                self.live.pop(unit_id)  # forgotten by the maintainer, or else the check finds it lost

    def drop(self) -> None:
        if self.live:
            unit_id = self.own()
            if self.write(lambda: self.store.delete(unit_id), drop=[unit_id]) is False:
                self.live.pop(unit_id)

    def own(self) -> str:
        return self.rng.choice(list(self.live))

    def stop_inside(self) -> None:
        """The next write stops this process while it holds the writer lock; the parent lets it go on."""
        self.waits.stop_inside = True

    def expect(self, unit_id: str, text: str) -> None:
        """A unit that was acknowledged is found, unless it is gone by now."""
        found = self.store.search_vectors(embedded(self.store, [text]), 3)
        near = [one for distance, one in zip(found[0][0], found[1][0], strict=True) if distance <= NEAR]
        held = self.store.retrieve(unit_id)
        if held is not None and (near != [unit_id] or held["content"] != text):
            self.ledger.say({"n": self.number, "missed": f"{unit_id}: found {near}, held {held['content']!r}"})

    def search(self) -> None:
        self.store.search_units(f"w{self.rng.randrange(40)} what was learned", 5)

    def keywords(self) -> None:
        self.store.search_keywords("learned", 5)

    def read(self) -> None:
        """The newest units of another role, which never changes a unit that is seconds old, can be found."""
        path = self.folder / f"{self.rng.choice(['hook', 'backup', 'cli'])}.ledger"
        said = lines_of(path, tail=4000)
        done = {line["n"] for line in said if line.get("ok")}
        texts = [pair for line in said if line["n"] in done and "op" in line for pair in line["put"].items()]
        if texts:
            self.expect(*self.rng.choice(texts))

    def health(self) -> None:
        self.store.get_storage_health()

    def prune(self) -> None:
        over = self.store.count() - KEPT
        if over > MOST - KEPT:
            self.write(lambda: SimpleManagementStrategy().apply_forgetting(self.store, "lru", over))

    def maintain(self) -> None:
        self.write(self.store.run_maintenance)

    def statistics(self) -> None:
        figures = self.store.statistics()
        log = figures["log"]
        line: dict[str, Any] = {
            "at": round(time.time()),
            "log_entries": log["last_seq"] - log["horizon"],
            "units": figures["count"],
        }
        line |= {"generation": figures["generation"], "kind": figures["index"]["kind"]}
        with (self.folder / "statistics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def backup(self) -> None:
        """A backup, restored beside, opens without a finding and holds as many units as the store about does."""
        target, scratch = self.folder / "backup.db", self.folder / "scratch"
        target.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        before = self.store.count()
        self.store.backup(target)
        after = self.store.count()
        VectorStore.restore(target, scratch / "store")
        with open_store(str(scratch / "store")) as copy:
            findings, count = copy.check(), copy.count()
            if findings or not min(before, after) <= count <= max(before, after) + MOST - KEPT:
                self.ledger.say({"n": self.number, "missed": f"the backup holds {count}: {findings}"[:500]})

    def work(self) -> None:
        """Calls at the role's rates until the file "end" is there; pauses while "pause" is."""
        rates = RATES[self.role]
        while not (self.folder / "end").exists():
            time.sleep(min(self.rng.expovariate(sum(rates.values())), 20.0))
            self.pause()
            name = self.rng.choices(list(rates), list(rates.values()))[0]
            try:
                getattr(self, name)()
            except MemEvolveError as error:
                self.ledger.say({"n": self.number, "missed": f"{name}: {error!r}"[:300]})
        self.store.close()

    def pause(self) -> None:
        pause, answer = self.folder / "pause", self.folder / f"{self.role}.paused"
        while pause.exists():
            answer.write_text(f"{os.getpid()} {pause_number(pause)}")
            time.sleep(0.05)

    def short_visit(self) -> None:
        """What a command of the command line does: open, write, search, leave."""
        for call in (self.put, self.put, self.batch, self.search):
            self.pause()
            call()
        self.store.close()


def pause_number(pause: Path) -> str:
    with suppress(FileNotFoundError):
        return pause.read_text()
    return ""


def lines_of(path: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The complete lines of a ledger; only those of its last ``tail`` bytes."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = 0 if tail is None else max(0, path.stat().st_size - tail)
        file.seek(start)
        lines = file.read().split(b"\n")
    return [json.loads(line) for line in (lines[1:-1] if start else lines[:-1])]


class Book:
    """All ledgers together: what the store must hold, what may never come back, and how long writes waited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.live: dict[str, str] = {}
        self.gone: set[str] = set()
        self.waits: list[tuple[float, float, float]] = []
        """Of each write transaction: when it was acknowledged, milliseconds waited, milliseconds of the call."""
        self.acknowledged = 0
        self.faults: list[str] = []
        self.timeouts = 0
        self._read: dict[Path, int] = {}
        self._pending: dict[Path, dict[str, Any]] = {}

    def read(self) -> None:
        """Take in the new lines of every ledger."""
        for path in sorted(self.folder.glob("*.ledger")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                fresh = file.read()
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in map(json.loads, whole.splitlines()):
                self._take(path, line)
        for unit_id in self.gone:
            self.live.pop(unit_id, None)

    def _take(self, path: Path, line: dict[str, Any]) -> None:
        if "op" in line:
            self._pending[path] = line
        elif "missed" in line:
            self.faults.append(f"{path.stem}: {line['missed']}")
        else:
            pending = self._pending.pop(path)
            self.timeouts += bool(line.get("timeout"))
            if "error" in line:
                self.faults.append(f"{path.stem}: {line['error']}")
            self.waits += [(line["at"], wait, line["took"]) for wait in line.get("waits", [])]
            if line.get("ok"):
                self.acknowledged += 1
                self.live.update(pending["put"])
                self.gone.update(pending["drop"], line.get("gone", []))

    def compare(self, store: VectorStore) -> dict[str, int]:
        """The store against the ledgers; every process is between two calls."""
        held = {unit["id"]: unit["content"] for unit in store.units()}
        found: dict[str, int] = {"units": len(held)}
        found["lost"] = sum(held.get(unit_id) != text for unit_id, text in self.live.items())
        found["resurrected"] = len(held.keys() & self.gone)
        found["unknown"] = len(held.keys() - self.live.keys() - self.gone)
        found["wrong_mapping"] = self._wrong(store, held)
        findings = store.check()
        if findings or store.count() != len(held):
            self.faults.append(f"check: {findings}, count {store.count()} of {len(held)}"[:500])
        found["findings"] = len(findings)
        return found

    def _wrong(self, store: VectorStore, held: dict[str, str]) -> int:
        """Units whose vector is not that of their text, or that an exact or an ordinary search does not find first."""
        ids = list(held)
        if not ids:
            return 0
        wanted = embedded(store, list(held.values()))
        vectors = store.vectors_of(ids)
        wrong = {one for row, one in enumerate(ids) if not np.allclose(vectors[one], wanted[row], atol=1e-6)}
        distances, found = store.search_vectors(wanted, 1, recall=1.0)
        wrong |= {one for row, one in enumerate(ids) if found[row][0] != one or distances[row, 0] > NEAR}
        distances, found = store.search_vectors(wanted, 1)
        wrong |= {one for row, one in enumerate(ids) if distances[row, 0] <= NEAR and found[row][0] != one}
        return len(wrong)


class Soak:
    """The parent: starts, stops, kills and samples the eight, and holds the store against the ledgers."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.seconds = arguments.hours * 3600
        self.seed, self.output, self.folder = arguments.seed, Path(arguments.output), folder
        self.rng = random.Random(self.seed)
        self.book = Book(folder)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.samples: list[list[float | None]] = []
        self.checks: list[dict[str, Any]] = []
        self.stops: list[tuple[float, float]] = []
        self.stopped_until = 0.0
        self.kills = self.visits = self.pauses = 0
        self.started = time.time()

    def run(self) -> dict[str, Any]:
        (self.folder / "data").mkdir()
        open_store(str(self.folder / "data" / "store")).close()
        every = min(300.0, self.seconds / 4)
        tasks: list[tuple[Callable[[], object], Callable[[], float]]] = [
            (self.sample, lambda: SAMPLE_EVERY),
            (self.visit, lambda: CLI_EVERY),
            (self.stop, lambda: self.rng.uniform(*STOP_EVERY)),
            (self.kill, lambda: self.rng.uniform(*KILL_EVERY)),
            (self.check, lambda: every),
            (self.report, lambda: REPORT_EVERY),
        ]
        due = [time.time() + (after() if task != self.visit else 1.0) for task, after in tasks]
        try:
            while time.time() < self.started + self.seconds:
                self.keep_alive()
                self.let_go_on()
                for i, (task, after) in enumerate(tasks):
                    if time.time() >= due[i]:
                        task()
                        due[i] = time.time() + after()
                time.sleep(0.25)
            self.sample()
            self.end()
        finally:
            for process in self.running.values():
                process.kill()
        return self.report(finished=True)

    def start(self, role: str) -> None:
        command = [sys.executable, __file__, "--child", role, str(self.folder), str(self.seed)]
        with (self.folder / f"{role}.stderr").open("ab") as stderr:
            self.running[role] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)

    def keep_alive(self) -> None:
        """Every role but "cli" runs; one that ended by itself is a fault."""
        for role in RATES:
            process = self.running.get(role)
            if process is not None and process.poll() is not None:
                if process.returncode:
                    said = (self.folder / f"{role}.stderr").read_text()[-500:]
                    self.book.faults.append(f"{role} ended by itself with {process.returncode}: {said}")
                del self.running[role]
            if role not in self.running and role != "cli":
                self.start(role)

    def visit(self) -> None:
        if "cli" not in self.running:
            self.visits += 1
            self.start("cli")

    def state(self, role: str) -> str:
        with suppress(OSError, KeyError):
            return Path(f"/proc/{self.running[role].pid}/stat").read_text().rsplit(") ", 1)[1][0]
        return "?"

    def stop(self) -> None:
        """Stop the role "stopped" wherever it is. It also stops itself inside a write now and then."""
        self.running["stopped"].send_signal(signal.SIGSTOP)

    def let_go_on(self, now: bool = False) -> None:
        if self.state("stopped") != "T":
            return
        if not self.stopped_until:
            self.stopped_until = time.time() + self.rng.uniform(*STOP_FOR)
            self.stops.append((time.time() - 0.5, self.stopped_until + 0.5))
        if now or time.time() >= self.stopped_until:
            self.running["stopped"].send_signal(signal.SIGCONT)
            self.stopped_until = 0.0

    def kill(self) -> None:
        self.kills += 1
        process = self.running.pop("killed")
        process.kill()
        process.wait()

    def check(self) -> None:
        """Let all pause between two calls, compare, and let them go on."""
        self.pauses += 1
        (self.folder / "pause").write_text(str(self.pauses))
        deadline = time.time() + 120
        while not all(self.is_paused(role) for role in [*self.running]):
            self.let_go_on(now=True)
            self.keep_alive()
            if time.time() > deadline:
                late = [role for role in self.running if not self.is_paused(role)]
                self.book.faults.append(f"{late} did not pause within 120 s")
                break
            time.sleep(0.1)
        else:
            self.compare()
        (self.folder / "pause").unlink()

    def is_paused(self, role: str) -> bool:
        answer = self.folder / f"{role}.paused"
        process = self.running[role]
        ended = process.poll() is not None
        return ended or (answer.exists() and answer.read_text() == f"{process.pid} {self.pauses}")

    def compare(self) -> None:
        self.book.read()
        with open_store(str(self.folder / "data" / "store")) as store:
            found = self.book.compare(store)
        self.checks.append({"at_s": round(time.time() - self.started), "acknowledged": self.book.acknowledged} | found)

    def end(self) -> None:
        """Let every process close its store and leave; what is on the disk then is compared once more."""
        self.let_go_on(now=True)
        (self.folder / "end").touch()
        for role, process in self.running.items():
            self.let_go_on(now=True)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                self.book.faults.append(f"{role} did not end within 60 s")
                process.kill()
                process.wait()
            if process.returncode:
                self.book.faults.append(f"{role} ended with {process.returncode}")
        self.running.clear()
        self.compare()

    def sample(self) -> None:
        row: list[float | None] = [round(time.time() - self.started), round(os.getloadavg()[0], 2)]
        for role in RATES:
            row += self.usage(role)
        data = self.folder / "data"
        sizes = {path.name.removeprefix("store"): path.stat().st_size for path in data.iterdir() if path.is_file()}
        row += [round(sizes.pop(suffix, 0) / 2**20, 3) for suffix in (".db", ".db-wal", ".snapshot")]
        row += [round(sum(sizes.values()) / 2**20, 3)]
        row += [round(sum(path.stat().st_size for path in self.folder.glob("*.stderr")) / 2**20, 3)]
        self.samples.append(row)

    def usage(self, role: str) -> list[float | None]:
        """Resident MiB and open descriptors of the role's process; None when there is none."""
        with suppress(OSError, KeyError, StopIteration, ValueError):
            proc = Path(f"/proc/{self.running[role].pid}")
            status = (proc / "status").read_text().splitlines()
            resident = next(line for line in status if line.startswith("VmRSS:"))
            return [round(int(resident.split()[1]) / 1024, 1), len(list((proc / "fd").iterdir()))]
        return [None, None]

    def report(self, finished: bool = False) -> dict[str, Any]:
        """Write the result as it is now, in one step."""
        self.book.read()
        figures = self.described() | {"finished": finished} | self.judged()
        figures["columns"] = ["seconds", "load", *(f"{role} {what}" for role in RATES for what in ("MiB", "files"))]
        figures["columns"] += ["db MiB", "wal MiB", "snapshot MiB", "other files MiB", "messages MiB"]
        text = json.dumps(figures, indent=1)[:-2] + ',\n "samples": [\n  '
        text += ",\n  ".join(json.dumps(row) for row in self.samples) + "\n ]\n}\n"
        draft = self.output.with_suffix(".draft")
        draft.write_text(text)
        draft.replace(self.output)
        return figures

    def described(self) -> dict[str, Any]:
        return {
            "command": f"scripts/endure --hours {self.seconds / 3600:g}",
            "date": time.strftime("%Y-%m-%d", time.gmtime(self.started)),
            "commit": commit(),
            "memevolve_gpu": __version__,
            "python": platform.python_version(),
            "faiss": faiss.__version__,
            "apsw": apsw.apsw_version(),
            "sqlite": apsw.sqlite_lib_version(),
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "seed": self.seed,
            "setting": f"{DIM} dimensions, {KEPT} to {MOST} units, default settings, one thread for each process",
            "calls_a_second": RATES | {"cli": {"process": round(1 / CLI_EVERY, 3)}},
            "machine_was_shared": "other programs ran on the machine at the same time; see the load in the samples",
        }

    def judged(self) -> dict[str, Any]:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        waits = [wait for _, wait, _ in self.book.waits]
        free = [wait for at, wait, took in self.book.waits if not self.was_stopped(at - took / 1e3, at)]
        names = ("lost", "resurrected", "unknown", "wrong_mapping", "findings")
        return {
            "hours": round((time.time() - self.started) / 3600, 3),
            "acknowledged_writes": self.book.acknowledged,
            **{name: sum(check[name] for check in self.checks) for name in names},
            "faults": len(self.book.faults),
            "first_faults": self.book.faults[:50],
            "lock_timeouts": self.book.timeouts,
            "write_wait_ms": percentiles(waits),
            "write_wait_ms_while_no_process_was_stopped": percentiles(free),
            "kills": self.kills,
            "stops": len(self.stops),
            "short_processes": self.visits,
            "share_of_one_core": round((spent.ru_utime + spent.ru_stime) / (time.time() - self.started), 3),
            "growth": self.growth(),
            "checks": self.checks,
            "statistics": lines_of(self.folder / "statistics.jsonl")[::10],
        }

    def was_stopped(self, start: float, end: float) -> bool:
        return any(start <= until and end >= since for since, until in self.stops)

    def growth(self) -> dict[str, list[float]]:
        """Medians of the second and of the last quarter: memory and descriptors of each role, and sizes."""
        if len(self.samples) < 8:
            return {}
        quarter = len(self.samples) // 4
        parts = (self.samples[quarter : 2 * quarter], self.samples[-quarter:])
        names = [f"{role} {what}" for role in RATES for what in ("MiB", "files")]
        names += ["db MiB", "wal MiB", "snapshot MiB", "other files MiB", "messages MiB"]
        medians: dict[str, list[float]] = {}
        for column, name in enumerate(names, start=2):
            values = [[row[column] for row in part if row[column] is not None] for part in parts]
            if all(values):
                medians[name] = [float(np.median(np.array(value, dtype=float))) for value in values]
        return medians


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    if not milliseconds:
        return {}
    values = np.percentile(np.array(milliseconds), [50, 99, 99.9, 100])
    named = {name: round(float(value), 3) for name, value in zip(("p50", "p99", "p99.9", "max"), values, strict=True)}
    return {"writes": len(milliseconds), **named}


def commit() -> str:
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "soak.json"))
    parser.add_argument("--folder", help="an empty folder on a disk, which stays; default: a temporary one")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        role, folder, seed = arguments.child
        worker = Worker(role, Path(folder), int(seed))
        worker.short_visit() if role == "cli" else worker.work()
        return 0
    with nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory() as folder:
        figures = Soak(arguments, Path(folder)).run()
    shown = {name: figures[name] for name in figures if name not in ("samples", "columns", "checks", "statistics")}
    print(json.dumps(shown, indent=2))
    wrong = ("lost", "resurrected", "unknown", "wrong_mapping", "findings", "lock_timeouts")
    return 1 if figures["faults"] or any(figures[name] for name in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
