"""Why another is ahead in a row, in words; which rows those are is decided by the figures."""

from __future__ import annotations

from .table import MARGIN, Ranking

__all__ = ["UNKNOWN", "cause_of"]

UNKNOWN = "not found yet"
_CODES = "a library that scans codes: no units, no check of other writers, of deleted rows or of the query"
_WORDS = "this store also writes the log, the counters and the words of the full-text index"
_PYTHON = "few rows are compared; most of the time is the Python code around it"
_LOWER = "it stops at a lower recall, and this store finds more than was asked for"
_CAUSES = {
    "bulk ingest, durable": f"{_WORDS}, and checks each unit as JSON",
    "bulk ingest, index built": "this store trains its codes and measures their recall before it uses them",
    "single insert, as it comes": "it acknowledges before anything is synced",
    "single insert": _WORDS,
    "update": f"{_WORDS}, and embeds the text again",
    "delete": _WORDS,
    "search, with their units": "units are read from SQLite and parsed as JSON, one by one",
    "filtered search, a third": "a mask of all units is made and the codes are scanned with it",
    "filtered search, a filter never": "this store first makes a mask of all units from its columns",
    "filtered search": _PYTHON,
    "the first filtered": "this store reads the column of the field once",
    "reopen": "this store opens SQLite, takes its locks, looks for newer log entries and maps its files",
    "search after that": "candidates are compared by vectors that must come from the disk",
    "resident memory": "it has no index, or maps one that few searches touch; this store holds codes in memory",
    "disk": "this store also keeps codes, the words of the full-text index and the vectors apart for searches",
    "mixed": "writes: see single insert, update and delete",
    "search, p99": "the slowest of a hundred calls is decided by the system's and by Python's own pauses",
}
_BY_WORD = {
    "threads searching": "a call holds Python's lock outside the scan itself",
    "1 thread searching": _CODES,
    "build": "it only encodes; this store also writes units to the disk, durably",
    "resident memory": "it holds less for one row, and no units",
    "reopen": "it reads its file as a whole, and has no units to open",
}


def cause_of(ranking: Ranking) -> str:
    """The cause for a row that this store has lost."""
    ours, other, title = ranking.ours, ranking.other, ranking.row.title
    if ours is None:
        return f"no recall within {MARGIN} of the target"
    for begin, words in _CAUSES.items():
        if title.startswith(begin):
            return words
    for word, words in _BY_WORD.items():
        if word in title:
            return words
    if other is not None and any(word in title for word in ("search", "questions", "graph")):
        return _CODES if other.peer == "turbovec" else lower_recall(ours.note, other.note)
    return UNKNOWN


def lower_recall(ours: str, other: str) -> str:
    """Notes begin with the recall where there is one."""
    found = [float(note.split()[1].rstrip(",")) for note in (ours, other) if note.startswith("recall")]
    if len(found) == 2 and found[0] > found[1]:
        return _LOWER
    return "a graph compares fewer vectors than a scan of codes where the questions lie near the data"
