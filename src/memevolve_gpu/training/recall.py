"""Recall of an index against exact search on the same rows, with a lower confidence bound. The index is not changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..index.base import Index
from ..index.costs import scan_cost
from ..types import FloatArray, IntArray, SearchParams
from ..utils.forking import lazy
from ..utils.vectors import normalize_rows

Pause = Callable[[], None]
"""Called between steps of a few milliseconds; may sleep to let searches run, or raise to stop."""


def no_pause() -> None:
    """Do not pause."""


CONFIDENCE_Z = 1.645
"""Standard normal quantile of a one-sided 95 %."""
IMAGINED_MISS = 0.1
"""What the one imagined query misses, unless half a result is more."""


def lower_bounds(recalls: npt.NDArray[np.float64], ks: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Lower bounds of the mean recall@k for several k, meant to hold in 95 % of draws.

    The normal bound over the sample and one imagined query of recall 0.9 (0.5 at k = 1), made non-increasing in k. On
    2,000 real queries over inverted lists, 4-bit codes and graphs it held in 91 to 97 % of draws of 64 to 192 queries.

    - The plain normal bound and the bootstrap held only in 73 % (n = 64) to 85 % (n = 256) of draws: rare total misses
      are often not in the sample, and a sample without a miss has no variance. The imagined query stands for them.
    - Hoeffding's and the empirical Bernstein bound always held, but were 6 to 40 times wider than the actual miss; with
      256 queries they could show no recall above 0.9.
    - Non-increasing in k: on every kind of index the first neighbours are found at least as often as the first k are on
      average. Recall@1 is 0 or 1 per query, and its own bound would be several times as wide.

    Applied to near and far queries separately, search parameters chosen by this bound missed their target in 2 to 3 %
    of draws of 192 real queries, at 1.2 to 1.3 times the least cost.

    Args:
        recalls: float64 (nq, m), one column per k; NaN columns where a k was not measured.
        ks: the k of the columns, ascending.

    Returns:
        float64 (m,); -inf where a k was not measured, and everywhere without queries.
    """
    n = len(recalls)
    if n == 0:
        return np.full(recalls.shape[1], -np.inf)
    total = n + 1
    imagined = 1.0 - np.maximum(IMAGINED_MISS, 0.5 / np.asarray(ks))
    mean = (recalls.sum(axis=0) + imagined) / total
    square = ((recalls * recalls).sum(axis=0) + imagined**2) / total
    variance = np.maximum(square - mean * mean, 0.0) * total / n
    bounds = mean - CONFIDENCE_Z * np.sqrt(variance) / math.sqrt(total)
    bounds = np.where(np.isnan(bounds), -np.inf, bounds)
    falling: npt.NDArray[np.float64] = np.maximum.accumulate(bounds[::-1])[::-1]
    return np.where(np.isnan(recalls[0]), -np.inf, falling)


SELF_HIT_FLOOR = 0.9
"""An index below this share of self-hits is not used."""

_STEP = 32

RELATIVE_EPSILON = 1e-5
"""A distance up to this, relative to the squared norm of the query, counts as the vector itself."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How good the results of an index are.

    self_hit: share of stored vectors that find a vector equal to themselves first; 1.0 under inner product, where the
    nearest vector need not be the vector itself. recall: mean recall@k against exact search, ties counted as hits.
    queries: number of queries of each.
    """

    self_hit: float
    recall: float
    queries: int

    @property
    def score(self) -> float:
        """The figure reported as ``training_quality_score``: the worse of the two."""
        return min(self.self_hit, self.recall)

    def meets(self, target_recall: float) -> bool:
        return self.self_hit >= SELF_HIT_FLOOR and self.recall >= target_recall


def measure(
    index: Index,
    params: SearchParams,
    *,
    k: int = 10,
    queries: int = 64,
    seed: int = 0,
    pause: Pause = no_pause,
) -> Quality:
    """Search the index with a seeded sample of its own vectors.

    For the recall the sample gets noise of a tenth of its standard deviation, so that the nearest row is not simply the
    query itself. ``pause`` is called between searches of a few queries.
    """
    if index.n == 0:
        return Quality(1.0, 1.0, 0)
    rng = np.random.default_rng(seed)
    picked = np.sort(rng.choice(index.n, min(queries, index.n), replace=False)).astype(np.int64)
    stored = index.vectors_at(picked)
    noisy = _with_noise(stored, rng, normalise=index.metric == "cosine")
    found = _in_steps(index, noisy, k, params, pause)
    truth = _in_steps(index, noisy, k, SearchParams(exact=True), pause)
    return Quality(_self_hit(index, stored, params), recall_of(found, truth), len(picked))


def self_hits(index: Index, params: SearchParams, *, start: int = 0, queries: int = 64, seed: int = 0) -> float:
    """The share of sampled rows from position ``start`` on that find themselves; 1.0 where there are no rows."""
    if start >= index.n:
        return 1.0
    rng = np.random.default_rng(seed)
    picked = start + rng.choice(index.n - start, min(queries, index.n - start), replace=False)
    return _self_hit(index, index.vectors_at(np.sort(picked).astype(np.int64)), params)


