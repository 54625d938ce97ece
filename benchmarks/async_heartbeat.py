"""How long searches hold up an event loop: a heartbeat beside ``AsyncVectorStore``, and beside the blocking store.

    python benchmarks/async_heartbeat.py [--units 100000] [--dim 384] [--rounds 12] [--seconds 2] [--json FILE]

A task sleeps for a millisecond again and again, and notes by how much each sleep was late. Beside it nothing runs
("idle"), or 1 or 8 tasks that search without a pause through ``AsyncVectorStore`` (4 threads), or one task that calls
the blocking ``VectorStore`` on the event loop. These take turns, so they see the same load of the machine. Vectors are
seeded clusters; the embedding function only looks up a vector. ``late_share`` is the share of heartbeats that were more
than a millisecond late; what "idle" has of them comes from the machine, and the controls say what any threads cost that
take turns with the loop, for the interpreter's lock or for a core. ``loop_ms_per_call`` is the processor time of
the loop's own thread for each call, which does not depend on the load.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness import generated, machine

from memevolve_gpu import AsyncVectorStore, VectorStore

BEAT = 0.001
FILTER = {"type": "tool", "tags": ["t1", "t2", "t3"]}


async def beat(seconds: float, late: list[float]) -> None:
    end = time.perf_counter() + seconds
    while (at := time.perf_counter()) < end:
        await asyncio.sleep(BEAT)
        late.append(1000 * (time.perf_counter() - at - BEAT))


async def beside(seconds: float, tasks: int, call: Callable[[int], Awaitable[Any]], late: list[float]) -> int:
    """Heartbeats beside that many tasks; how many calls these made."""
    made = [0] * tasks
    ends = asyncio.Event()

    async def work(number: int) -> None:
        while not ends.is_set():
            await call(number + made[number])
            made[number] += 1

    working = [asyncio.create_task(work(number)) for number in range(tasks)]
    await beat(seconds, late)
    ends.set()
    await asyncio.gather(*working)
    return sum(made)


async def measured(store: VectorStore, queries: int, rounds: int, seconds: float) -> dict[str, Any]:
    async_store, lone = AsyncVectorStore(store), AsyncVectorStore(store, threads=1)
    pool = ThreadPoolExecutor(4)
    loop, data = asyncio.get_running_loop(), b"x" * 200_000

    async def blocking(at: int) -> None:
        store.search_units(f"q{at % queries}", 10)
        await asyncio.sleep(0)

    calls: dict[str, tuple[int, Callable[[int], Awaitable[Any]]]] = {
        "idle": (0, blocking),
        "control: 4 threads that hold the interpreter's lock for 50 us at a time": (
            8,
            lambda _: loop.run_in_executor(pool, _python, 0.0005),
        ),
        "control: 4 threads that work without the interpreter's lock": (
            8,
            lambda _: loop.run_in_executor(pool, lambda: hashlib.sha256(data).digest()),
        ),
        "search, 1 task": (1, lambda at: async_store.search_units(f"q{at % queries}", 10)),
        "search, 8 tasks": (8, lambda at: async_store.search_units(f"q{at % queries}", 10)),
        "search, 8 tasks, 1 thread": (8, lambda at: lone.search_units(f"q{at % queries}", 10)),
        "filtered, 8 tasks": (8, lambda at: async_store.search_units(f"q{at % queries}", 10, FILTER)),
        "keywords, 8 tasks": (8, lambda at: async_store.search_keywords(f"unit {at}", 10)),
        "blocking search on the loop": (1, blocking),
    }
    late: dict[str, list[list[float]]] = {kind: [] for kind in calls}
    made, spent = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for kind, (tasks, call) in calls.items():
            started = time.thread_time()
            late[kind].append([])
            made[kind] += await beside(seconds, tasks, call, late[kind][-1])
            spent[kind] += time.thread_time() - started
    pool.shutdown()
    return {
        kind: {
            **figures([one for round_of in late[kind] for one in round_of]),
            "late_share_of_the_quietest_round": round(min(_late_share(one) for one in late[kind]), 5),
            "calls_per_s": round(made[kind] / (rounds * seconds)),
            "loop_ms_per_call": round(1000 * (spent[kind] - spent["idle"]) / made[kind], 4) if made[kind] else None,
        }
        for kind in calls
    }


def figures(late: list[float]) -> dict[str, Any]:
    p50, p99, p999 = np.percentile(late, [50, 99, 99.9])
    return {
        "beats": len(late),
        "late_p50_ms": round(float(p50), 3),
        "late_p99_ms": round(float(p99), 3),
        "late_p999_ms": round(float(p999), 3),
        "late_max_ms": round(max(late), 3),
        "late_share": round(_late_share(late), 5),
    }


def _late_share(late: list[float]) -> float:
    return float(np.mean(np.array(late) > 1.0))


def _python(seconds: float) -> None:
    """Turn by turn, run Python for 50 microseconds and let go of the interpreter's lock."""
    end = time.perf_counter() + seconds
    while (at := time.perf_counter()) < end:
        while time.perf_counter() < at + 5e-5:
            pass
        time.sleep(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = generated(args.units, args.dim)
    queries = data.queries["in"]

    def embed(text: str) -> np.ndarray:
        row: np.ndarray = queries[int(text[1:])]
        return row

    with (
        tempfile.TemporaryDirectory() as folder,
        VectorStore(
            Path(folder) / "store", embed, args.dim, storage_config={"max_memory_units": 2 * args.units}
        ) as store,
    ):
        store.store_batch(data.units, data.vectors)
        store.run_maintenance()
        found = asyncio.run(measured(store, len(queries), args.rounds, args.seconds))
    command = f"python benchmarks/async_heartbeat.py --units {args.units} --dim {args.dim}"
    command += f" --rounds {args.rounds} --seconds {args.seconds:g}"
    result = {"command": command, "machine": machine(), "late": found}
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
