"""What keeps the index healthy: build the planned body beside the old one, verify it, swap it in, tidy up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CapacityError, DeviceError, ReadOnlyError, StorageError
from ..index.base import Body
from ..index.snapshot import SnapshotError, SnapshotInfo, read_info, write_snapshot
from ..planner.plan import plan_index
from ..records.failures import translated
from ..training.quality import Quality
from ..types import IndexPlan
from ..utils.forking import renew_in_child
from .attention import calibration_is_old, probe, recalibrate
from .builder import Built, Collect, build_verified, judged
from .causes import Cause, cause_to_build
from .draft import host_twin
from .facts import BodyFacts
from .live import LiveIndex
from .rebuild import Gathered, gather, swapped
from .recovery import agrees, load_snapshot
from .rounds import one_process
from .view import View

__all__ = ["Maintenance", "Report"]

LOG_KEPT = 10_000
"""Log entries that a process a little behind may still need."""

LOOK_EVERY = 16

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a round of maintenance did; ``actions`` in order, ``quality`` of the body in use."""

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
        self._one_round = threading.Lock()
        self.running = False
        self.rounds = 0
        self.cpu_seconds = 0.0
        """Processor time of the threads that ran the rounds; training and filling use no other."""
        self._look_at = 0
        self._asked: Cause | None = None
        self._unsaved: Exception | None = None
        renew_in_child(self)

    def plan(self, view: View, early: bool = False) -> IndexPlan:
        """What the store should have; what it has where nothing else fits into memory. ``early``: however few units."""
        settings = self._live.settings
        try:
            return plan_index(
                count=view.count,
                dim=view.body.dim,
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
                current_nlist=view.body.nlist or None,
                device=self._live.desk.facts(view.count, view.body),
            )
        except CapacityError as error:
            return replace(view.body.plan, reason=f"kept as it is: {error}")

    def cause(self, view: View) -> Cause | None:
        """Why a new body is due; None when the present one serves."""
        if self._asked is not None and view.facts.trained_rows:
            return self._asked
        return cause_to_build(view, self.plan(view), self._live.settings.min_training_units)

    def ask(self, cause: Cause) -> None:
        """Have the next round build for ``cause``, whatever the rules would say."""
        self._asked = cause

    def due(self) -> bool:
        """Is there anything to do? Cheap enough to ask after every write: it looks after every hundredth part."""
        view, asked, desk = self._live.view, self._live.look_due, self._live.desk
        if view.watermark < self._look_at and not asked and not desk.due:
            return False
        self._live.look_due = False
        self._look_at = view.watermark + max(LOOK_EVERY, view.count // 100)
        cause, calibrated = self.cause(view), view.facts.calibration is not None
        return cause is not None or desk.take_due() or self._log_is_long() or (asked and calibrated)

    def run(self, progress: Progress | None = None, *, wait: bool = True, force: Cause | None = None) -> Report:
        """One round: adopt or build, snapshot, purge. ``wait=False`` returns at once when another round is on."""
        started = time.perf_counter()
        if not self._one_round.acquire(blocking=wait):
            return Report(["skipped: another round is running"])
        try:
            with one_process(self._lock_path, wait) as held:
                if not held:
                    return Report(["skipped: another process is maintaining this store"])
                actions, reason = self._timed_round(progress or _silent, force)
        finally:
            self._one_round.release()
        return Report(actions, reason, round(time.perf_counter() - started, 6), self._live.view.facts.quality)

    def snapshot(self) -> Path:
        """Save the body from which the next opening goes on; what came after it is replayed from the log.

        Raises StorageError (StorageFullError, ReadOnlyError) when the file cannot be written; nothing else suffers.
        """
        if self._live.records.read_only:
            raise ReadOnlyError(
                f"{self._live.snapshot_path}: the store is read-only; make it writable to save its index"
            )
        with self._one_round, one_process(self._lock_path, wait=True):
            self._unsaved = None
            view = self._live.catch_up()
            joins_log = view.body_seq >= self._live.records.head().horizon
            cause = self.cause(view)
            if cause is None and not (view.body.n and joins_log):
                cause = Cause("append", "snapshot asked for")
            if cause:
                self._build(view, cause, _silent)
            else:
                self._write_snapshot(view)
            if self._unsaved is not None:
                raise translated(self._unsaved.__cause__ or self._unsaved, self._live.snapshot_path)
            return self._live.snapshot_path

    def after_fork(self) -> None:
        """In a forked child nobody is in the middle of a round."""
        self._one_round = threading.Lock()

    def _timed_round(self, progress: Progress, force: Cause | None) -> tuple[list[str], str]:
        busy = time.thread_time()
        self.running = True
        try:
            return self._round(progress, force)
        finally:
            self.running = False
            self.rounds += 1
            self.cpu_seconds += time.thread_time() - busy

    def _round(self, progress: Progress, force: Cause | None) -> tuple[list[str], str]:
        actions = self._healed()
        view = self._live.catch_up()
        self._live.desk.poll(view.body)
        self._live.desk.look(view.count)
        cause = force or self.cause(view)
        if cause and not force and self.plan(view).engine == "cpu" and self._adopt():
            actions.append("adopted a newer snapshot")
            view = self._live.catch_up()
            cause = self.cause(view)
        if cause:
            actions.append(self._build(view, cause, progress, forced=force is not None))
        actions += self._attend()
        if self._log_is_long() and not self._live.records.read_only:
            actions.append(f"purged {self._purge()} log entries")
        return actions, cause.text if cause else ""

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

    def _build(self, view: View, cause: Cause, progress: Progress, *, forced: bool = False) -> str:
        live, started = self._live, time.perf_counter()
        if view.body.plan.precision != "float32":
            view = live.reload("full precision is needed to rebuild")
        epoch, self._asked = live.epoch, None
        made = self._on_device(view, cause, progress)
        if made is None:
            refused, view = view, live.catch_up()
            if cause.kind == "train" and not forced and self.cause(view) is None:
                return f"kept {refused.body.kind}: the device refused"
            made = self._verified(self.plan(view, cause.by_request), view, cause, progress)
        built, gathered = made
        with live.mutex:
            now = live.catch_up()
            if live.epoch != epoch:
                return "dropped a build that was overtaken by a reload"
            live.replace(swapped(gathered, built.body, built.facts, now), self._next_generation())
        self._write_snapshot(live.view)
        self._tell(built, cause, time.perf_counter() - started)
        return f"built {built.body.kind} of {built.body.n} rows"

    def _on_device(self, view: View, cause: Cause, progress: Progress) -> tuple[Built, Gathered] | None:
        """The planned body where a device is to hold it; None where none is, and where the device refuses."""
        plan, desk = self.plan(view, cause.by_request), self._live.desk
        if plan.engine == "cpu":
            return None
        try:
            if not desk.admit(plan, view.body):
                view = self._live.leave_device()
            built, gathered = self._verified(plan, view, cause, progress)
        except DeviceError as error:
            desk.refused(error, plan)
            return None
        if built.refused:
            desk.gave_up(plan, built.refused)
            return None
        desk.built(built.body)
        return built, gathered

    def _verified(self, plan: IndexPlan, view: View, cause: Cause, progress: Progress) -> tuple[Built, Gathered]:
        live, gathered = self._live, gather(view)
        built = build_verified(plan, gathered, cause, live.settings, live.asked, self._collect, progress)
        return built, gathered

    def _attend(self) -> list[str]:
        """Calibrate on what is asked today, where that is news, and see whether the recall holds."""
        live, view = self._live, self._live.catch_up()
        old = calibration_is_old(live, view)
        cause = (recalibrate(live, view) if old else None) or probe(live, live.catch_up())
        if cause:
            self.ask(cause)
        live.asked.save()
        return ["calibrated on real queries"] if old else []

    def _tell(self, built: Built, cause: Cause, seconds: float) -> None:
        body, events = built.body, self._live.events
        if built.refused:
            events.record("refused", f"{built.refused}; staying exact", level=logging.WARNING, rows=body.n)
        text = f"{body.kind} of {body.n} rows ({cause.kind}): {cause.text}"
        events.record("built", text, seconds=seconds, nlist=body.nlist, trained=built.trained)

    def _adopt(self) -> bool:
        """Take over a newer body that another process has made and saved."""
        live, info = self._live, self._snapshot_info()
        if info is None or info.generation <= live.generation:
            return False
        loaded = load_snapshot(live.snapshot_path, live.records, live.events)
        view = None if loaded is None else live.caught_up(loaded[0])
        if view is None or not agrees(view, live.records, live.settings.seed):
            return False
        if view.body.kind != "exact" and not self._good(view):
            return False
        with live.mutex:
            live.adopt(view, info.generation)
        return True

    def _good(self, view: View) -> bool:
        """Is the body that another process judged good enough for the recall that this one promises?"""
        settings = self._live.settings
        quality = view.facts.quality or judged(view.body, view.facts, self._live.asked, settings)[1]
        return quality.meets(settings.target_recall)

    def _log_is_long(self) -> bool:
        head = self._live.records.head()
        return head.last_seq - head.horizon > 2 * LOG_KEPT

    def _purge(self) -> int:
        """Forget log entries that neither the snapshot nor a process a little behind still needs."""
        info = self._snapshot_info()
        upto = self._live.records.head().last_seq - LOG_KEPT
        return self._live.records.purge(upto if info is None else min(upto, info.watermark))

    def _next_generation(self) -> int:
        info = self._snapshot_info()
        return max(info.generation if info else 0, self._live.generation) + 1

    def _snapshot_info(self) -> SnapshotInfo | None:
        """What the snapshot on disk says of itself, if it is this store's."""
        try:
            info = read_info(self._live.snapshot_path)
        except SnapshotError:
            return None
        return info if info.store_id == self._live.records.store_id else None

    def _write_snapshot(self, view: View) -> None:
        live = self._live
        self._unsaved = None
        if live.records.read_only:
            return
        try:
            write_snapshot(live.snapshot_path, _saved(view.body), self._info_of(_saved(view.body), view))
        except (OSError, StorageError, SnapshotError) as error:
            self._unsaved = error
            live.events.record("snapshot-failed", f"{error}; opening will be slower", level=logging.WARNING)

    def _info_of(self, body: Body, view: View) -> SnapshotInfo:
        return SnapshotInfo(
            store_id=self._live.records.store_id,
            generation=self._live.generation,
            watermark=view.body_seq,
            count=body.n,
            plan=body.plan,
            metric=body.metric,
            dim=body.dim,
            created_at=time.time(),
            seed=self._live.settings.seed,
            extra=(view.facts if body is view.body else BodyFacts()).to_dict(),
        )


def _saved(body: Body) -> Body:
    """What of a body goes into a snapshot: of one on a device its vectors alone, so that opening needs no device."""
    return body if body.plan.engine == "cpu" else host_twin(body)


def _silent(_stage: str, _share: float) -> None:
    return
