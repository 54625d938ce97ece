"""An immutable view of the store at one watermark: index + delta + tombstones."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..index.base import Index, chunks
from ..index.bitmap import RowFilter, RowList
from ..index.exact_scan import exact_scan
from ..planner.routing import SideTimings
from ..types import FloatArray, IntArray, Metric, SearchParams
from ..utils.forking import lazy
from ..utils.vectors import DeviceQueries
from .delta_buffer import DeltaBuffer
from .index_stats import IndexStats
from .namespaces import DEFAULT, RowGroups

FEW_ROWS = 2048
"""Up to so many allowed rows are scanned, whatever the index: 1,000 rows take about as long as its first step."""

_LISTED_SHARE = 64
"""A filter is a list of rows where it allows less than this part of them, else a mask."""

_WIDER = 8
"""Factor by which a scan that cuts a tie is widened."""

BoolArray = npt.NDArray[np.bool_]


class LiveRows(RowFilter):
    """The rows of an index that are alive at a watermark; the full mask is computed only when a scan needs it.

    The first ``dead`` entries of ``deaths`` are the positions of the dead rows, in the order in which they died.
    """

    def __init__(self, died: IntArray, watermark: int, deaths: array[int], dead: int) -> None:
        self._died = died
        self._watermark = watermark
        self.deaths = deaths
        self.dead = dead
        self._packed = None
        self._positions = None
        self.count = len(died) - dead
        self.n = len(died)

    @lazy
    def rows(self) -> BoolArray:
        return self._died > self._watermark

    def test(self, positions: IntArray) -> BoolArray:
        return (self._died[positions] > self._watermark) & (positions >= 0)

    def dead_since(self, other: RowFilter | None) -> IntArray | None:
        known = 0
        if other is not None:
            if not isinstance(other, LiveRows) or other.deaths is not self.deaths or other.dead > self.dead:
                return None
            known = other.dead
        return np.array(self.deaths[known : self.dead], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class ViewFilter:
    """The rows of one view that a search may return.

    index: rows of the index, None for all of them; delta: positions in the delta buffer, likewise.
    """

    index: RowFilter | None
    delta: RowFilter | None

    def count(self, view: View) -> int:
        """Number of rows."""
        index = view.index.n if self.index is None else self.index.count
        return index + (view.delta_n if self.delta is None else self.delta.count)

    def slots(self, view: View) -> IntArray:
        """Slots of the rows, int64 (n,), ascending."""
        found = [view.index.slots if self.index is None else view.index.slots[self.index.positions]]
        for piece in view.delta.pieces(0, view.delta_n):
            own = slice(None) if self.delta is None else self.delta.part(piece.start, piece.end).positions
            found.append(piece.slots[own])
        return np.concatenate(found)


def row_filter_of(n: int, positions: IntArray) -> RowFilter:
    """The filter that allows ``positions``, int64 (m,) ascending, of n rows."""
    if len(positions) <= max(FEW_ROWS, n // _LISTED_SHARE):
        return RowList(n, positions)
    rows = np.zeros(n, dtype=np.bool_)
    rows[positions] = True
    return RowFilter(rows)


@dataclass(frozen=True, slots=True)
class Found:
    """Results of nq queries: distances float32 (nq, k), +inf where missing; places int64 (nq, k), -1 where missing.

    A place is a position in the index, or the index's length plus a position in the delta buffer, of the view searched.
    """

    view: View
    distances: FloatArray
    places: IntArray

    def ids(self, row: int) -> list[str]:
        """The ids found for one query, nearest first."""
        return self.view.ids_at(self._present(row))

    def slots(self, row: int) -> list[int]:
        return self.view.slots_at(self._present(row))

    def _present(self, row: int) -> IntArray:
        places: IntArray = self.places[row]
        present: IntArray = places[places >= 0]
        return present


@dataclass(frozen=True, slots=True)
class HostSide:
    """The index on the CPU beside one on a device: the same rows at the same positions, and what both sides take."""

    index: Index
    stats: IndexStats
    timings: SideTimings


@dataclass(frozen=True)
class View:
    """What a search sees; the answers of a view never change.

    index_seq is a log entry as of which index and deaths are complete; while the delta buffer is empty they are
    complete as of ``watermark``. index_died int64 (index.n,) holds the log entry of each row's death. It, index_deaths
    and the delta buffer are shared with later views: rows are only added after ``delta_n``, deaths are only set to log
    entries above ``watermark``, and positions are only added after the first ``index_dead`` of index_deaths, which are
    those of the dead rows of this view. host_side is there where calls are routed by measurement (DEVICE=auto).
    """

    watermark: int
    index: Index
    index_seq: int
    index_died: IntArray
    index_deaths: array[int]
    index_dead: int
    delta: DeltaBuffer
    delta_n: int
    delta_dead: int
    metric: Metric
    stats: IndexStats
    groups: RowGroups | None = None
    host_side: HostSide | None = None

    @property
    def count(self) -> int:
        """Live rows."""
        return self.index.n - self.index_dead + self.delta_n - self.delta_dead

    def live_slots(self) -> IntArray:
        """Slots of the live rows, int64 (count,), ascending."""
        parts = [self.index.slots[self.index_died > self.watermark]]
        parts += [piece.slots[piece.died > self.watermark] for piece in self.delta.pieces(0, self.delta_n)]
        return np.concatenate(parts)

    def covered_by(self, keys: Sequence[int]) -> bool:
        """Whether every row is of one of the namespaces with these keys."""
        index = DEFAULT in keys or not self.index.n if self.groups is None else self.groups.covered_by(keys)
        return index and self.delta.covered_by(keys)

    def count_of(self, keys: Sequence[int]) -> int:
        """Number of rows of these namespaces in the index, dead ones included."""
        if self.groups is None:
            return self.index.n if DEFAULT in keys else 0
        return self.groups.count(keys)

    def rows_of(self, keys: Sequence[int] | None) -> IntArray | None:
        """Positions in the index of the rows of these namespaces, dead ones included, int64, ascending; None for all
        rows."""
        if keys is None or (self.groups is None and DEFAULT in keys):
            return None
        return np.empty(0, np.int64) if self.groups is None else self.groups.rows(keys)

    def delta_rows_of(self, keys: Sequence[int] | None) -> IntArray:
        """Positions in the delta buffer of the live rows of these namespaces, None for all; int64, ascending."""
        if keys is None:
            return self._live_delta(np.arange(self.delta_n, dtype=np.int64))
        return self._live_delta(self.delta.rows_of(keys, self.delta_n))

    def slots_of(self, keys: Sequence[int]) -> IntArray:
        """Slots of the live rows of these namespaces, int64, ascending."""
        rows = self.rows_of(keys)
        if rows is None:
            rows = np.arange(self.index.n, dtype=np.int64)
        rows = rows[self.index_died[rows] > self.watermark]
        found, positions = [self.index.slots[rows]], self.delta_rows_of(keys)
        for piece in self.delta.pieces(0, self.delta_n):
            low, high = np.searchsorted(positions, [piece.start, piece.end]).tolist()
            found.append(piece.slots[positions[low:high] - piece.start])
        return np.concatenate(found)

    def delta_positions_of(self, slots: IntArray) -> IntArray:
        """Positions in the delta buffer of the live rows among these slots, int64, ascending."""
        found = [np.empty(0, np.int64)]
        for piece in self.delta.pieces(0, self.delta_n):
            low, high = np.searchsorted(slots, [piece.slots[0], piece.slots[-1] + 1]).tolist()
            at = np.searchsorted(piece.slots, slots[low:high])
            at = at[piece.slots[at] == slots[low:high]]
            found.append(piece.start + at[piece.died[at] > self.watermark])
        return np.concatenate(found)

    def _live_delta(self, positions: IntArray) -> IntArray:
        """The live ones of ascending ``positions`` in the delta buffer."""
        found = [np.empty(0, np.int64)]
        for piece in self.delta.pieces(0, self.delta_n):
            low, high = np.searchsorted(positions, [piece.start, piece.end]).tolist()
            part = positions[low:high]
            found.append(part[piece.died[part - piece.start] > self.watermark])
        return np.concatenate(found)

    def faster_for(self, nq: int, *, on_device: bool = False) -> View:
        """The view that answers ``nq`` queries sooner, by measurement: this one, or the same rows by the CPU's index.

        on_device: the queries lie on a device, where they stay while it answers.
        """
        side = self.host_side
        if side is None or (self.index.device != "cpu" and (on_device or side.timings.device_wins(nq))):
            return self
        return self.by_host

    @property
    def by_host(self) -> View:
        """The same rows by the index on the CPU; this view where there is none beside the device's."""
        return self if self.host_side is None else self._by_host

    @lazy
    def _by_host(self) -> View:
        side = self.host_side
        found = self if side is None else replace(self, index=side.index, stats=side.stats, host_side=None)
        found.__dict__["alive"] = self.alive  # one mask serves both
        return found

    @lazy
    def alive(self) -> RowFilter | None:
        """Live rows of the index; None when all are."""
        if not self.index_dead:
            return None
        return LiveRows(self.index_died, self.watermark, self.index_deaths, self.index_dead)

    @lazy
    def delta_alive(self) -> RowFilter | None:
        """Live rows of the delta buffer; None when all are."""
        if not self.delta_dead:
            return None
        rows = [piece.died > self.watermark for piece in self.delta.pieces(0, self.delta_n)]
        return RowFilter(np.concatenate([np.empty(0, np.bool_), *rows]))

    def search(
        self, queries: FloatArray | DeviceQueries, k: int, params: SearchParams, view_filter: ViewFilter | None = None
    ) -> Found:
        """Exact distances of the k nearest live, matching rows; of rows at equal distances the older first.

        One more result than k is searched for: if it is as far as the k-th, a wider search finds the oldest of the rows
        at that distance, so that the first results do not depend on k.

        queries: float32 (nq, dim), normalised under cosine. Those on a device are copied to the host for a delta buffer
        or an index that cannot take them there.
        """
        distances, places = self._nearest(queries, min(k + 1, max(k, self.count)), params, view_filter)
        if places.shape[1] > k:
            tied = _cut_ties(distances, places, k)
            distances, places = distances[:, :k], places[:, :k]
            if tied.size:
                distances, places = distances.copy(), places.copy()
                self._untie(np.asarray(queries), tied, params, view_filter, (distances, places))
        return Found(self, np.ascontiguousarray(distances), np.ascontiguousarray(places))

    def _nearest(
        self, queries: FloatArray | DeviceQueries, k: int, params: SearchParams, view_filter: ViewFilter | None
    ) -> tuple[FloatArray, IntArray]:
        parts: list[tuple[FloatArray, IntArray]] = []
        row_filter = self.alive if view_filter is None else view_filter.index
        if isinstance(row_filter, RowList) and row_filter.count <= FEW_ROWS:
            params = SearchParams(exact=True)
        if self.index.n and (row_filter is None or row_filter.count):
            parts.append(self.index.search(_queries_for(self.index, queries), k, params, row_filter))
        parts += self._search_delta(queries, k, view_filter)
        return _merge(parts, len(queries), k)

    def _untie(
        self,
        queries: FloatArray,
        tied: IntArray,
        params: SearchParams,
        view_filter: ViewFilter | None,
        out: tuple[FloatArray, IntArray],
    ) -> None:
        """Fill the rows ``tied`` of ``out``, (nq, k), by searches wide enough to cut no tie.

        Equal vectors have equal codes, so candidates hold all of them or end among them; then the next search is wider.
        A graph may hold one of them and miss another, and is not asked.
        """
        params = SearchParams(exact=True) if self.index.kind == "hnsw" else params
        k = width = out[0].shape[1]
        while tied.size:
            width = min(_WIDER * (width + 1), self.count)
            still = []
            for part in chunks(len(tied), 12 * width):
                rows = tied[part]
                distances, places = self._nearest(queries[rows], width, params, view_filter)
                whole = (distances[:, k - 1] < distances[:, -1]) | (places[:, -1] < 0) | (width >= self.count)
                out[0][rows[whole]], out[1][rows[whole]] = distances[whole, :k], places[whole, :k]
                still.append(rows[~whole])
            tied = np.concatenate(still)

    def ids_at(self, places: IntArray) -> list[str]:
        """The ids at ``places`` (m,), none of which is -1."""
        n = self.index.n
        if not self.delta_n:
            return [str(unit_id) for unit_id in self.index.ids_at(places)]
        in_index = iter(self.index.ids_at(places[places < n]))
        return [self.delta.id_at(place - n) if place >= n else str(next(in_index)) for place in places.tolist()]

    def slots_at(self, places: IntArray) -> list[int]:
        n, slots = self.index.n, self.index.slots
        return [self.delta.slot_at(p - n) if p >= n else int(slots[p]) for p in places.tolist()]

    def _search_delta(
        self, queries: FloatArray | DeviceQueries, k: int, view_filter: ViewFilter | None
    ) -> list[tuple[FloatArray, IntArray]]:
        """The nearest in the delta buffer: on the device of the index, or piece by piece on the host."""
        row_filter = self.delta_alive if view_filter is None else view_filter.delta
        if not self.delta_n or (row_filter is not None and not row_filter.count):
            return []
        found = self.index.search_delta(self.delta, self.delta_n, queries, k, row_filter)
        if found is not None:
            return [(found[0], _shifted(found[1], self.index.n))]
        here, parts = np.asarray(queries), []
        for piece in self.delta.pieces(0, self.delta_n):
            own = None if row_filter is None else row_filter.part(piece.start, piece.end)
            if own is None or own.count:
                distances, places = exact_scan(here, piece.vectors, k, self.metric, own)
                parts.append((distances, _shifted(places, self.index.n + piece.start)))
        return parts


