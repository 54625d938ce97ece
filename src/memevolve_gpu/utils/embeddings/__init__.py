"""Embedding functions and the adapter through which the store uses them."""

from __future__ import annotations

from .adapter import BatchEmbeddingFunction, Embedder, EmbeddingFunction
from .factory import embedder_from_config
from .hashing import HashingEmbedder
from .local import LocalEmbedder
from .openai import OpenAIEmbedder

__all__ = [
    "BatchEmbeddingFunction",
    "Embedder",
    "EmbeddingFunction",
    "HashingEmbedder",
    "LocalEmbedder",
    "OpenAIEmbedder",
    "embedder_from_config",
]
