"""Retrieval by meaning, by keywords, and by both together."""

from ..store.ranking import Ranking
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
    "Ranking",
    "RetrievalContext",
    "RetrievalMetrics",
    "RetrievalResult",
    "RetrievalStrategy",
    "SemanticRetrievalStrategy",
    "StrategyMetrics",
]
