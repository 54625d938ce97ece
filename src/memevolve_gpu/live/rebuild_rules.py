"""When a rebuild is due: rules over a view, its plan and its index statistics, and when appends may run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..index.base import out_of_range
from ..training.retrain_rules import Now, Trained, needs_retraining
from ..types import IndexPlan
from .view import View

__all__ = [
    "QUIET_ROWS",
    "TAIL_FRACTION",
    "Cause",
    "Pace",
    "cause_to_build",
    "is_extendable",
    "quiet_limit",
    "tail_limit",
]

TAIL_ROWS, TAIL_SHARE, TAIL_MOST = 2048, 1 / 512, 8192
"""Rows that may wait in the tail: a share of the body, within bounds.

Each row that waits costs each search about 40 ns (384 dimensions, one thread: 0.06 ms for 2,048, 0.34 ms for 8,192).
An append costs some 25 microseconds for each row, whenever it is made, and 0.15 microseconds for each row of the body
(0.05 s at 300,000), which larger tails would share out: the sum is least near 1,000 waiting rows at ten searches a
write, and near 3,000 at one, for a million rows, and moves with the root of the body's size.
"""

TAIL_FRACTION = 0.25
"""The same where an append is dear: on a device, and while a bulk load is running."""

QUIET_ROWS = 1024
"""Rows that may wait while nobody writes."""

TAIL_MOST_ON_DEVICE = 32_768
"""On a device an append copies the whole body once, there (torch) or from the host (faiss). The tail, 50 MB at 384
dimensions, is scanned by the torch engine on the device, and beside faiss by the host, in 2 ms."""

DEAD_FRACTION, DEAD_ROWS = 0.15, 256
"""Tombstones that may stay."""

RETRY_GROWTH = 0.25
"""After a refused build the store must change by this much before another is tried: never a retrain loop."""


@dataclass(frozen=True, slots=True)
class Cause:
    """train: new quantisers; append: the body's own quantisers over more rows; compact: over fewer."""

    kind: Literal["train", "append", "compact"]
    text: str
    by_request: bool = False
    """Somebody wants an index although the units are few, and pays for samples to train it on."""


def cause_to_build(view: View, plan: IndexPlan, min_training_units: int, *, quiet: bool = False) -> Cause | None:
    """Why a new body is due; None when the present one serves. ``quiet``: nobody writes, so less need wait."""
    if view.facts.by_request and plan.kind == "exact":
        plan = view.body.plan
    if _too_early(view, min_training_units) or _refused_lately(view):
        return _to_compact(view) or _to_append(view, quiet)
    return _to_train(view, plan) or _to_compact(view) or _to_append(view, quiet)


def tail_limit(view: View) -> int:
    """Rows that may wait in the tail of the view's body."""
    if view.body.plan.engine != "cpu":
        return max(TAIL_ROWS, min(int(TAIL_FRACTION * view.body.n), TAIL_MOST_ON_DEVICE))
    return max(TAIL_ROWS, min(int(TAIL_SHARE * view.body.n), TAIL_MOST))


def is_extendable(view: View) -> bool:
    """Do so many rows wait that scanning them costs searches more than putting them behind a trained body does?"""
    return view.tail_n > tail_limit(view) and view.body.kind != "exact"


def quiet_limit(view: View) -> int:
    """Rows that may wait while nobody writes; a body on a device is not built anew for a few."""
    return QUIET_ROWS if view.body.plan.engine == "cpu" else tail_limit(view)


def _too_early(view: View, min_training_units: int) -> bool:
    return view.count < min_training_units and view.body.kind == "exact"


def _refused_lately(view: View) -> bool:
    refused = view.facts.refused_rows
    return refused > 0 and abs(view.count - refused) <= RETRY_GROWTH * refused


def _to_train(view: View, plan: IndexPlan) -> Cause | None:
    held, facts = view.body.plan, view.facts
    if plan.kind != held.kind:
        return Cause("train", f"{held.kind} gives way to {plan.kind}: {plan.reason}")
    if (plan.engine, plan.device) != (held.engine, held.device):
        places = [f"{one.engine} on {one.device}" if one.device != "cpu" else "the CPU" for one in (held, plan)]
        return Cause("train", f"{places[0]} gives way to {places[1]}: {plan.reason}")
    if plan.precision != held.precision and out_of_range(plan.precision) not in held.notes:
        return Cause("train", f"precision {held.precision} gives way to {plan.precision}")
    if not facts.trained_rows:
        return None
    trained = Trained(facts.trained_rows, view.body.nlist, facts.trained_balance)
    reason = needs_retraining(trained, Now(view.count, plan.nlist, facts.balance), target_recall=1.0)
    return None if reason is None else Cause("train", reason)


def _to_compact(view: View) -> Cause | None:
    dead, rows = view.body_dead + view.tail_dead, view.body.n + view.tail_n
    if dead > max(DEAD_ROWS, DEAD_FRACTION * rows):
        return Cause("compact", f"{dead} tombstones among {rows} rows")
    return None


def _to_append(view: View, quiet: bool) -> Cause | None:
    """Rows that died in the tail count too: they are scanned, and take memory, until the tail is emptied."""
    if view.tail_n > (quiet_limit(view) if quiet else tail_limit(view)):
        return Cause("append", f"{view.tail_n} rows wait in the tail")
    return None


QUIET_SECONDS = 2.0
"""So long without a write counts as a rest."""

SHARE = 0.05
"""Of the time that appending may take while others write, as long as the tail is below a quarter of the body."""


class Pace:
    """Keeps one store's appends apart. A running bulk load fills the tail; what one append costs is then paid once for
    many batches."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self._watermark = -1
        self._changed = self._next = clock()

    def appended(self, seconds: float) -> None:
        """An append has just ended that took so long."""
        self._next = self._clock() + seconds / SHARE

    def delay(self, view: View) -> float | None:
        """Seconds until the tail of an up-to-date view may be appended, 0.0 for now; None when it need not be."""
        now = self._clock()
        if view.watermark != self._watermark:
            self._watermark, self._changed = view.watermark, now
        if view.tail_n <= quiet_limit(view):
            return None
        rest = max(0.0, self._changed + QUIET_SECONDS - now)
        if view.tail_n <= tail_limit(view):
            return rest
        if view.tail_n > TAIL_FRACTION * view.body.n:
            return 0.0
        return min(rest, max(0.0, self._next - now))

    def is_quiet(self) -> bool:
        """Had nobody written for a while when ``delay`` was last asked?"""
        return self._clock() - self._changed >= QUIET_SECONDS
