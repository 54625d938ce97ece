"""What the pictures show, apart from how they are drawn: series taken from the records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log10
from typing import Any, Literal

from .registry import NAMES
from .scaling import CURVES
from .sets import SETS

__all__ = ["RECALL_TICKS", "Chart", "Scale", "Series", "charts", "placed"]

Record = dict[str, Any]
Scale = Literal["linear", "log", "recall"]
"""recall: by the logarithm of what is missed, so that 0.99 and 0.999 are as far apart as 0.9 and 0.99."""

RECALL_TICKS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
_NOTHING_MISSED = 0.0003
"""Where a recall of 1 stands on that scale: below the least share that a run of 2,500 results can tell from nothing."""


def placed(value: float, scale: Scale) -> float:
    """A position that is linear in the picture."""
    if scale == "recall":
        return -log10(max(1 - value, _NOTHING_MISSED))
    return log10(value) if scale == "log" else value


@dataclass(frozen=True)
class Series:
    """points: (x, y); for categories, y is the position of the category."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """kind: ``lines`` through points, ``dots`` beside categories, or ``bars``; categories from the top down."""

    key: str
    title: str
    kind: Literal["lines", "dots", "bars"]
    x: str
    y: str
    series: tuple[Series, ...]
    categories: tuple[str, ...] = ()
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    note: str = ""
    """What a reader must know to read it."""


def charts(records: Sequence[Record]) -> list[Chart]:
    """Those that there are figures for."""
    made = [
        recall_against_speed(records),
        *(latency(records, target) for target in (0.95, 0.99)),
        *(of_set(records, name) for name in SETS),
        threads(records),
        writes(records),
        memory(records),
        *(growth(records, curve, what) for curve, what in CURVES.items()),
    ]
    return [chart for chart in made if any(series.points for series in chart.series)]


def of(records: Iterable[Record], section: str, field: str, **values: Any) -> list[Record]:
    return [
        record
        for record in records
        if record["section"] == section
        and field in record
        and all(record.get(key) == value for key, value in values.items())
    ]


def in_order(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=NAMES.index)


def recall_against_speed(records: Sequence[Record]) -> Chart:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in of(records, "search", "recall", what="curve"):
        points[record["peer"]].append((record["recall"], 1000 / record["ms"]))
    series = tuple(Series(name, front(points[name])) for name in in_order(points))
    note = (
        "Up and to the right is better. Each line is one store or library, each dot one of its settings; settings that "
        "another setting of the same one beats in both are left out. The axis of recall stretches towards 1: each "
        "step from 0.9 to 0.99 to 0.999 misses a tenth as much."
    )
    title = "Recall against speed, one query at a time"
    return Chart("recall", title, "lines", "recall@10", "queries/s", series, (), "recall", "log", note)


def front(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Those with no other point of at least the same recall and more speed, by growing recall."""
    kept: list[tuple[float, float]] = []
    for recall, speed in sorted(points, reverse=True):
        if not kept or speed > kept[-1][1]:
            kept.append((recall, speed))
    return tuple(reversed(kept))


def latency(records: Sequence[Record], target: float) -> Chart:
    found = of(records, "search", "p50", what="ids", target=target)
    title = f"Time of a search at recall@10 {target}"
    return spans(f"latency-{target}".replace(".", ""), title, found)


def of_set(records: Sequence[Record], name: str) -> Chart:
    found = of(records, "sets", "p50", set=name, of="search", what="ids", target=0.95)
    return spans(f"set-{name}".replace(" ", "-"), f"Time of a search at recall@10 0.95: {name}", found)


def threads(records: Sequence[Record]) -> Chart:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in of(records, "threads", "per_s"):
        points[record["peer"]].append((record["threads"], record["per_s"]))
    series = tuple(Series(name, tuple(sorted(points[name]))) for name in in_order(points))
    note = "Higher is better. Threads of one process, on all cores of the machine, at recall 0.95."
    title = "Searches a second by the number of threads"
    return Chart("threads", title, "lines", "threads", "searches/s", series, (), "log", "log", note)


def writes(records: Sequence[Record]) -> Chart:
    return spans("inserts", "Time of a synced insert", of(records, "writes", "p50", kind="insert", synced=True))


def spans(key: str, title: str, records: Sequence[Record]) -> Chart:
    """p50, p95 and p99 of each peer on one line, the quickest on top."""
    ordered = sorted(records, key=lambda record: float(record["p50"]))
    series = tuple(
        Series(name, tuple((float(record[name]), float(i)) for i, record in enumerate(ordered)))
        for name in ("p50", "p95", "p99")
    )
    note = "Left is better. p50 is the median; of a hundred calls five take longer than p95, and one longer than p99."
    names = tuple(record["peer"] for record in ordered)
    return Chart(key, title, "dots", "milliseconds", "", series, names, "log", note=note)


def memory(records: Sequence[Record]) -> Chart:
    ordered = sorted(of(records, "reopen", "memory_mb"), key=lambda record: float(record["memory_mb"]))
    points = tuple((float(record["memory_mb"]), float(i)) for i, record in enumerate(ordered))
    title = "Resident memory after opening and fifty searches"
    names = tuple(record["peer"] for record in ordered)
    note = "Shorter is better. What the process takes beyond what it took before it opened the store."
    return Chart("memory", title, "bars", "megabytes", "", (Series("memory", points),), names, note=note)


def growth(records: Sequence[Record], curve: str, what: str) -> Chart:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in of(records, "scaling", curve):
        if record[curve] > 0:
            points[record["peer"]].append((record["size"], record[curve]))
    unit = {"ms": "milliseconds", "mb": "megabytes", "s": "seconds"}[curve.rpartition("_")[2]]
    series = tuple(Series(name, tuple(sorted(points[name]))) for name in in_order(points))
    sizes = sorted({size for one in series for size, _ in one.points})
    note = f"Lower is better. Measured at {', '.join(f'{size:,.0f}' for size in sizes)} units."
    return Chart(f"scaling-{curve}", f"Growth: {what}", "lines", "units", unit, series, (), "log", "log", note)
