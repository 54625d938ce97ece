"""How long a run will take, before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from .session import Plan

__all__ = ["APART", "SECTIONS", "predicted"]

SECTIONS = ("ingest", "unseen", "search", "filters", "reopen", "threads", "writes", "mixed", "sets", "scaling")
APART = ("sets", "scaling")
"""Those with stores of their own."""

_BUILD = {
    "memevolve-gpu": 4,
    "memevolve-gpu ivf": 6,
    "chromadb": 31,
    "lancedb": 35,
    "qdrant-edge": 38,
    "sqlite-vec": 1,
    "milvus-lite": 33,
    "zvec": 67,
    "faiss Flat": 1,
    "faiss HNSW": 7,
    "hnswlib": 20,
    "usearch": 28,
    "turbovec": 1,
    "memevolve-gpu before": 6,
}
"""Seconds of one build of 50,000 rows of 384 numbers on the machine that this was written on."""

_SEARCH_MS = {"chromadb": 2.0, "lancedb": 5.0, "sqlite-vec": 14.0, "milvus-lite": 4.0, "faiss Flat": 3.0}
"""Milliseconds of one search there; the others take less than one."""

_WRITE_MS = {"chromadb": 9.0, "lancedb": 8.0, "qdrant-edge": 10.0, "zvec": 25.0, "milvus-lite": 1.5}
"""Milliseconds of one synced write there; the others take less than half of one."""


def predicted(names: Sequence[str], sections: Sequence[str], size: int, plan: Plan, sizes: Sequence[int] = ()) -> float:
    """Seconds, roughly: what builds take by their growth, and what the plan's caps allow to searches and writes."""
    total: float = sum(one_size(name, sections, size, plan) for name in names) if set(sections) - {"scaling"} else 0.0
    if "scaling" in sections:
        total += sum(_BUILD[name] * (one / 50_000) ** 1.15 + 12 for name in names for one in sizes)
    return total


def one_size(name: str, sections: Sequence[str], size: int, plan: Plan) -> float:
    build: float = _BUILD[name] * (size / 50_000) ** 1.15
    total: float = 3 + build * (plan.builds if build < plan.repeat_below else 1) if "ingest" in sections else 0.0
    search_ms = _SEARCH_MS.get(name, 0.6) * max(0.2, size / 50_000)
    search = search_ms / 1e3 * plan.queries
    write_ms = _WRITE_MS.get(name, 0.5)
    if "unseen" in sections:
        total += search * 3
    if "search" in sections:
        total += search * 6 + 4 * min(plan.cap, search * plan.passes / 2)
    if "filters" in sections:
        total += search * 4 + 3 * min(plan.cap, search * plan.passes / 2)
    if "reopen" in sections:
        total += 2.5 * (plan.reopens + 1)
    if "threads" in sections:
        total += 4 * plan.threads_s + 1
    if "writes" in sections:
        total += 4 * min(plan.write_cap, write_ms / 1e3 * plan.writes) + 2 * search_ms / 1e3 * plan.writes
    if "mixed" in sections:
        total += min(plan.mixed_cap, (0.8 * search_ms + 0.2 * write_ms) / 1e3 * plan.mixed)
    return total
