"""Embedding functions, the one that the configuration names, and the adapter through which the store uses them."""

from __future__ import annotations

import logging
from typing import Any

from ..config import EmbeddingConfig, may_download
from .adapter import BatchEmbeddingFunction, Embedder, EmbeddingFunction
from .hashing import HashingEmbedder
from .local import (
    LocalEmbedder,
    fastembed_has_models,
    fastembed_installed,
    packaged_model,
    sentence_transformers_installed,
)
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

_log = logging.getLogger("memevolve_gpu.embeddings")


def embedder_from_config(config: EmbeddingConfig) -> EmbeddingFunction:
    """Make the embedding function of ``config.provider``.

    ``auto`` takes the service when ``base_url`` is set, else the local model when it is installed, else the hashing
    stand-in, with a warning that it knows words and no meaning. Nothing is loaded or sent yet.

    Raises EngineError, which says what to install, when ``local`` is asked for and missing.
    """
    provider = config.provider
    if provider == "auto":
        provider = "openai" if config.base_url else "local" if _local_is_ready(config) else "hashing"
        if provider == "hashing":
            _log.warning(
                "no embedding model is configured: texts are compared by their words, not their meaning. Set "
                "MEMEVOLVE_EMBEDDING_BASE_URL, or pip install 'memevolve-gpu[local]'; "
                "MEMEVOLVE_EMBEDDING_PROVIDER=hashing silences this"
            )
    if provider == "openai":
        return _service(config)
    if provider == "local":
        return LocalEmbedder(config.model, path=config.path, **_given(batch_size=config.batch_size))
    return HashingEmbedder() if config.dimension is None else HashingEmbedder(config.dimension)


def _service(config: EmbeddingConfig) -> OpenAIEmbedder:
    return OpenAIEmbedder(
        base_url=config.base_url,
        api_key=config.api_key.get_secret_value() if config.api_key is not None else None,
        model=config.model,
        timeout=config.timeout,
        dimension=config.dimension,
        **_given(batch_size=config.batch_size, max_tokens=config.max_tokens),
    )


def _given(**values: int | None) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _local_is_ready(config: EmbeddingConfig) -> bool:
    """Whether a local model can be used; without fastembed, only if nothing is downloaded that nobody named."""
    if fastembed_installed() and (config.path is not None or may_download() or fastembed_has_models()):
        return True
    return sentence_transformers_installed() and (config.model is not None or packaged_model() is not None)
