"""Rebuild an index: plan, gather, build, calibrate, evaluate, swap, save.

``rebuild`` is the whole sequence. The functions below it are its steps, in the order in which it takes them.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..devices.memory import trim_heap
from ..errors import DeviceError, EngineError
from ..index.base import Index
from ..index.registry import build
from ..index.vector_table import (
    copy_rows,
    growable_like,
    grown,
    in_memory,
    lengthened,
    reserve_rows,
    without_spill,
)
from ..training.calibration import calibrate
from ..training.recall import Pause, measure, no_pause, self_hits
from ..training.training_set import Progress, TrainingSet, source_for
from ..types import FloatArray, IndexPlan, IntArray, Rows
from .delta_buffer import DeltaBuffer
from .index_stats import IndexStats, list_balance
from .live_index import LiveIndex, LiveSettings
from .namespaces import RowGroups, joined
from .query_sample import QuerySample
from .scheduler import MaintenanceScheduler, RebuildReason, Spent
from .snapshot_writer import Saver
from .view import HostSide, View
from .view_builder import UNKNOWN, cpu_copy, flat_index
from .worker import SearchYield

QUALITY_K = 10
"""The k of the recall@k that decides whether an index is good enough."""

MEASURE_GROWTH = 1.15
"""The recall of an extended index is measured again when it has this many times the rows of the last measurement."""

RETIMED = 2.0
"""Both sides of a growing index are timed again when it has this many times the rows of the last measurement."""

FEW = 32
"""Queries that check an extended index; where they find too little it is rebuilt."""

Collect = Callable[[FloatArray], TrainingSet]
"""Finds training vectors where the store's own, (n, dim), are too few."""


class PlanFor(Protocol):
    """The index that a view should have; ``early`` ignores MIN_TRAINING_UNITS, ``on_host`` plans for the CPU."""

    def __call__(self, view: View, early: bool = False, *, on_host: bool = False) -> IndexPlan: ...


class Candidate(NamedTuple):
    """An index to try. extends: the one in use with the waiting rows appended; else one built from all live rows."""

    plan: IndexPlan
    extends: bool = False


@dataclass(frozen=True, slots=True)
class RebuildInput:
    """Live rows of ``view`` in slot order, and their positions there: first those in the index, then in the delta
    buffer."""

    view: View
    rows: Rows
    from_index: IntArray | slice
    from_delta: IntArray


