"""The smallest search parameter (knob) of a peer that reaches a recall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Choice", "calibrate"]


@dataclass(frozen=True)
class Choice:
    """knob: the setting; recall: what it reached where it was chosen; reached: whether that was the target."""

    knob: float
    recall: float
    reached: bool


def calibrate(
    knobs: Sequence[float], targets: Sequence[float], recall_of: Callable[[float], float]
) -> dict[float, Choice]:
    """Target to the smallest knob that reaches it; the best one, marked as not reaching it, when none does.

    Settings are tried from the smallest up and no further than the highest target needs.
    """
    seen: list[tuple[float, float]] = []
    for knob in sorted(knobs):
        seen.append((knob, recall_of(knob)))
        if seen[-1][1] >= max(targets):
            break
    return {target: chosen(seen, target) for target in targets}


def chosen(seen: Sequence[tuple[float, float]], target: float) -> Choice:
    for knob, recall in seen:
        if recall >= target:
            return Choice(knob, recall, True)
    knob, recall = max(seen, key=lambda one: one[1])
    return Choice(knob, recall, False)
