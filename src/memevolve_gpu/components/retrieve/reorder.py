"""Reordering what a search found: by a second opinion on each text, and for diversity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...errors import InvalidQueryError
from ...types import DoubleArray, FloatArray
from ...utils.vectors import normalize_rows
from ..store.units import unit_to_text
from .base import RetrievalResult

Rerank = Callable[[str, list[str]], Sequence[float]]


def reranked(rerank: Rerank, query: str, found: Sequence[RetrievalResult]) -> list[RetrievalResult]:
    """The results by the numbers that ``rerank`` gives their texts, largest first.

    Raises InvalidQueryError when it does not give a finite number for each text.
    """
    if not found:
        return []
    given = rerank(query, [unit_to_text(one.unit) for one in found])
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError):
        scores = []
    if len(scores) != len(found) or not all(map(math.isfinite, scores)):
        raise InvalidQueryError(
            f"rerank must return a finite number for each of {len(found)} texts, got {given!r:.100}"
        )
    judged = [replace(one, score=score) for one, score in zip(found, scores, strict=True)]
    return sorted(judged, key=lambda one: -one.score)


def diverse(
    found: Sequence[RetrievalResult], vectors: Mapping[str, FloatArray], diversity: float, top_k: int
) -> list[RetrievalResult]:
    """The best ``top_k`` by :func:`mmr` with the scores as shares of the best; one without a vector resembles none."""
    held = [one for one in found if one.unit_id in vectors]
    rows = np.zeros((len(found), len(vectors[held[0].unit_id]) if held else 1), dtype=np.float32)
    for at, one in enumerate(found):
        if one.unit_id in vectors:
            rows[at] = vectors[one.unit_id]
    rows = normalize_rows(rows)
    scores = np.array([one.score for one in found], dtype=np.float64)
    scores -= min(0.0, float(scores.min(initial=0.0)))
    relevance = scores / (float(scores.max(initial=0.0)) or 1.0)
    return [found[at] for at in mmr(relevance, rows, top_k, 1.0 - diversity, floor=0.0)]


def mmr(
    relevance: DoubleArray, rows: FloatArray | DoubleArray, count: int, share: float, floor: float = -math.inf
) -> list[int]:
    """At most ``count`` positions by maximal marginal relevance (Carbonell and Goldstein, 1998), most relevant first.

    A further one counts share * relevance (n,) - (1 - share) * its largest cosine, at least ``floor``, with a chosen
    one; ``rows`` (n, dim) have length 1, or 0. Of equal ones the earlier is chosen.
    """
    nearest, left = np.full(len(rows), floor), np.ones(len(rows), dtype=np.bool_)
    worth, chosen = relevance, list[int]()
    for _ in range(min(count, len(rows))):
        best = int(np.argmax(np.where(left, worth, -np.inf)))
        left[best] = False
        chosen.append(best)
        nearest = np.maximum(nearest, rows @ rows[best])
        worth = share * relevance - (1.0 - share) * nearest
    return chosen
