"""Measure the time until units are stored, and until they are indexed on the device.

    python benchmarks/gpu/ingest.py [--units 200000] [--device cuda:0 | cpu] [--quick]

Generated embeddings are given, so that no embedding model is timed. "stored" ends when the last batch is acknowledged:
from then on searches find every unit, by scanning what the index does not hold yet. "indexed" ends when the planned
index is built, evaluated and searched instead. Then a tenth as many are stored: "beside" is one query over the index
and the delta buffer, "taken_in" how long maintenance takes to append the rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.common import FAILURES, LateError, Setting, clustered, note, release, script, stopwatch, timed, why_not

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.types import FloatArray

BATCH = 10_000


def put(store: VectorStore, vectors: FloatArray, first: int) -> float:
    """Seconds that it takes to store units ``u<first>`` and following."""
    started = time.perf_counter()
    for at in range(0, len(vectors), BATCH):
        part = vectors[at : at + BATCH]
        units = [{"id": f"u{first + at + row}", "type": "skill", "content": "generated"} for row in range(len(part))]
        store.store_batch(units, embeddings=part)
    return stopwatch(started)


def maintained(store: VectorStore) -> float:
    started = time.perf_counter()
    store.run_maintenance()
    return stopwatch(started)


def one_query(store: VectorStore, vectors: FloatArray, setting: Setting) -> float:
    """Median milliseconds."""
    found = timed(lambda turn: store.search_vectors(vectors[turn % len(vectors)][None], 10), setting)
    return float(found["ms"])


def ingested(engine: str, index_type: str, vectors: FloatArray, setting: Setting) -> dict[str, Any]:
    """Store and index all rows with one engine; then a tenth more, and what searches cost meanwhile."""
    n, newer = len(vectors), clustered(len(vectors) // 10, vectors.shape[1], setting, reuse_from=len(vectors))
    wanted = {"device": "cpu"} if engine == "cpu" else {"device": setting.device, "gpu_engine": engine}
    config = StorageConfig(index_type=index_type, background=False, max_memory_units=10**8, **wanted)
    with (
        tempfile.TemporaryDirectory() as folder,
        VectorStore(Path(folder) / "store", None, vectors.shape[1], storage_config=config) as store,
    ):
        stored = put(store, vectors, 0)
        found_at_once = store.search_vectors(vectors[-1:], 1)[1] == [[f"u{n - 1}"]]
        indexed = maintained(store)
        index, alone = store.statistics()["index"], one_query(store, newer, setting)
        put(store, newer, n)
        found_at_once = found_at_once and store.search_vectors(newer[-1:], 1)[1] == [[f"u{n + len(newer) - 1}"]]
        beside = one_query(store, newer, setting)
        taken_in = maintained(store)
    return {
        "stored_s": stored,
        "units_per_s": n / stored,
        "found_at_once": found_at_once,
        "indexed_s": indexed,
        "one_query_ms": {"indexed": alone, "beside": beside},
        "taken_in_s": taken_in,
        "index": {name: index[name] for name in ("kind", "engine", "device", "nlist")},
    }


def run(setting: Setting, n: int, dim: int) -> dict[str, Any]:
    vectors = clustered(n, dim, setting)
    found: list[dict[str, Any]] = []
    for engine in ("cpu", "torch", "faiss"):
        for index_type in ("flat", "ivf"):
            row: dict[str, Any] = {"engine": engine, "index_type": index_type}
            try:
                setting.check_time()
                missing = (
                    "stores go to GPUs only" if engine != "cpu" and not setting.on_gpu else why_not(engine, setting)
                )
                if missing:
                    raise RuntimeError(missing)
                row |= ingested(engine, index_type, vectors, setting)
                one = row["one_query_ms"]
                note(
                    f"  {engine:<6}{index_type:<5} stored {row['units_per_s']:,.0f}/s, "
                    f"indexed {row['indexed_s']:.2f} s; "
                    f"one query {one['indexed']:.2f} ms, {one['beside']:.2f} beside newer ones"
                )
            except LateError:
                raise
            except FAILURES as error:
                row["skipped"] = str(error).splitlines()[0]
                note(f"  {engine:<6}{index_type:<5} {error}")
            found.append(setting.kept("ingest", row))
            release(setting)
    return {"units": n, "dim": dim, "batch": BATCH, "ingest": found}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--units", type=int, default=200_000)
    made.add_argument("--ingest-dim", type=int, default=384)


def sizes_of(args: argparse.Namespace) -> tuple[int, int]:
    return (1500, 32) if args.quick else (args.units, args.ingest_dim)


if __name__ == "__main__":
    script(__doc__, run, sizes_of, add_options)
