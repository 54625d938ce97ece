"""The measurements, each for all peers by turns: build, search, filters, reopening, writes."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .calibrate import Choice, calibrate
from .remote import PeerFailedError
from .session import TARGETS, K, Session
from .stats import passes_summary, percentiles
from .truth import Mask, Truth, exact, hits

__all__ = ["filters", "ingest", "reopen", "search", "threads", "unseen", "writes"]

PARTS = {"third": 330, "1 %": 10, "0.1 %": 1}
"""Name of a filter to the ``metadata.part`` below which a unit is kept."""
NEW_FROM = 100
"""The first of the bounds of filters that are asked for once: from a tenth of the units on."""
THREADS = (1, 2, 4, 8)

COMPLETE = 0.999


# Building


def ingest(session: Session) -> None:
    """Bulk ingest until everything can be found, and until the index is built; the first store of each is kept."""
    figures: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def turn(name: str) -> None:
        first = not figures[name]
        if first or figures[name][0]["indexed_s"] < session.plan.repeat_below:
            figures[name].append(built(session, name, keep=first))

    for number in range(session.plan.builds):
        session.each("ingest", number, turn)
    for name, runs in figures.items():
        if runs:
            session.record({"section": "ingest", "peer": name, **summary(runs, session.work.size)})


def built(session: Session, name: str, keep: bool) -> dict[str, Any]:
    remote = session.start(name, "store" if keep else "again")
    remote.ask("open")
    taken = remote.ask("ingest")
    settled = remote.ask("settle")
    if keep:
        session.remotes[name] = remote
    else:
        remote.end()
        shutil.rmtree(remote.folder, ignore_errors=True)
    return {
        "ingest_s": taken["seconds"],
        "found": taken["found"],
        "first_search_ms": taken["first_search"] * 1e3,
        "indexed_s": taken["seconds"] + settled["seconds"],
        "peak_mb": settled["peak_mb"] - taken["before_mb"],
    }


def summary(runs: list[dict[str, Any]], size: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        key: float(np.median([run[key] for run in runs])) for key in runs[0] if key not in ("found", "peak_mb")
    }
    figures |= {"found": all(run["found"] for run in runs), "peak_mb": runs[0]["peak_mb"], "builds": len(runs)}
    figures["units_per_s"] = size / figures["ingest_s"]
    figures["indexed_per_s"] = size / figures["indexed_s"]
    figures["all_s"] = [run["indexed_s"] for run in runs]
    return figures


# Searching


class Judge:
    """Recall of what workers found, against exact search over the rows that count."""

    def __init__(self, session: Session, queries: list[int], allowed: Mask | None = None) -> None:
        work = session.work
        self.vectors = work.vectors[: work.size]
        self.rows, self.queries, self.allowed = queries, work.queries[queries], allowed
        self.truth: Truth = exact(self.vectors, self.queries, K, allowed)
        self.most = self.truth.ids.shape[1]

    def hits(self, found: list[list[int]]) -> list[int]:
        return hits(found, self.queries, self.vectors, self.truth, self.allowed)

    def recall(self, counts: list[int]) -> float:
        return float(np.mean(counts) / self.most)


def search(session: Session, curves: bool = True) -> None:
    """Knobs calibrated, the curve of every knob, and the two targets with ids and with units."""
    work = session.work
    calibration, judge = Judge(session, work.calibration), Judge(session, work.judged)

    def choose(name: str) -> None:
        session.chosen[name] = knobs_for(session, name, calibration, TARGETS, "ids", 0)

    session.each("search", 0, choose)
    if curves:
        curve(session, judge)
    for what in ("ids", "units"):
        names = [name for name in session.names if what == "ids" or session.facts(name).payloads]
        for target in TARGETS:
            knobs = {name: session.chosen[name][target] for name in names if name in session.names}
            record = {"section": "search", "what": what, "target": target}
            measured(session, record, knobs, judge, session.plan.passes, what)


def unseen(session: Session) -> None:
    """All questions, with the knob that could be chosen before one of another kind was seen.

    It is calibrated on questions like the data; a store that takes a recall is asked for the target itself.
    """
    work = session.work
    like_the_data = Judge(session, [row for row in work.calibration if row % 2 == 0])
    judge = Judge(session, work.judged)
    chosen: dict[str, dict[float, Choice]] = {}

    def choose(name: str) -> None:
        if session.facts(name).knob == "recall":
            chosen[name] = {target: Choice(target, target, True) for target in TARGETS}
        else:
            chosen[name] = knobs_for(session, name, like_the_data, TARGETS, "ids", 0)

    session.each("unseen", 0, choose)
    for target in TARGETS:
        knobs = {name: chosen[name][target] for name in session.names if name in chosen}
        measured(session, {"section": "unseen", "target": target}, knobs, judge, 1, "ids")


def knobs_for(
    session: Session, name: str, judge: Judge, targets: tuple[float, ...], what: str, below: int
) -> dict[float, Choice]:
    def recall_of(knob: float) -> float:
        answer = session.remotes[name].ask("search", rows=judge.rows, k=K, knob=knob, what=what, below=below)
        return judge.recall(judge.hits(answer["found"]))

    return calibrate(session.facts(name).knobs, targets, recall_of)


def curve(session: Session, judge: Judge) -> None:
    """Recall against time: one pass with each knob of each peer, up to the one with which nothing is left to gain."""
    most = max(len(session.facts(name).knobs) for name in session.names)
    complete: set[str] = set()
    for position in range(most):
        knobs = {}
        for name in session.names:
            facts = session.facts(name)
            if position < len(facts.knobs) and name not in complete:
                knobs[name] = Choice(facts.knobs[position], 0.0, True)
        recalls = measured(session, {"section": "search", "what": "curve"}, knobs, judge, 1, "ids")
        complete |= {name for name, recall in recalls.items() if recall >= COMPLETE}


def measured(
    session: Session,
    record: dict[str, Any],
    knobs: dict[str, Choice],
    judge: Judge,
    passes: int,
    what: str,
    below: int = 0,
) -> dict[str, float]:
    """Passes over the judged queries, in blocks by turns; a record for each peer, of whole passes. Returns recalls."""
    size = session.plan.block
    starts = range(0, len(judge.rows), size)
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(passes)] for name in knobs}
    found: dict[str, list[list[int]]] = {name: [] for name in knobs}

    def turn(name: str, block: int) -> float:
        number, start = divmod(block, len(starts))
        rows = judge.rows[starts[start] : starts[start] + size]
        answer = session.remotes[name].ask("search", rows=rows, k=K, knob=knobs[name].knob, what=what, below=below)
        times[name][number] += answer["seconds"]
        if number == 0 and what != "units":
            found[name] += answer["found"]
        return float(sum(answer["seconds"]))

    names = list(knobs)
    session.interleaved(record["section"], passes * len(starts), turn, names, len(starts), session.plan.cap)
    recalls = {}
    for name in names:
        if name in session.names:
            recall = judged(judge, found[name])
            recalls[name] = float(recall.get("recall", 0.0))
            whole = [taken for taken in times[name] if len(taken) == len(judge.rows)]
            figures = {"knob": knobs[name].knob, "reached": knobs[name].reached, **passes_summary(whole)}
            session.record({**record, "peer": name, **figures, **recall})
    return recalls


def judged(judge: Judge, found: list[list[int]]) -> dict[str, Any]:
    """Recall, of each kind of query too, and the hits of every query."""
    if not found:
        return {}
    counts = judge.hits(found)
    inside = [count for row, count in zip(judge.rows, counts, strict=True) if row % 2 == 0]
    outside = [count for row, count in zip(judge.rows, counts, strict=True) if row % 2 == 1]
    return {
        "recall": judge.recall(counts),
        "recall_in": judge.recall(inside),
        "recall_out": judge.recall(outside),
        "hits": counts,
    }


def filters(session: Session) -> None:
    """Searches behind filters that keep a third, 1 % and 0.1 % of the units, then each behind a filter of its own."""
    work = session.work
    names = [name for name in session.names if session.facts(name).filters]
    broad: dict[str, Choice] = {}
    for label, below in PARTS.items():
        allowed = work.parts[: work.size] < below
        if not allowed.any():
            continue
        calibration, judge = Judge(session, work.calibration, allowed), Judge(session, work.judged, allowed)
        knobs: dict[str, Choice] = {}
        first: dict[str, float] = {}

        def choose(
            name: str,
            calibration: Judge = calibration,
            below: int = below,
            knobs: dict[str, Choice] = knobs,
            first: dict[str, float] = first,
        ) -> None:
            row, knob = calibration.rows[0], session.facts(name).knobs[0]
            answer = session.remotes[name].ask("first_search", row=row, k=K, knob=knob, what="filtered", below=below)
            first[name] = answer["seconds"]
            knobs[name] = knobs_for(session, name, calibration, (0.95,), "filtered", below)[0.95]

        session.each("filters", 0, choose, names)
        record = {"section": "filters", "filter": label, "kept": int(allowed.sum()), "target": 0.95}
        for name, seconds in first.items():
            session.record({"section": "filters", "filter": label, "peer": name, "first_ms": seconds * 1e3})
        measured(session, record, knobs, judge, session.plan.passes, "filtered", below)
        broad = broad or knobs
    new_filters(session, names, broad)


def new_filters(session: Session, names: list[str], knobs: dict[str, Choice]) -> None:
    """One search for each filter, which keeps a tenth of the units or more and was never asked for before."""
    work, rows = session.work, session.work.judged[: session.plan.new_filters]

    def turn(name: str) -> None:
        times, counts = [], []
        for at, row in enumerate(rows):
            below = NEW_FROM + at
            answer = session.remotes[name].ask(
                "first_search", row=row, k=K, knob=knobs[name].knob, what="filtered", below=below
            )
            times.append(answer["seconds"])
            counts += Judge(session, [row], work.parts[: work.size] < below).hits(answer["found"])
        record = {"section": "filters", "filter": "new", "peer": name, "target": 0.95, **percentiles(times)}
        session.record({**record, "ms": record["p50"], "recall": float(np.mean(counts)) / K})

    session.each("filters", 0, turn, [name for name in names if name in session.names and name in knobs])


# Opening again


def reopen(session: Session) -> None:
    """Close every store, then open it in fresh processes: time to the first answer, memory, disk.

    Last of all once more after the system was told to drop the pages of its files from the page cache.
    """
    closed: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)

    def close(name: str) -> None:
        closed[name] = session.remotes[name].ask("close")
        session.remotes.pop(name).end()

    def again(name: str) -> None:
        if name in session.remotes:
            session.remotes.pop(name).end()
        remote = session.start(name)
        session.remotes[name] = remote
        runs[name].append(opened(session, name))

    def cold(name: str) -> None:
        session.remotes.pop(name).end()
        remote = session.remotes[name] = session.start(name)
        figures = opened(session, name, cold=True)
        times = remote.ask("search", rows=session.work.judged[-20:], k=K, knob=knob_of(session, name))["seconds"]
        session.record({"section": "cold", "peer": name, **figures, "later_ms": float(np.median(times)) * 1e3})

    session.each("reopen", 0, close)
    for number in range(session.plan.reopens):
        session.each("reopen", number, again)
    for name in session.names:
        figures = {key: float(np.median([run[key] for run in runs[name]])) for key in runs[name][0]}
        spread = [run["answer_s"] for run in runs[name]]
        record = {"section": "reopen", "peer": name, **figures, "all_answer_s": spread}
        session.record({**record, "close_s": closed[name]["seconds"], "disk_mb": closed[name]["disk_mb"]})
    session.each("reopen", session.plan.reopens, cold)


def opened(session: Session, name: str, cold: bool = False) -> dict[str, float]:
    remote = session.remotes[name]
    before = remote.ask("baseline")
    left = {"still_cached": evicted(remote.folder)} if cold else {}
    seconds = remote.ask("open")["seconds"]
    knob = knob_of(session, name)
    first = remote.ask("first_search", row=session.work.judged[0], k=K, knob=knob)["seconds"]
    remote.ask("search", rows=session.work.judged[:50], k=K, knob=knob)
    after = remote.ask("memory")
    return {
        "open_s": seconds,
        "answer_s": seconds + first,
        "memory_mb": after["total"] - before["total"],
        "own_mb": after["own"] - before["own"],
        "mapped_mb": after["mapped"] - before["mapped"],
        **left,
    }


def evicted(folder: Path) -> float:
    """Ask the system to drop the files' pages from its cache; the share of every sixteenth page that is still there."""
    seen = there = 0
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for at in range(0, path.stat().st_size, 16 * 4096):
                seen += 1
                with suppress(BlockingIOError):  # raised where the page would have to be read
                    there += bool(os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT))
    return there / max(seen, 1)


