"""Embedding functions and the adapter through which the store uses them."""

from __future__ import annotations

from .adapter import Embedder
from .hashing import HashingEmbedder
from .protocol import BatchEmbeddingFunction, EmbeddingFunction

__all__ = ["BatchEmbeddingFunction", "Embedder", "EmbeddingFunction", "HashingEmbedder"]
