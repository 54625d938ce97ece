"""Ranking by similarity, age and importance.

score = similarity * (1 - w_r + w_r * decay) * (1 - w_i + w_i * importance)

similarity: 1 / (1 + distance) under l2, the cosine cut to 0..1, or (1 + x / (1 + abs(x))) / 2 of the dot product x;
BM25 and the fused score of a hybrid search stand for themselves. decay: 0.5 ** (age / half-life), 1 for the future.
importance: the number at a path, cut to 0..1. A unit without a readable value counts as 0.5 there. Weights are 0..1, so
both factors are, and no unit scores above its similarity: a search may stop once that is too little.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

import numpy as np

from ...errors import InvalidFilterError, InvalidQueryError
from ...records.filters import lookup, path_of
from ...types import DoubleArray
from ...utils.arguments import real_number, shown, whole_number
from ...utils.plain import plain_scalar
from ...utils.timestamps import micros_of

T = TypeVar("T")

UNKNOWN = 0.5
"""Decay and importance of a unit that says nothing of them."""

_FIRST, _WIDER = 64, 4
"""Candidates that are looked at first, at least, and by how many times more in each further step."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_TERM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*")


@dataclass(frozen=True)
class HalfLife:
    """How fast memories fade: after ``time`` a unit counts half, after twice that a quarter.

    Attributes:
        time: A number of seconds, a ``timedelta``, or a text such as ``"30d"`` (s, m, h, d, w).
        path: Where a unit says its moment, in ISO 8601.
        now: The moment from which ages count: a ``datetime`` or Unix time; None for that of the search.

    Examples:
        >>> from memevolve_gpu import HalfLife
        >>> HalfLife("36h").seconds
        129600.0
    """

    time: float | str | timedelta
    path: str = "metadata.created_at"
    now: datetime | float | None = None
    seconds: float = field(init=False)
    """The half-life in seconds."""

    def __post_init__(self) -> None:
        """Raise InvalidQueryError for what is no time above 0, or no path."""
        given: object = self.time.total_seconds() if isinstance(self.time, timedelta) else self.time
        term = _TERM.fullmatch(given) if isinstance(given, str) else None
        if term:
            given = float(term[1]) * _UNITS[term[2]]
        seconds = real_number("half-life", given, "a number of seconds, or as '30d'", 1e-3, 1e12, InvalidQueryError)
        object.__setattr__(self, "seconds", seconds)
        _checked_path("path", self.path)


@dataclass(frozen=True)
class Ranking:
    """How age and importance count beside similarity, for the strategies of retrieval.

    score = similarity * (1 - w + w * decay) * (1 - v + v * importance), with the weights w and v.

    Attributes:
        recency: How fast units fade; None for not at all.
        importance: The path of a number from 0 to 1; None for none.
        weights: Of ``"recency"`` and ``"importance"``, 0..1; 1 where none is given.

    Examples:
        >>> from memevolve_gpu import HalfLife
        >>> from memevolve_gpu.components.retrieve import Ranking, SemanticRetrievalStrategy
        >>> ranking = Ranking(HalfLife("30d"), "metadata.importance", {"recency": 0.5})
        >>> SemanticRetrievalStrategy(ranking=ranking).ranking.weights["recency"]
        0.5
    """

    recency: HalfLife | None = None
    importance: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise InvalidQueryError for what cannot rank."""
        if self.recency is not None and not isinstance(self.recency, HalfLife):
            raise InvalidQueryError(f"recency must be a HalfLife such as HalfLife('30d'), got {shown(self.recency)}")
        if self.importance is not None:
            _checked_path("importance", self.importance)
        given: object = self.weights
        if not isinstance(given, Mapping) or not given.keys() <= {"recency", "importance"}:
            raise InvalidQueryError(
                f"weights must map 'recency' and 'importance' to numbers, got {shown(self.weights)}"
            )
        for name, value in self.weights.items():
            real_number(f"weights[{name!r}]", value, "a number from 0 to 1", 0.0, 1.0, InvalidQueryError)
            if getattr(self, name) is None:
                raise InvalidQueryError(f"weights[{name!r}] weighs nothing without {name}=; give {name}= too")

    @classmethod
    def of(
        cls, recency: HalfLife | None, importance: str | None, weights: Mapping[str, float] | None
    ) -> Ranking | None:
        """Make the ranking that the arguments of a search mean.

        Args:
            recency: How fast units fade; None for not at all.
            importance: The path of a number from 0 to 1; None for none.
            weights: How much both count, 0..1 each; None for 1.

        Returns:
            The ranking; None where all of them are None.

        Raises:
            InvalidQueryError: An argument cannot be used.
        """
        if recency is None and importance is None and weights is None:
            return None
        return cls(recency, importance, {} if weights is None else weights)

    @staticmethod
    def checked(ranking: object) -> Ranking | None:
        """Check that something is a ranking.

        Args:
            ranking: What the caller gave.

        Returns:
            The ranking, or None.

        Raises:
            InvalidQueryError: It is neither.
        """
        if ranking is None or isinstance(ranking, Ranking):
            return ranking
        raise InvalidQueryError(f"ranking must be a Ranking or None, got {shown(ranking)}")

    @property
    def time_path(self) -> tuple[str, ...] | None:
        """Where units say their moment; None where time does not count."""
        return None if self.recency is None else path_of(self.recency.path)

    @property
    def importance_path(self) -> tuple[str, ...] | None:
        """Where units say their importance; None where it does not count."""
        return None if self.importance is None else path_of(self.importance)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a search that mean this ranking."""
        return {"recency": self.recency, "importance": self.importance, "weights": self.weights}

    def factors(self, moments: DoubleArray | None, importance: DoubleArray | None, now: float) -> DoubleArray:
        """Weigh rows.

        Args:
            moments: Unix times, float64 (n,), NaN where a row has none; None where time does not count.
            importance: Importances, float64 (n,), NaN where a row has none; None where they do not count.
            now: Unix time from which ages count.

        Returns:
            Factors in 0..1, float64 (n,), or () where neither counts.
        """
        found: float | DoubleArray = 1.0
        if self.recency is not None and moments is not None:
            decay = np.exp2(-np.maximum(now - moments, 0.0) / self.recency.seconds)
            found = _blended(decay, self.weights.get("recency", 1.0))
        if importance is not None:
            found = found * _blended(np.clip(importance, 0.0, 1.0), self.weights.get("importance", 1.0))
        return np.asarray(found, dtype=np.float64)

    def factor(self, unit: Mapping[str, object], now: float) -> float:
        """Weigh a unit.

        Args:
            unit: The unit.
            now: Unix time from which its age counts.

        Returns:
            The factor by which its similarity is multiplied, in 0..1.
        """
        moments = None if self.time_path is None else np.array([_moment(lookup(unit, self.time_path))])
        values = None if self.importance_path is None else np.array([_number(lookup(unit, self.importance_path))])
        return float(self.factors(moments, values, now).reshape(-1)[0])

    def now(self) -> float:
        """Read the time from which ages count.

        Returns:
            Unix time in seconds: that of ``recency``, else of now.
        """
        given = None if self.recency is None else self.recency.now
        given = given.timestamp() if isinstance(given, datetime) else given
        return time.time() if given is None else float(given)


