"""When maintenance acts: the rules for a rebuild, and the scheduler that decides what to do next."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..index.base import out_of_range
from ..planner.nlist import should_recreate
from ..types import IndexPlan
from ..utils.backoff import Backoff
from ..utils.forking import renew_in_child
from .index_stats import IndexStats
from .view import View

DELTA_ROWS, DELTA_SHARE, DELTA_MOST = 2048, 1 / 512, 8192
"""Rows that may wait in the delta buffer: a share of the index, within bounds.

Each waiting row costs each search about 40 ns (384 dimensions, one thread: 0.06 ms for 2,048 rows, 0.34 ms for
8,192). An append costs about 25 microseconds per appended row and 0.15 microseconds per row of the index (0.05 s at
300,000). For a million rows the sum is least near 1,000 waiting rows at ten searches per write, and near 3,000 at one;
the optimum grows with the square root of the index's size.
"""

DELTA_FRACTION = 0.25
"""The same share where an append is expensive: on a device, and during a bulk load."""

QUIET_ROWS = 1024
"""Rows that may wait while there are no writes."""

DELTA_MOST_ON_DEVICE = 32_768
"""On a device an append copies the whole index once: on the device (torch) or from the host (faiss). The delta buffer,
50 MB at 384 dimensions, is scanned on the device by the torch engine, and in 2 ms on the host beside faiss."""

GROWTH = 2.0
"""Train again when the rows are this many times those of the training."""

IMBALANCE_GROWTH, EMPTY_GROWTH = 1.5, 0.25
"""Train again when the imbalance of the lists has grown by this factor, or their empty share by this much. A list is
probed about as often as it is long, so the codes read per search grow by the first factor too."""

DEAD_FRACTION, DEAD_ROWS = 0.15, 256
"""Tombstones that may stay: a share of the rows, and at least this many."""

RETRY_GROWTH = 0.25
"""After a refused build, or training for low recall, the store must change by this share before another, so that it
does not retrain in a loop."""


@dataclass(frozen=True, slots=True)
class RebuildReason:
    """Why an index is rebuilt.

    kind: "train" for new quantisers, "append" to keep the quantisers over more rows, "compact" over fewer rows.
    """

    kind: Literal["train", "append", "compact"]
    text: str
    by_request: bool = False
    """The caller requests an index although there are few units, and pays for samples to train it."""
    can_wait: bool = False
    """The index in use finds as much, only its number of lists is not the planned one."""


def rebuild_reason(
    view: View, plan: IndexPlan, min_training_units: int, *, quiet: bool = False, later: bool = False
) -> RebuildReason | None:
    """Why a new index is due; None when the one in use is good. ``quiet``: no writes, so fewer rows may wait.
    ``later``: leave out what can wait."""
    if view.stats.by_request and plan.kind == "exact":
        plan = view.index.plan
    refused = view.stats.refused_rows
    too_few = view.count < min_training_units and view.index.kind == "exact"
    refused_lately = refused > 0 and abs(view.count - refused) <= RETRY_GROWTH * refused
    reason = None if too_few or refused_lately else _to_train(view, plan)
    if reason is not None and not (later and reason.can_wait):
        return reason
    dead, rows = view.index_dead + view.delta_dead, view.index.n + view.delta_n
    if dead > max(DEAD_ROWS, DEAD_FRACTION * rows):
        return RebuildReason("compact", f"{dead} tombstones among {rows} rows")
    # Dead rows in the delta buffer count too: they are scanned, and take memory, until it is emptied.
    if view.delta_n > (quiet_limit(view) if quiet else delta_limit(view)):
        return RebuildReason("append", f"{view.delta_n} rows wait in the delta buffer")
    return None


def delta_limit(view: View) -> int:
    """Rows that may wait in the delta buffer of the view's index."""
    if view.index.plan.engine != "cpu":
        return max(DELTA_ROWS, min(int(DELTA_FRACTION * view.index.n), DELTA_MOST_ON_DEVICE))
    return max(DELTA_ROWS, min(int(DELTA_SHARE * view.index.n), DELTA_MOST))


def is_extendable(view: View) -> bool:
    """Whether enough rows wait to append them to a trained index now."""
    return view.delta_n > delta_limit(view) and view.index.kind != "exact"


