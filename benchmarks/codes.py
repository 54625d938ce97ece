"""Compare numbers of 4-bit codes, and reading all codes with visiting lists: what a recall out of distribution takes.

    python benchmarks/codes.py [--data FOLDER] [--json FILE] [--rows N] [--queries N]

For each data set of ``promise.py`` and each number of codes: the candidates with which recall@10 of both kinds of
queries reaches a target at the least cost, and the milliseconds of scan and reranking then (30th percentile of the
thread's processor time, so that other work on the machine disturbs it little). lists: the same for a share of the
lists, over N rows that are the real ones repeated with noise 0.05 of their length.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from harness import Data, load, machine, recall_of, rounded
from promise import data_sets, exact

from memevolve_gpu.index.exact_scan import rerank_rows
from memevolve_gpu.planner.nlist import adaptive_nlist
from memevolve_gpu.utils.vectors import normalize_rows

K = 10
WIDTHS = (20, 30, 40, 60, 80, 100, 150, 200, 300, 450, 700, 1000)
TARGETS = (0.95, 0.98, 0.99, 0.995, 0.999)
SHARES = (0.1, 0.15, 0.25, 0.375, 0.5, 0.75, 1.0)
Propose = Callable[[np.ndarray, int], np.ndarray]


def figures_of(vectors: np.ndarray, queries: dict[str, np.ndarray], propose: Propose) -> dict[int, tuple[float, float]]:
    """By the number of candidates: the lower recall of the two kinds of queries, and milliseconds."""
    truth = {kind: exact(vectors, rows) for kind, rows in queries.items()}
    every, found = np.concatenate(list(queries.values()))[::5], {}
    for width in WIDTHS:
        recalls = [
            recall_of(rerank_rows(rows, vectors, propose(rows, width), K, "l2")[0], truth[kind])
            for kind, rows in queries.items()
        ]
        taken = []
        for row in every:
            started = time.thread_time_ns()
            rerank_rows(row[None], vectors, propose(row[None], width), K, "l2")
            taken.append((time.thread_time_ns() - started) / 1e6)
        found[width] = min(recalls), float(np.quantile(taken, 0.3))
    return found


def proposed(engine: Any, rows: np.ndarray, width: int) -> np.ndarray:
    return np.asarray(engine.search(rows, width)[1])


def least(found: dict[int, tuple[float, float]]) -> dict[str, Any]:
    """For each target the cheapest number of candidates, None where none reaches it."""
    cells: dict[str, Any] = {}
    for target in TARGETS:
        ways = [(ms, width) for width, (recall, ms) in found.items() if recall >= target]
        cells[str(target)] = None if not ways else {"candidates": min(ways)[1], "ms": min(ways)[0]}
    return cells


def codes_part(data: Data, count: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, (vectors, asked) in data_sets(data, False).items():
        dim, queries = vectors.shape[1], {kind: rows[:count] for kind, rows in asked.items()}
        sample = vectors[np.random.default_rng(0).choice(len(vectors), 4096, replace=False)]
        figures[name] = {"rows": len(vectors)}
        for codes in (64, 96, 128, 192) if dim < 500 else (128, 192, 256, 384):
            engine = faiss.IndexPQFastScan(dim, codes, 4, faiss.METRIC_INNER_PRODUCT)
            engine.pq.cp.niter = 10
            engine.train(sample)
            engine.add(vectors)
            figures[name][f"{codes} codes"] = least(figures_of(vectors, queries, partial(proposed, engine)))
            print(name, codes, rounded(figures[name][f"{codes} codes"]), flush=True)
    return figures


def lists_part(data: Data, rows: int, count: int) -> dict[str, Any]:
    rng, dim = np.random.default_rng(5), data.vectors.shape[1]
    noise = rng.standard_normal((rows, dim), dtype=np.float32) * np.float32(0.05 / np.sqrt(dim))
    vectors = normalize_rows(data.vectors[rng.integers(0, len(data.vectors), rows)] + noise)
    queries = {kind: some[:count] for kind, some in data.queries.items()}
    nlist, codes = adaptive_nlist(rows), dim // 4
    sample = vectors[rng.choice(rows, min(rows, 39 * nlist), replace=False)]
    whole = faiss.IndexPQFastScan(dim, codes, 4, faiss.METRIC_INNER_PRODUCT)
    lists = faiss.IndexIVFPQFastScan(faiss.IndexFlatIP(dim), dim, nlist, codes, 4, faiss.METRIC_INNER_PRODUCT)
    lists.by_residual, lists.implem, lists.cp.niter = False, 11, 5
    for engine in (whole, lists):
        engine.pq.cp.niter = 10
        engine.train(sample)
        engine.add(vectors)
    figures: dict[str, Any] = {"rows": rows, "nlist": nlist, "codes": codes}
    figures["all codes"] = least(figures_of(vectors, queries, partial(proposed, whole)))
    for share in SHARES:
        lists.nprobe = max(1, int(nlist * share))
        found = figures_of(vectors, queries, partial(proposed, lists))
        figures[f"{share} of the lists"] = least(found)
    print(json.dumps(rounded(figures)), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--queries", type=int, default=250)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    data = load(arguments.data)
    figures = {
        "machine": machine(),
        "data": data.name,
        "command": f"python benchmarks/codes.py --rows {arguments.rows} --queries {arguments.queries}",
        "codes": codes_part(data, arguments.queries),
        "lists": lists_part(data, arguments.rows, arguments.queries),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(rounded(figures), indent=1) + "\n")


if __name__ == "__main__":
    main()
