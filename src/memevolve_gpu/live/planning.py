"""The plan for a view: its size, the settings, and what is known of the device, put to the planner."""

from __future__ import annotations

from dataclasses import replace

from ..errors import CapacityError
from ..planner.plan import plan_index
from ..types import IndexPlan
from .live import LiveIndex
from .view import View

__all__ = ["planned"]


def planned(live: LiveIndex, view: View, early: bool = False) -> IndexPlan:
    """What the store should have; what it has where nothing else fits into memory. ``early``: however few units."""
    settings, facts = live.settings, live.desk.facts(view.count, view.body)
    try:
        plan = plan_index(
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
            device=facts,
        )
    except CapacityError as error:
        return replace(view.body.plan, reason=f"kept as it is: {error}", refusal="")
    live.desk.note(plan, facts)
    missing = live.desk.absence() if facts is None else ""
    if not missing:
        return plan
    note = f"{missing}; the CPU instead"
    return replace(plan, reason=f"{plan.reason}; {note}", notes=(*plan.notes, note))
