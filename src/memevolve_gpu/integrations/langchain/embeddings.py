"""Embedding models across the door, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.embeddings import Embeddings

from ...utils.embeddings import Embedder, EmbeddingFunction

__all__ = ["EmbeddingsFunction", "FunctionEmbeddings", "as_embeddings"]

_NAMES = ("model_name", "model")
"""Where LangChain's embedding models keep their names."""


class EmbeddingsFunction:
    """A LangChain ``Embeddings`` as an embedding function of this package, an :class:`EmbeddingFunction`.

    Every text is embedded as a document, because what is stored stays: a model that embeds queries in another way is
    asked for query vectors by ``MemEvolveVectorStore``, and not by the store's own ``search``.
    """

    def __init__(self, embeddings: Embeddings, dimension: int | None = None, model_name: str | None = None) -> None:
        """``dimension`` None: found by embedding a probe. ``model_name`` None: the model's own name, if it has one."""
        self.embeddings = embeddings
        self.dimension = dimension
        self.model_name = model_name or _name_of(embeddings)

    def __call__(self, text: str, /) -> list[float]:
        """Embed one text: d numbers. Raises what the model raises."""
        return self.embeddings.embed_documents([text])[0]

    def embed_batch(self, texts: Sequence[str], /) -> list[list[float]]:
        """Embed n texts: n lists of d numbers. Raises what the model raises."""
        return self.embeddings.embed_documents(list(texts))


class FunctionEmbeddings(Embeddings):
    """An embedding function of this package as LangChain ``Embeddings``. Safe where the function is."""

    def __init__(self, function: EmbeddingFunction) -> None:
        """Raises EmbeddingError when ``function`` cannot be called."""
        self._embedder = Embedder(function)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """n texts to n lists of d numbers. Raises EmbeddingError, DimensionMismatchError."""
        rows: list[list[float]] = self._embedder.embed_many(texts).tolist() if texts else []
        return rows

    def embed_query(self, text: str) -> list[float]:
        """One text to d numbers; the last 256 are remembered. Raises EmbeddingError, DimensionMismatchError."""
        vector: list[float] = self._embedder.embed_query(text).tolist()
        return vector


def as_embeddings(function: Any) -> Embeddings | None:
    """The embedding function of a backend as ``Embeddings``; None for None, and the original where it was adapted."""
    if function is None or isinstance(function, Embeddings):
        return function
    return function.embeddings if isinstance(function, EmbeddingsFunction) else FunctionEmbeddings(function)


def _name_of(embeddings: Embeddings) -> str | None:
    names = (getattr(embeddings, attribute, None) for attribute in _NAMES)
    return next((name for name in names if isinstance(name, str) and name), None)
