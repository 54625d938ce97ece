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
    "DELTA_FRACTION",
    "QUIET_ROWS",
    "AppendThrottle",
    "RebuildReason",
    "cause_to_build",
    "delta_limit",
    "is_extendable",
    "quiet_limit",
]

DELTA_ROWS, DELTA_SHARE, DELTA_MOST = 2048, 1 / 512, 8192
"""Rows that may wait in the delta buffer: a share of the index, within bounds.

Each row that waits costs each search about 40 ns (384 dimensions, one thread: 0.06 ms for 2,048, 0.34 ms for 8,192).
An append costs some 25 microseconds for each row, whenever it is made, and 0.15 microseconds for each row of the index
(0.05 s at 300,000), which larger tails would share out: the sum is least near 1,000 waiting rows at ten searches a
write, and near 3,000 at one, for a million rows, and moves with the root of the index's size.
"""

DELTA_FRACTION = 0.25
"""The same where an append is dear: on a device, and while a bulk load is running."""

QUIET_ROWS = 1024
"""Rows that may wait while nobody writes."""

DELTA_MOST_ON_DEVICE = 32_768
"""On a device an append copies the whole index once, there (torch) or from the host (faiss). The delta buffer, 50 MB at
384 dimensions, is scanned by the torch engine on the device, and beside faiss by the host, in 2 ms."""

DEAD_FRACTION, DEAD_ROWS = 0.15, 256
"""Tombstones that may stay."""

RETRY_GROWTH = 0.25
"""After a refused build the store must change by this much before another is tried: never a retrain loop."""


@dataclass(frozen=True, slots=True)
class RebuildReason:
    """train: new quantisers; append: the index's own quantisers over more rows; compact: over fewer."""

    kind: Literal["train", "append", "compact"]
    text: str
    by_request: bool = False
    """Somebody wants an index although the units are few, and pays for samples to train it on."""


def cause_to_build(
    view: View, plan: IndexPlan, min_training_units: int, *, quiet: bool = False
) -> RebuildReason | None:
    """Why a new index is due; None when the present one serves. ``quiet``: nobody writes, so less need wait."""
    if view.stats.by_request and plan.kind == "exact":
        plan = view.index.plan
    if _too_early(view, min_training_units) or _refused_lately(view):
        return _to_compact(view) or _to_append(view, quiet)
    return _to_train(view, plan) or _to_compact(view) or _to_append(view, quiet)


def delta_limit(view: View) -> int:
    """Rows that may wait in the delta buffer of the view's index."""
    if view.index.plan.engine != "cpu":
        return max(DELTA_ROWS, min(int(DELTA_FRACTION * view.index.n), DELTA_MOST_ON_DEVICE))
    return max(DELTA_ROWS, min(int(DELTA_SHARE * view.index.n), DELTA_MOST))


def is_extendable(view: View) -> bool:
    """Do so many rows wait that scanning them costs searches more than putting them behind a trained index does?"""
    return view.delta_n > delta_limit(view) and view.index.kind != "exact"


def quiet_limit(view: View) -> int:
    """Rows that may wait while nobody writes; an index on a device is not built anew for a few."""
    return QUIET_ROWS if view.index.plan.engine == "cpu" else delta_limit(view)


def _too_early(view: View, min_training_units: int) -> bool:
    return view.count < min_training_units and view.index.kind == "exact"


def _refused_lately(view: View) -> bool:
    refused = view.stats.refused_rows
    return refused > 0 and abs(view.count - refused) <= RETRY_GROWTH * refused


def _to_train(view: View, plan: IndexPlan) -> RebuildReason | None:
    held, stats = view.index.plan, view.stats
    if plan.kind != held.kind:
        return RebuildReason("train", f"{held.kind} gives way to {plan.kind}: {plan.reason}")
    if (plan.engine, plan.device) != (held.engine, held.device):
        places = [f"{one.engine} on {one.device}" if one.device != "cpu" else "the CPU" for one in (held, plan)]
        return RebuildReason("train", f"{places[0]} gives way to {places[1]}: {plan.reason}")
    if plan.precision != held.precision and out_of_range(plan.precision) not in held.notes:
        return RebuildReason("train", f"precision {held.precision} gives way to {plan.precision}")
    if not stats.trained_rows:
        return None
    trained = Trained(stats.trained_rows, view.index.nlist, stats.trained_balance)
    reason = needs_retraining(trained, Now(view.count, plan.nlist, stats.balance), target_recall=1.0)
    return None if reason is None else RebuildReason("train", reason)


def _to_compact(view: View) -> RebuildReason | None:
    dead, rows = view.index_dead + view.delta_dead, view.index.n + view.delta_n
    if dead > max(DEAD_ROWS, DEAD_FRACTION * rows):
        return RebuildReason("compact", f"{dead} tombstones among {rows} rows")
    return None


def _to_append(view: View, quiet: bool) -> RebuildReason | None:
    """Rows that died in the delta buffer count too: they are scanned, and take memory, until the delta buffer is
    emptied."""
    if view.delta_n > (quiet_limit(view) if quiet else delta_limit(view)):
        return RebuildReason("append", f"{view.delta_n} rows wait in the tail")
    return None


QUIET_SECONDS = 2.0
"""So long without a write counts as a rest."""

SHARE = 0.05
"""Of the time that appending may take while others write, as long as the delta buffer is below a quarter of the
index."""


class AppendThrottle:
    """Keeps one store's appends apart. A running bulk load fills the delta buffer; what one append costs is then paid
    once for many batches."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self._watermark = -1
        self._changed = self._next = clock()

    def appended(self, seconds: float) -> None:
        """An append has just ended that took so long."""
        self._next = self._clock() + seconds / SHARE

    def delay(self, view: View) -> float | None:
        """Seconds until the delta buffer of an up-to-date view may be appended, 0.0 for now; None when it need not
        be."""
        now = self._clock()
        if view.watermark != self._watermark:
            self._watermark, self._changed = view.watermark, now
        if view.delta_n <= quiet_limit(view):
            return None
        rest = max(0.0, self._changed + QUIET_SECONDS - now)
        if view.delta_n <= delta_limit(view):
            return rest
        if view.delta_n > DELTA_FRACTION * view.index.n:
            return 0.0
        return min(rest, max(0.0, self._next - now))

    def is_quiet(self) -> bool:
        """Had nobody written for a while when ``delay`` was last asked?"""
        return self._clock() - self._changed >= QUIET_SECONDS
