"""Maintenance: build the planned index beside the old one, verify it, swap it in, probe recall, clean up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CapacityError, DeviceError, ReadOnlyError, ReentrantCallError
from ..planner.plan import plan_index
from ..records.file_lock import one_process
from ..records.sqlite_errors import translate_error
from ..training.recall import Pause, Quality, no_pause, recall_of
from ..types import FloatArray, IndexPlan, SearchParams
from ..utils.forking import renew_in_child
from ..utils.vectors import normalize_rows
from .live_index import LiveIndex
from .rebuild import (
    JUDGED_AT,
    Built,
    Collect,
    RebuildInput,
    build_verified,
    extend_verified,
    gather,
    gather_delta,
    judged,
    swapped,
)
from .rebuild_rules import AppendThrottle, RebuildReason, cause_to_build, is_extendable
from .snapshot_writer import Saver, joins_log
from .snapshots import agrees, load_snapshot
from .view import View
from .worker import SearchYield

__all__ = ["Maintenance", "Report", "quality_now"]

PROBED = 48
"""Real queries that one probe asks."""

STEP = 24
"""Exact searches between two pauses."""

ROWS_READ = 4_000_000
"""Rows that exact search may read for a figure in health: 0.2 s at 384 dimensions, one thread."""

FEWEST = 8
"""Queries that a recall is measured on at the least."""

PROBE_SLACK = 0.03
"""48 queries of ten results say no more: one standard error at recall 0.95 is about 0.01."""


def calibration_is_old(live: LiveIndex, view: View) -> bool:
    """Was the index calibrated before most of what is asked now was asked?"""
    return view.stats.calibration is not None and live.asked.has_news_since(view.stats.asked)


def recalibrate(live: LiveIndex, view: View, pause: Pause = no_pause) -> RebuildReason | None:
    """Measure the index in use on the queries of today; a cause to train when it falls short."""
    started = time.perf_counter()
    stats, quality = judged(view.index, replace(view.stats, calibration=None), live.asked, live.settings, pause)
    live.describe(view.index, stats)
    queries = stats.calibration.queries if stats.calibration is not None else 0
    live.events.record("calibrated", f"on {queries} real queries", seconds=time.perf_counter() - started)
    if quality.meets(live.settings.target_recall):
        return None
    return RebuildReason("train", f"real queries find too little: {quality}")


def probe(live: LiveIndex, view: View, pause: Pause = no_pause) -> RebuildReason | None:
    """Recall@10 of real queries on the view as it is, tail and tombstones included; a cause to train when it fell."""
    queries = live.asked.sample()[:PROBED]
    if view.stats.calibration is None or not len(queries):
        return None
    probed, target = _recall(live, view, queries, pause), live.settings.target_recall
    live.describe(view.index, replace(live.view.stats, probed=probed))
    if len(queries) < PROBED or probed >= target - PROBE_SLACK:
        return None
    return RebuildReason("train", f"recall@10 of real queries fell to {probed:.3f}")


def quality_now(live: LiveIndex, view: View) -> Quality | None:
    """How searches do on the view as it is, tail and tombstones included; None where nothing stands for exact search.

    The self-hits of living rows, and recall@10 of the real queries kept: asked again beside exact search where that
    reads few enough rows, else as last probed, else as measured when the index was built. Remembered until something
    changes.
    """
    held = view.stats.quality
    if held is None:
        return None
    key = (view.watermark, id(view.index), live.asked.seen, view.stats.probed)
    known = live.quality_now
    if known is None or known[0] != key:
        try:
            known = key, _measured_now(live, view, held)
        except DeviceError:  # the next search goes on from the host
            return held
        live.quality_now = known
    return known[1]


def _measured_now(live: LiveIndex, view: View, held: Quality) -> Quality:
    queries = live.asked.sample()[: min(PROBED, ROWS_READ // max(1, view.count))]
    if len(queries) >= FEWEST:
        recall = _recall(live, view, queries, no_pause)
    else:
        recall = held.recall if view.stats.probed is None else view.stats.probed
    return Quality(_self_hits(live, view), recall, len(queries))


def _recall(live: LiveIndex, view: View, queries: FloatArray, pause: Pause) -> float:
    """Recall@10 at the effort of searches."""
    target = live.settings.target_recall
    found = view.search(queries, JUDGED_AT, view.stats.effort(view.index, JUDGED_AT, target)).distances
    truth = np.empty_like(found)
    for start in range(0, len(queries), STEP):
        part = slice(start, start + STEP)
        truth[part] = view.search(queries[part], JUDGED_AT, SearchParams(exact=True)).distances
        pause()
    return recall_of(found, truth)


def _self_hits(live: LiveIndex, view: View) -> float:
    """The share of living rows, spread over their age, that find themselves or a row with the same vector."""
    rows = live.records.spread(PROBED)
    if not rows or view.metric == "ip":  # there the nearest need not be the row itself
        return 1.0
    vectors = np.stack([np.frombuffer(row.vector, dtype="<f4") for row in rows])
    queries = normalize_rows(vectors) if view.metric == "cosine" else vectors
    found = view.search(queries, 1, view.stats.effort(view.index, 1, live.settings.target_recall))
    nearest = ["".join(found.ids(place)) for place in range(len(rows))]
    held = live.records.vectors_of(nearest)
    hits = [row.id == one or held.get(one) == row.vector for row, one in zip(rows, nearest, strict=True)]
    return sum(hits) / len(hits)


def planned(live: LiveIndex, view: View, early: bool = False) -> IndexPlan:
    """What the store should have; what it has where nothing else fits into memory. ``early``: however few units."""
    settings, state = live.settings, live.device_manager.state(view.count, view.index)
    try:
        plan = plan_index(
            count=view.count,
            dim=view.index.dim,
            metric=view.metric,
            index_type=settings.index_type,
            target_recall=settings.target_recall,
            budget_bytes=settings.budget_bytes,
            min_training_units=0 if early else settings.min_training_units,
            adaptive_nlist=settings.adaptive_nlist,
            vectors_per_centroid=settings.vectors_per_centroid,
            nlist_min=settings.nlist_min,
            nlist_max=settings.nlist_max,
            precision=settings.precision,
            current_nlist=view.index.nlist or None,
            device=state,
        )
    except CapacityError as error:
        return replace(view.index.plan, reason=f"kept as it is: {error}", refusal="")
    live.device_manager.note(plan, state)
    missing = live.device_manager.absence() if state is None else ""
    if not missing:
        return plan
    note = f"{missing}; the CPU instead"
    return replace(plan, reason=f"{plan.reason}; {note}", notes=(*plan.notes, note))


LOOK_EVERY, LOOK_AT_LEAST_EVERY = 16, 512
"""Log entries after which it is asked whether there is anything to do; a hundredth of the units in between."""

PROBE_SHARE = 0.01
"""Of the time that the background may spend on asking real queries again beside exact search."""

RETRY_SECONDS = 5.0
"""How long to leave a round that another process is doing, before the next try."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a round of maintenance did; ``actions`` in order, ``quality`` of the index in use."""

    actions: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0
    quality: Quality | None = None

    @property
    def skipped(self) -> bool:
        """Was another round on, here or in another process?"""
        return any(action.startswith("skipped") for action in self.actions)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Maintenance:
    """Upkeep of one live index; one round at a time in this process and, through a lock file, in all of them."""

    def __init__(self, live: LiveIndex, lock_path: Path, collect: Collect) -> None:
        """``collect`` finds training data where the store's own vectors are too few."""
        self._collect = collect
        self._live = live
        self._lock_path = lock_path
        self._one_round = threading.RLock()
        self._round_by: int | None = None
        """The thread whose round is on."""
        self.running = False
        self.rounds = 0
        self.cpu_seconds = 0.0
        """Processor time of the threads that ran the rounds; training and filling use no other."""
        self._look_at = 0
        self._asked: RebuildReason | None = None
        self._wanted = False
        self._sparing = False
        self._probe_at = 0.0
        self._saver = Saver(live)
        self._pace = AppendThrottle()
        renew_in_child(self)

    def plan(self, view: View, early: bool = False) -> IndexPlan:
        """What the store should have; what it has where nothing else fits into memory. ``early``: however few units."""
        return planned(self._live, view, early)

    def cause(self, view: View, *, quiet: bool = False) -> RebuildReason | None:
        """Why a new index is due; None when the present one serves. ``quiet``: nobody writes, so less need wait."""
        if self._asked is not None and view.stats.trained_rows:
            return self._asked
        return cause_to_build(view, self.plan(view), self._live.settings.min_training_units, quiet=quiet)

    def ask(self, cause: RebuildReason) -> None:
        """Have the next round build for ``cause``, whatever the rules would say."""
        self._asked = cause

    def due(self) -> bool:
        """Is there anything to do? Cheap enough to ask after every write: it looks once in a while.

        Rows that wait are the matter of ``run_if_due``, which knows when they may be appended.
        """
        view, asked, device_manager = self._live.view, self._live.look_due, self._live.device_manager
        if view.watermark < self._look_at and not asked and not device_manager.due:
            return False
        self._live.look_due = False
        self._look_at = view.watermark + max(LOOK_EVERY, min(view.count // 100, LOOK_AT_LEAST_EVERY))
        cause, calibrated = self.cause(view), view.stats.calibration is not None
        building = cause is not None and cause.kind != "append"
        self._wanted |= building or device_manager.take_due() or self._saver.log_is_long() or (asked and calibrated)
        return self._wanted or self._pace.delay(view) is not None

    def run_if_due(self) -> float | None:
        """What the background does when woken: a round, if it is time for one.

        Returns:
            Seconds after which to tend again; None where there is nothing to wait for.
        """
        view = self._live.catch_up()
        cause, delay = self.cause(view), self._pace.delay(view)
        del view  # see _build
        wanted = self._wanted or (cause is not None and cause.kind != "append")
        if not wanted and (delay is None or delay > 0.0):
            return delay
        self._wanted, self._sparing = False, True
        try:
            report = self.run(wait=False, quiet=self._pace.is_quiet())
        finally:
            self._sparing = False
        if report.skipped:
            self._wanted = wanted
            return RETRY_SECONDS
        return self._pace.delay(self._live.view)

    def run(
        self,
        progress: Progress | None = None,
        *,
        wait: bool = True,
        force: RebuildReason | None = None,
        quiet: bool = False,
    ) -> Report:
        """One round: adopt or build, snapshot, purge.

        ``wait=False`` returns at once when another round is on; ``quiet``: nobody writes, so less need wait.
        """
        started = time.perf_counter()
        if self._in_round() or not self._one_round.acquire(blocking=wait):
            return Report(["skipped: another round is running"])
        try:
            self._round_by = threading.get_ident()
            with one_process(self._lock_path, wait, self._live.records.file_mode) as held:
                if not held:
                    return Report(["skipped: another process is maintaining this store"])
                actions, reason = self._timed_round(progress or _silent, force, quiet)
        finally:
            self._round_by = None
            self._one_round.release()
        return Report(actions, reason, round(time.perf_counter() - started, 6), self._live.view.stats.quality)

    def snapshot(self) -> Path:
        """Save the index from which the next opening goes on; what came after it is replayed from the log.

        Raises StorageError (StorageFullError, ReadOnlyError) when the file cannot be written; nothing else suffers.
        """
        if self._live.records.read_only:
            raise ReadOnlyError(
                f"{self._live.snapshot_path}: the store is read-only; make it writable to save its index"
            )
        if self._in_round():
            raise ReentrantCallError("snapshot() inside a round of maintenance in one thread would wait for itself")
        with self._one_round, one_process(self._lock_path, True, self._live.records.file_mode):
            self._saver.forget_failure()
            view = self._live.catch_up()
            cause = self.cause(view)
            if cause is None and not (view.index.n and joins_log(view, self._live.records.head().horizon)):
                cause = RebuildReason("append", "snapshot asked for")
            del view  # see _build
            if cause:
                self._build(cause, _silent)
            if self._saver.failed is None and (cause is None or self._saver.unsaved):
                self._save()
            failed = self._saver.failed
            if failed is not None:
                raise translate_error(failed.__cause__ or failed, self._live.snapshot_path)
            return self._live.snapshot_path

    def close(self) -> None:
        """Save what was only extended in memory, unless another process is maintaining; a failure is an event."""
        if not self._saver.unsaved or self._live.records.read_only or self._in_round():
            return
        if self._one_round.acquire(blocking=False):
            try:
                with one_process(self._lock_path, False, self._live.records.file_mode) as held:
                    if held:
                        self._save()
            finally:
                self._one_round.release()

    def after_fork(self) -> None:
        """In a forked child nobody is in the middle of a round."""
        self._one_round, self._round_by = threading.RLock(), None

    def _in_round(self) -> bool:
        """Is this call made inside a round, by a signal handler, a finalizer or a callback of the same thread?"""
        return self._round_by == threading.get_ident()

    def _timed_round(self, progress: Progress, force: RebuildReason | None, quiet: bool) -> tuple[list[str], str]:
        busy = time.thread_time()
        self.running = True
        try:
            return self._round(progress, force, quiet)
        finally:
            self.running = False
            self.rounds += 1
            self.cpu_seconds += time.thread_time() - busy

    def _round(self, progress: Progress, force: RebuildReason | None, quiet: bool) -> tuple[list[str], str]:
        self._saver.forget_failure()
        actions = self._healed()
        self._live.look_at_device()
        cause = force or self._found_cause(actions, quiet)
        if cause and cause.kind == "train" and is_extendable(self._live.view):
            actions.append(self._build(RebuildReason("append", "rows wait, and training takes longer"), _silent))
        if cause:
            actions.append(self._build(cause, progress, forced=force is not None))
        actions += self._attend()
        actions += self._shortened()
        actions += self._moved()
        return actions, cause.text if cause else ""

    def _found_cause(self, actions: list[str], quiet: bool) -> RebuildReason | None:
        """Why a new index is due, after a newer one of another process was adopted where that would do."""
        view = self._live.catch_up()
        cause = self.cause(view, quiet=quiet)
        if cause and cause.kind != "append" and self.plan(view).engine == "cpu" and self._adopt():
            actions.append("adopted a newer snapshot")
            cause = self.cause(self._live.catch_up(), quiet=quiet)
        return cause

    def _shortened(self) -> list[str]:
        """Purge a log that has become long; where the snapshot needs too much of it, save first."""
        if self._live.records.read_only or not self._saver.log_is_long():
            return []
        if self._saver.failed is None and self._saver.log_is_held():
            if self._live.catch_up().delta_n:
                self._build(RebuildReason("append", "the log is long"), _silent)
            if self._saver.log_is_held():
                self._save()
        return [f"purged {self._saver.purge()} log entries"]

    def _moved(self) -> list[str]:
        """Save, where many vectors are in memory that could be mapped from the snapshot."""
        live = self._live
        if live.records.read_only or self._saver.failed is not None or not self._saver.holds_vectors(live.view):
            return []
        self._saver.made()
        self._save()
        return [] if self._saver.unsaved else ["saved the vectors, to map them"]

    def _healed(self) -> list[str]:
        """Hold the index against the records; what contradicts them is thrown away and read anew."""
        live = self._live
        if agrees(live.catch_up(), live.records, live.settings.seed):
            return []
        view = live.reload("the index contradicts the records")
        healed = agrees(view, live.records, live.settings.seed)
        live.events.record(
            "healed" if healed else "heal-failed",
            "read everything from the records again" if healed else "the records contradict themselves: run check",
            level=logging.WARNING if healed else logging.ERROR,
        )
        return ["healed the index" if healed else "could not heal the index: run check"]

    def _build(self, cause: RebuildReason, progress: Progress, *, forced: bool = False) -> str:
        """Put a new index in use. Callers hold no view: a device may have room for it only once the old one is gone."""
        live, started = self._live, time.perf_counter()
        live.catch_up()
        epoch, self._asked = live.epoch, None
        made = self._extended() if cause.kind == "append" else None
        extended = made is not None
        if made is None:
            made = self._anew(cause, progress, forced=forced)
        if made is None:
            return f"kept {live.view.index.kind}: the device refused"
        built, rebuild_input = made
        with live.exclusive() as now:
            if live.epoch != epoch:
                return "dropped a build that was overtaken by a reload"
            live.replace(swapped(rebuild_input, built.index, built.stats, now), live.generation)
            saved = self._saver.is_saved(live.view)
            if not saved:
                self._saver.made()
        if extended:
            self._pace.appended(time.perf_counter() - started)
        if not (extended or saved) or self._saver.is_due(live.view):
            self._save()
        self._report_once(built, cause, time.perf_counter() - started)
        return f"{'extended' if extended else 'built'} {built.index.kind} of {built.index.n} rows"

    def _anew(self, cause: RebuildReason, progress: Progress, *, forced: bool) -> tuple[Built, RebuildInput] | None:
        """An index built of all living rows; None where the device refused and nothing else is due."""
        made = self._on_device(cause, progress)
        if made is not None:
            return made
        view = self._live.catch_up()
        if cause.kind == "train" and not forced and self.cause(view) is None:
            return None
        return self._verified(self.plan(view, cause.by_request), view, cause, progress)

    def _extended(self) -> tuple[Built, RebuildInput] | None:
        """The index in use with the rows of the delta buffer behind its own; None where it cannot have them."""
        live, rebuild_input = self._live, gather_delta(self._live.view)
        built = extend_verified(rebuild_input, live.settings, live.asked, self._pause())
        if built is None:
            return None
        if built.index.plan.engine != "cpu":
            live.device_manager.built(built.index)
        return built, rebuild_input

    def _save(self) -> None:
        """Write the snapshot of the view in use; an index made here gets a generation of its own."""
        live = self._live
        with live.mutex:
            if self._saver.unsaved:
                live.generation = self._saver.next_generation()
            view = live.view
        self._saver.save(view)

    def _pause(self) -> SearchYield:
        return SearchYield(lambda: self._live.last_search)

    def _on_device(self, cause: RebuildReason, progress: Progress) -> tuple[Built, RebuildInput] | None:
        """The planned index where a device is to hold it; None where none is, and where the device refuses."""
        view, device_manager = self._live.view, self._live.device_manager
        plan = self.plan(view, cause.by_request)
        if plan.engine == "cpu":
            return None
        try:
            if not device_manager.admit(plan, view.index):
                view = self._live.leave_device()
            built, rebuild_input = self._verified(plan, view, cause, progress)
        except DeviceError as error:
            device_manager.refused(error, plan)
            return None
        if built.refused:
            device_manager.gave_up(plan, built.refused)
            return None
        device_manager.built(built.index)
        return built, rebuild_input

    def _verified(
        self, plan: IndexPlan, view: View, cause: RebuildReason, progress: Progress
    ) -> tuple[Built, RebuildInput]:
        live, rebuild_input = self._live, gather(view)
        built = build_verified(
            plan, rebuild_input, cause, live.settings, live.asked, self._collect, progress, self._pause()
        )
        return built, rebuild_input

    def _attend(self) -> list[str]:
        """Calibrate on what is asked today, where that is news, and see whether the recall holds."""
        live, view = self._live, self._live.catch_up()
        old = calibration_is_old(live, view)
        pause = self._pause()
        cause = recalibrate(live, view, pause) if old else None
        started = time.perf_counter()
        if cause is None and (started >= self._probe_at or not self._sparing):
            cause = probe(live, live.catch_up(), pause)
            self._probe_at = time.perf_counter() + (time.perf_counter() - started) / PROBE_SHARE
        if cause:
            self.ask(cause)
        live.asked.save()
        return ["calibrated on real queries"] if old else []

    def _report_once(self, built: Built, cause: RebuildReason, seconds: float) -> None:
        index, events = built.index, self._live.events
        if built.refused:
            events.record("refused", f"{built.refused}; staying exact", level=logging.WARNING, rows=index.n)
        text = f"{index.kind} of {index.n} rows ({cause.kind}): {cause.text}"
        events.record("built", text, seconds=seconds, nlist=index.nlist, trained=built.trained)

    def _adopt(self) -> bool:
        """Take over a newer index that another process has made and saved."""
        live, info = self._live, self._saver.info()
        if info is None or info.generation <= live.generation:
            return False
        loaded = load_snapshot(live.snapshot_path, live.records, live.events)
        view = None if loaded is None else live.caught_up(loaded[0])
        if view is None or not agrees(view, live.records, live.settings.seed):
            return False
        if view.index.kind != "exact" and not self._good(view):
            return False
        live.adopt(view, info.generation)
        return True

    def _good(self, view: View) -> bool:
        """Is the index that another process judged good enough for the recall that this one promises?"""
        settings = self._live.settings
        quality = view.stats.quality or judged(view.index, view.stats, self._live.asked, settings)[1]
        return quality.meets(settings.target_recall)


def _silent(_stage: str, _share: float) -> None:
    return
