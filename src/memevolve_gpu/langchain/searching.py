"""The searching half of ``MemEvolveVectorStore``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore as LangChainVectorStore

from .arguments import Asked, query_text
from .bridge import Bridge
from .documents import to_document, to_documents
from .scores import maximal_marginal_relevance

__all__ = ["Searching"]


class Searching(LangChainVectorStore):
    """Finds documents through ``_bridge``; queries are embedded by ``_embedder``."""

    _bridge: Bridge

    def _embedder(self) -> Embeddings:
        raise NotImplementedError

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The k documents nearest to the text, nearest first; fewer where fewer match.

        Raises InvalidQueryError, InvalidFilterError, and what the embedding model raises.
        """
        return _first(self.similarity_search_with_score(query, k, **kwargs))

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """As ``similarity_search``."""
        return _first(await self.asimilarity_search_with_score(query, k, **kwargs))

    def similarity_search_by_vector(self, embedding: Sequence[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The k documents nearest to a vector of d numbers."""
        return _first(self.similarity_search_with_score_by_vector(embedding, k, **kwargs))

    async def asimilarity_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        """As ``similarity_search_by_vector``."""
        return _first(await self.asimilarity_search_with_score_by_vector(embedding, k, **kwargs))

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """(document, distance) of the k nearest: squared L2, 1 - cosine, or -dot by the backend's metric."""
        asked = Asked.of(k, kwargs)
        return self._nearest(asked, self._embedder().embed_query(query_text(query)))

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search_with_score``."""
        asked = Asked.of(k, kwargs)
        vector = await self._embedder().aembed_query(query_text(query))
        return await asyncio.to_thread(self._nearest, asked, vector)

    def similarity_search_with_score_by_vector(
        self, embedding: Sequence[float], k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search_with_score``, for a vector."""
        return self._nearest(Asked.of(k, kwargs), embedding)

    async def asimilarity_search_with_score_by_vector(
        self, embedding: Sequence[float], k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search_with_score_by_vector``."""
        return await asyncio.to_thread(self._nearest, Asked.of(k, kwargs), embedding)

    def similarity_search_by_vector_with_relevance_scores(
        self, embedding: Sequence[float], k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """(document, relevance in [0, 1]) of the k nearest to a vector."""
        score = self._select_relevance_score_fn()
        found = self.similarity_search_with_score_by_vector(embedding, k, **kwargs)
        return [(document, score(distance)) for document, distance in found]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """k of the ``fetch_k`` nearest documents, like the text and unlike each other: see ``scores``.

        lambda_mult: 1 weighs likeness alone, 0 variety alone.
        """
        asked = Asked.of(k, kwargs, fetch_k)
        return self._varied(asked, lambda_mult, self._embedder().embed_query(query_text(query)))

    async def amax_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search``."""
        asked = Asked.of(k, kwargs, fetch_k)
        vector = await self._embedder().aembed_query(query_text(query))
        return await asyncio.to_thread(self._varied, asked, lambda_mult, vector)

    def max_marginal_relevance_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search``, for a vector."""
        return self._varied(Asked.of(k, kwargs, fetch_k), lambda_mult, embedding)

    async def amax_marginal_relevance_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search_by_vector``."""
        return await asyncio.to_thread(self._varied, Asked.of(k, kwargs, fetch_k), lambda_mult, embedding)

    # Inside

    def _nearest(self, asked: Asked, vector: Any) -> list[tuple[Document, float]]:
        found = self._bridge.nearest(vector, asked.k, asked.filters, asked.recall)
        self._bridge.note_read([unit["id"] for unit, _ in found])
        return [(to_document(unit), distance) for unit, distance in found]

    def _varied(self, asked: Asked, lambda_mult: float, vector: Any) -> list[Document]:
        found = self._bridge.nearest_vectors(vector, asked.fetch_k, asked.filters, asked.recall)
        chosen = maximal_marginal_relevance(vector, [row for _, row in found], asked.k, lambda_mult)
        units = [found[position][0] for position in chosen]
        self._bridge.note_read([unit["id"] for unit in units])
        return to_documents(units)


def _first(found: Sequence[tuple[Document, float]]) -> list[Document]:
    return [document for document, _ in found]
