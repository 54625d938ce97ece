"""The command demo: the first steps on sample units, and what a crash does to a store."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import PROGRAM, ExitCode, InputError, StoreExistsError, app
from .options import AsJson
from .output import Output

if TYPE_CHECKING:
    from ..types import MemoryUnit

_SAMPLES = "memory_units.jsonl"
_SEED_UNITS = 100
_KILLED_AFTER = 120
"""Units in the store before the crash, and the acknowledged units after which the writer is killed."""

_STEPS: list[list[str]] = [
    ["init", "--embedder", "hashing"],
    ["add", _SAMPLES],
    ["search", "recover commits lost by a hard reset", "--top-k", "3"],
    ["search", "which commit introduced the regression", "--top-k", "3", "--filter", "type=skill"],
    ["search", "disk is full", "--top-k", "3", "--filter", "metadata.score>=0.8"],
    ["stats"],
    ["health"],
    ["check"],
]


def demo(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder to create.")] = "memevolve-demo",
    *,
    crash: Annotated[
        bool, typer.Option("--crash", help="Kill a writer with SIGKILL, open the store again, restore a backup.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a store of 300 sample units in a new folder and run the first commands on it.

    It needs no network: the hashing embedder knows words and no meaning. Exits with 1 when something was lost.
    """
    if as_json and not crash:
        raise InputError("--json: the demo prints several commands; give --json with --crash, or with each command")
    place = Path(folder).expanduser()
    if place.exists():
        raise StoreExistsError(f"{folder} exists; delete it, or name another folder: {PROGRAM} demo FOLDER")
    place.mkdir(parents=True)
    output = Output(as_json)
    if crash:
        document, lines = _crash(place / "memory", output)
        output.show(document, *lines)
        if document["lost"] or document["problems"]:
            raise typer.Exit(ExitCode.FAILED)
        return
    (place / _SAMPLES).write_bytes(_sample_file())
    for step in _STEPS:
        _show(step, place)
    sys.stdout.write(f"\nThe store is {place}/memory. Try: {PROGRAM} search 'your words' --store {place}/memory\n")


def sample_units() -> list[MemoryUnit]:
    """Return the 300 sample units of the package."""
    return [json.loads(line) for line in _sample_file().splitlines()]


def _sample_file() -> bytes:
    return resources.files(__package__ or "").joinpath(_SAMPLES).read_bytes()


def _show(step: list[str], place: Path) -> None:
    """Print a command line and run it."""
    line = [str(place / part) if part == _SAMPLES else part for part in step] + ["--store", str(place / "memory")]
    sys.stdout.write(f"\n$ {PROGRAM} {shlex.join(line)}\n")
    sys.stdout.flush()
    try:
        app(line)
    except SystemExit as ending:
        if ending.code:
            raise


def store_until_killed(prefix: str) -> None:
    """Store the sample units one by one, print each id when its ``store`` has returned, and never end."""
    from ..components.store.vector_store import VectorStore
    from ..utils.embeddings import HashingEmbedder

    store, count = VectorStore(prefix, HashingEmbedder()), 0
    while True:
        for unit in sample_units():
            count += 1
            print(store.store({**unit, "id": f"{os.getpid()}-{count}"}), flush=True)  # noqa: T201 - read by the parent


def _killed_writer(prefix: str) -> list[str]:
    """Start a writer, kill it with SIGKILL in the middle, and return the ids that it had acknowledged."""
    code = f"from {__name__} import store_until_killed; store_until_killed({prefix!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:  # noqa: S603
        if child.stdout is None:  # never: it was asked for
            return []
        told = [child.stdout.readline() for _ in range(_KILLED_AFTER)]
        child.send_signal(signal.SIGKILL)
        told += child.stdout.readlines()
    return [line.strip() for line in told if line.endswith("\n")]


def _crash(prefix: Path, output: Output) -> tuple[dict[str, object], list[str]]:
    """Run the story of a crash and a restore; return its figures, and the lines that tell it."""
    from ..components.store.vector_store import VectorStore
    from ..utils.embeddings import HashingEmbedder

    started, place, backup = time.perf_counter(), str(prefix), f"{prefix}-backup.db"
    output.note("killing a writer twice; this takes some seconds ...")
    with VectorStore(place, HashingEmbedder()) as store:
        store.store_batch(sample_units()[:_SEED_UNITS])
        store.backup(backup)
    acknowledged = _killed_writer(place)
    wal = Path(f"{place}.db-wal").stat().st_size
    with VectorStore(place, HashingEmbedder()) as store:
        lost = [unit_id for unit_id in acknowledged if not store.exists(unit_id)]
        count, problems = store.count(), [one.message for one in store.check()]
    lines = [
        f"stored {_SEED_UNITS} units and copied them to {backup}",
        f"kill -9 hit the writer after {len(acknowledged)} acknowledged units; it left a log of {wal:,} bytes",
        f"opened again: {count} units, {len(lost)} acknowledged ones lost, {len(problems)} problems found by check",
    ]
    again = _killed_writer(place)
    wal = Path(f"{place}.db-wal").stat().st_size
    replaced = str(VectorStore.restore(backup, place)).removesuffix(".db")
    with VectorStore(place, HashingEmbedder()) as store:
        restored = store.count()
        problems += [one.message for one in store.check()]
        problems += [f"restored {restored} units instead of {_SEED_UNITS}"] if restored != _SEED_UNITS else []
    with VectorStore(replaced, HashingEmbedder()) as store:
        lost += [unit_id for unit_id in {*acknowledged, *again} if not store.exists(unit_id)]
    lines += [
        f"kill -9 hit another writer after {len(again)} acknowledged units; it left a log of {wal:,} bytes",
        f"restored the backup in spite of that log: {restored} units, {len(problems)} problems found by check",
        f"the store from before the restore is kept as {replaced}",
        f"{len(acknowledged) + len(again)} acknowledged units, {len(lost)} lost, {time.perf_counter() - started:.1f} s",
    ]
    document = {
        "acknowledged": len(acknowledged) + len(again),
        "lost": len(lost),
        "problems": problems,
        "restored": restored,
        "replaced": replaced,
    }
    return document, lines
