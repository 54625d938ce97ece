"""Ranked lists of ids: from the index of a backend that has one, else from a scan of its units."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...errors import EmbeddingError, InvalidQueryError
from ...types import FloatArray
from ...utils.arguments import whole_number
from ...utils.embeddings import Embedder, EmbeddingFunction
from ...utils.vectors import normalize_rows
from ..store.base import StorageBackend
from ..store.capabilities import KeywordSearch, TextSearch
from ..store.doors import units_of
from ..store.engine import score_of
from ..store.units import unit_to_text

__all__ = ["Ranked", "VectorScan", "by_keywords", "by_meaning", "check_query"]

Filters = Mapping[str, Any] | None

K1, B = 1.2, 0.75
"""BM25 as in the store's own keyword index (Robertson and Zaragoza, 2009)."""

_WORD = re.compile(r"\w+")
_CACHED_TEXTS = 20_000


class Ranked(NamedTuple):
    """An id, its score, and what else is known; score and list are best first."""

    id: str
    score: float
    distance: float | None = None


def check_query(query: Any, top_k: Any) -> int:
    """``top_k`` as an int; InvalidQueryError for what no strategy can answer."""
    if not isinstance(query, str):
        raise InvalidQueryError(f"query must be a string, got {type(query).__name__}")
    return whole_number("top_k", top_k)


def by_meaning(
    backend: StorageBackend, query: str, limit: int, filters: Filters, scan: VectorScan | None
) -> list[Ranked]:
    """The nearest units. Access figures are left alone.

    Raises EmbeddingError when the backend has no index and ``scan`` is None.
    """
    if isinstance(backend, TextSearch):
        metric = str(getattr(backend, "metric", "l2"))
        found = backend.search(query, limit, filters, record=False)
        return [Ranked(unit_id, score_of(distance, metric), distance) for distance, unit_id in found]
    if scan is None:
        raise EmbeddingError(
            f"embedding_function is None, and a {type(backend).__name__} cannot search by meaning itself; give the "
            "strategy an embedding function, or use a VectorStore"
        )
    return scan.ranked(backend, query, limit, filters)


def by_keywords(backend: StorageBackend, query: str, limit: int, filters: Filters) -> list[Ranked]:
    """The units that share words with the query, by BM25."""
    if isinstance(backend, KeywordSearch):
        return [Ranked(unit_id, score) for score, unit_id in backend.search_keywords(query, limit, filters)]
    return _scanned_keywords(backend, query, limit, filters)


class VectorScan:
    """Search by meaning in a backend that has no index: every unit is compared, its text embedded once.

    Meant for small memories; the last 20,000 texts are remembered.
    """

    def __init__(self, function: EmbeddingFunction) -> None:
        """Raises EmbeddingError when ``function`` cannot be called."""
        self._embedder = Embedder(function)
        self._known: OrderedDict[str, FloatArray] = OrderedDict()
        self._lock = threading.RLock()  # the embedding function may ask the strategy something

    def ranked(self, backend: StorageBackend, query: str, limit: int, filters: Filters) -> list[Ranked]:
        """The units with the largest cosine."""
        units = list(units_of(backend, filters))
        if not units:
            return []
        rows = normalize_rows(self._vectors([unit_to_text(unit) for unit in units]))
        asked = normalize_rows(self._embedder.embed_query(query)[None, :])[0]
        cosines = rows @ asked
        order = np.argsort(-cosines, kind="stable")[:limit].tolist()
        return [Ranked(units[at]["id"], float(cosines[at]), 1.0 - float(cosines[at])) for at in order]

    def _vectors(self, texts: list[str]) -> FloatArray:
        with self._lock:
            new = [text for text in dict.fromkeys(texts) if text not in self._known]
            fresh = self._embedder.embed_many(new) if new else ()
            self._known.update(zip(new, fresh, strict=True))
            found = dict(zip(new, fresh, strict=True))
            rows = np.array([found[text] if text in found else self._known[text] for text in texts])
            while len(self._known) > _CACHED_TEXTS:
                self._known.popitem(last=False)
        return rows


def _scanned_keywords(backend: StorageBackend, query: str, limit: int, filters: Filters) -> list[Ranked]:
    words = dict.fromkeys(_words(query))
    docs = [(unit["id"], Counter(_words(unit_to_text(unit)))) for unit in units_of(backend, filters)]
    weight = _weigher(words, [counts for _, counts in docs])
    found = [Ranked(unit_id, weight(counts)) for unit_id, counts in docs if not words.keys().isdisjoint(counts)]
    return sorted(found, key=lambda one: -one.score)[:limit]


def _weigher(words: Mapping[str, Any], docs: Sequence[Counter[str]]) -> Callable[[Counter[str]], float]:
    """BM25 of a document among ``docs``."""
    average = sum(counts.total() for counts in docs) / len(docs) if docs else 1.0
    idf = {}
    for word in words:
        holding = sum(word in counts for counts in docs)
        idf[word] = max(1e-6, math.log((len(docs) - holding + 0.5) / (holding + 0.5)))

    def weight(counts: Counter[str]) -> float:
        norm = K1 * (1 - B + B * counts.total() / (average or 1.0))
        return sum(idf[word] * counts[word] * (K1 + 1) / (counts[word] + norm) for word in idf)

    return weight


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
