"""Measure what a filter costs that was never seen: by SQL over the units' JSON, and from columns in memory.

    python benchmarks/filters.py [--units 100000] [--out benchmarks/results/filters.json]

``sql_ms`` is the median of evaluations by SQL, which every new filter cost before columns; ``new_ms`` the median of new
filters on fields that a filter named before, ``first_ms`` the one that reads the field, and ``declared_first_ms`` the
same with an index of the field in the file. ``reopened``: the first filters of a process on fields that filters of an
earlier one named, and how long after the opening the background has read them. ``page_ms_at``: a page of 50 units at
the beginning, in the middle and near the end of a listing sorted by a field.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, publish, rounded

from memevolve_gpu import VectorStore
from memevolve_gpu.records.filters import conditions_of, parse

__all__ = ["measure"]

SEED, DIM = 20_240_607, 16
CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "number": lambda n: {"metadata.score": {"gt": 0.99 - n / 1000}},
    "text": lambda n: {"metadata.user": f"user{n}"},
    "time": lambda n: {"metadata.at": {"gte": f"2026-11-{10 + n}T00:00:00+01:00"}},
    "joined": lambda n: {"or": [{"metadata.user": f"user{n}"}, {"metadata.score": {"lt": n / 2000}, "type": "tool"}]},
}


def made(count: int) -> list[dict[str, Any]]:
    rng = random.Random(SEED)
    words = [f"word{n}" for n in range(5000)]
    return [
        {
            "id": f"u{n}",
            "type": rng.choice(["lesson", "skill", "tool"]),
            "content": " ".join(rng.choices(words, k=60)),
            "metadata": {
                "score": rng.random(),
                "user": f"user{rng.randrange(500)}",
                "at": f"2026-11-{rng.randrange(1, 29):02}T{rng.randrange(24):02}:00:00.{rng.randrange(10**6):06}Z",
            },
        }
        for n in range(count)
    ]


def timed(act: Callable[[], Any]) -> float:
    started = time.perf_counter()
    act()
    return (time.perf_counter() - started) * 1e3


def filters_of(prefix: Path, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    with VectorStore(prefix, None, DIM, storage_config={"background": False, **settings}) as store:
        session = store._open  # noqa: SLF001 - what a search does before it searches
        session.live.catch_up()
        for name, make in CASES.items():
            first = timed(lambda: session.live.matching(parse(make(0))))  # noqa: B023
            new = [timed(lambda: session.live.matching(parse(make(n)))) for n in range(1, 16)]  # noqa: B023
            sql = [timed(lambda: session.records.matching(parse(make(n)))) for n in range(16, 19)]  # noqa: B023
            found[name] = {"sql_ms": statistics.median(sql), "first_ms": first, "new_ms": statistics.median(new)}
    return found


def reopened_of(prefix: Path) -> dict[str, Any]:
    """The first filters of a process on fields of past filters, once the background has read these."""
    paths = {one.path for make in CASES.values() for one in conditions_of(parse(make(0)).root)}
    started = time.perf_counter()
    with VectorStore(prefix, None, DIM, storage_config={"background": True}) as store:
        session = store._open  # noqa: SLF001
        while not session.live._masks.columns.holds(paths):  # noqa: SLF001
            time.sleep(0.01)
        ready = time.perf_counter() - started
        found = {name: timed(partial(session.live.matching, parse(make(20)))) for name, make in CASES.items()}
    return {"ready_after_s": ready, "first_ms": found}


def pages_of(prefix: Path, count: int) -> dict[str, float]:
    found = {}
    with VectorStore(prefix, None, DIM, storage_config={"background": False}) as store:
        list(store.units(order_by="metadata.score", limit=1))
        for share in (0.0, 0.5, 0.99):
            page = partial(
                store.units, order_by="metadata.score", limit=50, after=json.dumps([share, 0, "metadata.score"])
            )
            found[f"page_ms_at_{share:.2f}"] = statistics.median(timed(lambda: list(page())) for _ in range(7))  # noqa: B023
    return {"units": count, **found}


def measure(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "m"
        options = {"background": False, "max_memory_units": 10**7, "durability": "normal"}
        with VectorStore(prefix, None, DIM, storage_config=options) as store:
            units, rng = made(count), np.random.default_rng(SEED)
            for start in range(0, count, 5000):
                store.store_batch(units[start : start + 5000], rng.random((len(units[start : start + 5000]), DIM)))
            store.run_maintenance()
        plain = filters_of(prefix, {})
        reopened = reopened_of(prefix)
        declared = filters_of(prefix, {"indexed_fields": "metadata.score:number,metadata.user,metadata.at:time"})
        for name, one in plain.items():
            one["declared_first_ms"] = declared[name]["first_ms"]
        return {"units": count, "filters": plain, "reopened": reopened, "pages": pages_of(prefix, count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = rounded({"machine": machine(), "command": "python benchmarks/filters.py", **measure(options.units)})
    publish(found, options.out)


if __name__ == "__main__":
    main()
