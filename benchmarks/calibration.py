"""Measure the recall and the search time that calibration gives, cold and warm.

    python benchmarks/calibration.py [--data FOLDER] [--json FILE] [--rows 39320 10000 5000] [--seeds 3] [--quick]

Cold: the store has seen no query, and is measured on all queries in distribution and out of it. Warm: half of each went
through the reservoir, and the other half is measured. Recall@10 is the lowest and the mean over the seeds of the
calibration, against exact search; ties are hits. One thread, medians. Every search takes turns with faiss IndexFlat and
with faiss HNSW32, whose beam is the smallest that reaches the same recall on the same queries, known from those
queries. Each search follows a scan by IndexFlat, so that none finds its memory in a cache that another search filled.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from harness import Hnsw32, load, machine, rounded, taking_turns

from memevolve_gpu.index.base import Index
from memevolve_gpu.index.registry import build
from memevolve_gpu.planner.nlist import adaptive_nlist
from memevolve_gpu.planner.plan import search_params_for
from memevolve_gpu.training.calibration import Calibration, calibrate
from memevolve_gpu.training.recall import recall_of
from memevolve_gpu.training.reservoir import Reservoir
from memevolve_gpu.types import FloatArray, IndexPlan, Rows, SearchParams
from memevolve_gpu.utils.vectors import normalize_rows

K = 10
KINDS = ("ivf", "two_stage", "hnsw")
ALL_K = (1, 5, 10, 20, 50, 100)
TARGETS = (0.95, 0.99)
BEAMS = (10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048)
ROUNDS = 150


def index_of(kind: str, vectors: FloatArray) -> Index:
    ids = [f"unit_{i}".encode() for i in range(len(vectors))]
    ends = np.cumsum([len(i) for i in ids], dtype=np.int64)
    rows = Rows(np.arange(len(vectors), dtype=np.int64), np.frombuffer(b"".join(ids), np.uint8), ends, vectors)
    nlist = adaptive_nlist(len(vectors)) if kind == "ivf" else 0
    return build(IndexPlan(kind, nlist), rows, "cosine", seed=1)  # type: ignore[arg-type]


def streamed(queries: dict[str, FloatArray], seed: int) -> FloatArray:
    """Half of each set, shuffled together, through a reservoir."""
    asked = np.concatenate([rows[::2] for rows in queries.values()])
    reservoir = Reservoir(asked.shape[1], seed=seed)
    for row in np.random.default_rng(seed).permutation(len(asked)):
        reservoir.offer(asked[row][None])
    return reservoir.sample()


class Beams(Hnsw32):
    """faiss HNSW32 for comparison: the smallest beam for a recall, and its searches."""

    def __init__(self, index: Index) -> None:
        super().__init__(index.vectors, faiss.METRIC_INNER_PRODUCT)

    def least_beam(self, queries: FloatArray, truth: FloatArray, recall: float) -> int:
        """The last beam where none reaches it."""
        return self.least(BEAMS, lambda beam: recall_of(self._distances(queries, beam), truth), recall)[0]

    def _distances(self, queries: FloatArray, beam: int) -> FloatArray:
        return np.asarray(np.maximum(1.0 - self.search(queries, K, beam)[0], 0.0), dtype=np.float32)


def judged(index: Index, found: Sequence[Calibration], queries: FloatArray, truth: FloatArray, target: float) -> Any:
    """Recall@10 at each seed's effort, and the targets that were missed at any k by more than a tenth of the miss."""
    param_sets = [each.search_params(K, target) or search_params_for(index.plan, index.n, K, target) for each in found]
    recalls = [recall_of(index.search(queries, K, params)[0], truth[:, :K]) for params in param_sets]
    short = 0
    for each in found:
        for k in ALL_K:
            params = each.search_params(k, target) or search_params_for(index.plan, index.n, k, target)
            short += recall_of(index.search(queries, k, params)[0], truth[:, :k]) < target - 0.1 * (1 - target)
    return {
        "recall": min(recalls),
        "mean recall": float(np.mean(recalls)),
        "short of": [short, len(found) * len(ALL_K)],
    }


