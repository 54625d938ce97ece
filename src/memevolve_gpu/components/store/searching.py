"""The searching half of ``VectorStore``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import InvalidQueryError
from ...live import Found
from ...types import FloatArray, Hit
from ...utils.arguments import shown, whole_number
from ...utils.device_arrays import DeviceQueries, device_queries
from ...utils.vectors import check_vector, check_vectors, normalize_rows
from .engine import Engine
from .units import unit_to_text

__all__ = ["MAX_RESULTS", "Searching", "check_arguments", "check_width"]

MAX_RESULTS = 10_000_000
"""Most results of one call of ``search_vectors``, queries times ``top_k``: 120 MB of distances and places, and ids."""


class Searching:
    """Finds units by meaning and by words in the store that ``_open`` gives."""

    @property
    def _open(self) -> Engine:
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

        Distances: squared L2, 1 - cosine, or -dot by the store's metric. filters: see ``docs/reference/filters.md``.
        recall overrides TARGET_RECALL for this call (1.0: exact). record=False leaves the access figures alone,
        for those who pass only some of the results on. Raises InvalidQueryError, InvalidFilterError, EmbeddingError.
        """
        found = self._find_text(query, top_k, filters, recall)
        if found is None:
            return []
        ids = found.ids(0)
        if record:
            self._open.accesses.note(ids)
        return list(zip(found.distances[0].tolist(), ids, strict=False))

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
        found = self._find_text(query, top_k, filters, recall)
        if found is None:
            return []
        hits = self._open.hits(found, lambda: self._find_text(query, top_k, filters, recall))
        if record:
            self._open.accesses.note([hit.id for hit in hits])
        return hits

    def search_vectors(
        self, queries: Any, top_k: int = 5, filters: Mapping[str, Any] | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        """queries (n, dim) -> distances float32 (n, top_k) and n lists of top_k ids; +inf and None where fewer exist.

        n times top_k may be 10,000,000 at most. queries may lie on a GPU, as a torch tensor, a cupy array or anything
        that speaks DLPack; they stay there where the index does too.

        Raises InvalidVectorError, DimensionMismatchError, InvalidQueryError, InvalidFilterError.
        """
        engine = self._open
        width = check_arguments(top_k, recall)
        vectors = _queries(engine, queries)
        check_width(len(vectors), width)
        found = self._find(vectors, width, filters, recall)
        ids: list[list[str | None]] = []
        for row in range(len(vectors)):
            names: list[str | None] = list(found.ids(row))
            ids.append(names + [None] * (width - len(names)))
        return _widened(found.distances, width), ids

    def search_keywords(
        self, query: str, top_k: int = 5, filters: Mapping[str, Any] | None = None
    ) -> list[tuple[float, str]]:
        """[(score, id), ...] of the units whose embedded text has words of the query, best BM25 score first.

        Words in more than a twentieth of the units score but find nothing by themselves, unless there is no other.
        Raises InvalidQueryError, InvalidFilterError.
        """
        records = self._open.records
        limit = min(check_arguments(top_k, None, query), max(1, records.count()))
        return records.keyword(query, limit, filters, text_of=unit_to_text)

    # Inside

    def _find_text(
        self, query: str, top_k: int, filters: Mapping[str, Any] | None, recall: float | None
    ) -> Found | None:
        engine = self._open
        wanted = check_arguments(top_k, recall, query)
        if not engine.live.catch_up().count:
            return None
        vector = check_vector(engine.embed_query(query), engine.records.dim, engine.records.metric, name="query")
        return self._find(vector[None, :], wanted, filters, recall)

    def _find(
        self,
        vectors: FloatArray | DeviceQueries,
        top_k: int,
        filters: Mapping[str, Any] | None,
        recall: float | None,
    ) -> Found:
        engine = self._open
        if engine.records.metric == "cosine" and not isinstance(vectors, DeviceQueries):
            vectors = normalize_rows(vectors)
        found = engine.live.search(vectors, top_k, filters, recall)
        if engine.live.look_due or engine.worker.start_failure:
            engine.consider_maintenance()
        return found


def _queries(engine: Engine, given: Any) -> FloatArray | DeviceQueries:
    """Checked queries, on the device where they lie if the body takes them there, else on the host."""
    body, dim, metric = engine.live.view.body, engine.records.dim, engine.records.metric
    if body.accepts_device_queries and body.device != "cpu":
        found = device_queries(given, dim, metric)
        if found is not None:
            return found
    return check_vectors(given, dim, metric, name="queries")


def check_arguments(top_k: Any, recall: Any, query: Any = "") -> int:
    """``top_k`` as an int; InvalidQueryError for what no search can answer."""
    if not isinstance(query, str):
        raise InvalidQueryError(f"query must be a string, got {type(query).__name__}; see search_vectors")
    wanted = whole_number("top_k", top_k)
    if recall is not None and (isinstance(recall, bool) or not isinstance(recall, (int, float)) or not 0 < recall <= 1):
        raise InvalidQueryError(f"recall must be a number above 0 and at most 1, got {shown(recall)}")
    return wanted


def check_width(queries: int, top_k: int) -> None:
    """Raise InvalidQueryError where so many queries with so many results each are more than one call may return."""
    if queries * top_k > MAX_RESULTS:
        raise InvalidQueryError(
            f"top_k={shown(top_k)} for {queries} queries are more than {MAX_RESULTS:,} results; ask for fewer, or "
            "for fewer queries at once"
        )


def _widened(distances: FloatArray, width: int) -> FloatArray:
    """As many columns as were asked for, +inf where nothing exists."""
    if distances.shape[1] == width:
        return distances
    wide = np.full((len(distances), width), np.inf, dtype=np.float32)
    wide[:, : distances.shape[1]] = distances
    return wide
