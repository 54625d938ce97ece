"""Measure a million vectors: bulk store, background build, search meanwhile and after, memory and its peak.

    python benchmarks/million.py [--units 1000000] [--data FOLDER] [--json FILE]

The vectors are the real ones, repeated with seeded Gaussian noise (0.05 of the norm) and renormalised; half of the
queries are out of distribution. One thread, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
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
    noise = rng.standard_normal(rows.shape, dtype=np.float32) * (0.05 / np.sqrt(rows.shape[1]))
    rows = rows + noise
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype="float32")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--units", type=int, default=1_000_000)
    parser.add_argument("--index-type", default="auto")
    parser.add_argument("--max-memory-mb", type=int, default=4096)
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as name, VectorStore(f"{name}/m", None, 384, storage_config=config) as store:
        stored = fill(store, data, arguments.units)
        started = time.perf_counter()
        meanwhile = search_while_building(store, queries)
        settled = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        figures = {
            "machine": machine(),
            "data": f"{arguments.units} vectors: {data.name}, repeated with noise 0.05 and renormalised",
            "command": f"python benchmarks/million.py --units {arguments.units} --index-type {arguments.index_type}",
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
            "resident_peak_growth_mb": peak,
            "max_memory_mb": arguments.max_memory_mb,
            "events": [event for event in store.statistics()["events"] if event["kind"] in ("built", "refused")],
        }
    text = json.dumps(rounded(figures), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
