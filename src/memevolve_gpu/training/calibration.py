"""Find the cheapest search parameters that reach a target recall on the index itself.

Parameters are calibrated on real queries where there are enough. Until then they are calibrated, with a margin, on
stored vectors that are held out and partly displaced, beside the few real queries. Recall is measured against exact
search on the same index; ties are hits.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from ..index.base import Index
from ..index.costs import scan_cost
from ..types import FloatArray, IntArray, SearchParams
from ..utils.vectors import normalize_rows
from .recall import EvalQueries, Pause, RecallEvaluator, no_pause, together
from .search_param_sweep import SearchParamSweep, reach

_MIXED = 3
_DIRECTION_ROWS = 2048
"""Rows from which directions are mixed; more did not change the result."""


def perturbed(index: Index, count: int, spread: float, rng: np.random.Generator) -> tuple[FloatArray, IntArray]:
    """Draw stored vectors and move them by ``spread`` times the data's own standard deviation.

    The displacement is a random mixture of centred rows, so it has the data's covariance without computing it. The
    point is then scaled towards the mean by 1 / sqrt(1 + spread**2), so that the queries have the data's variance: with
    a large spread they are draws from a Gaussian like the data. Under cosine the result is normalised.

    Stored vectors alone make easy queries, since indexes are built on them.

    Args:
        index: at least one row.
        count: how many queries.
        spread: 0 returns the stored vectors; 1 moves them by the data's standard deviation.
        rng: the random generator.

    Returns:
        Queries float32 (count, dim), and the positions int64 (count,) of the rows that they were made of, which must
        not count as results.
    """
    positions = np.sort(rng.choice(index.n, count, replace=count > index.n)).astype(np.int64)
    base = index.vectors_at(np.sort(rng.choice(index.n, min(index.n, _DIRECTION_ROWS), replace=False)).astype(np.int64))
    mean = base.mean(axis=0)
    centred = base - mean
    deviation = float(np.sqrt(np.mean(np.einsum("ij,ij->i", centred, centred))))
    moves = rng.standard_normal((count, len(base)), dtype=np.float32) @ centred
    lengths = np.linalg.norm(moves, axis=1, keepdims=True)
    moves *= spread * deviation / np.where(lengths > 0, lengths, 1.0)
    shrink = 1.0 / np.sqrt(1.0 + spread * spread)
    queries = np.asarray(mean + shrink * (index.vectors_at(positions) - mean + moves), dtype=np.float32)
    return np.ascontiguousarray(normalize_rows(queries) if index.metric == "cosine" else queries), positions


def between(index: Index, count: int, rng: np.random.Generator) -> tuple[FloatArray, IntArray]:
    """Queries between clusters: each the mean of three stored vectors, normalised under cosine.

    Returns:
        Queries float32 (count, dim), and -1 for each: no row must be left out of its results.
    """
    picked = [index.vectors_at(rng.choice(index.n, count).astype(np.int64)) for _ in range(_MIXED)]
    queries: FloatArray = np.asarray(np.mean(picked, axis=0), dtype=np.float32)
    queries = normalize_rows(queries) if index.metric == "cosine" else queries
    return np.ascontiguousarray(queries), np.full(count, -1, np.int64)


KS = (1, 5, 10, 20, 50, 100)
TARGETS = (0.9, 0.95, 0.98, 0.99, 0.995)
MIN_REAL = 64
"""Fewer real queries than this are not used."""
ENOUGH_REAL = 512
"""Fewer than this are used together with held-out vectors. A store's first queries may all be about one topic: an index
of a million rows, calibrated for 0.95 on 250 queries like the data, had recall 0.813 on other queries."""
MOST_EVAL_QUERIES = 768
FEWEST_EVAL_QUERIES = 192
_TRUTH_COST = 200_000_000_000.0
"""Time for exact search, which limits the number of queries, in units of 10 picoseconds (2 s)."""
_SHARED_SCAN = 0.2
"""Cost of one of many exact queries, as a share of a scan for it alone (see ``index/exact_scan.py``)."""

SPREADS, WALKED_SPREADS = (0.0, 1.7), (0.0, 2.0)
"""How far held-out vectors are displaced, in standard deviations: where all codes are read, and where lists or links
are left out, which lose more. The first stand for queries where rows are dense, the second for unforeseen queries; a
third group lies between clusters. Each must reach the target. Measured on six sets:
docs/decisions/0008-quarter-codes-held-once.md."""
HELD_OUT_MARGIN = 0.9
"""Held-out vectors may miss this share of what real queries may miss. Three draws for each of five sets found at least
0.961 for 0.95 and 0.993 for 0.99 out of distribution."""

Source = Literal["queries", "mixed", "held-out"]
Natural = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""What a snapshot may hold, whose reader (``live/index_stats.py``) checks the types of these classes."""


