"""Storage backends: the contract and the vector store."""

from .base import MetadataMixin, StorageBackend
from .vector_store import VectorStore

__all__ = ["MetadataMixin", "StorageBackend", "VectorStore"]
