"""Measure the store alone, one thread, medians, beside faiss IndexFlat and a bare SQLite commit in the same run.

    python benchmarks/foundation.py [--data FOLDER] [--json FILE] [--quick]

Data: the folder of real units named by --data (default ``../shared/data``), otherwise seeded clustered vectors; the
output says which. Every ratio comes from calls that take turns within one loop. Resident memory is the growth of a
process that has already opened and searched a small store; it includes the mapped pages that one search touches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import apsw
import faiss
import numpy as np
from harness import Data, load, machine, rounded, taking_turns

from memevolve_gpu import StorageConfig, VectorStore

K = 10
WARM_UP = 600
"""Single writes before the measured ones: the first 16 MB of a new write-ahead log lengthen its file, which costs each
sync more; after that the log is written over."""
BLOCK = 20
"""Calls of one kind before the other's turn, where a flat scan of everything would empty the caches for the other."""


def one_row(queries: np.ndarray) -> Callable[[int], np.ndarray]:
    """Query i, round and round, as float32 (1, dim)."""
    return lambda i: queries[i % len(queries)][None, :]


def flat_search(flat: Any, row: Callable[[int], np.ndarray], i: int) -> Any:
    return flat.search(row(i), K)


def store_search(store: VectorStore, row: Callable[[int], np.ndarray], filters: Any, i: int) -> Any:
    return store.search_vectors(row(i), K, filters=filters)


def recall(ids: list[list[str | None]], truth: np.ndarray) -> float:
    hits = [len({f"unit_{t}" for t in row} & set(found)) / len(row) for found, row in zip(ids, truth, strict=True)]
    return float(np.mean(hits))


def search_figures(store: VectorStore, data: Data, rounds: int) -> dict[str, Any]:
    flat = faiss.IndexFlatL2(data.vectors.shape[1])
    flat.add(data.vectors)
    result: dict[str, Any] = {"index": store.statistics()["index"]}
    for name, queries in data.queries.items():
        truth = flat.search(queries, K)[1]
        row = one_row(queries)
        times = taking_turns(
            {
                "flat": partial(flat_search, flat, row),
                "search_vectors": partial(store_search, store, row, None),
            },
            rounds,
            BLOCK,
        )
        times |= taking_turns(
            {
                "search": lambda i: store.search(data.texts[i % len(data.texts)], K),
                "search_units": lambda i: store.search_units(data.texts[i % len(data.texts)], K),
            },
            rounds,
        )
        found = store.search_vectors(queries, K)[1]
        result[name] = {
            "recall@10": recall(found, truth),
            "ms": times,
            "share_of_flat": times["search_vectors"] / times["flat"],
            "payload_extra_ms": times["search_units"] - times["search"],
        }
    return result


def filter_figures(store: VectorStore, data: Data, rounds: int) -> dict[str, Any]:
    flat = faiss.IndexFlatL2(data.vectors.shape[1])
    flat.add(data.vectors)
    numbers = np.array([unit["metadata"]["part"] for unit in data.units])
    result: dict[str, Any] = {}
    for name, below in (("a third", 33), ("1 %", 1)):
        keep = np.flatnonzero(numbers < below)
        part = faiss.IndexFlatL2(data.vectors.shape[1])
        part.add(data.vectors[keep])
        filters = {"metadata.part": {"lt": below}}
        started = time.perf_counter()
        store.search_vectors(data.queries["in"][:1], K, filters=filters)
        first = (time.perf_counter() - started) * 1e3
        result[name] = {"units": len(keep), "first_ms": first}
        for kind, queries in data.queries.items():
            row = one_row(queries)
            times = taking_turns(
                {
                    "flat": partial(flat_search, flat, row),
                    "filtered": partial(store_search, store, row, filters),
                },
                rounds,
                BLOCK,
            )
            found = store.search_vectors(queries, K, filters=filters)[1]
            truth = keep[part.search(queries, K)[1]]
            result[name][kind] = {
                "recall@10": recall(found, truth),
                "ms": times,
                "share_of_flat": times["filtered"] / times["flat"],
            }
    return result


