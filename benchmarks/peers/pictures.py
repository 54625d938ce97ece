"""Charts as PNG files for the README, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import Chart
from .drawing import colour
from .registry import OURS

__all__ = ["draw"]


def draw(charts: Sequence[Chart], folder: Path, prefix: str) -> list[Path]:
    """One file for each chart: ``<prefix>-<key>.png``. Nothing where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    return [one(chart, folder / f"{prefix}-{chart.key}.png") for chart in charts]


def one(chart: Chart, path: Path) -> Path:
    from matplotlib import pyplot as plt

    tall = 0.34 * len(chart.categories) + 1.4 if chart.categories else 4.6
    figure, axes = plt.subplots(figsize=(9, tall), dpi=110)
    {"lines": lines, "dots": dots, "bars": bars}[chart.kind](chart, axes)
    axes.set_title(chart.title, loc="left", fontsize=11)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path


def lines(chart: Chart, axes: Any) -> None:
    for series in chart.series:
        ours = series.name in OURS
        xs, ys = zip(*series.points, strict=True)
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