def quiet_limit(view: View) -> int:
    """Rows that may wait while there are no writes; an index on a device is not copied for a few."""
    return QUIET_ROWS if view.index.plan.engine == "cpu" else delta_limit(view)


def _to_train(view: View, plan: IndexPlan) -> RebuildReason | None:
    used, stats = view.index.plan, view.stats
    if plan.kind != used.kind:
        return RebuildReason("train", f"{used.kind} is replaced by {plan.kind}: {plan.reason}")
    if (plan.engine, plan.device) != (used.engine, used.device):
        places = [f"{one.engine} on {one.device}" if one.device != "cpu" else "the CPU" for one in (used, plan)]
        return RebuildReason("train", f"{places[0]} is replaced by {places[1]}: {plan.reason}")
    if plan.precision != used.precision and out_of_range(plan.precision) not in used.notes:
        return RebuildReason("train", f"precision {used.precision} is replaced by {plan.precision}")
    nlist = view.index.nlist
    drift = _drift(view.count, nlist, stats) if stats.trained_rows else ""
    if drift:
        return RebuildReason("train", drift)
    if stats.trained_rows and nlist and plan.nlist and should_recreate(nlist, plan.nlist):
        text = f"nlist {nlist} is off the planned {plan.nlist} by 25 % or more"
        return RebuildReason("train", text, can_wait=True)
    return None


def _drift(count: int, nlist: int, stats: IndexStats) -> str:
    """How far the data has moved away from what the quantisers were trained on; empty where they are still good.

    Each rule compares with the state at the training. Training therefore removes its own cause: data that is uneven by
    nature, such as copies of one vector, does not lead to it again.
    """
    was, now = stats.trained_balance, stats.balance
    if count >= GROWTH * stats.trained_rows:
        return f"there are {count} units, and the index was trained on {stats.trained_rows}"
    if nlist and now.imbalance_factor >= IMBALANCE_GROWTH * was.imbalance_factor:
        return f"list imbalance has grown from {was.imbalance_factor:.2f} to {now.imbalance_factor:.2f}"
    if nlist and now.empty_share >= was.empty_share + EMPTY_GROWTH:
        return f"{now.empty_share:.0%} of the lists are empty, {was.empty_share:.0%} were at the training"
    return ""


QUIET_SECONDS = 2.0
"""Seconds without a write after which the store counts as quiet."""

SHARES = {"append": 0.05, "probe": 0.01, "train": 0.02}
"""Share of the time that the background may spend on appending during writes, while the delta buffer is below a quarter
of the index, on comparing answers to real queries with exact search, and on training that can wait."""

LOOK_EVERY, LOOK_AT_LEAST_EVERY = 16, 512
"""Log entries after which the rules are evaluated again; a hundredth of the units within these bounds."""

RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 30.0
"""Wait before the next try while another thread or process runs a round."""


class Spent(NamedTuple):
    """An event: the background has just spent ``seconds`` on this work."""

    work: Literal["append", "probe", "train"]
    seconds: float


Event = Literal["written", "queries", "device", "rebuilding", "skipped"] | RebuildReason | Spent
"""What the scheduler learns of.

written: rows were committed, here or by another process.
queries: enough searches were answered to check the calibration.
device: the device should be looked at.
rebuilding: a rebuild starts, which answers every request so far.
skipped: a round could not run because another one is running.
RebuildReason: a rebuild is requested, whatever the rules say.
"""


@dataclass(frozen=True, slots=True)
class Action:
    """delay: seconds until a round is due, 0.0 for now, None for none until the next event; quiet: no recent writes."""

    delay: float | None
    quiet: bool = False


