"""``MemEvolveVectorStore``: LangChain's vector store on a backend of this package."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore as LangChainVectorStore

from ...components.store.base import StorageBackend
from ...components.store.vector_store import VectorStore
from ...errors import ConfigurationError, EmbeddingError, InvalidFilterError
from ...types import MemoryUnit
from .adapter import (
    BackendAdapter,
    SearchOptions,
    batches,
    checked_ids,
    documents_of,
    no_more,
    pairs_of,
    query_text,
    to_document,
    to_documents,
    to_units,
)
from .embeddings import EmbeddingsFunction, as_embeddings
from .filters import alternatives, maximal_marginal_relevance, relevance

__all__ = ["MemEvolveVectorStore"]


def _first(found: Sequence[tuple[Document, float]]) -> list[Document]:
    return [document for document, _ in found]


_Store = TypeVar("_Store", bound="MemEvolveVectorStore")


class MemEvolveVectorStore(LangChainVectorStore):
    """Documents in a backend of this package: a ``VectorStore``, or another that can search by vector.

    One backend is one collection. Searches take ``filter`` (LangChain's form, on the metadata), ``filters`` (this
    package's form, on the whole unit; both must hold) and ``recall`` (the share of true neighbours to aim at for this
    call); any other option is refused, for a misspelt filter must not match everything. Scores are distances by the
    backend's metric, smaller is nearer; relevance scores are in [0, 1].

    As safe to use from several threads and processes as the backend. See docs/how-to/langchain.md.
    """

    def __init__(
        self,
        backend: StorageBackend,
        embedding: Embeddings | None = None,
        *,
        relevance_score_fn: Callable[[float], float] | None = None,
    ) -> None:
        """``embedding`` None: the backend's own embedding function. The backend stays its maker's to close.

        relevance_score_fn: maps a distance to [0, 1] in place of ``scores.relevance``. Raises ConfigurationError when
        the backend cannot search by vector.
        """
        self._adapter = BackendAdapter(backend)
        self._embedding = (
            as_embeddings(getattr(backend, "embedding_function", None)) if embedding is None else embedding
        )
        self._relevance_score_fn = relevance_score_fn
        self._owned: VectorStore | None = None

    @classmethod
    def open(
        cls: type[_Store],
        index_file: str | os.PathLike[str],
        embedding: Embeddings,
        *,
        embedding_dim: int | None = None,
        storage_config: Any = None,
        relevance_score_fn: Callable[[float], float] | None = None,
    ) -> _Store:
        """Open the ``VectorStore`` at a path prefix, or make a new one; ``close()`` closes it. Raises as it does."""
        backend = VectorStore(
            index_file, EmbeddingsFunction(embedding, embedding_dim), embedding_dim, storage_config=storage_config
        )
        store = cls(backend, embedding, relevance_score_fn=relevance_score_fn)
        store._owned = backend
        return store

    @classmethod
    def from_texts(
        cls: type[_Store],
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> _Store:
        """A store with these texts: on ``backend``, or at the path prefix ``index_file`` with the options of ``open``.

        Raises ConfigurationError when neither is given, and as ``open`` and ``add_texts`` do; nothing stays open then.
        """
        store = cls._made(embedding, kwargs)
        try:
            store.add_texts(texts, metadatas, ids=ids)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    async def afrom_texts(
        cls: type[_Store],
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> _Store:
        """As ``from_texts``."""
        store = await asyncio.to_thread(cls._made, embedding, kwargs)
        try:
            await store.aadd_texts(texts, metadatas, ids=ids)
        except BaseException:
            store.close()
            raise
        return store

    @property
    def backend(self) -> StorageBackend:
        """Where the documents are; for management, health and everything that LangChain has no word for."""
        return self._adapter.backend

    @property
    def embeddings(self) -> Embeddings | None:
        """What embeds documents and queries; None where only vectors are given."""
        return self._embedding

    # Writing

    def add_documents(
        self,
        documents: list[Document],
        ids: Sequence[str | None] | None = None,
        *,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Keep documents and return their ids, in order. A document whose id exists is replaced.

        The id is the one in ``ids``, else the document's, else a new UUID. batch_size: most texts to embed at once. On
        a ``VectorStore`` all is kept or nothing. Raises InvalidUnitError for what JSON cannot hold, before anything is
        embedded; CapacityError, StorageError; what the embedding model raises.
        """
        no_more(kwargs)
        units = to_units(documents, ids)
        texts = [unit["content"] for unit in units]
        embed = self._embedder().embed_documents
        vectors = [vector for batch in batches(texts, batch_size) for vector in embed(batch)]
        return self._keep(units, vectors)

    async def aadd_documents(
        self,
        documents: list[Document],
        ids: Sequence[str | None] | None = None,
        *,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """As ``add_documents``. What is being written when the task is cancelled is still written."""
        no_more(kwargs)
        units = to_units(documents, ids)
        embed = self._embedder().aembed_documents
        vectors: list[list[float]] = []
        for batch in batches([unit["content"] for unit in units], batch_size):
            vectors += await embed(batch)
        return await asyncio.to_thread(self._keep, units, vectors)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: Sequence[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """As ``add_documents``, of texts and their metadata."""
        return self.add_documents(documents_of(texts, metadatas), ids, **kwargs)

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: Sequence[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """As ``add_texts``."""
        return await self.aadd_documents(documents_of(texts, metadatas), ids, **kwargs)

    def add_embeddings(
        self,
        text_embeddings: Iterable[tuple[str, Sequence[float]]] | None = None,
        metadatas: Sequence[dict[str, Any]] | None = None,
        ids: Sequence[str | None] | None = None,
        *,
        embeddings: Iterable[Sequence[float]] | None = None,
    ) -> list[str]:
        """As ``add_texts``, of (text, vector) pairs; nothing is embedded.

        ``embeddings`` gives vectors alone, as mem0 does; the text of each is then ``data`` in its metadata, or empty.
        """
        pairs = pairs_of(text_embeddings, embeddings, metadatas)
        units = to_units(documents_of([text for text, _ in pairs], metadatas), ids)
        return self._keep(units, [vector for _, vector in pairs])

    async def aadd_embeddings(
        self,
        text_embeddings: Iterable[tuple[str, Sequence[float]]] | None = None,
        metadatas: Sequence[dict[str, Any]] | None = None,
        ids: Sequence[str | None] | None = None,
        *,
        embeddings: Iterable[Sequence[float]] | None = None,
    ) -> list[str]:
        """As ``add_embeddings``."""
        return await asyncio.to_thread(self.add_embeddings, text_embeddings, metadatas, ids, embeddings=embeddings)

    def delete(
        self,
        ids: Sequence[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,  # noqa: A002  # LangChain's name for it
        filters: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> bool:
        """Delete documents by id or by filter, and all of them when neither is given; True, errors are raised.

        Ids that do not exist are passed over, an empty list deletes nothing. Raises InvalidFilterError for a filter
        without a condition, which would match everything.
        """
        no_more(kwargs)
        if filter is None and filters is None:
            self._adapter.backend.clear() if ids is None else self._adapter.drop(checked_ids(ids))
            return True
        if ids is not None:
            raise InvalidFilterError("filter and ids exclude each other in delete; give one of them")
        conditions = alternatives(filter, filters)
        if {} in conditions:
            raise InvalidFilterError("filter has no condition and would delete everything; call delete_collection()")
        self._adapter.drop_matching(conditions)
        return True

    async def adelete(self, ids: Sequence[str] | None = None, **kwargs: Any) -> bool:
        """As ``delete``."""
        return await asyncio.to_thread(partial(self.delete, ids, **kwargs))

    def delete_collection(self) -> None:
        """Delete everything in the backend. It can be filled again."""
        self._adapter.backend.clear()

    async def adelete_collection(self) -> None:
        """As ``delete_collection``."""
        await asyncio.to_thread(self.delete_collection)

    # Reading

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents that exist, in the order of ``ids``, each once."""
        found = self._adapter.units_of(checked_ids(ids))
        self._adapter.note_read(list(found))
        return to_documents(list(found.values()))

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """As ``get_by_ids``."""
        return await asyncio.to_thread(self.get_by_ids, ids)

    # Closing

    def close(self) -> None:
        """Close the backend if this store opened it."""
        backend, self._owned = self._owned, None
        if backend is not None:
            backend.close()

    def __enter__(self: _Store) -> _Store:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    async def amax_marginal_relevance_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search_by_vector``."""
        return await asyncio.to_thread(self._varied, SearchOptions.of(k, kwargs, fetch_k), lambda_mult, embedding)

    async def amax_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search``."""
        options = SearchOptions.of(k, kwargs, fetch_k)
        vector = await self._embedder().aembed_query(query_text(query))
        return await asyncio.to_thread(self._varied, options, lambda_mult, vector)

    async def asimilarity_search_with_score_by_vector(
        self, embedding: Sequence[float], k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search_with_score_by_vector``."""
        return await asyncio.to_thread(self._nearest, SearchOptions.of(k, kwargs), embedding)

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search_with_score``."""
        options = SearchOptions.of(k, kwargs)
        vector = await self._embedder().aembed_query(query_text(query))
        return await asyncio.to_thread(self._nearest, options, vector)

    async def asimilarity_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        """As ``similarity_search_by_vector``."""
        return _first(await self.asimilarity_search_with_score_by_vector(embedding, k, **kwargs))

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """As ``similarity_search``."""
        return _first(await self.asimilarity_search_with_score(query, k, **kwargs))

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The k documents nearest to the text, nearest first; fewer where fewer match.

        Raises InvalidQueryError, InvalidFilterError, and what the embedding model raises.
        """
        return _first(self.similarity_search_with_score(query, k, **kwargs))

    def similarity_search_by_vector(self, embedding: Sequence[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The k documents nearest to a vector of d numbers."""
        return _first(self.similarity_search_with_score_by_vector(embedding, k, **kwargs))

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """(document, distance) of the k nearest: squared L2, 1 - cosine, or -dot by the backend's metric."""
        options = SearchOptions.of(k, kwargs)
        return self._nearest(options, self._embedder().embed_query(query_text(query)))

    def similarity_search_with_score_by_vector(
        self, embedding: Sequence[float], k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search_with_score``, for a vector."""
        return self._nearest(SearchOptions.of(k, kwargs), embedding)

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
        options = SearchOptions.of(k, kwargs, fetch_k)
        return self._varied(options, lambda_mult, self._embedder().embed_query(query_text(query)))

    def max_marginal_relevance_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search``, for a vector."""
        return self._varied(SearchOptions.of(k, kwargs, fetch_k), lambda_mult, embedding)

    # Inside

    @classmethod
    def _made(cls: type[_Store], embedding: Embeddings, options: dict[str, Any]) -> _Store:
        backend = options.get("backend")
        if backend is not None:
            return cls(embedding=embedding, **options)
        if options.get("index_file") is None:
            raise ConfigurationError(
                "index_file is missing: give the path prefix of the store to open or make, or an open backend"
            )
        return cls.open(embedding=embedding, **{name: value for name, value in options.items() if name != "backend"})

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return self._relevance_score_fn or partial(relevance, metric=self._adapter.metric)

    def _embedder(self) -> Embeddings:
        if self._embedding is None:
            raise EmbeddingError("embedding is None, and so is the backend's function: give one, or search by vector")
        return self._embedding

    def _keep(self, units: Sequence[MemoryUnit], vectors: Sequence[Any]) -> list[str]:
        return self._adapter.keep(units, vectors) if units else []

    def _nearest(self, options: SearchOptions, vector: Any) -> list[tuple[Document, float]]:
        found = self._adapter.nearest(vector, options.k, options.filters, options.recall)
        self._adapter.note_read([unit["id"] for unit, _ in found])
        return [(to_document(unit), distance) for unit, distance in found]

    def _varied(self, options: SearchOptions, lambda_mult: float, vector: Any) -> list[Document]:
        found = self._adapter.nearest_vectors(vector, options.fetch_k, options.filters, options.recall)
        chosen = maximal_marginal_relevance(vector, [row for _, row in found], options.k, lambda_mult)
        units = [found[position][0] for position in chosen]
        self._adapter.note_read([unit["id"] for unit in units])
        return to_documents(units)
