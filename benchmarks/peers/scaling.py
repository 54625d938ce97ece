"""The same work at growing sizes, and the exponent of each curve."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .data import Work
from .sections import Judge, ingest, knobs_for, measured, reopen, single_writes
from .session import TARGETS, Plan, Session
from .stats import exponent

__all__ = ["CURVES", "SIZES", "scaling"]

SIZES = (1_000, 10_000, 100_000)
LONGEST_BUILD = 60.0
"""Seconds; a peer whose next build would take longer, by its growth so far, stops there and the results say so."""
CURVES = {
    "search_ms": "a search",
    "insert_ms": "an insert",
    "delete_ms": "a delete",
    "memory_mb": "memory",
    "build_s": "a build",
}
FITTED_FROM = 10_000
"""Smaller sizes are mostly fixed costs; exponents are fitted from here on where there are two such sizes."""

Record = Callable[[dict[str, Any]], None]


def scaling(
    names: Sequence[str],
    work: Work,
    sizes: Sequence[int],
    plan: Plan,
    folder: Path,
    core: int,
    record: Record,
    tick: Callable[[str], None],
) -> None:
    """Every size in turn, all peers by turns within it; recall 0.95. work holds as many rows as the largest size."""
    plan = replace(plan, builds=1, passes=2, reopens=1, writes=50, cap=4.0, write_cap=3.0)
    points: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    for size in sizes:
        going = [name for name in names if worth_it(points[name], size)]
        for name in set(names) - set(going):
            record({"section": "scaling", "peer": name, "size": size, "stopped": "its build would take too long"})
        if not going:
            continue
        collected: list[dict[str, Any]] = []
        smaller = Work(work.folder, work.name, size)
        session = Session(list(going), smaller, plan, folder / str(size), core, collected.append, tick)
        try:
            one_size(session)
        finally:
            session.finish()
        for name in going:
            point = gathered(name, collected)
            record({"section": "scaling", "peer": name, "size": size, **point})
            points[name][size] = {key: value for key, value in point.items() if key in CURVES}
    for name in names:
        for fitted in exponents(points[name]):
            record({"section": "scaling", "peer": name, **fitted})


def one_size(session: Session) -> None:
    ingest(session)
    calibration, judge = Judge(session, session.work.calibration[:200]), Judge(session, session.work.judged[:200])

    def choose(name: str) -> None:
        session.chosen[name] = knobs_for(session, name, calibration, TARGETS[:1], "ids", 0)

    session.each("search", 0, choose)
    knobs = {name: session.chosen[name][0.95] for name in session.names}
    measured(session, {"section": "search"}, knobs, judge, session.plan.passes, "ids")
    reopen(session)
    single_writes(session, "insert", True)
    single_writes(session, "insert", False)
    single_writes(session, "delete", True)


def gathered(name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One point of the curves from what the sections recorded; synced inserts where the peer has them."""
    point: dict[str, Any] = {}
    for one in (record for record in records if record["peer"] == name):
        section = one["section"]
        if "error" in one:
            point["error"] = one["error"]
        elif section == "ingest":
            point["build_s"] = one["indexed_s"]
        elif section == "search":
            point |= {"search_ms": one["ms"], "recall": one["recall"], "knob": one["knob"]}
        elif section == "reopen":
            point |= {"memory_mb": one["memory_mb"], "disk_mb": one["disk_mb"], "reopen_s": one["answer_s"]}
        elif one.get("calls"):
            point.setdefault(f"{one['kind']}_ms", one["p50"])
    return point


def worth_it(points: dict[int, dict[str, float]], size: int) -> bool:
    if not points:
        return True
    largest = max(points)
    if "build_s" not in points[largest]:
        return False
    return bool(points[largest]["build_s"] * (size / largest) ** 1.15 <= LONGEST_BUILD)


def exponents(points: dict[int, dict[str, float]]) -> list[dict[str, Any]]:
    values: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for size, point in sorted(points.items()):
        for curve in CURVES:
            if point.get(curve, 0) > 0:
                values[curve].append((size, point[curve]))
    found = []
    for curve, pairs in values.items():
        large = [pair for pair in pairs if pair[0] >= FITTED_FROM]
        used = large if len(large) >= 2 else pairs
        if len(used) >= 2:
            slope, residual = exponent([size for size, _ in used], [value for _, value in used])
            found.append(
                {"curve": curve, "exponent": slope, "residual": residual, "from": used[0][0], "to": used[-1][0]}
            )
    return found
