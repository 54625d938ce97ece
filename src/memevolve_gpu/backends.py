"""Open a store by path or by Milvus address."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .components.store.vector_store import VectorStore
from .milvus.store import MilvusStore
from .utils.config import MilvusConfig, StorageConfig, is_milvus_uri, namespace_path
from .utils.embeddings import EmbeddingFunction

AnyStore = VectorStore | MilvusStore

_DEFAULT_PREFIX = "memory"


def open_store(
    place: str | os.PathLike[str] | None,
    embedding_function: EmbeddingFunction | None,
    embedding_dim: int | None = None,
    storage_config: object = None,
    namespace: Sequence[str] | str | None = None,
) -> AnyStore:
    """Open a store by path or by Milvus address, or make it there.

    Where MEMEVOLVE_STORAGE_BACKEND_TYPE is milvus, a path is ignored and the collection of MEMEVOLVE_MILVUS_* is
    opened, so that a deployment moves without a change to its code.

    Args:
        place: A path prefix, or ``milvus://host:port/collection``; None for ``memory``.
        embedding_function: Maps a text to a 1-D array; None for those who only read, or give embeddings.
        embedding_dim: Length of the vectors; None takes it from the store, else from the function.
        storage_config: A ``StorageConfig`` or a mapping; None reads the environment and ``.env``.
        namespace: The namespace to open, such as ``("org", "alice")`` or ``"org/alice"``; None for that of
            ``storage_config``.

    Returns:
        A ``VectorStore`` or a ``MilvusStore``.

    Raises:
        MemEvolveError: As ``VectorStore`` and ``MilvusStore`` do.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, open_store
        >>> with open_store("memory", HashingEmbedder()) as store:
        ...     store.store({"content": "Write tests first"})
        'unit_0'
    """
    config = StorageConfig.adopt(storage_config)
    if namespace is not None:
        config = config.replace(namespace=namespace_path(namespace))
    if is_on_milvus(place, config):
        return MilvusStore(embedding_function, embedding_dim, config, milvus_at(place))
    return VectorStore(_prefix(place), embedding_function, embedding_dim, storage_config=config)


def store_exists(place: str | os.PathLike[str] | None, storage_config: object = None) -> bool:
    """Return whether there is a store at this place."""
    if is_on_milvus(place, StorageConfig.adopt(storage_config)):
        return MilvusStore.exists_at(milvus_at(place))
    return VectorStore.exists_at(_prefix(place))


def _prefix(place: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    return _DEFAULT_PREFIX if place is None or (isinstance(place, str) and not place) else place


def is_on_milvus(place: str | os.PathLike[str] | None, config: StorageConfig) -> bool:
    """Return whether this place is on a Milvus server."""
    return is_milvus_uri(place) or config.backend_type == "milvus"


def milvus_at(place: str | os.PathLike[str] | None) -> MilvusConfig:
    """Return the server and collection of the place, else those of the settings."""
    return MilvusConfig.at(os.fspath(place)) if place is not None and is_milvus_uri(place) else MilvusConfig()
