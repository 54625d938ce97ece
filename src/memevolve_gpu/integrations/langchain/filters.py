"""LangChain's metadata filters in this package's filter language, relevance scores and MMR.

``{"source": "wiki", "page": {"$gte": 3}, "$or": [{"lang": "en"}, {"lang": {"$exists": False}}]}``: keys are paths into
the document's metadata, operators are those of ``docs/reference/filters.md`` with or without a dollar. ``$or`` gives
several filters, of which a document must match one; each is searched on its own and the results are merged.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DimensionMismatchError, InvalidFilterError, InvalidQueryError, InvalidVectorError, first_line
from ...utils.arguments import listed, real_number, whole_number, word
from ...utils.plain import plain_text

__all__ = ["MAX_ALTERNATIVES", "Conjunction", "alternatives", "maximal_marginal_relevance", "relevance"]


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
    if metric == "l2":
        return 1.0 / (1.0 + max(distance, 0.0))
    if metric == "cosine":
        return min(1.0, max(0.0, 1.0 - distance / 2.0))
    return (1.0 - distance / (1.0 + abs(distance))) / 2.0


def maximal_marginal_relevance(query: Any, vectors: Any, k: int, lambda_mult: float = 0.5) -> list[int]:
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
    similar = rows @ _directions(wanted)[0]
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


MAX_ALTERNATIVES = 32
"""Most filters that a filter with ``$or`` may expand to: each is a search of its own."""

Conjunction = dict[str, Any]
"""A filter of this package: path to operators, all of which must match."""

_OPERATORS = {"eq", "ne", "in", "nin", "gt", "gte", "lt", "lte", "exists"}
_DEEPEST = 20


def alternatives(
    metadata_filter: Mapping[str, Any] | None, unit_filter: Mapping[str, Any] | None = None
) -> list[Conjunction]:
    """Return the filters of which a unit must match at least one; ``[{}]`` matches all, ``[]`` none.

    metadata_filter: LangChain's form; unit_filter: a filter of this package, which must match as well. Values are not
    checked here: the backend refuses those that cannot be compared. Raises InvalidFilterError, naming the key.
    """
    every = [{}] if metadata_filter is None else _alternatives(metadata_filter, 0)
    if unit_filter is None:
        return every
    if not isinstance(unit_filter, Mapping):
        raise InvalidFilterError(f"filters must be a mapping of paths to conditions, not {type(unit_filter).__name__}")
    return _both(every, [{path: _operators(value) for path, value in unit_filter.items()}])


def _alternatives(group: Any, depth: int) -> list[Conjunction]:
    if not isinstance(group, Mapping):
        raise InvalidFilterError(f"filter must be a mapping of metadata keys to conditions, not {type(group).__name__}")
    if depth > _DEEPEST:
        raise InvalidFilterError(f"filter is nested more than {_DEEPEST} deep; flatten it")
    found: list[Conjunction] = [{}]
    for key, value in group.items():
        found = _both(found, _condition(key, value, depth))
    return found


def _condition(key: Any, value: Any, depth: int) -> list[Conjunction]:
    if not isinstance(key, str):
        raise InvalidFilterError(f"filter[{key!r}]: a key must be a string, not {type(key).__name__}")
    if not key.startswith("$"):
        return [{f"metadata.{plain_text(key)}": _operators(value, key)}]
    if key not in ("$and", "$or"):
        raise InvalidFilterError(f"filter[{key!r}]: unknown; use $and, $or, or an operator below a metadata key")
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InvalidFilterError(f"filter[{key!r}] must be a list of filters, not {type(value).__name__}")
    parts = [_alternatives(part, depth + 1) for part in value]
    if key == "$or":
        _check_number(sum(map(len, parts)))
        return [one for part in parts for one in part]
    found: list[Conjunction] = [{}]
    for part in parts:
        found = _both(found, part)
    return found


def _operators(value: Any, key: str = "") -> Any:
    """Return a condition as a mapping of operators, without their dollars if it belongs to a metadata ``key``."""
    if isinstance(value, Mapping):
        return {_operator(name, key): operand for name, operand in value.items()}
    return {"in": list(value)} if isinstance(value, (list, tuple)) else {"eq": value}


def _operator(name: Any, key: str) -> Any:
    """Return this package's name of an operator; without ``key`` it is one already, and the backend checks it."""
    if not key:
        return name
    bare = name.removeprefix("$") if isinstance(name, str) else name
    if bare not in _OPERATORS:
        known = ", ".join(f"${one}" for one in sorted(_OPERATORS))
        raise InvalidFilterError(
            f"filter[{key!r}]: unknown operator {name!r}; use one of {known}, or {key}.{name} for a nested key"
        )
    return bare


def _both(left: list[Conjunction], right: list[Conjunction]) -> list[Conjunction]:
    _check_number(len(left) * len(right))
    return [_merged(one, other) for one in left for other in right]


def _check_number(count: int) -> None:
    if count > MAX_ALTERNATIVES:
        raise InvalidFilterError(
            f"filter expands to {count} alternatives, the most is {MAX_ALTERNATIVES}; "
            "write {key: [values]} for several values of one key"
        )


def _merged(one: Conjunction, other: Conjunction) -> Conjunction:
    merged = {path: dict(conditions) for path, conditions in one.items()}
    for path, conditions in other.items():
        known = merged.setdefault(path, {})  # kept when empty, for the backend to refuse
        for operator, operand in conditions.items():
            _add(known, operator, operand, path)
    return merged


def _add(conditions: dict[str, Any], operator: str, operand: Any, path: str) -> None:
    """Add an operator to a path: exclusions are joined; other operators may not occur twice with different values."""
    if operator == "ne" and "ne" in conditions:
        operator, operand = "nin", [operand]
    if operator == "nin" and isinstance(conditions.get("nin"), list) and isinstance(operand, (list, tuple)):
        conditions["nin"] = [*conditions["nin"], *operand]
    elif operator not in conditions:
        conditions[operator] = list(operand) if isinstance(operand, tuple) else operand
    elif repr(conditions[operator]) != repr(operand):  # 1 equals True in Python, and not in a filter
        raise InvalidFilterError(f"filter has two conditions {operator!r} on {path!r}; combine them into one")