# Threads


def threads(session: Session) -> None:
    """Searches from several threads of one process, on all cores; a peer that fails at it is opened again."""

    def turn(name: str) -> None:
        for count in THREADS:
            try:
                answer = session.remotes[name].ask(
                    "threads",
                    count=count,
                    rows=session.work.judged,
                    k=K,
                    knob=knob_of(session, name),
                    seconds=session.plan.threads_s,
                )
            except PeerFailedError as error:
                session.record({"section": "threads", "peer": name, "threads": count, "error": str(error)})
                session.remotes[name] = session.start(name)
                session.remotes[name].ask("open")
                return
            figures = percentiles(answer["seconds"])
            record = {"section": "threads", "peer": name, "threads": count, "target": 0.95, **figures}
            if name in session.chosen:
                record["recall"] = session.chosen[name][0.95].recall
            session.record({**record, "per_s": figures["calls"] / answer["taken"]})
        session.remotes[name].ask("pin", core=session.core)

    session.each("threads", 0, turn)


def knob_of(session: Session, name: str) -> float:
    """The knob for recall 0.95; the middle one where searches were not measured."""
    knobs = session.facts(name).knobs
    return session.chosen[name][0.95].knob if name in session.chosen else knobs[len(knobs) // 2]


# Writing one by one


def writes(session: Session) -> None:
    """Single inserts (as they come and synced), updates and deletes."""
    for kind, synced in (("insert", False), ("insert", True), ("update", True), ("delete", True)):
        single_writes(session, kind, synced)


def single_writes(session: Session, kind: str, synced: bool) -> None:
    """Blocks of ten by turns, the first block of each peer unmeasured; every insert is looked for at once."""
    able: dict[str, Callable[[str], bool]] = {
        "insert": lambda name: not synced or session.facts(name).synced,
        "update": lambda name: session.facts(name).updates,
        "delete": lambda name: session.facts(name).deletes,
    }
    names = [name for name in session.names if able[kind](name)]
    times: dict[str, list[float]] = defaultdict(list)
    searches: dict[str, list[float]] = defaultdict(list)
    found: dict[str, int] = defaultdict(int)

    def turn(name: str, block: int) -> float:
        ids, rows = written(session, name, kind, 10)
        answer = session.remotes[name].ask(
            "write", kind=kind, ids=ids, rows=rows, synced=synced, check=kind == "insert"
        )
        if block == 0:
            return 0.0
        times[name] += answer["seconds"]
        searches[name] += answer["searches"]
        found[name] += answer["found"]
        return float(sum(answer["seconds"]))

    session.interleaved("writes", session.plan.writes // 10 + 1, turn, names, 2, session.plan.write_cap)
    for name in names:
        if name in session.names:
            figures: dict[str, Any] = {"kind": kind, "synced": synced, **percentiles(times[name])}
            if kind == "insert":
                after = percentiles(searches[name])
                figures |= {"found_at_once": found[name] / len(times[name]), "search_after_ms": after["p50"]}
            session.record({"section": "writes", "peer": name, **figures})


def written(session: Session, name: str, kind: str, count: int) -> tuple[list[int], list[int]]:
    """The next ids to write and the rows they get: the same for every peer, as far as it comes."""
    size, added = session.work.size, session.added.setdefault(name, 0)
    rows = session.rows.setdefault(name, {})
    gone = session.gone.setdefault(name, set())
    spare = len(session.work.vectors) - size
    if kind == "insert":
        ids = list(range(size + added, size + added + count))
        taken = [size + (i - size) % spare for i in ids]
        session.added[name] = added + count
    else:
        ids = list(islice((i for i in range(size) if i not in gone and i not in rows), count))
        taken = [size + i % spare for i in ids]
    if kind == "delete":
        gone.update(ids)
    else:
        rows.update(zip(ids, taken, strict=True))
    return ids, taken
