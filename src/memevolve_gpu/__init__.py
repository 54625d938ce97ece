"""A vector store for the memory of LLM agents: durable records, a derived index, recall as the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    CapacityError,
    ConfigurationError,
    ConflictError,
    CorruptStoreError,
    DimensionMismatchError,
    EmbeddingError,
    EngineError,
    InvalidFilterError,
    InvalidQueryError,
    InvalidUnitError,
    InvalidVectorError,
    MemEvolveError,
    ModelMismatchError,
    StorageError,
    StoreClosedError,
    StoreUnavailableError,
)
from .types import Hit, MemoryUnit

if TYPE_CHECKING:
    from .components.store.base import StorageBackend
    from .components.store.milvus_store import MilvusStore
    from .components.store.opening import open_store
    from .components.store.vector_store import VectorStore
    from .memory_system import MemorySystem, MemorySystemConfig
    from .utils.config import EmbeddingConfig, StorageConfig
    from .utils.embeddings import HashingEmbedder

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "ConfigurationError",
    "ConflictError",
    "CorruptStoreError",
    "DimensionMismatchError",
    "EmbeddingConfig",
    "EmbeddingError",
    "EngineError",
    "HashingEmbedder",
    "Hit",
    "InvalidFilterError",
    "InvalidQueryError",
    "InvalidUnitError",
    "InvalidVectorError",
    "MemEvolveError",
    "MemorySystem",
    "MemorySystemConfig",
    "MemoryUnit",
    "MilvusStore",
    "ModelMismatchError",
    "StorageBackend",
    "StorageConfig",
    "StorageError",
    "StoreClosedError",
    "StoreUnavailableError",
    "VectorStore",
    "open_store",
]

_LAZY = {
    "EmbeddingConfig": "utils.config",
    "HashingEmbedder": "utils.embeddings",
    "MemorySystem": "memory_system",
    "MemorySystemConfig": "memory_system",
    "MilvusStore": "components.store.milvus_store",
    "StorageBackend": "components.store.base",
    "StorageConfig": "utils.config",
    "VectorStore": "components.store.vector_store",
    "open_store": "components.store.opening",
}


def __getattr__(name: str) -> Any:
    """Load the heavier rooms when they are first asked for, so that ``import memevolve_gpu`` stays light."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
