"""Compare this store with others: the same work, in the same run, one thread.

    scripts/benchmark [--quick] [--sections ...] [--peers ...] [--size N] [--sizes N ...]

Figures are added to a file of JSON lines; the page, the pictures and the table are made from the newest run in it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import filing, mixed, scaling, sections
from . import sets as other_data
from .data import Work, prepared
from .plan import APART, SECTIONS, predicted
from .protocol import BEFORE
from .registry import NAMES, usable
from .remote import cores
from .session import FULL, QUICK, Clock, Plan, Session

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers.jsonl"
SPARE = 20_000
QUICK_SIZE = 2_000
RUNNERS: dict[str, Callable[[Session], None]] = {
    "ingest": sections.ingest,
    "unseen": sections.unseen,
    "search": sections.search,
    "filters": sections.filters,
    "reopen": sections.reopen,
    "threads": sections.threads,
    "writes": sections.writes,
    "mixed": mixed.mixed,
}
SCALED = ("memevolve-gpu", "memevolve-gpu ivf", "sqlite-vec", "qdrant-edge", "turbovec")
NEAR = ("memevolve-gpu", "memevolve-gpu ivf", "qdrant-edge", "zvec", "hnswlib", "turbovec", BEFORE)
"""Peers of the other data sets: those that come near in a search."""
FAR = ("lancedb", "milvus-lite", "usearch")
"""Left out unless they are named: not first in any row of a whole run, and far behind in most."""


def arguments_of(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="2,000 units, few repetitions, about two minutes")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, help="default: all (quick: without sets and scaling)"
    )
    parser.add_argument("--peers", nargs="+", choices=NAMES, metavar="PEER", help=f"from: {', '.join(NAMES)}")
    parser.add_argument("--size", type=int, help="units (default 50,000; quick 2,000)")
    parser.add_argument("--sizes", type=int, nargs="+", help="units of each step of the scaling section")
    parser.add_argument(
        "--sets", nargs="+", choices=list(other_data.SETS), help="of the section sets (default: all but the million)"
    )
    parser.add_argument("--set-size", type=int, help="units of each data set (default: its own)")
    parser.add_argument("--minutes", type=float, default=25.0, help="begin no part that would end later (25)")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real units")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmark", help="where the stores are made")
    parser.add_argument(
        "--output", type=Path, help="JSON lines; default benchmarks/results/peers.jsonl, quick: in build"
    )
    parser.add_argument("--predict", action="store_true", help="say how long it would take, and end")
    arguments = parser.parse_args(given)
    arguments.size = arguments.size or (QUICK_SIZE if arguments.quick else 50_000)
    arguments.sections = arguments.sections or [name for name in SECTIONS if name not in APART or not arguments.quick]
    arguments.sets = arguments.sets or [name for name in other_data.SETS if name != "million"]
    arguments.sizes = arguments.sizes or [size for size in scaling.SIZES if not arguments.quick or size <= 3_000]
    arguments.output = arguments.output or (arguments.work / "quick.jsonl" if arguments.quick else RESULTS)
    return arguments


def chosen_peers(wanted: Sequence[str] | None, console: Console) -> list[str]:
    """Those that are wanted and installed; the others are named with the reason."""
    names = []
    for name in wanted or [name for name in NAMES if name not in FAR]:
        reason = usable(name)
        if reason:
            console.print(f"skipped: {name}: {reason}")
        else:
            names.append(name)
    return names


def main(given: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    arguments = arguments_of(given)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    if sys.platform != "linux":
        console.print("scripts/benchmark needs Linux: it pins processes to a core and reads their memory from /proc")
        return 2
    plan = QUICK if arguments.quick else FULL
    names = chosen_peers(arguments.peers, console)
    parts = list(parts_of(arguments, names))
    seconds = sum(part.predicted(plan) for part in parts)
    console.print(f"{len(names)} peers, {', '.join(part.title for part in parts)}: about {seconds / 60:.0f} minutes")
    if not arguments.predict:
        run(arguments, names, parts, plan, console, "scripts/benchmark " + shlex.join(given))
    return 0


@dataclass(frozen=True)
class Part:
    """What is begun or left out as a whole: a section of the main part, one data set, or the curves of growth."""

    section: str
    names: list[str]
    sizes: list[int]
    of: str = ""

    @property
    def title(self) -> str:
        return f"{self.of or self.section} ({', '.join(f'{size:,}' for size in self.sizes)} units)"

    def predicted(self, plan: Plan) -> float:
        if self.section == "scaling":
            return predicted(self.names, ["scaling"], 0, plan, self.sizes)
        inside = ("ingest", "unseen", "search", "reopen") if self.section == "sets" else (self.section,)
        return predicted(self.names, inside, self.sizes[0], plan)


def parts_of(arguments: argparse.Namespace, names: list[str]) -> Iterator[Part]:
    """In order; the main part is begun with ingest where any of its sections is wanted."""
    main_part = [name for name in arguments.sections if name not in APART]
    for section in SECTIONS:
        if section == "sets" and section in arguments.sections:
            near = [name for name in names if arguments.peers or name in NEAR]
            for one in arguments.sets:
                yield Part(section, near, [arguments.set_size or other_data.SETS[one].size], one)
        elif section == "scaling" and section in arguments.sections:
            scaled = [name for name in names if arguments.peers or name in SCALED]
            yield Part(section, scaled, sorted(arguments.sizes))
        elif section in main_part or (section == "ingest" and main_part):
            yield Part(section, names, [arguments.size])


def run(
    arguments: argparse.Namespace, names: list[str], parts: list[Part], plan: Plan, console: Console, command: str
) -> None:
    core, others = cores()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, others)
    clock = Clock()
    folder = arguments.work / f"run-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    number = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with filing.Results(arguments.output, number) as results, Progress(*columns, console=console) as progress:
        size = max([part.sizes[-1] for part in parts if part.section != "sets"], default=QUICK_SIZE)
        work = prepared(arguments.data, folder / "data", size, SPARE, plan.queries // 2)
        results.write(filing.heading(command, work, arguments, plan, names, core, folder))
        session = Session(
            names, Work(work.folder, work.name, arguments.size), plan, folder / "stores", core, results.write, print
        )
        try:
            for part in parts:
                if clock() + part.predicted(plan) > 60 * arguments.minutes:
                    results.write({"section": "time", "of": part.title, "left_out": "no time left"})
                    console.print(f"left out, no time left: {part.title}")
                else:
                    one_part(part, session, arguments, results.write, progress, work)
        finally:
            session.finish()
            filing.removed(folder)
            os.sched_setaffinity(0, before)
            results.write({"section": "end", "seconds": clock()})
    filing.shown(arguments.output, console)


def one_part(
    part: Part,
    session: Session,
    arguments: argparse.Namespace,
    record: Callable[[dict[str, Any]], None],
    progress: Progress,
    work: Work,
) -> None:
    task = progress.add_task(part.title, total=None)
    clock = Clock()

    def tick(name: str) -> None:
        progress.update(task, description=f"{part.of or part.section}: {name}", advance=1)

    session.tick = tick
    if part.section in APART:
        session.finish()  # these make stores of their own
        folder = session.folder / (part.of or part.section).replace(" ", "-")
        if part.section == "scaling":
            scaling.scaling(part.names, work, part.sizes, session.plan, folder, session.core, record, tick)
        else:
            source = arguments.data
            other_data.sets(
                part.names, part.of, part.sizes[0], source, session.plan, folder, session.core, record, tick
            )
    else:
        RUNNERS[part.section](session)
    progress.update(task, description=part.title, total=1, completed=1)
    record({"section": "time", "of": part.title, "seconds": clock()})


if __name__ == "__main__":
    sys.exit(main())
