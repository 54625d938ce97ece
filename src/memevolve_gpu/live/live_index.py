"""The live index: the published view, how it follows the log, and how it is searched."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, TypeVar

import numpy as np

from ..devices.memory import trim_heap
from ..devices.selection import Machine
from ..errors import DeviceError, ReentrantCallError, StorageError
from ..index.base import Index
from ..index.vector_table import DamagedVectorsError
from ..monitoring.events import EventLog, LatencyRing
from ..planner.nlist import ListsRule
from ..records.filters import Condition, Every, Filter, Instant, parse
from ..records.records import Records
from ..types import DoubleArray, FloatArray, Head, IntArray, Precision
from ..utils.forking import lock, renew_in_child
from ..utils.report_types import LatencyReport, NlistChangeReport
from ..utils.vectors import DeviceQueries
from .device_manager import DeviceManager
from .field_columns import FieldColumns, Log
from .field_values import FieldValues
from .filter_cache import FilterCache, Touched
from .foresight import FORESEEN_GROWTH
from .gate import SearchGate
from .index_stats import IndexStats
from .namespaces import EVERYTHING, Expiring, Scope
from .query_sample import QuerySample
from .snapshots import agrees, load_snapshot, read_everything, remove_snapshot
from .view import Found, View, ViewFilter, row_filter_of
from .view_builder import ViewBuilder, apart, on_host
from .worker import SearchYield


@dataclass(frozen=True, slots=True)
class NlistChange:
    """The last change of nlist: when (Unix time), from and to which value, and recall and latency before it."""

    at: float
    nlist_before: int
    nlist_after: int
    before: dict[str, float | None]

    def report(self, view: View, latency: LatencyReport | None) -> NlistChangeReport:
        """nlist, recall@10 and latency before and since the change; None for what is not known yet."""
        return {
            "at": self.at,
            "nlist": [self.nlist_before, self.nlist_after],
            "before": self.before,
            "since": _figures(view, latency),
        }


def _figures(view: View, latency: LatencyReport | None) -> dict[str, float | None]:
    """The last measured recall@10, of real queries, else of the index when it was built; and latency."""
    stats, built = view.stats, None if view.stats.quality is None else view.stats.quality.recall
    p50, p95 = (None, None) if latency is None else (latency["p50_ms"], latency["p95_ms"])
    return {"recall": built if stats.probed is None else stats.probed, "p50_ms": p50, "p95_ms": p95}


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """The settings of ``StorageConfig`` for the index; ``budget_bytes`` limits index, vectors and id maps."""

    index_type: Literal["flat", "ivf", "hnsw", "auto"] = "ivf"
    target_recall: float = 0.95
    min_training_units: int = 1000
    adaptive_nlist: bool = True
    vectors_per_centroid: int = 39
    nlist_min: int = 10
    nlist_max: int | None = None
    precision: Literal["auto"] | Precision = "auto"
    budget_bytes: int = 2048 * 2**20
    background: bool = True
    sample_queries: bool = True
    seed: int = 20_240_607

    @property
    def lists(self) -> ListsRule:
        """How many inverted lists an index has."""
        return ListsRule(self.vectors_per_centroid, self.nlist_min, self.nlist_max, self.adaptive_nlist)


T = TypeVar("T")


def _own_bytes(index: Index) -> int:
    """Memory of an index beside another one over the same rows, whose vectors and slot table it shares."""
    return index.nbytes - index.row_bytes


PAGE = 1024
"""Log entries read at a time."""

FIRST_RANKED = 64
"""Candidates that a ranked search looks at first, at least."""
SWEEP_ROWS, SWEEP_SECONDS = 256, 600.0
"""Expired rows from which they are swept, and seconds after which fewer are."""

FILTER_ATTEMPTS = 8
"""Tries to evaluate a filter while no write happens."""


P = ParamSpec("P")


def _again_if_damaged(method: Callable[Concatenate[LiveIndex, P], T]) -> Callable[Concatenate[LiveIndex, P], T]:
    """Call the method once more, from the records, when vectors of the snapshot turn out to be damaged."""

    @functools.wraps(method)
    def call(self: LiveIndex, /, *arguments: P.args, **named: P.kwargs) -> T:
        try:
            return method(self, *arguments, **named)
        except DamagedVectorsError as error:
            self._distrust(error)
            return method(self, *arguments, **named)

    return call


class LiveIndex:
    """The index of one open store. Threads may search and catch up at the same time.

    Everything here is derived from ``records`` and may be rebuilt from them; the watermark of the view is the last log
    entry that it contains.
    """

    def __init__(
        self,
        records: Records,
        settings: LiveSettings,
        events: EventLog,
        snapshot: Path,
        device_manager: DeviceManager | None = None,
    ) -> None:
        """``device_manager`` gives access to a GPU; None keeps everything on the CPU."""
        self.records = records
        self.device_manager = device_manager or DeviceManager(Machine("cpu"), events)
        self.settings = settings
        self.events = events
        self.snapshot_path = snapshot
        self.generation = 0
        self.epoch = 0
        """Grows when the index is replaced by anything but maintenance; a build that began before is dropped."""
        self.latency = LatencyRing()
        self.query_sample = QuerySample(records, events, settings.seed, settings.sample_queries)
        self.last_search = 0.0
        """When a search last started or ended, by ``time.perf_counter``."""
        self.nlist_change: NlistChange | None = None
        self._gate = SearchGate()
        self.mutex, self._foreseeing = lock(), lock()
        self._changing = False
        """Whether the view is being replaced; read and set by the thread that holds the mutex."""
        self._masks = FilterCache(records)
        self._touched = Touched(0)
        self._expiring = Expiring(records.expiring)
        self._measured: tuple[object, object, int] = (None, None, 0)
        self._parents_index: Index | None = None
        self._view = self._open()
        renew_in_child(self)

    @property
    def view(self) -> View:
        """The newest published view; it may lag behind the records until ``catch_up``."""
        return self._view

    @property
    def columns(self) -> FieldColumns:
        """The fields that filters use, in memory."""
        return self._masks.columns

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use: index, vectors that are not mapped from a file, id maps, deaths and filter masks."""
        view = self._view
        index, vectors, index_bytes = self._measured
        if index is not view.index or vectors is not view.index.table.vectors:
            index, vectors = view.index, view.index.table.vectors
            index_bytes = index.nbytes
            self._measured = index, vectors, index_bytes
        if view.host_side is not None:
            index_bytes += _own_bytes(view.host_side.index)
        groups = 0 if view.groups is None else view.groups.nbytes
        own = view.index_died.nbytes + view.delta.nbytes + self._masks.nbytes + self._expiring.nbytes
        return index_bytes + groups + own

    def catch_up(self) -> View:
        """Apply what the log holds beyond the watermark and return a view that includes it.

        A view is published only after the last page of the log is applied, so that no update is seen half: earlier
        pages lack rows that a later entry replaced.

        A signal handler, finalizer or callback may call this while the same thread publishes a view; it gets an
        up-to-date view of its own, and the interrupted call continues undisturbed.
        """
        return self._caught_up()[0]

    @contextmanager
    def exclusive(self) -> Iterator[View]:
        """Hold the mutex and yield the up-to-date view, so that the caller may publish another in its place.

        Raises ReentrantCallError in a thread that already holds it.
        """
        with self._held():
            yield self._advance()

    @_again_if_damaged
    def search(
        self,
        queries: FloatArray | DeviceQueries,
        k: int,
        filters: object = None,
        recall: float | None = None,
        scope: Scope = EVERYTHING,
    ) -> Found:
        """The k nearest live units of each query; fewer columns where there are fewer live units, but at least one.

        queries: float32 (nq, dim), normalised under cosine, on the host or on a device. recall: overrides the target
        of the settings. scope: the namespaces to search, and the time at which expiry is judged.
        """
        started = self.last_search = time.perf_counter()
        filters, target = parse(filters), self.settings.target_recall if recall is None else recall
        if isinstance(queries, np.ndarray) and len(queries) == 1 and self._view.index.device == "cpu":
            kind = k, filters.key, target, scope.keys, scope.now is None

            def search(several: FloatArray, now: float | None) -> Found:
                return self._found(several, k, filters, target, Scope(scope.keys, now))

            found = self._gate.answer(kind, queries, scope.now, search)
        else:
            found = self._found(queries, k, filters, target, scope)
        self.last_search = time.perf_counter()
        self.latency.record(self.last_search - started)
        return found

    def _found(
        self, queries: FloatArray | DeviceQueries, k: int, filters: Filter, target: float, scope: Scope
    ) -> Found:
        view, view_filter = self._view_and_mask(filters, scope)
        k = min(k, max(1, view.count if view_filter is None else min(view.count, view_filter.count(view))))
        found = self._answered(view, queries, k, target, view_filter)
        if view.index.plan.engine != "cpu":
            self.device_manager.poll(view.index)
        return found

    def count(self, scope: Scope) -> int:
        """Live rows that a search of the scope may find."""
        view, view_filter = self._view_and_mask(parse(None), scope)
        return view.count if view_filter is None else view_filter.count(view)

    def matching(self, filters: Filter, scope: Scope = EVERYTHING) -> tuple[View, IntArray]:
        """A view, and the slots of its live units in the scope that match, int64 (n,), ascending."""
        view, view_filter = self._view_and_mask(filters, scope)
        return view, view.live_slots() if view_filter is None else view_filter.slots(view)

    def field(self, path: tuple[str, ...], slots: IntArray) -> tuple[IntArray, FieldValues]:
        """Slots, those given among them, and the values of the field in each."""
        return self.columns.whole(path, slots, self._log(self._view))

    @_again_if_damaged
    def ranked(
        self,
        query: FloatArray,
        k: int,
        filters: Filter,
        recall: float | None,
        similarity: Callable[[DoubleArray], DoubleArray],
        factors: Callable[..., DoubleArray],
        paths: tuple[tuple[str, ...] | None, tuple[str, ...] | None],
        scope: Scope = EVERYTHING,
    ) -> list[tuple[float, float, int]]:
        """The k best units as (score, distance, slot), best first; of equal ones the nearer, then the older.

        A score is the similarity, which falls with the distance, times a factor in 0..1 that follows from the Unix time
        and the number at the two paths. So once k are known, only rows whose factor is large enough are left to search.

        query: float32 (1, dim). recall: as for :meth:`search`.
        """
        view, mask = self._view_and_mask(filters, scope)
        slots = view.live_slots() if mask is None else mask.slots(view)
        columns, log = self.columns, self._log(view)
        given = [
            None if path is None else columns.by_slot(path, slots, log, moments=moments)
            for path, moments in zip(paths, (True, False), strict=True)
        ]
        weights = np.broadcast_to(factors(*given), slots.shape)
        target = self.settings.target_recall if recall is None else recall
        scores, distances = np.full(len(slots), -np.inf), np.full(len(slots), np.inf)
        open_rows, width = np.ones(len(slots), dtype=np.bool_), max(FIRST_RANKED, 4 * k)
        while (left := int(np.count_nonzero(open_rows))) > 0:
            found = self._answered(view, query, min(width, left), target, mask)
            at = np.searchsorted(slots, found.slots(0))
            distances[at] = found.distances[0][: len(at)]
            nearest = similarity(distances[at])
            scores[at] = nearest * weights[at]
            open_rows[at] = False
            if width >= left or not len(at):
                break
            least = np.partition(scores, -k)[-k] if k <= len(scores) else -np.inf
            open_rows &= weights * nearest[-1] >= least
            mask, width = _only(view, slots[open_rows]), 4 * width
        best = np.lexsort((slots, distances, -scores))[:k]
        best = best[np.isfinite(distances[best])]
        return list(zip(scores[best].tolist(), distances[best].tolist(), slots[best].tolist(), strict=True))

    def _log(self, view: View) -> Log:
        return Log(view.watermark, view.live_slots, self._touched.since)

    def prepare(self, fields: Mapping[tuple[str, ...], bool]) -> None:
        """Read fields into memory, so that the first filter on them finds them there; True: they hold moments."""
        parts = [
            Condition(path, "gt", (Instant(0),)) if moments else Condition(path, "exists", (True,))
            for path, moments in fields.items()
        ]
        if parts and not self.columns.holds(fields):
            self._view_and_mask(Filter(Every(tuple(parts)), "prepare"))

    def save_fields(self, timeout: float) -> None:
        """Keep the fields that filters used, for the next opening; a failure is an event."""
        held = self.columns.nbytes
        try:
            self.columns.save(timeout)
        except (StorageError, OSError) as error:
            self.events.record("fields-unsaved", str(error))
        if self.columns.nbytes < held:  # they are in the file now
            trim_heap()

    def needs_foresight(self, growth: float = FORESEEN_GROWTH) -> bool:
        """Whether fields should be read before filters name them; growth: of the store since they were."""
        return self._masks.foresight.is_due(self._view.count, growth)

    def foresee(self, recalled: Mapping[tuple[str, ...], bool], stop: Callable[[], bool] = lambda: False) -> None:
        """Read recalled fields and the usual ones of the units into memory, where filters are in use or may be soon.

        stop: whether to give up.
        """
        with self._foreseeing:  # who comes meanwhile finds them read
            if recalled or self.needs_foresight():
                pause = SearchYield(lambda: self.last_search)
                self._masks.foresight.read(lambda: self._log(self.catch_up()), recalled, pause, stop)
                trim_heap()

    def has_expired(self) -> bool:
        """Whether rows have expired that are not deleted yet."""
        self.catch_up()
        return self._expiring.gone(self.records.clock()) is not None

    def sweep_is_due(self) -> bool:
        """Whether enough rows have expired, or some long ago."""
        now = self.records.clock()
        gone = self._expiring.gone(now)
        return gone is not None and (len(gone) >= SWEEP_ROWS or self._expiring.gone(now - SWEEP_SECONDS) is not None)

    def describe(self, index: Index, stats: IndexStats) -> None:
        """Publish new statistics of an index, if it is still in use."""
        with self._held():
            if self._view.index is index:
                self._view = replace(self._view, stats=stats)

    def replace(self, view: View, generation: int) -> None:
        """Publish a view with another index; the caller is in :meth:`exclusive`."""
        self.device_manager.poll(self._view.index)
        if view.index.nlist != self._view.index.nlist:
            self.nlist_change = NlistChange(
                time.time(), self._view.index.nlist, view.index.nlist, _figures(self._view, self.latency.percentiles())
            )
            self.latency.forget()
        self._view = view
        self._measured = (None, None, 0)  # keep no reference to the old index and its device memory
        self.generation = generation

    def check_vectors(self, pause: Callable[[], None] | None = None) -> None:
        """Compare the vectors of a snapshot with their checksums, as far as no search did; where one does not hold,
        read everything from the records again."""
        view = self._view
        try:
            view.index.table.check(pause)
            view.by_host.index.table.check(pause)
        except DamagedVectorsError as error:
            self._distrust(error)

    def look_at_device(self) -> None:
        """Read the device's incidents and free memory; may take seconds."""
        view = self._view
        self.device_manager.poll(view.index)
        self.device_manager.look(view.count)

    def leave_device(self) -> View:
        """Continue with the host's vectors of the index in use, and free its device memory."""
        with self.exclusive() as view:
            self.replace(on_host(view), self.generation)
            return self._view

    def adopt(self, view: View, generation: int) -> None:
        """Continue with another process's index: its view, brought up to date from the log."""
        with self._held():
            self._restart(view, generation)
            self._advance()

    def caught_up(self, view: View) -> View | None:
        """An unpublished view, brought up to date; None when the store was cleared or the log starts after it."""
        builder = self._applied(view)
        return None if builder is None or builder.cleared else builder.publish()

    def reload(self, cause: str) -> View:
        """Read everything from the records again; searches use the old view meanwhile."""
        with self._held():
            started = time.perf_counter()
            self._restart(read_everything(self.records), 0)
            view = self._advance()
            self.events.record("reload", cause, seconds=time.perf_counter() - started, rows=view.count)
            return view

    def _distrust(self, error: DamagedVectorsError) -> None:
        """Remove a damaged snapshot, and read everything from the records again."""
        if not self.records.read_only:
            remove_snapshot(self.snapshot_path)
        self.reload(f"{error}; read everything from the records again")

    def _caught_up(self) -> tuple[View, bool]:
        """An up-to-date view, and whether it is the caller's own rather than the published one."""
        view = self._view
        if self.records.head().last_seq == view.watermark:
            return view, False
        with self.mutex:
            if self._changing:
                return self._apart(), True
            with self.exclusive() as view:
                return view, False

    @contextmanager
    def _held(self) -> Iterator[None]:
        with self.mutex:
            if self._changing:
                raise ReentrantCallError("the index is being changed by the call that this one interrupts; call later")
            try:
                self._changing = True
                yield
            finally:
                self._changing = False

    def _apart(self) -> View:
        """An up-to-date view in memory of its own, while another builder extends the published view."""
        left_behind = self._left_behind(self.records.head())
        builder = None if left_behind else self._applied(apart(self._view))
        while builder is None:
            builder = self._applied(read_everything(self.records))
        self._expiring.extend(builder.expiry)
        return builder.publish()

    def _open(self) -> View:
        loaded = load_snapshot(self.snapshot_path, self.records, self.events)
        if loaded is not None:
            view, info = loaded
            self._restart(view, info.generation)
            view = self._advance()
            if agrees(view, self.records, self.settings.seed):
                return view
            cause = "snapshot contradicts the records"
            self.events.record("snapshot-refused", f"{cause}; rebuilding from them", level=logging.WARNING)
            if not self.records.read_only:
                remove_snapshot(self.snapshot_path)
        self._restart(read_everything(self.records), 0)
        return self._advance()

    def _restart(self, view: View, generation: int) -> None:
        self._touched.restart(view.watermark)
        self._expiring.restart()
        self._masks.clear()
        self._view = view
        self.generation = generation
        self.epoch += 1

    def _advance(self) -> View:
        """Apply the log; the mutex is held."""
        if self._left_behind(self.records.head()):
            self._restart(read_everything(self.records), 0)
            self.events.record("reload", "the log was purged beyond the watermark; read everything again")
        builder = self._applied(self._view)
        if builder is None:
            return self._advance()
        if builder.watermark != self._view.watermark:
            self._publish(builder)
        return self._view

    def _applied(self, view: View) -> ViewBuilder | None:
        """``view`` with the log after its watermark applied; None when the log was purged beyond it."""
        builder = ViewBuilder(view)
        while True:
            changes = self.records.read_after(builder.watermark, PAGE)
            if changes and changes[0].seq != builder.watermark + 1:
                return None
            builder.apply(changes)
            if len(changes) < PAGE:
                return builder

    def _publish(self, builder: ViewBuilder) -> None:
        if builder.cleared:
            self._restart(builder.publish(), 0)
            return
        self._touched.extend(builder.touched)
        self._expiring.extend(builder.expiry)
        self._view = builder.publish()

    def _left_behind(self, head: Head) -> bool:
        return not head.horizon <= self._view.watermark <= head.last_seq

    def _answered(
        self, view: View, queries: FloatArray | DeviceQueries, k: int, target: float, view_filter: ViewFilter | None
    ) -> Found:
        """The results; from the host's vectors if the device fails in a way that its index did not handle."""
        used = view.faster_for(len(queries), on_device=isinstance(queries, DeviceQueries))
        try:
            return used.search(queries, k, used.stats.search_params(used.index, k, target), view_filter)
        except DeviceError as error:
            self.device_manager.refused(error, view.index.plan)
            with self.mutex:
                if self._view.index is view.index and not self._changing:
                    self.leave_device()
            used = on_host(view)
            return used.search(queries, k, used.stats.search_params(used.index, k, target), view_filter)

    def _view_and_mask(self, filters: Filter, scope: Scope = EVERYTHING) -> tuple[View, ViewFilter | None]:
        """A view, and the rows of it that match the filter and lie in the scope; None for all of them.

        A filter is evaluated at the watermark of the view.
        """
        restricts = bool(filters.root.parts)
        for _ in range(FILTER_ATTEMPTS):
            view, own = self._caught_up()
            keys = None if scope.keys is None or view.covered_by(scope.keys) else scope.keys
            gone = None if scope.now is None else self._expiring.gone(scope.now)
            if not restricts and keys is None and gone is None:
                return view, None
            masks, touched = self._masks, self._touched
            if own:  # the shared caches do not cover this view
                masks, touched = FilterCache(self.records), Touched(view.watermark)
            if not restricts:
                return view, masks.namespaces(view, keys, gone)
            view_filter, known = masks.mask(filters, view, touched, keys, gone)
            if known or self.records.head().last_seq == view.watermark:
                break
        return view, view_filter

    def after_fork(self) -> None:
        """In a forked child: no half-done work of a thread that does not exist here."""
        self.latency = LatencyRing()
        self._changing = False
        self._masks = FilterCache(self.records)
        self._touched = Touched(self._view.watermark)
        if self._view.index.plan.engine != "cpu":  # a child must not use its parent's device
            self._parents_index = self._view.index  # kept alive: freeing its memory would use the device
            self._view = on_host(self._view)
        if self._view.delta.spilled:  # the parent goes on writing there
            self._view = apart(self._view)


def _only(view: View, slots: IntArray) -> ViewFilter:
    """A filter that live slots alone pass."""
    positions = view.index.position_of(slots) if view.index.n else slots[:0]
    index = row_filter_of(view.index.n, positions[positions >= 0]) if view.index.n else None
    delta = row_filter_of(view.delta_n, view.delta_positions_of(slots)) if view.delta_n else None
    return ViewFilter(index, delta)
