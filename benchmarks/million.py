"""Measure a million vectors: bulk store, build, search meanwhile and after, memory, disk, files, reopening.

    python benchmarks/million.py [--units 1000000] [--data FOLDER] [--folder FOLDER] [--json FILE]
    python benchmarks/million.py --units 10000000 --max-memory-mb 8192 --folder FOLDER

The vectors are the real ones, repeated with seeded Gaussian noise (0.05 of the norm) and renormalised; half of the
queries are out of distribution. Recall is against float32, computed in blocks of rows. One thread, medians. Memory is
read from /proc every 20 ms: anonymous pages, which only swap could drop, apart from pages of files, which the system
drops when memory is short. Disk is what the file system has allocated to the files of the store, and to the files
without a name that the process has open.

The index is built in the background while units are stored; where the disk has no room for that, once, after they are
stored. What was measured is written after each step. What does not fit the disk or the memory is skipped, and the
result says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from harness import Data, load, machine, recall_of, rounded

from memevolve_gpu import MemEvolveError, StorageConfig, VectorStore

K = 10
TARGETS = (0.95, 0.99)
RECORD_BYTES, VECTOR_BYTES, OTHER_BYTES = 2000, 4 * 384, 250
"""Disk for a unit: its rows in the database, its vector beside it, its codes, slot and id in the snapshot. Measured."""
ANONYMOUS_BYTES = 400
"""Memory for a unit that cannot be dropped while its index is built. Measured."""
LEFT_FREE = 1 << 30
"""Storing ends when the disk has less left."""
BLOCK = 20_000
SEED = 5


def block(data: Data, number: int, size: int) -> np.ndarray:
    """Block ``number`` of the vectors, the same at every call; in a file, so that it does not count as memory."""
    rng = np.random.default_rng([SEED, number])
    picked = rng.integers(0, len(data.vectors), size)
    with tempfile.TemporaryFile() as file:
        rows = np.memmap(file, np.float32, "w+", shape=(size, data.vectors.shape[1])).view(np.ndarray)
    for start in range(0, size, 1000):
        piece = rows[start : start + 1000]
        piece[:] = data.vectors[picked[start : start + 1000]]
        piece += rng.standard_normal(piece.shape, dtype=np.float32) * np.float32(0.05 / np.sqrt(rows.shape[1]))
        piece /= np.linalg.norm(piece, axis=1, keepdims=True)
    return rows


class Usage(threading.Thread):
    """Follows the memory of this process and the disk of the store, in MB: now, and the peak of each phase."""

    def __init__(self, folder: str) -> None:
        super().__init__(daemon=True)
        self.folder = Path(folder)
        self.phase = "start"
        self.before = self.memory()
        self.peaks: dict[str, dict[str, float]] = {}
        self._over = threading.Event()
        self.start()

    @staticmethod
    def memory() -> dict[str, float]:
        lines = Path("/proc/self/status").read_text().splitlines()
        pages = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
        anonymous, file = pages["RssAnon"], pages["RssFile"] + pages["RssShmem"]
        return {"anonymous": anonymous, "file": file, "both": anonymous + file}

    def disk(self) -> float:
        """MB that the file system has allocated to the store, files without a name included."""
        found = {}
        for path in [*Path("/proc/self/fd").iterdir(), *self.folder.iterdir()]:
            try:
                facts = path.stat()
            except OSError:
                continue
            if stat.S_ISREG(facts.st_mode) and (path.parent == self.folder or not facts.st_nlink):
                found[facts.st_dev, facts.st_ino] = facts.st_blocks * 512
        return sum(found.values()) / 2**20

    def free(self) -> int:
        """Bytes that the disk has left."""
        return shutil.disk_usage(self.folder).free

    def run(self) -> None:
        count = 0
        while not self._over.wait(0.02):
            peak = self.peaks.setdefault(self.phase, dict.fromkeys([*self.before, "disk"], 0.0))
            for name, size in self.memory().items():
                peak[name] = max(peak[name], size - self.before[name])
            if count % 10 == 0:
                peak["disk"] = max(peak["disk"], self.disk())
            count += 1

    def line(self) -> str:
        """The present figures, for a line of progress."""
        anonymous = self.memory()["anonymous"] - self.before["anonymous"]
        return f"anonymous {anonymous:,.0f} MB, disk {self.disk():,.0f} MB, {self.free() / 2**20:,.0f} MB free"

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """Growth since the start: what stays, the peak, and the peak of each phase."""
        now = self.memory()
        phases = {phase: {name: sizes[name] for name in names} for phase, sizes in self.peaks.items()}
        return {
            "stays": {name: self.disk() if name == "disk" else now[name] - self.before[name] for name in names},
            "peak": {name: max(sizes[name] for sizes in phases.values()) for name in names},
            "phases": phases,
        }

    def end(self) -> None:
        self._over.set()
        self.join()


class Report:
    """The figures so far; written to a file after each step, since the next one may not come to its end."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.figures = path, dict[str, Any]()
        self.skipped: dict[str, str] = {}
        self._started = self._told = time.perf_counter()

    def say(self, text: str) -> None:
        self._told = time.perf_counter()
        print(f"{self._told - self._started:8.0f} s  {text}", flush=True)

    def tell(self, text: Callable[[], str]) -> None:
        """Say it, unless something was said in the last ten seconds."""
        if time.perf_counter() - self._told > 10:
            self.say(text())

    def skip(self, step: str, why: str) -> None:
        self.skipped[step] = why
        self.say(f"{step}: skipped, {why}")

    def add(self, **figures: Any) -> None:
        self.figures |= figures
        self.write()

    def write(self) -> str:
        text = json.dumps(rounded(self.figures | ({"skipped": self.skipped} if self.skipped else {})), indent=2)
        if self.path:
            draft = self.path.with_name(self.path.name + ".part")
            draft.write_text(text + "\n")
            draft.replace(self.path)
        return text


