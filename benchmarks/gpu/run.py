"""Run all GPU benchmarks: figures as JSON and plots under benchmarks/results/gpu.

    python benchmarks/gpu/run.py [--device cuda:0 | cpu] [--quick] [--parts search training ...] [--minutes 20]

Figures are written after each part, so that they are kept if the machine goes away. Parts that would begin after
``--minutes``, and shapes of more than ``--most-values`` components, are left out with a message. At the end come the
targets for a GPU and whether they were reached (``verdicts.py``).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import answers, bandwidth, ingest, memory, search, training
from gpu.common import FAILURES, RESULTS, Setting, add_dims, facts, note, parser, release, save, setting_of
from gpu.plots import draw
from gpu.verdicts import as_rows, table_of

Part = Callable[[Setting, argparse.Namespace], dict[str, Any]]

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
    """The parts in their order; the search table is cut by size, smallest first."""
    steps: list[tuple[str, Part]] = []
    for name in dict.fromkeys(args.parts):
        if name == "search":
            steps += [(f"search {n} x {dim}", _search(n, dim)) for n, dim in _shapes(args)]
        else:
            steps.append((name, PARTS[name]))
    return steps


def _shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    rows, dims, most = search.sizes_of(args)
    return sorted(((n, dim) for n in rows for dim in dims if n * dim <= most), key=lambda shape: shape[0] * shape[1])


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


def main() -> None:
    args = options().parse_args()
    setting, started = setting_of(args), time.monotonic()
    report: dict[str, Any] = {"machine": facts(setting), "left_out": _too_large(args)}
    path = args.json or args.out / f"{_name(setting, report)}.json"
    note(f"{report['machine']['device_name']}: {', '.join(args.parts)}")
    for name, part in steps_of(args):
        if time.monotonic() - started > 60 * args.minutes:
            report["left_out"][name] = f"{args.minutes:g} minutes had passed"
            continue
        note(name)
        try:
            merged(report, name, part(setting, args))
        except FAILURES as error:
            report["left_out"][name] = str(error).splitlines()[0]
            note(f"{name}: {error}")
        release(setting)
        save(path, report)
    report["verdicts"] = as_rows(report)
    save(path, report)
    for drawn in draw(report, path.with_suffix("")):
        note(f"plot {drawn}")
    for name, why in report["left_out"].items():
        note(f"left out: {name} ({why})")
    note(table_of(report))


if __name__ == "__main__":
    main()
