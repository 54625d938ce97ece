"""Measure searches of 1, 16 and 1,024 queries with every engine, and with the CPU of the same machine.

    python benchmarks/gpu/search.py [--rows 50000 1000000 10000000] [--dims 384 768] [--device cuda:0 | cpu] [--quick]

Generated data (see ``common.clustered``), squared L2, ten results. Half of the queries lie as the rows do, half lie
twice as far from the centres. Times are end to end, from queries in host memory to results in host memory. "faiss raw"
is faiss-gpu alone, without the mask, the exact distances and the failure handling of our index. Inverted lists
probe the fewest lists, to an eighth, at which recall@10 reaches 0.95. "1 recorded" is one query as a CUDA graph.
"flashlib" is flash_knn of that library, an optional peer, over float16 rows on the device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.bandwidth import measure
from gpu.common import (
    DESCRIPTION,
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
    stopwatch,
    timed,
    why_not,
)

from memevolve_gpu.index.base import Index
from memevolve_gpu.index.faiss_gpu.index import FaissGpuIndex
from memevolve_gpu.index.torch_gpu.cuda_graphs import record_searches
from memevolve_gpu.planner.nlist import adaptive_nlist
from memevolve_gpu.planner.plan import plan_index, search_params_for
from memevolve_gpu.types import FloatArray, IndexPlan, IntArray, Precision, Rows, SearchParams

K, TARGET, BATCHES = 10, 0.95, (1, 16, 1024)
MOST_PROBES = 2048
CPU_EXACT_VALUES = 800_000_000
"""Components above which the CPU's plain scan is left out: it takes seconds."""
WIDE_VALUES = 2_000_000_000
"""Components above which only one precision of each engine is measured."""
PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "torch": ("float32", "float16", "int8"),
    "faiss": ("float32", "float16"),
}

Ask = Callable[[FloatArray], tuple[FloatArray, IntArray]]
Row = dict[str, Any]


def contenders(n: int, dim: int) -> Iterator[IndexPlan]:
    """What is compared over n rows; the plans name no device yet. The CPU comes last: it takes longest."""
    nlist = adaptive_nlist(n)
    for engine in ("torch", "faiss"):
        for precision in PRECISIONS[engine][: 1 if n * dim > WIDE_VALUES else None]:
            yield IndexPlan("exact", precision=precision, engine=engine)
        yield IndexPlan("ivf", nlist, engine=engine)
    auto = plan_index(count=n, dim=dim, index_type="auto", target_recall=TARGET, budget_bytes=1 << 42)
    yield auto
    if n * dim <= CPU_EXACT_VALUES and auto.kind != "exact":
        yield IndexPlan("exact")


def truth_of(queries: FloatArray, vectors: FloatArray, setting: Setting) -> FloatArray:
    """The K smallest squared distances float32 (nq, K), by float32 products without tf32, row block by row block."""
    torch = module("torch")
    device = setting.device if setting.on_gpu else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    asked = torch.from_numpy(queries).to(device)
    best = torch.full((len(queries), K), float("inf"), device=device)
    for start in range(0, len(vectors), 1 << 18):
        block = torch.from_numpy(vectors[start : start + (1 << 18)]).to(device)
        distances = asked.square().sum(1)[:, None] + block.square().sum(1)[None] - 2 * asked @ block.T
        near = distances.topk(min(K, len(block)), largest=False).values
        best = torch.cat((best, near), 1).topk(K, largest=False).values
    found: FloatArray = best.cpu().numpy()
    return found


def recall(positions: IntArray, queries: FloatArray, vectors: FloatArray, truth: FloatArray) -> float:
    """Share of results no farther than the true tenth; ties are hits."""
    found = vectors[np.maximum(positions, 0)]
    distances = np.where(positions < 0, np.inf, ((found - queries[:, None]) ** 2).sum(axis=2))
    return float((distances <= truth[:, -1:] + 1e-5).mean())


def raw(index: FaissGpuIndex, nprobe: int) -> Ask:
    """faiss-gpu's own search of the faiss object in the index."""
    handle = index.handle
    if handle is None:
        raise RuntimeError("the index has no rows")
    faiss = handle.gpu_resources.faiss

    def ask(queries: FloatArray) -> tuple[FloatArray, IntArray]:
        distances, labels = np.empty((len(queries), K), np.float32), np.empty((len(queries), K), np.int64)
        parameters = None
        if nprobe:
            parameters = faiss.SearchParametersIVF()
            parameters.nprobe = nprobe
        with handle.gpu_resources.using("measuring"):
            ptr = faiss.swig_ptr
            handle.engine.search_c(len(queries), ptr(queries), K, ptr(distances), ptr(labels), parameters)
        return distances, labels

    return ask


