"""Charts as SVG, for a page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from .charts import RECALL_TICKS, Chart, Series, placed
from .charts import Scale as Kind
from .registry import NAMES, OURS

__all__ = ["COLOURS", "colour", "svg"]

COLOURS = (
    "#0b5fff", "#00a3a3", "#d1495b", "#edae49", "#7a5195", "#66a182", "#8d6e63",
    "#c2185b", "#9e9e9e", "#737373", "#ff7043", "#5c9ead", "#a0a83c", "#b0b8c4",
)  # fmt: skip
SPAN_COLOURS = {"p50": "#0b5fff", "p95": "#edae49", "p99": "#d1495b", "memory": "#0b5fff"}
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 860, 150, 190, 42, 48
Scale = Callable[[float], float]


def colour(name: str) -> str:
    """The same for a peer in every picture."""
    return SPAN_COLOURS.get(name) or COLOURS[NAMES.index(name) % len(COLOURS)]


def svg(chart: Chart) -> str:
    """One self-contained element; its points carry their values as titles."""
    height = TOP + BOTTOM + (26 * len(chart.categories) if chart.categories else 360)
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    x_low, x_high = bounds(xs, chart.x_scale, chart.kind == "bars")
    across = scale(x_low, x_high, LEFT, WIDTH - RIGHT, chart.x_scale)
    if chart.categories:
        down: Scale = lambda y: TOP + 26 * (y + 0.5)  # noqa: E731 - a scale like the others
        side = "".join(text(LEFT - 8, down(i) + 4, name, "end") for i, name in enumerate(chart.categories))
    else:
        y_low, y_high = bounds(ys, chart.y_scale, False)
        down = scale(y_low, y_high, height - BOTTOM, TOP, chart.y_scale)
        side = "".join(level(down(y), shown(y)) for y in ticks(y_low, y_high, chart.y_scale))
    below = "".join(upright(across(x), height, shown(x)) for x in ticks(x_low, x_high, chart.x_scale))
    drawn = "".join(one_series(chart, series, across, down) for series in chart.series)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(chart.title)}">'
        f"{text(LEFT, 22, chart.title, 'start', 'title')}{side}{below}"
        f"{text((LEFT + WIDTH - RIGHT) / 2, height - 8, chart.x, 'middle')}{text(LEFT, TOP - 6, chart.y, 'end')}"
        f"{drawn}{legend(chart)}</svg>"
    )


def bounds(values: Sequence[float], kind: Kind, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if kind == "log":
        return low / 1.2, high * 1.2
    if kind == "recall":
        return min(1 - (1 - low) * 1.1, 0.9), 1.0
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (0.0 if from_zero else low - room), high + room


def scale(low: float, high: float, start: float, end: float, kind: Kind) -> Scale:
    low, high = placed(low, kind), placed(high, kind)

    def place(value: float) -> float:
        return start + (placed(value, kind) - low) / (high - low) * (end - start)

    return place


def ticks(low: float, high: float, kind: Kind) -> list[float]:
    """Round values within the bounds: 1, 2, 5 times powers of ten where logarithmic, else about six."""
    if kind == "recall":
        return [value for value in RECALL_TICKS if low <= value <= high]
    if kind == "log":
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(powers) <= 4 else (1,)
        return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def shown(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1000:g}k"
    return f"{value:.4g}"


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def level(y: float, words: str) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
    return line + text(LEFT - 8, y + 4, words, "end")


def upright(x: float, height: float, words: str) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}" class="grid"/>'
    return line + text(x, height - BOTTOM + 16, words, "middle")


def one_series(chart: Chart, series: Series, across: Scale, down: Scale) -> str:
    stroke = colour(series.name)
    places = [(across(x), down(y), x, y) for x, y in series.points]
    if chart.kind == "bars":
        return "".join(bar(chart, place, LEFT) for place in places)
    wide = 3 if series.name in OURS else 1.6
    line = ""
    if chart.kind == "lines":
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        line = f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{wide}"/>'
    return line + "".join(dot(chart, series.name, stroke, place) for place in places)


def dot(chart: Chart, name: str, fill: str, place: tuple[float, float, float, float]) -> str:
    x, y, x_value, y_value = place
    where = chart.categories[int(y_value)] if chart.categories else f"{y_value:.4g} {chart.y}"
    about = escape(f"{name}: {x_value:.4g} {chart.x}, {where}")
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{fill}"><title>{about}</title></circle>'


def bar(chart: Chart, place: tuple[float, float, float, float], start: float) -> str:
    x, y, x_value, y_value = place
    name = chart.categories[int(y_value)]
    box = f'<rect x="{start}" y="{y - 8:.1f}" width="{max(x - start, 0):.1f}" height="16" fill="{colour(name)}"/>'
    return box + text(max(x, start) + 6, y + 4, f"{x_value:.4g}", "start")


def legend(chart: Chart) -> str:
    if chart.kind == "bars":
        return ""
    rows = []
    for number, series in enumerate(chart.series):
        y = TOP + 8 + 20 * number
        rows.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{y}" r="5" fill="{colour(series.name)}"/>')
        rows.append(text(WIDTH - RIGHT + 30, y + 4, series.name, "start"))
    return "".join(rows)
