"""Retrieval by meaning and by words together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from ...errors import ConfigurationError
from ...utils.embeddings import EmbeddingFunction
from ..store.base import StorageBackend
from ..store.capabilities import Similarities
from ..store.doors import retrieve_many
from .base import COUNTED, RetrievalResult, RetrievalStrategy, note_access
from .fusion import Fused, reciprocal_ranks, weighted
from .ranking import Ranked, VectorScan, by_keywords, by_meaning, check_query

__all__ = ["HybridRetrievalStrategy"]

Fusion = Literal["weighted", "rrf"]

POOL, POOL_FACTOR = 20, 4
"""Units that each half proposes: this many, and at least so many times ``top_k``."""


class HybridRetrievalStrategy(RetrievalStrategy):
    """Asks the vector index and the full-text index, and fuses what they find.

    weighted: 0.7 of the cosine and 0.3 of BM25 relative to the best of the query; scores are in 0..1. rrf: reciprocal
    rank fusion, which looks at ranks only.
    """

    def __init__(
        self,
        embedding_function: EmbeddingFunction | None = None,
        semantic_weight: float = 0.7,
        keyword_weight: float = 0.3,
        similarity_threshold: float | None = None,
        *,
        fusion: Fusion = "weighted",
    ) -> None:
        """``embedding_function`` serves backends without an index, which are scanned; a store embeds by itself.

        Weights are taken as shares of their sum, and only ``weighted`` reads them. Results whose fused score is below
        ``similarity_threshold`` are left out. Raises ConfigurationError, EmbeddingError.
        """
        if fusion not in ("weighted", "rrf"):
            raise ConfigurationError(f"fusion must be 'weighted' or 'rrf', got {fusion!r}")
        self.fusion: Fusion = fusion
        self.similarity_threshold = similarity_threshold
        self.set_weights(semantic_weight, keyword_weight)
        self._scan = None if embedding_function is None else VectorScan(embedding_function)

    def set_weights(self, semantic_weight: float, keyword_weight: float) -> None:
        """Set both weights, as shares of their sum. Raises ConfigurationError when one is negative or both are 0."""
        total = semantic_weight + keyword_weight
        if not (semantic_weight >= 0 and keyword_weight >= 0 and 0 < total < math.inf):
            raise ConfigurationError(
                f"semantic_weight={semantic_weight!r} and keyword_weight={keyword_weight!r} must be at least 0 and not "
                "both 0"
            )
        self.semantic_weight = semantic_weight / total
        self.keyword_weight = keyword_weight / total

    def retrieve(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Mapping[str, Any] | None = None
    ) -> list[RetrievalResult]:
        """The best units of both kinds of search, each once, best first.

        ``metadata`` has ``semantic_score``, ``keyword_score``, ``semantic_rank`` and ``keyword_rank`` (from 0; None
        where that half did not find the unit). Raises InvalidQueryError, InvalidFilterError, EmbeddingError.
        """
        top_k = check_query(query, top_k)
        fused = self._fused(query, storage_backend, max(POOL, POOL_FACTOR * top_k), filters)
        units = retrieve_many(storage_backend, [one.id for one in fused[:top_k]])
        if len(units) < min(top_k, len(fused)):  # somebody deletes while we read
            units = retrieve_many(storage_backend, [one.id for one in fused])
        found = [_result(one, units[one.id]) for one in fused if one.id in units][:top_k]
        note_access(storage_backend, [one.unit_id for one in found])
        return found

    def count_relevant(
        self, query: str, storage_backend: StorageBackend, filters: Mapping[str, Any] | None = None
    ) -> int:
        """How many units either half finds and the threshold lets pass, counted up to a thousand."""
        check_query(query, 1)
        return min(COUNTED, len(self._fused(query, storage_backend, COUNTED, filters)))

    def save_state(self) -> dict[str, Any]:
        """Weights, threshold and the kind of fusion."""
        return {
            "semantic_weight": self.semantic_weight,
            "keyword_weight": self.keyword_weight,
            "similarity_threshold": self.similarity_threshold,
            "fusion": self.fusion,
        }

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``save_state`` of another instance gave."""
        self.set_weights(
            state.get("semantic_weight", self.semantic_weight), state.get("keyword_weight", self.keyword_weight)
        )
        self.similarity_threshold = state.get("similarity_threshold", self.similarity_threshold)
        self.fusion = state.get("fusion", self.fusion)

    def _fused(self, query: str, backend: StorageBackend, pool: int, filters: Mapping[str, Any] | None) -> list[Fused]:
        semantic = by_meaning(backend, query, pool, filters, self._scan)
        keyword = by_keywords(backend, query, pool, filters)
        if self.fusion == "rrf":
            fused = reciprocal_ranks(semantic, keyword)
        else:
            weights = self.semantic_weight, self.keyword_weight
            fused = weighted(semantic, keyword, weights, self._similarity(query, backend, semantic, keyword))
        least = self.similarity_threshold
        return [one for one in fused if least is None or one.score >= least]

    def _similarity(
        self, query: str, backend: StorageBackend, semantic: list[Ranked], keyword: list[Ranked]
    ) -> dict[str, float]:
        if not isinstance(backend, Similarities):
            return {}
        return backend.similarities(query, list({one.id: None for one in (*semantic, *keyword)}))


def _result(one: Fused, unit: dict[str, Any]) -> RetrievalResult:
    metadata = {
        "semantic_score": one.semantic_score,
        "keyword_score": one.keyword_score,
        "semantic_rank": one.semantic_rank,
        "keyword_rank": one.keyword_rank,
    }
    return RetrievalResult(one.id, unit, one.score, metadata)
