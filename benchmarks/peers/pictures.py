"""Charts as PNG files for the README, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import RECALL_TICKS, Chart, placed
from .drawing import bounds, colour, shown
from .registry import OURS

__all__ = ["SHOWN", "draw"]


def draw(charts: Sequence[Chart], folder: Path, prefix: str) -> list[Path]:
    """One file for each chart: ``<prefix>-<key>.png``. Nothing where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    mpl.rcParams["grid.color"] = "#dddddd"
    light = [one(chart, folder / f"{prefix}-{chart.key}.png") for chart in charts]
    with mpl.rc_context(DARK):
        dark = [one(chart, folder / f"{prefix}-{chart.key}-dark.png") for chart in charts]
    return [*light, *dark]


SHOWN = (
    "recall",
    "latency-095",
    "set-wide",
    "set-documents",
    "set-mixed-text",
    "set-million",
    "threads",
    "scaling-search_ms",
)
"""The pictures of the documentation."""

_INK, _PAPER = "#d7dae0", "#16181d"
DARK = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), _PAPER),
    "grid.color": "#3a3f4a",
}


def one(chart: Chart, path: Path) -> Path:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    tall = 0.34 * len(chart.categories) + 1.4 if chart.categories else 4.6
    figure, axes = plt.subplots(figsize=(9, tall), dpi=110)
    {"lines": lines, "dots": dots, "bars": bars}[chart.kind](chart, axes)
    axes.set_title(chart.title, loc="left", fontsize=11)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.tick_params(labelsize=10)
    for kind, axis, put in ((chart.x_scale, axes.xaxis, axes.set_xscale), (chart.y_scale, axes.yaxis, axes.set_yscale)):
        if kind == "log":
            put("log")
            low, high = axis.get_view_interval()
            steps = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
            axis.set_major_locator(LogLocator(subs=steps))
            axis.set_major_formatter(lambda value, _place: shown(value))
            axis.set_minor_formatter(NullFormatter())
    if chart.x_scale == "recall":
        axes.set_xticks([placed(value, "recall") for value in RECALL_TICKS], [shown(value) for value in RECALL_TICKS])
        low, high = (placed(value, "recall") for value in bounds(xs_of(chart), "recall", False))
        axes.set_xlim(low, high + 0.05)
    axes.grid(True, which="major", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path


def xs_of(chart: Chart) -> list[float]:
    return [x for series in chart.series for x, _ in series.points]


def lines(chart: Chart, axes: Any) -> None:
    for series in chart.series:
        ours = series.name in OURS
        xs, ys = zip(*series.points, strict=True)
        xs = tuple(placed(x, "recall") for x in xs) if chart.x_scale == "recall" else xs
        width = 2.6 if ours else 1.2
        axes.plot(xs, ys, "o-", ms=3.5, lw=width, color=colour(series.name), label=series.name, zorder=3 if ours else 2)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def dots(chart: Chart, axes: Any) -> None:
    for series in chart.series:
        xs, ys = zip(*series.points, strict=True)
        axes.plot(xs, ys, "o", ms=6, color=colour(series.name), label=series.name)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    named(chart, axes)


def bars(chart: Chart, axes: Any) -> None:
    for series in chart.series:
        for value, place in series.points:
            axes.barh(place, value, color=colour(chart.categories[int(place)]))
            axes.annotate(f" {value:.0f}", (max(value, 0), place), va="center", fontsize=8)
    named(chart, axes)


def named(chart: Chart, axes: Any) -> None:
    axes.set_yticks(range(len(chart.categories)), chart.categories)
    axes.invert_yaxis()
