"""Compare a GPU's results with the CPU's: recall@10 of real queries against an exact scan on the host.

    python benchmarks/gpu/answers.py [--data ../shared/data] [--device cuda:0 | cpu] [--quick]

Each index is searched whole, with a third of its rows dead, with a filter of a tenth, and after it was extended by its
last tenth; its newest rows are searched as a delta buffer of that length. 1,000 queries like the data and 1,000 out of
distribution; without the data set, generated ones. Lists are probed as calibration finds for a recall of 0.95.
"""

from __future__ import annotations

import argparse
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.common import FAILURES, METRIC, LateError, Setting, built, note, release, rows_of, script, why_not
from harness import load

from memevolve_gpu.index.base import Index
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.exact_scan import exact_scan
from memevolve_gpu.live.delta_buffer import NEVER, DeltaBuffer
from memevolve_gpu.live.view import LiveRows
from memevolve_gpu.planner.nlist import adaptive_nlist
from memevolve_gpu.training.calibration import calibrate
from memevolve_gpu.types import FloatArray, IndexPlan, IntArray, Rows, SearchParams

K, TARGET = 10, 0.95
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

Ask = Callable[[FloatArray], "tuple[FloatArray, IntArray] | None"]
Row = dict[str, Any]


def plans(n: int) -> Iterator[IndexPlan]:
    """The indexes to search; the plans name no device yet."""
    for precision in ("float32", "float16", "int8"):
        yield IndexPlan("exact", precision=precision, engine="torch")
    yield IndexPlan("ivf", adaptive_nlist(n), engine="torch")
    yield IndexPlan("exact", engine="faiss")
    yield IndexPlan("ivf", adaptive_nlist(n), engine="faiss")


def ways(
    index: Index, vectors: FloatArray, params: SearchParams, seed: int
) -> Iterator[tuple[str, Ask, RowFilter | None, int]]:
    """(name, search, rows that may be found, the first of them) of each kind of search."""
    rng, n = np.random.default_rng(seed), index.n
    yield "whole", lambda asked: index.search(asked, K, params), None, 0
    dead = rng.random(n) < 1 / 3
    died, deaths = np.where(dead, 1, NEVER), array("q", np.flatnonzero(dead).tolist())
    alive = LiveRows(died, 1, deaths, len(deaths))
    yield "a third dead", lambda asked: index.search(asked, K, params, alive), RowFilter(~dead), 0
    some = RowFilter(rng.random(n) < 0.1)
    yield "a tenth allowed", lambda asked: index.search(asked, K, params, some), some, 0
    start = n - n // 10
    newest, only = DeltaBuffer(index.dim), RowFilter(np.arange(n) >= start)
    newest.extend(range(start, n), ["-"] * (n - start), vectors[start:])
    yield "newest rows", lambda asked: index.search_delta(newest, newest.n, asked, K), only, start


def lengthened(plan: IndexPlan, rows: Rows, setting: Setting) -> Index:
    """An index over all rows that was built over nine tenths of them."""
    cut = len(rows.slots) - len(rows.slots) // 10
    first = Rows(rows.slots[:cut], rows.id_bytes[: 8 * cut], rows.id_ends[:cut], rows.vectors[:cut])
    later = Rows(rows.slots[cut:], rows.id_bytes[8 * cut :], rows.id_ends[cut:] - 8 * cut, rows.vectors[cut:])
    longer = built(plan, first, setting).extended(later)
    if longer is None:
        raise RuntimeError("the index cannot be extended")
    return longer


def answered(
    ask: Ask, queries: FloatArray, vectors: FloatArray, row_filter: RowFilter | None, first: int
) -> tuple[float, int] | None:
    """Recall@10, ties being hits, and results that are not allowed; None where the device does not answer."""
    truth = exact_scan(queries, vectors, K, METRIC, row_filter)[0]
    answer = ask(queries)
    if answer is None:
        return None
    positions = np.where(answer[1] < 0, -1, answer[1] + first)
    found = ((vectors[np.maximum(positions, 0)] - queries[:, None]) ** 2).sum(axis=2)
    hits = (positions >= 0) & (found <= truth[:, -1:] * (1 + 1e-5) + 1e-6)
    return float(hits.mean()), 0 if row_filter is None else int((~row_filter.test(positions)).sum())


def of_plan(plan: IndexPlan, rows: Rows, queries: dict[str, FloatArray], setting: Setting) -> Iterator[Row]:
    missing = why_not(plan.engine, setting)
    if missing:
        raise RuntimeError(missing)
    index = built(plan, rows, setting)
    params = SearchParams()
    if plan.kind != "exact":
        params = calibrate(index, None, seed=setting.seed).search_params(K, TARGET) or params
    for name, ask, row_filter, first in ways(index, rows.vectors, params, setting.seed):
        yield from _rows(name, ask, row_filter, first, rows.vectors, queries)
    longer = lengthened(plan, rows, setting)
    yield from _rows("lengthened", lambda asked: longer.search(asked, K, params), None, 0, rows.vectors, queries)


def _rows(
    name: str, ask: Ask, row_filter: RowFilter | None, first: int, vectors: FloatArray, queries: dict[str, FloatArray]
) -> Iterator[Row]:
    for kind, own in queries.items():
        found = answered(ask, own, vectors, row_filter, first)
        row: Row = {"asked": name, "queries": kind}
        yield row | ({"host": True} if found is None else {"recall": found[0], "not_allowed": found[1]})


def run(setting: Setting, data: Path) -> dict[str, Any]:
    given, found = load(data), []
    vectors = given.vectors[:2000] if setting.quick else given.vectors
    queries = {kind: own[: 20 if setting.quick else None] for kind, own in given.queries.items()}
    rows = rows_of(np.ascontiguousarray(vectors))
    for plan in plans(len(vectors)):
        head: Row = {"engine": plan.engine, "kind": plan.kind, "precision": plan.precision}
        try:
            setting.check_time()
            for row in of_plan(plan, rows, queries, setting):
                note("  " + "  ".join(str(value) for value in (head | row).values()))
                found.append(setting.kept("answers", head | row))
        except LateError:
            raise
        except FAILURES as error:
            found.append(head | {"skipped": str(error).splitlines()[0]})
            note(f"  {plan.engine} {plan.kind} {plan.precision}: {error}")
        release(setting)
    return {"data": f"{given.name}: the first {len(vectors):,}", "k": K, "answers": found}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--data", type=Path, default=DATA)


def sizes_of(args: argparse.Namespace) -> tuple[Path]:
    return (args.data,)


if __name__ == "__main__":
    script(__doc__, run, sizes_of, add_options)
