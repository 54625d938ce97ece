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
    HistoryError,
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

if TYPE_CHECKING:
    from .async_api import AsyncMemorySystem, AsyncVectorStore
    from .backends import open_store
    from .components.store.base import StorageBackend
    from .components.store.ranking import HalfLife
    from .components.store.vector_store import VectorStore
    from .memory_system import Memory, MemorySystem, MemorySystemConfig
    from .milvus.store import MilvusStore
    from .records.filters import F
    from .types import Hit, MemoryUnit
    from .utils.config import EmbeddingConfig, StorageConfig
    from .utils.embeddings import HashingEmbedder, LocalEmbedder, OpenAIEmbedder

__version__ = "0.1.0"

__all__ = [
    "AsyncMemorySystem",
    "AsyncVectorStore",
    "CapacityError",
    "ConfigurationError",
    "ConflictError",
    "CorruptStoreError",
    "DimensionMismatchError",
    "EmbeddingConfig",
    "EmbeddingError",
    "EngineError",
    "F",
    "HalfLife",
    "HashingEmbedder",
    "HistoryError",
    "Hit",
    "InvalidFilterError",
    "InvalidQueryError",
    "InvalidUnitError",
    "InvalidVectorError",
    "LocalEmbedder",
    "MemEvolveError",
    "Memory",
    "MemorySystem",
    "MemorySystemConfig",
    "MemoryUnit",
    "MilvusStore",
    "ModelMismatchError",
    "OpenAIEmbedder",
    "StorageBackend",
    "StorageConfig",
    "StorageError",
    "StoreClosedError",
    "StoreUnavailableError",
    "VectorStore",
    "open_store",
]

_LAZY = {
    "AsyncMemorySystem": "async_api",
    "AsyncVectorStore": "async_api",
    "EmbeddingConfig": "utils.config",
    "F": "records.filters",
    "HalfLife": "components.store.ranking",
    "Hit": "types",
    "HashingEmbedder": "utils.embeddings",
    "LocalEmbedder": "utils.embeddings",
    "Memory": "memory_system",
    "MemorySystem": "memory_system",
    "MemorySystemConfig": "memory_system",
    "MemoryUnit": "types",
    "MilvusStore": "milvus.store",
    "OpenAIEmbedder": "utils.embeddings",
    "StorageBackend": "components.store.base",
    "StorageConfig": "utils.config",
    "VectorStore": "components.store.vector_store",
    "open_store": "backends",
}


def __getattr__(name: str) -> Any:
    """Import the heavier modules on first use, so that ``import memevolve_gpu`` stays light."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, those not imported yet included, so that tools can complete them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
