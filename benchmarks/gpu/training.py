"""Measure k-means of the torch engine, flashlib and faiss-gpu: seconds, and how good the centroids are.

    python benchmarks/gpu/training.py [--training-rows 1000000] [--training-dim 384] [--centroids 4096] [--quick]

Ten rounds of Lloyd's algorithm over the same generated rows. Seconds run from rows in host memory to centroids in host
memory. The objective is the mean squared distance of all rows to the nearest centroid, computed the same way, in
float32, for all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.common import (
    FAILURES,
    LateError,
    Setting,
    clustered,
    module,
    note,
    release,
    script,
    stopwatch,
    why_not,
)

from memevolve_gpu.types import FloatArray

ROUNDS = 10
CPU_ROWS = 200_000
"""Rows up to which faiss on the CPU is measured as well."""

Train = Callable[[FloatArray, int, Setting], FloatArray]


def by_torch(vectors: FloatArray, count: int, setting: Setting) -> FloatArray:
    from memevolve_gpu.index.torch_gpu.ivf import train
    from memevolve_gpu.index.torch_gpu.kernel_ops import Operations

    torch = module("torch")
    device = torch.device(setting.device)
    x = torch.from_numpy(vectors).to(device).to(torch.float16)
    found = train(x, count, seed=setting.seed, operations=Operations(device, note), iterations=ROUNDS)
    centroids: FloatArray = found[:, : vectors.shape[1]].cpu().numpy()
    return centroids


def by_flashlib(vectors: FloatArray, count: int, setting: Setting) -> FloatArray:
    """flash_kmeans as its documentation shows it, in float16."""
    torch, flashlib = module("torch"), module("flashlib")
    if flashlib is None:
        raise RuntimeError("flashlib is not installed")
    x = torch.from_numpy(vectors).to(setting.device).to(torch.float16)
    torch.manual_seed(setting.seed)
    centroids: FloatArray = flashlib.flash_kmeans(x, count, max_iters=ROUNDS, tol=-1.0)[1].float().cpu().numpy()
    return centroids


def by_faiss_gpu(vectors: FloatArray, count: int, setting: Setting) -> FloatArray:
    """faiss' k-means with assignments on the GPU, as its GPU indexes train."""
    from memevolve_gpu.index.faiss_gpu.resources import resources_of

    owner = resources_of(setting.device)
    with owner.building("measuring", 0, keep=False) as handle:
        handle.make("GpuIndexFlat", vectors.shape[1], owner.faiss.METRIC_L2)
        return _clustered_by(owner.faiss, vectors, count, setting, handle.engine)


def by_faiss_cpu(vectors: FloatArray, count: int, setting: Setting) -> FloatArray:
    if len(vectors) > CPU_ROWS:
        raise RuntimeError(f"left out above {CPU_ROWS} rows: it takes minutes")
    faiss = module("faiss")
    return _clustered_by(faiss, vectors, count, setting, faiss.IndexFlatL2(vectors.shape[1]))


def _clustered_by(faiss: Any, vectors: FloatArray, count: int, setting: Setting, index: Any) -> FloatArray:
    clustering = faiss.Clustering(vectors.shape[1], count)
    clustering.niter, clustering.seed = ROUNDS, setting.seed
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(vectors)
    clustering.train(vectors, index)
    centroids: FloatArray = faiss.vector_to_array(clustering.centroids).reshape(count, -1)
    return centroids


WAYS: dict[str, tuple[str, Train]] = {
    "torch engine": ("torch", by_torch),
    "flashlib": ("torch", by_flashlib),
    "faiss-gpu": ("faiss", by_faiss_gpu),
    "faiss-cpu": ("cpu", by_faiss_cpu),
}


def objective(vectors: FloatArray, centroids: FloatArray, setting: Setting) -> float:
    """Mean squared distance of the rows to their nearest centroid."""
    torch = module("torch")
    device = setting.device if setting.on_gpu else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    own, total = torch.from_numpy(np.ascontiguousarray(centroids)).to(device), 0.0
    for start in range(0, len(vectors), 1 << 16):
        block = torch.from_numpy(vectors[start : start + (1 << 16)]).to(device)
        nearest = (own.square().sum(1)[None] - 2 * block @ own.T).min(1).values
        total += float((nearest + block.square().sum(1)).double().sum())
    return total / len(vectors)


def measured(train: Train, vectors: FloatArray, count: int, setting: Setting) -> dict[str, Any]:
    """The best of two runs after a short one that compiles what is compiled at run time."""
    train(np.ascontiguousarray(vectors[: 40 * count]), count, setting)
    taken, centroids = [], np.empty((0, 0), np.float32)
    for _ in range(1 if setting.quick else 2):
        release(setting)
        started = time.perf_counter()
        centroids = train(vectors, count, setting)
        taken.append(stopwatch(started))
    return {"seconds": min(taken), "all_seconds": taken, "objective": objective(vectors, centroids, setting)}


def run(setting: Setting, n: int, dim: int, count: int) -> dict[str, Any]:
    vectors = clustered(n, dim, setting)
    found: dict[str, Any] = {}
    for name, (engine, train) in WAYS.items():
        try:
            setting.check_time()
            missing = why_not(engine, setting)
            if missing:
                raise RuntimeError(missing)
            found[name] = measured(train, vectors, count, setting)
            note(f"  {name:<28} {found[name]['seconds']:.2f} s, objective {found[name]['objective']:.5f}")
        except LateError:
            raise
        except FAILURES as error:
            found[name] = {"skipped": str(error).splitlines()[0]}
            note(f"  {name:<28} {error}")
        setting.kept("training", {"rows": n, "dim": dim, "centroids": count, "training": {name: found[name]}})
        release(setting)
    return {"rows": n, "dim": dim, "centroids": count, "rounds": ROUNDS, "training": found}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--training-rows", type=int, default=1_000_000)
    made.add_argument("--training-dim", type=int, default=384)
    made.add_argument("--centroids", type=int, default=4096)


def sizes_of(args: argparse.Namespace) -> tuple[int, int, int]:
    return (4000, 32, 32) if args.quick else (args.training_rows, args.training_dim, args.centroids)


if __name__ == "__main__":
    script(__doc__, run, sizes_of, add_options)
