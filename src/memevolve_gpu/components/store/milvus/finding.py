"""The searching half of ``MilvusStore``; the same verbs as ``VectorStore``'s."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ....types import FloatArray, Hit
from ....utils.vectors import check_vectors, cosines
from ..engine import score_of
from ..searching import check_arguments, check_width
from .core import Core
from .search import Candidate

__all__ = ["Finding"]


class Finding:
    """Finds units by meaning in the store that ``_open`` gives."""

    @property
    def _open(self) -> Core:
        raise NotImplementedError

    def search(
        self,
        query: str,
        top_k: int = 5,
        filters: Mapping[str, Any] | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
    ) -> list[tuple[float, str]]:
        """[(distance, id), ...] of the units nearest to the text, nearest first; never more than are stored.

        Distances, filters and recall as in ``VectorStore.search``. record: this store keeps no access figures. Raises
        InvalidQueryError, InvalidFilterError, EmbeddingError, StoreUnavailableError.
        """
        del record
        found = self._find_text(query, top_k, filters, recall, with_units=False)
        return [(one.distance, one.id) for one in found]

    def search_units(
        self,
        query: str,
        top_k: int = 5,
        filters: Mapping[str, Any] | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
    ) -> list[Hit]:
        """As ``search``, with each unit and a score that grows with similarity."""
        del record
        metric = self._open.facts.metric
        found = self._find_text(query, top_k, filters, recall, with_units=True)
        return [
            Hit(one.unit, one.id, one.distance, score_of(one.distance, metric)) for one in found if one.unit is not None
        ]

    def search_vectors(
        self, queries: Any, top_k: int = 5, filters: Mapping[str, Any] | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        """queries (n, dim) -> distances float32 (n, top_k) and n lists of top_k ids; +inf and None where fewer exist.

        Raises InvalidVectorError, DimensionMismatchError, InvalidQueryError, InvalidFilterError,
        StoreUnavailableError.
        """
        core = self._open
        width = check_arguments(top_k, recall)
        vectors = check_vectors(queries, core.facts.dim, core.facts.metric, name="queries")
        check_width(len(vectors), width)
        found = self._find(vectors, width, filters, recall, with_units=False)
        distances = np.full((len(vectors), width), np.inf, dtype=np.float32)
        ids: list[list[str | None]] = [[None] * width for _ in found]
        for row, candidates in enumerate(found):
            distances[row, : len(candidates)] = [one.distance for one in candidates]
            ids[row][: len(candidates)] = [one.id for one in candidates]
        return distances, ids

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        """The cosine between the text and each of the units that exist, by id, whatever the store's metric.

        Raises EmbeddingError, StoreUnavailableError.
        """
        core = self._open
        return cosines(core.embed_query(query), core.table.vectors(list(dict.fromkeys(ids))))

    # Inside

    def _find_text(
        self, query: str, top_k: int, filters: Mapping[str, Any] | None, recall: float | None, *, with_units: bool
    ) -> list[Candidate]:
        wanted = check_arguments(top_k, recall, query)
        vector = self._open.embed_query(query)
        return self._find(vector[None, :], wanted, filters, recall, with_units=with_units)[0]

    def _find(
        self,
        vectors: FloatArray,
        top_k: int,
        filters: Mapping[str, Any] | None,
        recall: float | None,
        *,
        with_units: bool,
    ) -> list[list[Candidate]]:
        core, started = self._open, time.perf_counter()
        found = core.search.nearest(vectors, top_k, filters, recall, with_units)
        core.latency.record(time.perf_counter() - started)
        return found