def fill(store: VectorStore, data: Data, units: int, usage: Usage, report: Report) -> int:
    """Store the units, block by block; returns how many, fewer where the disk or the memory limit ends it."""
    started, told = time.perf_counter(), 0
    for number, start in enumerate(range(0, units, BLOCK)):
        size = min(BLOCK, units - start)
        if usage.free() < LEFT_FREE:
            report.skip("storing the rest", f"the disk has {usage.free() / 2**20:,.0f} MB left, {start:,} are stored")
            return start
        try:
            store.store_batch(
                [{"id": f"u{start + i}", "type": "skill", "content": f"unit {start + i}"} for i in range(size)],
                block(data, number, size),
            )
        except MemEvolveError as error:
            report.skip("storing the rest", f"{start:,} are stored, then: {error}")
            return start
        taken = time.perf_counter() - started
        if start + size - told >= units // 100:
            told = start + size
            report.add(stored=told, stored_per_s=told / taken)
            report.say(f"stored {told:,} of {units:,}, {told / taken:,.0f}/s, {usage.line()}")
    return units


def truth(data: Data, queries: np.ndarray, units: int, report: Report) -> np.ndarray:
    """Exact squared distances float32 (nq, K), block by block."""
    best = np.full((len(queries), K), np.inf, dtype=np.float32)
    for number, start in enumerate(range(0, units, BLOCK)):
        if start and not number % 50:
            report.say(f"exact distances to {start:,} of {units:,}")
        found = faiss.knn(queries, block(data, number, min(BLOCK, units - start)), K)[0]
        best = np.sort(np.concatenate([best, found], axis=1), axis=1)[:, :K]
    return best


