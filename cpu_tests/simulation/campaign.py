"""``scripts/endure``: simulated lives that replay from a seed, real kills, and eight processes at once.

    scripts/endure                          a small campaign: 100 power cuts, 300 kills, 10 seconds of eight processes
    scripts/endure --cuts 50 --kills 0      the same with other numbers
    scripts/endure --seed 7                 replay one simulated life, step by step, and print its trace hash
    scripts/endure --seed 7 --operations 9  only its first nine steps
    scripts/endure --figures                the whole campaign, into benchmarks/results/campaign.json
    scripts/endure --hours 1                eight processes for hours, with memory, descriptors and files measured

``--figures`` saves its state after every part. Called again with the same numbers and the same code, it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .eight import eight
from .kills import Chain, kill_migrations
from .simulated import STEPS, BrokenPromiseError, Outcome, simulate

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "campaign.json"
STATE = ROOT / "build" / "campaign-state.json"
SMALL = {"cuts": 100, "kills": 300, "seconds": 10}
WHOLE = {"cuts": 1_000, "kills": 10_000, "seconds": 120}
PART = 200
"""Cuts or kills of one part, after which the state is saved."""

ENOUGH = 20
"""Broken promises after which the campaign ends."""

BROKEN = {
    "lost": re.compile(r"lost \[[^\]]|lost or changed"),
    "resurrected": re.compile(r"resurrected \[[^\]]"),
    "wrong mapping": re.compile("wrong mapping|does not find itself|a search misses"),
    "failed reopening": re.compile("StorageError|CorruptStoreError|NotAStoreError|opening"),
}


class Campaign:
    """What was counted so far; ``state`` can be saved and taken up again."""

    def __init__(self, wanted: dict[str, int], first_seed: int) -> None:
        self.wanted = wanted
        self.state: dict[str, Any] = {
            "key": f"{commit()} {sorted(wanted.items())} {first_seed}",
            "commit": commit(),
            "next_seed": first_seed,
            "first_seed": first_seed,
            "traces": "",
            "simulated": {},
            "killed": {},
            "eight": {},
            "chains": 0,
            "failures": [],
            "seconds": 0.0,
        }

    def take_up(self) -> None:
        """Go on where an interrupted run of the same campaign ended."""
        if STATE.exists():
            saved = json.loads(STATE.read_text())
            if saved["key"] == self.state["key"]:
                self.state = saved
                cuts, kills = saved["simulated"].get("cut", 0), saved["killed"].get("kills", 0)
                print(f"going on after {cuts} cuts and {kills} kills")

    def run(self, save: bool) -> None:
        """Everything that is still wanted, part by part."""
        for part in (self.simulate_part, self.kill_part, self.eight_part):
            going = True
            while going and len(self.state["failures"]) < ENOUGH:
                began = time.monotonic()
                going = part()
                self.state["seconds"] += time.monotonic() - began
                if save:
                    STATE.parent.mkdir(exist_ok=True)
                    STATE.write_text(json.dumps(self.state))

    def simulate_part(self) -> bool:
        """Simulated lives until there were so many power cuts; False when there is nothing left to do."""
        tally, goal = Counter(self.state["simulated"]), self.wanted["cuts"]
        if tally["cut"] >= goal:
            return False
        upto = min(goal, tally["cut"] + PART)
        while tally["cut"] < upto and len(self.state["failures"]) < ENOUGH:
            seed = self.state["next_seed"]
            self.state["next_seed"] += 1
            tally["lives"] += 1
            try:
                done = simulate(seed)
            except BrokenPromiseError as error:
                self.broken(str(error))
                continue
            tally += done.tally
            joined = self.state["traces"] + done.trace
            self.state["traces"] = hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()
        self.state["simulated"] = dict(tally)
        print(f"{tally['cut']} power cuts in {tally['lives']} simulated lives, {self.failed()}", flush=True)
        return True

    def kill_part(self) -> bool:
        """Real processes until so many were killed."""
        tally, goal = Counter(self.state["killed"]), self.wanted["kills"]
        if tally["kills"] >= goal:
            return False
        upto = min(goal, tally["kills"] + PART)
        with quick_folder() as folder:
            chain = Chain(self.state["chains"], folder / "chain", tally)
            self.state["chains"] += 1
            try:
                kill_migrations(min(10, upto - tally["kills"]), chain.seed, folder / "migrated", tally)
                while tally["kills"] < upto:
                    chain.round()
            except Exception as error:  # noqa: BLE001 - whatever it was, it is a broken promise
                self.broken(f"kills of chain {chain.seed}, round {chain.rounds} ({chain.what}): {error!r}")
        self.state["killed"] = dict(tally)
        print(f"{tally['kills']} kills, {self.failed()}", flush=True)
        return True

    def eight_part(self) -> bool:
        """Eight processes at once."""
        if self.state["eight"] or not self.wanted["seconds"]:
            return False
        with quick_folder() as folder:
            try:
                kills = min(5, 1 + self.wanted["seconds"] // 5)
                self.state["eight"] = eight(self.wanted["seconds"], self.state["first_seed"], folder / "eight", kills)
            except Exception as error:  # noqa: BLE001 - as above
                self.state["eight"] = {"failed": 1}
                self.broken(f"eight processes: {error!r}")
        print(f"eight processes: {self.state['eight']}", flush=True)
        return True

    def broken(self, message: str) -> None:
        """Note a broken promise."""
        print(f"BROKEN: {message}", flush=True)
        self.state["failures"].append(message)

    def failed(self) -> str:
        """How often what was promised did not hold."""
        return f"{len(self.state['failures'])} promises broken"

    def figures(self) -> dict[str, Any]:
        """What is published."""
        failures: list[str] = self.state["failures"]
        counts = {name: sum(bool(shape.search(one)) for one in failures) for name, shape in BROKEN.items()}
        counts["other"] = sum(not any(shape.search(one) for shape in BROKEN.values()) for one in failures)
        return {
            "date": time.strftime("%Y-%m-%d"),
            "command": "scripts/endure --figures"
            + "".join(f" --{name} {number}" for name, number in self.wanted.items()),
            "commit": self.state["commit"],
            "machine": machine(),
            "seconds": round(self.state["seconds"]),
            "seeds": [self.state["first_seed"], self.state["next_seed"] - 1],
            "steps": STEPS,
            "trace": self.state["traces"],
            "simulated": self.state["simulated"],
            "killed": self.state["killed"],
            "eight": self.state["eight"],
            **counts,
            "failures": failures,
        }


def quick_folder() -> Any:
    """A temporary folder, in memory where there is room for one: a killed process loses nothing that it wrote there."""
    memory = Path("/dev/shm")
    return _Folder(dir=memory if os.access(memory, os.W_OK) else None)


class _Folder(tempfile.TemporaryDirectory[str]):
    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__()).resolve()


def commit() -> str:
    """The commit of the working tree, with a plus where it was changed."""
    command = ["git", "describe", "--always", "--dirty=+"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    sys.path.append(str(ROOT / "benchmarks"))
    from harness import machine as described

    found: dict[str, Any] = described()
    return found


def replay(seed: int, steps: int) -> int:
    """One simulated life, told step by step."""
    try:
        done: Outcome = simulate(seed, steps, print)
    except BrokenPromiseError as error:
        print(error)
        return 1
    print(f"seed {seed}, {steps} steps: every promise held")
    print(f"trace {done.trace}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; returns 1 when a promise was broken."""
    given = sys.argv[1:] if argv is None else argv
    if any(one.split("=")[0] == "--hours" for one in given):
        return int(importlib.import_module("simulation.soak").main(given) or 0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="replay this simulated life")
    parser.add_argument("--operations", type=int, default=STEPS, help="steps of the life that --seed replays")
    parser.add_argument("--figures", action="store_true", help="run the whole campaign and write its figures")
    parser.add_argument("--cuts", type=int, help="simulated power cuts")
    parser.add_argument("--kills", type=int, help="real processes to kill")
    parser.add_argument("--seconds", type=int, help="how long eight processes work at once")
    parser.add_argument("--first-seed", type=int, default=0, help="the seed of the first simulated life")
    parser.add_argument("--hours", help="run the soak for so long; --hours 1 --help shows its options")
    asked = parser.parse_args(given)
    logging.disable()
    if asked.seed is not None:
        return replay(asked.seed, asked.operations)
    usual = WHOLE if asked.figures else SMALL
    wanted = {name: usual[name] if getattr(asked, name) is None else getattr(asked, name) for name in usual}
    campaign = Campaign(wanted, asked.first_seed)
    if asked.figures:
        campaign.take_up()
    campaign.run(save=asked.figures)
    figures = campaign.figures()
    if asked.figures:
        RESULT.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"written: {RESULT.relative_to(ROOT)}")
    print({name: figures[name] for name in (*BROKEN, "other")})
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