def write_figures(folder: Path, data: Data, rounds: int) -> dict[str, Any]:
    """Single durable stores and deletes against a bare commit of the same row, at 0 and at many units."""
    table = {text: data.vectors[i % len(data.vectors)] for i, text in enumerate(data.texts)}
    result: dict[str, Any] = {}
    for name, count in (("at 1,000 units", 1000), ("at all units", len(data.units))):
        prefix = folder / f"write{count}"
        config = StorageConfig(max_memory_units=10**6, background=False)
        with VectorStore(prefix, lambda text: table.get(text, data.vectors[0]), 384, storage_config=config) as store:
            store.store_batch(data.units[:count], data.vectors[:count])
            store.run_maintenance()
            result[name] = single_writes(store, folder / f"bare{count}.db", data, rounds)
    return result


def single_writes(store: VectorStore, bare_path: Path, data: Data, rounds: int) -> dict[str, float]:
    bare = apsw.Connection(str(bare_path))
    bare.pragma("journal_mode", "wal")
    bare.pragma("synchronous", "FULL")
    bare.execute("create table row (slot integer primary key, id text unique, unit text, vector blob)")
    raw = data.vectors[0].tobytes()

    def insert(i: int) -> None:
        unit = {**data.units[i % len(data.units)], "id": f"x{i}"}
        bare.execute("insert or replace into row (id, unit, vector) values (?, ?, ?)", (f"x{i}", json.dumps(unit), raw))

    for i in range(WARM_UP):
        insert(-i)
        store.store({**data.units[i % len(data.units)], "id": f"x{-i}"})
    times = taking_turns(
        {
            "bare commit": insert,
            "store": lambda i: store.store({**data.units[i % len(data.units)], "id": f"x{i}"}),
        },
        rounds,
    )
    times |= taking_turns(
        {
            "bare delete": lambda i: bare.execute("delete from row where id = ?", (f"x{i}",)),
            "delete": lambda i: store.delete(f"x{i}"),
        },
        rounds,
    )
    times["store/bare"] = times["store"] / times["bare commit"]
    times["delete/bare"] = times["delete"] / times["bare delete"]
    return times


def bulk_figures(folder: Path, data: Data, repeats: int) -> dict[str, float]:
    rates = []
    for i in range(repeats):
        config = StorageConfig(max_memory_units=10**6, background=False)
        with VectorStore(folder / f"bulk{i}", None, 384, storage_config=config) as store:
            started = time.perf_counter()
            store.store_batch(data.units, data.vectors)
            rates.append(len(data.units) / (time.perf_counter() - started))
    return {"units_per_s": float(np.median(rates)), "slowest": min(rates), "fastest": max(rates)}


