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
from .key_value import MemEvolveKeyValueStore
from .retriever import MemEvolveDocumentIndex, MemEvolveRetriever
from .vector_store import MemEvolveVectorStore

__all__ = [
    "EmbeddingsFunction",
    "FunctionEmbeddings",
    "MemEvolveDocumentIndex",
    "MemEvolveKeyValueStore",
    "MemEvolveRetriever",
    "MemEvolveVectorStore",
    "maximal_marginal_relevance",
    "relevance",
]

del _langchain_core