def _cut_ties(distances: FloatArray, places: IntArray, k: int) -> IntArray:
    """The queries whose k-th result is as near as the next one."""
    if len(distances) == 1 and distances[0, k - 1] != distances[0, k]:  # a tenth of the time
        return np.empty(0, np.int64)
    return np.flatnonzero((distances[:, k - 1] == distances[:, k]) & (places[:, k] >= 0))


def _queries_for(index: Index, queries: FloatArray | DeviceQueries) -> FloatArray:
    """Queries as the index takes them: a tensor on its device, or an array on the host."""
    if isinstance(queries, DeviceQueries):
        tensor: FloatArray = queries.tensor
        return tensor if index.accepts_device_queries and index.device != "cpu" else queries.host()
    return queries


def _shifted(places: IntArray, by: int) -> IntArray:
    return np.where(places >= 0, places + by, -1)


def contains(sorted_slots: IntArray, slots: IntArray) -> BoolArray:
    """Which of ``slots`` are in the ascending ``sorted_slots``."""
    if not len(sorted_slots):
        return np.zeros(len(slots), dtype=np.bool_)
    at = np.searchsorted(sorted_slots, slots)
    at[at == len(sorted_slots)] = 0
    found: BoolArray = sorted_slots[at] == slots
    return found


def _has_ties(distances: FloatArray) -> bool:
    """Whether a query has results at equal distances, ascending float32 (nq, k)."""
    if len(distances) == 1:
        row = distances[0].tolist()
        return len(set(row)) < len(row)
    return bool((distances[:, 1:] == distances[:, :-1]).any())


def _merge(parts: Sequence[tuple[FloatArray, IntArray]], nq: int, k: int) -> tuple[FloatArray, IntArray]:
    """The k nearest of all parts, nearest first, and of equal ones the oldest first."""
    if not parts:
        return np.full((nq, k), np.inf, dtype=np.float32), np.full((nq, k), -1, dtype=np.int64)
    if len(parts) == 1:
        distances, places = parts[0]
        if not _has_ties(distances):
            return distances, places
    else:
        distances = np.concatenate([d for d, _ in parts], axis=1)
        places = np.concatenate([p for _, p in parts], axis=1)
    order = np.lexsort((places, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(places, order, axis=1)
