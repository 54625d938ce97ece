"""A body is built, judged, and only then believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import EngineError
from ..index.base import Body
from ..index.catalog import build
from ..planner.effort import effort_for
from ..training.quality import Quality, measure
from ..types import IndexPlan
from .causes import Cause
from .draft import exact_body
from .facts import BodyFacts
from .rebuild import Gathered
from .settings import LiveSettings

__all__ = ["Built", "build_verified", "judged"]

JUDGED_AT = 10
"""recall@k is judged at this k."""


@dataclass(frozen=True, slots=True)
class Built:
    """trained: new quantisers were trained; refused: why the planned kind was not good enough, else empty."""

    body: Body
    facts: BodyFacts
    trained: bool
    refused: str = ""


def build_verified(
    plan: IndexPlan,
    gathered: Gathered,
    cause: Cause,
    settings: LiveSettings,
    progress: Callable[[str, float], None],
) -> Built:
    """The planned body if it proves itself, else an exact one that says why.

    Quantisers are taken over where rows were only added or removed; when the result falls short they are trained anew.
    """
    rows, old = gathered.rows, gathered.view
    if plan.kind == "exact":
        return Built(exact_body(rows, old.metric), BodyFacts(), trained=False)
    fits = plan.kind == old.body.kind and plan.nlist == old.body.nlist and plan.codes == old.body.plan.codes
    refused = ""
    for like in [old.body, None] if cause.kind != "train" and fits else [None]:
        try:
            body = build(plan, rows, old.metric, seed=settings.seed, like=like, progress=progress)
        except EngineError as error:
            refused = f"cannot build {plan.kind}: {error}"
            continue
        quality = judged(body, settings)
        if quality.meets(settings.target_recall):
            trained_rows = body.n if like is None else old.facts.trained_rows
            return Built(body, BodyFacts(trained_rows, quality=quality), trained=like is None)
        refused = f"{plan.kind} fell short: self-hit {quality.self_hit:.3f}, recall@10 {quality.recall:.3f}"
    return Built(exact_body(rows, old.metric), BodyFacts(refused_rows=len(rows.slots)), trained=False, refused=refused)


def judged(body: Body, settings: LiveSettings) -> Quality:
    """How the body does at the effort that searches will use."""
    effort = effort_for(body.plan, body.n, JUDGED_AT, settings.target_recall)
    return measure(body, effort, k=JUDGED_AT, seed=settings.seed)
