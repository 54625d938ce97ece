"""Plots of what was measured, where matplotlib is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__all__ = ["draw"]


def draw(report: dict[str, Any], stem: Path) -> list[Path]:
    """Write ``STEM-search.png``, ``STEM-training.png`` and ``STEM-memory.png``; none without matplotlib."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return []
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    name, made = report["machine"]["device_name"], []
    for part, plot in (("search", _search), ("training", _training), ("memory", _memory)):
        if part in report:
            figure = plot(plt, report[part], name)
            path = stem.with_name(f"{stem.name}-{part}.png")
            figure.savefig(path, dpi=120, bbox_inches="tight")
            plt.close(figure)
            made.append(path)
    return made


def _label(row: dict[str, Any]) -> str:
    return f"{row['engine']} {row['kind']} {row['precision']}"


def _search(plt: Any, found: dict[str, Any], device: str) -> Any:
    """Milliseconds of one query, and queries a second of the largest batch, over the number of rows."""
    rows = [row for row in found["table"] if "times" in row]
    dims = sorted({row["dim"] for row in rows})
    figure, axes = plt.subplots(len(dims), 2, figsize=(13, 5 * len(dims)), squeeze=False)
    for line, dim in enumerate(dims):
        for label in dict.fromkeys(_label(row) for row in rows if row["dim"] == dim):
            own = sorted((row for row in rows if row["dim"] == dim and _label(row) == label), key=lambda r: r["rows"])
            counts = [row["rows"] for row in own]
            axes[line][0].loglog(counts, [row["times"]["1"]["ms"] for row in own], marker="o", label=label)
            axes[line][1].loglog(counts, [row["times"]["1024"]["qps"] for row in own], marker="o", label=label)
        axes[line][0].set(title=f"one query, {dim} dimensions, {device}", xlabel="rows", ylabel="ms, end to end")
        axes[line][1].set(title=f"1,024 queries at once, {dim} dimensions", xlabel="rows", ylabel="queries a second")
        axes[line][1].legend(fontsize=7)
    return figure


def _training(plt: Any, found: dict[str, Any], device: str) -> Any:
    ran = {name: row for name, row in found["training"].items() if "seconds" in row}
    figure, axis = plt.subplots(figsize=(8, 0.7 + 0.6 * max(1, len(ran))))
    axis.barh(list(ran), [row["seconds"] for row in ran.values()])
    for at, row in enumerate(ran.values()):
        axis.text(row["seconds"], at, f" objective {row['objective']:.5g}", va="center", fontsize=8)
    shape = f"{found['rows']:,} x {found['dim']}, {found['centroids']:,} centroids"
    axis.set(title=f"k-means, {shape}, {device}", xlabel="seconds, end to end")
    return figure


def _memory(plt: Any, found: dict[str, Any], device: str) -> Any:
    ran = [row for row in found["memory"] if "predicted_bytes" in row]
    figure, axis = plt.subplots(figsize=(8, 0.7 + 0.35 * max(1, len(ran))))
    labels = [f"{_label(row)} {row['dim']}" for row in ran]
    axis.barh(labels, [row["predicted_bytes"] / 2**20 for row in ran], height=0.8, label="predicted")
    reported = [(row.get("card_bytes") or row["said_bytes"]) / 2**20 for row in ran]
    axis.barh(labels, reported, height=0.4, label="reported")
    axis.set(title=f"device memory, {device}", xlabel="MiB")
    axis.legend()
    return figure
