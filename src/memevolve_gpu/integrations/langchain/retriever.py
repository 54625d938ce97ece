"""A retriever by meaning and words, and a document index, on a store of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.indexing import UpsertResponse
from langchain_core.indexing.base import DeleteResponse, DocumentIndex
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, ValidationError

from ...components.retrieve import HybridRetrievalStrategy, RetrievalStrategy
from ...errors import ConfigurationError, InvalidUnitError
from ...types import JsonObject
from ...utils.arguments import listed
from .adapter import no_more, query_text, to_document
from .filters import on_units
from .vector_store import MemEvolveVectorStore


class MemEvolveRetriever(BaseRetriever):
    """Finds documents by meaning and by words together; any strategy of this package can take its place.

    ``MemEvolveVectorStore.as_retriever`` finds by meaning alone. The options ``k``, ``filter`` and ``filters`` are
    given here, or to ``invoke``.

    Examples:
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> from memevolve_gpu.integrations.langchain import MemEvolveRetriever, MemEvolveVectorStore
        >>> store = MemEvolveVectorStore(ScratchStore([{"content": "git bisect"}, {"content": "tar archive"}]))
        >>> [document.page_content for document in MemEvolveRetriever(store=store, k=1).invoke("git")]
        ['git bisect']
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    store: MemEvolveVectorStore
    """The documents."""

    k: int = 4
    """Most documents."""

    strategy: RetrievalStrategy | None = None
    """How to search; None for ``HybridRetrievalStrategy()``."""

    filter: JsonObject | None = None
    """LangChain's form of a filter, on the metadata."""

    filters: JsonObject | None = None
    """This package's form of a filter, on the whole unit."""

    def __init__(self, **given: Any) -> None:
        """Take the fields by name. Raises ConfigurationError for an unknown or missing one, or a wrong value."""
        try:
            super().__init__(**given)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ConfigurationError(f"a retriever cannot be made: {wrong}") from error

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        del run_manager
        rest = dict(kwargs)
        k, *given = (rest.pop(name, getattr(self, name)) for name in ("k", "filter", "filters"))
        no_more(rest)
        strategy = self.strategy or HybridRetrievalStrategy()
        found = strategy.retrieve(query_text(query), self.store.backend, k, on_units(*given))
        return [to_document(one.unit) for one in found]


class MemEvolveDocumentIndex(MemEvolveRetriever, DocumentIndex):
    """The retriever as LangChain's ``DocumentIndex``, to which documents can be added. The interface is beta there.

    Examples:
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> from memevolve_gpu.integrations.langchain import MemEvolveDocumentIndex, MemEvolveVectorStore
        >>> index = MemEvolveDocumentIndex(store=MemEvolveVectorStore(ScratchStore([{"id": "a"}])))  # doctest: +SKIP
        >>> index.delete(["a", "b"])["succeeded"]  # doctest: +SKIP
        ['a']
    """

    def upsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """Store documents, all or none; one whose id exists is replaced.

        Args:
            items: The documents.
            **kwargs: As for ``MemEvolveVectorStore.add_documents``.

        Returns:
            The ids in ``succeeded``.

        Raises:
            MemEvolveError: As ``MemEvolveVectorStore.add_documents``.
        """
        return {"succeeded": self.store.add_documents(listed("items", items, InvalidUnitError), **kwargs), "failed": []}

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> DeleteResponse:
        """Delete documents by id.

        Args:
            ids: Ids; those of no document are skipped.
            **kwargs: None are allowed.

        Returns:
            The ids that named a document in ``succeeded``.

        Raises:
            InvalidUnitError: ``ids`` is missing.
        """
        no_more(kwargs)
        if ids is None:
            raise InvalidUnitError("ids is missing; to delete everything call store.delete_collection()")
        known = list(self.store.backend.retrieve_batch(listed("ids", ids, InvalidUnitError)))
        self.store.backend.delete_batch(known)
        return {"succeeded": known, "failed": [], "num_deleted": len(known), "num_failed": 0}

    def get(self, ids: Sequence[str], /, **kwargs: Any) -> list[Document]:
        """Return the documents of these ids that exist, in the order of ``ids``.

        Args:
            ids: Ids.
            **kwargs: None are allowed.

        Returns:
            The documents.

        Raises:
            InvalidUnitError: ``ids`` is not a list.
        """
        no_more(kwargs)
        return self.store.get_by_ids(ids)
