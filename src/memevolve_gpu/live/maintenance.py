"""What keeps the index healthy: build the planned body beside the old one, verify it, swap it in, tidy up."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CapacityError, EngineError, StorageError
from ..index.base import Body
from ..index.catalog import build
from ..index.snapshot import SnapshotError, SnapshotInfo, read_info, write_snapshot
from ..planner.effort import effort_for
from ..planner.nlist import should_recreate
from ..planner.plan import plan_index
from ..training.quality import Quality, measure
from ..types import IndexPlan
from .live import LiveIndex
from .rebuild import Gathered, gather, swapped
from .recovery import load_snapshot, spot_check
from .view import View

__all__ = ["Maintenance", "Report"]

TAIL_FRACTION, TAIL_ROWS = 0.25, 2048
DEAD_FRACTION, DEAD_ROWS = 0.15, 256
LOG_KEPT = 10_000
RETRY_GROWTH = 0.25
LOOK_EVERY = 16

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a round of maintenance did; ``actions`` in order, ``quality`` of a body built in it."""

    actions: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0
    quality: Quality | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Maintenance:
    """Upkeep of one live index; one round at a time in this process and, through a lock file, in all of them."""

    def __init__(self, live: LiveIndex, lock_path: Path) -> None:
        self._live = live
        self._lock_path = lock_path
        self._one_round = threading.Lock()
        self._refused_at: int | None = None
        self._look_at = 0
        self.quality: Quality | None = None
        """Of the body in use, once a build or an adopted snapshot has been judged."""

    # What there is to do

    def plan(self, view: View) -> IndexPlan:
        try:
            return self._plan(view)
        except CapacityError as error:
            return replace(view.body.plan, reason=f"kept as it is: {error}")

    def _plan(self, view: View) -> IndexPlan:
        settings = self._live.settings
        return plan_index(
            count=view.count,
            dim=view.body.dim,
            metric=view.metric,
            index_type=settings.index_type,
            target_recall=settings.target_recall,
            budget_bytes=settings.budget_bytes,
            min_training_units=settings.min_training_units,
            adaptive_nlist=settings.adaptive_nlist,
            vectors_per_centroid=settings.vectors_per_centroid,
            nlist_min=settings.nlist_min,
            nlist_max=settings.nlist_max,
            precision=settings.precision,
            current_nlist=view.body.nlist or None,
        )

    def cause_to_build(self, view: View) -> str | None:
        """Why a new body is due; None when the present one serves."""
        if view.count < self._live.settings.min_training_units and not view.body.plan.codes:
            return self._cause_to_compact(view)
        if self._refused_at is not None and abs(view.count - self._refused_at) <= RETRY_GROWTH * self._refused_at:
            return self._cause_to_compact(view)
        plan, held = self.plan(view), view.body.plan
        if plan.kind != held.kind:
            return f"{held.kind} gives way to {plan.kind}: {plan.reason}"
        if plan.nlist and should_recreate(view.body.nlist, plan.nlist):
            return f"nlist {view.body.nlist} is off the planned {plan.nlist} by 25 % or more"
        if plan.precision != held.precision:
            return f"precision {held.precision} gives way to {plan.precision}"
        return self._cause_to_compact(view) or self._cause_to_append(view)

    def log_is_long(self) -> bool:
        head = self._live.records.head()
        return head.last_seq - head.horizon > 2 * LOG_KEPT

    def due(self) -> bool:
        """Is there anything to do? Cheap enough to ask after every write: it looks again after every hundredth part."""
        view = self._live.view
        if view.watermark < self._look_at:
            return False
        self._look_at = view.watermark + max(LOOK_EVERY, view.count // 100)
        return self.cause_to_build(view) is not None or self.log_is_long()

    # Doing it

    def run(self, progress: Progress | None = None, *, wait: bool = True, force: str = "") -> Report:
        """One round: adopt or build, snapshot, purge. ``wait=False`` returns at once when another round is on."""
        started = time.perf_counter()
        if not self._one_round.acquire(blocking=wait):
            return Report(["skipped: another round is running"])
        try:
            with _flock(self._lock_path, wait) as held:
                if not held:
                    return Report(["skipped: another process is maintaining this store"])
                actions, reason = self._round(progress or _silent, force)
        finally:
            self._one_round.release()
        return Report(actions, reason, round(time.perf_counter() - started, 6), self.quality)

    def snapshot(self) -> Path:
        """Save the body from which the next opening goes on; what came after it is replayed from the log."""
        with self._one_round, _flock(self._lock_path, wait=True):
            view = self._live.catch_up()
            joins_log = view.body_seq >= self._live.records.head().horizon
            cause = "" if view.body.n and joins_log else "snapshot asked for"
            if cause or self.cause_to_build(view):
                self._build(view, cause or "snapshot asked for", _silent)
            else:
                self._write_snapshot(view.body, view.body_seq)
            return self._live.snapshot_path

    def _round(self, progress: Progress, force: str) -> tuple[list[str], str]:
        actions: list[str] = []
        view = self._live.catch_up()
        cause = force or self.cause_to_build(view)
        if cause and not force and self._adopt():
            actions.append("adopted a newer snapshot")
            view = self._live.catch_up()
            cause = self.cause_to_build(view)
        if cause:
            actions.append(self._build(view, cause, progress))
        if self.log_is_long():
            actions.append(f"purged {self._purge()} log entries")
        return actions, cause or ""

    def _build(self, view: View, cause: str, progress: Progress) -> str:
        live, started, epoch = self._live, time.perf_counter(), self._live.epoch
        if view.body.plan.precision != "float32":
            view = live.reload("full precision is needed to rebuild")
            epoch = live.epoch
        gathered = gather(view)
        body = self._trained(view, gathered, progress)
        with live.mutex:
            now = live.catch_up()
            if live.epoch != epoch:
                return "dropped a build that was overtaken by a reload"
            watermark = gathered.view.watermark
            live.replace(swapped(gathered, body, now), self._next_generation())
        self._write_snapshot(body, watermark)
        seconds = time.perf_counter() - started
        live.events.record("built", f"{body.kind} of {body.n} rows: {cause}", seconds=seconds, nlist=body.nlist)
        return f"built {body.kind} of {body.n} rows"

    def _trained(self, view: View, gathered: Gathered, progress: Progress) -> Body:
        """The planned body, verified; an exact one, with an event, where it cannot be had."""
        live = self._live
        plan = self.plan(view)
        try:
            body = build(plan, gathered.rows, view.metric, seed=live.settings.seed, progress=progress)
        except EngineError as error:
            return self._exact_instead(view, gathered, f"cannot build {plan.kind}: {error}")
        effort = effort_for(plan, body.n, 10, live.settings.target_recall)
        quality = measure(body, effort, seed=live.settings.seed)
        if not quality.meets(live.settings.target_recall):
            found = f"self-hit {quality.self_hit:.3f}, recall@10 {quality.recall:.3f}"
            return self._exact_instead(view, gathered, f"{plan.kind} fell short ({found})")
        self.quality, self._refused_at = quality, None
        return body

    def _exact_instead(self, view: View, gathered: Gathered, cause: str) -> Body:
        self._live.events.record("refused", f"{cause}; staying exact", level=logging.WARNING, rows=view.count)
        self._refused_at = view.count
        plan = IndexPlan("exact", reason=cause)
        body = build(plan, gathered.rows, view.metric, seed=self._live.settings.seed)
        self.quality = measure(body, effort_for(plan, body.n, 10, 1.0), seed=self._live.settings.seed)
        return body

    def _adopt(self) -> bool:
        """Take over a newer body that another process has made and saved."""
        live = self._live
        info = self._snapshot_info()
        if info is None or info.generation <= live.generation or info.store_id != live.records.store_id:
            return False
        loaded = load_snapshot(live.snapshot_path, live.records, live.events)
        if loaded is None or not spot_check(loaded[0], live.records, live.settings.seed):
            return False
        body = loaded[0].body
        quality = measure(body, effort_for(body.plan, body.n, 10, live.settings.target_recall))
        if not quality.meets(live.settings.target_recall):
            return False
        with live.mutex:
            live.adopt(loaded[0], info.generation)
        self.quality = quality
        return True

    def _cause_to_compact(self, view: View) -> str | None:
        dead = view.body_dead + view.tail_dead
        if dead > max(DEAD_ROWS, DEAD_FRACTION * (view.body.n + view.tail_n)):
            return f"{dead} tombstones among {view.body.n + view.tail_n} rows"
        return None

    def _cause_to_append(self, view: View) -> str | None:
        waiting = view.tail_n - view.tail_dead
        if waiting > max(TAIL_ROWS, TAIL_FRACTION * view.body.n):
            return f"{waiting} rows wait in the tail"
        return None

    def _next_generation(self) -> int:
        info = self._snapshot_info()
        newest = info.generation if info and info.store_id == self._live.records.store_id else 0
        return max(newest, self._live.generation) + 1

    def _snapshot_info(self) -> SnapshotInfo | None:
        try:
            return read_info(self._live.snapshot_path)
        except SnapshotError:
            return None

    def _write_snapshot(self, body: Body, watermark: int) -> None:
        live = self._live
        if live.records.read_only:
            return
        info = SnapshotInfo(
            store_id=live.records.store_id,
            generation=live.generation,
            watermark=watermark,
            count=body.n,
            plan=body.plan,
            metric=body.metric,
            dim=body.dim,
            created_at=time.time(),
            seed=live.settings.seed,
            extra={},
        )
        try:
            write_snapshot(live.snapshot_path, body, info)
        except (OSError, StorageError, SnapshotError) as error:
            live.events.record("snapshot-failed", f"{error}; opening will be slower", level=logging.WARNING)

    def _purge(self) -> int:
        """Forget log entries that neither the snapshot nor a process a little behind still needs."""
        info = self._snapshot_info()
        upto = self._live.records.head().last_seq - LOG_KEPT
        if info is not None and info.store_id == self._live.records.store_id:
            upto = min(upto, info.watermark)
        return self._live.records.purge(upto)


def _silent(_stage: str, _share: float) -> None:
    return


@contextmanager
def _flock(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the maintenance lock of the store; yields False when it is taken and ``wait`` is off.

    On a read-only file system nobody else can write a snapshot either, so the lock is granted without a file.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield True
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)
