"""Two ranked lists become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .ranking import Ranked

__all__ = ["Fused", "reciprocal_ranks", "weighted"]

RANK_CONSTANT = 60
"""k of reciprocal rank fusion: Cormack, Clarke and Buettcher, Reciprocal Rank Fusion outperforms Condorcet (2009)."""


@dataclass
class Fused:
    """A unit in either list: its score, and score and rank (from 0) in each list that has it."""

    id: str
    score: float = 0.0
    semantic_score: float | None = None
    keyword_score: float | None = None
    semantic_rank: int | None = None
    keyword_rank: int | None = None


def weighted(
    semantic: Sequence[Ranked],
    keyword: Sequence[Ranked],
    weights: tuple[float, float],
    similarity: Mapping[str, float],
) -> list[Fused]:
    """score = w_s * max(0, similarity) + w_k * BM25 / best BM25, best first; both parts are in 0..1.

    similarity: the exact cosine of each unit, by id, also of those that only the keywords found, which would else be
    ranked as if they had none. One that is missing counts as its score in ``semantic``, else as 0. This is min-max
    normalisation with fixed lower bounds, so a score says the same for every query: it does not depend on the worst
    unit that happened to be found. (Compare S. Bruch, S. Gai and A. Ingber, An Analysis of Fusion Functions for Hybrid
    Retrieval, 2023, section 4.)
    """
    fused = _united(semantic, keyword)
    best = max((one.score for one in keyword), default=0.0) or 1.0
    for one in fused:
        if one.id in similarity:
            one.semantic_score = similarity[one.id]
        meaning = min(1.0, max(0.0, one.semantic_score or 0.0))
        one.score = weights[0] * meaning + weights[1] * (one.keyword_score or 0.0) / best
    return sorted(fused, key=lambda one: -one.score)


def reciprocal_ranks(semantic: Sequence[Ranked], keyword: Sequence[Ranked]) -> list[Fused]:
    """The sum of 1 / (60 + rank) over the lists that hold the unit, ranks from 1; as a share of the largest."""
    fused = _united(semantic, keyword)
    for one in fused:
        ranks = [rank for rank in (one.semantic_rank, one.keyword_rank) if rank is not None]
        one.score = sum((RANK_CONSTANT + 1) / (RANK_CONSTANT + 1 + rank) for rank in ranks) / 2
    return sorted(fused, key=lambda one: -one.score)


def _united(semantic: Sequence[Ranked], keyword: Sequence[Ranked]) -> list[Fused]:
    """Each unit once, those found by meaning first."""
    found: dict[str, Fused] = {}
    for rank, one in enumerate(semantic):
        found[one.id] = Fused(one.id, semantic_score=one.score, semantic_rank=rank)
    for rank, one in enumerate(keyword):
        fused = found.setdefault(one.id, Fused(one.id))
        fused.keyword_score, fused.keyword_rank = one.score, rank
    return list(found.values())
