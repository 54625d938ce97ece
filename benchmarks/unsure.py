"""What it brings, and costs, that a search goes on for queries whose results lie late among their candidates.

    python benchmarks/unsure.py [--data FOLDER] [--rows 1000000] [--queries 300] [--json FILE]

The rows are real embeddings and copies of them with noise of length 0.3. Each index is calibrated without questions, as
in a store that has seen none, and asked for 0.95 and 0.99; questions like the data ("in") and of another kind ("out")
are searched one by one with one thread, with and without that rule, in turns. Recall@10 is that against an exact scan.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from harness import load, machine, publish, rounded
from index_bodies import rows_of

from memevolve_gpu.index import fastscan, ivf
from memevolve_gpu.index.registry import build
from memevolve_gpu.planner.nlist import adaptive_nlist
from memevolve_gpu.training.calibration import calibrate
from memevolve_gpu.types import FloatArray, IndexPlan, SearchParams
from memevolve_gpu.utils.vectors import normalize_rows

NOISE, K, SEED = 0.3, 10, 20261129
RULES: dict[str, Any] = {"without": lambda *_found: [], "with": fastscan.unsure}


def copies(vectors: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    out = np.empty((count, vectors.shape[1]), np.float32)
    out[: len(vectors)] = vectors[:count]
    for start in range(len(vectors), count, 50_000):
        part = out[start : start + 50_000]
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        noise *= NOISE / np.linalg.norm(noise, axis=1, keepdims=True)
        part[:] = normalize_rows(vectors[rng.integers(0, len(vectors), len(part))] + noise)
    rng.shuffle(out)
    return out


def set_rule(name: str) -> None:
    for module in (fastscan, ivf):
        vars(module)["unsure"] = RULES[name]


def measured(kind: Any, vectors: FloatArray, asked: dict[str, FloatArray]) -> list[dict[str, Any]]:
    nlist = adaptive_nlist(len(vectors)) if kind == "ivf" else 0
    index = build(IndexPlan(kind, nlist), rows_of(vectors), "l2", seed=SEED)
    truth = {name: index.search(rows, K, SearchParams(exact=True))[0][:, -1] + 1e-5 for name, rows in asked.items()}
    found = []
    for rule in RULES:
        set_rule(rule)
        calibration = calibrate(index, seed=SEED)
        for target in (0.95, 0.99):
            params = calibration.search_params(K, target) or SearchParams(exact=True)
            one: dict[str, Any] = {"index": kind, "asked": target, "rule": rule, "params": str(params)}
            for name, rows in asked.items():
                hits, took = [], []
                for row, limit in zip(rows, truth[name], strict=True):
                    started = time.perf_counter()
                    distances, _ = index.search(row[None], K, params)
                    took.append(1000 * (time.perf_counter() - started))
                    hits.append(float((distances[0] <= limit).mean()))
                p50, p95 = np.percentile(took, (50, 95)).tolist()
                one[name] = rounded({"recall": float(np.mean(hits)), "p50_ms": p50, "p95_ms": p95})
            found.append(one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(SEED)
    data = load(given.data)
    vectors = copies(normalize_rows(data.vectors), given.rows, rng)
    asked = {kind: normalize_rows(rows)[: given.queries] for kind, rows in data.queries.items()}
    command = f"python benchmarks/unsure.py --rows {given.rows} --queries {given.queries}"
    found = [one for kind in ("two_stage", "ivf") for one in measured(kind, vectors, asked)]
    publish({"command": command, "machine": machine(), "found": found}, given.json)


if __name__ == "__main__":
    main()
