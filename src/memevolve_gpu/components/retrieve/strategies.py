"""Retrieval strategies: keyword, semantic, and hybrid with rank fusion."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from ...errors import ConfigurationError, EmbeddingError, InvalidQueryError
from ...records.fulltext import bm25, full_score, inverse_frequencies
from ...records.keyword_query import parse_query, with_prefixes
from ...records.tokenizer import words_of
from ...types import Filters, FloatArray, JsonObject
from ...utils.arguments import mapping, real_number, whole_number, word
from ...utils.embeddings import Embedder, EmbeddingFunction
from ...utils.embeddings.cross_encoder import CrossEncoder
from ...utils.forking import lock
from ...utils.lru import LruCache
from ...utils.vectors import normalize_rows
from ..store.base import StorageBackend
from ..store.foreign import as_backend
from ..store.ranking import Ranking, best, score_of, similarity_of
from ..store.units import unit_to_text
from .base import COUNTED, RetrievalResult, RetrievalStrategy
from .reorder import Rerank, diverse, reranked

_CACHED_TEXTS = 20_000


class Ranked(NamedTuple):
    """An id with its score and, from a vector index, its distance."""

    id: str
    score: float
    distance: float | None = None


def check_query(query: object, top_k: object) -> int:
    """Return ``top_k`` as an int. Raises InvalidQueryError for a query or ``top_k`` that cannot be used."""
    if not isinstance(query, str):
        raise InvalidQueryError(f"query must be a string, got {type(query).__name__}")
    return whole_number("top_k", top_k)


def _threshold(value: object) -> float | None:
    most = sys.float_info.max
    return (
        None
        if value is None
        else real_number("similarity_threshold", value, "a number or None", -most, most, ConfigurationError)
    )


def _share(name: str, value: object) -> float:
    return real_number(name, value, "a number of at least 0", 0, sys.float_info.max / 2, ConfigurationError)


def by_meaning(
    backend: StorageBackend, query: str, limit: int, filters: Filters | None, scan: VectorScan | None
) -> list[Ranked]:
    """Return the nearest units, without counting an access.

    Raises EmbeddingError when the backend has no index and ``scan`` is None.
    """
    if "search" in backend.capabilities:
        found = backend.search(query, limit, filters, record=False)
        return [Ranked(unit_id, score_of(distance, backend.metric), distance) for distance, unit_id in found]
    if scan is None:
        raise EmbeddingError(
            f"embedding_function is None, and a {type(backend).__name__} cannot search by meaning itself; give the "
            "strategy an embedding function, or use a VectorStore"
        )
    return scan.ranked(backend, query, limit, filters)


def by_keywords(
    backend: StorageBackend, query: str, limit: int, filters: Filters | None, relative: bool = False
) -> list[Ranked]:
    """Return the units that share words with the query, by BM25, or by its share of a full match."""
    if "search_keywords" in backend.capabilities:
        found = backend.search_keywords(query, limit, filters, relative=relative)
        return [Ranked(unit_id, score) for score, unit_id in found]
    return _scanned_keywords(backend, query, limit, filters, relative)


def ranked(
    ranking: Ranking,
    find: Callable[[int], list[RetrievalResult]],
    similarity: Callable[[RetrievalResult], float],
    top_k: int,
) -> list[RetrievalResult]:
    """Return the best of all by similarity, age and importance; ``find`` gives the most similar, best first."""
    now = ranking.now()

    def fetch(wanted: int) -> list[tuple[float, float, RetrievalResult]]:
        return [(similarity(one), ranking.factor(one.unit, now), one) for one in find(wanted)]

    return [replace(one, score=score) for score, one in best(fetch, top_k)]


class VectorScan:
    """Search by meaning in a backend without an index: compares every unit, and embeds each text once.

    Suitable for small memories; the vectors of the last 20,000 texts are cached.
    """

    def __init__(self, function: EmbeddingFunction) -> None:
        """Raises EmbeddingError when ``function`` cannot be called."""
        self._embedder = Embedder(function)
        self._known: LruCache[str, FloatArray] = LruCache(_CACHED_TEXTS)
        self._lock = lock()  # the embedding function may call the strategy

    def ranked(self, backend: StorageBackend, query: str, limit: int, filters: Filters | None) -> list[Ranked]:
        """Return the units with the largest cosine."""
        units = list(backend.units(filters))
        if not units:
            return []
        rows = normalize_rows(self._vectors([unit_to_text(unit) for unit in units]))
        cosines = rows @ normalize_rows(self._embedder.embed_query(query)[None, :])[0]
        order = np.argsort(-cosines, kind="stable")[:limit].tolist()
        return [Ranked(units[at]["id"], float(cosines[at]), 1.0 - float(cosines[at])) for at in order]

    def _vectors(self, texts: list[str]) -> FloatArray:
        with self._lock:
            found = {text: known for text in texts if (known := self._known.get(text)) is not None}
            new = [text for text in dict.fromkeys(texts) if text not in found]
            for text, vector in zip(new, self._embedder.embed_many(new) if new else (), strict=True):
                found[text] = self._known.put(text, vector)
        return np.array([found[text] for text in texts])


def _scanned_keywords(
    backend: StorageBackend, query: str, limit: int, filters: Filters | None, relative: bool
) -> list[Ranked]:
    asked = parse_query(query)
    docs = [(unit["id"], words_of(unit_to_text(unit))) for unit in backend.units(filters)]
    if not docs:
        return []
    held = [(unit_id, words, with_prefixes(words.counts, asked.prefixes)) for unit_id, words in docs]
    holding = {word: sum(word in counts for *_, counts in held) for word in asked.weights}
    lengths = {unit_id: words.counts.total() for unit_id, words in docs}
    idf = inverse_frequencies(len(docs), holding, asked.weights)
    score = bm25(sum(lengths.values()) / len(docs), idf)
    proposing = asked.proposing(holding).keys()
    found = [
        Ranked(unit_id, score(counts, lengths[unit_id]))
        for unit_id, words, counts in held
        if not proposing.isdisjoint(counts) and asked.admits(words)
    ]
    found = sorted(found, key=lambda one: -one.score)[:limit]
    full = full_score(len(docs), idf)
    return [one._replace(score=min(1.0, one.score / full)) for one in found] if relative else found


RANK_CONSTANT = 60
"""k of reciprocal rank fusion: Cormack, Clarke and Buettcher, Reciprocal Rank Fusion outperforms Condorcet (2009)."""


@dataclass
class Fused:
    """A unit of either list: its fused score, and its score and rank (from 0) in each list."""

    id: str
    score: float = 0.0
    semantic_score: float | None = None
    keyword_score: float | None = None
    semantic_rank: int | None = None
    keyword_rank: int | None = None


def weighted(
    semantic: Sequence[Ranked],
    keyword: Sequence[Ranked],
    weights: tuple[float, float],
    similarity: Mapping[str, float],
) -> list[Fused]:
    """Score each unit w_s * max(0, similarity) + w_k * keyword score, best first.

    keyword: scores in 0..1, the share of a full match. similarity: the exact cosine of each unit, by id, including
    units that only the keyword search found. A missing one is taken from ``semantic``, else 0.

    Neither part depends on what else was found, so scores of different queries are comparable. (Compare S. Bruch,
    S. Gai and A. Ingber, An Analysis of Fusion Functions for Hybrid Retrieval, 2023, section 4.)
    """
    fused = _united(semantic, keyword)
    for one in fused:
        if one.id in similarity:
            one.semantic_score = similarity[one.id]
        meaning = min(1.0, max(0.0, one.semantic_score or 0.0))
        one.score = weights[0] * meaning + weights[1] * (one.keyword_score or 0.0)
    return sorted(fused, key=lambda one: -one.score)


def reciprocal_ranks(semantic: Sequence[Ranked], keyword: Sequence[Ranked]) -> list[Fused]:
    """Sum 1 / (60 + rank) over the lists that contain the unit, ranks from 1, as a share of the largest sum."""
    fused = _united(semantic, keyword)
    for one in fused:
        ranks = [rank for rank in (one.semantic_rank, one.keyword_rank) if rank is not None]
        one.score = sum((RANK_CONSTANT + 1) / (RANK_CONSTANT + 1 + rank) for rank in ranks) / 2
    return sorted(fused, key=lambda one: -one.score)


def _united(semantic: Sequence[Ranked], keyword: Sequence[Ranked]) -> list[Fused]:
    """Return each unit once, those found by meaning first."""
    found: dict[str, Fused] = {}
    for rank, one in enumerate(semantic):
        found[one.id] = Fused(one.id, semantic_score=one.score, semantic_rank=rank)
    for rank, one in enumerate(keyword):
        fused = found.setdefault(one.id, Fused(one.id))
        fused.keyword_score, fused.keyword_rank = one.score, rank
    return list(found.values())


class KeywordRetrievalStrategy(RetrievalStrategy):
    """Searches the backend's keyword index; the score is BM25. A backend without one is scanned.

    Examples:
        >>> from memevolve_gpu.components.retrieve import KeywordRetrievalStrategy
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> store = ScratchStore([{"id": "a", "content": "git bisect"}, {"id": "b", "content": "tar"}])
        >>> [found.unit_id for found in KeywordRetrievalStrategy().retrieve("bisect a repository", store)]
        ['a']
    """

    def __init__(self, *, ranking: Ranking | None = None) -> None:
        """Create a strategy.

        Args:
            ranking: Age and importance that multiply the BM25 score; None for BM25 alone.
        """
        self.ranking = Ranking.checked(ranking)

    def retrieve(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Filters | None = None
    ) -> list[RetrievalResult]:
        top_k = check_query(query, top_k)
        backend = as_backend(storage_backend)

        def find(wanted: int) -> list[RetrievalResult]:
            found = by_keywords(backend, query, wanted, filters)
            units = backend.retrieve_batch([one.id for one in found])
            return [RetrievalResult(one.id, units[one.id], one.score, {}) for one in found if one.id in units]

        found = find(top_k) if self.ranking is None else ranked(self.ranking, find, lambda one: one.score, top_k)
        backend.record_access([one.unit_id for one in found])
        return found

    def count_relevant(self, query: str, storage_backend: StorageBackend, filters: Filters | None = None) -> int:
        check_query(query, 1)
        return len(by_keywords(as_backend(storage_backend), query, COUNTED, filters))


class SemanticRetrievalStrategy(RetrievalStrategy):
    """Searches the backend's vector index.

    The score is that of the store: the cosine, the dot product, or 1 / (1 + distance) for l2;
    ``metadata["distance"]`` of a result is that of ``VectorStore.search``.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder
        >>> from memevolve_gpu.components.retrieve import SemanticRetrievalStrategy
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> store = ScratchStore([{"id": "a", "content": "git bisect"}, {"id": "b", "content": "tar archive"}])
        >>> strategy = SemanticRetrievalStrategy(HashingEmbedder())
        >>> [found.unit_id for found in strategy.retrieve("git bisect", store, top_k=1)]
        ['a']
    """

    def __init__(
        self,
        embedding_function: EmbeddingFunction | None = None,
        similarity_threshold: float | None = None,
        *,
        ranking: Ranking | None = None,
    ) -> None:
        """Create a strategy.

        Args:
            embedding_function: Embeds texts for a backend without a vector index; a ``VectorStore`` uses its own.
            similarity_threshold: Results with a smaller score are dropped; None keeps all.
            ranking: Age and importance that count too; None for similarity alone.

        Raises:
            EmbeddingError: ``embedding_function`` cannot be called.
        """
        self.ranking = Ranking.checked(ranking)
        self.similarity_threshold = _threshold(similarity_threshold)
        self._scan = None if embedding_function is None else VectorScan(embedding_function)

    def retrieve(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Filters | None = None
    ) -> list[RetrievalResult]:
        top_k = check_query(query, top_k)
        backend = as_backend(storage_backend)
        if self.ranking is None:
            found = self._found(query, backend, top_k, filters)
        elif "search_units" in backend.capabilities:
            hits = backend.search_units(query, top_k, filters, record=False, **self.ranking.options)
            found = [RetrievalResult(hit.id, hit.unit, hit.score, {"distance": hit.distance}) for hit in hits]
        else:
            metric = backend.metric if "search" in backend.capabilities else "cosine"
            found = ranked(
                self.ranking,
                lambda wanted: self._found(query, backend, wanted, filters),
                lambda one: float(similarity_of((one.metadata or {})["distance"], metric)),
                top_k,
            )
        kept = [one for one in found if self.similarity_threshold is None or one.score >= self.similarity_threshold]
        backend.record_access([one.unit_id for one in kept])
        return kept

    def count_relevant(self, query: str, storage_backend: StorageBackend, filters: Filters | None = None) -> int:
        check_query(query, 1)
        found = by_meaning(as_backend(storage_backend), query, COUNTED, filters, self._scan)
        least = self.similarity_threshold
        return sum(least is None or one.score >= least for one in found)

    def save_state(self) -> JsonObject:
        return {"similarity_threshold": self.similarity_threshold}

    def restore_state(self, state: Mapping[str, object]) -> None:
        held = mapping("state", state).get("similarity_threshold", self.similarity_threshold)
        self.similarity_threshold = _threshold(held)

    def _found(self, query: str, backend: StorageBackend, top_k: int, filters: Filters | None) -> list[RetrievalResult]:
        if "search" in backend.capabilities:
            hits = backend.search_units(query, top_k, filters, record=False)
            return [RetrievalResult(hit.id, hit.unit, hit.score, {"distance": hit.distance}) for hit in hits]
        ranked = by_meaning(backend, query, top_k, filters, self._scan)
        units = backend.retrieve_batch([one.id for one in ranked])
        return [
            RetrievalResult(one.id, units[one.id], one.score, {"distance": one.distance})
            for one in ranked
            if one.id in units
        ]


Fusion = Literal["weighted", "rrf"]

EVERY_WORD = 10_000
"""Candidates by words of a hybrid search that is ranked by age and importance: more than the index proposes."""

CONTEXT_POOL = 100
"""Candidates from each index where neighbours count."""

POOL, POOL_FACTOR = 20, 4
"""Candidates from each index: ``POOL``, or ``POOL_FACTOR * top_k`` if that is more."""


class HybridRetrievalStrategy(RetrievalStrategy):
    """Searches the vector index and the keyword index, and fuses the results.

    ``weighted`` adds half of the cosine and half of the keyword score, the share of a full match by BM25; scores are
    in 0..1 and can be compared between queries. ``rrf`` is reciprocal rank fusion, which uses ranks only. ``metadata``
    of a result has ``semantic_score``, ``keyword_score``, ``semantic_rank`` and ``keyword_rank`` (from 0); None where
    that search did not find the unit.

    Examples:
        >>> import tempfile
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> from memevolve_gpu.components.retrieve import HybridRetrievalStrategy
        >>> with tempfile.TemporaryDirectory() as folder, VectorStore(f"{folder}/m", HashingEmbedder()) as store:
        ...     ids = store.store_batch([{"id": "a", "content": "git bisect"}, {"id": "b", "content": "tar archive"}])
        ...     [found.unit_id for found in HybridRetrievalStrategy().retrieve("git bisect", store, top_k=1)]
        ['a']
    """

    def __init__(
        self,
        embedding_function: EmbeddingFunction | None = None,
        semantic_weight: float = 0.5,
        keyword_weight: float = 0.5,
        similarity_threshold: float | None = None,
        *,
        fusion: Fusion = "weighted",
        ranking: Ranking | None = None,
        neighbours: float = 0.0,
        rerank: Rerank | str | None = None,
        diversity: float = 0.0,
    ) -> None:
        """Create a strategy.

        Args:
            embedding_function: Embeds texts for a backend without a vector index; a ``VectorStore`` uses its own.
            semantic_weight: Weight of the cosine, as a share of both weights; ``weighted`` only.
            keyword_weight: Weight of the keyword score, as a share of both weights; ``weighted`` only.
            similarity_threshold: Results with a smaller fused score are dropped; None keeps all.
            fusion: ``weighted`` or ``rrf``.
            ranking: Age and importance that multiply the fused score; None for that score alone.
            neighbours: Share of the score of the better neighbour that is added to a unit's, at least 0. Neighbours are
                candidates of the same ``metadata.session`` whose whole ``metadata.position`` differs by 1. Such scores
                can exceed 1. Not used together with ``ranking``.
            rerank: Called with the query and the texts of the candidates, 20 or four for each result; returns a number
                for each, larger for a better match, which becomes the score. A text is a cross-encoder that fastembed
                (extra ``local``) runs: its name, or the path of an ONNX file with its tokenizer beside it.
            diversity: From 0 to 1: how much a result that resembles better ones is ranked lower (maximal marginal
                relevance by the cosine). Only for a backend with vectors; scores stay as they are.

        Raises:
            ConfigurationError: A weight or another argument is not allowed.
            EmbeddingError: ``embedding_function`` cannot be called.
            EngineError: ``rerank`` names a model and fastembed is not installed.
        """
        word("fusion", fusion, ("weighted", "rrf"), ConfigurationError)
        self.fusion: Fusion = fusion
        self.ranking = Ranking.checked(ranking)
        self.neighbours = _share("neighbours", neighbours)
        if not (rerank is None or isinstance(rerank, str) or callable(rerank)):
            raise ConfigurationError(f"rerank must be callable, a text or None, got {type(rerank).__name__}")
        self.rerank: Rerank | None = CrossEncoder(rerank) if isinstance(rerank, str) else rerank
        self.diversity = real_number("diversity", diversity, "a number from 0 to 1", 0, 1, ConfigurationError)
        self.similarity_threshold = _threshold(similarity_threshold)
        self.set_weights(semantic_weight, keyword_weight)
        self._scan = None if embedding_function is None else VectorScan(embedding_function)

    def set_weights(self, semantic_weight: float, keyword_weight: float) -> None:
        """Set both weights, as shares of their sum.

        Args:
            semantic_weight: At least 0.
            keyword_weight: At least 0.

        Raises:
            ConfigurationError: A weight is negative or not finite, or both are 0.
        """
        given = (("semantic_weight", semantic_weight), ("keyword_weight", keyword_weight))
        semantic, keyword = (_share(name, value) for name, value in given)
        if not semantic + keyword:
            raise ConfigurationError("semantic_weight and keyword_weight are both 0; give one of them a weight")
        self.semantic_weight = semantic / (semantic + keyword)
        self.keyword_weight = keyword / (semantic + keyword)

    def retrieve(
        self, query: str, storage_backend: StorageBackend, top_k: int = 5, filters: Filters | None = None
    ) -> list[RetrievalResult]:
        top_k = check_query(query, top_k)
        backend = as_backend(storage_backend)
        wanted = max(POOL, POOL_FACTOR * top_k) if self.rerank is not None or self.diversity else top_k
        if self.ranking is not None:
            found = self._ranked(self.ranking, query, backend, wanted, filters)
        elif self.neighbours:
            found = self._in_context(query, backend, wanted, filters)
        else:
            found = self._plain(query, backend, wanted, filters)
        if self.rerank is not None:
            found = reranked(self.rerank, query, found)
        if self.diversity and "vectors_of" in backend.capabilities:
            found = diverse(found, backend.vectors_of([one.unit_id for one in found]), self.diversity, top_k)
        found = found[:top_k]
        backend.record_access([one.unit_id for one in found])
        return found

    def count_relevant(self, query: str, storage_backend: StorageBackend, filters: Filters | None = None) -> int:
        check_query(query, 1)
        return min(COUNTED, len(self._fused(query, as_backend(storage_backend), COUNTED, filters)))

    def save_state(self) -> JsonObject:
        return {
            "semantic_weight": self.semantic_weight,
            "keyword_weight": self.keyword_weight,
            "similarity_threshold": self.similarity_threshold,
            "fusion": self.fusion,
            "neighbours": self.neighbours,
            "diversity": self.diversity,
        }

    def restore_state(self, state: Mapping[str, object]) -> None:
        held = {**self.save_state(), **mapping("state", state)}
        word("fusion", held["fusion"], ("weighted", "rrf"), ConfigurationError)
        threshold = _threshold(held["similarity_threshold"])
        neighbours = _share("neighbours", held["neighbours"])
        diversity = real_number("diversity", held["diversity"], "a number from 0 to 1", 0, 1, ConfigurationError)
        self.set_weights(held["semantic_weight"], held["keyword_weight"])
        self.neighbours, self.diversity = neighbours, diversity
        self.similarity_threshold, self.fusion = threshold, held["fusion"]

    def _plain(self, query: str, backend: StorageBackend, top_k: int, filters: Filters | None) -> list[RetrievalResult]:
        fused = self._fused(query, backend, max(POOL, POOL_FACTOR * top_k), filters)
        units = backend.retrieve_batch([one.id for one in fused[:top_k]])
        if len(units) < min(top_k, len(fused)):  # units were deleted meanwhile
            units = backend.retrieve_batch([one.id for one in fused])
        return [_result(one, units[one.id]) for one in fused if one.id in units][:top_k]

    def _ranked(
        self, ranking: Ranking, query: str, backend: StorageBackend, top_k: int, filters: Filters | None
    ) -> list[RetrievalResult]:
        """The best of all by fused score, age and importance.

        Every unit that the words find takes part, so a unit that is left out scores no more than its similarity, which
        is at most that of the last one found by meaning.
        """
        now, pool = ranking.now(), max(POOL, POOL_FACTOR * top_k)
        words = by_keywords(backend, query, EVERY_WORD, filters, relative=True)
        while True:
            semantic = by_meaning(backend, query, pool, filters, self._scan)
            fused = self._fuse(query, backend, semantic, words)
            units = backend.retrieve_batch([one.id for one in fused])
            found = [_result(one, units[one.id]) for one in fused if one.id in units]
            found = [replace(one, score=one.score * ranking.factor(one.unit, now)) for one in found]
            found.sort(key=lambda one: -one.score)
            if len(semantic) < pool:
                return found[:top_k]
            unseen = self._bound(semantic[-1], backend.metric, pool)
            if len(found) >= top_k and found[top_k - 1].score > unseen:
                return found[:top_k]
            pool *= POOL_FACTOR

    def _in_context(
        self, query: str, backend: StorageBackend, top_k: int, filters: Filters | None
    ) -> list[RetrievalResult]:
        """The best of a larger pool by fused score and that of the better neighbour."""
        fused = self._fused(query, backend, max(CONTEXT_POOL, POOL_FACTOR * top_k), filters)
        units = backend.retrieve_batch([one.id for one in fused])
        found = [_result(one, units[one.id]) for one in fused if one.id in units]
        places = [_place(one.unit) for one in found]
        scores = {place: one.score for place, one in zip(places, found, strict=True) if place is not None}
        for at, place in enumerate(places):
            if place is not None:
                beside = max(scores.get((place[0], place[1] + step), 0.0) for step in (-1, 1))
                found[at] = replace(found[at], score=found[at].score + self.neighbours * beside)
        return sorted(found, key=lambda one: -one.score)[:top_k]

    def _bound(self, last: Ranked, metric: str, pool: int) -> float:
        """The largest fused score of a unit that is in neither list; exact for cosine, and l2 with unit vectors."""
        if self.fusion == "rrf":
            return (RANK_CONSTANT + 1) / (RANK_CONSTANT + 1 + pool) / 2
        cosine = 1.0 - (last.distance or 0.0) / 2.0 if metric == "l2" else last.score
        return self.semantic_weight * min(1.0, max(0.0, cosine))

    def _fused(self, query: str, backend: StorageBackend, pool: int, filters: Filters | None) -> list[Fused]:
        semantic = by_meaning(backend, query, pool, filters, self._scan)
        return self._fuse(query, backend, semantic, by_keywords(backend, query, pool, filters, relative=True))

    def _fuse(self, query: str, backend: StorageBackend, semantic: list[Ranked], keyword: list[Ranked]) -> list[Fused]:
        if self.fusion == "rrf":
            fused = reciprocal_ranks(semantic, keyword)
        else:
            either = list({one.id: None for one in (*semantic, *keyword)})
            known = backend.similarities(query, either) if "similarities" in backend.capabilities else {}
            fused = weighted(semantic, keyword, (self.semantic_weight, self.keyword_weight), known)
        least = self.similarity_threshold
        return [one for one in fused if least is None or one.score >= least]


def _place(unit: Mapping[str, object]) -> tuple[str, int] | None:
    """Session and position of a unit; None unless it has both."""
    metadata = unit.get("metadata")
    if not isinstance(metadata, dict):
        return None
    session, position = metadata.get("session"), metadata.get("position")
    if session is None or not isinstance(position, int) or isinstance(position, bool):
        return None
    return repr(session), position


def _result(one: Fused, unit: JsonObject) -> RetrievalResult:
    metadata = {name: value for name, value in vars(one).items() if name not in ("id", "score")}
    return RetrievalResult(one.id, unit, one.score, metadata)
