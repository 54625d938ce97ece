"""Searches by words, or by meaning and words together."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType

from ..components.retrieve import HybridRetrievalStrategy, KeywordRetrievalStrategy, RetrievalStrategy
from .codes import InputError
from .opening import EmbedderName, open_existing
from .output import Output, Rows

__all__ = ["find", "strategy_for"]


def strategy_for(*, hybrid: bool, keyword: bool, recall: float | None) -> RetrievalStrategy | None:
    """The strategy that the flags ask for; None for the search by meaning. Raises InputError where they clash."""
    if hybrid and keyword:
        raise InputError("--hybrid and --keyword: give one of them")
    if recall is not None and (hybrid or keyword):
        raise InputError("--recall goes with the search by meaning alone; leave it out")
    if keyword:
        return KeywordRetrievalStrategy()
    return HybridRetrievalStrategy() if hybrid else None


def find(
    output: Output,
    prefix: str,
    embedder: EmbedderName,
    strategy: RetrievalStrategy,
    text: str,
    top_k: int,
    filters: dict[str, Any] | None,
) -> None:
    """Search the store at ``prefix`` and show what was found. Without need of it no embedder is asked for."""
    needed = None if isinstance(strategy, KeywordRetrievalStrategy) else embedder
    with open_existing(prefix, needed) as opened:
        results = strategy.retrieve(text, opened, top_k, filters)
    hits = [{"id": one.unit_id, "score": one.score, **(one.metadata or {}), "unit": one.unit} for one in results]
    rows = [
        [f"{one.score:.4f}", one.unit_id, str(one.unit.get("type", "")), str(one.unit.get("content", ""))]
        for one in results
    ]
    found: RenderableType = Rows(("score", "id", "type", "content"), rows) if rows else "nothing found"
    output.show({"query": text, "hits": hits}, found)