def _sound(params: SearchParams) -> SearchParams:
    if min(params.nprobe, params.rerank, params.ef) < 0:
        raise ValueError("search parameters must not be negative")
    return params


@dataclass(frozen=True, slots=True)
class Entry:
    """The cheapest search parameters found for recall ``target`` at ``k`` results.

    recall: mean of the worse half of the queries; bound: lower bound of the true mean.
    """

    k: Natural
    target: Amount
    effort: Annotated[SearchParams, AfterValidator(_sound)]
    recall: Amount
    bound: Amount


@dataclass(frozen=True)
class Calibration:
    """The calibrated search parameters of one index.

    kind, rows and nlist identify the index. queries: number of queries, taken from ``source``. seconds: duration.
    Entries are missing where no parameters could be shown to reach the target. version: of the form in snapshots.
    """

    kind: str
    rows: Natural
    nlist: Natural
    source: Source
    queries: Natural
    seconds: Amount
    entries: tuple[Entry, ...]
    version: Literal[1] = 1

    def search_params(self, k: int, target: float) -> SearchParams | None:
        """The parameters for ``k`` results at recall ``target``: those of the next larger k and the next higher target.

        None outside the table, and where an entry is missing.
        """
        return self._table.get((_next(KS, k), _next(TARGETS, target)))

    def most(self, k: int) -> SearchParams | None:
        """The parameters of the highest target for the next larger k; None where there is no entry."""
        known = [entry for entry in self.entries if entry.k == _next(KS, k)]
        return known[-1].effort if known else None

    def grown_to(self, rows: int) -> Calibration:
        """The same for ``rows`` rows, with proportionally more candidates where these are more."""
        growth = max(1.0, rows / max(1, self.rows))
        entries = [
            replace(entry, effort=replace(entry.effort, rerank=math.ceil(entry.effort.rerank * growth)))
            for entry in self.entries
        ]
        return replace(self, rows=rows, entries=tuple(entries))

    def fits(self, index: Index) -> bool:
        """Whether this was measured on an index of the same kind and size."""
        return (self.kind, self.rows, self.nlist) == (index.kind, index.n, index.nlist)

    @cached_property
    def _table(self) -> dict[tuple[float, float], SearchParams]:
        return {(entry.k, entry.target): entry.effort for entry in self.entries}


def calibrate(
    index: Index,
    queries: FloatArray | None = None,
    *,
    seed: int = 0,
    pause: Pause = no_pause,
) -> Calibration:
    """Find the cheapest search parameters for each of ``KS`` and ``TARGETS``.

    A quarter of the queries orders the parameters; all queries decide which reach a target: the lower bound of the mean
    recall (see :func:`~.recall.lower_bounds`) must reach it in every group of queries. Real queries are grouped by
    distance, so that easy topics do not hide hard ones. No field of the parameters falls as the target rises.

    Args:
        index: the index that will be searched.
        queries: real queries float32 (nq, dim), normalised under cosine; used from ``MIN_REAL`` on, and alone from
            ``ENOUGH_REAL`` on.
        seed: of the sample, and of the held-out vectors.
        pause: called every few milliseconds of work; what it raises ends the calibration.

    Raises:
        EngineError: the index cannot be searched.
    """
    started = time.perf_counter()
    source, used, entries = _source(queries), 0, list[Entry]()
    if index.kind == "exact":
        entries = [Entry(k, target, SearchParams(exact=True), 1.0, 1.0) for k in KS for target in TARGETS]
    elif index.n:
        eval_queries = _eval_queries(index, queries, source, _count(index), np.random.default_rng(seed))
        evaluator, margin = (
            RecallEvaluator(index, eval_queries, KS, pause),
            1.0 if source == "queries" else HELD_OUT_MARGIN,
        )
        sweep, used = SearchParamSweep(evaluator), len(eval_queries)
        entries = [entry for k in KS for entry in _climb(evaluator, sweep, k, margin)]
    seconds = round(time.perf_counter() - started, 6)
    return Calibration(index.kind, index.n, index.nlist, source, used, seconds, tuple(entries))