@dataclass(frozen=True, slots=True)
class Built:
    """An index that may replace the one in use.

    made_of: its rows. trained: whether new quantisers were trained. refused: why an exact index takes the place of the
    planned kind, else empty. host_side: the index on the CPU beside one on a device.
    """

    index: Index
    stats: IndexStats
    made_of: RebuildInput
    trained: bool = False
    refused: str = ""
    host_side: HostSide | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a :class:`Built` after the swap; it keeps nothing of the view before."""

    index: Index
    trained: bool
    refused: str


def silent(_stage: str, _share: float) -> None:
    """Report no progress."""


def rebuild(
    reason: RebuildReason,
    live: LiveIndex,
    saver: Saver,
    scheduler: MaintenanceScheduler,
    plan_for: PlanFor,
    collect: Collect,
    progress: Progress = silent,
    *,
    forced: bool = False,
) -> str:
    """Build a better index beside the one in use and swap it in; return what was done, in words.

    Callers hold no view: a device may have memory for the new index only once the old one is gone. ``forced``: go on
    with the CPU although the rules are content with the index in use. Raises StorageFullError where the disk has no
    room for the vectors, and the limit of memory none either.
    """
    started, pause = time.perf_counter(), SearchYield(lambda: live.last_search)
    scheduler.notify("rebuilding", live.catch_up())
    epoch, devices, settings, queries = live.epoch, live.device_manager, live.settings, live.query_sample
    built: Built | None = None
    most = max(settings.budget_bytes, live.nbytes)
    # Plan.
    for candidate in _candidates(reason, live.catch_up, scheduler, plan_for, forced):
        plan, built = candidate.plan, None
        # Gather, build, calibrate, evaluate.
        try:
            if candidate.extends:
                built = _extended(_gather_delta(live.catch_up(), most), settings, queries, pause)
            else:
                _make_room(plan, live)
                built = _built(
                    plan, _gather(live.catch_up(), most), reason, settings, queries, collect, progress, pause
                )
        except DeviceError as error:
            devices.refused(error, plan)
        if built is not None:
            break
    else:
        return f"kept {live.view.index.kind}: the device refused"
    if built.index.plan.engine != "cpu":
        devices.built(built.index)
        if devices.routes:  # Time both sides.
            built = _routed(built, candidate.extends, plan_for(live.catch_up(), on_host=True), live, collect, pause)
    # Swap.
    groups = _groups(built.made_of)
    with live.exclusive() as now:
        if live.epoch != epoch:
            return "dropped a build that was overtaken by a reload"
        live.replace(_swapped(built, now, groups), live.generation)
        saved = saver.note_swap(live.view)
    done = Outcome(built.index, built.trained, built.refused)
    del built, now, groups  # the memory and the files of the view before
    if candidate.extends or reason.kind == "train":
        seconds = time.perf_counter() - started
        scheduler.notify(Spent("append" if candidate.extends else "train", seconds), live.view)
    # Save.
    if not (candidate.extends or saved) or saver.is_due(live.view):
        saver.save()
    _record(done, reason, live, time.perf_counter() - started)
    return f"{'extended' if candidate.extends else 'built'} {done.index.kind} of {done.index.n} rows"


def _candidates(
    reason: RebuildReason,
    catch_up: Callable[[], View],
    scheduler: MaintenanceScheduler,
    plan_for: PlanFor,
    forced: bool,
) -> Iterator[Candidate]:
    """What to try, best first: extend the index in use, the planned index on the GPU, the planned index on the CPU.

    The CPU's plan is made only after the device has refused, since the refusal changes the plan. No view is kept.
    """
    if reason.kind == "append":
        yield Candidate(catch_up().index.plan, extends=True)
    plan = plan_for(catch_up(), reason.by_request)
    yield Candidate(plan)
    if plan.engine == "cpu" or (reason.kind == "train" and not forced and scheduler.reason(catch_up()) is None):
        return
    yield Candidate(plan_for(catch_up(), reason.by_request))


def _make_room(plan: IndexPlan, live: LiveIndex) -> None:
    """Check that the plan's device has memory for it, once the index in use has left it if need be.

    Raises DeviceError.
    """
    if plan.engine != "cpu" and not live.device_manager.admit(plan, live.catch_up().index):
        live.leave_device()


def _gather(view: View, most: float) -> RebuildInput:
    """The live rows of a view, in slot order: slots in the index are older than those in the delta buffer.

    Where no row of the index has died they share its memory, unless it is a graph; else they are a copy.
    """
    index, from_delta = view.index, view.delta_rows_of(None)
    if not view.index_dead and _shares_memory(index):
        vectors = lengthened(index.vectors, len(from_delta), reserved=0, most=most)
        slots, vectors = _take_delta(view, from_delta, vectors, index.n, most)
        table = index.slot_table_with(Rows(slots, *_delta_ids(view, from_delta), vectors[index.n :]))
        return RebuildInput(view, replace(table, vectors=vectors), slice(0, index.n), from_delta)
    from_index = np.flatnonzero(view.index_died > view.watermark)
    index.table.check()
    vectors = growable_like(index.vectors, len(from_index) + len(from_delta), reserved=len(from_index), most=most)
    copy_rows(index.vectors, vectors, from_index)
    delta_slots, vectors = _take_delta(view, from_delta, vectors, len(from_index), most)
    slots = np.concatenate([index.slots[from_index], delta_slots])
    return RebuildInput(view, Rows(slots, *_joined_ids(view, from_index, from_delta), vectors), from_index, from_delta)


def _gather_delta(view: View, most: float) -> RebuildInput:
    """The live rows of a view's delta buffer, to append to all rows of its index, dead ones included."""
    index, from_delta = view.index, view.delta_rows_of(None)
    if _shares_memory(index):
        vectors = lengthened(index.vectors, len(from_delta), reserved=0, most=most)
        slots, vectors = _take_delta(view, from_delta, vectors, index.n, most)
        vectors = vectors[index.n :]
    else:
        slots, vectors = _take_delta(view, from_delta, np.empty((len(from_delta), index.dim), np.float32), 0, most)
    return RebuildInput(view, Rows(slots, *_delta_ids(view, from_delta), vectors), slice(0, index.n), from_delta)


