"""Run all GPU benchmarks: figures as JSON and plots under benchmarks/results/gpu.

    python benchmarks/gpu/run.py [--device cuda:0 | cpu] [--quick] [--parts search training ...] [--minutes 20]

Each row is written as soon as it is measured, to a file .jsonl that ``verdicts.py`` reads as well, so that nothing is
lost if the machine goes away or a step is killed. The shapes of the targets come first. Rows that would begin after
``--minutes``, and shapes of more than ``--most-values`` components, are left out with a message; ``--no-cpu`` leaves
out the CPU. At the end come the targets for a GPU and whether they were reached (``verdicts.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import answers, bandwidth, ingest, memory, search, training
from gpu.common import FAILURES, RESULTS, LateError, Setting, add_dims, facts, note, parser, release, save, setting_of
from gpu.plots import draw
from gpu.verdicts import as_rows, read_figures, table_of

Part = Callable[[Setting, argparse.Namespace], dict[str, Any]]

HEADLINES = {(1_000_000, 768): 0, (1_000_000, 384): 1}
"""Shapes that the targets name, in the order in which they are measured, before the other parts."""
LAST_HEADLINE = (10_000_000, 384)
"""The one that takes minutes: after the other parts, so that a short lease has all the rest."""

PARTS: dict[str, Part] = {
    "bandwidth": lambda setting, _: bandwidth.run(setting),
    "answers": lambda setting, args: answers.run(setting, *answers.sizes_of(args)),
    "training": lambda setting, args: training.run(setting, *training.sizes_of(args)),
    "memory": lambda setting, args: memory.run(setting, *memory.sizes_of(args)),
    "ingest": lambda setting, args: ingest.run(setting, *ingest.sizes_of(args)),
}


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    for part in (search, answers, training, ingest, memory):
        part.add_options(made)
    add_dims(made)
    made.add_argument(
        "--parts", nargs="+", choices=["search", *PARTS], default=["bandwidth", "search", *list(PARTS)[1:]]
    )
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of figures and plots")
    made.add_argument("--minutes", type=float, default=25.0, help="begin nothing new after so long")
    return made


def steps_of(args: argparse.Namespace) -> list[tuple[str, Part]]:
    """The search table, cut by shape, and the parts: first the bandwidth and the shapes of the targets, then the other
    parts, then the other shapes."""
    parts = [(name, PARTS[name]) for name in dict.fromkeys(args.parts) if name != "search"]
    first = [step for step in parts if step[0] == "bandwidth"]
    if "search" in args.parts:
        shapes = [(shape in HEADLINES, (f"search {shape[0]} x {shape[1]}", _search(*shape))) for shape in _shapes(args)]
        first += [step for headline, step in shapes if headline]
        parts += [step for headline, step in shapes if not headline]
    return first + [step for step in parts if step not in first]


def _shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    rows, dims, most = search.sizes_of(args)
    shapes = [(n, dim) for n in rows for dim in dims if n * dim <= most]
    rank = {LAST_HEADLINE: len(HEADLINES), **HEADLINES}
    return sorted(shapes, key=lambda shape: (rank.get(shape, len(rank)), shape[0] * shape[1]))


def _too_large(args: argparse.Namespace) -> dict[str, str]:
    """The searches that no step is made of, and why."""
    rows, dims, most = search.sizes_of(args)
    if "search" not in args.parts:
        return {}
    return {
        f"search {n} x {dim}": f"more than {most:,} components, see --most-values"
        for n in rows
        for dim in dims
        if n * dim > most
    }


def _search(n: int, dim: int) -> Part:
    return lambda setting, _: search.run(setting, [n], [dim], n * dim)


def _name(setting: Setting, report: dict[str, Any]) -> str:
    card = "".join(letter if letter.isalnum() else "-" for letter in report["machine"]["device_name"].lower())
    return f"{report['machine']['date']}-{card}{'-quick' if setting.quick else ''}"


def merged(report: dict[str, Any], part: str, found: dict[str, Any]) -> None:
    """Add the figures of a part; the rows of all search tables come together."""
    if part.startswith("search"):
        table = report.setdefault("search", {"data": found["data"], "k": found["k"], "table": []})
        table["table"] += found["search"]
        report.setdefault("bandwidth", found["bandwidth"])
    else:
        report |= found if part == "bandwidth" else {part: found}


class Kept:
    """A file of JSON lines: the machine, then each row with its part, on the disk before the next one is measured."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self("machine", machine)

    def __call__(self, part: str, row: dict[str, Any]) -> None:
        self._file.write(json.dumps({"part": part, "row": row}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def main() -> None:
    args = options().parse_args()
    setting = replace(setting_of(args), until=time.monotonic() + 60 * args.minutes)
    report: dict[str, Any] = {"machine": facts(setting), "left_out": _too_large(args)}
    path = args.json or args.out / f"{_name(setting, report)}.json"
    setting = replace(setting, keep=Kept(path.with_suffix(".jsonl"), report["machine"]))
    note(f"{report['machine']['device_name']}: {', '.join(args.parts)}")
    for name, part in steps_of(args):
        note(name)
        try:
            setting.check_time()
            merged(report, name, part(setting, args))
        except LateError:
            report["left_out"][name] = f"{args.minutes:g} minutes had passed"
        except FAILURES as error:
            report["left_out"][name] = str(error).splitlines()[0]
            note(f"{name}: {error}")
        release(setting)
        save(path, report)
    for name, own in read_figures(path.with_suffix(".jsonl")).items():  # with the first rows of a part that was cut off
        report[name] = {**report.get(name, {}), **own}
    report["verdicts"] = as_rows(report)
    save(path, report)
    for drawn in draw(report, path.with_suffix("")):
        note(f"plot {drawn}")
    for name, why in report["left_out"].items():
        note(f"left out: {name} ({why})")
    note(table_of(report))


if __name__ == "__main__":
    main()
