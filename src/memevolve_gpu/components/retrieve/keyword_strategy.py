"""Retrieval by words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..store.base import StorageBackend
from ..store.doors import retrieve_many
from .base import COUNTED, RetrievalResult, RetrievalStrategy, note_access
from .ranking import by_keywords, check_query

__all__ = ["KeywordRetrievalStrategy"]


class KeywordRetrievalStrategy(RetrievalStrategy):
    """Asks the backend's full-text index; the score is BM25. A backend without one is scanned."""

    def retrieve(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Mapping[str, Any] | None = None
    ) -> list[RetrievalResult]:
        """The units that share words with the query, best first. Raises InvalidQueryError, InvalidFilterError."""
        top_k = check_query(query, top_k)
        ranked = by_keywords(storage_backend, query, top_k, filters)
        units = retrieve_many(storage_backend, [one.id for one in ranked])
        note_access(storage_backend, list(units))
        return [RetrievalResult(one.id, units[one.id], one.score, {}) for one in ranked if one.id in units]

    def count_relevant(
        self, query: str, storage_backend: StorageBackend, filters: Mapping[str, Any] | None = None
    ) -> int:
        """How many units share a word with the query, counted up to a thousand."""
        check_query(query, 1)
        return len(by_keywords(storage_backend, query, COUNTED, filters))
