"""Threads that search at once, with the gate and without: rates beside that of two threads without it, in turns.

    python benchmarks/threads.py [--data FOLDER] [--units 20000] [--rounds 9] [--seconds 0.3] [--json FILE]

Without: a gate with more places than threads, at which nobody waits. Every kind has its turn in every round;
``ratio`` is the median over the rounds of the rate, divided by the rate of the first kind in the same round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from foundation import searched, seconds
from harness import generated, load, machine, publish, rounded

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.live.gate import SearchGate

KINDS = ((2, False), (1, False), (1, True), (2, True), (4, False), (4, True), (8, False), (8, True))


def measured(store: VectorStore, queries: np.ndarray, rounds: int, length: float) -> dict[str, Any]:
    live: Any = store._open.live  # noqa: SLF001 - no setting turns the gate off
    gates = {True: SearchGate(), False: SearchGate(places=1000)}
    searched(store, queries, 1, seconds(length))
    runs: dict[tuple[int, bool], list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for threads, gated in KINDS:
            live._gate = gates[gated]  # noqa: SLF001
            runs[threads, gated].append(searched(store, queries, threads, seconds(length)))
    base = np.array([one["per_s"] for one in runs[KINDS[0]]])
    return {
        f"{threads} threads, {'gate' if gated else 'no gate'}": {
            **{name: float(np.median([one[name] for one in found])) for name in ("per_s", "p50_ms", "p99_ms")},
            "ratio": float(np.median(np.array([one["per_s"] for one in found]) / base)),
        }
        for (threads, gated), found in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--units", type=int, nargs="+", default=[20_000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    command = f"python benchmarks/threads.py --units {' '.join(map(str, arguments.units))} --rounds {arguments.rounds}"
    figures: dict[str, Any] = {"machine": machine(), "command": command, "load": os.getloadavg()[0]}
    config = StorageConfig(max_memory_units=10**7, background=True, target_recall=0.99)
    for count in arguments.units:
        data = load(arguments.data)
        if count > len(data.units):
            data = generated(count)
        with tempfile.TemporaryDirectory() as folder, VectorStore(Path(folder) / "s", None, 384, None, config) as store:
            store.store_batch(data.units[:count], data.vectors[:count])
            store.run_maintenance()
            found = measured(store, data.queries["in"], arguments.rounds, arguments.seconds)
        figures[f"{count} units, {data.name}"] = found
    publish(rounded(figures), arguments.json)


if __name__ == "__main__":
    main()