def ways(index: Index, queries: FloatArray, vectors: FloatArray, truth: FloatArray) -> Iterator[tuple[str, Ask, int]]:
    """(name, search, lists probed) of each way to search this index."""
    if index.plan.engine == "cpu":
        params = search_params_for(index.plan, index.n, K, TARGET)
        yield "cpu", lambda asked: index.search(asked, K, params), params.nprobe
        return
    makers: dict[str, Callable[[int], Ask]] = {
        index.plan.engine: lambda nprobe: lambda asked: index.search(asked, K, SearchParams(nprobe=nprobe))
    }
    if isinstance(index, FaissGpuIndex):
        own = index
        makers["faiss raw"] = lambda nprobe: raw(own, nprobe)
    for name, make in makers.items():
        nprobe = 0
        if index.kind != "exact":

            def enough(lists: int, make: Callable[[int], Ask] = make) -> bool:
                return recall(make(lists)(queries)[1], queries, vectors, truth) >= TARGET

            nprobe = fewest_lists(enough, min(index.nlist, MOST_PROBES))
        yield name, make(nprobe), nprobe


def fewest_lists(enough: Callable[[int], bool], most: int) -> int:
    """The fewest lists that are ``enough``, to an eighth; ``most`` where no fewer are."""
    probed, few = 1, 0
    while probed < most and not enough(probed):
        few, probed = probed, min(2 * probed, most)
    while probed - few > max(1, probed // 8):
        middle = (few + probed) // 2
        few, probed = (few, middle) if enough(middle) else (middle, probed)
    return probed


def stored_bytes(index: Index, engine: str) -> float:
    """Bytes of one component where it is scanned."""
    narrow = {"float32": 2.0, "float16": 2.0, "int8": 1.0} if engine == "torch" else {"float32": 4.0, "float16": 2.0}
    return narrow.get(index.plan.precision, 1.0)


def in_batches(ask: Ask, queries: FloatArray, batch: int, setting: Setting) -> Row:
    """Times of ``batch`` queries at once, other ones each time."""
    blocks = [np.ascontiguousarray(queries[at : at + batch]) for at in range(0, len(queries), batch)]
    times = timed(lambda turn: ask(blocks[turn % len(blocks)]), setting)
    return times | {"qps": min(batch, len(queries)) / times["ms"] * 1e3}


@contextmanager
def recorded() -> Iterator[None]:
    """Single queries as one CUDA graph each, which a setting asks for."""
    record_searches(True)
    try:
        yield
    finally:
        record_searches(False)


def measured(
    index: Index, data: tuple[FloatArray, FloatArray, FloatArray], setting: Setting, bandwidth: float
) -> Iterator[Row]:
    vectors, queries, truth = data
    for name, ask, nprobe in ways(index, queries, vectors, truth):
        row: Row = {"engine": name, "kind": index.kind, "precision": index.plan.precision, "nlist": index.nlist}
        row |= {"nprobe": nprobe, "device_bytes": index.device_bytes, "times": {}}
        row["recall"] = recall(ask(queries)[1], queries, vectors, truth)
        for batch in BATCHES:
            row["times"][str(batch)] = in_batches(ask, queries, batch, setting)
        if name == "torch" and setting.on_gpu:
            with recorded():
                row["times"]["1 recorded"] = in_batches(ask, queries, 1, setting)
        if index.kind == "exact" and name != "cpu":
            read = index.n * index.dim * stored_bytes(index, name)
            for alone in row["times"].keys() & {"1", "1 recorded"}:
                times = row["times"][alone]
                times["share_of_bandwidth"] = read / (times["ms"] / 1e3) / bandwidth
        row["searched_on"] = index.device  # in the end: had the device failed, the host would have answered
        row["incidents"] = [incident.detail for incident in index.incidents()]
        yield row


def compare(n: int, dim: int, setting: Setting, bandwidth: float) -> list[Row]:
    """All contenders over n rows of ``dim`` dimensions."""
    note(f"{n} rows of {dim} dimensions: generating")
    vectors = clustered(n, dim, setting)
    half = 64 if setting.quick else 512
    queries = np.concatenate([clustered(half, dim, setting, reuse_from=n, spread=spread) for spread in (0.5, 1.0)])
    queries = np.ascontiguousarray(queries[np.random.default_rng(setting.seed).permutation(len(queries))])
    data, rows = (vectors, queries, truth_of(queries, vectors, setting)), rows_of(vectors)
    found: list[Row] = []
    head: Row = {"rows": n, "dim": dim}
    for plan in (*contenders(n, dim), None):
        name, kind = ("flashlib", "exact") if plan is None else (plan.engine, plan.kind)
        try:
            setting.check_time()
            made = by_flashlib(data, setting) if plan is None else of_plan(plan, rows, data, setting, bandwidth)
            found.extend(setting.kept("search", head | row) for row in made)
        except LateError:
            raise
        except FAILURES as error:
            skipped = {"engine": name, "kind": kind, "skipped": str(error).splitlines()[0]}
            found.append(setting.kept("search", head | skipped))
            note(f"  {name} {kind}: {error}")
        release(setting)
    return found


def by_flashlib(data: tuple[FloatArray, FloatArray, FloatArray], setting: Setting) -> Iterator[Row]:
    """The exact search of flashlib, as its documentation shows it; raises RuntimeError where it is not installed."""
    vectors, queries, truth = data
    torch, flashlib = module("torch"), module("flashlib")
    if flashlib is None:
        raise RuntimeError("flashlib is not installed")
    stored = torch.from_numpy(vectors).to(setting.device).to(torch.float16)

    def ask(asked: FloatArray) -> tuple[FloatArray, IntArray]:
        given = torch.from_numpy(np.ascontiguousarray(asked)).to(setting.device).to(torch.float16)
        distances, positions = flashlib.flash_knn(given, stored, K)
        return distances.float().cpu().numpy(), positions.long().cpu().numpy()

    row: Row = {"engine": "flashlib", "kind": "exact", "precision": "float16", "nlist": 0, "nprobe": 0, "build_s": 0.0}
    row |= {"device_bytes": stored.nbytes, "searched_on": setting.device, "incidents": []}
    row["recall"] = recall(ask(queries)[1], queries, vectors, truth)
    row["times"] = {str(batch): in_batches(ask, queries, batch, setting) for batch in BATCHES}
    show(row)
    yield row


def of_plan(
    plan: IndexPlan,
    rows: Rows,
    data: tuple[FloatArray, FloatArray, FloatArray],
    setting: Setting,
    bandwidth: float,
) -> Iterator[Row]:
    missing = why_not(plan.engine, setting)
    if missing:
        raise RuntimeError(missing)
    started = time.perf_counter()
    index = built(plan, rows, setting)
    seconds = stopwatch(started)
    for row in measured(index, data, setting, bandwidth):
        show(row | {"build_s": seconds})
        yield row | {"build_s": seconds}


def show(row: Row) -> None:
    times = "  ".join(f"{batch}: {one['ms']:.3f} ms, {one['qps']:,.0f}/s" for batch, one in row["times"].items())
    share = row["times"].get("1", {}).get("share_of_bandwidth")
    note(
        f"  {row['engine']:<9} {row['kind']:<9} {row['precision']:<8} recall {row['recall']:.4f} "
        f"nprobe {row['nprobe']:<5} built in {row['build_s']:.1f} s  {times}"
        + (f"  {share:.0%} of bandwidth" if share else "")
    )


def run(setting: Setting, rows: list[int], dims: list[int], most_values: int) -> dict[str, Any]:
    """The whole table; combinations of more than ``most_values`` components are left out."""
    bandwidth = measure(setting)
    release(setting)
    table: list[Row] = []
    for n in rows:
        for dim in dims:
            if n * dim <= most_values:
                table += compare(n, dim, setting, bandwidth["bytes_per_s"])
                release(setting)
    return {"data": DESCRIPTION, "k": K, "bandwidth": bandwidth, "search": table}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--rows", type=int, nargs="+", default=[50_000, 1_000_000, 10_000_000])
    made.add_argument("--most-values", type=int, default=4_000_000_000, help="rows times dimensions to go up to")


def sizes_of(args: argparse.Namespace) -> tuple[list[int], list[int], int]:
    return ([2000], [32], args.most_values) if args.quick else (args.rows, args.dims, args.most_values)


if __name__ == "__main__":
    script(__doc__, run, sizes_of, add_options, add_dims)
