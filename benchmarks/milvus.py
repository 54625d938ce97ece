"""Measure MilvusStore on a real Milvus: a copy there and back, reading one's own writes, recall by target,
kill -9 of a standalone server, and a query node killed under load.

Run it with ``scripts/test-milvus --run benchmarks/milvus.py``; the figures go to benchmarks/results/milvus.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from harness import Data, load, machine
from milvus_kit import URI, Cluster, Standalone, running
from milvus_scenarios import killed_while_writing, paused, query_node_killed

from memevolve_gpu import VectorStore
from memevolve_gpu.components.store.copy import copy_store
from memevolve_gpu.milvus.store import MilvusStore

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "milvus.json"
K = 10


def on_server(collection: str, dim: int, **place: Any) -> MilvusStore:
    return MilvusStore(None, dim, milvus_config={"uri": URI, "collection": collection, **place})


def copies(data: Data, folder: Path) -> dict[str, Any]:
    """Files to Milvus and back; every unit, id, vector and the order are compared besides what the copy verifies."""
    dim = data.vectors.shape[1]
    units = [{**unit, "id": unit.get("id") or f"u{i}"} for i, unit in enumerate(data.units)]
    quiet = {"background": False}
    with (
        VectorStore(folder / "source", None, dim, storage_config=quiet) as source,
        VectorStore(folder / "back", None, dim, storage_config=quiet) as back,
        on_server("copied", dim) as there,
    ):
        source.store_batch(units, data.vectors)
        source.run_maintenance()
        outward = copy_store(source, there)
        again = copy_store(source, there)
        homeward = copy_store(there, back)
        rows = list(zip(source.export_rows(), back.export_rows(), strict=True))
        same = sum(one == other and np.array_equal(v, w) for (one, v), (other, w) in rows)
        return {
            "units": len(units),
            "to_milvus": outward.as_dict(),
            "to_milvus_again": again.as_dict(),
            "back": homeward.as_dict(),
            "units_ids_vectors_and_order_equal": same,
            "lost": len(units) - same,
        }


def param_sets(data: Data) -> dict[str, Any]:
    """recall@10 against an exact scan and median latency, by the recall that is asked for; 1.0 in one batch."""
    dim = data.vectors.shape[1]
    found: dict[str, Any] = {}
    with on_server("copied", dim) as store:
        found["index"] = store.statistics()["index"]
        ids = {unit["id"]: i for i, unit in enumerate(store.units())}
        vectors = np.array([vector for _, vector in store.export_rows()])
        for name, every in data.queries.items():
            queries = every[:200]
            near = np.square(vectors).sum(axis=1)[None] - 2 * queries @ vectors.T
            truth = np.argsort(near, axis=1)[:, :K]
            for asked in (0.8, 0.9, 0.95, 0.98, 0.99):
                hits, times = 0, []
                for row, query in enumerate(queries):
                    started = time.perf_counter()
                    answer = store.search_vectors(query[None], K, recall=asked)[1][0]
                    times.append(time.perf_counter() - started)
                    hits += len({ids[one] for one in answer if one} & set(truth[row].tolist()))
                recall = hits / (K * len(queries))
                found[f"{name} {asked}"] = {
                    "recall": round(recall, 4),
                    "p50_ms": round(float(np.median(times)) * 1e3, 2),
                }
            started = time.perf_counter()
            answers = store.search_vectors(queries, K, recall=1.0)[1]
            taken = time.perf_counter() - started
            hits = sum(len({ids[one] for one in row if one} & set(truth[i].tolist())) for i, row in enumerate(answers))
            found[f"{name} 1.0"] = {"recall": round(hits / (K * len(queries)), 4), "batch_of_200_s": round(taken, 2)}
    return found


def consistency(data: Data) -> dict[str, Any]:
    """Median milliseconds of a write, of the search right after it, and of the next one, by consistency level."""
    dim = data.vectors.shape[1]
    found: dict[str, Any] = {}
    for level in ("session", "strong", "bounded", "eventually"):
        with on_server("copied", dim, consistency=level) as store:
            taken: dict[str, list[float]] = {"write": [], "search_after_write": [], "search": []}
            missed = 0
            for i in range(25):
                vector = data.vectors[i : i + 1] + np.float32(3.0 + i)
                _timed(taken["write"], lambda v=vector, n=i: store.store_batch([{"id": f"probe{n}"}], v))  # type: ignore[misc]
                answer = _timed(taken["search_after_write"], lambda v=vector: store.search_vectors(v, 1))  # type: ignore[misc]
                missed += answer[1] != [[f"probe{i}"]]
                _timed(taken["search"], lambda v=vector: store.search_vectors(v, 1))  # type: ignore[misc]
                store.delete(f"probe{i}")
                time.sleep(0.25)
            medians = {name: round(float(np.median(times)) * 1e3, 1) for name, times in taken.items()}
            found[level] = {
                **{f"{name}_ms": value for name, value in medians.items()},
                "own_writes_missed_of_25": missed,
            }
    return found


def _timed(times: list[float], act: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = act()
    times.append(time.perf_counter() - started)
    return result


def on_standalone(data: Data, folder: Path, wanted: set[str]) -> Iterator[tuple[str, Any]]:
    server = Standalone(folder / "standalone")
    with running(server):
        with on_server("empty", 8) as store:
            yield "server", store.statistics()["server"]["version"]
        if "copy" in wanted:
            yield "copy", copies(data, folder)
            yield "recall_by_effort", param_sets(data)
            yield "consistency", consistency(data)
        if "kill" in wanted:
            yield "standalone_kill_9", killed_while_writing(server, 5.0)
            yield "standalone_hangs", paused(server, 2.0)


def on_cluster(data: Data, folder: Path) -> Iterator[tuple[str, Any]]:
    cluster = Cluster(folder / "cluster")
    with running(cluster):
        queries = np.concatenate([one[:100] for one in data.queries.values()])
        yield "query_node_killed", query_node_killed(cluster, data.vectors, queries, (10.0, 50.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="to measure again: copy, kill, cluster; all of them without any")
    wanted = set(parser.parse_args().parts) or {"copy", "kill", "cluster"}
    data = load(ROOT.parent / "shared" / "data")
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results: dict[str, Any] = {**held, "machine": machine(), "data": data.name}
    with tempfile.TemporaryDirectory() as name:
        parts = [on_standalone(data, Path(name), wanted)] if wanted & {"copy", "kill"} else []
        parts += [on_cluster(data, Path(name))] if "cluster" in wanted else []
        for title, figures in chain.from_iterable(parts):
            results[title] = figures
            print(title, json.dumps(figures, indent=2), flush=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
