"""Search parameters to try during calibration, from cheap to expensive, for each index kind."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..index.base import Index
from ..index.costs import HNSW_ROWS_PER_BEAM, codes_cost, lists_cost, scan_cost
from ..index.sample import default_codes
from ..types import DoubleArray, SearchParams
from .recall import WIDTHS, RecallEvaluator

EVERY = 4
"""Every fourth query orders the search parameters; all queries decide which of them reach a target."""

_RERANKS = (20, 30, 40, 60, 80, 100, 150, 200, 300, 450, 700, 1000, 1500, 2200)
_WIDE = 1500
"""Candidates at which 4-bit codes miss almost nothing, so that all misses come from lists that were not probed."""
_BEAMS = (20, 27, 36, 48, 65, 90, 120, 160, 200, 270, 360, 480, 640, 860, 1150, 1500)
_FEWEST_LISTS = 1 / 32
_FEWEST_LISTS_ON_DEVICE = 1 / 256
"""A device has many lists, since their number costs little there."""
_STEP = 1.35
_WORTH_A_STEP = 1.12
"""Least ratio of the costs of two steps, since each step costs a measurement."""
_UNSEEN = 0.01
"""A miss that the sample may not show, at the cheapest parameters; it orders parameters that miss nothing in it."""
_TOGETHER = (10, 50)
"""k up to these share their steps, and so their measurements; above them each k has its own."""


class SearchParamSweep:
    """The search parameters to try for each k, cheapest first, from measurements on part of the queries.

    Lists and codes are swept one at a time. A true neighbour is missed only if its list is not probed or if too many
    codes rank before its own; fewer codes compete when fewer lists are probed. So the two misses add up to a bound for
    any pair, and pairs need not be measured to be ordered.
    """

    def __init__(self, evaluator: RecallEvaluator) -> None:
        self._evaluator = evaluator
        self._swept: dict[SearchParams, DoubleArray] = {}
        self._fronts: dict[int, list[SearchParams]] = {}

    def steps(self, k: int) -> list[SearchParams]:
        """Search parameters for ``k`` (one of the evaluator's), by ascending cost; none for an index that has none.

        Of pairs only the Pareto frontier. An exact scan is the last step where it is cheaper than the rest.
        """
        shared = next((together for together in _TOGETHER if k <= together), k)
        if shared not in self._fronts:
            self._fronts[shared] = self._front(shared)
        return self._fronts[shared]

    def promised(self, params: SearchParams, k: int) -> float:
        """Mean recall at ``k`` in the worst stratum of the sample, less what the sample may not show."""
        recalls = self._promised(params)[:, self._evaluator.ks.index(k)]
        return self._evaluator.worst_mean(recalls, EVERY) - self._unseen(params, k)

    def hoped(self, params: SearchParams, k: int) -> float:
        """``promised`` if one query of the worst stratum was missed by chance: where neighbours are copies of each
        other, all ten of them are missed or none.
        """
        return self.promised(params, k) + self._evaluator.largest_weight(EVERY)

    def _front(self, k: int) -> list[SearchParams]:
        index, pairs = self._evaluator.index, _probes(self._evaluator.index)
        scan = params_cost(index, SearchParams(exact=True), k)
        steps = [_Step(params_cost(index, params, k), params) for params in self._candidates(k)]
        front: list[_Step] = []
        best = -1.0
        for step in sorted(steps, key=lambda step: (step.cost, -step.params.nprobe)):
            if step.cost >= scan:
                return [*(each.params for each in front), SearchParams(exact=True)]
            promised = self.promised(step.params, k) if pairs else 1.0
            if pairs and promised <= best:
                continue
            best = promised
            if pairs and len(front) > 1 and step.cost < _WORTH_A_STEP * front[-2].cost:
                front.pop()
            front.append(step)
        return [step.params for step in front]

    def _candidates(self, k: int) -> list[SearchParams]:
        index = self._evaluator.index
        widths = [rerank for rerank in _RERANKS if rerank >= 2 * k]
        if _probes(index):
            return [SearchParams(nprobe=nprobe, rerank=rerank) for nprobe in _probe_counts(index) for rerank in widths]
        if index.kind in ("two_stage", "ivf"):
            return [SearchParams(rerank=rerank) for rerank in WIDTHS if rerank >= 2 * k]
        return [SearchParams(ef=beam) for beam in _BEAMS if beam >= 2 * k] if index.kind == "hnsw" else []

    def _promised(self, params: SearchParams) -> DoubleArray:
        """Recall of every fourth query at each k, float64 (nq / 4, number of k)."""
        if not params.nprobe:
            return self._sweep(params)
        lists = self._sweep(SearchParams(nprobe=params.nprobe, rerank=_WIDE))
        codes = self._sweep(SearchParams(nprobe=self._evaluator.index.nlist, rerank=params.rerank))
        return lists + codes - 1.0

    def _unseen(self, params: SearchParams, k: int) -> float:
        if params.exact:
            return 0.0
        lists = 1.0 - params.nprobe / self._evaluator.index.nlist if params.nprobe else 0.0
        return _UNSEEN * (lists + k / (params.ef or params.rerank))

    def _sweep(self, params: SearchParams) -> DoubleArray:
        if params not in self._swept:
            self._swept[params] = self._evaluator.recalls(params, reach(params, self._evaluator.ks[-1]), EVERY)
        return self._swept[params]


class _Step(NamedTuple):
    cost: float
    params: SearchParams


def reach(params: SearchParams, most: int) -> int:
    """The number of results up to which one search shows what searches for fewer would find.

    Indexes try at least twice as many candidates as results; up to that the candidates do not depend on k.
    """
    width = params.ef or params.rerank
    return most if params.exact or not width else max(1, min(most, width // 2))


def params_cost(index: Index, params: SearchParams, k: int) -> float:
    """Modelled time of one query by the cheapest of the index's methods, in units of 10 picoseconds."""
    n, dim, want = index.n, index.dim, max(params.rerank, 2 * k)
    if index.plan.engine != "cpu":
        # Bytes read: the lists' rows in float16, and the candidates', which may be on the host and count eightfold.
        read = n * (params.nprobe or index.nlist) / max(1, index.nlist) * dim * 2 + want * dim * 4 * 8
        return math.inf if params.exact else read  # exact search runs on the host, and is not among the steps
    scan = scan_cost(n, dim)
    if params.exact or index.kind == "exact":
        return scan
    if index.kind == "hnsw":
        return min(scan, scan_cost(max(params.ef, 2 * k) * HNSW_ROWS_PER_BEAM, dim))
    codes = min(index.plan.codes or default_codes(dim), dim)
    if _probes(index):
        return min(scan, lists_cost(n, dim, codes, (params.nprobe, index.nlist), want))
    return min(scan, codes_cost(n * codes, want, want, dim))


def _probes(index: Index) -> bool:
    """Whether a search of the index reads some of its lists, rather than all rows."""
    return index.kind == "ivf" and (index.plan.engine != "cpu" or index.reads_lists)


def _probe_counts(index: Index) -> list[int]:
    """Numbers of lists to probe: from a 32nd of them, each about 1.35 times the last, while that is cheaper than
    reading all codes in one piece; and all of them."""

    def cost(nprobe: int) -> float:
        return params_cost(index, SearchParams(nprobe=nprobe, rerank=_WIDE), 1)

    counts, share = [index.nlist], index.nlist / _STEP
    fewest = _FEWEST_LISTS if index.plan.engine == "cpu" else _FEWEST_LISTS_ON_DEVICE
    while share >= max(1.0, fewest * index.nlist):
        if cost(round(share)) < cost(index.nlist):
            counts.append(round(share))
        share /= _STEP
    return sorted(set(counts))
