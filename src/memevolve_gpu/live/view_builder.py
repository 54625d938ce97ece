"""Build the next view: apply log entries in order, under the store's mutex.

A draft that is abandoned half-way leaves the published view as it was: rows past its ``tail_n`` are cut off by the
next draft, so are deaths past its ``body_dead``, and those above its watermark are invisible to it and written again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

import numpy as np

from ..index.base import Body
from ..index.flat import ExactBody
from ..index.registry import build
from ..types import Change, FloatArray, IndexPlan, IntArray, Metric, Op, Rows
from ..utils.vectors import normalize_rows
from .delta_buffer import NEVER, Tail
from .index_stats import BodyFacts
from .view import View

__all__ = ["Draft", "apart", "empty_body", "exact_body", "host_twin", "on_host", "view_of"]

UNKNOWN = BodyFacts()
EXACT = IndexPlan("exact", reason="exact search needs no training")


def exact_body(rows: Rows, metric: Metric) -> Body:
    """A body that scans its rows."""
    return build(EXACT, rows, metric, seed=0)


def host_twin(body: Body) -> Body:
    """A body on the CPU that scans the vectors of ``body``, which it shares: the same positions, at no cost."""
    rows = Rows(body.slots, body.id_bytes, body.id_ends, np.empty((0, body.dim), dtype=np.float32))
    return ExactBody(EXACT, body.metric, rows, body.table)


def on_host(view: View) -> View:
    """The same view without a device: its rows, scanned on the host."""
    return replace(view, body=host_twin(view.body), facts=UNKNOWN)


def empty_body(dim: int, metric: Metric) -> Body:
    none = np.empty(0, dtype=np.int64)
    return exact_body(Rows(none, np.empty(0, dtype=np.uint8), none, np.empty((0, dim), dtype=np.float32)), metric)


def view_of(body: Body, watermark: int, facts: BodyFacts = UNKNOWN, dead: IntArray | None = None) -> View:
    """A view with an empty tail, in which every row of ``body`` is alive but those at ``dead``, int64 (m,)."""
    died = np.full(body.n, NEVER, dtype=np.int64)
    deaths = array("q", () if dead is None else dead.tolist())
    if deaths:
        died[dead] = watermark
    return View(watermark, body, watermark, died, deaths, len(deaths), Tail(body.dim), 0, 0, body.metric, facts)


def apart(view: View) -> View:
    """The same view with deaths and tail in memory of its own, for a draft that the published view does not see."""
    deaths = array("q", view.body_deaths[: view.body_dead])
    return replace(view, body_died=view.body_died.copy(), body_deaths=deaths, tail=view.tail.copy(view.tail_n))


class Draft:
    """Applies changes on top of ``view`` and publishes the result."""

    def __init__(self, view: View) -> None:
        self._base = view
        self._body = view.body
        self._body_died = view.body_died
        self._body_deaths = view.body_deaths
        del self._body_deaths[view.body_dead :]
        self._tail = view.tail
        self._tail_dead = view.tail_dead
        self._tail.truncate(view.tail_n)
        self.watermark = view.watermark
        self.cleared = False
        self.touched: list[tuple[int, int]] = []
        """(seq, slot) of rows that came or changed: what a cached filter must look at again."""

    def apply(self, changes: Sequence[Change]) -> None:
        for op, run in groupby(changes, key=attrgetter("op")):
            same = list(run)
            if op == Op.PUT:
                self._put(same)
            elif op == Op.DROP:
                for change in same:
                    self._drop(change.slot, change.seq)
            elif op == Op.EDIT:
                self.touched += [(change.seq, change.slot) for change in same]
            else:
                self._clear()
        if changes:
            self.watermark = changes[-1].seq

    def publish(self) -> View:
        base, tail_n = self._base, self._tail.n
        view = View(
            self.watermark,
            self._body,
            self.watermark if self.cleared else base.body_seq,
            self._body_died,
            self._body_deaths,
            len(self._body_deaths),
            self._tail,
            tail_n,
            self._tail_dead,
            base.metric,
            UNKNOWN if self.cleared else base.facts,
        )
        if view.body_dead == base.body_dead and self._body is base.body and "alive" in base.__dict__:
            view.__dict__["alive"] = base.__dict__["alive"]
        return view

    def _put(self, changes: list[Change]) -> None:
        """Take the rows in; those that are gone again are passed over, their DROP follows in the log."""
        rows = [(one.slot, one.id, one.vector) for one in changes if one.id is not None and one.vector is not None]
        if rows:
            slots, ids, raw = zip(*rows, strict=True)
            self._tail.extend(slots, ids, self._vectors(raw))
        self.touched += [(change.seq, change.slot) for change in changes]

    def _vectors(self, raw: Sequence[bytes]) -> FloatArray:
        vectors: FloatArray = np.frombuffer(b"".join(raw), dtype="<f4").reshape(len(raw), -1)
        return normalize_rows(vectors) if self._base.metric == "cosine" else vectors

    def _drop(self, slot: int, seq: int) -> None:
        visible = self._base.watermark
        position = self._tail.position_of(slot)
        if position >= 0:
            newly = position >= self._base.tail_n or self._tail.died_at(position) > visible
            self._tail.mark_dead(position, seq)
            self._tail_dead += newly
            return
        position = int(np.searchsorted(self._body.slots, slot))
        if position < self._body.n and self._body.slots[position] == slot:
            if self._body_died[position] > visible:
                self._body_deaths.append(position)
            self._body_died[position] = seq

    def _clear(self) -> None:
        self._body = empty_body(self._base.body.dim, self._base.metric)
        self._body_died = np.empty(0, dtype=np.int64)
        self._tail = Tail(self._base.body.dim)
        self._body_deaths, self._tail_dead = array("q"), 0
        self.cleared = True
