"""Exact search on plain memory: no copy of the vectors, no index object."""

from __future__ import annotations

import numpy as np

from ..types import FloatArray, IntArray, Metric
from .allowed import Allowed
from .faiss_door import load_faiss, translated

__all__ = ["exact_scan", "finished", "padded", "rerank_rows", "to_distances"]


def exact_scan(
    queries: FloatArray, vectors: FloatArray, k: int, metric: Metric, allowed: Allowed | None = None
) -> tuple[FloatArray, IntArray]:
    """The k nearest of ``vectors`` for each query.

    Args:
        queries: float32 (nq, d), C-contiguous; normalised under cosine.
        vectors: float32 (n, d), C-contiguous, may be a slice of a larger buffer; normalised under cosine.
        k: results per query, at least 1, may exceed n.
        metric: l2 (squared distance), cosine (1 - dot) or ip (-dot).
        allowed: rows that may be returned; None for all.

    Returns:
        distances float32 (nq, k) ascending and positions int64 (nq, k), padded with +inf and -1.

    Raises:
        EngineError: faiss cannot be loaded or fails.
    """
    nq, n = queries.shape[0], vectors.shape[0]
    count = n if allowed is None else allowed.count
    found = min(k, count)
    if nq == 0 or found == 0:
        return padded(nq, k)
    distances, positions = np.empty((nq, found), np.float32), np.empty((nq, found), np.int64)
    with translated("scanning"):
        _scan(queries, vectors, metric, allowed, (distances, positions))
    return finished(distances, positions, k, metric)


def rerank_rows(
    queries: FloatArray, vectors: FloatArray, candidates: IntArray, k: int, metric: Metric
) -> tuple[FloatArray, IntArray]:
    """The k nearest among each query's own candidates, by exact distance.

    Args:
        queries: float32 (nq, d), C-contiguous.
        vectors: float32 (n, d), C-contiguous.
        candidates: int64 (nq, r), C-contiguous positions; a row ends at its first -1.
        k: results per query.
        metric: as in :func:`exact_scan`.

    Returns:
        distances float32 (nq, k) ascending and positions int64 (nq, k), padded with +inf and -1.
    """
    (nq, width), found = candidates.shape, min(k, candidates.shape[1])
    if nq == 0 or found == 0:
        return padded(nq, k)
    faiss = load_faiss()
    distances, positions = np.empty((nq, found), np.float32), np.empty((nq, found), np.int64)
    ptr = faiss.swig_ptr
    rank = faiss.knn_L2sqr_by_idx if metric == "l2" else faiss.knn_inner_products_by_idx
    n, dim = vectors.shape
    with translated("reranking"):
        rank(
            ptr(queries), ptr(vectors), ptr(candidates), dim, nq, n, width, found, ptr(distances), ptr(positions), width
        )
    return finished(distances, positions, k, metric)


def to_distances(raw: FloatArray, metric: Metric) -> FloatArray:
    """Turn, in place, squared L2 or dot products as faiss returns them into distances that grow with dissimilarity."""
    if metric == "cosine":
        np.subtract(1.0, raw, out=raw)
        np.maximum(raw, 0.0, out=raw)
    elif metric == "ip":
        np.negative(raw, out=raw)
    return raw


def padded(nq: int, k: int) -> tuple[FloatArray, IntArray]:
    """Results of a search that found nothing: +inf and -1, (nq, k)."""
    return np.full((nq, k), np.inf, np.float32), np.full((nq, k), -1, np.int64)


def _scan(
    queries: FloatArray,
    vectors: FloatArray,
    metric: Metric,
    allowed: Allowed | None,
    out: tuple[FloatArray, IntArray],
) -> None:
    """Fill ``out``. Always with a selector: without one faiss may compute |x|^2 + |y|^2 - 2xy, which cancels, for
    batches (before 1.15), wide vectors (since) or single queries (proposed); with one it subtracts component-wise.
    """
    distances, positions = out
    faiss = load_faiss()
    ptr = faiss.swig_ptr
    selector = faiss.IDSelectorAll() if allowed is None else allowed.listing(faiss)
    (n, dim), (nq, k) = vectors.shape, distances.shape
    if metric == "l2":
        faiss.knn_L2sqr(ptr(queries), ptr(vectors), dim, nq, n, k, ptr(distances), ptr(positions), None, selector)
    else:
        faiss.knn_inner_product(ptr(queries), ptr(vectors), dim, nq, n, k, ptr(distances), ptr(positions), selector)


def finished(distances: FloatArray, positions: IntArray, k: int, metric: Metric) -> tuple[FloatArray, IntArray]:
    """Distances of the metric, +inf where faiss found nothing, and as many columns as were asked for."""
    to_distances(distances, metric)
    if positions[:, -1].min() < 0:
        distances[positions < 0] = np.inf
    nq, found = positions.shape
    if found == k:
        return distances, positions
    all_distances, all_positions = padded(nq, k)
    all_distances[:, :found] = distances
    all_positions[:, :found] = positions
    return all_distances, all_positions
