"""Retrieval by meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...utils.embeddings import EmbeddingFunction
from ..store.base import StorageBackend
from ..store.capabilities import TextSearch
from ..store.doors import retrieve_many
from .base import COUNTED, RetrievalResult, RetrievalStrategy, note_access
from .ranking import VectorScan, by_meaning, check_query

__all__ = ["SemanticRetrievalStrategy"]


class SemanticRetrievalStrategy(RetrievalStrategy):
    """Asks the backend's vector index. The score is the store's: the cosine, the dot product, or 1 / (1 + distance)."""

    def __init__(
        self, embedding_function: EmbeddingFunction | None = None, similarity_threshold: float | None = None
    ) -> None:
        """``embedding_function`` serves backends without an index, which are scanned; a store embeds by itself.

        Results whose score is below ``similarity_threshold`` are left out. Raises EmbeddingError when the function
        cannot be called.
        """
        self.similarity_threshold = similarity_threshold
        self._scan = None if embedding_function is None else VectorScan(embedding_function)

    def retrieve(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Mapping[str, Any] | None = None
    ) -> list[RetrievalResult]:
        """The nearest units, nearest first; ``metadata["distance"]`` as in ``VectorStore.search``.

        Raises InvalidQueryError, InvalidFilterError, EmbeddingError.
        """
        top_k = check_query(query, top_k)
        found = self._found(query, storage_backend, top_k, filters)
        kept = [one for one in found if self.similarity_threshold is None or one.score >= self.similarity_threshold]
        note_access(storage_backend, [one.unit_id for one in kept])
        return kept

    def count_relevant(
        self, query: str, storage_backend: StorageBackend, filters: Mapping[str, Any] | None = None
    ) -> int:
        """How many units reach the threshold, counted up to a thousand; without one, every unit that matches."""
        check_query(query, 1)
        found = by_meaning(storage_backend, query, COUNTED, filters, self._scan)
        least = self.similarity_threshold
        return sum(least is None or one.score >= least for one in found)

    def save_state(self) -> dict[str, Any]:
        """The threshold."""
        return {"similarity_threshold": self.similarity_threshold}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take the threshold over."""
        self.similarity_threshold = state.get("similarity_threshold", self.similarity_threshold)

    def _found(
        self, query: str, backend: StorageBackend, top_k: int, filters: Mapping[str, Any] | None
    ) -> list[RetrievalResult]:
        if isinstance(backend, TextSearch):
            hits = backend.search_units(query, top_k, filters, record=False)
            return [RetrievalResult(hit.id, hit.unit, hit.score, {"distance": hit.distance}) for hit in hits]
        ranked = by_meaning(backend, query, top_k, filters, self._scan)
        units = retrieve_many(backend, [one.id for one in ranked])
        return [
            RetrievalResult(one.id, units[one.id], one.score, {"distance": one.distance})
            for one in ranked
            if one.id in units
        ]
