"""Rebuild an index beside the old one: gather rows, build, evaluate, and swap with what changed meanwhile."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import DeviceError, EngineError
from ..index.base import Body
from ..index.registry import build
from ..index.vector_table import lengthened, roomy
from ..training.calibration import calibrate
from ..training.recall import Pause, Quality, measure, no_pause, self_hits
from ..training.retrain_rules import list_balance
from ..training.training_set import TrainingSet, source_for
from ..types import FloatArray, IndexPlan, IntArray, Rows
from .delta_buffer import Tail
from .index_stats import BodyFacts
from .live_index import LiveSettings
from .query_sample import Asked
from .rebuild_rules import Cause
from .view import View
from .view_builder import exact_body

__all__ = [
    "JUDGED_AT",
    "Built",
    "Collect",
    "Gathered",
    "build_verified",
    "extend_verified",
    "gather",
    "gather_tail",
    "judged",
    "swapped",
]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Rows of ``view`` in slot order, and where each row of the body that they make comes from: body positions, then
    tail positions."""

    view: View
    rows: Rows
    from_body: IntArray | slice
    from_tail: IntArray


def gather(view: View) -> Gathered:
    """The living rows of a view. Body slots are all older than tail slots, so the order is kept.

    Where no row of the body has died they share its memory, if it is not a graph; else they are a copy.
    """
    from_body = np.flatnonzero(view.body_died > view.watermark).astype(np.int64)
    living = _living(view)
    if len(from_body) == view.body.n and _may_grow(view.body):
        vectors = lengthened(view.body.vectors, living.count)
    else:
        vectors = roomy((len(from_body) + living.count, view.body.dim), np.float32)
        vectors[: len(from_body)] = view.body.vectors_at(from_body)
    living.put(vectors[len(from_body) :])
    slots = np.concatenate([view.body.slots[from_body], living.slots])
    id_bytes, id_ends = _joined_ids(view, from_body, living.positions)
    return Gathered(view, Rows(slots, id_bytes, id_ends, vectors), from_body, living.positions)


def gather_tail(view: View) -> Gathered:
    """The living rows of a view's tail, to be put behind all rows of its body, those that died included."""
    body, living = view.body, _living(view)
    if _may_grow(body):
        vectors = lengthened(body.vectors, living.count)[body.n :]
    else:
        vectors = np.empty((living.count, body.dim), np.float32)
    living.put(vectors)
    rows = Rows(living.slots, *_tail_ids(view, living.positions), vectors)
    return Gathered(view, rows, slice(0, body.n), living.positions)


@dataclass(frozen=True, slots=True)
class _Living:
    """The living rows of a tail: their slots and positions, int64 (count,), and where their vectors are."""

    slots: IntArray
    positions: IntArray
    vectors: list[tuple[FloatArray, IntArray]]

    @property
    def count(self) -> int:
        return len(self.slots)

    def put(self, out: FloatArray) -> None:
        """Write the vectors into ``out`` (count, dim)."""
        at = 0
        for vectors, keep in self.vectors:
            np.take(vectors, keep, axis=0, out=out[at : at + len(keep)], mode="clip")
            at += len(keep)


def _living(view: View) -> _Living:
    pieces = list(view.tail.pieces(0, view.tail_n))
    keeps = [np.flatnonzero(piece.died > view.watermark).astype(np.int64) for piece in pieces]
    none = np.empty(0, dtype=np.int64)
    return _Living(
        slots=np.concatenate([none, *[piece.slots[keep] for piece, keep in zip(pieces, keeps, strict=True)]]),
        positions=np.concatenate([none, *[piece.start + keep for piece, keep in zip(pieces, keeps, strict=True)]]),
        vectors=[(piece.vectors, keep) for piece, keep in zip(pieces, keeps, strict=True)],
    )


def _may_grow(body: Body) -> bool:
    """Can rows be put behind the body's own in its memory? A graph's vectors are in memory that faiss holds."""
    return body.kind != "hnsw"


def swapped(gathered: Gathered, body: Body, facts: BodyFacts, now: View) -> View:
    """The view ``now`` with ``body`` in place of what was gathered; the caller holds the mutex.

    Rows that died since carry their deaths over; rows that came since make up the new tail.
    """
    old = gathered.view
    died = np.concatenate([old.body_died[gathered.from_body], _tail_deaths(old.tail, gathered.from_tail)])
    tail = now.tail.rest(old.tail_n, now.tail_n)
    deaths = array("q", np.flatnonzero(died <= now.watermark).tolist())
    tail_dead = sum(int((piece.died <= now.watermark).sum()) for piece in tail.pieces(0, tail.n))
    return View(
        now.watermark, body, old.watermark, died, deaths, len(deaths), tail, tail.n, tail_dead, now.metric, facts
    )


def _tail_deaths(tail: Tail, positions: IntArray) -> IntArray:
    deaths = [piece.died for piece in tail.pieces(0, int(positions[-1]) + 1)] if len(positions) else []
    everything = np.concatenate([np.empty(0, dtype=np.int64), *deaths])
    return everything[positions]


def _joined_ids(view: View, from_body: IntArray, from_tail: IntArray) -> tuple[npt.NDArray[np.uint8], IntArray]:
    body_bytes, body_ends = _taken(view.body.id_bytes, view.body.id_ends, from_body)
    tail_bytes, tail_ends = _tail_ids(view, from_tail)
    return np.concatenate([body_bytes, tail_bytes]), np.concatenate([body_ends, tail_ends + len(body_bytes)])


def _tail_ids(view: View, positions: IntArray) -> tuple[npt.NDArray[np.uint8], IntArray]:
    ids = [view.tail.ids[position].encode() for position in positions.tolist()]
    return np.frombuffer(b"".join(ids), dtype=np.uint8), np.cumsum([len(one) for one in ids], dtype=np.int64)


def _taken(
    id_bytes: npt.NDArray[np.uint8], id_ends: IntArray, keep: IntArray
) -> tuple[npt.NDArray[np.uint8], IntArray]:
    if len(keep) == len(id_ends):
        return id_bytes, id_ends
    starts = np.concatenate([np.zeros(1, dtype=np.int64), id_ends[:-1]]) if len(id_ends) else id_ends
    lengths = (id_ends - starts)[keep]
    ends = np.cumsum(lengths, dtype=np.int64)
    shift = np.repeat(starts[keep] - (ends - lengths), lengths)
    return id_bytes[np.arange(len(shift), dtype=np.int64) + shift], ends


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