def _take_delta(
    view: View, positions: IntArray, vectors: FloatArray, start: int, most: float
) -> tuple[IntArray, FloatArray]:
    """Copy the rows at ascending ``positions`` of the delta buffer behind the first ``start`` rows of ``vectors``.

    The delta buffer reads them from there as well from then on, where it can, so that the disk does not hold all of
    them twice.

    Returns:
        Their slots, and the vectors: in memory instead, where the disk has no room for them.
    """
    slots = np.empty(len(positions), dtype=np.int64)
    for piece in view.delta.pieces(0, view.delta_n):
        low, high = np.searchsorted(positions, [piece.start, piece.end]).tolist()
        if not reserve_rows(vectors, start + low, start + high):
            vectors = without_spill(vectors, start + low, view.index.vectors[:start], most)
        rows, out = positions[low:high] - piece.start, vectors[start + low : start + high]
        np.take(piece.vectors, rows, axis=0, out=out, mode="clip")
        slots[low:high] = piece.slots[rows]
        view.delta.share(piece.start, out, in_file=not in_memory(vectors))
    return slots, vectors


def _shares_memory(index: Index) -> bool:
    """Whether rows can be appended in the index's own memory; faiss holds the vectors of a graph."""
    return index.kind != "hnsw"


def _joined_ids(view: View, from_index: IntArray, from_delta: IntArray) -> tuple[npt.NDArray[np.uint8], IntArray]:
    index_bytes, index_ends = _ids_of(view.index.id_bytes, view.index.id_ends, from_index)
    delta_bytes, delta_ends = _delta_ids(view, from_delta)
    return np.concatenate([index_bytes, delta_bytes]), np.concatenate([index_ends, delta_ends + len(index_bytes)])


def _delta_ids(view: View, positions: IntArray) -> tuple[npt.NDArray[np.uint8], IntArray]:
    return _ids_of(*view.delta.ids(0, view.delta_n), positions)


def _ids_of(
    id_bytes: npt.NDArray[np.uint8], id_ends: IntArray, keep: IntArray
) -> tuple[npt.NDArray[np.uint8], IntArray]:
    if len(keep) == len(id_ends):
        return id_bytes, id_ends
    starts = np.concatenate([np.zeros(1, dtype=np.int64), id_ends[:-1]]) if len(id_ends) else id_ends
    lengths = (id_ends - starts)[keep]
    ends = np.cumsum(lengths, dtype=np.int64)
    shift = np.repeat(starts[keep] - (ends - lengths), lengths)
    return id_bytes[np.arange(len(shift), dtype=np.int64) + shift], ends


def _built(
    plan: IndexPlan,
    made_of: RebuildInput,
    reason: RebuildReason,
    settings: LiveSettings,
    queries: QuerySample,
    collect: Collect,
    progress: Progress,
    pause: Pause,
) -> Built:
    """The planned index if it is good enough, else an exact one that says why.

    Unless new training is asked for, the quantisers of the index in use are tried first. Raises DeviceError when the
    plan's device refuses, or holds no index that is good enough.
    """
    rows, old = made_of.rows, made_of.view
    if plan.kind == "exact" and plan.engine == "cpu":
        return Built(build(plan, rows, old.metric, seed=settings.seed), IndexStats(), made_of)
    reuses = (
        reason.kind != "train"
        and plan.kind != "exact"
        and _quantiser(plan, plan.nlist) == _quantiser(old.index.plan, old.index.nlist)
    )
    refused = ""
    for reuse_from in [old.index, None] if reuses else [None]:
        try:
            training = None if reuse_from is not None else _training(plan, rows.vectors, collect)
            index = build(
                plan, rows, old.metric, seed=settings.seed, training=training, reuse_from=reuse_from, progress=progress
            )
            trim_heap()
        except DeviceError:
            raise
        except EngineError as error:
            refused = f"cannot build {plan.kind}: {error}"
            continue
        for known in _known(old.stats, index, reuse_from):
            stats = evaluated(index, calibrated(index, known, queries, settings.seed, pause), settings, pause)
            if stats.meets(settings.target_recall):
                return Built(index, replace(stats, by_request=reason.by_request), made_of, trained=reuse_from is None)
        refused = f"{plan.kind} fell short: {stats.quality}"
    if plan.engine != "cpu":
        raise DeviceError(refused)
    return Built(flat_index(rows, old.metric), IndexStats(refused_rows=len(rows.slots)), made_of, refused=refused)


