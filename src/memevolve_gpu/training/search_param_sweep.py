"""Search parameters to try during calibration, from cheap to expensive, for each index kind."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..index.base import Body
from ..index.costs import HNSW_ROWS_PER_BEAM, LIST, WHOLE_ROWS, codes_cost, scan_cost
from ..index.sample import default_codes
from ..types import Effort
from .recall import Judge

__all__ = ["Ladders", "effort_cost", "reach"]

EVERY = 4
"""Each fourth question looks for the way; all of them decide how far to go."""

_RERANKS = (40, 60, 100, 150, 200, 300, 450, 700)
_WIDE = 450
"""Candidates at which 4-bit codes lose next to nothing, so that what is missing was in lists that were not probed."""
_BEAMS = (20, 27, 36, 48, 65, 90, 120, 160, 200, 270, 360, 480, 640, 860, 1150, 1500)
_FEWEST_LISTS = 1 / 32
_FEWEST_LISTS_ON_DEVICE = 1 / 256
"""Lists on a device are many, since their number costs it little."""
_STEP = 1.35
_WORTH_A_STEP = 1.12
"""Steps of a ladder differ in cost by about this factor at least: each of them costs a measurement."""
_UNSEEN = 0.01
"""A miss that a sample may hide, in the cheapest effort; it orders efforts that lose nothing in the sample."""
_TOGETHER = (10, 50)
"""k up to these share a ladder, and so its measurements; above them each k has its own."""

Floats = npt.NDArray[np.float64]


class Ladders:
    """The ladder of each k, from measurements on a part of the judge's questions.

    Lists and codes are swept one at a time. A true neighbour is missed only if its list was not probed or if too many
    codes came before its own, and fewer codes compete when fewer lists are probed, so the two misses add up to a bound
    of the miss of any pair, and pairs need not be measured to be ordered.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._swept: dict[Effort, Floats] = {}
        self._fronts: dict[int, list[Effort]] = {}

    def steps(self, k: int) -> list[Effort]:
        """Efforts for ``k`` (one of the judge's), each dearer than the last; none for a kind of body without efforts.

        Among pairs only those that promise more than every cheaper one; an exact scan ends them where it is cheaper.
        """
        shared = next((together for together in _TOGETHER if k <= together), k)
        if shared not in self._fronts:
            self._fronts[shared] = self._front(shared)
        return self._fronts[shared]

    def promised(self, effort: Effort, k: int) -> float:
        """Mean recall at ``k`` over the worse-served part of the sample, less what may be missing unseen."""
        recalls = self._promised(effort)[:, self._judge.ks.index(k)]
        return self._judge.worst_mean(recalls, EVERY) - self._unseen(effort, k)

    def hoped(self, effort: Effort, k: int) -> float:
        """What ``promised`` may be if one question of the sample's worse-served part was missed by bad luck: where
        neighbours are copies of each other, all ten of them are missed or none.
        """
        return self.promised(effort, k) + self._judge.worth_of_one(EVERY)

    def _front(self, k: int) -> list[Effort]:
        body, pairs = self._judge.body, self._judge.body.kind == "ivf"
        scan = effort_cost(body, Effort(exact=True), k)
        steps = sorted((_Step(effort_cost(body, effort, k), effort) for effort in self._efforts(k)), key=_cheapest)
        front: list[_Step] = []
        best = -1.0
        for step in steps:
            if step.cost >= scan:
                return [*(each.effort for each in front), Effort(exact=True)]
            promised = self.promised(step.effort, k) if pairs else 1.0
            if pairs and promised <= best:
                continue
            best = promised
            if len(front) > 1 and step.cost < _WORTH_A_STEP * front[-2].cost:
                front.pop()
            front.append(step)
        return [step.effort for step in front]

    def _efforts(self, k: int) -> list[Effort]:
        body = self._judge.body
        widths = [rerank for rerank in _RERANKS if rerank >= 2 * k]
        if body.kind == "two_stage":
            return [Effort(rerank=rerank) for rerank in widths]
        if body.kind == "ivf":
            return [Effort(nprobe=nprobe, rerank=rerank) for nprobe in _lists_ladder(body) for rerank in widths]
        return [Effort(ef=beam) for beam in _BEAMS if beam >= 2 * k] if body.kind == "hnsw" else []

    def _promised(self, effort: Effort) -> Floats:
        """Recall of each fourth question at each k, float64 (nq / 4, number of k)."""
        if not effort.nprobe:
            return self._sweep(effort)
        lists = self._sweep(Effort(nprobe=effort.nprobe, rerank=_WIDE))
        codes = self._sweep(Effort(nprobe=self._judge.body.nlist, rerank=effort.rerank))
        return lists + codes - 1.0

    def _unseen(self, effort: Effort, k: int) -> float:
        if effort.exact:
            return 0.0
        lists = 1.0 - effort.nprobe / self._judge.body.nlist if effort.nprobe else 0.0
        return _UNSEEN * (lists + k / (effort.ef or effort.rerank))

    def _sweep(self, effort: Effort) -> Floats:
        if effort not in self._swept:
            self._swept[effort] = self._judge.recalls(effort, reach(effort, self._judge.ks[-1]), EVERY)
        return self._swept[effort]


