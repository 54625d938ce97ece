"""The process of one peer: takes commands as JSON lines on stdin and answers each with one on its first stdout.

    python -m peers.worker CORE

Only calls into the peer are timed. What a library prints goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from .data import Work, parts_of
from .protocol import Payload, Peer
from .registry import peer

__all__ = ["Worker"]

WARM_UP = 2
"""Calls before the measured ones of each turn: another peer had the caches in between."""
SMALL = 256
"""Rows of the store that is opened and searched before memory is counted: what a first store takes once."""


class Worker:
    """One method for each command; every answer is a dict that JSON can hold."""

    def __init__(self) -> None:
        self.peer: Peer
        self.work: Work

    def begin(self, name: str, data: str, size: int, folder: str) -> dict[str, Any]:
        """Load the peer's modules; nothing is opened yet."""
        self.name, self.folder = name, Path(folder)
        self.work = Work(Path(data), "", size)
        self.dim = self.work.vectors.shape[1]
        self.peer = peer(name)
        return {}

    def open(self) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return {"seconds": timed(lambda: self.peer.open(self.folder, self.dim))}

    def ingest(self) -> dict[str, Any]:
        """Everything, the units' dicts being made before the clock starts."""
        size = self.work.size
        ids, vectors = range(size), self.work.vectors[:size].copy()
        payloads = [self.work.payload(row) for row in ids] if self.peer.facts.payloads else []
        before = resident()["total"]
        forget_peak()
        seconds = timed(lambda: self.peer.ingest(ids, vectors, payloads))
        started = time.perf_counter()
        found = self.peer.search(vectors[-1:], 1, self.peer.facts.knobs[-1])
        first = time.perf_counter() - started
        return {"seconds": seconds, "first_search": first, "found": found == [[size - 1]], "before_mb": before}

    def settle(self) -> dict[str, Any]:
        seconds = timed(self.peer.settle)
        return {"seconds": seconds, "peak_mb": status_mb("VmHWM")}

    def search(self, rows: list[int], k: int, knob: float, what: str = "ids", below: int = 0) -> dict[str, Any]:
        """One query a call; ``what``: ids, units or filtered."""
        call = self._search_call(k, knob, what, below)
        queries = self.work.queries
        for row in rows[:WARM_UP]:
            call(queries[row : row + 1])
        seconds, found = [], []
        for row in rows:
            query = queries[row : row + 1]
            started = time.perf_counter()
            answer = call(query)
            seconds.append(time.perf_counter() - started)
            found.append(answer[0] if what != "units" else len(answer[0]))
        return {"seconds": seconds, "found": found}

    def first_search(self, row: int, k: int, knob: float, what: str = "ids", below: int = 0) -> dict[str, Any]:
        """One query without any before it."""
        call = self._search_call(k, knob, what, below)
        query = self.work.queries[row : row + 1]
        started = time.perf_counter()
        found = call(query)
        return {"seconds": time.perf_counter() - started, "found": found if what != "units" else []}

    def threads(self, count: int, rows: list[int], k: int, knob: float, seconds: float) -> dict[str, Any]:
        """So many threads that search one query after the other for so many seconds, on all cores of the machine."""
        call, queries = self._search_call(k, knob, "ids", 0), self.work.queries
        pinned(set(range(os.cpu_count() or 1)))
        call(queries[:1])
        end = time.perf_counter() + seconds

        def searching(first: int) -> list[float]:
            taken = []
            for row in itertools.cycle(rows[first:] + rows[:first]):
                started = time.perf_counter()
                if started >= end:
                    break
                call(queries[row : row + 1])
                taken.append(time.perf_counter() - started)
            return taken

        started = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            times = [one for taken in pool.map(searching, range(count)) for one in taken]
        return {"seconds": times, "taken": time.perf_counter() - started}

    def pin(self, core: int) -> dict[str, Any]:
        pinned({core})
        return {}

    def _search_call(self, k: int, knob: float, what: str, below: int) -> Callable[[Any], Any]:
        if what == "units":
            return lambda query: self.peer.search_units(query, k, knob)
        if what == "filtered":
            return lambda query: self.peer.search_filtered(query, k, knob, below)
        return lambda query: self.peer.search(query, k, knob)

    def write(self, kind: str, ids: list[int], rows: list[int], synced: bool, check: bool = False) -> dict[str, Any]:
        """Inserts, updates or deletes, one a call; with check, how long a search then takes and whether it finds it."""
        seconds, searches, found = [], [], 0
        top = self.peer.facts.knobs[-1]
        for number, row in zip(ids, rows, strict=True):
            vector, payload = self._written(row)
            seconds.append(self._one_write(kind, number, vector, payload, synced))
            if check:
                started = time.perf_counter()
                found += self.peer.search(vector[None], 1, top) == [[number]]
                searches.append(time.perf_counter() - started)
        return {"seconds": seconds, "searches": searches, "found": found}

    def _written(self, row: int) -> tuple[Any, Payload]:
        return self.work.vectors[row].copy(), self.work.payload(row)

    def _one_write(self, kind: str, number: int, vector: Any, payload: Payload, synced: bool) -> float:
        if kind == "insert":
            return timed(lambda: self.peer.insert(number, vector, payload, synced))
        if kind == "update":
            return timed(lambda: self.peer.update(number, vector, payload, synced))
        return timed(lambda: self.peer.delete(number, synced))

    def mixed(self, operations: list[list[Any]], k: int, knob: float) -> dict[str, Any]:
        """[kind, id, row] each; queries come with their units where the peer keeps any, writes are synced."""
        call = self._search_call(k, knob, "units" if self.peer.facts.payloads else "ids", 0)
        seconds = []
        for kind, number, row in operations:
            if kind == "query":
                query = self.work.queries[row : row + 1]
                seconds.append(timed(lambda query=query: call(query)))  # type: ignore[misc]
            else:
                seconds.append(self._one_write(kind, number, *self._written(row), True))
        return {"seconds": seconds}

    def baseline(self) -> dict[str, Any]:
        """Open, fill, search and close a small store of the same kind, and say what the process then holds."""
        folder = self.folder.with_name(f"{self.folder.name}-small")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        small = peer(self.name)
        small.open(folder, self.dim)
        vectors = self.work.vectors[:SMALL].copy()
        small.ingest(range(SMALL), vectors, [self.work.payload(row) for row in range(SMALL)])
        small.settle()
        small.search(vectors[:1], 10, small.facts.knobs[0])
        small.close()
        del small
        parts_of(1)
        return self.memory()

    def memory(self) -> dict[str, Any]:
        gc.collect()
        return resident()

    def close(self) -> dict[str, Any]:
        seconds = timed(self.peer.close)
        return {"seconds": seconds, "disk_mb": self.peer.disk_bytes(self.folder) / 2**20}


def pinned(cores: set[int]) -> None:
    """Every thread of this process, those of the peer too, to these cores."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def resident() -> dict[str, float]:
    """Resident megabytes of this process: its own (anonymous), those of mapped files, and both."""
    own, mapped = status_mb("RssAnon"), status_mb("RssFile")
    return {"own": own, "mapped": mapped, "total": own + mapped}


def status_mb(field: str) -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) / 1024


def forget_peak() -> None:
    """Let the kernel count the peak of resident memory from now on; it begins with that of the process that forked."""
    Path("/proc/self/clear_refs").write_text("5")


def die_with_the_parent() -> None:
    """Ask Linux for SIGKILL when the asking process ends, whatever ends it: a stopped worker would stay for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))


def main() -> None:
    die_with_the_parent()
    os.sched_setaffinity(0, {int(sys.argv[1])})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # noqa: BLE001 - a peer may raise anything, and the run goes on without it
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # some libraries crash or wait in their own ending


if __name__ == "__main__":
    main()
