"""Decide from statistics whether the data has drifted away from the index's training set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..planner.nlist import should_recreate

__all__ = ["Balance", "Now", "Trained", "list_balance", "needs_retraining"]

GROWTH = 2.0
"""Times the rows of the training from which the centroids are considered those of another store."""
IMBALANCE_GROWTH = 1.5
"""A probed list is chosen about as often as it is long, so this factor is also that of the codes read per search."""
EMPTY_GROWTH = 0.25
RECALL_MARGIN = 0.01
REMOVED_SHARE = 0.3
"""Of the trained rows, removed by management: whole topics may be gone."""


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly rows lie in lists.

    ``imbalance_factor`` as faiss defines it, nlist * sum(size**2) / sum(size)**2: 1 for equal lists, nlist when one
    holds everything (1.1 to 1.4 on real embeddings by the rule for nlist). ``empty_share``: lists without rows.
    """

    imbalance_factor: float = 1.0
    empty_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Trained:
    """What was so when the index was trained: its rows, its lists (0 where none), their balance, and the recall that
    was measured then (None where it was not)."""

    rows: int
    nlist: int = 0
    balance: Balance = Balance()
    recall: float | None = None


@dataclass(frozen=True, slots=True)
class Now:
    """What is so now: live units, the lists that the plan asks for, their balance and the recall last probed (None
    where not measured), and the units that management has removed since the training."""

    units: int
    planned_nlist: int = 0
    balance: Balance | None = None
    recall: float | None = None
    removed: int = 0


def list_balance(sizes: npt.ArrayLike) -> Balance:
    """The balance of lists of these sizes, (nlist,) integers; no lists, or none but empty ones, count as even."""
    held = np.asarray(sizes, dtype=np.float64)
    total = float(held.sum())
    if total <= 0:
        return Balance(1.0, 1.0 if held.size else 0.0)
    return Balance(held.size * float((held * held).sum()) / (total * total), float(np.mean(held == 0)))


def needs_retraining(trained: Trained, now: Now, target_recall: float) -> str | None:
    """Why the centroids should be trained anew, in words; None when they still serve.

    Every rule compares with what was so at the training, so a training cures its own cause: data that is uneven by
    nature, such as copies of one vector, or queries that no training serves, do not ask for it again and again.
    """
    rules = (
        _lists_off(trained, now),
        _grown(trained, now),
        _removed(trained, now),
        _unbalanced(trained, now),
        _recall_fell(trained, now, target_recall),
    )
    return next((reason for reason in rules if reason), None)


def _lists_off(trained: Trained, now: Now) -> str | None:
    if trained.nlist and now.planned_nlist and should_recreate(trained.nlist, now.planned_nlist):
        return f"nlist {trained.nlist} is off the planned {now.planned_nlist} by 25 % or more"
    return None


def _grown(trained: Trained, now: Now) -> str | None:
    if trained.rows and now.units >= GROWTH * trained.rows:
        return f"{now.units} units have come of the {trained.rows} that it was trained on"
    return None


def _removed(trained: Trained, now: Now) -> str | None:
    if now.removed and now.removed >= REMOVED_SHARE * trained.rows:
        return f"management has removed {now.removed} units, {trained.rows} were there at the training"
    return None


def _unbalanced(trained: Trained, now: Now) -> str | None:
    if now.balance is None or not trained.nlist:
        return None
    was, held = trained.balance, now.balance
    if held.imbalance_factor >= IMBALANCE_GROWTH * was.imbalance_factor:
        return f"list imbalance has grown from {was.imbalance_factor:.2f} to {held.imbalance_factor:.2f}"
    if held.empty_share >= was.empty_share + EMPTY_GROWTH:
        return f"{held.empty_share:.0%} of the lists are empty, {was.empty_share:.0%} were at the training"
    return None


def _recall_fell(trained: Trained, now: Now, target_recall: float) -> str | None:
    if now.recall is None:
        return None
    promised = target_recall if trained.recall is None else min(target_recall, trained.recall)
    if now.recall < promised - RECALL_MARGIN:
        return f"probed recall {now.recall:.3f} has fallen below {promised:.3f}"
    return None
