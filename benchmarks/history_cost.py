"""Measure what the history costs: the workload of months_of_use.py spread over 90 days, with and without it.

    python benchmarks/history_cost.py [--units 5000] [--dim 384] [--json FILE]

Both stores get the same writes, alternating, on a clock of their own: units stored one by one, 40 % rewritten, two
consolidations, 30 % pruned, maintenance once a day. Durable single writes are timed; the files are compared at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from harness import machine, rounded

from memevolve_gpu import StorageConfig, VectorStore

SEED = 11
DAYS = 90


class Life:
    """A store on a simulated clock."""

    def __init__(self, prefix: Path, dim: int, days: float) -> None:
        self.now, self.vector = 1_800_000_000.0, np.zeros(dim, np.float32)
        self.times: list[float] = []
        config = StorageConfig(max_memory_units=10**6, history_days=days, background=False, index_type="flat")
        self.prefix = prefix
        self.store = VectorStore(prefix, lambda _text: self.vector, dim, storage_config=config, clock=lambda: self.now)

    def put(self, unit_id: str, vector: np.ndarray, text: str) -> None:
        self.vector = vector
        started = time.perf_counter()
        self.store.store({"id": unit_id, "type": "lesson", "content": text})
        self.times.append(time.perf_counter() - started)

    def bytes(self) -> int:
        self.store.close()
        return Path(f"{self.prefix}.db").stat().st_size


def live(lives: list[Life], units: int, dim: int) -> None:
    rng = np.random.default_rng(SEED)
    alive: list[str] = []
    for i in range(units):
        rewritten = alive[rng.integers(len(alive))] if alive and rng.random() < 0.4 else None
        writes = [(f"lesson-{i}", rng.standard_normal(dim).astype(np.float32))]
        writes += [(rewritten, rng.standard_normal(dim).astype(np.float32))] if rewritten else []
        words = " ".join(f"word{number}" for number in rng.integers(0, 5000, 40))
        alive.append(f"lesson-{i}")
        gone: list[str] = []
        if i in (units // 2, units * 9 // 10):
            gone = alive[: units // 100]
        if i in (units * 2 // 3, units - 1):
            gone = alive[: int(0.15 * len(alive))]
        alive = alive[len(gone) :]
        for life in lives if i % 2 else lives[::-1]:
            life.now += DAYS * 86_400 / units
            for unit_id, vector in writes:
                life.put(unit_id, vector, f"lesson {i} {words}")
            life.store.delete_batch(gone)
            if i % max(1, units // DAYS) == 0:
                life.store.run_maintenance()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--units", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        lives = [Life(Path(name) / "off", given.dim, 0), Life(Path(name) / "on", given.dim, 7)]
        live(lives, given.units, given.dim)
        sizes, medians = [one.bytes() for one in lives], [float(np.median(one.times)) * 1e3 for one in lives]
        found: dict[str, Any] = {
            "units": given.units,
            "dim": given.dim,
            "store_ms": {"off": medians[0], "on": medians[1], "ratio": medians[1] / medians[0]},
            "database_bytes": {"off": sizes[0], "on": sizes[1], "ratio": sizes[1] / sizes[0]},
        }
    print(json.dumps(rounded(found)))
    if given.json:
        report = {"command": f"python benchmarks/history_cost.py --units {given.units} --dim {given.dim}", **found}
        given.json.write_text(json.dumps({**report, "machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
