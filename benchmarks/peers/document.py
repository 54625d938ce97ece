"""The table and pictures of docs/explanation/peers.md, made from the committed results.

    PYTHONPATH=src:benchmarks python -m peers.document [--patch]

Prints them. With --patch: drops records of the results that newer runs replace, writes the page and the pictures beside
them and the page of all results, and puts the section between its two marks in the document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results_page

from . import report
from .causes import cause_of
from .filing import newest
from .pictures import SHOWN
from .report import circumstances
from .table import Ranking, cells, rankings

__all__ = ["BEGIN", "END", "patched", "section"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers.jsonl"
DOCUMENT = ROOT / "docs" / "explanation" / "peers.md"
RAW = "https://memevolve-gpu.example/repository/raw/main"
BEGIN = "<!-- peers: made by benchmarks/peers/document.py -->"
END = "<!-- /peers -->"


def section(records: Sequence[dict[str, Any]], pictures: Path) -> str:
    """Markdown between the marks, without them: where it was measured, the table, the pictures that exist."""
    heads = [record for record in records if record["section"] == "machine"]
    lines = [f"- {circumstances(head, records)}: `{head['command'].strip()}`" for head in heads]
    ranked = rankings(records)
    lines += ["", firsts(ranked), "", "| what | this store | before | best of the others | |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cells(ranking))} |" for ranking in ranked]
    lines += behind(ranked)
    there = [name for name in SHOWN if (pictures / f"peers-{name}.png").exists()]
    lines += ["", *map(picture, there)] if there else []
    return "\n".join(lines)


def firsts(ranked: Sequence[Ranking]) -> str:
    won = sum(ranking.first for ranking in ranked)
    return f"This store is first in {won} of {len(ranked)} rows."


def behind(ranked: Sequence[Ranking]) -> list[str]:
    """The rows in which another is ahead, or the recall was missed, each with its cause."""
    lost = [ranking for ranking in ranked if not ranking.first]
    if not lost:
        return []
    lines = ["", "### Where this store is not first, and why", "", "| what | ahead | why |", "|---|---|---|"]
    return [*lines, *(f"| {one.row.title} | {one.verdict} | {cause_of(one)} |" for one in lost)]


def picture(name: str) -> str:
    """HTML of a picture that follows the theme of the reader."""
    address = f"{RAW}/benchmarks/results/peers-{name}"
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{address}-dark.png">'
    return f'<picture>{dark}<img alt="{name}" src="{address}.png"></picture>'


def patched(document: str, made: str) -> str:
    """The document with the section in its place. Raises ValueError when it has no marks."""
    if BEGIN not in document or END not in document:
        raise ValueError(f"{DOCUMENT.name} needs the lines {BEGIN!r} and {END!r} around the section")
    before, rest = document.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--patch", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)} and the pages")
    arguments = parser.parse_args()
    if not arguments.patch:
        print(section(newest(RESULTS), RESULTS.parent))
        return 0
    records = newest(RESULTS)
    RESULTS.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    report.write(records, RESULTS.with_suffix(".html"))
    made = section(records, RESULTS.parent)
    DOCUMENT.write_text(patched(DOCUMENT.read_text(encoding="utf-8"), made), encoding="utf-8")
    index = results_page.RESULTS / "index.html"
    index.write_text(results_page.page(results_page.RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
