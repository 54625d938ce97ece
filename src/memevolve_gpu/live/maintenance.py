"""Rounds of maintenance: verify, adopt or rebuild the index, calibrate, probe recall, purge the log, save."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..devices.memory import trim_heap
from ..errors import CapacityError, DeviceError, ReadOnlyError, ReentrantCallError, StorageError
from ..index.vector_table import DamagedVectorsError
from ..planner.plan import plan_index
from ..records.file_lock import one_process
from ..records.records import Records
from ..records.sqlite_errors import translate_error
from ..training.recall import Pause, Quality, no_pause, recall_of
from ..training.training_set import Progress
from ..types import FloatArray, IndexPlan, SearchParams
from ..utils.forking import lock, renew_in_child
from ..utils.report_types import MaintenanceReport, QualityReport
from ..utils.vectors import from_bytes
from .device_manager import DeviceManager
from .live_index import LiveIndex, LiveSettings
from .rebuild import QUALITY_K, Collect, calibrated, evaluated, rebuild, silent
from .scheduler import RETRY_GROWTH, Event, MaintenanceScheduler, RebuildReason, Spent, is_extendable
from .snapshot_writer import Saver, joins_log
from .snapshots import agrees, keep_stats, load_snapshot
from .view import View
from .worker import SearchYield

T = TypeVar("T")

PROBED = 48
"""Real queries of one recall probe."""

STEP = 24
"""Exact searches between two pauses."""

ROWS_READ = 4_000_000
"""Rows that exact search may read for the recall in a health report: 0.2 s at 384 dimensions, one thread."""

FEWEST = 8
"""Fewest queries for a recall in a health report."""

SWEPT_AT_ONCE = 10_000
"""Expired units that are deleted in one transaction."""

PROBE_SLACK = 0.03
"""How far a probe may lie below the target: one standard error of 48 queries of ten results is about 0.01 at 0.95."""


def plan_for(
    settings: LiveSettings, devices: DeviceManager, view: View, early: bool = False, *, on_host: bool = False
) -> IndexPlan:
    """The index that a view should have; the one that it has where no other fits into memory.

    ``early`` ignores MIN_TRAINING_UNITS; ``on_host``: the plan for the CPU, whatever devices there are.
    """
    state = None if on_host else devices.state(view.count, view.index)
    try:
        plan = plan_index(
            count=view.count,
            dim=view.index.dim,
            index_type=settings.index_type,
            target_recall=settings.target_recall,
            budget_bytes=settings.budget_bytes,
            min_training_units=0 if early else settings.min_training_units,
            lists=settings.lists,
            precision=settings.precision,
            current_nlist=view.index.nlist or None,
            device=state,
        )
    except CapacityError as error:
        return replace(view.index.plan, reason=f"kept as it is: {error}", refusal="")
    if on_host:
        return plan
    devices.note(plan, state)
    missing = devices.absence() if state is None else ""
    if not missing:
        return plan
    note = f"{missing}; the CPU instead"
    return replace(plan, reason=f"{plan.reason}; {note}", notes=(*plan.notes, note))


def view_recall(view: View, queries: FloatArray, target_recall: float, pause: Pause = no_pause) -> float:
    """Recall@10 of ``queries`` on a view, delta buffer and tombstones included."""
    found = view.search(queries, QUALITY_K, view.stats.search_params(view.index, QUALITY_K, target_recall)).distances
    truth = np.empty_like(found)
    for start in range(0, len(queries), STEP):
        part = slice(start, start + STEP)
        truth[part] = view.search(queries[part], QUALITY_K, SearchParams(exact=True)).distances
        pause()
    return recall_of(found, truth)


def view_self_hits(view: View, records: Records, target_recall: float) -> float:
    """The share of live rows, spread over their age, that find themselves or a row with the same vector."""
    rows = records.spread(PROBED)
    if not rows or view.metric == "ip":  # the row with the largest inner product need not be the row itself
        return 1.0
    queries = from_bytes([row.vector for row in rows], view.metric)
    found = view.search(queries, 1, view.stats.search_params(view.index, 1, target_recall))
    nearest = [sum(found.slots(number)) for number in range(len(rows))]  # one slot, or 0 for none
    held = records.vectors_at(nearest)
    hits = [row.slot == one or held.get(one) == row.vector for row, one in zip(rows, nearest, strict=True)]
    return sum(hits) / len(hits)


@dataclass(frozen=True, slots=True)
class Report:
    """What a round of maintenance did: ``actions`` in order; ``quality`` of the index in use, as it was built."""

    actions: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0
    quality: Quality | None = None

    @property
    def skipped(self) -> bool:
        """Whether another round was running, here or in another process."""
        return any(action.startswith("skipped") for action in self.actions)

    def report(self) -> MaintenanceReport:
        """What callers get of it."""
        q = self.quality
        quality = None if q is None else QualityReport(self_hit=q.self_hit, recall=q.recall, queries=q.queries)
        return {"actions": self.actions, "reason": self.reason, "seconds": self.seconds, "quality": quality}


class _ClosingError(Exception):
    """The store is being closed; what was measured so far is dropped."""


class Maintenance:
    """Maintenance of one live index: one round at a time in this process and, by a lock file, in all processes."""

    def __init__(self, live: LiveIndex, lock_path: Path, collect: Collect) -> None:
        """``collect`` finds training vectors where the store's own are too few."""
        self._live = live
        self._lock_path = lock_path
        self._collect = collect
        self._round_lock = lock()
        self._round_thread: int | None = None
        """The thread that runs a round."""
        self.running = False
        self.closing = False
        """Whether to give up measuring: somebody waits for the end of the round."""
        self.rounds = 0
        self.cpu_seconds = 0.0
        """Processor time of the threads that ran rounds."""
        saver = self._saver = Saver(live)
        self.plan = partial(plan_for, live.settings, live.device_manager)
        """The index that a view should have."""
        devices = live.device_manager
        self.scheduler = MaintenanceScheduler(
            self.plan,
            live.settings.min_training_units,
            lambda: live.sweep_is_due() or saver.log_is_long() or live.records.history_is_due(),
            lambda: devices.needs_look,
        )
        self._quality_now: tuple[object, Quality] | None = None
        """The last answer of ``quality``, and of which state."""
        self._rows_at_low_recall = 0
        """Live rows when low recall last led to training; the same rows trained again would change nothing."""
        renew_in_child(self)

    def cause(self, view: View) -> RebuildReason | None:
        """Why a new index is due; None when the one in use is good."""
        return self.scheduler.reason(view)

    def quality(self, view: View) -> Quality | None:
        """How searches do on the view now, delta buffer and tombstones included; None where the index is not measured.

        Self-hits of live rows, and recall@10 of real queries: measured again where exact search reads few enough rows,
        else as last probed, else as measured when the index was built. Remembered until something changes.
        """
        held, queries, target = view.stats.quality, self._live.query_sample, self._live.settings.target_recall
        if held is None:
            return None
        key = (view.watermark, id(view.index), queries.seen, view.stats.probed)
        known = self._quality_now
        if known is None or known[0] != key:
            sample = queries.sample()[: min(PROBED, ROWS_READ // max(1, view.count))]
            try:
                if len(sample) >= FEWEST:
                    recall = view_recall(view, sample, target)
                else:
                    recall = held.recall if view.stats.probed is None else view.stats.probed
                known = key, Quality(view_self_hits(view, self._live.records, target), recall, len(sample))
            except (DeviceError, DamagedVectorsError):  # the next search continues on the CPU, or with the records
                return held
            self._quality_now = known
        return known[1]

    def notify(self, event: Event) -> bool:
        """Note an event; return whether the background should run. Cheap enough to call after every write."""
        view = self._live.view
        worth_asking = self.scheduler.notify(event, view)
        if self._live.device_manager.needs_look:
            worth_asking |= self.scheduler.notify("device", view)
        if not view.index.table.is_checked:
            return True
        return worth_asking and self.scheduler.next_action(view).delay is not None

    def run_if_due(self) -> float | None:
        """What the background thread does when woken: run a round if one is due.

        Returns:
            Seconds after which to call again; None to wait for the next event.
        """
        self._live.check_vectors(self._pause())
        view = self._live.catch_up()
        self.scheduler.notify("written", view)
        action = self.scheduler.next_action(view)
        if action.delay != 0.0:
            return action.delay
        del view  # a device may have memory for a new index only once the old one is gone
        report = self.run(wait=False, background=True, quiet=action.quiet)
        if not report.skipped:
            return self.scheduler.append_delay(self._live.view)
        self.scheduler.notify("skipped", self._live.view)
        return self.scheduler.next_action(self._live.view).delay

    def run(
        self,
        progress: Progress | None = None,
        *,
        wait: bool = True,
        force: RebuildReason | None = None,
        background: bool = False,
        quiet: bool = False,
    ) -> Report:
        """Run one round.

        Args:
            progress: called with a stage and its finished fraction.
            wait: wait for a round that is running, rather than skip this one.
            force: rebuild for this reason, whatever the rules say.
            background: probe recall only as often as the background may.
            quiet: there are no recent writes, so fewer rows may wait in the delta buffer.
        """
        started = time.perf_counter()
        if self.in_round() or not self._round_lock.acquire(blocking=wait):
            return Report(["skipped: another round is running"])
        try:
            self._round_thread = threading.get_ident()
            with one_process(self._lock_path, wait, self._live.records.file_mode) as held:
                if not held:
                    return Report(["skipped: another process is maintaining this store"])
                busy, self.running = time.thread_time(), True
                try:
                    with self.scheduler.round():
                        actions, reason = self._round(progress or silent, force, background, quiet)
                finally:
                    self.running = False
                    self.rounds += 1
                    self.cpu_seconds += time.thread_time() - busy
        finally:
            self._round_thread = None
            self._round_lock.release()
        return Report(actions, reason, round(time.perf_counter() - started, 6), self._live.view.stats.quality)

    def snapshot(self) -> Path:
        """Save the index, from which the next opening continues; later changes are replayed from the log.

        Raises StorageError (StorageFullError, ReadOnlyError) when the file cannot be written; the store stays usable.
        """
        live, saver = self._live, self._saver
        if live.records.read_only:
            raise ReadOnlyError(f"{live.snapshot_path}: the store is read-only; make it writable to save its index")
        if self.in_round():
            raise ReentrantCallError("snapshot() inside a round of maintenance in one thread would wait for itself")
        with self._round_lock, one_process(self._lock_path, True, live.records.file_mode):
            saver.forget_failure()
            live.check_vectors(self._pause())
            view = live.catch_up()
            reason = self.cause(view)
            if reason is None and not (view.index.n and joins_log(view, live.records.head().horizon)):
                reason = RebuildReason("append", "a snapshot was requested")
            del view  # a device may have memory for a new index only once the old one is gone
            if reason:
                self._rebuild(reason)
            if saver.failed is None and (reason is None or saver.unsaved):
                saver.save()
            if saver.failed is not None:
                raise translate_error(saver.failed.__cause__ or saver.failed, live.snapshot_path)
            return live.snapshot_path

    def alone(self, act: Callable[[], T]) -> T:
        """What ``act`` returns, while no round runs in any process."""
        with self._round_lock, one_process(self._lock_path, True, self._live.records.file_mode):
            return act()

    def close(self) -> None:
        """Save an index that is not saved yet, unless another process is maintaining; a failure is an event."""
        if not self._saver.unsaved or self._live.records.read_only or self.in_round():
            return
        if self._round_lock.acquire(blocking=False):
            try:
                with one_process(self._lock_path, False, self._live.records.file_mode) as held:
                    if held:
                        self._saver.save()
            except StorageError as error:
                self._live.events.record("snapshot-failed", f"{error}; opening will be slower", level=logging.WARNING)
            finally:
                self._round_lock.release()

    def after_fork(self) -> None:
        """In a forked child no round is running."""
        self._round_thread, self.running = None, False

    def in_round(self) -> bool:
        """Whether a signal handler, a finalizer or a callback made this call inside a round of the same thread."""
        return self._round_thread == threading.get_ident()

    def _pause(self) -> SearchYield:
        """What a long step calls now and then, to let searches go first."""
        return SearchYield(lambda: self._live.last_search)

    def _pause_or_end(self) -> Pause:
        """The same for what is not needed when the store is being closed."""
        pause = self._pause()

        def step() -> None:
            if self.closing:
                raise _ClosingError
            pause()

        return step

    def _round(
        self, progress: Progress, force: RebuildReason | None, background: bool, quiet: bool
    ) -> tuple[list[str], str]:
        """What was done, and why the index was rebuilt."""
        live = self._live
        self._saver.forget_failure()
        actions = self._sweep() + self._verify()
        live.look_at_device()
        live.device_manager.postpone_look()
        reason = force or self.scheduler.reason(live.catch_up(), quiet=quiet, patient=background)
        if force is None and reason and reason.kind != "append" and self._adopt():
            actions.append("adopted a newer snapshot")
            reason = self.scheduler.reason(live.catch_up(), quiet=quiet, patient=background)
        if reason and reason.kind == "train" and is_extendable(live.view):
            actions.append(self._rebuild(RebuildReason("append", "rows wait, and training takes longer")))
        if reason:
            actions.append(self._rebuild(reason, progress, forced=force is not None))
        with suppress(_ClosingError):
            actions += self._check_recall(background)
        if not live.records.read_only:
            actions += self._purge_log()
            if live.records.history_is_due():
                actions.append(f"purged {live.records.purge_history()} changes of the history")
            actions += self._save_vectors()
        if not background:  # whose own round does it
            live.foresee({}, lambda: self.closing)
            live.save_fields(timeout=1.0)
        return actions, reason.text if reason else ""

    def _sweep(self) -> list[str]:
        """Delete the units that have expired, of all namespaces."""
        live, swept, last = self._live, 0, SWEPT_AT_ONCE
        if live.records.read_only or not live.has_expired():
            return []
        while last == SWEPT_AT_ONCE:
            with live.records.write(operation="sweep") as tx:
                last = tx.drop_expired(SWEPT_AT_ONCE)
            swept += last
        return [f"swept {swept} expired units"]

    def _verify(self) -> list[str]:
        """Compare the index with the records; where they differ, read everything from the records again."""
        live = self._live
        live.check_vectors(self._pause())
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

    def _adopt(self) -> bool:
        """Use a newer index that another process has made and saved, if it is good enough; not in place of a GPU's."""
        live, info = self._live, self._saver.info()
        if info is None or info.generation <= live.generation or self.plan(live.catch_up()).engine != "cpu":
            return False
        loaded = load_snapshot(live.snapshot_path, live.records, live.events)
        view = None if loaded is None else live.caught_up(loaded[0])
        if view is None or not agrees(view, live.records, live.settings.seed):
            return False
        if view.index.kind != "exact":
            stats = view.stats
            if stats.quality is None:
                stats = calibrated(view.index, stats, live.query_sample, live.settings.seed)
                stats = evaluated(view.index, stats, live.settings)
            if not stats.meets(live.settings.target_recall):
                return False
        live.adopt(view, info.generation)
        live.check_vectors(self._pause())
        return live.generation == info.generation

    def _rebuild(self, reason: RebuildReason, progress: Progress = silent, *, forced: bool = False) -> str:
        trim_heap()  # what a bulk write left behind
        done = rebuild(
            reason, self._live, self._saver, self.scheduler, self.plan, self._collect, progress, forced=forced
        )
        trim_heap()
        return done

    def _check_recall(self, background: bool) -> list[str]:
        """Calibrate on recent queries where many are new, and probe recall; request training where it is too low."""
        live, view = self._live, self._live.catch_up()
        pause = self._pause_or_end()
        is_old = view.stats.calibration is not None and live.query_sample.has_news_since(view.stats.asked)
        reason = self._recalibrate(view, pause) if is_old else None
        if reason is None and (not background or self.scheduler.may_probe()):
            started = time.perf_counter()
            reason = self._probe(live.catch_up(), pause)
            self.scheduler.notify(Spent("probe", time.perf_counter() - started), live.view)
        known = self._rows_at_low_recall
        if reason and abs(view.count - known) > RETRY_GROWTH * known:
            self._rows_at_low_recall = view.count
            self.scheduler.notify(reason, live.view)
        live.query_sample.save()
        return ["calibrated on real queries"] if is_old else []

    def _recalibrate(self, view: View, pause: Pause) -> RebuildReason | None:
        """Calibrate the index in use on recent queries; a reason to train when its recall is too low."""
        live, started = self._live, time.perf_counter()
        unknown = replace(view.stats, calibration=None)
        stats = calibrated(view.index, unknown, live.query_sample, live.settings.seed, pause)
        stats = evaluated(view.index, stats, live.settings, pause)
        live.describe(view.index, stats)
        info = self._saver.info()
        if info is not None and info.generation == live.generation and not self._saver.unsaved:
            keep_stats(live.records, info, stats, live.events)
        queries = stats.calibration.queries if stats.calibration is not None else 0
        live.events.record("calibrated", f"on {queries} real queries", seconds=time.perf_counter() - started)
        if stats.meets(live.settings.target_recall):
            return None
        return RebuildReason("train", f"real queries find too little: {stats.quality}")

    def _probe(self, view: View, pause: Pause) -> RebuildReason | None:
        """Measure recall@10 of real queries on the view as it is; a reason to train when it fell."""
        live, target = self._live, self._live.settings.target_recall
        queries = live.query_sample.sample()[:PROBED]
        if view.stats.calibration is None or not len(queries):
            return None
        probed = view_recall(view, queries, target, pause)
        live.describe(view.index, replace(live.view.stats, probed=probed))
        if len(queries) < PROBED or probed >= target - PROBE_SLACK:
            return None
        return RebuildReason("train", f"recall@10 of real queries fell to {probed:.3f}")

    def _purge_log(self) -> list[str]:
        """Purge a log that has become long; where the snapshot needs most of it, save first."""
        saver = self._saver
        if not saver.log_is_long():
            return []
        if saver.failed is None and saver.log_is_held():
            if self._live.catch_up().delta_n:
                self._rebuild(RebuildReason("append", "the log is long"))
            if saver.log_is_held():
                saver.save()
        return [f"purged {saver.purge()} log entries"]

    def _save_vectors(self) -> list[str]:
        """Save, where many vectors are in memory that could be mapped from the snapshot."""
        saver = self._saver
        if saver.failed is not None or not saver.holds_vectors(self._live.view):
            return []
        saver.mark_unsaved()
        saver.save()
        return [] if saver.unsaved else ["saved the vectors, to map them"]
