"""Measure the public call: recall by target, time beside faiss, growth with the store, memory.

    python benchmarks/promise.py [--data FOLDER] [--json FILE] [--quick] [--parts recall cells small growth memory]

recall: cold, the store has seen no query and is measured on all of them; warm, half of the queries in distribution and
half of those out of it were searched first, and the other halves are measured. HNSW32 uses the smallest beam that
reaches the store's recall on the same queries. cells: recall@10 against float32 on held-out queries of both
kinds, cold and warm, with and without filters, for several data sets, widths and targets; a cell is kept where recall
is at least what was asked less 0.005. small: what a call costs beyond faiss IndexFlat. growth: the
exponent fitted to the median time over the store's size. memory: bytes predicted by the plan and counted, by
dimension. One thread, medians; the calls take turns in blocks of 20, so that each finds the caches as if it ran
alone.
"""

from __future__ import annotations

import argparse
import itertools
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
from harness import Data, Hnsw32, load, machine, recall_of, rounded, taking_turns, wide

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.utils.vectors import normalize_rows

K = 10
BLOCK = 20
STEP = 20_000
BEAMS = (10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536)
TARGETS = (0.95, 0.99)
SIZES = (1000, 2000, 5000, 10_000, 20_000, 39_320)
DIMENSIONS = (384, 768, 1024, 1536)


def unit(i: int) -> dict[str, Any]:
    kind = ("lesson", "tool", "skill")[i % 3]
    return {"id": f"u{i}", "type": kind, "content": f"unit {i}", "tags": [f"t{(i + 8) % 100}"]}


@contextmanager
def filled(vectors: np.ndarray, **settings: Any) -> Iterator[VectorStore]:
    """A store of these vectors, its index built."""
    config = StorageConfig(**{"background": False, "max_memory_units": len(vectors) + 1, **settings})
    with (
        tempfile.TemporaryDirectory() as name,
        VectorStore(f"{name}/s", None, vectors.shape[1], storage_config=config) as store,
    ):
        for start in range(0, len(vectors), STEP):
            part = vectors[start : start + STEP]
            store.store_batch([unit(start + i) for i in range(len(part))], part)
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


def answers(
    store: VectorStore, queries: np.ndarray, recall: float, filters: dict[str, str] | None = None
) -> tuple[np.ndarray, list[float]]:
    """Distances of the public call, one query at a time, and the milliseconds of each."""
    found, taken = [], []
    for query in queries:
        started = time.perf_counter()
        distances, _ = store.search_vectors(query[None], K, filters, recall)
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


FILTERS: dict[str, tuple[dict[str, str] | None, int]] = {
    "none": (None, 1),
    "a third": ({"type": "skill"}, 3),
    "1 %": ({"tags": "t7"}, 100),
}
ASKED = (0.95, 0.99, 1.0)
SLACK = 0.005


def data_sets(data: Data, quick: bool) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Unit vectors and queries by name: real ones, wide ones where the folder has them, and generated mixtures."""
    sets = {"384, real": (normalize_rows(data.vectors), data.queries)}
    if data.folder and (data.folder / "wide1536_units_f16.npy").exists():
        found = wide(data)
        units, queries = normalize_rows(found.vectors), {kind: normalize_rows(q) for kind, q in found.queries.items()}
        sets["1536, real"] = (units, queries)
        rng = np.random.default_rng(3)

        def joined(rows: np.ndarray) -> np.ndarray:
            return normalize_rows(np.concatenate([rows, rows[rng.permutation(len(rows))]], axis=1))

        sets["3072, joined"] = (joined(units), {name: joined(rows) for name, rows in queries.items()})
    rng, n = np.random.default_rng(7), 20_000 if quick else 150_000
    first, second = (data.vectors[rng.integers(0, len(data.vectors), n)] for _ in range(2))
    share = rng.beta(0.5, 0.5, (n, 1)).astype("float32")
    noise = rng.standard_normal(first.shape, dtype=np.float32) * np.float32(0.3 / np.sqrt(first.shape[1]))
    sets[f"384, {n} mixtures"] = (normalize_rows(share * first + (1 - share) * second + noise), data.queries)
    return sets


def cells_of(store: VectorStore, vectors: np.ndarray, queries: dict[str, np.ndarray]) -> dict[str, Any]:
    found = {}
    for (filtered, (condition, every)), (kind, rows) in itertools.product(FILTERS.items(), queries.items()):
        matching = np.arange(len(vectors)) % every == every - 1 if condition else np.ones(len(vectors), bool)
        truth = exact(np.ascontiguousarray(vectors[matching]), rows)
        for asked in ASKED:
            distances, taken = answers(store, rows, asked, condition)
            recall = recall_of(distances, truth)
            found[f"{asked}, {kind}, filter {filtered}"] = {
                "recall@10": recall,
                "kept": recall >= asked - SLACK,
                "p50_ms": float(np.median(taken)),
            }
    return found


def cells_part(data: Data, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for (name, (vectors, queries)), index_type in itertools.product(
        data_sets(data, rounds < 200).items(), ("ivf", "auto")
    ):
        held = {kind: rows[1::2][:rounds] for kind, rows in queries.items()}
        states = {}
        with filled(vectors, index_type=index_type, sample_queries=False) as store:
            states["cold"] = cells_of(store, vectors, held)
            store.run_maintenance()
            counted = store.get_storage_health()["memory_usage_mb"] * 1000 / len(vectors)
        with filled(vectors, index_type=index_type) as store:
            for query in np.random.default_rng(0).permutation(np.concatenate([q[::2] for q in queries.values()])):
                store.search_vectors(query[None], K)
            store.run_maintenance()
            states["warm"] = cells_of(store, vectors, held)
        broken = [f"{state}, {cell}" for state in states for cell, it in states[state].items() if not it["kept"]]
        figures[f"{name}, {index_type}"] = {"broken": broken, "mb_per_1000_units": counted, **states}
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


PARTS = {"recall": recall_part, "cells": cells_part, "small": small_part, "growth": growth_part, "memory": memory_part}


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
