"""Retrieval: by meaning, by words, and both together."""

from .base import RetrievalContext, RetrievalResult, RetrievalStrategy
from .hybrid_strategy import HybridRetrievalStrategy
from .keyword_strategy import KeywordRetrievalStrategy
from .metrics import RetrievalMetrics
from .semantic_strategy import SemanticRetrievalStrategy

__all__ = [
    "HybridRetrievalStrategy",
    "KeywordRetrievalStrategy",
    "RetrievalContext",
    "RetrievalMetrics",
    "RetrievalResult",
    "RetrievalStrategy",
    "SemanticRetrievalStrategy",
]
