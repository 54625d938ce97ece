"""The gate of searches: as many run at a time as there are cores, and single queries that wait are answered together.

Many more threads than cores that search at once only hand Python's lock to and fro. So a thread that comes to such a
crowd waits, first come first served, and the next one to enter answers its share of the waiting queries beside its own.

No lock is held. Places and waiting queries are entries of dictionaries, which are taken out again whatever happens. A
wake-up that an interrupt loses costs a wait of ``PATIENCE`` at most.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from queue import Empty, SimpleQueue

import numpy as np

from ..errors import MemEvolveError
from ..types import FloatArray
from ..utils.forking import renew_in_child
from .view import Found

PATIENCE = 1.0
"""Seconds after which a search goes on without a place."""

CROWD = 2
"""Nobody waits before more than so many threads search for each place: four threads on two cores lose a tenth of their
rate at a gate, eight lose a fifth without it (``benchmarks/threads.py``)."""

MOST_TOGETHER = 8
"""Most queries of one search."""


class _Waiting:
    """A query, float32 (1, dim), that waits for its results, or for None: then its thread looks for a place."""

    __slots__ = ("answer", "kind", "now", "query", "round")

    def __init__(self, kind: Hashable, query: FloatArray, now: float | None) -> None:
        self.kind, self.query, self.now = kind, query, now
        self.answer: SimpleQueue[Found | None] = SimpleQueue()
        self.round: _Round = {}
        """Those that were answered together with it and have not taken their results yet."""


_Round = dict[_Waiting, None]
_Search = Callable[[FloatArray, float | None], Found]


class SearchGate:
    """Lets searches of any thread in. One that a signal handler makes inside another enters at once."""

    def __init__(self, places: int | None = None) -> None:
        """``places``: how many searches run at a time; None for as many as this process has cores."""
        affinity = getattr(os, "sched_getaffinity", None)
        self._places = places or (len(affinity(0)) if affinity else os.cpu_count() or 1)
        self.after_fork()
        renew_in_child(self)

    def after_fork(self) -> None:
        """Nobody else searches in a child."""
        self._callers: dict[int, None] = {}
        """The threads that search or wait."""
        self._inside: dict[int, None] = {}
        """Those that have a place."""
        self._waiting: _Round = {}
        self._rounds: dict[int, _Round] = {}
        """The last round of a thread, while that is not over.

        The other threads of it still wait for Python's lock. A thread that searched on would keep it from them for the
        five milliseconds after which the interpreter takes it away.
        """

    def answer(self, kind: Hashable, query: FloatArray, now: float | None, search: _Search) -> Found:
        """What ``search`` finds for the query, maybe beside others of the same kind.

        Args:
            kind: what queries must have in common to be searched for together.
            query: float32 (1, dim).
            now: the Unix time at which expiry is judged; the latest one of those that are together.
            search: searches for queries, float32 (nq, dim).
        """
        me = threading.get_ident()
        if me in self._callers:
            return search(query, now)
        try:
            self._callers[me] = None
            crowded = len(self._inside) >= self._places and len(self._callers) > CROWD * self._places
            if crowded or self._waiting or self._rounds.get(me):
                found = self._waited(_Waiting(kind, query, now), me)
                if found is not None:
                    return found
            return self._entered(kind, query, now, search, me)
        finally:
            self._callers.pop(me, None)

    def _entered(self, kind: Hashable, query: FloatArray, now: float | None, search: _Search, me: int) -> Found:
        """Search for the query and for others that wait; by itself where that fails, to meet its own error only."""
        others: list[_Waiting] = []
        found = None
        try:
            self._inside[me] = None
            if not self._waiting:
                return search(query, now)
            self._take(kind, others)
            self._wake()
            queries = np.concatenate([query, *(one.query for one in others)])
            found = search(queries, None if now is None else max([now, *(one.now or now for one in others)]))
            return _row(found, 0)
        except MemEvolveError:
            if not others:
                raise
            return search(query, now)
        finally:
            self._inside.pop(me, None)
            self._deliver(found, others, me)
            self._wake()

    def _take(self, kind: Hashable, others: list[_Waiting]) -> None:
        """Move to ``others`` the first that wait, of this kind: the share of one place, where each free one has one."""
        waiting = list(self._waiting)
        shares = 1 + max(0, self._places - len(self._inside))
        most = min(MOST_TOGETHER, -(-(1 + len(waiting)) // shares)) - 1
        for one in waiting:
            if one.kind == kind and len(others) < most and self._waiting.pop(one, one) is None:
                others.append(one)

    def _deliver(self, found: Found | None, others: list[_Waiting], me: int) -> None:
        """Give the others their results; None, after an error, has each search by itself and meet its own."""
        if others:
            pending = self._rounds[me] = dict.fromkeys(others)
            for row, one in enumerate(others, 1):
                one.round = pending
                one.answer.put(None if found is None else _row(found, row))

    def _wake(self) -> None:
        """Have the first that waits look for a place, where there is one."""
        if self._waiting and len(self._inside) < self._places:
            for one in list(self._waiting)[:1]:
                one.answer.put(None)

    def _waited(self, mine: _Waiting, me: int) -> Found | None:
        """The results that another thread found; None when this one is to search."""
        ends, before = time.monotonic() + PATIENCE, self._rounds.pop(me, None)
        try:
            self._waiting[mine] = None
            while (left := ends - time.monotonic()) > 0:
                is_next = len(self._inside) < self._places and not before and mine in list(self._waiting)[:1]
                if is_next and self._waiting.pop(mine, mine) is None:
                    return None
                with suppress(Empty):
                    found = mine.answer.get(timeout=left)
                    if self._left_round(mine, me) or found is not None:
                        return found
        finally:
            self._waiting.pop(mine, None)
            mine.round.pop(mine, None)
        return None

    def _left_round(self, mine: _Waiting, me: int) -> bool:
        """Note that this thread goes on; whether it was answered, if only by an error."""
        if mine.round.pop(mine, mine) is mine:
            return False
        if mine.round:
            self._rounds[me] = mine.round
        else:
            self._wake()
        return True


def _row(found: Found, row: int) -> Found:
    return Found(found.view, found.distances[row : row + 1], found.places[row : row + 1])