def _count(index: Index) -> int:
    """How many queries the time for exact search allows."""
    affordable = int(_TRUTH_COST / (_SHARED_SCAN * scan_cost(index.n, index.dim)))
    return min(MOST_EVAL_QUERIES, max(FEWEST_EVAL_QUERIES, affordable))


def _source(queries: FloatArray | None) -> Source:
    if queries is None or len(queries) < MIN_REAL:
        return "held-out"
    return "queries" if len(queries) >= ENOUGH_REAL else "mixed"


def _eval_queries(
    index: Index, queries: FloatArray | None, source: Source, count: int, rng: np.random.Generator
) -> EvalQueries:
    if queries is None or source == "held-out":
        return _held_out(index, count, rng)
    if source == "queries":
        return _real(queries, count, rng)
    return together(_real(queries, count // 2, rng), _held_out(index, count - count // 2, rng))


def _real(queries: FloatArray, count: int, rng: np.random.Generator) -> EvalQueries:
    chosen = rng.choice(len(queries), min(count, len(queries)), replace=False)
    return EvalQueries(np.ascontiguousarray(queries[chosen], dtype=np.float32))


def _held_out(index: Index, count: int, rng: np.random.Generator) -> EvalQueries:
    reads_all = index.kind == "two_stage" or (
        index.kind == "ivf" and index.plan.engine == "cpu" and not index.reads_lists
    )
    spreads = SPREADS if reads_all else WALKED_SPREADS
    each = max(1, count // (len(spreads) + 1))
    drawn = [*(perturbed(index, each, spread, rng) for spread in spreads), between(index, each, rng)]
    return EvalQueries(
        queries=np.concatenate([queries for queries, _ in drawn]),
        stratum=np.repeat(np.arange(len(drawn)), each),
        source=np.concatenate([source for _, source in drawn]),
    )


def _climb(evaluator: RecallEvaluator, sweep: SearchParamSweep, k: int, margin: float) -> list[Entry]:
    """One entry per target that some step reaches; targets ascend, and so do the steps."""
    entries: list[Entry] = []
    steps, column, at = sweep.steps(k), evaluator.ks.index(k), 0

    def measured(step: SearchParams) -> tuple[float, float]:
        means, bounds = evaluator.bounds(step, reach(step, evaluator.ks[-1]))
        return float(means[column]), float(bounds[column])

    def does(wanted: float, index: int) -> bool:
        return measured(steps[index])[1] >= wanted

    for target in TARGETS:
        wanted = 1.0 - margin * (1.0 - target)
        while at < len(steps) - 1 and sweep.hoped(steps[at], k) < wanted:
            at += 1
        at = _first(partial(does, wanted), at, len(steps))
        if at == len(steps):
            break
        effort = at_least(steps[at], entries[-1].effort) if entries else steps[at]
        entries.append(Entry(k, target, effort, *measured(steps[at])))
    return entries


def at_least(params: SearchParams, least: SearchParams) -> SearchParams:
    """``params`` with no field below that of ``least``."""
    if params.exact or least.exact:
        return SearchParams(exact=True)
    nprobe, rerank = max(params.nprobe, least.nprobe), max(params.rerank, least.rerank)
    return SearchParams(nprobe, rerank, max(params.ef, least.ef))


def _first(does: Callable[[int], bool], low: int, end: int) -> int:
    """The first number from ``low`` on for which ``does`` holds, ``end`` for none: galloping, then binary search.

    If ``does`` does not hold for all numbers after it, some number for which it holds, and not for its predecessor.
    """
    stride, failed = 1, low - 1
    while low < end and not does(low):
        failed, low, stride = low, min(low + stride, end - 1) if low < end - 1 else end, 2 * stride
    while low - failed > 1:
        middle = (failed + low) // 2
        failed, low = (failed, middle) if does(middle) else (middle, low)
    return low


def _next(grid: tuple[float, ...], wanted: float) -> float:
    """The least value of ``grid`` from ``wanted`` on; infinity where there is none."""
    at = bisect_left(grid, wanted)
    return grid[at] if at < len(grid) else float("inf")
