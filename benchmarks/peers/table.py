"""The ranking in each row, and its margins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .protocol import BEFORE
from .registry import OURS

__all__ = ["MARGIN", "ROWS", "Entry", "Ranking", "Row", "cells", "printed", "rankings"]

Record = dict[str, Any]
MARGIN = 0.005
"""How far below its target the recall of the judged queries may lie: knobs were chosen on other queries."""


@dataclass(frozen=True)
class Entry:
    """note: what must be known with the figure; ranked: False where the figure does not count (recall missed)."""

    peer: str
    value: float
    note: str = ""
    ranked: bool = True


@dataclass(frozen=True)
class Row:
    """matches: which records; field: the figure in them; who: ``stores`` or ``all``; lower: is less better?"""

    title: str
    unit: str
    section: str
    field: str
    matches: dict[str, Any]
    who: str = "stores"
    lower: bool = True


def searched(what: str, target: float, who: str) -> Row:
    name = "with their units" if what == "units" else "ids"
    title = f"search, {name}, recall@10 {target}{too(who)}"
    return Row(title, "ms", "search", "ms", {"what": what, "target": target}, who)


def too(who: str) -> str:
    return "" if who == "stores" else ", libraries too"


def unseen(target: float, who: str) -> Row:
    """Ranked by the lower recall of the two kinds of questions."""
    return Row(
        f"questions of a kind not seen before, {target}{too(who)}", "ms", "unseen", "ms", {"target": target}, who
    )


def of_set(name: str, title: str) -> list[Row]:
    """Rows of one of the other data sets."""
    at = {"set": name}
    rows = [
        Row(
            f"{title}: search, recall@10 {target}{too(who)}",
            "ms",
            "sets",
            "ms",
            {**at, "of": "search", "what": "ids", "target": target},
            who,
        )
        for target in (0.95, 0.99)
        for who in ("stores", "all")
    ]
    if name != "documents":  # where all questions are of one kind
        rows += [
            Row(
                f"{title}: questions of a kind not seen before, {target}, libraries too",
                "ms",
                "sets",
                "ms",
                {**at, "of": "unseen", "target": target},
                "all",
            )
            for target in (0.95, 0.99)
        ]
    if name == "million":
        rows += [
            Row(f"{title}: build, libraries too", "s", "sets", "indexed_s", {**at, "of": "ingest"}, "all"),
            Row(f"{title}: reopen, libraries too", "s", "sets", "answer_s", {**at, "of": "reopen"}, "all"),
            Row(f"{title}: resident memory, libraries too", "MB", "sets", "memory_mb", {**at, "of": "reopen"}, "all"),
        ]
    return rows


ROWS = (
    Row("bulk ingest, durable and searchable", "units/s", "ingest", "units_per_s", {}, lower=False),
    Row("bulk ingest, index built", "units/s", "ingest", "indexed_per_s", {}, lower=False),
    Row("single insert, synced", "ms", "writes", "p50", {"kind": "insert", "synced": True}),
    Row("single insert, as it comes", "ms", "writes", "p50", {"kind": "insert", "synced": False}),
    searched("ids", 0.95, "stores"),
    searched("ids", 0.99, "stores"),
    searched("ids", 0.95, "all"),
    searched("ids", 0.99, "all"),
    searched("units", 0.95, "stores"),
    searched("units", 0.99, "stores"),
    Row("search, p99 at recall@10 0.95", "ms", "search", "p99", {"what": "ids", "target": 0.95}),
    unseen(0.95, "stores"),
    unseen(0.99, "stores"),
    unseen(0.95, "all"),
    unseen(0.99, "all"),
    Row("filtered search, a third kept, recall 0.95", "ms", "filters", "ms", {"filter": "third"}),
    Row("filtered search, 1 % kept, recall 0.95", "ms", "filters", "ms", {"filter": "1 %"}),
    Row("filtered search, 0.1 % kept, recall 0.95", "ms", "filters", "ms", {"filter": "0.1 %"}),
    Row("filtered search, a filter never asked before", "ms", "filters", "ms", {"filter": "new"}),
    Row("the first filtered search of a process", "ms", "filters", "first_ms", {"filter": "third"}),
    Row("update, synced", "ms", "writes", "p50", {"kind": "update", "synced": True}),
    Row("delete, synced", "ms", "writes", "p50", {"kind": "delete", "synced": True}),
    Row("reopen to the first answer", "s", "reopen", "answer_s", {}),
    Row("reopen, page cache dropped", "s", "cold", "answer_s", {}),
    Row("search after that, page cache still cold", "ms", "cold", "later_ms", {}),
    Row("resident memory", "MB", "reopen", "memory_mb", {}),
    Row("disk", "MB", "reopen", "disk_mb", {}),
    Row("mixed workload, writes synced", "operations/s", "mixed", "per_s", {}, lower=False),
    *(
        Row(
            f"{count} thread{'s' * (count > 1)} searching, libraries too",
            "searches/s",
            "threads",
            "per_s",
            {"threads": count},
            "all",
            lower=False,
        )
        for count in (1, 2, 4, 8)
    ),
    *of_set("wide", "1,536 columns"),
    *of_set("documents", "documents"),
    *of_set("mixed text", "mixed text"),
    *of_set("million", "a million units"),
)


@dataclass(frozen=True)
class Ranking:
    """entries: best first, then those that are not ranked."""

    row: Row
    entries: tuple[Entry, ...]

    @property
    def ranked(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.ranked]

    @property
    def ours(self) -> Entry | None:
        return next((entry for entry in self.ranked if entry.peer in OURS), None)

    @property
    def other(self) -> Entry | None:
        """The best of the others."""
        return next((entry for entry in self.ranked if entry.peer not in OURS), None)

    @property
    def before(self) -> Entry | None:
        """This store in an older state, where it was measured in the same run."""
        return next((entry for entry in self.entries if entry.peer == BEFORE), None)

    @property
    def first(self) -> bool:
        return self.verdict.startswith(("first", "alone"))

    @property
    def verdict(self) -> str:
        """In words: first by how much, or who is ahead by how much."""
        ours, other = self.ours, self.other
        if ours is None:
            return "not measured" if not any(entry.peer in OURS for entry in self.entries) else "recall missed"
        if other is None:
            return "alone"
        better = ours.value <= other.value if self.row.lower else ours.value >= other.value
        times = max(ours.value, other.value) / max(min(ours.value, other.value), 1e-12)
        return (
            f"first, {other.peer} follows at {times:.2f} times" if better else f"{other.peer} ahead, {times:.2f} times"
        )


def rankings(records: Sequence[Record]) -> list[Ranking]:
    """Every row that was measured."""
    facts = facts_of(records)
    found = (Ranking(row, tuple(sorted_entries(row, records, facts))) for row in ROWS)
    return [ranking for ranking in found if ranking.entries]


def facts_of(records: Sequence[Record]) -> dict[str, Record]:
    """Peer to what the newest heading says of it."""
    facts: dict[str, Record] = {}
    for record in records:
        if record["section"] == "machine":
            facts |= record["peers"]
    return facts


def sorted_entries(row: Row, records: Sequence[Record], facts: dict[str, Record]) -> list[Entry]:
    entries = []
    for record in records:
        if record["section"] != row.section or row.field not in record or not is_of(row, record):
            continue
        about = facts[record["peer"]]
        if row.who == "all" or about["kind"] == "store":
            entries.append(entry_of(row, record, about))
    sign = 1 if row.lower else -1
    return sorted(entries, key=lambda entry: (not entry.ranked, sign * entry.value))


def is_of(row: Row, record: Record) -> bool:
    return all(record.get(key) == value for key, value in row.matches.items())


def entry_of(row: Row, record: Record, about: Record) -> Entry:
    notes, ranked = [], True
    if "unseen" in (row.section, row.matches.get("of")):
        notes.append(f"recall {record['recall_in']:.3f} / {record['recall_out']:.3f}")
        ranked = min(record["recall_in"], record["recall_out"]) >= record["target"] - MARGIN
    elif "recall" in record:
        notes.append(f"recall {record['recall']:.3f}")
        ranked = record["recall"] >= record["target"] - MARGIN
    if record["peer"] == BEFORE:
        notes.append("an older state of this store")
        ranked = False
    if "found_at_once" in record and record["found_at_once"] < 1:
        notes.append(f"{record['found_at_once']:.0%} found at once")
        ranked = False
    if row.section in ("writes", "ingest", "mixed") and not about["synced"]:
        notes.append("not synced")
        ranked = ranked and not any(word in row.title for word in ("synced", "durable"))
    if row.field == "indexed_per_s" and len(about["knobs"]) == 1:
        notes.append("no index")
        ranked = False
    if row.matches.get("synced") is False and about["default_is_synced"]:
        notes.append("synced")
    if "recall_after" in record:
        notes.append(f"recall after {record['recall_after']:.3f}")
    return Entry(record["peer"], float(record[row.field]), ", ".join(notes), ranked)


def shown(value: float) -> str:
    """Three digits that matter."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}" if value < 0.1 else f"{value:.3g}"


Cell = Callable[[Entry | None], str]


def cells(ranking: Ranking) -> tuple[str, str, str, str, str]:
    """Row, ours (the better of its two indexes, named unless it picked it), before, the best of the others, verdict."""
    unit = ranking.row.unit

    def cell(entry: Entry | None, named: bool) -> str:
        if entry is None:
            return "-"
        notes = ([entry.peer] if entry.peer == OURS[1] else []) + ([entry.note] if entry.note else [])
        note = f" ({', '.join(notes)})" if notes else ""
        return f"{shown(entry.value)} {unit}{' ' + entry.peer if named else ''}{note}"

    ours = ranking.ours or next((entry for entry in ranking.entries if entry.peer in OURS), None)
    old = ranking.before
    before = f"{shown(old.value)} {unit}" if old else "-"
    return ranking.row.title, cell(ours, False), before, cell(ranking.other, True), ranking.verdict


def printed(records: Sequence[Record]) -> Table:
    table = Table("what", "this store", "before", "best of the others", "verdict", title="This store beside its peers")
    for ranking in rankings(records):
        table.add_row(*cells(ranking))
    return table