def search_while_building(store: VectorStore, queries: np.ndarray, usage: Usage, report: Report) -> list[float]:
    """Search once every 50 ms until the background has nothing left to do."""
    taken: list[float] = []
    quiet = 0
    while quiet < 40:
        quiet = 0 if store.index.is_building or store.get_storage_health()["needs_retraining"] else quiet + 1
        started = time.perf_counter()
        store.search_vectors(queries[len(taken) % len(queries)][None, :], K)
        taken.append(time.perf_counter() - started)
        time.sleep(0.05)
        report.tell(lambda: f"building; {len(taken)} searches, the last in {1e3 * taken[-1]:.1f} ms, {usage.line()}")
    return taken


def search_figures(
    store: VectorStore, queries: np.ndarray, exact: np.ndarray, recall: float | None = None
) -> dict[str, Any]:
    taken, distances = [], []
    for query in queries:
        started = time.perf_counter()
        found, _ = store.search_vectors(query[None, :], K, recall=recall)
        taken.append(time.perf_counter() - started)
        distances.append(found[0])
    all_found, half = np.stack(distances), len(queries) // 2
    return {
        "median_ms": float(np.median(taken)) * 1e3,
        "p95_ms": float(np.percentile(taken, 95)) * 1e3,
        "recall@10": recall_of(all_found, exact),
        "recall@10 in distribution": recall_of(all_found[:half], exact[:half]),
        "recall@10 out of distribution": recall_of(all_found[half:], exact[half:]),
    }


OPEN = """
import sys, time
import numpy as np
import faiss
from memevolve_gpu import StorageConfig, VectorStore
config = StorageConfig(max_memory_units=int(sys.argv[2]), max_memory_mb=int(sys.argv[3]), index_type=sys.argv[4])
query = np.load(sys.argv[5])
started = time.perf_counter()
store = VectorStore(sys.argv[1], None, 384, storage_config=config)
opened = time.perf_counter()
store.search_vectors(query, 10)
print(1e3 * (opened - started), 1e3 * (time.perf_counter() - opened))
store.close()
"""


def reopening(prefix: str, arguments: argparse.Namespace, query: np.ndarray) -> dict[str, float]:
    """Milliseconds to open the store and to answer the first query, in new processes; medians of five.

    Once where there is no snapshot, since everything is read then.
    """
    np.save(f"{prefix}.query.npy", query)
    command = [sys.executable, "-c", OPEN, prefix, str(arguments.units + 1), str(arguments.max_memory_mb)]
    command += [arguments.index_type, f"{prefix}.query.npy"]
    taken = [
        subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
        for _ in range(5 if Path(f"{prefix}.snapshot").exists() else 1)
    ]
    opened, answered = np.median(np.array(taken, dtype=float), axis=0).tolist()
    return {"open": opened, "first_search": answered}


def files_of(folder: str) -> dict[str, float]:
    """Megabytes of each file."""
    return {path.name: path.stat().st_size / 2**20 for path in sorted(Path(folder).iterdir())}


def room(units: int, folder: str) -> tuple[bool, str]:
    """Whether the index can be built while units are stored, beside an older snapshot; and why nothing fits, if so."""
    free, least = shutil.disk_usage(folder).free, units * (RECORD_BYTES + VECTOR_BYTES + OTHER_BYTES) + LEFT_FREE
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    if free < least:
        return False, f"{units:,} units need {least / 1e9:.1f} GB of disk in {folder}, and {free / 1e9:.1f} GB are free"
    if available < units * ANONYMOUS_BYTES:
        return (
            False,
            f"{units:,} units need {units * ANONYMOUS_BYTES / 1e9:.1f} GB of memory, too much for this machine",
        )
    return free >= least + units * (VECTOR_BYTES + OTHER_BYTES), ""


