"""Measure device memory: the bytes that a plan predicts, that its index reports, and that the card reports.

    python benchmarks/gpu/memory.py [--memory-rows 500000] [--dims 384 768] [--device cuda:0 | cpu] [--quick]

A first index takes the context, the libraries' buffers and the scratch that all indexes share. Then each contender is
built alone, and the card's free memory before and after is compared with the prediction, both without scratch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.common import (
    FAILURES,
    LateError,
    Setting,
    add_dims,
    built,
    clustered,
    module,
    note,
    release,
    rows_of,
    script,
    why_not,
)

from memevolve_gpu.index.faiss_gpu.sizes import TEMPORARY_BYTES
from memevolve_gpu.index.torch_gpu.memory_accounting import SCRATCH, WORKSPACE
from memevolve_gpu.planner.nlist import adaptive_nlist
from memevolve_gpu.types import IndexPlan, Rows, SearchParams

SHARED = {"torch": SCRATCH + WORKSPACE, "faiss": TEMPORARY_BYTES}


def plans(n: int) -> Iterator[IndexPlan]:
    for engine in SHARED:
        for precision in ("float32", "float16", "int8"):
            yield IndexPlan("exact", precision=precision, engine=engine)  # type: ignore[arg-type]
            yield IndexPlan("ivf", adaptive_nlist(n), precision=precision, engine=engine)  # type: ignore[arg-type]


def free_bytes(setting: Setting) -> int:
    release(setting)
    return int(module("torch").cuda.mem_get_info(setting.index)[0]) if setting.on_gpu else 0


def take_buffers(setting: Setting) -> None:
    """Have cuBLAS take its workspace, once a process."""
    if setting.on_gpu:
        x = module("torch").ones((32, 32), device=setting.device)
        (x @ x).sum().item()


def compared(plan: IndexPlan, rows: Rows, setting: Setting) -> dict[str, Any]:
    """Bytes of one plan: predicted, reported by the index, and reported by the card."""
    missing = why_not(plan.engine, setting)
    if missing:
        raise RuntimeError(missing)
    few = rows_of(rows.vectors[:1000].copy())
    first = built(IndexPlan("exact", engine=plan.engine), few, setting)
    first.search(few.vectors[:1], 10, SearchParams())
    take_buffers(setting)
    before = free_bytes(setting)
    index = built(plan, rows, setting)
    taken = before - free_bytes(setting) if setting.on_gpu else None
    predicted = index.plan.device_bytes - SHARED[plan.engine]
    row: dict[str, Any] = {"predicted_bytes": predicted, "said_bytes": index.device_bytes, "card_bytes": taken}
    row["scratch_bytes"] = SHARED[plan.engine]
    row["said_over_predicted"] = index.device_bytes / predicted
    if taken is not None:
        row["card_over_predicted"] = taken / predicted
    return row


def run(setting: Setting, n: int, dims: list[int]) -> dict[str, Any]:
    found = []
    for dim in dims:
        rows = rows_of(clustered(n, dim, setting))
        for plan in plans(n):
            row: dict[str, Any] = {"rows": n, "dim": dim, "engine": plan.engine, "kind": plan.kind}
            row["precision"] = plan.precision
            try:
                setting.check_time()
                row |= compared(plan, rows, setting)
                said, card = row["said_over_predicted"], row.get("card_over_predicted", float("nan"))
                note(
                    f"  {plan.engine} {plan.kind} {plan.precision} {dim}: said {said:.3f}, card {card:.3f} of predicted"
                )
            except LateError:
                raise
            except FAILURES as error:
                row["skipped"] = str(error).splitlines()[0]
                note(f"  {plan.engine} {plan.kind} {plan.precision}: {error}")
            found.append(setting.kept("memory", row))
            release(setting)
    return {"memory": found}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--memory-rows", type=int, default=500_000)


def sizes_of(args: argparse.Namespace) -> tuple[int, list[int]]:
    return (3000, [32]) if args.quick else (args.memory_rows, args.dims)


if __name__ == "__main__":
    script(__doc__, run, sizes_of, add_options, add_dims)
