"""Open a store by path or by Milvus address."""

from __future__ import annotations

import os
from typing import Any

from .components.store.vector_store import VectorStore
from .milvus.store import MilvusStore
from .utils.config import MilvusConfig, StorageConfig, is_milvus_uri
from .utils.embeddings import EmbeddingFunction

__all__ = ["AnyStore", "is_on_milvus", "milvus_at", "open_store", "store_exists"]

AnyStore = VectorStore | MilvusStore

_DEFAULT_PREFIX = "memory"


def open_store(
    place: str | os.PathLike[str] | None,
    embedding_function: EmbeddingFunction | None,
    embedding_dim: int | None = None,
    storage_config: Any = None,
) -> AnyStore:
    """Open the store at a path prefix or at ``milvus://host:port/collection``, or make it there.

    Where MEMEVOLVE_STORAGE_BACKEND_TYPE is milvus a path is only a name: the collection of MEMEVOLVE_MILVUS_* is
    opened, so that a deployment moves without a change to its code. place None: ``memory``. Raises as ``VectorStore``
    and ``MilvusStore`` do.
    """
    config = StorageConfig.adopt(storage_config)
    if is_on_milvus(place, config):
        return MilvusStore(embedding_function, embedding_dim, config, milvus_at(place))
    return VectorStore(place or _DEFAULT_PREFIX, embedding_function, embedding_dim, storage_config=config)


def store_exists(place: str | os.PathLike[str] | None, storage_config: Any = None) -> bool:
    """Is there a store at this place?"""
    if is_on_milvus(place, StorageConfig.adopt(storage_config)):
        return MilvusStore.exists_at(milvus_at(place))
    return VectorStore.exists_at(place or _DEFAULT_PREFIX)


def is_on_milvus(place: str | os.PathLike[str] | None, config: StorageConfig) -> bool:
    """Does this place lie on a Milvus server?"""
    return is_milvus_uri(place) or config.backend_type == "milvus"


def milvus_at(place: str | os.PathLike[str] | None) -> MilvusConfig:
    """Where on which server: what the place says, else the settings."""
    return MilvusConfig.at(os.fspath(place)) if place is not None and is_milvus_uri(place) else MilvusConfig()
