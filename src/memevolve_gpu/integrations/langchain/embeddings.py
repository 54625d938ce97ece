"""Adapters between LangChain's embedding models and this package's embedding functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.embeddings import Embeddings

from ...utils.arguments import optional_text, texts_of
from ...utils.embeddings import Embedder, EmbeddingFunction

_NAMES = ("model_name", "model")
"""Attributes in which LangChain's embedding models keep their names."""


class EmbeddingsFunction:
    """Adapts LangChain ``Embeddings`` to this package's :class:`EmbeddingFunction`.

    Units are embedded as documents, and the texts of searches as queries.

    Examples:
        >>> from langchain_core.embeddings import DeterministicFakeEmbedding
        >>> from memevolve_gpu.integrations.langchain import EmbeddingsFunction
        >>> len(EmbeddingsFunction(DeterministicFakeEmbedding(size=8))("git bisect"))
        8
    """

    def __init__(self, embeddings: Embeddings, dimension: int | None = None, model_name: str | None = None) -> None:
        """Create an adapter.

        Args:
            embeddings: The model.
            dimension: Length of its vectors; None to find it by embedding a probe.
            model_name: Name to keep in the store; None for the model's own name, if it has one.
        """
        self.embeddings = embeddings
        self.dimension = dimension
        self.model_name = optional_text("model_name", model_name) or _name_of(embeddings)

    def __call__(self, text: str, /) -> list[float]:
        """Embed one text: d numbers. Raises what the model raises."""
        return self.embed_batch([text])[0]

    def embed_batch(self, texts: Sequence[str], /) -> list[list[float]]:
        """Embed n texts: n lists of d numbers. Raises what the model raises."""
        return self.embeddings.embed_documents(texts_of(texts))

    def embed_query(self, text: str, /) -> list[float]:
        """Embed the text of a search: d numbers. Raises what the model raises."""
        return self.embeddings.embed_query(texts_of([text])[0])


class FunctionEmbeddings(Embeddings):
    """Adapts an embedding function of this package to LangChain ``Embeddings``. As thread-safe as the function.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder
        >>> from memevolve_gpu.integrations.langchain import FunctionEmbeddings
        >>> len(FunctionEmbeddings(HashingEmbedder(64)).embed_query("git bisect"))
        64
    """

    def __init__(self, function: EmbeddingFunction) -> None:
        """Create an adapter. Raises EmbeddingError when ``function`` cannot be called."""
        self._embedder = Embedder(function)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed n texts as n lists of d numbers. Raises EmbeddingError, DimensionMismatchError."""
        given = texts_of(texts)
        rows: list[list[float]] = self._embedder.embed_many(given).tolist() if given else []
        return rows

    def embed_query(self, text: str) -> list[float]:
        """Embed one text as d numbers; the last 256 are cached. Raises EmbeddingError, DimensionMismatchError."""
        vector: list[float] = self._embedder.embed_query(text).tolist()
        return vector


def as_embeddings(function: Any) -> Embeddings | None:
    """Return the embedding function of a backend as ``Embeddings``; None for None, the original if it was adapted."""
    if function is None or isinstance(function, Embeddings):
        return function
    return function.embeddings if isinstance(function, EmbeddingsFunction) else FunctionEmbeddings(function)


def _name_of(embeddings: Embeddings) -> str | None:
    names = (getattr(embeddings, attribute, None) for attribute in _NAMES)
    return next((name for name in names if isinstance(name, str) and name), None)
