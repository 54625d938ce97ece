"""Shared parts of the benchmarks: data, fair timing, and the description of the machine."""

from __future__ import annotations

import gzip
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import faiss
import numpy as np

from memevolve_gpu import __version__

__all__ = ["Data", "Hnsw32", "generated", "load", "machine", "recall_of", "rounded", "taking_turns", "wide"]


@dataclass
class Data:
    name: str
    units: list[dict[str, Any]]
    vectors: np.ndarray
    queries: dict[str, np.ndarray]
    texts: list[str]
    folder: Path | None = None
    """Where the data came from; None where it was generated."""


def load(folder: Path) -> Data:
    if not (folder / "tldr_units.jsonl.gz").exists():
        return generated()
    with gzip.open(folder / "tldr_units.jsonl.gz", "rt") as lines:
        units = [json.loads(line) for line in lines]
    with gzip.open(folder / "tldr_queries.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["query"] for line in lines]
    vectors, inside, outside = (
        np.load(folder / f"{name}_minilm_f16.npy").astype("float32") for name in ("tldr", "tldr_queries", "ood_queries")
    )
    return Data("39,320 real memory units, MiniLM", units, vectors, {"in": inside, "out": outside}, texts, folder)


def wide(data: Data) -> Data:
    """Vectors of 1,536 columns from the folder of the data; else four permutations of the data's own, joined."""
    if data.folder and (data.folder / "wide1536_units_f16.npy").exists():
        units, asked, rows = (
            np.load(data.folder / f"wide1536_{name}.npy") for name in ("units_f16", "queries_f16", "rows")
        )
        queries = {"in": asked[:500].astype("float32"), "out": asked[500:].astype("float32")}
        texts = [data.units[row] for row in rows]
        return Data("8,000 real memory units, four layers of MiniLM", texts, units.astype("float32"), queries, [])
    rng = np.random.default_rng(3)
    columns = np.concatenate([rng.permutation(data.vectors.shape[1]) for _ in range(4)])
    queries = {kind: rows[:, columns] for kind, rows in data.queries.items()}
    return Data(f"{data.name}, joined", data.units[:8000], data.vectors[:8000][:, columns], queries, data.texts)


def generated(n: int = 39_320, dim: int = 384, seed: int = 1) -> Data:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((400, dim))

    def draw(m: int) -> np.ndarray:
        rows = centres[rng.integers(0, 400, m)] + rng.standard_normal((m, dim))
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype="float32")

    kinds = ["skill", "skill", "tool", "lesson"]
    units = [{"type": kinds[i % 4], "content": f"generated unit {i}", "tags": [f"t{i % 100}"]} for i in range(n)]
    queries = {"in": draw(1000), "out": draw(1000)}
    return Data(f"{n} generated vectors (400 seeded clusters)", units, draw(n), queries, [f"q{i}" for i in range(1000)])


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean recall@k from squared distances, (nq, >= k) found and (nq, k) exact, both ascending; ties are hits."""
    return float((found[:, : truth.shape[1]] <= truth[:, -1:] * (1 + 1e-5) + 1e-6).mean())


class Hnsw32:
    """faiss HNSW32, built with a beam of 80, as this package builds its own graphs."""

    def __init__(self, vectors: np.ndarray, metric: int = faiss.METRIC_L2) -> None:
        self._index = faiss.IndexHNSWFlat(vectors.shape[1], 32, metric)
        self._index.hnsw.efConstruction = 80
        self._index.add(vectors)
        self._parameters: Any = getattr(faiss, "SearchParametersHNSW")  # noqa: B009 - made by SWIG when faiss is loaded

    def search(self, queries: np.ndarray, k: int, beam: int) -> Any:
        """What faiss returns: distances, or products under inner product, float32 (nq, k), and ids int64 (nq, k)."""
        return self._index.search(queries, k, params=self._parameters(efSearch=beam))

    @staticmethod
    def least(beams: Sequence[int], recall_at: Callable[[int], float], wanted: float) -> tuple[int, float]:
        """The first of ``beams``, ascending, that reaches ``wanted``, or else the last one, and its recall."""
        reached = 0.0
        for beam in beams:
            reached = recall_at(beam)
            if reached >= wanted:
                return beam, reached
        return beams[-1], reached


def taking_turns(calls: dict[str, Callable[[int], Any]], rounds: int, block: int = 1) -> dict[str, float]:
    """Median milliseconds of each call, the names taking turns after every ``block`` calls.

    A block above 1 lets each keep the processor's caches as it would have them to itself; with 1, whatever reads much
    memory (a flat scan of 60 MB) slows down the call that follows it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    for start in range(0, rounds, block):
        for name, call in calls.items():
            for i in range(start, min(start + block, rounds)):
                started = time.perf_counter()
                call(i)
                times[name].append(time.perf_counter() - started)
    return {name: float(np.median(taken)) * 1e3 for name, taken in times.items()}


def machine() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "memevolve_gpu": __version__,
        "faiss": faiss.__version__,
        "apsw": apsw.apsw_version(),
        "sqlite": apsw.sqlite_lib_version(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "threads": 1,
    }


def publish(found: dict[str, Any], out: Path | None) -> None:
    """Print the figures as JSON, and write them to a file where one is named."""
    text = json.dumps(found, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value
