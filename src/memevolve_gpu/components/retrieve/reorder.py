"""Reordering what a search found: by a second opinion on each text, and for diversity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...errors import InvalidQueryError
from ...types import FloatArray
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
    """The best ``top_k`` by maximal marginal relevance, each chosen in view of those before it.

    A result counts (1 - diversity) * score - diversity * its largest cosine with a chosen one, scores as shares of
    the best; one without a vector resembles none. Source: J. Carbonell and J. Goldstein, The Use of MMR (1998).
    """
    held = [one for one in found if one.unit_id in vectors]
    rows = np.zeros((len(found), len(vectors[held[0].unit_id]) if held else 1), dtype=np.float32)
    for at, one in enumerate(found):
        if one.unit_id in vectors:
            rows[at] = vectors[one.unit_id]
    rows = normalize_rows(rows)
    scores = np.array([one.score for one in found], dtype=np.float64)
    scores -= min(0.0, float(scores.min(initial=0.0)))
    relevance = scores / (float(scores.max(initial=0.0)) or 1.0)
    nearest, left, chosen = np.zeros(len(found)), np.ones(len(found), dtype=np.bool_), []
    for _ in range(min(top_k, len(found))):
        best = int(np.argmax(np.where(left, (1 - diversity) * relevance - diversity * nearest, -np.inf)))
        left[best] = False
        chosen.append(found[best])
        nearest = np.maximum(nearest, rows @ rows[best])
    return chosen
