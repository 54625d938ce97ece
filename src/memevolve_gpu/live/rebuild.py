"""Rebuild an index beside the old one: gather rows, build, evaluate, and swap with what changed meanwhile."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import DeviceError, EngineError
from ..index.base import Index
from ..index.registry import build
from ..index.vector_table import lengthened, roomy
from ..training.calibration import calibrate
from ..training.recall import Pause, Quality, measure, no_pause, self_hits
from ..training.retrain_rules import list_balance
from ..training.training_set import TrainingSet, source_for
from ..types import FloatArray, IndexPlan, IntArray, Rows
from .delta_buffer import DeltaBuffer
from .index_stats import IndexStats
from .live_index import LiveSettings
from .query_sample import QuerySample
from .rebuild_rules import RebuildReason
from .view import View
from .view_builder import flat_index

__all__ = [
    "JUDGED_AT",
    "Built",
    "Collect",
    "RebuildInput",
    "build_verified",
    "extend_verified",
    "gather",
    "gather_delta",
    "judged",
    "swapped",
]


@dataclass(frozen=True, slots=True)
class RebuildInput:
    """Rows of ``view`` in slot order, and where each row of the index that they make comes from: index positions, then
    tail positions."""

    view: View
    rows: Rows
    from_index: IntArray | slice
    from_delta: IntArray


def gather(view: View) -> RebuildInput:
    """The living rows of a view. Body slots are all older than delta slots, so the order is kept.

    Where no row of the index has died they share its memory, if it is not a graph; else they are a copy.
    """
    from_index = np.flatnonzero(view.index_died > view.watermark).astype(np.int64)
    living = _living(view)
    if len(from_index) == view.index.n and _may_grow(view.index):
        vectors = lengthened(view.index.vectors, living.count)
    else:
        vectors = roomy((len(from_index) + living.count, view.index.dim), np.float32)
        vectors[: len(from_index)] = view.index.vectors_at(from_index)
    living.put(vectors[len(from_index) :])
    slots = np.concatenate([view.index.slots[from_index], living.slots])
    id_bytes, id_ends = _joined_ids(view, from_index, living.positions)
    return RebuildInput(view, Rows(slots, id_bytes, id_ends, vectors), from_index, living.positions)


def gather_delta(view: View) -> RebuildInput:
    """The living rows of a view's tail, to be put behind all rows of its index, those that died included."""
    index, living = view.index, _living(view)
    if _may_grow(index):
        vectors = lengthened(index.vectors, living.count)[index.n :]
    else:
        vectors = np.empty((living.count, index.dim), np.float32)
    living.put(vectors)
    rows = Rows(living.slots, *_delta_ids(view, living.positions), vectors)
    return RebuildInput(view, rows, slice(0, index.n), living.positions)


@dataclass(frozen=True, slots=True)
class _Living:
    """The living rows of a delta buffer: their slots and positions, int64 (count,), and where their vectors are."""

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
    pieces = list(view.delta.pieces(0, view.delta_n))
    keeps = [np.flatnonzero(piece.died > view.watermark).astype(np.int64) for piece in pieces]
    none = np.empty(0, dtype=np.int64)
    return _Living(
        slots=np.concatenate([none, *[piece.slots[keep] for piece, keep in zip(pieces, keeps, strict=True)]]),
        positions=np.concatenate([none, *[piece.start + keep for piece, keep in zip(pieces, keeps, strict=True)]]),
        vectors=[(piece.vectors, keep) for piece, keep in zip(pieces, keeps, strict=True)],
    )


def _may_grow(index: Index) -> bool:
    """Can rows be put behind the index's own in its memory? A graph's vectors are in memory that faiss holds."""
    return index.kind != "hnsw"


def swapped(rebuild_input: RebuildInput, index: Index, stats: IndexStats, now: View) -> View:
    """The view ``now`` with ``index`` in place of what was gathered; the caller holds the mutex.

    Rows that died since carry their deaths over; rows that came since make up the new tail.
    """
    old = rebuild_input.view
    died = np.concatenate(
        [old.index_died[rebuild_input.from_index], _delta_deaths(old.delta, rebuild_input.from_delta)]
    )
    delta = now.delta.rest(old.delta_n, now.delta_n)
    deaths = array("q", np.flatnonzero(died <= now.watermark).tolist())
    delta_dead = sum(int((piece.died <= now.watermark).sum()) for piece in delta.pieces(0, delta.n))
    return View(
        now.watermark, index, old.watermark, died, deaths, len(deaths), delta, delta.n, delta_dead, now.metric, stats
    )


def _delta_deaths(delta: DeltaBuffer, positions: IntArray) -> IntArray:
    deaths = [piece.died for piece in delta.pieces(0, int(positions[-1]) + 1)] if len(positions) else []
    everything = np.concatenate([np.empty(0, dtype=np.int64), *deaths])
    return everything[positions]


def _joined_ids(view: View, from_index: IntArray, from_delta: IntArray) -> tuple[npt.NDArray[np.uint8], IntArray]:
    index_bytes, index_ends = _taken(view.index.id_bytes, view.index.id_ends, from_index)
    delta_bytes, delta_ends = _delta_ids(view, from_delta)
    return np.concatenate([index_bytes, delta_bytes]), np.concatenate([index_ends, delta_ends + len(index_bytes)])


def _delta_ids(view: View, positions: IntArray) -> tuple[npt.NDArray[np.uint8], IntArray]:
    ids = [view.delta.ids[position].encode() for position in positions.tolist()]
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
"""An extended index's recall is measured again when it has so many times the rows of the last measurement."""