class MaintenanceScheduler:
    """Decides when a store needs a round of maintenance: ``notify`` takes in events, ``next_action`` decides.

    A bulk load fills the delta buffer continuously. Appends are therefore kept apart while writes go on, so that the
    cost of one append is shared by many batches.
    """

    def __init__(
        self,
        plan: Callable[[View], IndexPlan],
        min_training_units: int,
        log_is_long: Callable[[], bool],
        device_needs_look: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with nothing noted.

        Args:
            plan: the index that a view should have.
            min_training_units: MIN_TRAINING_UNITS.
            log_is_long: whether the log should be purged.
            device_needs_look: whether a round should look at the device; making a plan may set this.
            clock: returns seconds.
        """
        self._plan, self._min_training_units = plan, min_training_units
        self._log_is_long, self._device_needs_look = log_is_long, device_needs_look
        self._clock = clock
        self._retry = Backoff(RETRY_SECONDS, LONGEST_RETRY_SECONDS, clock)
        self._requested: RebuildReason | None = None
        self._pending: set[str] = set()
        """Events that the next round answers; the background was woken for them."""
        self._look_at = 0
        """The watermark from which the rules are evaluated again."""
        self._watermark, self._written_at = -1, clock()
        self._not_before: defaultdict[str, float] = defaultdict(float)
        renew_in_child(self)

    def notify(self, event: Event, view: View) -> bool:
        """Note an event; return whether it may have made a round due, so that ``next_action`` is worth asking."""
        if view.watermark != self._watermark:
            self._watermark, self._written_at = view.watermark, self._clock()
        if isinstance(event, RebuildReason):
            self._requested = event
            return True
        if isinstance(event, Spent):
            self._not_before[event.work] = self._clock() + event.seconds / SHARES[event.work]
        elif event == "written" and view.watermark >= self._look_at:
            self._look_at = view.watermark + max(LOOK_EVERY, min(view.count // 100, LOOK_AT_LEAST_EVERY))
            return True
        elif event == "rebuilding":
            self._requested = None
        elif event == "skipped":
            self._retry.failed()
        elif event in ("queries", "device"):
            known = event in self._pending
            self._pending.add(event)
            return event == "queries" or not known
        return False

    def next_action(self, view: View) -> Action:
        """What to do about an up-to-date view. Changes nothing."""
        quiet = self._clock() - self._written_at >= QUIET_SECONDS
        if self._retry.remaining:
            return Action(self._retry.remaining, quiet)
        reason, later = self.reason(view), max(0.0, self._not_before["train"] - self._clock())
        waits = later if reason is not None and reason.can_wait and later else None
        if waits is not None:
            reason = self.reason(view, patient=True)
        is_due = (
            (reason is not None and reason.kind != "append")
            or self._device_needs_look()
            or ("queries" in self._pending and view.stats.calibration is not None)
            or self._log_is_long()
        )
        delays = [delay for delay in (waits, self.append_delay(view)) if delay is not None]
        return Action(0.0 if is_due else min(delays, default=None), quiet)

    def reason(self, view: View, *, quiet: bool = False, patient: bool = False) -> RebuildReason | None:
        """Why a new index is due; None when the one in use is good. ``quiet``: no writes, so fewer rows may wait.
        ``patient``: a training that can wait does, until its share of the time is not used up."""
        if self._requested is not None and view.stats.trained_rows:
            return self._requested
        later = patient and self._clock() < self._not_before["train"]
        return rebuild_reason(view, self._plan(view), self._min_training_units, quiet=quiet, later=later)

    def append_delay(self, view: View) -> float | None:
        """Seconds until the waiting rows of an up-to-date view may be appended; None when they may stay."""
        now = self._clock()
        if view.delta_n <= quiet_limit(view):
            return None
        until_quiet = max(0.0, self._written_at + QUIET_SECONDS - now)
        if view.delta_n <= delta_limit(view):
            return until_quiet
        if view.delta_n > DELTA_FRACTION * view.index.n:
            return 0.0
        return min(until_quiet, max(0.0, self._not_before["append"] - now))

    def may_probe(self) -> bool:
        """Whether the background may spend time on a recall probe now."""
        return self._clock() >= self._not_before["probe"]

    @contextmanager
    def round(self) -> Iterator[None]:
        """Run a round that answers the pending events; they stay pending if it fails."""
        answered, self._pending = self._pending, set()
        try:
            yield
        except BaseException:
            self._pending |= answered
            raise
        self._retry.reset()

    def after_fork(self) -> None:
        """In a forked child: the parent's background answers the parent's events; evaluate the rules again."""
        self._pending, self._look_at = set(), 0