def measure(name: str, arguments: argparse.Namespace, report: Report) -> None:
    """All steps, in a folder that is removed afterwards."""
    fits, nothing = room(arguments.units, name)
    if nothing:
        report.skip("everything", nothing)
        return
    meanwhile = fits and not arguments.build_afterwards
    if not fits:
        report.skip("building while storing", "the disk has no room for two snapshots; the index is built afterwards")
    data = load(arguments.data)
    queries = np.concatenate([data.queries["in"][:250], data.queries["out"][:250]])
    settings = {
        "max_memory_units": arguments.units + 1,
        "index_type": arguments.index_type,
        "max_memory_mb": arguments.max_memory_mb,
    }
    report.add(
        machine=machine(),
        data=f"{arguments.units} vectors: {data.name}, repeated with noise 0.05 and renormalised",
        command=f"python benchmarks/million.py --units {arguments.units} --index-type {arguments.index_type}"
        + " --build-afterwards" * (not meanwhile),
    )
    usage = Usage(name)
    try:
        config = StorageConfig(**settings, background=meanwhile)
        with VectorStore(f"{name}/m", None, 384, storage_config=config) as store:
            work(store, data, queries, usage, report, arguments, meanwhile=meanwhile)
    finally:
        usage.phase = "ended"
        report.add(resident_growth_mb=usage.report(list(usage.before)), disk_mb=usage.report(["disk"]))
        usage.end()
    report.add(files_mb=files_of(name))
    report.say("opening the store again")
    report.add(reopening_ms=reopening(f"{name}/m", arguments, queries[:1]))


def work(
    store: VectorStore,
    data: Data,
    queries: np.ndarray,
    usage: Usage,
    report: Report,
    arguments: argparse.Namespace,
    *,
    meanwhile: bool,
) -> None:
    """Store, build and search."""
    usage.phase, started = "storing", time.perf_counter()
    stored = fill(store, data, arguments.units, usage, report)
    report.add(stored=stored, stored_per_s=stored / (time.perf_counter() - started))
    if not stored:
        report.skip("the rest", "nothing is stored")
        return
    usage.phase, started = "settling", time.perf_counter()
    report.say(f"stored {stored:,}; building, {usage.line()}")
    if meanwhile:
        taken = search_while_building(store, queries, usage, report)
        report.add(
            search_meanwhile_ms={
                "median": float(np.median(taken)) * 1e3,
                "max": max(taken) * 1e3,
                "searches": len(taken),
            }
        )
    else:
        store.run_maintenance(lambda stage, share: report.tell(lambda: f"{stage} {share:.0%}, {usage.line()}"))
    kinds = ("built", "refused", "snapshot-failed")
    report.add(
        settled_s=time.perf_counter() - started,
        index=store.statistics()["index"],
        counted_mb=store.get_storage_health()["memory_usage_mb"],
        max_memory_mb=arguments.max_memory_mb,
        events=[event for event in store.statistics()["events"] if event["kind"] in kinds],
        resident_growth_mb=usage.report(list(usage.before)),
        disk_mb=usage.report(["disk"]),
    )
    report.say(f"built in {time.perf_counter() - started:.0f} s, {usage.line()}")
    usage.phase = "oracle"
    exact = truth(data, queries, stored, report)
    usage.peaks.pop("oracle", None)
    usage.phase = "searching"
    for target in TARGETS:
        report.add(**{f"search asked {target}": search_figures(store, queries, exact, target)})
        report.say(f"searched, asked {target}: {report.figures[f'search asked {target}']}")
    report.add(search=report.figures[f"search asked {TARGETS[0]}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--units", type=int, default=1_000_000)
    parser.add_argument("--index-type", default="auto")
    parser.add_argument("--max-memory-mb", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where the store is made; the system's folder for temporary files")
    parser.add_argument("--build-afterwards", action="store_true", help="build the index once, after all are stored")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    signal.signal(signal.SIGTERM, _terminated)
    report = Report(arguments.json)
    try:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            measure(name, arguments, report)
    except (
        MemEvolveError,
        OSError,
        MemoryError,
        subprocess.CalledProcessError,
        KeyboardInterrupt,
        SystemExit,
    ) as error:
        report.skip("the rest", f"ended early: {type(error).__name__} {error}")
        raise
    finally:
        print(report.write())


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit("terminated")


if __name__ == "__main__":
    main()