def recall_of(found: FloatArray, truth: FloatArray) -> float:
    """Mean recall@k from the distances alone; see :func:`recalls_of`."""
    return float(np.mean(recalls_of(found, truth)))


def recalls_of(found: FloatArray, truth: FloatArray) -> npt.NDArray[np.float64]:
    """Recall@k of each query, float64 (nq,), from the distances alone, ascending float32 (nq, k) each.

    A result no farther than the exact k-th is a hit. Ties therefore count as hits, and rows beyond the end of the store
    (+inf in ``truth``) do not count at all.
    """
    wanted = np.isfinite(truth).sum(axis=1)
    last = np.where(wanted > 0, np.take_along_axis(truth, np.maximum(wanted - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    hits = np.minimum((found <= _with_slack(last)[:, None]).sum(axis=1), wanted)
    return np.where(wanted > 0, hits / np.maximum(wanted, 1), 1.0).astype(np.float64)


def _with_slack(distances: FloatArray) -> FloatArray:
    """The largest distances that count as ties of these."""
    slack: FloatArray = np.abs(distances) * np.float32(1e-5) + np.float32(1e-7)
    return distances + slack


def _in_steps(index: Index, queries: FloatArray, k: int, params: SearchParams, pause: Pause) -> FloatArray:
    """Distances float32 (nq, k), a few queries at a time."""
    pieces = []
    for start in range(0, len(queries), _STEP):
        pieces.append(index.search(queries[start : start + _STEP], k, params)[0])
        pause()
    return np.concatenate(pieces)


def _self_hit(index: Index, stored: FloatArray, params: SearchParams) -> float:
    """The share of the vectors ``stored`` that find themselves."""
    if index.metric == "ip":
        return 1.0
    scale = np.maximum(np.einsum("ij,ij->i", stored, stored), 1e-12)
    distances, _ = index.search(stored, 1, params)
    return float(np.mean(distances[:, 0] <= RELATIVE_EPSILON * scale))


def _with_noise(stored: FloatArray, rng: np.random.Generator, *, normalise: bool) -> FloatArray:
    spread = float(np.sqrt(np.mean(np.var(stored, axis=0)))) if len(stored) > 1 else 0.0
    noise = rng.standard_normal(stored.shape).astype(np.float32) * np.float32(0.1 * spread)
    noisy: FloatArray = stored + noise
    return normalize_rows(noisy) if normalise else noisy


_STEP_COST = 1_000_000_000.0
"""Work between two pauses in units of 10 picoseconds (10 ms)."""
_SEARCHES_IN_STEP = 32
WIDTHS = (
    *(20, 25, 30, 40, 50, 60, 70, 80, 90, 100, 120, 150, 175, 200, 250, 300),
    *(375, 450, 550, 700, 850, 1000, 1250, 1500, 1800, 2200),
)
"""Numbers of candidates whose recall one pass over the codes shows."""
_TRUTHS_IN_STEP = 48
"""Exact searches of fewer queries would not share a matrix product."""


@dataclass(frozen=True, slots=True)
class EvalQueries:
    """Queries float32 (nq, dim) to measure recall with.

    stratum: int64 (nq,), the group of each query; every group must reach the target. Queries of group -1, and all where
    it is None, are split into the half nearest to the stored vectors, the next quarter and the farthest. source: int64
    (nq,), the row that a query was made of, which must not count as a result; -1 or None for none.
    """

    queries: FloatArray
    stratum: IntArray | None = None
    source: IntArray | None = None

    def __len__(self) -> int:
        return len(self.queries)


def together(*several: EvalQueries) -> EvalQueries:
    """Several sets of queries in one; strata are kept."""

    def joined(columns: list[IntArray | None]) -> IntArray:
        none = [np.full(len(one), -1, np.int64) for one in several]
        return np.concatenate([n if column is None else column for column, n in zip(columns, none, strict=True)])

    return EvalQueries(
        queries=np.concatenate([one.queries for one in several]),
        stratum=joined([one.stratum for one in several]),
        source=joined([one.source for one in several]),
    )


class RecallEvaluator:
    """The exact results of some queries, and the recall of search parameters on them; each is computed once.

    ks: the k of recall@k, ascending. truth: exact distances, float32 (nq, ks[-1]), without the queries' sources.
    """

    def __init__(self, index: Index, eval_queries: EvalQueries, ks: tuple[int, ...], pause: Pause = no_pause) -> None:
        self.index = index
        self.eval_queries = eval_queries
        self.ks = ks
        self._pause = pause
        self._found: dict[tuple[SearchParams, int], npt.NDArray[np.float64]] = {}
        step = max(_TRUTHS_IN_STEP, int(_STEP_COST / scan_cost(index.n, index.dim)))
        self.truth = self._search(SearchParams(exact=True), ks[-1], np.arange(len(eval_queries)), step)
        self.stratum = _strata(eval_queries, self.truth)

    def recalls(self, params: SearchParams, k: int, every: int = 1) -> npt.NDArray[np.float64]:
        """Recall of each ``every``-th query at each of ``ks``, float64 (nq, len(ks)), from one search for the ``k``
        nearest; NaN above k."""
        rows = np.arange(0, len(self.eval_queries), every)
        if params.exact:
            return np.ones((len(rows), len(self.ks)))
        if params == SearchParams(rerank=params.rerank) and params.rerank in WIDTHS[: self._hits.shape[2]]:
            hits = self._hits[:, rows, WIDTHS.index(params.rerank)] / np.array(self.ks)[:, None]
            return np.where(np.array(self.ks) <= k, np.minimum(hits.T, 1.0), np.nan)
        found = self._search(params, k, rows, _SEARCHES_IN_STEP)
        recalls = np.full((len(rows), len(self.ks)), np.nan)
        for column, at in enumerate(self.ks):
            if at <= k:
                recalls[:, column] = recalls_of(found[:, :at], self.truth[rows, :at])
        return recalls

    @lazy
    def _hits(self) -> npt.NDArray[np.int16]:
        """How many of each query's k nearest are among its first w candidates, for each of ``ks`` and the w of
        ``WIDTHS``, int16 (len(ks), nq, number of w); none where the index has no candidates of its own."""
        index, source = self.index, self.eval_queries.source
        widths = [width for width in WIDTHS if width <= index.n // 4] if index.n >= 4 * self.ks[-1] else []
        pieces = []
        for part in _parts(np.arange(len(self.eval_queries)), _SEARCHES_IN_STEP):
            queries = self.eval_queries.queries[part]
            candidates = index.candidates(queries, widths[-1]) if widths else None
            if candidates is None:
                return np.empty((len(self.ks), len(self.eval_queries), 0), np.int16)
            distances = index.table.distances(queries, candidates)
            if source is not None:
                distances[candidates == source[part, None]] = np.inf
            hits = [distances <= _with_slack(self.truth[part, at - 1])[:, None] for at in self.ks]
            counts = [np.cumsum(each, axis=1, dtype=np.int16) for each in hits]
            pieces.append(np.stack([each[:, np.array(widths) - 1] for each in counts]))
            self._pause()
        return np.concatenate(pieces, axis=1)

    def bounds(self, params: SearchParams, k: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The worst stratum's mean recall and lower bound at each of ``ks``, float64 (len(ks),); see ``recalls``."""
        if (params, k) not in self._found:
            self._found[params, k] = self.recalls(params, k)
        recalls = self._found[params, k]
        parts = [recalls[self.stratum == name] for name in np.unique(self.stratum)]
        means = np.min([part.mean(axis=0) for part in parts], axis=0)
        return means, np.min([lower_bounds(part, self.ks) for part in parts], axis=0)

    def worst_mean(self, recalls: npt.NDArray[np.float64], every: int) -> float:
        """The mean of one value per ``every``-th query, (nq,), in the stratum where it is least."""
        strata = self.stratum[::every]
        return min(float(recalls[strata == name].mean()) for name in np.unique(strata))

    def largest_weight(self, every: int) -> float:
        """The largest weight of one of every ``every``-th query in the mean of its stratum."""
        strata = self.stratum[::every]
        return 1.0 / max(1, min(int((strata == name).sum()) for name in np.unique(strata)))

    def _search(self, params: SearchParams, k: int, rows: IntArray, step: int) -> FloatArray:
        """Distances float32 (len(rows), k) of the k nearest, without the queries' sources.

        Of the first candidates alone: which queries go on depends on k, and one search shows the recall of all k.
        """
        source, params = self.eval_queries.source, replace(params, goes_on=False)
        pieces = []
        for part in _parts(rows, step):
            more = 0 if source is None else 1
            distances, positions = self.index.search(self.eval_queries.queries[part], k + more, params)
            if source is not None:
                distances[positions == source[part, None]] = np.inf
                distances = np.sort(distances, axis=1)[:, :k]
            pieces.append(distances)
            self._pause()
        return np.concatenate(pieces) if pieces else np.empty((0, k), np.float32)


def _strata(eval_queries: EvalQueries, truth: FloatArray) -> IntArray:
    """The stratum of each query, int64 (nq,); those without one are -3, -2 or -1 by :func:`_by_distance`."""
    stratum = np.full(len(eval_queries), -1, np.int64) if eval_queries.stratum is None else eval_queries.stratum.copy()
    free = stratum < 0
    stratum[free] = _by_distance(truth[free]) - 3
    return stratum


def _by_distance(truth: FloatArray) -> IntArray:
    """0 for the half of the queries whose tenth neighbour is nearer, 1 for the next quarter, 2 for the farthest, int64
    (nq,)."""
    tenth = truth[:, min(9, truth.shape[1] - 1)]
    stratum, order = np.zeros(len(truth), np.int64), np.argsort(tenth, kind="stable")
    stratum[order[len(truth) // 2 :]] = 1
    stratum[order[len(truth) - len(truth) // 4 :]] = 2
    return stratum


def _parts(rows: IntArray, step: int) -> Iterator[IntArray]:
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