def _routed(built: Built, extends: bool, plan: IndexPlan, live: LiveIndex, collect: Collect, pause: Pause) -> Built:
    """``built`` with an index on the CPU beside it and the seconds of both sides; the CPU's alone where the device was
    slower for every batch that was timed."""
    devices, settings, made_of = live.device_manager, live.settings, built.made_of
    side, now = made_of.view.host_side, made_of.view.by_host
    host, used = None, now.index
    if extends and side is not None:
        longer = side.index.extended(made_of.rows)
        host = None if longer is None else Built(longer, side.stats, made_of)
    elif extends:
        pass
    elif (
        used.plan.engine == "cpu"
        and np.array_equal(used.slots, built.index.slots)
        and _quantiser(used.plan, used.nlist) == _quantiser(plan, plan.nlist)
    ):
        host = Built(used, now.stats, made_of)  # the index in use stays as the host's side
    else:
        reuse = RebuildReason("compact", "the rows of the device's index")
        beside = replace(made_of, view=now)
        host = _built(plan, beside, reuse, settings, live.query_sample, collect, silent, pause)
    if host is None:
        host = Built(cpu_copy(built.index), UNKNOWN, made_of)
    known = side.timings if extends and side is not None and built.index.n <= RETIMED * side.timings.rows else None
    ways = [(one.index, one.stats.search_params(one.index, QUALITY_K, settings.target_recall)) for one in (built, host)]
    timings = known or devices.timed(*ways, seed=settings.seed)
    if timings.crossover is None:
        devices.slower(built.index, timings)
        return replace(host, made_of=made_of)
    return replace(built, host_side=HostSide(host.index, host.stats, timings))


def _extended(made_of: RebuildInput, settings: LiveSettings, queries: QuerySample, pause: Pause) -> Built | None:
    """The index in use with the gathered rows appended; None where it cannot take them, or is not good enough then.

    Its calibration is kept; its new rows must find themselves.
    """
    old = made_of.view
    try:
        index = old.index.extended(made_of.rows)
    except EngineError:
        return None
    if index is None:
        return None
    exact = index.kind == "exact"
    if index is old.index or (exact and index.plan.engine == "cpu"):
        return Built(index, old.stats, made_of)
    for known in [old.stats] if exact else _known(old.stats, index, old.index):
        if exact or known.calibration is not None:  # on a device exact search is checked too: its numbers are narrower
            stats = replace(known, quality=old.stats.quality)
        else:
            stats = evaluated(index, calibrated(index, known, queries, settings.seed, pause), settings, pause)
        stats = _checked(index, stats, old.index.n, settings)
        if stats.meets(settings.target_recall):
            return Built(index, stats, made_of)
    return None


def _quantiser(plan: IndexPlan, nlist: int) -> tuple[object, ...]:
    """What two indexes must have in common for one to reuse the other's quantisers."""
    return plan.kind, plan.engine, plan.device, nlist, plan.codes


def _training(plan: IndexPlan, vectors: FloatArray, collect: Collect) -> FloatArray | None:
    """What to train on: None for the rows themselves, else service samples, where the rows are too few.

    Raises EngineError when too few samples are available.
    """
    if plan.kind in ("exact", "hnsw") or source_for(len(vectors)) == "existing":
        return None
    found = collect(vectors)
    if not found.usable:
        raise EngineError(found.reason)
    return found.vectors


