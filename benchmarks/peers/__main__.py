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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import filing, mixed, scaling, sections
from .data import Work, prepared
from .plan import SECTIONS, predicted
from .registry import NAMES, usable
from .remote import cores
from .session import FULL, QUICK, Clock, Plan, Session

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers.jsonl"
SPARE = 20_000
RUNNERS: dict[str, Callable[[Session], None]] = {
    "ingest": sections.ingest,
    "search": sections.search,
    "filters": sections.filters,
    "reopen": sections.reopen,
    "writes": sections.writes,
    "mixed": mixed.mixed,
}
SCALED = ("memevolve-gpu", "memevolve-gpu ivf", "sqlite-vec", "qdrant-edge", "faiss HNSW", "turbovec")


def arguments_of(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="2,000 units, few repetitions, about two minutes")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, help="default: all but scaling; ingest is always run"
    )
    parser.add_argument("--peers", nargs="+", choices=NAMES, metavar="PEER", help=f"from: {', '.join(NAMES)}")
    parser.add_argument("--size", type=int, help="units (default 50,000; quick 2,000)")
    parser.add_argument("--sizes", type=int, nargs="+", help="units of each step of the scaling section")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real units")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmark", help="where the stores are made")
    parser.add_argument(
        "--output", type=Path, help="JSON lines; default benchmarks/results/peers.jsonl, quick: in build"
    )
    parser.add_argument("--predict", action="store_true", help="say how long it would take, and end")
    arguments = parser.parse_args(given)
    arguments.size = arguments.size or (2_000 if arguments.quick else 50_000)
    arguments.sections = arguments.sections or [name for name in SECTIONS if name != "scaling"]
    arguments.sizes = arguments.sizes or [size for size in scaling.SIZES if not arguments.quick or size <= 3_000]
    arguments.output = arguments.output or (arguments.work / "quick.jsonl" if arguments.quick else RESULTS)
    return arguments


def chosen_peers(wanted: Sequence[str] | None, console: Console) -> list[str]:
    """Those that are wanted and installed; the others are named with the reason."""
    names = []
    for name in wanted or NAMES:
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
    scaled = [name for name in names if arguments.peers or name in SCALED]
    seconds = predicted(names, [one for one in arguments.sections if one != "scaling"], arguments.size, plan)
    if "scaling" in arguments.sections:
        seconds += predicted(scaled, ["scaling"], 0, plan, arguments.sizes)
    alone = arguments.sections == ["scaling"]
    sizes = ", ".join(f"{size:,}" for size in (arguments.sizes if alone else [arguments.size]))
    console.print(f"{len(scaled if alone else names)} peers, {sizes} units: about {seconds / 60:.0f} minutes")
    if not arguments.predict:
        run(arguments, names, scaled, plan, console, "scripts/benchmark " + shlex.join(given))
    return 0


def run(
    arguments: argparse.Namespace, names: list[str], scaled: list[str], plan: Plan, console: Console, command: str
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
        size = max([arguments.size, *(arguments.sizes if "scaling" in arguments.sections else [])])
        work = prepared(arguments.data, folder / "data", size, SPARE, plan.queries // 2)
        results.write(filing.heading(command, work, arguments, plan, names, core, folder))
        session = Session(
            names, Work(work.folder, work.name, arguments.size), plan, folder / "stores", core, results.write, print
        )
        try:
            for section in SECTIONS:
                one_section(section, session, arguments, scaled, results.write, progress, work)
        finally:
            session.finish()
            filing.removed(folder)
            os.sched_setaffinity(0, before)
            results.write({"section": "end", "seconds": clock()})
    filing.shown(arguments.output, console)


def one_section(
    section: str,
    session: Session,
    arguments: argparse.Namespace,
    scaled: list[str],
    record: Callable[[dict[str, Any]], None],
    progress: Progress,
    work: Work,
) -> None:
    only_scaling = arguments.sections == ["scaling"]
    if section not in arguments.sections and (section != "ingest" or only_scaling):
        return
    task = progress.add_task(section, total=None)
    clock = Clock()

    def tick(name: str) -> None:
        progress.update(task, description=f"{section}: {name}", advance=1)

    session.tick = tick
    if section == "scaling":
        for remote in session.remotes.values():
            remote.end()
        session.remotes.clear()
        scaling.scaling(
            scaled, work, sorted(arguments.sizes), session.plan, session.folder / "scaling", session.core, record, tick
        )
    else:
        RUNNERS[section](session)
    progress.update(task, description=section, total=1, completed=1)
    record({"section": "time", "of": section, "seconds": clock()})


if __name__ == "__main__":
    sys.exit(main())
