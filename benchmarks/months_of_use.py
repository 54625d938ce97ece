"""Measure months of use in minutes: 50,000 units stored one by one, searched, rewritten, pruned, consolidated.

    python benchmarks/months_of_use.py [--units 50000] [--queries 10] [--history-days 7] [--data FOLDER] [--json FILE]

Arrival in topic order, ten queries after each store, 40 % of the units rewritten, every hundredth lesson repeated word
for word, two consolidations, 30 % pruned. At every checkpoint: recall@10 against the exact scan of the same store, and
stored vectors that must find their own id or an equal vector. Search times are separated by whether maintenance was
running; its processor time is compared with that of the whole run, without embedding.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from harness import load, machine, recall_of, rounded

from memevolve_gpu import StorageConfig, VectorStore

K = 10
SEED = 11


class Life:
    """One store with the vectors of its units by id, and the figures so far."""

    def __init__(self, prefix: Path, vectors: np.ndarray, queries: np.ndarray, target: float, days: int) -> None:
        self.rng = np.random.default_rng(SEED)
        self.vectors, self.queries, self.target = vectors, queries, target
        self.next_vector = vectors[0]
        config = StorageConfig(max_memory_units=10**6, target_recall=target, index_type="ivf", history_days=days)
        self.store = VectorStore(prefix, lambda _text: self.next_vector, vectors.shape[1], storage_config=config)
        self.held: dict[str, np.ndarray] = {}
        self.ids: list[str] = []
        self.times: dict[bool, list[float]] = {False: [], True: []}
        self.checkpoints: list[dict[str, Any]] = []

    def put(self, unit_id: str, vector: np.ndarray, number: int) -> None:
        self.next_vector = vector
        self.store.store({"id": unit_id, "type": "lesson", "content": f"lesson {number} as of {vector[0]:.6f}"})
        if unit_id not in self.held:
            self.ids.append(unit_id)
        self.held[unit_id] = vector

    def ask(self, times: int) -> None:
        for _ in range(times):
            query = self.queries[self.rng.integers(len(self.queries))][None, :]
            before = self.store.index.is_building
            started = time.perf_counter()
            self.store.search_vectors(query, K)
            self.times[before or self.store.index.is_building].append(time.perf_counter() - started)

    def live_id(self) -> str:
        while True:
            unit_id = self.ids[self.rng.integers(len(self.ids))]
            if unit_id in self.held:
                return unit_id

    def prune(self, share: float) -> None:
        gone = [unit_id for unit_id in self.ids if unit_id in self.held][: int(share * len(self.held))]
        self._remove("prune", gone)

    def consolidate(self, groups: int) -> None:
        alive = [unit_id for unit_id in self.ids if unit_id in self.held]
        for group in range(groups):
            members = alive[group * 50 : group * 50 + 5]
            merged = np.mean([self.held[unit_id] for unit_id in members], axis=0)
            self._remove("consolidate", members)
            self.put(f"merged-{len(self.ids)}", (merged / np.linalg.norm(merged)).astype("float32"), -group)

    def _remove(self, operation: str, ids: list[str]) -> None:
        self.store.delete_batch(ids)
        for unit_id in ids:
            del self.held[unit_id]
        self.store.register_management_operation(operation, {"removed": len(ids)})

    def check(self, name: str) -> None:
        sample = self.queries[self.rng.choice(len(self.queries), 200, replace=False)]
        found = self.store.search_vectors(sample, K)[0]
        truth = self.store.search_vectors(sample, K, recall=1.0)[0]
        ids = list(self.held)
        picked = [ids[i] for i in self.rng.choice(len(ids), min(500, len(ids)), replace=False)]
        distances, hits = self.store.search_vectors(np.stack([self.held[unit_id] for unit_id in picked]), 1)
        wrong = sum(
            bool(distance > 1e-5) or not np.allclose(self.held[str(hit)], self.held[unit_id], atol=1e-5)
            for (distance,), (hit,), unit_id in zip(distances.tolist(), hits, picked, strict=True)
        )
        statistics = self.store.statistics()
        self.checkpoints.append(
            {
                "at": name,
                "units": len(self.held),
                "counted": self.store.count(),
                "recall@10": recall_of(found, truth),
                "mapping_errors": wrong + (self.store.count() != len(self.held)),
                "index": statistics["index"]["kind"],
                "nlist": statistics["index"]["nlist"],
                "tail": statistics["tail_rows"],
                "tombstones": statistics["tombstones"],
            }
        )
        print(json.dumps(rounded(self.checkpoints[-1])), flush=True)


def live(life: Life, units: int, queries: int) -> None:
    every = max(1, units // 10)
    for i in range(units):
        repeated = i % 100 == 99
        vector = life.vectors[i - 50] if repeated else life.vectors[i]
        life.put(f"lesson-{i}", vector, i)
        if life.rng.random() < 0.4:
            life.put(life.live_id(), life.vectors[life.rng.integers(i + 1)], i)
        life.ask(queries)
        if i in (units // 2, units * 9 // 10):
            life.consolidate(groups=units // 500)
            life.check(f"consolidated after {i}")
        if i in (units * 2 // 3, units - 1):
            life.prune(0.15)
            life.check(f"pruned after {i}")
        if i % every == every - 1:
            life.check(f"stored {i + 1}")


def fresh_files(folder: Path, life: Life) -> dict[str, int]:
    """File sizes of a new store that holds just what is alive."""
    config = StorageConfig(max_memory_units=10**6, target_recall=life.target, index_type="ivf", background=False)
    with VectorStore(folder / "fresh", None, life.vectors.shape[1], storage_config=config) as store:
        rows = list(life.store.export_rows())
        store.store_batch([unit for unit, _ in rows], np.stack([vector for _, vector in rows]))
        store.run_maintenance()
    return sizes(folder / "fresh")


def sizes(prefix: Path) -> dict[str, int]:
    files = {end: Path(f"{prefix}.{end}") for end in ("db", "snapshot")}
    return {end: path.stat().st_size if path.exists() else 0 for end, path in files.items()}  # a small one has no index


def p95(times: list[float]) -> float:
    return float(np.percentile(times, 95)) * 1e3 if times else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--units", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--history-days", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    data = load(arguments.data)
    vectors = by_topic(data.vectors, arguments.units)
    queries = np.concatenate(list(data.queries.values()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        life = Life(folder / "life", vectors, queries, arguments.target, arguments.history_days)
        started, cpu = time.perf_counter(), time.process_time()
        live(life, arguments.units, arguments.queries)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        statistics = life.store.statistics()
        life.store.run_maintenance()
        fresh = fresh_files(folder, life)
        life.store.close()
        used = sizes(folder / "life")
    worst = min(point["recall@10"] for point in life.checkpoints)
    figures = {
        "machine": machine(),
        "data": f"{arguments.units} units in topic order from: {data.name}",
        "command": f"python benchmarks/months_of_use.py --units {arguments.units} --queries {arguments.queries}",
        "target_recall": arguments.target,
        "history_days": arguments.history_days,
        "worst_recall@10": worst,
        "mapping_errors": sum(point["mapping_errors"] for point in life.checkpoints),
        "search_ms": {
            "idle_p50": float(np.median(life.times[False])) * 1e3,
            "idle_p95": p95(life.times[False]),
            "during_maintenance_p95": p95(life.times[True]),
            "during_maintenance_searches": len(life.times[True]),
            "p95_ratio": p95(life.times[True]) / p95(life.times[False]),
        },
        "maintenance": {
            "rounds": statistics["maintenance"]["rounds"],
            "cpu_s": statistics["maintenance"]["cpu_seconds"],
            "share_of_cpu": statistics["maintenance"]["cpu_seconds"] / cpu,
        },
        "cpu_s": cpu,
        "wall_s": wall,
        "files": {"used": used, "fresh": fresh, "ratio": sum(used.values()) / sum(fresh.values())},
        "events": statistics["event_totals"],
        "checkpoints": life.checkpoints,
    }
    text = json.dumps(rounded(figures), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


def by_topic(vectors: np.ndarray, units: int) -> np.ndarray:
    """``units`` rows in order of 200 topics: the real ones, then real ones again with seeded noise."""
    rng = np.random.default_rng(SEED)
    again = vectors[rng.integers(0, len(vectors), max(0, units - len(vectors)))]
    extra = again + rng.standard_normal(again.shape, dtype=np.float32) * np.float32(0.02)
    rows = np.concatenate([vectors, extra])[:units]
    rows = np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype="float32")
    topics = faiss.Kmeans(rows.shape[1], 200, niter=5, seed=SEED)
    topics.train(rows[:: max(1, len(rows) // 10_000)])
    order = np.argsort(topics.index.search(rows, 1)[1][:, 0], kind="stable")
    return np.asarray(rows[order])


if __name__ == "__main__":
    main()
