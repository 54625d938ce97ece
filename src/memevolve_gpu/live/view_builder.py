"""Build the next view: apply log entries in order, under the store's mutex.

An abandoned builder leaves the published view as it was: the next builder truncates rows after its ``delta_n`` and
deaths after its ``index_dead``; deaths above its watermark are invisible to it, and are written again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np

from ..index.base import FlatIndex, Index
from ..index.registry import build
from ..index.vector_table import growable, spill_folder
from ..types import Change, IndexPlan, IntArray, Metric, Op, Rows
from ..utils.vectors import from_bytes
from .delta_buffer import NEVER, DeltaBuffer
from .index_stats import IndexStats
from .namespaces import RowGroups
from .view import View

UNKNOWN = IndexStats()
EXACT = IndexPlan("exact", reason="exact search needs no training")


def flat_index(rows: Rows, metric: Metric) -> Index:
    """An exact index on the CPU."""
    return build(EXACT, rows, metric, seed=0)


def cpu_copy(index: Index) -> Index:
    """An exact index on the CPU that shares the vectors of ``index``, at the same positions."""
    rows = Rows(index.slots, index.id_bytes, index.id_ends, np.empty((0, index.dim), dtype=np.float32))
    return FlatIndex(EXACT, index.metric, rows, index.table)


def on_host(view: View) -> View:
    """The same view with the CPU's index beside the device's, or with an exact one."""
    return view.by_host if view.host_side is not None else replace(view, index=cpu_copy(view.index), stats=UNKNOWN)


def empty_index(dim: int, metric: Metric, folder: Path | None = None) -> Index:
    """A flat index without rows; ``folder``: for the spill of rows that follow."""
    none = np.empty(0, dtype=np.int64)
    return flat_index(Rows(none, np.empty(0, dtype=np.uint8), none, growable((0, dim), np.float32, folder)), metric)


def view_of(
    index: Index,
    watermark: int,
    stats: IndexStats = UNKNOWN,
    dead: IntArray | None = None,
    groups: RowGroups | None = None,
) -> View:
    """A view with an empty delta buffer; all rows of ``index`` are alive, except those at ``dead``, int64 (m,)."""
    died = growable((index.n,), np.int64)
    died[:] = NEVER
    deaths = array("q", () if dead is None else dead.tolist())
    if deaths:
        died[dead] = watermark
    delta = DeltaBuffer(index.dim, spill_folder(index.table.vectors))
    return View(watermark, index, watermark, died, deaths, len(deaths), delta, 0, 0, index.metric, stats, groups)


def apart(view: View) -> View:
    """The same view with its own copy of deaths and delta buffer, for a builder beside the published view's."""
    deaths = array("q", view.index_deaths[: view.index_dead])
    return replace(view, index_died=view.index_died.copy(), index_deaths=deaths, delta=view.delta.copy(view.delta_n))


class ViewBuilder:
    """Applies changes on top of ``view`` and publishes the result."""

    def __init__(self, view: View) -> None:
        self._base = view
        self._index = view.index
        self._index_died = view.index_died
        self._index_deaths = view.index_deaths
        del self._index_deaths[view.index_dead :]
        self._delta = view.delta
        self._delta_dead = view.delta_dead
        self._delta.truncate(view.delta_n)
        self.watermark = view.watermark
        self.cleared = False
        self.touched: list[tuple[int, int]] = []
        """(seq, slot) of rows that were added or changed, which cached filters must evaluate again."""
        self.expiry: list[tuple[int, float | None]] = []
        """(slot, Unix time) of rows whose expiry is new; None for rows that are gone or do not expire."""

    def apply(self, changes: Sequence[Change]) -> None:
        for op, run in groupby(changes, key=attrgetter("op")):
            same = list(run)
            if op == Op.PUT:
                self._put(same)
            elif op == Op.DROP:
                for change in same:
                    self._drop(change.slot, change.seq)
                self.expiry += [(change.slot, None) for change in same]
            elif op == Op.EDIT:
                self.touched += [(change.seq, change.slot) for change in same]
                self.expiry += [(change.slot, change.expires_at) for change in same]
            else:
                self._clear()
        if changes:
            self.watermark = changes[-1].seq

    def publish(self) -> View:
        base, delta_n = self._base, self._delta.n
        view = View(
            self.watermark,
            self._index,
            self.watermark if self.cleared else base.index_seq,
            self._index_died,
            self._index_deaths,
            len(self._index_deaths),
            self._delta,
            delta_n,
            self._delta_dead,
            base.metric,
            UNKNOWN if self.cleared else base.stats,
            None if self.cleared else base.groups,
            None if self.cleared else base.host_side,
        )
        if view.index_dead == base.index_dead and self._index is base.index and "alive" in base.__dict__:
            view.__dict__["alive"] = base.__dict__["alive"]
        return view

    def _put(self, changes: list[Change]) -> None:
        """Add rows, except those that are deleted again: their DROP follows in the log."""
        rows = [
            (one.slot, one.id, one.vector, one.ns) for one in changes if one.id is not None and one.vector is not None
        ]
        if rows:
            slots, ids, raw, namespaces = zip(*rows, strict=True)
            self._delta.extend(slots, ids, from_bytes(raw, self._base.metric), namespaces)
        self.expiry += [(one.slot, one.expires_at) for one in changes if one.expires_at is not None]
        self.touched += [(change.seq, change.slot) for change in changes]

    def _drop(self, slot: int, seq: int) -> None:
        visible = self._base.watermark
        position = self._delta.position_of(slot)
        if position >= 0:
            newly = position >= self._base.delta_n or self._delta.died_at(position) > visible
            self._delta.mark_dead(position, seq)
            self._delta_dead += newly
            return
        position = int(np.searchsorted(self._index.slots, slot))
        if position < self._index.n and self._index.slots[position] == slot:
            if self._index_died[position] > visible:
                self._index_deaths.append(position)
            self._index_died[position] = seq

    def _clear(self) -> None:
        self._index = empty_index(self._base.index.dim, self._base.metric, self._delta.folder)
        self._index_died = np.empty(0, dtype=np.int64)
        self._delta = DeltaBuffer(self._base.index.dim, self._delta.folder)
        self._index_deaths, self._delta_dead = array("q"), 0
        self.cleared = True