def _known(stats: IndexStats, index: Index, reuse_from: Index | None) -> list[IndexStats]:
    """The statistics to start from: with the calibration that belongs to reused quantisers, then without."""
    balance = list_balance(index.list_sizes)
    if index.kind == "exact":
        return [IndexStats()]
    if reuse_from is None:
        return [IndexStats(index.n, balance, balance)]
    trained = IndexStats(stats.trained_rows, stats.trained_balance, balance)
    carried = stats.carried_to(index)
    return [trained] if carried is None else [replace(carried, balance=balance), trained]


def calibrated(index: Index, known: IndexStats, queries: QuerySample, seed: int, pause: Pause = no_pause) -> IndexStats:
    """``known`` with a calibration of the index, measured unless it is known; exact search needs none."""
    if known.calibration is not None or index.kind == "exact":
        return known
    fresh = calibrate(index, queries.sample(), seed=seed, pause=pause)
    return replace(known, calibration=fresh, asked=queries.seen)


def evaluated(index: Index, known: IndexStats, settings: LiveSettings, pause: Pause = no_pause) -> IndexStats:
    """``known`` with the quality of the index at the search parameters that searches will use."""
    params = known.search_params(index, QUALITY_K, settings.target_recall)
    quality = measure(index, params, k=QUALITY_K, seed=settings.seed, pause=pause)
    return replace(known, quality=quality, measured_rows=index.n)


def _checked(index: Index, known: IndexStats, start: int, settings: LiveSettings) -> IndexStats:
    """The quality of an extended index: whether rows from ``start`` on find themselves, and recall if it grew much."""
    params = known.search_params(index, QUALITY_K, settings.target_recall)
    hits = self_hits(index, params, start=start, queries=FEW, seed=settings.seed)
    quality = known.quality
    if quality is None or index.n > MEASURE_GROWTH * known.measured_rows:
        quality = measure(index, params, k=QUALITY_K, queries=FEW, seed=settings.seed)
        known = replace(known, measured_rows=index.n)
    return replace(known, quality=replace(quality, self_hit=hits))


def _groups(made_of: RebuildInput) -> RowGroups | None:
    """The gathered rows by namespace."""
    old = made_of.view
    of_delta = np.array(old.delta.namespaces[: old.delta_n], np.int32)[made_of.from_delta]
    return joined(old.groups, old.index.n, of_delta, made_of.from_index)


def _swapped(built: Built, now: View, groups: RowGroups | None) -> View:
    """The view ``now`` with the built index in place of the rows that were gathered; the caller holds the mutex.

    Rows that died meanwhile are dead in the new index too; rows that came meanwhile stay in the delta buffer.
    """
    made_of, old = built.made_of, built.made_of.view
    kept = old.index_died[made_of.from_index]
    died = grown(kept, _delta_deaths(old.delta, made_of.from_delta))  # the same deaths, where the rows are the same
    delta = now.delta.rest(old.delta_n, now.delta_n)
    deaths = array("q", np.flatnonzero(died <= now.watermark).tolist())
    delta_dead = sum(int((piece.died <= now.watermark).sum()) for piece in delta.pieces(0, delta.n))
    return View(
        watermark=now.watermark,
        index=built.index,
        index_seq=old.watermark,
        index_died=died,
        index_deaths=deaths,
        index_dead=len(deaths),
        delta=delta,
        delta_n=delta.n,
        delta_dead=delta_dead,
        metric=now.metric,
        stats=built.stats,
        groups=groups,
        host_side=built.host_side,
    )


def _delta_deaths(delta: DeltaBuffer, positions: IntArray) -> IntArray:
    deaths = [piece.died for piece in delta.pieces(0, int(positions[-1]) + 1)] if len(positions) else []
    everything = np.concatenate([np.empty(0, dtype=np.int64), *deaths])
    return everything[positions]


def _record(done: Outcome, reason: RebuildReason, live: LiveIndex, seconds: float) -> None:
    index = done.index
    if done.refused:
        live.events.record("refused", f"{done.refused}; staying exact", level=logging.WARNING, rows=index.n)
    text = f"{index.kind} of {index.n} rows ({reason.kind}): {reason.text}"
    live.events.record("built", text, seconds=seconds, nlist=index.nlist, trained=done.trained)
