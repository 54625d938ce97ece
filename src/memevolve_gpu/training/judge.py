"""Measures what an effort finds, against the exact scan of the same body."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..index.base import Body
from ..index.costs import scan_cost
from ..types import Effort, FloatArray, IntArray
from .bounds import lower_bounds
from .quality import recalls_of

__all__ = ["Judge", "Pause", "Questions", "no_pause", "together"]

Pause = Callable[[], None]
"""Called between steps of a few milliseconds; may sleep to let searches pass, or raise to give up."""

_STEP_COST = 1_000_000_000.0
"""Work between two pauses in units of 10 picoseconds (10 ms)."""
_SEARCHES_IN_STEP = 32
_TRUTHS_IN_STEP = 48
"""Fewer at once would give up the matrix product that exact searches share."""


def no_pause() -> None:
    """A pause of no length."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Queries float32 (nq, dim) to judge by.

    ``stratum`` int64 (nq,) says which part each belongs to, and every part has to be served; those of part -1, and all
    where it is None, are parted into the half that lies near the stored vectors and the half that lies far. ``source``
    int64 (nq,) names the row that each was made of and that must not count; -1 or None where there is none.
    """

    queries: FloatArray
    stratum: IntArray | None = None
    source: IntArray | None = None

    def __len__(self) -> int:
        return len(self.queries)


def together(*several: Questions) -> Questions:
    """All the questions in one; what has a stratum keeps it."""
    nothing = [np.full(len(one), -1, np.int64) for one in several]
    return Questions(
        queries=np.concatenate([one.queries for one in several]),
        stratum=np.concatenate(
            [n if one.stratum is None else one.stratum for one, n in zip(several, nothing, strict=True)]
        ),
        source=np.concatenate(
            [n if one.source is None else one.source for one, n in zip(several, nothing, strict=True)]
        ),
    )


class Judge:
    """Ground truth of some questions, computed once, and what efforts find of it, measured once each.

    ``ks`` are the k to judge by, ascending.
    """

    def __init__(self, body: Body, questions: Questions, ks: tuple[int, ...], pause: Pause = no_pause) -> None:
        self.body = body
        self.questions = questions
        self.ks = ks
        self._pause = pause
        self._found: dict[tuple[Effort, int], npt.NDArray[np.float64]] = {}
        step = max(_TRUTHS_IN_STEP, int(_STEP_COST / scan_cost(body.n, body.dim)))
        self._truth = self._search(Effort(exact=True), ks[-1], np.arange(len(questions)), step)
        self.stratum = _strata(questions, self._truth)

    @property
    def truth(self) -> FloatArray:
        """Exact distances, float32 (nq, ks[-1]), sources left out."""
        return self._truth

    def recalls(self, effort: Effort, k: int, every: int = 1) -> npt.NDArray[np.float64]:
        """Recall of each ``every``-th question at each of ``ks``, float64 (nq, len(ks)), from one search for the ``k``
        nearest; NaN above k."""
        rows = np.arange(0, len(self.questions), every)
        if effort.exact:
            return np.ones((len(rows), len(self.ks)))
        found = self._search(effort, k, rows, _SEARCHES_IN_STEP)
        columns = [recalls_of(found[:, :at], self._truth[rows, :at]) if at <= k else _unknown(rows) for at in self.ks]
        return np.stack(columns, axis=1)

    def bounds(self, effort: Effort, k: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The worst stratum's mean recall and lower bound at each of ``ks``, float64 (len(ks),); see ``recalls``."""
        if (effort, k) not in self._found:
            self._found[effort, k] = self.recalls(effort, k)
        recalls = self._found[effort, k]
        parts = [recalls[self.stratum == name] for name in np.unique(self.stratum)]
        means = np.min([part.mean(axis=0) for part in parts], axis=0)
        return means, np.min([lower_bounds(part, self.ks) for part in parts], axis=0)

    def worst_mean(self, recalls: npt.NDArray[np.float64], every: int) -> float:
        """The mean of one figure per ``every``-th question, (nq,), over the stratum where it is least."""
        strata = self.stratum[::every]
        return min(float(recalls[strata == name].mean()) for name in np.unique(strata))

    def worth_of_one(self, every: int) -> float:
        """How much one of every ``every``-th question weighs in the mean of its stratum, at the most."""
        strata = self.stratum[::every]
        return 1.0 / max(1, min(int((strata == name).sum()) for name in np.unique(strata)))

    def _search(self, effort: Effort, k: int, rows: IntArray, step: int) -> FloatArray:
        """Distances float32 (len(rows), k) of the k nearest, the questions' sources left out."""
        source = self.questions.source
        pieces = []
        for part in _parts(rows, step):
            more = 0 if source is None else 1
            distances, positions = self.body.search(self.questions.queries[part], k + more, effort)
            if source is not None:
                distances[positions == source[part, None]] = np.inf
                distances = np.sort(distances, axis=1)[:, :k]
            pieces.append(distances)
            self._pause()
        return np.concatenate(pieces) if pieces else np.empty((0, k), np.float32)


def _strata(questions: Questions, truth: FloatArray) -> IntArray:
    """Which part each question is judged in, int64 (nq,): those without one are near, -2, or far, -1."""
    stratum = np.full(len(questions), -1, np.int64) if questions.stratum is None else questions.stratum.copy()
    free = stratum < 0
    stratum[free] = _near_and_far(truth[free]) - 2
    return stratum


def _near_and_far(truth: FloatArray) -> IntArray:
    """0 for the half of the queries whose tenth neighbour is nearer, 1 for the others, int64 (nq,)."""
    tenth = truth[:, min(9, truth.shape[1] - 1)]
    stratum = np.zeros(len(truth), np.int64)
    stratum[np.argsort(tenth, kind="stable")[len(truth) // 2 :]] = 1
    return stratum


def _parts(rows: IntArray, step: int) -> Iterator[IntArray]:
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _unknown(rows: IntArray) -> npt.NDArray[np.float64]:
    return np.full(len(rows), np.nan)