FEW = 32
"""Queries to look at an extended index with; where they find too little it is judged like a new one."""


@dataclass(frozen=True, slots=True)
class Built:
    """trained: new quantisers were trained; refused: why the planned kind was not good enough, else empty."""

    index: Index
    stats: IndexStats
    trained: bool
    refused: str = ""


def build_verified(
    plan: IndexPlan,
    rebuild_input: RebuildInput,
    cause: RebuildReason,
    settings: LiveSettings,
    asked: QuerySample,
    collect: Collect,
    progress: Callable[[str, float], None],
    pause: Pause = no_pause,
) -> Built:
    """The planned index if it proves itself, else an exact one that says why.

    Quantisers are taken over where rows were only added or removed; when the result falls short they are trained anew.
    asked: the real queries of the past, to calibrate on. collect: finds what to train on where the rows are too few.
    pause: called between pieces of work.

    Raises DeviceError when the plan's device refuses.
    """
    rows, old = rebuild_input.rows, rebuild_input.view
    if plan.kind == "exact" and plan.engine == "cpu":
        return Built(build(plan, rows, old.metric, seed=settings.seed), IndexStats(), trained=False)
    fits = _quantiser(plan, plan.nlist) == _quantiser(old.index.plan, old.index.nlist) and plan.kind != "exact"
    refused = ""
    for reuse_from in [old.index, None] if cause.kind != "train" and fits else [None]:
        try:
            training = None if reuse_from is not None else _training(plan, rows.vectors, collect)
            index = build(
                plan, rows, old.metric, seed=settings.seed, training=training, reuse_from=reuse_from, progress=progress
            )
        except DeviceError:
            raise
        except EngineError as error:
            refused = f"cannot build {plan.kind}: {error}"
            continue
        for known in _known(old.stats, index, reuse_from):
            stats, quality = judged(index, known, asked, settings, pause)
            if quality.meets(settings.target_recall):
                return Built(index, replace(stats, by_request=cause.by_request), trained=reuse_from is None)
        refused = f"{plan.kind} fell short: {quality}"
    return Built(flat_index(rows, old.metric), IndexStats(refused_rows=len(rows.slots)), trained=False, refused=refused)


def extend_verified(
    rebuild_input: RebuildInput, settings: LiveSettings, asked: QuerySample, pause: Pause = no_pause
) -> Built | None:
    """The index of the view with the gathered rows behind its own; None where it cannot have them, or is not good
    enough then. What is known of it is carried over; its new rows must find themselves.
    """
    old = rebuild_input.view
    try:
        index = old.index.extended(rebuild_input.rows)
    except EngineError:
        return None
    if index is None or index is old.index or (index.kind == "exact" and index.plan.engine == "cpu"):
        return None if index is None else Built(index, old.stats, trained=False)
    if index.kind == "exact":  # on a device, whose numbers are narrower than those that decide
        stats, quality = _looked_at(index, old.stats, old.index.n, settings)
        return Built(index, stats, trained=False) if quality.meets(settings.target_recall) else None
    for known in _known(old.stats, index, old.index):
        if known.calibration is not None:
            stats, quality = _looked_at(index, replace(known, quality=old.stats.quality), old.index.n, settings)
        else:
            stats, _ = judged(index, known, asked, settings, pause)
            stats, quality = _looked_at(index, stats, old.index.n, settings)
        if quality.meets(settings.target_recall):
            return Built(index, stats, trained=False)
    return None


def _looked_at(index: Index, known: IndexStats, start: int, settings: LiveSettings) -> tuple[IndexStats, Quality]:
    """How an extended index does: rows from ``start`` on find themselves, and recall, where it grew much since."""
    params = known.effort(index, JUDGED_AT, settings.target_recall)
    hits = self_hits(index, params, start=start, queries=FEW, seed=settings.seed)
    held = known.quality
    if held is None or index.n > MEASURED_AGAIN * known.measured_rows:
        held = measure(index, params, k=JUDGED_AT, queries=FEW, seed=settings.seed)
        known = replace(known, measured_rows=index.n)
    quality = replace(held, self_hit=hits)
    return replace(known, quality=quality), quality


def _quantiser(plan: IndexPlan, nlist: int) -> tuple[object, ...]:
    """What two indexes must have in common so that one can take over the other's quantisers."""
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
    index: Index, known: IndexStats, asked: QuerySample, settings: LiveSettings, pause: Pause = no_pause
) -> tuple[IndexStats, Quality]:
    """Calibrate the index, unless that is known, and see how it does at the effort that searches will use then.

    A scan on a device has nothing to calibrate, but it is judged: its numbers are narrower than those that decide.
    """
    if known.calibration is None and index.kind != "exact":
        fresh = calibrate(index, asked.sample(), seed=settings.seed, pause=pause)
        known = replace(known, calibration=fresh, calibrated_rows=index.n, asked=asked.seen)
    params = known.effort(index, JUDGED_AT, settings.target_recall)
    quality = measure(index, params, k=JUDGED_AT, seed=settings.seed, pause=pause)
    return replace(known, quality=quality, measured_rows=index.n), quality


def _known(stats: IndexStats, index: Index, reuse_from: Index | None) -> list[IndexStats]:
    """What to start from: the calibration that came with the quantisers, then nothing."""
    balance = list_balance(index.list_sizes)
    if index.kind == "exact":
        return [IndexStats()]
    if reuse_from is None:
        return [IndexStats(index.n, balance, balance)]
    trained = IndexStats(stats.trained_rows, stats.trained_balance, balance)
    carried = stats.carried_to(index)
    return [trained] if carried is None else [replace(carried, balance=balance), trained]
