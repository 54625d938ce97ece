"""Compare single writes of two source trees of this package: they take turns in one run, each in a process of its own.

    python benchmarks/single_writes.py OLD NEW [--data FOLDER] [--json FILE] [--rounds N]

Medians and tenth percentiles, in microseconds, of a store, an update of the metadata, one of the text, and a delete,
beside 1,000 units of 384 columns, with each DURABILITY; and the bytes that each adds to the write-ahead log.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import apsw
import numpy as np

FRAME = 24 + 4096
BLOCK, WARM_UP, LOGGED = 10, 900, 200
"""Calls before the other's turn; stores before the measured ones; calls whose bytes are counted."""


KINDS = ("store", "update of the metadata", "update of the text", "delete")


def serve(folder: Path, data_folder: Path, durability: str) -> None:
    """Answer lines "what first last" with the microseconds of these calls."""
    from harness import load

    from memevolve_gpu import StorageConfig, VectorStore

    data, config = load(data_folder), StorageConfig(max_memory_units=10**6, background=False, durability=durability)
    units = data.units
    with VectorStore(folder / "s", lambda _: data.vectors[0], 384, storage_config=config) as store:
        store.store_batch([{**unit, "id": f"b{i}"} for i, unit in enumerate(units[:1000])], data.vectors[:1000])
        store.run_maintenance()
        calls: dict[str, Any] = {
            "store": lambda i: store.store({**units[i % len(units)], "id": f"x{i}"}),
            "update of the metadata": lambda i: store.update(f"x{i}", {**units[i % len(units)], "metadata": {"n": i}}),
            "update of the text": lambda i: store.update(f"x{i}", {**units[i % len(units)], "content": f"changed {i}"}),
            "delete": lambda i: store.delete(f"x{i}"),
        }
        for line in sys.stdin:
            what, first, last = json.loads(line)
            times = []
            for i in range(first, last):
                started = time.perf_counter()
                calls[what](i)
                times.append((time.perf_counter() - started) * 1e6)
            print(json.dumps(times), flush=True)


class Peer:
    """A process that runs one source tree."""

    def __init__(self, folder: Path, tree: Path, data: Path, durability: str) -> None:
        folder.mkdir()
        self.path = folder / "s.db"
        command = [sys.executable, __file__, "--serve", str(folder), "--data", str(data), "--durability", durability]
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process: Any = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.times("store", -WARM_UP, 0)

    def times(self, what: str, first: int, last: int) -> list[float]:
        self.process.stdin.write(json.dumps([what, first, last]) + "\n")
        self.process.stdin.flush()
        found: list[float] = json.loads(self.process.stdout.readline())
        return found

    def logged(self, what: str) -> float:
        """Bytes that a call adds to the log."""
        con = apsw.Connection(str(self.path))
        con.execute("SELECT 1 FROM counters").fetchall()
        con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)  # the next write begins the log again
        self.times(what, 10**5, 10**5 + LOGGED)
        frames, _ = con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        con.close()
        return frames * FRAME / LOGGED


def turns(trees: dict[str, Path], data: Path, durability: str, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        peers = {which: Peer(Path(name, which), tree, data, durability) for which, tree in trees.items()}
        for what in KINDS:
            times: dict[str, list[float]] = {which: [] for which in peers}
            for start in range(0, rounds, BLOCK):
                for which, peer in peers.items():
                    times[which] += peer.times(what, start, start + BLOCK)
            found[what] = {}
            for share in (10, 50):
                old, new = (float(np.percentile(times[which], share)) for which in ("old", "new"))
                found[what][f"p{share}"] = {"old us": old, "new us": new, "new/old": new / old}
        for what in KINDS:
            found[what] |= {f"{which} bytes to the log": peer.logged(what) for which, peer in peers.items()}
        for peer in peers.values():
            peer.process.communicate()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("trees", type=Path, nargs="*", help="the old and the new source tree")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--durability", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.data, arguments.durability)
        return
    from harness import machine, publish, rounded

    trees = dict(zip(("old", "new"), arguments.trees, strict=True))
    figures: dict[str, Any] = {"machine": machine(), "command": "python benchmarks/single_writes.py OLD NEW"}
    for durability in ("full", "normal"):
        figures[f"DURABILITY={durability}"] = turns(trees, arguments.data, durability, arguments.rounds)
    publish(rounded(figures), arguments.json)


if __name__ == "__main__":
    main()
