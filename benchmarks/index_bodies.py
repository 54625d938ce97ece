"""Measure each kind of index alone: recall in and out of distribution, time against IndexFlat, masks, build, snapshot.

    python benchmarks/index_bodies.py [--data FOLDER] [--json FILE] [--target 0.99] [--metric l2]

One thread, medians; each search takes turns with IndexFlat within one loop, so that both see the same load. Data: the
folder of real units named by --data (default ``../shared/data``), otherwise seeded clustered vectors.
Indexes search with the parameters of the planner's table for --target.
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
from harness import load, machine, rounded, taking_turns

from memevolve_gpu.index.base import Index
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.registry import build
from memevolve_gpu.index.snapshot_file import SnapshotInfo, read_snapshot, write_snapshot
from memevolve_gpu.planner.nlist import adaptive_nlist
from memevolve_gpu.planner.plan import search_params_for
from memevolve_gpu.types import FloatArray, IndexPlan, Metric, Rows

K = 10
MASKS = {"all": 1.0, "a third": 1 / 3, "1 %": 0.01}
MASKED_QUERIES = 200


def plans(n: int) -> dict[str, IndexPlan]:
    nlist = adaptive_nlist(n)
    return {
        "exact": IndexPlan("exact"),
        "two_stage": IndexPlan("two_stage"),
        "ivf": IndexPlan("ivf", nlist=nlist),
        "hnsw": IndexPlan("hnsw"),
    }


def rows_of(vectors: FloatArray) -> Rows:
    ids = [f"unit_{i}".encode() for i in range(len(vectors))]
    ends = np.cumsum([len(i) for i in ids], dtype=np.int64)
    return Rows(np.arange(len(vectors), dtype=np.int64), np.frombuffer(b"".join(ids), np.uint8), ends, vectors)


def flat_of(vectors: FloatArray, metric: Metric) -> Any:
    flat = faiss.IndexFlat(vectors.shape[1], faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    flat.add(vectors)
    return flat


def recall(positions: np.ndarray, queries: np.ndarray, vectors: np.ndarray, truth: np.ndarray, metric: Metric) -> float:
    """Hits by the true distance of what was returned, so that ties count and a narrow precision's error does not."""
    found = vectors[positions]
    if metric == "l2":
        distances = ((found - queries[:, None]) ** 2).sum(axis=2)
    else:
        distances = -np.einsum("qkd,qd->qk", found, queries)
    return float((distances <= truth[:, -1:] + 1e-5).mean())


def truth_of(queries: FloatArray, vectors: FloatArray, metric: Metric) -> np.ndarray:
    distances: np.ndarray = flat_of(vectors, metric).search(queries, K)[0]
    return distances if metric == "l2" else -distances


def searches(
    index: Index, flat: Any, queries: dict[str, FloatArray], row_filter: RowFilter | None, target: float
) -> dict[str, Any]:
    vectors, metric = flat.reconstruct_n(0, flat.ntotal), index.metric
    params = search_params_for(index.plan, index.n, K, target)
    kept = vectors if row_filter is None else vectors[row_filter.rows]
    figures: dict[str, Any] = {}
    for name, rows in queries.items():
        some = rows if row_filter is None else rows[:MASKED_QUERIES]
        positions = index.search(some, K, params, row_filter)[1]
        figures[f"recall {name}"] = recall(positions, some, vectors, truth_of(some, kept, metric), metric)
        times = taking_turns(
            {
                "flat": lambda i, rows=rows: flat.search(rows[i % len(rows)][None], K),  # type: ignore[misc]
                "body": lambda i, rows=rows: index.search(rows[i % len(rows)][None], K, params, row_filter),  # type: ignore[misc]
            },
            60,
        )
        figures[f"ms {name}"], figures[f"flat ms {name}"] = times["body"], times["flat"]
        figures[f"ratio {name}"] = times["body"] / times["flat"]
    return figures


def snapshot_seconds(index: Index) -> dict[str, float]:
    info = SnapshotInfo("bench", 1, 1, index.n, index.plan, index.metric, index.dim, time.time(), 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "body.snapshot"
        started = time.perf_counter()
        write_snapshot(path, index, info)
        written = time.perf_counter()
        read_snapshot(path, store_id="bench", dim=index.dim, metric=index.metric)
        return {"write s": written - started, "read s": time.perf_counter() - written}


def measured(
    name: str, plan: IndexPlan, rows: Rows, flat: Any, queries: dict[str, FloatArray], args: Any
) -> dict[str, Any]:
    started = time.perf_counter()
    index = build(plan, rows, args.metric, seed=1)
    figures: dict[str, Any] = {"body": name, "build s": time.perf_counter() - started}
    figures["bytes per unit"] = index.nbytes / index.n
    figures |= snapshot_seconds(index)
    rng = np.random.default_rng(1)
    for mask, share in MASKS.items():
        row_filter = None if share == 1.0 else RowFilter(rng.random(index.n) < share)
        figures[mask] = searches(index, flat, queries, row_filter, args.target)
    return figures


def show(figures: dict[str, Any]) -> None:
    print(
        f"{figures['body']:<18} build {figures['build s']:5.1f} s, {figures['bytes per unit']:5.0f} B/unit, "
        f"snapshot written {figures['write s']:.2f} s, read {figures['read s']:.3f} s"
    )
    for mask in MASKS:
        line = figures[mask]
        cells = [
            f"{name}: {line[f'recall {name}']:.4f} / {line[f'ms {name}']:.3f} ms = {line[f'ratio {name}']:.3f} of flat"
            for name in ("in", "out")
        ]
        print(f"    {mask:<8} " + "   ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--metric", choices=["l2", "cosine", "ip"], default="l2")
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    data = load(args.data)
    vectors, queries = data.vectors, data.queries
    if args.metric == "cosine":
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        queries = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in queries.items()}
    flat, rows = flat_of(vectors, args.metric), rows_of(vectors)
    print(
        f"{data.name}, metric {args.metric}, target {args.target}, {K} results; recall / median ms = ratio to IndexFlat"
    )
    results = []
    for name, plan in plans(len(vectors)).items():
        results.append(measured(name, plan, rows, flat, queries, args))
        show(results[-1])
    if args.json:
        report = {
            "machine": machine(),
            "data": data.name,
            "metric": args.metric,
            "target": args.target,
            "bodies": results,
        }
        args.json.write_text(json.dumps(rounded(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
