"""What an embedding function is: anything that maps a text to a vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

__all__ = ["BatchEmbeddingFunction", "EmbeddingFunction"]


@runtime_checkable
class EmbeddingFunction(Protocol):
    """Maps a text to one vector, array-like of d real numbers, the same d for every text.

    Three attributes are read where a function offers them, and never asked for:

    - ``embed_batch(texts) -> (n, d)``, used instead of n single calls (see :class:`BatchEmbeddingFunction`);
    - ``dimension: int``, d, which spares the probe that would detect it;
    - ``model_name: str``, kept in the store so that it is not filled by two models.

    The store may call it from several threads at once.
    """

    def __call__(self, text: str, /) -> Any:
        """Embed one text: array-like (d,)."""
        ...  # pragma: no cover


@runtime_checkable
class BatchEmbeddingFunction(EmbeddingFunction, Protocol):
    """An embedding function that takes many texts at once."""

    def embed_batch(self, texts: Sequence[str], /) -> Any:
        """Embed n texts: array-like (n, d), in the order of the texts."""
        ...  # pragma: no cover
