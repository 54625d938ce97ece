"""Relevance between 0 and 1, and maximal marginal relevance."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidQueryError

__all__ = ["maximal_marginal_relevance", "relevance"]


def relevance(distance: float, metric: str) -> float:
    """A score in [0, 1] that never grows with the distance, 1 for the most similar.

    l2: 1 / (1 + d), of the squared distance. cosine: (1 + cos) / 2 = 1 - d / 2. ip: (1 + s / (1 + \\|s\\|)) / 2 of the
    dot product s, which has no bounds: 0.5 at 0, 0.75 at 1, 0.25 at -1.
    """
    if metric == "l2":
        return 1.0 / (1.0 + max(distance, 0.0))
    if metric == "cosine":
        return min(1.0, max(0.0, 1.0 - distance / 2.0))
    return (1.0 - distance / (1.0 + abs(distance))) / 2.0


def maximal_marginal_relevance(query: Any, vectors: Any, k: int, lambda_mult: float = 0.5) -> list[int]:
    """Rows of ``vectors`` that are like the query and unlike each other, in the order in which they are chosen.

    query (d,), vectors (n, d). The first is the most similar row; each further one has the largest
    ``lambda_mult * cos(query, row) - (1 - lambda_mult) * max cos(chosen, row)`` (Carbonell and Goldstein, 1998), the
    earlier row of equals. A zero vector has cosine 0 to everything. At most n rows.

    Raises InvalidQueryError for ``lambda_mult`` outside [0, 1].
    """
    if not 0.0 <= lambda_mult <= 1.0:
        raise InvalidQueryError(
            f"lambda_mult must be between 0 (most varied) and 1 (most similar), got {lambda_mult!r}"
        )
    if not len(vectors):
        return []
    rows = _directions(np.asarray(vectors, dtype=np.float64))
    similar = rows @ _directions(np.asarray(query, dtype=np.float64)[None, :])[0]
    nearest_chosen = np.full(len(rows), -np.inf)
    free = np.ones(len(rows), dtype=bool)
    worth, chosen = similar, []
    for _ in range(min(k, len(rows))):
        best = int(np.argmax(np.where(free, worth, -np.inf)))
        chosen.append(best)
        free[best] = False
        nearest_chosen = np.maximum(nearest_chosen, rows @ rows[best])
        worth = lambda_mult * similar - (1.0 - lambda_mult) * nearest_chosen
    return chosen


def _directions(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: npt.NDArray[np.float64] = rows / np.where(lengths > 0, lengths, 1.0)
    return directions
