"""LangChain integration: ``MemEvolveVectorStore`` on any backend with vectors. Needs ``langchain-core``."""

from __future__ import annotations

try:
    import langchain_core as _langchain_core
except ImportError as error:
    raise ImportError(
        f"memevolve_gpu.integrations.langchain needs langchain-core ({error}); pip install 'memevolve-gpu[langchain]'"
    ) from error

from .embeddings import EmbeddingsFunction, FunctionEmbeddings
from .filters import maximal_marginal_relevance, relevance
from .vector_store import MemEvolveVectorStore

__all__ = [
    "EmbeddingsFunction",
    "FunctionEmbeddings",
    "MemEvolveVectorStore",
    "maximal_marginal_relevance",
    "relevance",
]

del _langchain_core
