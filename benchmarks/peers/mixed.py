"""A mixed workload: 80 % queries, 15 % inserts, 5 % deletes and rewrites, one after the other."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from .data import SEED
from .sections import knob_of, written
from .session import K, Session
from .stats import percentiles
from .truth import exact, hits

__all__ = ["mixed", "operations"]

SHARES = {"query": 0.8, "insert": 0.15, "delete": 0.025, "update": 0.025}
CHUNK = 50
CHECKED = 100
"""Queries asked at the end, and held against exact search over what the peer should then hold."""


def operations(count: int) -> list[str]:
    """The kinds, in the same seeded order for every peer."""
    kinds = np.random.default_rng([SEED, 4]).choice(list(SHARES), count, p=list(SHARES.values()))
    return [str(kind) for kind in kinds]


def mixed(session: Session) -> None:
    """The workload in chunks by turns; queries bring the units with them, writes are synced where they can be."""
    kinds = operations(session.plan.mixed)
    names = [name for name in session.names if session.facts(name).updates and session.facts(name).deletes]
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    knobs = {name: knob_of(session, name) for name in names}

    def turn(name: str, block: int) -> float:
        chunk = kinds[block * CHUNK : (block + 1) * CHUNK]
        asked = [operation(session, name, kind, block * CHUNK + i) for i, kind in enumerate(chunk)]
        answer = session.remotes[name].ask("mixed", operations=asked, k=K, knob=knobs[name])
        for kind, seconds in zip(chunk, answer["seconds"], strict=True):
            times[name][kind].append(seconds)
        return float(sum(answer["seconds"]))

    session.interleaved("mixed", -(-len(kinds) // CHUNK), turn, names, 2, session.plan.mixed_cap)
    recalls: dict[str, list[int]] = {}

    def check(name: str) -> None:
        recalls[name] = hits_now(session, name, knobs[name])

    session.each("mixed", 0, check, names)
    for name in names:
        if name in session.names:
            session.record({"section": "mixed", "peer": name, **figures(times[name], recalls[name])})


def operation(session: Session, name: str, kind: str, number: int) -> list[Any]:
    if kind == "query":
        judged = session.work.judged
        return [kind, 0, judged[number % len(judged)]]
    ids, rows = written(session, name, kind, 1)
    return [kind, ids[0], rows[0]]


def figures(times: dict[str, list[float]], counts: list[int]) -> dict[str, Any]:
    every = [second for kind in times.values() for second in kind]
    total = sum(every)
    return {
        "operations": len(every),
        "per_s": len(every) / total,
        "kinds": {kind: {**percentiles(taken), "share": sum(taken) / total} for kind, taken in times.items()},
        "recall_after": float(np.mean(counts)) / K,
        "hits": counts,
    }


def hits_now(session: Session, name: str, knob: float) -> list[int]:
    """Hits of some queries against exact search over what the peer should hold after all its writes."""
    work = session.work
    rows, gone = session.rows.get(name, {}), session.gone.get(name, set())
    top = work.size + session.added.get(name, 0)
    vectors = np.zeros((top, work.vectors.shape[1]), dtype=np.float32)
    vectors[: work.size] = work.vectors[: work.size]
    for number, row in rows.items():
        vectors[number] = work.vectors[row]
    allowed = np.ones(top, dtype=np.bool_)
    allowed[list(gone)] = False
    asked = work.judged[:CHECKED]
    found = session.remotes[name].ask("search", rows=asked, k=K, knob=knob)["found"]
    truth = exact(vectors, work.queries[asked], K, allowed)
    return hits(found, work.queries[asked], vectors, truth, allowed)
