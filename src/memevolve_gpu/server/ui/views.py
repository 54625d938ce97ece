"""What the page shows and the REST routes do not give: a map, neighbours, near pairs, and why a unit was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...components.manage.meaning import compare, meaning_of
from ...components.manage.meaning_words import FILLERS
from ...components.manage.near_duplicates import near_groups
from ...components.store.base import StorageBackend
from ...components.store.units import unit_to_text
from ...index.faiss_support import load_faiss
from ...records.tokenizer import terms_of, words_of
from ...types import IntArray, JsonObject, MemoryUnit
from ...utils.vectors import cosines, normalize_rows

MOST_POINTS = 3000
MOST_COMPARED = 20_000
MOST_JUDGED = 2000
MOST_PAIRS = 200
MOST_EXPLAINED = 100

_Matrix = NDArray[np.float64]
_SEED = 7


def memory_map(store: StorageBackend, count: int, clusters: int) -> JsonObject:
    """Place a sample of the units on a plane by the two directions in which their vectors differ most.

    Returns ``points`` with x and y in -1..1, ``clusters`` by k-means with the words that mark each, and ``shown``, the
    share of the variance that the plane keeps.
    """
    vectors = store.sample_vectors(count)
    units = store.retrieve_batch(list(vectors))
    if not units:
        return {"points": [], "clusters": [], "shown": 0.0, "total": store.count()}
    matrix = np.array([vectors[name] for name in units], dtype=np.float64)
    places, shown = _plane(matrix)
    labels = _k_means(matrix, min(clusters, len(matrix)))
    words = [{*_words(_content(unit)), *_tags(unit)} for unit in units.values()]
    points = [
        {"id": name, "x": x, "y": y, "cluster": int(label), "type": unit.get("type"), "text": _excerpt(unit)}
        for (name, unit), (x, y), label in zip(units.items(), places.round(4).tolist(), labels, strict=True)
    ]
    marks = [{"size": int((labels == i).sum()), "words": _marks(words, labels == i)} for i in range(labels.max() + 1)]
    return {"points": points, "clusters": marks, "shown": round(shown, 3), "total": store.count()}


def _plane(matrix: _Matrix) -> tuple[_Matrix, float]:
    """The first two principal components (n, 2), cut to -1..1, and their share of the variance."""
    centred = matrix - matrix.mean(axis=0)
    values, axes = np.linalg.eigh(centred.T @ centred)  # the largest last
    places = centred @ axes[:, ::-1][:, :2]
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    total = float(values.sum())
    largest = np.abs(places).max() or 1.0
    return places / largest, float(values[-2:].sum()) / total if total > 0 else 1.0


def _k_means(matrix: _Matrix, k: int) -> IntArray:
    """Cluster numbers (n,), the largest cluster first: k-means on rows of length 1, the best of some beginnings."""
    rows = normalize_rows(matrix.astype(np.float32))
    means = load_faiss().Kmeans(
        rows.shape[1], k, niter=25, nredo=8, spherical=True, seed=_SEED, min_points_per_centroid=1
    )
    means.train(rows)
    labels = means.assign(rows)[1]
    order = np.argsort(-np.bincount(labels, minlength=k), kind="stable")
    place = np.empty(k, dtype=np.int64)
    place[order] = np.arange(k)
    return np.asarray(place[labels])


def _marks(words: Sequence[set[str]], inside: Iterable[object]) -> list[str]:
    """The three words that are frequent inside and rare elsewhere, by term frequency and inverse unit frequency."""
    telling = [{word for word in held if len(word) > 2 and word not in FILLERS["en"]} for held in words]
    here = Counter(word for held, is_in in zip(telling, inside, strict=True) if is_in for word in held)
    all_of = Counter(word for held in telling for word in held)
    return sorted(here, key=lambda word: (-here[word] * np.log(len(words) / all_of[word]), word))[:3]


def neighbours(store: StorageBackend, unit_id: str, count: int) -> list[JsonObject]:
    """The units nearest to a unit, with their cosines; none where there is no such unit."""
    own = store.vectors_of([unit_id]).get(unit_id)
    if own is None:
        return []
    _, ids = store.search_vectors(own[None, :], count + 1)
    near = [name for name in ids[0] if name is not None and name != unit_id][:count]
    units, vectors = store.retrieve_batch(near), store.vectors_of(near)
    found = [
        {"unit": units[one], "cosine": _rounded(cosine)}
        for one, cosine in cosines(own, vectors).items()
        if one in units
    ]
    return sorted(found, key=lambda one: -one["cosine"])


def near_pairs(store: StorageBackend, threshold: float, count: int) -> JsonObject:
    """Pairs of near units among the newest ``count``, each with what differs, most urgent first.

    ``kind`` is what deduplication decides by the texts: ``conflict`` (one statement with another value or sense, which
    a cosine hardly sees), ``same``, or ``different``; ``reason`` says why.
    """
    total = store.count()
    newest = store.units(order_by="-metadata.created_at", limit=count) if total > count else None
    only = None if newest is None else [unit["id"] for unit in newest]
    found = [(group[0], other) for group in near_groups(store, threshold, only=only) for other in group[1:]]
    listed = found[:MOST_JUDGED]
    ids = [name for pair in listed for name in pair]
    units, vectors = store.retrieve_batch(ids), store.vectors_of(ids)
    pairs = [
        {
            "units": [units[a], units[b]],
            "cosine": _rounded(cosines(vectors[a], {b: vectors[b]})[b]),
            **_difference(units[a], units[b]),
        }
        for a, b in listed
        if a in units and b in units  # neither was deleted meanwhile
    ]
    urgency = ("conflict", "same", "different")
    pairs.sort(key=lambda pair: (urgency.index(pair["kind"]), -pair["cosine"]))
    return {"pairs": pairs[:MOST_PAIRS], "found": len(found), "compared": min(total, count), "total": total}


def _difference(a: MemoryUnit, b: MemoryUnit) -> JsonObject:
    texts = unit_to_text(a), unit_to_text(b)
    first, second = (Counter(_words(text)) for text in texts)
    verdict = compare(*map(meaning_of, texts))
    only = [sorted(first - second), sorted(second - first)]
    return {"kind": verdict.kind, "reason": verdict.reason.replace("#", ""), "only": only}  # "#" marks a number


def why(store: StorageBackend, query: str, ids: Sequence[str]) -> dict[str, JsonObject]:
    """For each unit its cosine with the query, its BM25 score (None if not among the best), and the common words.

    A word of the query is common when the unit holds it in any form, as for the keyword index.
    """
    units = store.retrieve_batch(ids)
    asked = {word: set(terms_of(word)) for word in _words(query)}
    similar = store.similarities(query, list(units)) if units and query.strip() else {}
    scores = {name: score for score, name in store.search_keywords(query, MOST_EXPLAINED)} if units and asked else {}
    found = dict[str, JsonObject]()
    for name, unit in units.items():
        held = words_of(unit_to_text(unit)).counts
        common = sorted(word for word, forms in asked.items() if not forms.isdisjoint(held))
        found[name] = {
            "cosine": _rounded(similar.get(name)),
            "keyword_score": scores.get(name),
            "words": common,
        }
    return found


def _words(text: str) -> list[str]:
    """The words of a text in their order, as the keyword index has them."""
    return words_of(text).text.split()


def _content(unit: MemoryUnit) -> str:
    content = unit.get("content")
    return content if isinstance(content, str) and content else unit_to_text(unit)


def _tags(unit: MemoryUnit) -> list[str]:
    tags = unit.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _excerpt(unit: MemoryUnit) -> str:
    text = " ".join(_content(unit).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)
