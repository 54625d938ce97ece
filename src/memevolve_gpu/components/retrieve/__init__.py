"""Retrieval by meaning, by keywords, and by both together."""

from .base import (
    QueryRecord,
    RetrievalContext,
    RetrievalMetrics,
    RetrievalResult,
    RetrievalStrategy,
    StrategyMetrics,
)
from .strategies import HybridRetrievalStrategy, KeywordRetrievalStrategy, SemanticRetrievalStrategy

__all__ = [
    "HybridRetrievalStrategy",
    "KeywordRetrievalStrategy",
    "QueryRecord",
    "RetrievalContext",
    "RetrievalMetrics",
    "RetrievalResult",
    "RetrievalStrategy",
    "SemanticRetrievalStrategy",
    "StrategyMetrics",
]
