"""What is compared: our strategies step by step, plain BM25, and the hybrid searches of other stores.

An engine is a function of a question's number and ``top_k`` that returns ids, best first. All get the same embeddings.
"""

from __future__ import annotations

import importlib.util
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from memevolve_gpu import VectorStore
from memevolve_gpu.components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    RetrievalStrategy,
    SemanticRetrievalStrategy,
)
from memevolve_gpu.components.retrieve.reorder import Rerank
from memevolve_gpu.types import FloatArray

from .sets import Set

__all__ = ["Engine", "engines"]

Engine = Callable[[int, int], list[str]]

OURS: dict[str, Callable[[], RetrievalStrategy]] = {
    "semantic": SemanticRetrievalStrategy,
    "keyword": KeywordRetrievalStrategy,
    "hybrid, rrf": lambda: HybridRetrievalStrategy(fusion="rrf"),
    "hybrid, weights 0.7 and 0.3": lambda: HybridRetrievalStrategy(semantic_weight=0.7, keyword_weight=0.3),
    "hybrid (default)": HybridRetrievalStrategy,
    "hybrid, neighbours 0.5": lambda: HybridRetrievalStrategy(neighbours=0.5),
    "hybrid, diversity 0.1": lambda: HybridRetrievalStrategy(diversity=0.1),
    "hybrid, diversity 0.3": lambda: HybridRetrievalStrategy(diversity=0.3),
}


@contextmanager
def engines(
    data: Set, rows: FloatArray, queries: FloatArray, folder: Path, rerank: str | Rerank | None = None
) -> Iterator[dict[str, Engine]]:
    """All engines that can run here, filled with the set. rows, queries: embeddings of units and questions.

    rerank: as ``HybridRetrievalStrategy`` takes it.
    """
    with ExitStack() as stack:
        table = {one.text: queries[at] for at, one in enumerate(data.questions)}
        store = stack.enter_context(VectorStore(folder / "ours", lambda text: table[text], rows.shape[1]))
        for start in range(0, len(rows), 5000):
            store.store_batch(data.units[start : start + 5000], rows[start : start + 5000])
        store.run_maintenance()
        found = {"plain BM25 (SQLite FTS5)": _plain_bm25(data)}
        for name, made in OURS.items():
            if "neighbours" not in name or any(one.sessions for one in data.questions):
                found[name] = _ours(made(), store, data)
        if rerank is not None:
            found["hybrid, rerank"] = _ours(HybridRetrievalStrategy(rerank=rerank), store, data)
        if importlib.util.find_spec("lancedb"):
            found["LanceDB, hybrid (rrf)"] = _lancedb(data, rows, queries, folder)
        if importlib.util.find_spec("chromadb"):
            found["Chroma, vectors"] = _chroma(data, rows, queries, folder)
        yield found


def _ours(strategy: RetrievalStrategy, store: VectorStore, data: Set) -> Engine:
    def ask(at: int, top_k: int) -> list[str]:
        one = data.questions[at]
        return [found.unit_id for found in strategy.retrieve(one.text, store, top_k, one.filters)]

    return ask


def _plain_bm25(data: Set) -> Engine:
    con = sqlite3.connect(":memory:")
    con.execute("CREATE VIRTUAL TABLE t USING fts5(text, id UNINDEXED, talk UNINDEXED)")
    rows = [(unit["content"], unit["id"], (unit.get("metadata") or {}).get("talk")) for unit in data.units]
    con.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)

    def ask(at: int, top_k: int) -> list[str]:
        one = data.questions[at]
        query = " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", one.text.casefold())))
        if one.filters is None:
            found = con.execute("SELECT id FROM t WHERE t MATCH ? ORDER BY rank LIMIT ?", (query, top_k))
        else:
            bound = (query, one.filters["metadata.talk"], top_k)
            found = con.execute("SELECT id FROM t WHERE t MATCH ? AND talk = ? ORDER BY rank LIMIT ?", bound)
        return [unit_id for (unit_id,) in found]

    return ask


def _talks(data: Set) -> list[int]:
    return [int((unit.get("metadata") or {}).get("talk", 0)) for unit in data.units]


def _lancedb(data: Set, rows: FloatArray, queries: FloatArray, folder: Path) -> Engine:
    """Its full-text index with its defaults, and its reranker by reciprocal ranks, which is its default too."""
    import lancedb
    from lancedb.rerankers import RRFReranker

    held = [
        {"id": unit["id"], "talk": talk, "text": unit["content"], "vector": row}
        for unit, talk, row in zip(data.units, _talks(data), rows, strict=True)
    ]
    table: Any = lancedb.connect(folder / "lance").create_table("t", data=held)
    table.create_fts_index("text")

    def ask(at: int, top_k: int) -> list[str]:
        one = data.questions[at]
        search = table.search(query_type="hybrid").vector(queries[at]).text(one.text).distance_type("cosine")
        if one.filters is not None:
            search = search.where(f"talk = {one.filters['metadata.talk']}", prefilter=True)
        return [row["id"] for row in search.rerank(RRFReranker()).limit(top_k).to_list()]

    return ask


def _chroma(data: Set, rows: FloatArray, queries: FloatArray, folder: Path) -> Engine:
    """Its vector search: the embedded Chroma refuses the hybrid search that its cloud has."""
    import chromadb

    collection: Any = chromadb.PersistentClient(str(folder / "chroma")).create_collection(
        "units", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )
    ids, metadata = [unit["id"] for unit in data.units], [{"talk": talk} for talk in _talks(data)]
    for start in range(0, len(ids), 5000):
        part = slice(start, start + 5000)
        collection.add(ids=ids[part], embeddings=rows[part], metadatas=metadata[part])

    def ask(at: int, top_k: int) -> list[str]:
        one = data.questions[at]
        where = None if one.filters is None else {"talk": one.filters["metadata.talk"]}
        found: list[str] = collection.query(query_embeddings=[queries[at]], n_results=top_k, where=where)["ids"][0]
        return found

    return ask
