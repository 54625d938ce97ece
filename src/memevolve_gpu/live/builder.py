"""A body is built, judged, and only then believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import DeviceError, EngineError
from ..index.base import Body
from ..index.catalog import build
from ..training.calibration import calibrate
from ..training.collector import TrainingSet, source_for
from ..training.drift import list_balance
from ..training.judge import Pause, no_pause
from ..training.quality import Quality, measure, self_hits
from ..types import FloatArray, IndexPlan
from .asked import Asked
from .causes import Cause
from .draft import exact_body
from .facts import BodyFacts
from .rebuild import Gathered
from .settings import LiveSettings

__all__ = ["JUDGED_AT", "Built", "Collect", "build_verified", "extend_verified", "judged"]

Collect = Callable[[FloatArray], TrainingSet]

JUDGED_AT = 10
"""recall@k is judged at this k."""

MEASURED_AGAIN = 1.15
"""An extended body's recall is measured again when it has so many times the rows of the last measurement."""

FEW = 32
"""Queries to look at an extended body with; where they find too little it is judged like a new one."""


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
    asked: Asked,
    collect: Collect,
    progress: Callable[[str, float], None],
    pause: Pause = no_pause,
) -> Built:
    """The planned body if it proves itself, else an exact one that says why.

    Quantisers are taken over where rows were only added or removed; when the result falls short they are trained anew.
    asked: the real queries of the past, to calibrate on. collect: finds what to train on where the rows are too few.
    pause: called between pieces of work.

    Raises DeviceError when the plan's device refuses.
    """
    rows, old = gathered.rows, gathered.view
    if plan.kind == "exact" and plan.engine == "cpu":
        return Built(build(plan, rows, old.metric, seed=settings.seed), BodyFacts(), trained=False)
    fits = _quantiser(plan, plan.nlist) == _quantiser(old.body.plan, old.body.nlist) and plan.kind != "exact"
    refused = ""
    for like in [old.body, None] if cause.kind != "train" and fits else [None]:
        try:
            training = None if like is not None else _training(plan, rows.vectors, collect)
            body = build(plan, rows, old.metric, seed=settings.seed, training=training, like=like, progress=progress)
        except DeviceError:
            raise
        except EngineError as error:
            refused = f"cannot build {plan.kind}: {error}"
            continue
        for known in _known(old.facts, body, like):
            facts, quality = judged(body, known, asked, settings, pause)
            if quality.meets(settings.target_recall):
                return Built(body, replace(facts, by_request=cause.by_request), trained=like is None)
        refused = f"{plan.kind} fell short: {quality}"
    return Built(exact_body(rows, old.metric), BodyFacts(refused_rows=len(rows.slots)), trained=False, refused=refused)


def extend_verified(gathered: Gathered, settings: LiveSettings, asked: Asked, pause: Pause = no_pause) -> Built | None:
    """The body of the view with the gathered rows behind its own; None where it cannot have them, or is not good
    enough then. What is known of it is carried over; its new rows must find themselves.
    """
    old = gathered.view
    try:
        body = old.body.extended(gathered.rows)
    except EngineError:
        return None
    if body is None or body is old.body or (body.kind == "exact" and body.plan.engine == "cpu"):
        return None if body is None else Built(body, old.facts, trained=False)
    if body.kind == "exact":  # on a device, whose numbers are narrower than those that decide
        facts, quality = _looked_at(body, old.facts, old.body.n, settings)
        return Built(body, facts, trained=False) if quality.meets(settings.target_recall) else None
    for known in _known(old.facts, body, old.body):
        if known.calibration is not None:
            facts, quality = _looked_at(body, replace(known, quality=old.facts.quality), old.body.n, settings)
        else:
            facts, _ = judged(body, known, asked, settings, pause)
            facts, quality = _looked_at(body, facts, old.body.n, settings)
        if quality.meets(settings.target_recall):
            return Built(body, facts, trained=False)
    return None


def _looked_at(body: Body, known: BodyFacts, start: int, settings: LiveSettings) -> tuple[BodyFacts, Quality]:
    """How an extended body does: rows from ``start`` on find themselves, and recall, where it grew much since."""
    effort = known.effort(body, JUDGED_AT, settings.target_recall)
    hits = self_hits(body, effort, start=start, queries=FEW, seed=settings.seed)
    held = known.quality
    if held is None or body.n > MEASURED_AGAIN * known.measured_rows:
        held = measure(body, effort, k=JUDGED_AT, queries=FEW, seed=settings.seed)
        known = replace(known, measured_rows=body.n)
    quality = replace(held, self_hit=hits)
    return replace(known, quality=quality), quality


def _quantiser(plan: IndexPlan, nlist: int) -> tuple[object, ...]:
    """What two bodies must have in common so that one can take over the other's quantisers."""
    return plan.kind, plan.engine, plan.device, nlist, plan.codes


def _training(plan: IndexPlan, vectors: FloatArray, collect: Collect) -> FloatArray | None:
    """What to train on beside the rows themselves (None): service samples where the rows are too few.

    Raises EngineError when too few of the samples could be had.
    """
    if plan.kind in ("exact", "hnsw") or source_for(len(vectors)) == "existing":
        return None
    found = collect(vectors)
    if not found.usable:
        raise EngineError(found.reason)
    return found.vectors


def judged(
    body: Body, known: BodyFacts, asked: Asked, settings: LiveSettings, pause: Pause = no_pause
) -> tuple[BodyFacts, Quality]:
    """Calibrate the body, unless that is known, and see how it does at the effort that searches will use then.

    A scan on a device has nothing to calibrate, but it is judged: its numbers are narrower than those that decide.
    """
    if known.calibration is None and body.kind != "exact":
        fresh = calibrate(body, asked.sample(), seed=settings.seed, pause=pause)
        known = replace(known, calibration=fresh, calibrated_rows=body.n, asked=asked.seen)
    effort = known.effort(body, JUDGED_AT, settings.target_recall)
    quality = measure(body, effort, k=JUDGED_AT, seed=settings.seed, pause=pause)
    return replace(known, quality=quality, measured_rows=body.n), quality


def _known(facts: BodyFacts, body: Body, like: Body | None) -> list[BodyFacts]:
    """What to start from: the calibration that came with the quantisers, then nothing."""
    balance = list_balance(body.list_sizes)
    if body.kind == "exact":
        return [BodyFacts()]
    if like is None:
        return [BodyFacts(body.n, balance, balance)]
    trained = BodyFacts(facts.trained_rows, facts.trained_balance, balance)
    carried = facts.carried_to(body)
    return [trained] if carried is None else [replace(carried, balance=balance), trained]
