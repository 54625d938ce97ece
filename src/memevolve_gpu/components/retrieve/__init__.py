"""Retrieval: by meaning, by words, and both together."""

from .base import RetrievalContext, RetrievalMetrics, RetrievalResult, RetrievalStrategy
from .strategies import HybridRetrievalStrategy, KeywordRetrievalStrategy, SemanticRetrievalStrategy

__all__ = [
    "HybridRetrievalStrategy",
    "KeywordRetrievalStrategy",
    "RetrievalContext",
    "RetrievalMetrics",
    "RetrievalResult",
    "RetrievalStrategy",
    "SemanticRetrievalStrategy",
]