@dataclass(frozen=True)
class Window:
    """Which of the results are wanted: at most ``top_k`` after the first ``offset``, with ``min_score`` at least."""

    top_k: int
    offset: int = 0
    min_score: float | None = None

    @classmethod
    def of(cls, top_k: int, offset: object, min_score: object) -> Window:
        """Check the arguments of a search. Raises InvalidQueryError."""
        if min_score is not None:
            limits = ("a finite number, or None", -1e300, 1e300)
            min_score = real_number("min_score", min_score, *limits, InvalidQueryError)
        most = min(whole_number("top_k", top_k), 2**62)
        return cls(most, min(whole_number("offset", offset, least=0), 2**62), min_score)

    @property
    def reach(self) -> int:
        """How many results must be known."""
        return self.top_k + self.offset

    def cut(self, found: Sequence[T], score: Callable[[T], float]) -> list[T]:
        """The wanted ones of all, best first."""
        least = self.min_score
        return [one for one in found[self.offset : self.reach] if least is None or score(one) >= least]


def best(fetch: Callable[[int], Sequence[tuple[float, float, T]]], wanted: int) -> list[tuple[float, T]]:
    """The ``wanted`` best of all, as (score, item), although only the most similar are looked at.

    fetch: gives the so many most similar as (similarity, factor, item), most similar first; factors are 0..1, so what
    it leaves out scores at most the similarity of its last.
    """
    width = max(_FIRST, _WIDER * wanted)
    while True:
        found = fetch(width)
        scored = sorted(((one * factor, item) for one, factor, item in found), key=lambda pair: -pair[0])
        if len(found) < width or (len(scored) >= wanted and scored[wanted - 1][0] > found[-1][0]):
            return scored[:wanted]
        width *= _WIDER


def similarity_of(distances: float | DoubleArray, metric: str) -> DoubleArray:
    """Similarities in 0..1 of distances, one or an array; see this module."""
    if metric == "l2":
        return 1.0 / (1.0 + np.maximum(distances, 0.0))
    if metric == "cosine":
        return np.clip(1.0 - distances, 0.0, 1.0)
    return (1.0 - distances / (1.0 + np.abs(distances))) / 2.0


def _blended(values: DoubleArray, weight: float) -> DoubleArray:
    return 1.0 - weight + weight * np.nan_to_num(values, nan=UNKNOWN)


def _moment(value: object) -> float:
    plain = plain_scalar(value)
    micros = micros_of(plain) if isinstance(plain, str) else None
    return np.nan if micros is None else micros / 1e6


def _number(value: object) -> float:
    plain = plain_scalar(value)
    return float(plain) if isinstance(plain, (int, float)) and not isinstance(plain, bool) else np.nan


def _checked_path(name: str, path: object) -> None:
    try:
        path_of(path)
    except InvalidFilterError as error:
        raise InvalidQueryError(f"{name} must be a path such as 'metadata.{name}', got {shown(path)}") from error


def score_of(distance: float, metric: str) -> float:
    """Convert a distance to a similarity: 1 / (1 + distance) under l2, the cosine, or the dot product."""
    if metric == "cosine":
        return 1.0 - distance
    return -distance if metric == "ip" else 1.0 / (1.0 + distance)
