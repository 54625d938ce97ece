"""Which store a command works on, and what embeds its texts."""

from __future__ import annotations

import re
import shlex
from enum import Enum
from typing import Any

from ..components.store.milvus_store import MilvusStore
from ..components.store.opening import AnyStore, milvus_at, store_exists
from ..components.store.vector_store import VectorStore
from ..errors import EmbeddingError
from ..records import Records
from ..utils.config import EmbeddingConfig, StorageConfig
from ..utils.embeddings import EmbeddingFunction, HashingEmbedder, embedder_from_config
from ..utils.milvus_config import MilvusConfig, is_milvus_uri
from .codes import InputError, NotFoundError

__all__ = [
    "DEFAULT_STORE",
    "EmbedderName",
    "IndexTypeName",
    "KeptModel",
    "MetricName",
    "choose_embedder",
    "exists",
    "open_existing",
    "open_local",
    "open_or_make",
    "remembered_model",
    "store_at",
]

DEFAULT_STORE = "memory"
"""Path prefix of the store where neither option nor setting names one."""


class EmbedderName(str, Enum):
    """Who embeds; ``auto`` takes the settings and what the store was filled with."""

    AUTO = "auto"
    HASHING = "hashing"
    LOCAL = "local"
    OPENAI = "openai"


class MetricName(str, Enum):
    """Distances."""

    L2 = "l2"
    COSINE = "cosine"
    IP = "ip"


class IndexTypeName(str, Enum):
    """Kinds of index."""

    FLAT = "flat"
    IVF = "ivf"
    HNSW = "hnsw"
    AUTO = "auto"


class KeptModel:
    """Stands for the model that made vectors which are stored as they are; it embeds nothing."""

    def __init__(self, model_name: str | None, dimension: int) -> None:
        self.model_name = model_name
        self.dimension = dimension

    def __call__(self, _text: str, /) -> Any:
        raise EmbeddingError("this command stores given vectors and embeds nothing")


def store_at(prefix: str | None) -> str:
    """The prefix or ``milvus://`` address that was given, else what the settings name, else ``memory`` here.

    Raises InputError for an empty one: a script's variable that is not set must not lead to another store.
    """
    if prefix is not None and not prefix.strip():
        raise InputError("--store: the prefix is empty; give a path such as ./memory")
    config = StorageConfig()
    if prefix is None and config.backend_type == "milvus":
        return MilvusConfig().address
    return prefix or str(dict(config).get("path") or DEFAULT_STORE)


def open_existing(
    prefix: str, embedder: EmbedderName | None, index_type: IndexTypeName | None = None, *, as_served: bool = False
) -> AnyStore:
    """Open the store at ``prefix``; embedder None for commands that embed nothing.

    as_served: plan as a process would that stays, so under DEVICE=auto for a GPU too.

    Raises NotFoundError when there is none, else as ``VectorStore`` and ``MilvusStore`` do.
    """
    if not exists(prefix):
        remedy = f"make one with: memevolve-store init --store {shlex.quote(prefix)}"
        raise NotFoundError(f"there is no store at {prefix!r}; {remedy}, or name another with --store")
    function = None if embedder is None else choose_embedder(embedder, remembered_model(prefix))
    return _opened(prefix, function, _config(index_type, None, as_served=as_served))


def open_local(prefix: str) -> VectorStore:
    """As :func:`open_existing` without an embedder, for what only a store in files can do.

    Raises InputError for one on a server.
    """
    opened = open_existing(prefix, None)
    if isinstance(opened, MilvusStore):
        opened.close()
        raise InputError(
            f"--store: {prefix} is on a Milvus server, which has this command's work done by its own tools"
        )
    return opened


def exists(prefix: str) -> bool:
    """Is there a store at this prefix or address?"""
    return store_exists(prefix, StorageConfig().replace(backend_type="vector"))


def open_or_make(
    prefix: str,
    function: EmbeddingFunction,
    index_type: IndexTypeName | None = None,
    metric: MetricName | None = None,
) -> AnyStore:
    """Open the store at ``prefix``, or make one there."""
    return _opened(prefix, function, _config(index_type, metric))


def remembered_model(prefix: str) -> str | None:
    """Name of the embedding model that filled the store; None when there is no store, or the model has no name."""
    if is_milvus_uri(prefix):
        return MilvusStore.model_at(milvus_at(prefix))
    facts = Records.peek(prefix)
    return None if facts is None else facts.model


def choose_embedder(name: EmbedderName, held: str | None) -> EmbeddingFunction:
    """The embedding function of that name.

    held is the model that filled the store: under ``auto`` a store filled by the hashing embedder goes on with it.
    Raises ConfigurationError or EngineError when the function cannot be had.
    """
    hashing = re.fullmatch(r"hashing-lexical-([1-9]\d*)", held or "")
    if hashing and name in (EmbedderName.AUTO, EmbedderName.HASHING):
        return HashingEmbedder(int(hashing[1]))
    config = EmbeddingConfig() if name is EmbedderName.AUTO else EmbeddingConfig().replace(provider=name.value)
    return embedder_from_config(config)


def _opened(prefix: str, function: EmbeddingFunction | None, config: StorageConfig) -> AnyStore:
    if is_milvus_uri(prefix):
        return MilvusStore(function, storage_config=config, milvus_config=milvus_at(prefix))
    return VectorStore(prefix, function, storage_config=config)


def _config(index_type: IndexTypeName | None, metric: MetricName | None, *, as_served: bool = False) -> StorageConfig:
    """The settings, without a background thread: a command does its upkeep in the open, with a progress bar.

    Under DEVICE=auto it does so for the CPU: what lies on a GPU would be gone when the command ends.
    """
    given = {"index_type": index_type, "metric": metric}
    changes = {name: value.value for name, value in given.items() if value is not None}
    config = StorageConfig()
    device = "cpu" if config.device == "auto" and not as_served else config.device
    return config.replace(background=False, device=device, **changes)
