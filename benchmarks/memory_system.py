"""Measure management, retrieval and the memory system at 50,000 units, one thread, without embedding.

    python benchmarks/memory_system.py [--data FOLDER] [--json FILE] [--units N] [--quick]

Data: the real units and their embeddings in --data (default ``../shared/data``), repeated with seeded noise (0.002 in
each component, normalised) up to --units. hit@5 is measured on the units without repetition: how often the unit from
which a query was taken is among the first five. Every management operation works on a fresh copy of the same store.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from harness import machine, rounded

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    RetrievalStrategy,
    SemanticRetrievalStrategy,
)
from memevolve_gpu.memory_system import MemorySystem, MemorySystemConfig

SEED = 20_260_101
NOISE = 0.002
DIM = 384


@dataclass
class Data:
    """units and vectors (n, 384); queries: text, vector, and the row of the unit that each was taken from."""

    units: list[dict[str, Any]]
    vectors: np.ndarray
    texts: list[str]
    query_vectors: np.ndarray
    rows: list[int]
    distinct: int

    def embed(self, text: str) -> np.ndarray:
        """The known vector of a query; any other text gets one that its characters decide."""
        at = self.places.get(text)
        if at is not None:
            return np.asarray(self.query_vectors[at])
        row = np.random.default_rng(len(text) + sum(map(ord, text[:50]))).standard_normal(DIM)
        return np.asarray(row / np.linalg.norm(row), np.float32)

    def __post_init__(self) -> None:
        self.places = {text: at for at, text in enumerate(self.texts)}


def load(folder: Path, count: int) -> Data:
    with gzip.open(folder / "tldr_units.jsonl.gz", "rt") as lines:
        units = [json.loads(line) for line in lines]
    with gzip.open(folder / "tldr_queries.jsonl.gz", "rt") as lines:
        queries = [json.loads(line) for line in lines]
    vectors, asked = (np.load(folder / f"{name}_minilm_f16.npy").astype("float32") for name in ("tldr", "tldr_queries"))
    distinct = len(units)
    rng = np.random.default_rng(SEED)
    extra = rng.integers(0, distinct, max(0, count - distinct))
    noisy = vectors[extra] + NOISE * rng.standard_normal((len(extra), DIM)).astype("float32")
    every = np.concatenate([vectors, noisy])[:count]
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    units = [*units, *(units[at] for at in extra.tolist())][:count]
    named = [{**unit, "id": f"unit_{at}"} for at, unit in enumerate(units)]
    rows = [query["unit_row"] for query in queries]
    return Data(named, every, [query["query"] for query in queries], asked, rows, min(distinct, count))


def config() -> StorageConfig:
    return StorageConfig(max_memory_units=10**6, background=False)


def build(prefix: Path, data: Data, count: int) -> None:
    with VectorStore(prefix, data.embed, DIM, storage_config=config()) as store:
        store.store_batch(data.units[:count], data.vectors[:count])
        store.run_maintenance()


def copy(prefix: Path, name: str) -> Path:
    target = prefix.with_name(name)
    for ending in (".db", ".snapshot"):
        if (source := Path(f"{prefix}{ending}")).exists():
            shutil.copy(source, f"{target}{ending}")
    return target


@contextmanager
def counted_transactions() -> Iterator[list[int]]:
    """[number of write transactions that deleted or stored units]."""
    from memevolve_gpu.records.transaction import Transaction

    counts, original = [0], Transaction.end

    def end(self: Transaction) -> None:
        counts[0] += self._seq != self.head.last_seq
        original(self)

    Transaction.end = end  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Transaction.end = original  # type: ignore[method-assign]


def managed(prefix: Path, data: Data) -> dict[str, Any]:
    strategy = SimpleManagementStrategy()
    operations: dict[str, Callable[[VectorStore], Any]] = {
        "prune max_count, half": lambda store: strategy.prune(store, {"max_count": store.count() // 2}),
        "prune max_age, all": lambda store: strategy.prune(store, {"max_age": 0}),
        "prune type tool": lambda store: strategy.prune(store, {"type": "tool"}),
        "deduplicate 0.95": lambda store: strategy.deduplicate(store, 0.95),
        "forget lru, a tenth": lambda store: strategy.apply_forgetting(store, "lru"),
        "forget lru, half": lambda store: strategy.apply_forgetting(store, "lru", store.count() // 2),
        "forget lfu, half": lambda store: strategy.apply_forgetting(store, "lfu", store.count() // 2),
        "forget random, half": lambda store: strategy.apply_forgetting(store, "random", store.count() // 2, seed=1),
        "consolidate 0.95": lambda store: strategy.consolidate(store, similarity_threshold=0.95),
        "health metrics": strategy.get_health_metrics,
    }
    figures = {}
    for name, operation in operations.items():
        with VectorStore(copy(prefix, "managed"), data.embed, storage_config=config()) as store:
            before = store.count()
            store.search_vectors(data.query_vectors[:1], 5)
            with counted_transactions() as transactions:
                started = time.perf_counter()
                operation(store)
                seconds = time.perf_counter() - started
            figures[name] = {"seconds": seconds, "units_gone": before - store.count(), "transactions": transactions[0]}
    return figures


def percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(np.array(seconds) * 1e3, [50, 95, 99]).tolist()
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def queried(prefix: Path, data: Data, rounds: int) -> dict[str, Any]:
    """``query_memory`` of each strategy, taking turns within one loop."""
    strategies = strategies_of()
    with VectorStore(prefix, data.embed, storage_config=config()) as store:
        systems = {
            name: MemorySystem(MemorySystemConfig(storage_backend=store, retrieval_strategy=strategy))
            for name, strategy in strategies.items()
        }
        times: dict[str, list[float]] = {name: [] for name in systems}
        for at in range(-20, rounds):
            for name, system in systems.items():
                started = time.perf_counter()
                system.query_memory(data.texts[at % len(data.texts)], top_k=5)
                if at >= 0:
                    times[name].append(time.perf_counter() - started)
    return {name: percentiles(taken) for name, taken in times.items()}


def strategies_of() -> dict[str, RetrievalStrategy]:
    return {
        "semantic": SemanticRetrievalStrategy(),
        "keyword": KeywordRetrievalStrategy(),
        "hybrid, weighted": HybridRetrievalStrategy(),
        "hybrid, rrf": HybridRetrievalStrategy(fusion="rrf"),
    }


def hits(prefix: Path, data: Data, rounds: int) -> dict[str, Any]:
    asked = list(zip(data.texts, data.rows, strict=True))[:rounds]
    figures: dict[str, Any] = {"units": data.distinct, "queries": len(asked)}
    with VectorStore(prefix, data.embed, storage_config=config()) as store:
        for name, strategy in strategies_of().items():
            found = [[one.unit_id for one in strategy.retrieve(text, store, 5)] for text, _ in asked]
            figures[name] = sum(f"unit_{row}" in ids for (_, row), ids in zip(asked, found, strict=True)) / len(asked)
    return figures


def access_overhead(prefix: Path, data: Data, rounds: int) -> dict[str, float]:
    """What recording an access adds to ``search``, in microseconds: medians of calls that take turns."""
    with VectorStore(prefix, data.embed, storage_config=config()) as store:
        times: dict[bool, list[float]] = {True: [], False: []}
        for at in range(rounds):
            for record in (at % 2 == 0, at % 2 == 1):
                started = time.perf_counter()
                store.search(data.texts[at % 100], 5, record=record)
                times[record].append(time.perf_counter() - started)
        store.run_maintenance()
        ids = [f"unit_{at}" for at in range(5)]
        alone, with_writing, without = list[float](), list[float](), list[float]()
        for _ in range(9):
            timed(store.access_counts)  # writes down what is held
            without.append(timed(store.access_counts))
            alone += [timed(store.record_access, ids) for _ in range(199)]
            with_writing.append(timed(store.access_counts))
        written = float(np.median(with_writing) - np.median(without))
    median = {record: float(np.median(taken)) * 1e6 for record, taken in times.items()}
    return {
        "search_us": median[False],
        "search_recorded_us": median[True],
        "difference_us": median[True] - median[False],
        "record_access_us": float(np.median(alone)) * 1e6,
        "writing_down_us, a search's share": written / 199 * 1e6,
    }


def timed(call: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def room_made(prefix: Path, data: Data) -> dict[str, Any]:
    """The batch at which the memory system prunes: from 90 % of the limit down to 70 %."""
    target = copy(prefix, "full")
    with VectorStore(target, data.embed, storage_config=config()) as store:
        limit = int(store.count() / 0.9)
    settings = StorageConfig(max_memory_units=limit, background=False)
    with VectorStore(target, data.embed, storage_config=settings) as store:
        system = MemorySystem(MemorySystemConfig(storage_backend=store))
        before = store.count()
        started = time.perf_counter()
        system.add_units([{"content": f"new {at}"} for at in range(100)], data.vectors[:100])
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "limit": limit, "before": before, "after": store.count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--units", type=int, default=50_000)
    parser.add_argument("--quick", action="store_true", help="fewer queries")
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rounds = 200 if arguments.quick else 1000
    data = load(arguments.data, arguments.units)
    figures: dict[str, Any] = {
        "machine": machine(),
        "load": os.getloadavg()[0],
        "command": f"python benchmarks/memory_system.py --units {arguments.units}" + " --quick" * arguments.quick,
    }
    with tempfile.TemporaryDirectory() as name:
        whole, distinct = Path(name, "whole"), Path(name, "distinct")
        build(whole, data, len(data.units))
        build(distinct, data, data.distinct)
        figures["hit@5"] = hits(distinct, data, rounds)
        figures["query_memory, 5 results"] = queried(whole, data, rounds)
        figures["access figures"] = access_overhead(whole, data, 5 * rounds)
        figures["management"] = managed(whole, data)
        figures["room made"] = room_made(whole, data)
        figures["load at the end"] = os.getloadavg()[0]
    text = json.dumps(rounded(figures), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