def searched(store: VectorStore, queries: np.ndarray, threads: int, done: Callable[[], bool]) -> dict[str, float]:
    """Searches a second of so many threads together, and how long each search took."""
    row = one_row(queries)
    times: list[list[float]] = [[] for _ in range(threads)]

    def search(number: int) -> None:
        i = number * 997
        while not done():
            started = time.perf_counter()
            store_search(store, row, None, i)
            times[number].append(time.perf_counter() - started)
            i += 1

    workers = [threading.Thread(target=search, args=(number,)) for number in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    taken = np.concatenate(times) * 1e3
    p50, p99 = np.percentile(taken, [50, 99])
    rate = len(taken) / (time.perf_counter() - started)
    return {"per_s": rate, "p50_ms": p50, "p99_ms": p99, "p99/p50": p99 / p50}


def seconds(count: float) -> Callable[[], bool]:
    end = time.perf_counter() + count
    return lambda: time.perf_counter() > end


def thread_figures(folder: Path, data: Data, length: float) -> dict[str, Any]:
    """Threads that search at once, in turns; then one thread while another writes and the background rebuilds."""
    config = StorageConfig(max_memory_units=10**6, background=True, target_recall=0.99)
    queries, half = data.queries["in"], len(data.units) // 2
    with VectorStore(folder / "threads", None, 384, storage_config=config) as store:
        store.store_batch(data.units[:half], data.vectors[:half])
        store.run_maintenance()
        searched(store, queries, 1, seconds(length))
        result: dict[str, Any] = {}
        for turn in ("first", "second"):
            for threads in (1, 2, 4, 8):
                result[f"{threads} threads, {turn}"] = searched(store, queries, threads, seconds(length))
        ended = threading.Event()

        def write() -> None:
            for start in range(half, len(data.units), 500):
                store.store_batch(data.units[start : start + 500], data.vectors[start : start + 500])
                time.sleep(0.2)
            ended.set()

        writer = threading.Thread(target=write)
        writer.start()
        result["1 thread, writes and rebuilds"] = searched(store, queries, 1, ended.is_set)
        writer.join()
    return result


OPENER = """
import gc, json, os, sys, time
os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np, faiss
from memevolve_gpu import StorageConfig, VectorStore
import memevolve_gpu.components.store.vector_store
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
config = StorageConfig(max_memory_units=10**6, background=False, target_recall=0.99)
with VectorStore(sys.argv[3], None, storage_config=config) as small:  # what the first store of a process takes once
    small.search_vectors(np.ones((1, 384)), 10)
query = np.load(sys.argv[2])[:1]
gc.collect()
before = resident()
started = time.perf_counter()
store = VectorStore(sys.argv[1], None, storage_config=config)
opened = time.perf_counter() - started
store.search_vectors(query, 10)
answered = time.perf_counter() - started
gc.collect()
grown = resident() - before
health = store.get_storage_health()
print(json.dumps({"open_s": opened, "first_answer_s": answered, "resident_growth_mb": grown / 2**20,
    "counted_mb": health["memory_usage_mb"], "kind": store.index.kind,
    "counted_mb_per_1000": health["memory_usage_mb"] / store.count() * 1000,
    "resident_mb_per_1000": grown / 2**20 / store.count() * 1000}))
"""


def open_figures(prefix: Path, data: Data, repeats: int) -> dict[str, Any]:
    query, small = prefix.parent / "query.npy", prefix.parent / "small"
    with VectorStore(small, None, 384, storage_config=StorageConfig(background=False)) as store:
        store.store_batch(data.units[:2000], data.vectors[:2000])
        store.run_maintenance()
    np.save(query, data.queries["in"])

    def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: float(np.median([r[key] for r in runs])) if key != "kind" else runs[0][key] for key in runs[0]}

    def run() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", OPENER, prefix, query, small], check=True, capture_output=True, text=True
        )
        parsed: dict[str, Any] = json.loads(done.stdout)
        return parsed

    with_snapshot = [run() for _ in range(repeats)]
    without = []
    for _ in range(repeats):
        Path(f"{prefix}.snapshot").unlink(missing_ok=True)
        without.append(run())
    return {"with snapshot": median_of(with_snapshot), "derived files deleted": median_of(without)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--index-type", nargs="+", default=["ivf", "auto", "hnsw"])
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rounds, repeats = (200, 1) if arguments.quick else (1000, 5)
    data = load(arguments.data)
    for i, unit in enumerate(data.units):
        unit["metadata"] = {**unit.get("metadata", {}), "part": i * 7919 % 100}
    figures: dict[str, Any] = {"machine": machine(), "data": data.name, "command": " ".join(["python", *sys.argv])}
    figures["command"] = "python benchmarks/foundation.py" + (" --quick" if arguments.quick else "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index_type in arguments.index_type:
            table = dict(zip(data.texts, data.queries["in"], strict=False))
            config = StorageConfig(max_memory_units=10**6, background=False, target_recall=0.99, index_type=index_type)
            prefix = folder / index_type
            with VectorStore(prefix, table.__getitem__, 384, storage_config=config) as store:
                store.store_batch([{**u, "id": f"unit_{i}"} for i, u in enumerate(data.units)], data.vectors)
                store.run_maintenance()
                figures[f"search, {index_type}, target_recall=0.99"] = search_figures(store, data, rounds)
                figures[f"filters, {index_type}, target_recall=0.99"] = filter_figures(store, data, rounds // 2)
            if index_type == "ivf":
                figures["opening, ivf"] = open_figures(prefix, data, repeats)
        figures["bulk store, embeddings given"] = bulk_figures(folder, data, repeats)
        figures["threads"] = thread_figures(folder, data, 0.5 if arguments.quick else 3.0)
        figures["single writes"] = write_figures(folder, data, rounds)
    text = json.dumps(rounded(figures), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