class _Step(NamedTuple):
    cost: float
    effort: Effort


def _cheapest(step: _Step) -> tuple[float, int]:
    return step.cost, -step.effort.nprobe


def reach(effort: Effort, most: int) -> int:
    """For how many results one search tells what searches for fewer would have found: bodies try at least twice as many
    candidates as results, and below that do not change what they do."""
    width = effort.ef or effort.rerank
    return most if effort.exact or not width else max(1, min(most, width // 2))


def effort_cost(body: Body, effort: Effort, k: int) -> float:
    """Modelled time of one query, in units of 10 picoseconds: what the body will take for the cheapest of its ways."""
    n, dim = body.n, body.dim
    if body.plan.engine != "cpu":
        return math.inf if effort.exact else _device_cost(body, effort.nprobe or body.nlist, max(effort.rerank, 2 * k))
    scan = scan_cost(n, dim)
    if effort.exact or body.kind == "exact":
        return scan
    if body.kind == "hnsw":
        return min(scan, scan_cost(max(effort.ef, 2 * k) * HNSW_ROWS_PER_BEAM, dim))
    want, codes = max(effort.rerank, 2 * k), _codes(body)
    whole = codes_cost(n * codes, want, want, dim)
    if body.kind == "ivf":
        ways = [_lists_cost(body, effort.nprobe, want), *([whole] if n <= WHOLE_ROWS else [])]
        return min(scan, *ways)
    return min(scan, whole)


def _device_cost(body: Body, nprobe: int, want: int) -> float:
    """Bytes read by one query: the lists' rows in float16, and the candidates', which may lie on the host and count
    eightfold. An exact effort is answered by the host and is no step of the way."""
    return body.n * nprobe / max(1, body.nlist) * body.dim * 2 + want * body.dim * 4 * 8


def _codes(body: Body) -> int:
    return min(body.plan.codes or default_codes(body.dim), body.dim)


def _lists_cost(body: Body, nprobe: int, want: int) -> float:
    if body.plan.engine != "cpu":
        return _device_cost(body, nprobe, want)
    lists = nprobe * LIST + scan_cost(body.nlist, body.dim)
    reads = body.n * nprobe / body.nlist * _codes(body) + lists
    return codes_cost(reads, want, want, body.dim)


def _lists_ladder(body: Body) -> list[int]:
    """Numbers of lists from a 32nd of them on, each about 1.35 times the last, as far as visiting them is cheaper than
    reading all codes in one piece; and all of them."""
    ladder, share = [body.nlist], body.nlist / _STEP
    whole = effort_cost(body, Effort(nprobe=body.nlist, rerank=_WIDE), 1)
    fewest = _FEWEST_LISTS if body.plan.engine == "cpu" else _FEWEST_LISTS_ON_DEVICE
    while share >= max(1.0, fewest * body.nlist):
        if _lists_cost(body, round(share), _WIDE) < whole:
            ladder.append(round(share))
        share /= _STEP
    return sorted(set(ladder))
