"""Store the same units in MemEvolve's own store and in this package's, and show what each one loses.

Run it::

    python -m memevolve_gpu.demo.corruption --memevolve CHECKOUT

CHECKOUT is a folder with the files of MemEvolve-API; its store needs Python 3.12 and its requirements. Without it only
this package's store is shown. Each store has an index of type ivf, MemEvolve's default, and goes through two tests:

- 200 units are stored, and after the 99th one of them is stored again under its id. Then each unit is searched by its
  own text: it is found if it is the first result.
- A process that stores units is killed by SIGKILL at a random moment between the 50th and the 150th unit, 20 times.
  The store is opened again, and each unit whose ``store`` had returned is retrieved and searched.

Embeddings are this package's ``HashingEmbedder``: equal texts have equal vectors, and nothing is downloaded. Everything
is written to a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..components.store.vector_store import VectorStore
from ..types import JsonObject
from ..utils.embeddings import HashingEmbedder

DIM = 64
SEED = 7
UNITS, AGAIN_AFTER, AGAIN = 200, 99, 10
"""Number of units; after how many of them one is stored again; which one."""

SIDES = {"theirs": "MemEvolve's own store", "ours": "memevolve_gpu"}
ROWS = {
    "again_refused": "the id stored again: refused",
    "accepted": f"of {UNITS} units: accepted by store()",
    "found": f"of {UNITS} units: found by their own text",
    "found_reopened": "  after opening it again",
    "embedded": "texts embedded for that",
    "kills": "killed by SIGKILL while storing",
    "lossy": "  runs that lost acknowledged units",
    "acknowledged": "acknowledged units, all runs",
    "kept": "  there after opening again",
    "searchable": "  found by their own text",
}

MakeStore = Callable[[Path], Any]
Unit = JsonObject


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the results of both stores side by side; returns 0, or 2 when MemEvolve's store could not be run."""
    parser = argparse.ArgumentParser(prog="python -m memevolve_gpu.demo.corruption", description=__doc__.split("\n")[0])
    parser.add_argument("--memevolve", metavar="CHECKOUT", type=Path, help="folder with the files of MemEvolve-API")
    parser.add_argument("--kills", type=int, default=20, help="how often a storing process is killed (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.side:
        return _run_side(given.side, given.kills, given.json)
    if given.memevolve is not None and not (given.memevolve / "src/memevolve").is_dir():
        parser.error(f"--memevolve {given.memevolve} has no src/memevolve; name a checkout of MemEvolve-API")
    return _compare(given.memevolve, given.kills, given.json)


def _compare(checkout: Path | None, kills: int, target: Path | None) -> int:
    figures: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for side, title in SIDES.items():
            if side == "theirs" and checkout is None:
                continue
            done, result = _start_side(side, Path(folder), checkout, kills)
            if not result.exists():
                sys.stderr.write(f"{title} could not be run:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
                sys.stderr.write("MemEvolve needs Python 3.12 and its requirements.txt.\n" if side == "theirs" else "")
                return 2
            figures[side] = json.loads(result.read_text(encoding="utf-8"))
    if checkout is None:
        sys.stdout.write("Without MemEvolve's store: no checkout of MemEvolve-API was given (--memevolve).\n\n")
    names = list(figures)
    sys.stdout.write(f"{'':<44}{''.join(f'{SIDES[name]:>24}' for name in names)}\n")
    for row, title in ROWS.items():
        sys.stdout.write(f"{title:<44}{''.join(f'{figures[name][row]:>24}' for name in names)}\n")
    if target is not None:
        target.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def _start_side(
    side: str, folder: Path, checkout: Path | None, kills: int
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run one store's tests in a new process and folder; the returned file has the figures if it succeeds."""
    place = folder / side
    place.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("MEMEVOLVE_")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHON_DOTENV_DISABLED": "1"}
    if side == "theirs" and checkout is not None:
        environment |= _settings(checkout.resolve() / ".env.example")
        environment |= {"MEMEVOLVE_LOGS_DIR": str(place / "logs"), "MEMEVOLVE_LOG_CONSOLE_LEVEL": "CRITICAL"}
        environment["MEMEVOLVE_UPSTREAM_BASE_URL"] = "http://127.0.0.1:9/v1"  # required; nothing calls it
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(checkout.resolve() / "src"), *([kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else [])]
        )
    result = place / "figures.json"
    command = [sys.executable, "-m", "memevolve_gpu.demo.corruption", "--side", side]
    command += ["--kills", str(kills), "--json", str(result)]
    done = subprocess.run(  # noqa: S603 (this module, with this Python)
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    return done, result


def _settings(example: Path) -> dict[str, str]:
    """Return the settings that MemEvolve ships and cannot be imported without, except those of services."""
    found = {}
    for line in example.read_text(encoding="utf-8").splitlines():
        name, is_setting, value = line.partition("=")
        if is_setting and name.startswith("MEMEVOLVE_") and value and not value.startswith('"'):
            found[name] = value
    return found


# --- one side, in its own process -------------------------------------------------------------------------------


def _run_side(side: str, kills: int, target: Path) -> int:
    embed = _Counting()
    make = _maker(side, embed)
    figures = _store_again(make, embed) | _kill_while_storing(make, kills)
    target.write_text(json.dumps(figures), encoding="utf-8")
    return 0


class _Counting:
    """A ``HashingEmbedder`` that counts its texts."""

    def __init__(self) -> None:
        self.embedder = HashingEmbedder(DIM)
        self.texts = 0

    def __call__(self, text: str) -> Any:
        self.texts += 1
        return self.embedder(text)


def _maker(side: str, embed: _Counting) -> MakeStore:
    store_class: Any = VectorStore
    if side == "theirs":
        from importlib import import_module

        store_class = import_module("memevolve.components.store.vector_store").VectorStore

    def make(folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        return store_class(str(folder / "vector"), embed, DIM, index_type="ivf")

    return make


def _units() -> list[Unit]:
    words = [f"word{at}" for at in range(1_000)]
    chosen = random.Random(SEED)  # noqa: S311 (no secret: the same units on both sides)
    return [
        {"id": f"u{at}", "type": "lesson", "tags": ["demo"], "content": " ".join(chosen.sample(words, 40))}
        for at in range(UNITS)
    ]


def _text(unit: Unit) -> str:
    """Return the text of such a unit that both stores embed."""
    return f"{unit['content']} {' '.join(unit['tags'])} {unit['type']}"


def _found(store: Any, units: Sequence[Unit]) -> int:
    hits = [store.search(_text(unit), 1) for unit in units]
    return sum(bool(hit) and hit[0][1] == unit["id"] for hit, unit in zip(hits, units, strict=True))


def _accepted(store: Any, unit: Unit) -> bool:
    try:
        store.store(dict(unit))
    except (RuntimeError, ValueError):
        return False
    return True


def _store_again(make: MakeStore, embed: _Counting) -> dict[str, int]:
    units = _units()
    store = make(Path("again"))
    accepted = [_accepted(store, unit) for unit in units[:AGAIN_AFTER]]
    again = _accepted(store, units[AGAIN])
    accepted += [_accepted(store, unit) for unit in units[AGAIN_AFTER:]]
    embedded = embed.texts
    found = _found(store, units)
    with _ended(store):
        reopened = make(Path("again"))
    with _ended(reopened):
        return {
            "again_refused": int(not again),
            "accepted": sum(accepted),
            "found": found,
            "found_reopened": _found(reopened, units),
            "embedded": embedded,
        }


@contextlib.contextmanager
def _ended(store: Any) -> Iterator[None]:
    """Close the store at the end; MemEvolve's store has no ``close``."""
    try:
        yield
    finally:
        if hasattr(store, "close"):
            store.close()


def _kill_while_storing(make: MakeStore, kills: int) -> dict[str, int]:
    moments = random.Random(SEED)  # noqa: S311 (no secret: when to kill)
    figures = {"kills": kills, "lossy": 0, "acknowledged": 0, "kept": 0, "searchable": 0}
    units = _units()
    for turn in range(kills):
        folder = Path(f"kill_{turn}")
        acknowledged = _killed(make, folder, units, moments.randint(50, 150), moments.random())
        kept, searchable = _in_child(partial(_counted, make, folder, units[:acknowledged]))
        figures["lossy"] += (kept, searchable) != (acknowledged, acknowledged)
        figures["acknowledged"] += acknowledged
        figures["kept"] += kept
        figures["searchable"] += searchable
    return figures


def _killed(make: MakeStore, folder: Path, units: Sequence[Unit], after: int, fraction: float) -> int:
    """Kill a storing child within one ``store`` after the ``after``-th; return how many it acknowledged."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(lambda: _store_all(make(folder), units, writing))
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as acknowledged:
        began = 0.0
        for at in range(after):
            if not acknowledged.read(1):
                break
            began = began if at else time.perf_counter()
        time.sleep(fraction * (time.perf_counter() - began) / after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return after + len(acknowledged.read())


def _store_all(store: Any, units: Sequence[Unit], acknowledge: int) -> None:
    for unit in units:
        store.store(dict(unit))
        os.write(acknowledge, b"1")


def _counted(make: MakeStore, folder: Path, units: Sequence[Unit]) -> tuple[int, int]:
    """Return how many of the units exist, and how many are found."""
    store = make(folder)
    with _ended(store):
        return sum(store.retrieve(unit["id"]) is not None for unit in units), _found(store, units)


def _in_child(count: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """Run ``count`` in a new process, as after a restart; (0, 0) when the store does not open."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(lambda: os.write(writing, json.dumps(count()).encode()))
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    kept, searchable = json.loads(text) if text else (0, 0)
    return kept, searchable


def _child(work: Callable[[], object]) -> None:
    """Do the work and exit this process without the parent's clean-up."""
    code = 1
    try:
        work()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
