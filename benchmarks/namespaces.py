"""Many namespaces in one store: searches beside a store of its own for each, memory, opening, and attempts to cross.

    python benchmarks/namespaces.py [--namespaces 1000] [--units 1000] [--dim 384] [--attempts 1000000] [--no-twin]
        [--json FILE]

The vectors are seeded clusters, the units of a namespace are written in several batches that take turns with those of
other namespaces. Searches in a random namespace take turns with the same ones in a random one of 20 separate stores,
each as large as a namespace, so both see the same load; one thread, ``recall`` at its default. ``first_search`` is the
first search in each namespace, and in lone stores that were just opened: both read their rows from the system's cache
for the first time; the searches after it find them mapped. ``repeated`` asks one namespace and one store again and
again. ``--no-twin`` leaves out the one store of the same size without namespaces. ``leaks`` counts the attempts,
of all kinds, after which a call in one namespace gave or changed something of another; it must be 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from harness import machine

from memevolve_gpu import VectorStore

WRITES = 4
"""Batches in which the units of a namespace arrive."""
STORES = 20
K = 10


def vectors(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    centres = np.random.default_rng(dim).standard_normal((400, dim))
    rows = centres[rng.integers(0, 400, n)] + rng.standard_normal((n, dim))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype="float32")


def unit(space: int, number: int) -> dict[str, Any]:
    """A unit whose text says where it belongs; the ids are the same in every namespace."""
    content = f"space{space} fact {number} about topic{number % 50}"
    return {"id": f"u{number}", "type": "skill", "content": content, "metadata": {"space": space, "n": number}}


def path_of(space: int) -> tuple[str, str]:
    return f"org{space % 10}", f"user{space}"


def filled(store: VectorStore, spaces: int, units: int, dim: int) -> float:
    """Write everything and build the index; seconds."""
    rng, started = np.random.default_rng(1), time.perf_counter()
    each = -(-units // WRITES)
    for start in range(0, units, each):
        for space in range(spaces):
            numbers = range(start, min(start + each, units))
            batch = [unit(space, number) for number in numbers]
            store.namespace(*path_of(space)).store_batch(batch, vectors(rng, len(batch), dim))
    store.run_maintenance()
    return time.perf_counter() - started


def timed(store: VectorStore, alone: list[VectorStore], spaces: int, dim: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of the same searches in a random namespace and in a random store of its size."""
    rng, pick = np.random.default_rng(2), random.Random(2)
    queries = vectors(rng, rounds, dim)
    places = [(store.namespace(*path_of(pick.randrange(spaces))), pick.choice(alone)) for _ in range(rounds)]
    filters = {"metadata.n": {"lt": 100}}
    kinds: dict[str, Any] = {
        "search": (lambda one, at: one.search_vectors(queries[at : at + 1], K)),
        "repeated": (lambda one, at: one.search_vectors(queries[at : at + 1], K)),
        "filtered": (lambda one, at: one.search_vectors(queries[at : at + 1], K, filters)),
        "keywords": (lambda one, at: one.search_keywords(f"fact topic{at % 50}", K)),
        "retrieve": (lambda one, at: one.retrieve(f"u{at % 50}")),
    }
    found = {}
    for kind, call in kinds.items():
        taken = np.empty((rounds, 2))
        for at in range(rounds):
            for column, one in enumerate(places[0 if kind == "repeated" else at]):
                started = time.perf_counter()
                call(one, at)
                taken[at, column] = time.perf_counter() - started
        figures = {
            name: {"p50_ms": float(np.percentile(column, 50)) * 1e3, "p95_ms": float(np.percentile(column, 95)) * 1e3}
            for name, column in zip(("namespace", "alone"), taken.T, strict=True)
        }
        ratio = float(np.median(taken[:, 0]) / np.median(taken[:, 1]))
        found[kind] = {**figures, "ratio_of_medians": ratio}
    return found


def first_searches(
    store: VectorStore, prefixes: list[Path], config: dict[str, Any], spaces: int, dim: int
) -> dict[str, Any]:
    """The first search in each namespace since the index was built, beside that in lone stores that were just opened.

    ``processor_ms`` is without what the machine gave to others, ``disk_reads`` counts the searches that waited for the
    disk because the system had dropped pages of the snapshot.
    """
    rng, order = np.random.default_rng(4), list(range(spaces))
    random.Random(4).shuffle(order)
    queries = vectors(rng, spaces, dim)
    found = {"namespace": _first([store.namespace(*path_of(space)) for space in order], queries)}
    with ExitStack() as stack:
        opened_now = [stack.enter_context(VectorStore(prefix, None, storage_config=config)) for prefix in prefixes]
        found["alone"] = _first(opened_now, queries)
    return found


def _first(stores: list[VectorStore], queries: np.ndarray) -> dict[str, float]:
    rows = []
    for at, one in enumerate(stores):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        started, spent = time.perf_counter(), time.thread_time()
        one.search_vectors(queries[at : at + 1], K)
        taken = time.perf_counter() - started, time.thread_time() - spent
        rows.append((*taken, resource.getrusage(resource.RUSAGE_SELF).ru_majflt > faults))
    p50, p95 = np.percentile(np.array(rows)[:, :2], [50, 95], axis=0) * 1e3
    return {
        "p50_ms": float(p50[0]),
        "p95_ms": float(p95[0]),
        "p50_processor_ms": float(p50[1]),
        "p95_processor_ms": float(p95[1]),
        "disk_reads": sum(row[2] for row in rows),
    }


