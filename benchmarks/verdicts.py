"""Compare the committed results with what the documentation promises; end with 1 where one is worse.

    python benchmarks/verdicts.py [--results FOLDER]

Each promise is a row of the table of docs/explanation/figures.md: its words, its limit and its file. A promise whose
file lacks what it needs counts as broken too. ``gpu/verdicts.py`` does the same for figures of a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpu.verdicts import Verdict
from peers.filing import newest
from peers.registry import OURS

__all__ = ["PROMISES", "Promise", "judged", "main"]

RESULTS = Path(__file__).resolve().parent / "results"
SLACK = 0.005
"""How far below what was asked a recall may lie."""

Found = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Promise:
    """figures: names and values from the file; each must be at least (or, with most, at most) ``limit``."""

    words: str
    limit: float
    file: str
    figures: Callable[[Any], Found]
    most: bool = False

    def verdict(self, results: Path) -> Verdict:
        path = results / self.file
        try:
            content = newest(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
            found = list(self.figures(content))
        except (OSError, KeyError, ValueError) as reason:
            return Verdict(self.words, f"{self.file}: {type(reason).__name__}: {reason}", False)
        if not found:
            return Verdict(self.words, f"{self.file} has no such figure", False)
        name, worst = (max if self.most else min)(found, key=lambda one: one[1])
        met = worst <= self.limit if self.most else worst >= self.limit
        return Verdict(self.words, f"{worst:.4g} at worst ({name}) of {len(found)}", met)

    @property
    def row(self) -> str:
        """As the documentation shows it."""
        return f"| {self.words} | {'at most' if self.most else 'at least'} {self.limit:g} | `{self.file}` |"


def cells(content: Any) -> Found:
    """Recall less what was asked, in each cell."""
    for name, states in content["cells"].items():
        for state in ("cold", "warm"):
            for cell, figures in states[state].items():
                yield f"{name}, {state}, {cell}", figures["recall@10"] - float(cell.split(",")[0])


def exact_cells(content: Any) -> Found:
    return (
        (f"{name}, {state}, {cell}", figures["recall@10"])
        for name, states in content["cells"].items()
        for state in ("cold", "warm")
        for cell, figures in states[state].items()
        if cell.startswith("1.0,")
    )


def memory(content: Any) -> Found:
    return ((name, states["mb_per_1000_units"]) for name, states in content["cells"].items())


def default_recall(content: Any) -> Found:
    for index_type, states in content["recall"].items():
        for state in ("cold", "warm"):
            for target, kinds in states[state].items():
                for kind, figures in kinds.items():
                    yield f"{index_type}, {state}, {target}, {kind}", figures["recall@10"] - float(target)


def small(content: Any) -> Found:
    return ((f"{size} units", figures["extra_ms"]) for size, figures in content["small"].items())


def million_recall(content: Any) -> Found:
    return ((name, value - 0.95) for name, value in content["search"].items() if name.startswith("recall@10 "))


def peers_recall(part: str, records: Any) -> Found:
    """Recall less the target beside the peers: of questions of both kinds, asked for before any was seen."""
    for one in records:
        where = one.get("set", "50,000 units")
        if one.get("peer") in OURS and part in (one["section"], one.get("of")) and "recall" in one:
            for kind in ("recall_in", "recall_out"):
                yield f"{one['peer']}, {where}, {one['target']}, {kind}", one[kind] - one["target"]


def found_at_once(records: Any) -> Found:
    return (
        (f"{one['peer']}, synced: {one['synced']}", one["found_at_once"])
        for one in records
        if one.get("peer") in OURS and "found_at_once" in one
    )


def failures(records: Any) -> Found:
    return ((name, sum("error" in one for one in records if one.get("peer") == name)) for name in OURS)


def at(*keys: str) -> Callable[[Any], Found]:
    """One figure, by the keys that lead to it."""

    def figure(content: Any) -> Found:
        for key in keys:
            content = content[key]
        yield ", ".join(keys), float(content)

    return figure


def each(*names: str) -> Callable[[Any], Found]:
    return lambda content: ((name, float(content[name])) for name in names)


def kills(content: Any) -> Found:
    yield from each("lost", "resurrected", "wrong mapping", "failed reopening", "other")(content)
    yield "failures", float(len(content["failures"]))


def eight(content: Any) -> Found:
    return each("kills", "stopped while holding the lock")(content["eight"])


PROMISES = (
    Promise("recall less what was asked, in every cell of four data sets", -SLACK, "promise_cells.json", cells),
    Promise("recall of exact search, in every cell", 1.0, "promise_cells.json", exact_cells),
    Promise("MB of memory for 1,000 units that cannot be dropped", 0.2, "promise_cells.json", memory, most=True),
    Promise(
        "recall less what was asked, both kinds of questions, cold and warm", -SLACK, "promise.json", default_recall
    ),
    Promise("ms of a call beyond IndexFlat, up to 20,000 units", 0.1, "promise.json", small, most=True),
    Promise(
        "growth of a search's time: the exponent of the number of units",
        0.5,
        "promise.json",
        at("growth", "exponent"),
        most=True,
    ),
    Promise("recall less 0.95, a million units, both kinds of questions", -SLACK, "million.json", million_recall),
    Promise("ms of a search in a million units, asked 0.95", 2.0, "million.json", at("search", "median_ms"), most=True),
    Promise(
        "recall less what was asked beside the peers, of a kind not seen before",
        -SLACK,
        "peers.jsonl",
        partial(peers_recall, "unseen"),
    ),
    Promise("share of single inserts that the next search finds", 1.0, "peers.jsonl", found_at_once),
    Promise("failures beside the peers", 0, "peers.jsonl", failures, most=True),
    Promise("recall in months of use", 0.95 - SLACK, "months_of_use.json", at("worst_recall@10")),
    Promise("wrong mappings in months of use", 0, "months_of_use.json", at("mapping_errors"), most=True),
    Promise("units lost or doubled by two processes", 0, "two_processes.json", each("lost", "doubled"), most=True),
    Promise(
        "faults in hours of eight processes",
        0,
        "soak.json",
        each("lost", "resurrected", "unknown", "wrong_mapping", "findings"),
        most=True,
    ),
    Promise("hours of that", 1, "soak.json", at("hours")),
    Promise("faults after kills and simulated power cuts", 0, "campaign.json", kills, most=True),
    Promise("kills of real processes", 10_000, "campaign.json", at("killed", "kills")),
    Promise("simulated power cuts", 1_000, "campaign.json", at("simulated", "cut")),
    Promise("kills of one of eight processes, and stops with the lock held", 3, "campaign.json", eight),
)


def judged(results: Path = RESULTS) -> list[Verdict]:
    """One verdict for each promise, in order."""
    return [promise.verdict(results) for promise in PROMISES]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    found = judged(parser.parse_args().results)
    wide = max(len(one.target) for one in found)
    for one in found:
        print(f"{one.word:<7} {one.target:<{wide}}  {one.reached}")
    broken = sum(not one.met for one in found)
    print(f"{len(found) - broken} kept, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
