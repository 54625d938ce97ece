"""Measure a million vectors: bulk store, background build, search meanwhile and after, memory, files, reopening.

    python benchmarks/million.py [--units 1000000] [--data FOLDER] [--folder FOLDER] [--json FILE]

The vectors are the real ones, repeated with seeded Gaussian noise (0.05 of the norm) and renormalised; half of the
queries are out of distribution. One thread, medians. Memory is read from /proc every 20 ms: anonymous pages, which only
swap could drop, apart from pages of files, which the system drops when memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from harness import Data, load, machine, recall_of, rounded

from memevolve_gpu import StorageConfig, VectorStore

K = 10
BLOCK = 20_000
SEED = 5


def block(data: Data, number: int, size: int) -> np.ndarray:
    """Block ``number`` of the vectors, the same at every call."""
    rng = np.random.default_rng([SEED, number])
    rows = data.vectors[rng.integers(0, len(data.vectors), size)]
    for start in range(0, size, 1000):  # a piece at a time, so that the benchmark takes little memory itself
        piece = rows[start : start + 1000]
        piece += rng.standard_normal(piece.shape, dtype=np.float32) * np.float32(0.05 / np.sqrt(rows.shape[1]))
        piece /= np.linalg.norm(piece, axis=1, keepdims=True)
    return rows


class Memory(threading.Thread):
    """Follows the memory of this process, in MB: now, at the peak, and in which phase the peak was."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase = "start"
        self.before = self.now()
        self.peaks: dict[str, dict[str, float]] = {}
        self._over = threading.Event()
        self.start()

    @staticmethod
    def now() -> dict[str, float]:
        lines = Path("/proc/self/status").read_text().splitlines()
        pages = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
        anonymous, file = pages["RssAnon"], pages["RssFile"] + pages["RssShmem"]
        return {"anonymous": anonymous, "file": file, "both": anonymous + file}

    def run(self) -> None:
        while not self._over.wait(0.02):
            now, peak = self.now(), self.peaks.setdefault(self.phase, dict.fromkeys(self.before, 0.0))
            for name, size in now.items():
                peak[name] = max(peak[name], size - self.before[name])

    def end(self) -> dict[str, Any]:
        """Growth since the start: what stays, and the peak of each phase."""
        self._over.set()
        self.join()
        stays = {name: size - self.before[name] for name, size in self.now().items()}
        return {
            "stays": stays,
            "peak": {n: max(p[n] for p in self.peaks.values()) for n in stays},
            "phases": self.peaks,
        }


def fill(store: VectorStore, data: Data, units: int) -> float:
    started = time.perf_counter()
    for number, start in enumerate(range(0, units, BLOCK)):
        size = min(BLOCK, units - start)
        store.store_batch(
            [{"id": f"u{start + i}", "type": "skill", "content": f"unit {start + i}"} for i in range(size)],
            block(data, number, size),
        )
        print(f"stored {start + size}", flush=True)
    return time.perf_counter() - started


def truth(data: Data, queries: np.ndarray, units: int) -> np.ndarray:
    """Exact squared distances float32 (nq, K), block by block."""
    best = np.full((len(queries), K), np.inf, dtype=np.float32)
    for number, start in enumerate(range(0, units, BLOCK)):
        found = faiss.knn(queries, block(data, number, min(BLOCK, units - start)), K)[0]
        best = np.sort(np.concatenate([best, found], axis=1), axis=1)[:, :K]
    return best


def search_while_building(store: VectorStore, queries: np.ndarray) -> list[float]:
    """Search once every 50 ms until the background has nothing left to do."""
    taken: list[float] = []
    quiet = 0
    while quiet < 40:
        quiet = 0 if store.index.is_building or store.get_storage_health()["needs_retraining"] else quiet + 1
        started = time.perf_counter()
        store.search_vectors(queries[len(taken) % len(queries)][None, :], K)
        taken.append(time.perf_counter() - started)
        time.sleep(0.05)
    return taken


def search_figures(store: VectorStore, queries: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    taken, distances = [], []
    for query in queries:
        started = time.perf_counter()
        found, _ = store.search_vectors(query[None, :], K)
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
    """Milliseconds to open the store and to answer the first query, in new processes; medians of five."""
    np.save(f"{prefix}.query.npy", query)
    command = [sys.executable, "-c", OPEN, prefix, str(arguments.units + 1), str(arguments.max_memory_mb)]
    command += [arguments.index_type, f"{prefix}.query.npy"]
    taken = [subprocess.run(command, capture_output=True, check=True, text=True).stdout.split() for _ in range(5)]
    opened, answered = np.median(np.array(taken, dtype=float), axis=0).tolist()
    return {"open": opened, "first_search": answered}


def files_of(folder: str) -> dict[str, float]:
    """Megabytes of each file."""
    return {path.name: path.stat().st_size / 2**20 for path in sorted(Path(folder).iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--units", type=int, default=1_000_000)
    parser.add_argument("--index-type", default="auto")
    parser.add_argument("--max-memory-mb", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where the store is made; the system's folder for temporary files")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    data = load(arguments.data)
    queries = np.concatenate([data.queries["in"][:250], data.queries["out"][:250]])
    exact = truth(data, queries, arguments.units)
    config = StorageConfig(
        max_memory_units=arguments.units + 1,
        index_type=arguments.index_type,
        max_memory_mb=arguments.max_memory_mb,
    )
    memory = Memory()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        with VectorStore(f"{name}/m", None, 384, storage_config=config) as store:
            memory.phase = "storing"
            stored = fill(store, data, arguments.units)
            memory.phase = "settling"
            started = time.perf_counter()
            meanwhile = search_while_building(store, queries)
            settled = time.perf_counter() - started
            memory.phase = "searching"
            figures = {
                "machine": machine(),
                "data": f"{arguments.units} vectors: {data.name}, repeated with noise 0.05 and renormalised",
                "command": f"python benchmarks/million.py --units {arguments.units}"
                f" --index-type {arguments.index_type}",
                "stored_per_s": arguments.units / stored,
                "settled_s": settled,
                "search_meanwhile_ms": {
                    "median": float(np.median(meanwhile)) * 1e3,
                    "max": max(meanwhile) * 1e3,
                    "searches": len(meanwhile),
                },
                "search": search_figures(store, queries, exact),
                "index": store.statistics()["index"],
                "counted_mb": store.get_storage_health()["memory_usage_mb"],
                "resident_growth_mb": memory.end(),
                "max_memory_mb": arguments.max_memory_mb,
                "events": [event for event in store.statistics()["events"] if event["kind"] in ("built", "refused")],
            }
        figures["files_mb"] = files_of(name)
        figures["reopening_ms"] = reopening(f"{name}/m", arguments, queries[:1])
    text = json.dumps(rounded(figures), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