def crossings(store: VectorStore, spaces: int, units: int, dim: int, attempts: int) -> dict[str, Any]:
    """Try to read and change units of other namespaces through a random one; count what got through."""
    rng, pick = np.random.default_rng(3), random.Random(3)
    tried, leaks, started = dict.fromkeys(("read", "search", "filter", "keywords", "write", "delete"), 0), 0, 0.0
    started = time.perf_counter()
    queries = vectors(rng, 512, dim)
    for attempt in range(attempts):
        own, other = pick.randrange(spaces), pick.randrange(spaces)
        here, marker = store.namespace(*path_of(own)), f"x{other}"
        kind = pick.choices(list(tried), [60, 15, 5, 1, 0.5, 0.5])[0]
        tried[kind] += 1
        if kind == "read":
            found = here.retrieve_batch([f"u{pick.randrange(units)}"]).values()
            leaks += any(one["metadata"]["space"] != own for one in found) or here.exists(marker)
        elif kind == "search":
            hits = here.search_vectors(queries[attempt % 512][None], K)[1][0]
            read = here.retrieve_batch([one for one in hits if one is not None])
            leaks += len(read) != min(K, units) or any(one["metadata"]["space"] != own for one in read.values())
        elif kind == "filter":
            leaks += other != own and bool(list(here.units({"metadata.space": other})))
        elif kind == "keywords":
            leaks += other != own and bool(here.search_keywords(f"space{other}", K))
        elif kind == "write":
            foreign = {**unit(own, pick.randrange(units)), "namespace": list(path_of(other))}
            foreign["metadata"] = {**foreign["metadata"], "namespace": list(path_of(other))}
            here.update(foreign["id"], foreign)
            seen = store.namespace(*path_of(other)).retrieve(foreign["id"])
            leaks += seen is None or seen["metadata"]["space"] != other
        else:
            leaks += here.delete(marker) or here.delete_batch([marker]) > 0
    return {"attempts": tried, "leaks": int(leaks), "seconds": round(time.perf_counter() - started, 1)}


def opened(prefix: Path, config: dict[str, Any]) -> dict[str, float]:
    """Milliseconds to open from the snapshot, median of five, and of the first search in a namespace."""
    opens = []
    for _ in range(5):
        started = time.perf_counter()
        VectorStore(prefix, None, storage_config=config).close()
        opens.append(time.perf_counter() - started)
    return {"open_ms": float(np.median(opens)) * 1e3}


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    spaces, units, dim = options.namespaces, options.units, options.dim
    total = spaces * units
    config = {"background": False, "max_memory_units": 2 * total, "max_memory_mb": "auto", "durability": "normal"}
    with ExitStack() as stack:
        names = ["many", *(f"alone{n}" for n in range(min(spaces, STORES)))]
        store, *alone = [
            stack.enter_context(VectorStore(folder / name, None, dim, storage_config=config)) for name in names
        ]
        seconds = filled(store, spaces, units, dim)
        for number, other in enumerate(alone):
            other.store_batch([unit(0, n) for n in range(units)], vectors(np.random.default_rng(number), units, dim))
            other.run_maintenance()
        prefixes = [folder / name for name in names[1:]]
        figures: dict[str, Any] = {"build_s": round(seconds, 1), "memory_bytes": store.statistics()["memory_bytes"]}
        if options.twin:
            one = stack.enter_context(VectorStore(folder / "one", None, dim, storage_config=config))
            for start in range(0, total, 10_000):
                rows = min(10_000, total - start)
                batch = [{**unit(0, start + n), "id": f"u{start + n}"} for n in range(rows)]
                one.store_batch(batch, vectors(np.random.default_rng(start), rows, dim))
            one.run_maintenance()
            grown = figures["memory_bytes"] - one.statistics()["memory_bytes"]
            figures["bytes_per_unit_more_than_one_namespace"] = round(grown / total, 2)
        figures |= {
            "first_search": first_searches(store, prefixes, config, spaces, dim),
            "searches": timed(store, alone, spaces, dim, options.rounds),
            "list_namespaces_ms": _milliseconds(store.namespaces),
            "crossing": crossings(store, spaces, units, dim, options.attempts),
        }
    figures["many_namespaces"] = opened(folder / "many", config)
    if options.twin:
        figures["one_namespace_of_the_same_size"] = opened(folder / "one", config)
    return figures


def _milliseconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return round((time.perf_counter() - started) * 1e3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--namespaces", type=int, default=1000)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--no-twin", dest="twin", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    command = f"python benchmarks/namespaces.py --namespaces {options.namespaces} --units {options.units} "
    command += f"--dim {options.dim} --rounds {options.rounds} --attempts {options.attempts}"
    command += "" if options.twin else " --no-twin"
    with tempfile.TemporaryDirectory() as folder:
        found = {"command": command, "machine": machine(), **measured(options, Path(folder))}
    text = json.dumps(found, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
