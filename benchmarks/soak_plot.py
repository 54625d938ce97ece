"""Draw memory, descriptors and file sizes over the hours of a soak, where matplotlib is installed.

    python benchmarks/soak_plot.py [FILE.json]

The figures are those of ``scripts/endure --hours H``; the picture is written beside them, with the same name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

FIGURES = Path(__file__).resolve().parent / "results" / "soak.json"
PANELS = ("memory of each process, MiB", "open descriptors of each process", "database, log, MiB", "other files, MiB")


def draw(path: Path) -> Path:
    """Write ``FILE.png`` beside ``FILE.json``. Returns its path."""
    figures: dict[str, Any] = json.loads(path.read_text())
    columns: list[str] = figures["columns"]
    minutes = [row[0] / 60 for row in figures["samples"]]
    plot, axes = plt.subplots(4, 1, figsize=(10, 13), dpi=110, sharex=True)
    for column, name in enumerate(columns[2:], start=2):
        panel = 1 if name.endswith(" files") and name != "other files MiB" else 0
        if name.split()[0] in ("db", "wal"):
            panel = 2
        elif name.split()[0] in ("snapshot", "other", "messages"):
            panel = 3
        values = [row[column] for row in figures["samples"]]
        label = name.removesuffix(" MiB").removesuffix(" files") if panel < 2 else name.removesuffix(" MiB")
        pairs = [(at, value) for at, value in zip(minutes, values, strict=True) if value is not None]
        axes[panel].plot(*zip(*pairs, strict=True), lw=1.2, label=label) if pairs else None
    for axis, title in zip(axes, PANELS, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, color="#dddddd", linewidth=0.6)
        axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1].set_xlabel(f"minutes; {figures['acknowledged_writes']:,} acknowledged writes, {figures['kills']} kills")
    plot.tight_layout()
    target = path.with_suffix(".png")
    plot.savefig(target, metadata={"Software": None})
    return target


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES))
