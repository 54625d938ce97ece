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
from ...errors import ConfigurationError, EmbeddingError, InvalidFilterError, InvalidUnitError
from ...records.filters import always, parse
from ...types import Filters, JsonObject, Vectors
from ...utils.arguments import listed
from ..documents import in_a_thread
from .adapter import (
    SearchOptions,
    batches,
    documents_of,
    keep,
    nearest,
    nearest_vectors,
    no_more,
    pairs_of,
    query_text,
    searchable,
    to_document,
    to_documents,
    to_units,
)
from .embeddings import EmbeddingsFunction, as_embeddings
from .filters import maximal_marginal_relevance, on_units, relevance


def _first(found: Sequence[tuple[Document, float]]) -> list[Document]:
    return [document for document, _ in found]


class _Collection:
    """The documents in the manner of Chroma's collection."""

    def __init__(self, backend: StorageBackend) -> None:
        self._backend = backend

    def get(self, where: Mapping[str, object] | None = None, limit: int | None = None) -> dict[str, list[Any]]:
        """The ids, texts and metadata of documents, oldest first."""
        found = to_documents(list(self._backend.units(on_units(where or None, None), limit=limit)))
        return {
            "ids": [document.id for document in found],
            "documents": [document.page_content for document in found],
            "metadatas": [document.metadata for document in found],
        }


_Store = TypeVar("_Store", bound="MemEvolveVectorStore")