def timed(
    index: Index,
    params: SearchParams,
    plain: SearchParams,
    flat: Any,
    beams: Beams,
    queries: FloatArray,
    beam: int,
    rounds: int,
) -> dict[str, float]:

    def row(i: int) -> Any:
        return queries[i % len(queries)][None]

    return taking_turns(
        {
            "flat": lambda i: flat.search(row(i), K),
            "body": lambda i: index.search(row(i), K, params),
            "flat again": lambda i: flat.search(row(i), K),
            "uncalibrated": lambda i: index.search(row(i), K, plain),
            "and again": lambda i: flat.search(row(i), K),
            "hnsw32": lambda i: beams.search(row(i), K, beam),
        },
        rounds,
    )


def state_figures(
    index: Index, flat: Any, beams: Beams, queries: dict[str, FloatArray], found: list[Calibration], rounds: int
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "source": found[0].source,
        "questions": found[0].queries,
        "seconds": float(np.median([each.seconds for each in found])),
    }
    truths = {name: index.search(rows, 100, SearchParams(exact=True))[0] for name, rows in queries.items()}
    for target in TARGETS:
        plain = search_params_for(index.plan, index.n, K, target)
        params = found[0].search_params(K, target) or plain
        figures[str(target)] = {"effort": [params.nprobe, params.rerank, params.ef, params.exact]}
        for name, rows in queries.items():
            line = judged(index, found, rows, truths[name], target)
            own = recall_of(index.search(rows, K, params)[0], truths[name][:, :K])
            beam = beams.least_beam(rows, truths[name][:, :K], own)
            line |= {"hnsw32 ef": beam, "ms": timed(index, params, plain, flat, beams, rows, beam, rounds)}
            figures[str(target)][name] = line
    return figures


def measured(kind: str, vectors: FloatArray, queries: dict[str, FloatArray], args: Any) -> dict[str, Any]:
    index, rounds = index_of(kind, vectors), 30 if args.quick else ROUNDS
    flat = faiss.IndexFlatIP(index.dim)
    flat.add(vectors)
    beams = Beams(index)
    halves = {name: rows[1::2] for name, rows in queries.items()}
    seeds = range(1 if args.quick else args.seeds)
    cold = [calibrate(index, seed=seed) for seed in seeds]
    warm = [calibrate(index, streamed(queries, seed), seed=seed) for seed in seeds]
    return {
        "body": kind,
        "rows": index.n,
        "nlist": index.nlist,
        "cold": state_figures(index, flat, beams, queries, cold, rounds),
        "warm": state_figures(index, flat, beams, halves, warm, rounds),
    }


def show(figures: dict[str, Any]) -> None:
    print(f"{figures['body']} of {figures['rows']} rows, nlist {figures['nlist']}")
    for state in ("cold", "warm"):
        line = figures[state]
        print(f"  {state}: {line['questions']} {line['source']}, {line['seconds']:.2f} s")
        for target in map(str, TARGETS):
            for name in ("in", "out"):
                cell = line[target][name]
                ms = cell["ms"]
                print(
                    f"    {target:>5} {name:<3} effort {'/'.join(map(str, line[target]['effort'][:3])):>11} "
                    f"recall {cell['recall']:.4f} (mean {cell['mean recall']:.4f}) "
                    f"{ms['body']:.3f} ms = {ms['body'] / ms['flat']:.3f} of flat, "
                    f"{ms['body'] / ms['uncalibrated']:.2f} of uncalibrated, "
                    f"{ms['body'] / ms['hnsw32']:.2f} of HNSW32 ef {cell['hnsw32 ef']}; "
                    f"short at {cell['short of'][0]} of {cell['short of'][1]} k"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[39_320, 10_000, 5_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    data = load(args.data)
    print(f"{data.name}; one thread")
    vectors = normalize_rows(data.vectors)
    queries = {name: normalize_rows(rows) for name, rows in data.queries.items()}
    results, started = [], time.perf_counter()
    for rows in args.rows:
        chosen = np.sort(np.random.default_rng(0).choice(len(vectors), min(rows, len(vectors)), replace=False))
        for kind in args.kinds:
            results.append(measured(kind, np.ascontiguousarray(vectors[chosen]), queries, args))
            show(results[-1])
    print(f"{time.perf_counter() - started:.0f} s in all")
    if args.json:
        args.json.write_text(
            json.dumps(rounded({"machine": machine(), "data": data.name, "results": results}), indent=1)
        )


if __name__ == "__main__":
    main()
