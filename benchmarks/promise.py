"""Measure the public call: recall by target, time beside faiss, growth with the store, memory.

    python benchmarks/promise.py [--data FOLDER] [--json FILE] [--quick] [--parts recall small growth memory]

recall: cold, the store has seen no query and is measured on all of them; warm, half of the queries in distribution and
half of those out of it were searched first, and the other halves are measured. HNSW32 uses the smallest beam that
reaches the store's recall on the same queries. small: what a call costs beyond faiss IndexFlat. growth: the
exponent fitted to the median time over the store's size. memory: bytes predicted by the plan and counted, by
dimension. One thread, medians; the calls take turns in blocks of 20, so that each finds the caches as if it ran
alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from harness import Data, Hnsw32, load, machine, recall_of, rounded, taking_turns

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.utils.vectors import normalize_rows

K = 10
BLOCK = 20
BEAMS = (10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536)
TARGETS = (0.95, 0.99)
SIZES = (1000, 2000, 5000, 10_000, 20_000, 39_320)
DIMENSIONS = (384, 768, 1024, 1536)


@contextmanager
def filled(vectors: np.ndarray, **settings: Any) -> Iterator[VectorStore]:
    """A store of these vectors, its index built."""
    config = StorageConfig(**{"background": False, "max_memory_units": len(vectors) + 1, **settings})
    with (
        tempfile.TemporaryDirectory() as name,
        VectorStore(f"{name}/s", None, vectors.shape[1], storage_config=config) as store,
    ):
        store.store_batch([{"id": f"u{i}", "content": f"unit {i}"} for i in range(len(vectors))], vectors)
        store.run_maintenance()
        yield store


class Graph(Hnsw32):
    """faiss HNSW32, and the smallest beam for a recall."""

    def distances(self, queries: np.ndarray, beam: int) -> np.ndarray:
        return np.asarray(self.search(queries, K, beam)[0])

    def least_beam(self, queries: np.ndarray, truth: np.ndarray, recall: float) -> tuple[int, float]:
        return self.least(BEAMS, lambda beam: recall_of(self.distances(queries, beam), truth), recall)


def exact(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return np.asarray(faiss.knn(queries, vectors, K)[0], dtype=np.float32)


def answers(store: VectorStore, queries: np.ndarray, recall: float) -> tuple[np.ndarray, list[float]]:
    """Distances of the public call, one query at a time, and the milliseconds of each."""
    found, taken = [], []
    for query in queries:
        started = time.perf_counter()
        distances, _ = store.search_vectors(query[None], K, recall=recall)
        taken.append(1e3 * (time.perf_counter() - started))
        found.append(distances[0])
    return np.stack(found), taken


def judged(
    store: VectorStore, graph: Graph, flat: Any, queries: np.ndarray, vectors: np.ndarray, target: float, rounds: int
) -> dict[str, Any]:
    truth = exact(vectors, queries)
    found, taken = answers(store, queries, target)
    own = recall_of(found, truth)
    beam, reached = graph.least_beam(queries, truth, own)
    asked, asked_reached = graph.least_beam(queries, truth, target)

    def row(i: int) -> np.ndarray:
        chosen: np.ndarray = queries[i % len(queries)]
        return chosen[None]

    ms = taking_turns(
        {
            "store": lambda i: store.search_vectors(row(i), K, recall=target),
            "hnsw32": lambda i: graph.search(row(i), K, beam),
            "hnsw32 at the target": lambda i: graph.search(row(i), K, asked),
            "flat": lambda i: flat.search(row(i), K),
        },
        rounds,
        BLOCK,
    )
    return {
        "recall@10": own,
        "p95_ms": float(np.percentile(taken, 95)),
        "ms": ms,
        "hnsw32": {"ef": beam, "recall@10": reached},
        "hnsw32 at the target": {"ef": asked, "recall@10": asked_reached},
        "times_as_fast_as_hnsw32": ms["hnsw32"] / ms["store"],
    }


def recall_part(data: Data, rounds: int) -> dict[str, Any]:
    graph, flat = Graph(data.vectors), faiss.IndexFlatL2(data.vectors.shape[1])
    flat.add(data.vectors)
    figures: dict[str, Any] = {}
    for index_type in ("auto", "ivf"):
        # cold: a store of its own, whose queries are not sampled, or the first judgement would warm the second
        with filled(data.vectors, index_type=index_type, sample_queries=False) as store:
            cold = {
                str(target): {
                    name: judged(store, graph, flat, rows, data.vectors, target, rounds)
                    for name, rows in data.queries.items()
                }
                for target in TARGETS
            }
            kind = store.index.kind
        with filled(data.vectors, index_type=index_type) as store:
            for query in np.random.default_rng(0).permutation(np.concatenate([q[::2] for q in data.queries.values()])):
                store.search_vectors(query[None], K)
            store.run_maintenance()
            warm = {
                str(target): {
                    name: judged(store, graph, flat, rows[1::2], data.vectors, target, rounds)
                    for name, rows in data.queries.items()
                }
                for target in TARGETS
            }
        figures[index_type] = {"kind": kind, "cold": cold, "warm": warm}
    return figures


def small_part(data: Data, rounds: int) -> dict[str, Any]:
    figures = {}
    for size in SIZES[:5]:
        vectors = np.ascontiguousarray(data.vectors[:size])
        flat = faiss.IndexFlatL2(vectors.shape[1])
        flat.add(vectors)
        with filled(vectors) as store:
            queries = data.queries["out"]

            def of_store(i: int, store: VectorStore = store, queries: np.ndarray = queries) -> Any:
                return store.search_vectors(queries[i % 1000][None], K)

            def of_flat(i: int, flat: Any = flat, queries: np.ndarray = queries) -> Any:
                return flat.search(queries[i % 1000][None], K)

            ms = taking_turns({"store": of_store, "flat": of_flat}, rounds, BLOCK)
            figures[str(size)] = {"kind": store.index.kind, "ms": ms, "extra_ms": ms["store"] - ms["flat"]}
    return figures


def growth_part(data: Data, rounds: int) -> dict[str, Any]:
    medians = {}
    for size in SIZES:
        with filled(np.ascontiguousarray(data.vectors[:size])) as store:
            queries = np.concatenate([rows[: rounds // 2] for rows in data.queries.values()])
            medians[size] = float(np.median(answers(store, queries, 0.95)[1]))
    slope = np.polyfit(np.log(list(medians)), np.log(list(medians.values())), 1)[0]
    return {"median_ms": {str(size): ms for size, ms in medians.items()}, "exponent": float(slope)}


def memory_part(_data: Data, rounds: int) -> dict[str, Any]:
    figures = {}
    for dim in DIMENSIONS:
        rng = np.random.default_rng(dim)
        rows = 8000 if rounds < 200 else 20_000
        centres = rng.standard_normal((100, dim), dtype=np.float32)
        vectors = normalize_rows(centres[rng.integers(0, 100, rows)] + rng.standard_normal((rows, dim), dtype="f4"))
        for index_type in ("auto", "ivf"):
            with filled(vectors, index_type=index_type) as store:
                statistics = store.statistics()
                counted = store.get_storage_health()["memory_usage_mb"]
                queries = normalize_rows(
                    vectors[:100] + 0.7 / np.sqrt(dim) * rng.standard_normal((100, dim), dtype="f4")
                )
                found = answers(store, queries, 0.95)[0]
                figures[f"{dim}, {index_type}"] = {
                    "recall@10": recall_of(found, exact(vectors, queries)),
                    "kind": statistics["index"]["kind"],
                    "precision": statistics["index"]["precision"],
                    "counted_mb": counted,
                    "predicted_mb": statistics["plan"]["bytes"] / 2**20,
                    "mb_per_1000_units": counted / rows * 1000,
                }
    return figures


PARTS = {"recall": recall_part, "small": small_part, "growth": growth_part, "memory": memory_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    data = load(arguments.data)
    figures: dict[str, Any] = {"machine": machine(), "data": data.name, "command": "python benchmarks/promise.py"}
    for part in arguments.parts:
        figures[part] = PARTS[part](data, 60 if arguments.quick else 600)
        print(json.dumps({part: rounded(figures[part])}, indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rounded(figures), indent=2) + "\n")


if __name__ == "__main__":
    main()