class MemEvolveVectorStore(LangChainVectorStore):
    """LangChain's vector store on a ``VectorStore``, or another backend that can search by vector.

    One backend is one collection. Searches take ``filter`` (LangChain's form, on the metadata), ``filters`` (this
    package's form, on the whole unit; both must match) and ``recall`` (the share of the true neighbours to find); any
    other option is refused, so that a misspelt filter does not match everything. Scores are distances by the backend's
    metric, smaller is nearer; relevance scores are in [0, 1].

    As safe to use from several threads and processes as the backend. See docs/how-to/langchain.md.

    Examples:
        >>> import tempfile
        >>> from memevolve_gpu import HashingEmbedder
        >>> from memevolve_gpu.integrations.langchain import FunctionEmbeddings, MemEvolveVectorStore
        >>> embedding = FunctionEmbeddings(HashingEmbedder())
        >>> with (
        ...     tempfile.TemporaryDirectory() as folder,
        ...     MemEvolveVectorStore.from_texts(
        ...         ["git bisect finds the bad commit", "tar makes an archive"],
        ...         embedding,
        ...         [{"topic": "git"}, {"topic": "files"}],
        ...         index_file=f"{folder}/memory",
        ...     ) as store,
        ... ):
        ...     [document.metadata["topic"] for document in store.similarity_search("find the bad commit", k=1)]
        ...     [document.page_content for document in store.similarity_search("git", filter={"topic": "files"})]
        ['git']
        ['tar makes an archive']
    """

    def __init__(
        self,
        backend: StorageBackend,
        embedding: Embeddings | None = None,
        *,
        relevance_score_fn: Callable[[float], float] | None = None,
    ) -> None:
        """Create a store on an open backend, which ``close()`` leaves open.

        Args:
            backend: The backend.
            embedding: Embeds documents and queries; None for the backend's own embedding function.
            relevance_score_fn: Maps a distance to [0, 1]; None for :func:`relevance`.

        Raises:
            ConfigurationError: The backend cannot search by vector.
        """
        self._backend = searchable(backend)
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
        storage_config: object = None,
        relevance_score_fn: Callable[[float], float] | None = None,
    ) -> _Store:
        """Open the ``VectorStore`` at a path prefix, or create it. ``close()`` closes it.

        Args:
            index_file: Path prefix of the store's files.
            embedding: Embeds documents and queries.
            embedding_dim: Length of its vectors; None to find it by embedding a probe.
            storage_config: A ``StorageConfig``; None for the environment's settings.
            relevance_score_fn: As in the constructor.

        Returns:
            The store.

        Raises:
            MemEvolveError: As ``VectorStore``.
        """
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
        metadatas: list[JsonObject] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> _Store:
        """Create a store with these texts.

        Args:
            texts: The texts.
            embedding: Embeds documents and queries.
            metadatas: One mapping per text; None for none.
            ids: One id, or None, per text; None for new UUIDs.
            **kwargs: ``backend`` for an open backend, or ``index_file`` and the other arguments of :meth:`open`.

        Returns:
            The store. Nothing stays open after an error.

        Raises:
            ConfigurationError: Neither ``backend`` nor ``index_file`` is given.
            MemEvolveError: As :meth:`open` and :meth:`add_texts`.
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
        metadatas: list[JsonObject] | None = None,
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
        """The backend that holds the documents, for management, health and other operations."""
        return self._backend

    @property
    def embeddings(self) -> Embeddings | None:
        """Embeds documents and queries; None where only vectors are given."""
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
        """Store documents. A ``VectorStore`` stores all or none.

        Args:
            documents: The documents; one whose id exists is replaced.
            ids: One id, or None, per document. Without one, the id is the document's, else a new UUID.
            batch_size: Most texts in one call of the embedding model; None for all.
            **kwargs: None are allowed.

        Returns:
            The ids, in order.

        Raises:
            InvalidUnitError: A document has something that JSON cannot represent. Nothing is embedded.
            CapacityError: The documents do not fit.
            StorageError: The store cannot be written. Errors of the embedding model pass through.
        """
        no_more(kwargs)
        units = to_units(documents, ids)
        texts = [unit["content"] for unit in units]
        embed = self._embedder().embed_documents
        vectors = [vector for batch in batches(texts, batch_size) for vector in embed(batch)]
        return keep(self._backend, units, vectors)

    async def aadd_documents(
        self,
        documents: list[Document],
        ids: Sequence[str | None] | None = None,
        *,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """As ``add_documents``. A write that has begun when the task is cancelled is completed."""
        no_more(kwargs)
        units = to_units(documents, ids)
        embed = self._embedder().aembed_documents
        vectors: list[list[float]] = []
        for batch in batches([unit["content"] for unit in units], batch_size):
            vectors += await embed(batch)
        return await asyncio.to_thread(keep, self._backend, units, vectors)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: Sequence[JsonObject] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """As ``add_documents``, for texts and their metadata."""
        return self.add_documents(documents_of(texts, metadatas), ids, **kwargs)

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: Sequence[JsonObject] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """As ``add_texts``."""
        return await self.aadd_documents(documents_of(texts, metadatas), ids, **kwargs)

    def add_embeddings(
        self,
        text_embeddings: Iterable[tuple[str, Sequence[float]]] | None = None,
        metadatas: Sequence[JsonObject] | None = None,
        ids: Sequence[str | None] | None = None,
        *,
        embeddings: Iterable[Sequence[float]] | None = None,
    ) -> list[str]:
        """As ``add_texts``, for texts whose vectors are given.

        Args:
            text_embeddings: (text, vector of d numbers) pairs.
            metadatas: One mapping per pair; None for none.
            ids: As for :meth:`add_documents`.
            embeddings: Vectors alone, as mem0 gives them; the text of each is ``data`` in its metadata, or empty.

        Returns:
            The ids, in order.

        Raises:
            InvalidUnitError: The arguments do not fit together.
            MemEvolveError: As :meth:`add_documents`.
        """
        pairs = pairs_of(text_embeddings, embeddings, metadatas)
        units = to_units(documents_of([text for text, _ in pairs], metadatas), ids)
        return keep(self._backend, units, [vector for _, vector in pairs])

    aadd_embeddings = in_a_thread(add_embeddings)

    def delete(
        self,
        ids: Sequence[str] | None = None,
        *,
        filter: Filters | None = None,  # noqa: A002  # LangChain's name for it
        filters: Filters | None = None,
        **kwargs: Any,
    ) -> bool:
        """Delete documents by id or by filter; all of them when neither is given.

        Args:
            ids: Ids; those of no document are skipped.
            filter: LangChain's form of a filter, on the metadata.
            filters: This package's form of a filter, on the whole unit.
            **kwargs: None are allowed.

        Returns:
            True.

        Raises:
            InvalidFilterError: A filter has no condition, or ids and a filter are both given.
        """
        no_more(kwargs)
        if filter is None and filters is None:
            self._backend.clear() if ids is None else self._backend.delete_batch(listed("ids", ids, InvalidUnitError))
            return True
        if ids is not None:
            raise InvalidFilterError("delete takes ids or a filter, not both")
        conditions = on_units(filter, filters)
        if always(parse(conditions).root):
            raise InvalidFilterError("filter has no condition and would delete everything; call delete_collection()")
        self._backend.delete_where(conditions)
        return True

    def delete_collection(self) -> None:
        """Delete everything in the backend, which can be filled again."""
        self._backend.clear()

    adelete_collection = in_a_thread(delete_collection)

    # Reading

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the documents of these ids that exist, in the order of ``ids``, each once."""
        found = self._backend.retrieve_batch(listed("ids", ids, InvalidUnitError))
        self._backend.record_access(list(found))
        return to_documents(list(found.values()))

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

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """As ``similarity_search``."""
        return _first(await self.asimilarity_search_with_score(query, k, **kwargs))

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Find the documents nearest to a text.

        Args:
            query: The text.
            k: Most documents.
            **kwargs: ``filter``, ``filters`` and ``recall``, see the class.

        Returns:
            The documents, nearest first.

        Raises:
            InvalidQueryError: An argument cannot be used.
            InvalidFilterError: A filter is malformed. Errors of the embedding model pass through.
        """
        return _first(self.similarity_search_with_score(query, k, **kwargs))

    def similarity_search_by_vector(self, embedding: Sequence[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """As ``similarity_search``, for a vector of d numbers."""
        return _first(self.similarity_search_with_score_by_vector(embedding, k, **kwargs))

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """As ``similarity_search``, with distances: squared L2, 1 - cosine, or -dot by the backend's metric."""
        options = SearchOptions.of(k, kwargs)
        return self._nearest(options, self._embedder().embed_query(query_text(query)))

    def similarity_search_with_score_by_vector(
        self, embedding: Sequence[float], k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search_with_score``, for a vector of d numbers."""
        return self._nearest(SearchOptions.of(k, kwargs), embedding)

    def similarity_search_by_vector_with_relevance_scores(
        self, embedding: Sequence[float], k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search_by_vector``, for a vector of d numbers, with relevance scores in [0, 1]."""
        score = self._select_relevance_score_fn()
        found = self.similarity_search_with_score_by_vector(embedding, k, **kwargs)
        return [(document, score(distance)) for document, distance in found]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Find documents that are similar to a text and different from each other.

        Args:
            query: The text.
            k: Most documents.
            fetch_k: Nearest documents to choose from.
            lambda_mult: 1 for similarity only, 0 for variety only; see :func:`maximal_marginal_relevance`.
            **kwargs: As for :meth:`similarity_search`.

        Returns:
            The documents, in the order of choice.

        Raises:
            InvalidQueryError: An argument cannot be used.
            InvalidFilterError: A filter is malformed.
        """
        options = SearchOptions.of(k, kwargs, fetch_k)
        return self._varied(options, lambda_mult, self._embedder().embed_query(query_text(query)))

    def max_marginal_relevance_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search``, for a vector of d numbers."""
        return self._varied(SearchOptions.of(k, kwargs, fetch_k), lambda_mult, embedding)

    # Inside

    @property
    def _collection(self) -> _Collection:
        """What mem0's provider for LangChain lists documents with."""
        return _Collection(self._backend)

    @classmethod
    def _made(cls: type[_Store], embedding: Embeddings, options: JsonObject) -> _Store:
        backend = options.get("backend")
        if backend is not None:
            return cls(embedding=embedding, **options)
        if options.get("index_file") is None:
            raise ConfigurationError(
                "index_file is missing: give the path prefix of the store to open or create, or an open backend"
            )
        return cls.open(embedding=embedding, **{name: value for name, value in options.items() if name != "backend"})

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return self._relevance_score_fn or partial(relevance, metric=self._backend.metric)

    def _embedder(self) -> Embeddings:
        if self._embedding is None:
            raise EmbeddingError("embedding is None, and so is the backend's function: give one, or search by vector")
        return self._embedding

    def _nearest(self, options: SearchOptions, vector: Vectors) -> list[tuple[Document, float]]:
        found = nearest(self._backend, vector, options)
        self._backend.record_access([unit["id"] for unit, _ in found])
        return [(to_document(unit), distance) for unit, distance in found]

    def _varied(self, options: SearchOptions, lambda_mult: float, vector: Vectors) -> list[Document]:
        found = nearest_vectors(self._backend, vector, options)
        chosen = maximal_marginal_relevance(vector, [row for _, row in found], options.k, lambda_mult)
        units = [found[position][0] for position in chosen]
        self._backend.record_access([unit["id"] for unit in units])
        return to_documents(units)
