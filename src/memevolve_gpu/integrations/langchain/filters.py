"""LangChain's metadata filters in this package's filter language, relevance scores and MMR.

``{"source": "wiki", "page": {"$gte": 3}, "$or": [{"lang": "en"}, {"lang": {"$exists": False}}]}``: keys are paths into
the document's metadata, operators are those of ``docs/reference/filters.md`` with or without a dollar.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...components.retrieve.reorder import mmr
from ...components.store.ranking import similarity_of
from ...errors import DimensionMismatchError, InvalidFilterError, InvalidQueryError, InvalidVectorError, first_line
from ...records.filters import MAX_DEPTH, parse
from ...types import Json, JsonObject, Vectors
from ...utils.arguments import listed, real_number, whole_number, word
from ...utils.plain import plain_text


def relevance(distance: float, metric: str) -> float:
    r"""Convert a distance to a relevance score in [0, 1], 1 for the most similar.

    l2: 1 / (1 + d), of the squared distance. cosine: (1 + cos) / 2 = 1 - d / 2. ip: (1 + s / (1 + \|s\|)) / 2 of the
    dot product s, which has no bounds: 0.5 at 0, 0.75 at 1, 0.25 at -1.

    Args:
        distance: A distance of the store's searches.
        metric: ``l2``, ``cosine`` or ``ip``.

    Returns:
        The score.

    Examples:
        >>> from memevolve_gpu.integrations.langchain import relevance
        >>> relevance(0.5, "cosine")
        0.75
    """
    distance = real_number("distance", distance, "a number", -sys.float_info.max, sys.float_info.max, InvalidQueryError)
    word("metric", metric, ("l2", "cosine", "ip"))
    return float(similarity_of(distance / 2.0 if metric == "cosine" else distance, metric))


def maximal_marginal_relevance(query: Vectors, vectors: Vectors, k: int, lambda_mult: float = 0.5) -> list[int]:
    """Choose vectors that are similar to a query and different from each other.

    The first is the most similar vector; each further one has the largest
    ``lambda_mult * cos(query, row) - (1 - lambda_mult) * max cos(chosen, row)`` (Carbonell and Goldstein, 1998). Ties
    go to the earlier row. A zero vector has cosine 0 to everything.

    Args:
        query: Shape (d,).
        vectors: Shape (n, d).
        k: Most rows to choose.
        lambda_mult: 1 for similarity only, 0 for variety only.

    Returns:
        At most n row numbers, in the order of choice.

    Raises:
        InvalidQueryError: ``lambda_mult`` is outside [0, 1].
        DimensionMismatchError: The vectors have another length than the query.

    Examples:
        >>> from memevolve_gpu.integrations.langchain import maximal_marginal_relevance
        >>> maximal_marginal_relevance([1.0, 0.0], [[1.0, 0.1], [1.0, 0.1], [0.5, -0.5]], 2)
        [0, 2]
    """
    allowed = "between 0 (most varied) and 1 (most similar)"
    lambda_mult = real_number("lambda_mult", lambda_mult, allowed, 0, 1, InvalidQueryError)
    k = whole_number("k", k)
    given = listed("vectors", vectors)
    if not given:
        return []
    wanted, rows = _numbers("query", [query]), _numbers("vectors", given)
    if wanted.shape[1] != rows.shape[1]:
        raise DimensionMismatchError(wanted.shape[1], rows.shape[1], "pass vectors of the query's length")
    rows = _directions(rows)
    return mmr(rows @ _directions(wanted)[0], rows, k, lambda_mult)


def _numbers(name: str, rows: Any) -> npt.NDArray[np.float64]:
    """float64 (n, d), all finite. Raises InvalidVectorError."""
    try:
        table = np.asarray(rows, dtype=np.float64)
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise InvalidVectorError(f"{name} must be numbers: {first_line(error)}") from error
    if table.ndim != 2 or not np.isfinite(table).all():
        raise InvalidVectorError(f"{name} must be finite numbers, one row for each vector, got shape {table.shape}")
    return table


def _directions(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: npt.NDArray[np.float64] = rows / np.where(lengths > 0, lengths, 1.0)
    return directions


_JOINS = ("$and", "$or", "$not", "$nor")


def on_units(metadata_filter: Json, unit_filter: Json = None) -> JsonObject:
    """Return LangChain's filter on the metadata, and one of this package, as one filter on units that means both.

    Raises InvalidFilterError, naming the key.
    """
    parts = [] if metadata_filter is None else [_prefixed(metadata_filter, 0)]
    parse(unit_filter)
    found = {"and": parts if unit_filter is None else [*parts, unit_filter]}
    parse(found)
    return found


def _prefixed(group: Json, depth: int) -> Json:
    if not isinstance(group, Mapping):
        raise InvalidFilterError(f"filter must be a mapping of metadata keys to conditions, not {type(group).__name__}")
    if depth > MAX_DEPTH:
        raise InvalidFilterError(f"filter is nested more than {MAX_DEPTH} deep; flatten it")
    found = {}
    for key, value in group.items():
        if not isinstance(key, str):
            raise InvalidFilterError(f"filter[{key!r}]: a key must be a string, not {type(key).__name__}")
        if not key.startswith("$"):
            found[f"metadata.{plain_text(key)}"] = value
        elif key in _JOINS and isinstance(value, (list, tuple)):
            found[key] = [_prefixed(one, depth + 1) for one in value]
        else:
            found[key] = _prefixed(value, depth + 1) if key == "$not" else value
    return found
