"""Exact search in plain memory, for one query or many at once.

A scan reads every vector once per query; a matrix product reads it once for all of them. Over 40,000 rows of 384
dimensions 48 queries for 100 results take 0.3 of the scan's time each, 192 take 0.2; over 5,000 rows, which stay in
the cache, 0.8 and 0.7 (one thread).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt

from ..types import FaissObject, FloatArray, IntArray, Metric
from .bitmap import RowFilter
from .faiss_support import load_faiss, translate_error


def exact_scan(
    queries: FloatArray, vectors: FloatArray, k: int, metric: Metric, row_filter: RowFilter | None = None
) -> tuple[FloatArray, IntArray]:
    """The k nearest of ``vectors`` for each query.

    Args:
        queries: float32 (nq, d), C-contiguous; normalised under cosine.
        vectors: float32 (n, d), C-contiguous, may be a slice of a larger buffer; normalised under cosine.
        k: results per query, at least 1, may exceed n.
        metric: l2 (squared distance), cosine (1 - dot) or ip (-dot).
        row_filter: rows that may be returned; None for all.

    Returns:
        distances float32 (nq, k) ascending and positions int64 (nq, k), padded with +inf and -1.

    Raises:
        EngineError: faiss cannot be loaded or fails.
    """
    nq, n = queries.shape[0], vectors.shape[0]
    count = n if row_filter is None else row_filter.count
    found = min(k, count)
    if nq == 0 or found == 0:
        return padded(nq, k)
    distances, positions = np.empty((nq, found), np.float32), np.empty((nq, found), np.int64)
    with translate_error("scanning"):
        _scan(queries, vectors, metric, row_filter, (distances, positions))
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
    with translate_error("reranking"):
        rank(
            ptr(queries), ptr(vectors), ptr(candidates), dim, nq, n, width, found, ptr(distances), ptr(positions), width
        )
    return finished(distances, positions, k, metric)


def distances_by_row(queries: FloatArray, vectors: FloatArray, rows: IntArray, metric: Metric) -> FloatArray:
    """The exact distances of each query's own ``rows`` int64 (nq, r), C-contiguous: float32 (nq, r), +inf for -1."""
    faiss, (nq, width) = load_faiss(), rows.shape
    distances = np.empty((nq, width), np.float32)
    ptr = faiss.swig_ptr
    compare = faiss.fvec_L2sqr_by_idx if metric == "l2" else faiss.fvec_inner_products_by_idx
    with translate_error("comparing candidates"):
        compare(ptr(distances), ptr(queries), ptr(vectors), ptr(rows), vectors.shape[1], nq, width)
    to_distances(distances, metric)
    distances[rows < 0] = np.inf
    return distances


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
    row_filter: RowFilter | None,
    out: tuple[FloatArray, IntArray],
) -> None:
    """Fill ``out``. Always with a selector: without one faiss may compute |x|^2 + |y|^2 - 2xy, which cancels, for
    batches (before 1.15), wide vectors (since) or single queries (proposed); with one it subtracts component-wise.
    """
    distances, positions = out
    faiss = load_faiss()
    ptr = faiss.swig_ptr
    (n, dim), (nq, k) = vectors.shape, distances.shape
    if row_filter is not None:  # a list of rows that all queries share
        rows, count = row_filter.positions, row_filter.count
        rank = faiss.knn_L2sqr_by_idx if metric == "l2" else faiss.knn_inner_products_by_idx
        rank(ptr(queries), ptr(vectors), ptr(rows), dim, nq, n, count, k, ptr(distances), ptr(positions), 0)
        return
    selector = _every_row()
    if metric == "l2":
        faiss.knn_L2sqr(ptr(queries), ptr(vectors), dim, nq, n, k, ptr(distances), ptr(positions), None, selector)
    else:
        faiss.knn_inner_product(ptr(queries), ptr(vectors), dim, nq, n, k, ptr(distances), ptr(positions), selector)


@cache
def _every_row() -> FaissObject:
    """A selector of all rows. Made once: to make and to free one each let another thread take Python's lock."""
    return load_faiss().IDSelectorAll()


def finished(distances: FloatArray, positions: IntArray, k: int, metric: Metric) -> tuple[FloatArray, IntArray]:
    """Distances of the metric, +inf where faiss found nothing, and k columns."""
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


_FEWEST_QUERIES, _FEWEST_ROWS = 16, 8192
"""Below these it does not pay."""
_BLOCK_ROWS = 1024
_MOST_QUERIES = 256
_SPARE = 32
"""Proposed beyond the k wanted, so that the last of them lies clearly farther than the k-th and certifies it."""
_UNIT_ROUNDOFF = 2.0**-24


def scan_many(queries: FloatArray, vectors: FloatArray, k: int, metric: Metric) -> tuple[FloatArray, IntArray]:
    """What :func:`exact_scan` returns, sooner for many queries.

    |x|^2 + |y|^2 - 2xy cancels where vectors lie close together, so it only proposes. Its error is at most
    (d + 8) 2**-24 (|x|^2 + |y|^2) (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); a query whose k-th
    result does not lie nearer than the last proposal by twice that is scanned row by row.
    """
    nq, n = len(queries), len(vectors)
    if nq < _FEWEST_QUERIES or n < max(_FEWEST_ROWS, 4 * (k + _SPARE)):
        return exact_scan(queries, vectors, k, metric)
    distances, positions = padded(nq, k)
    for start in range(0, nq, _MOST_QUERIES):
        part = slice(start, start + _MOST_QUERIES)
        mine = queries[part]
        edge, candidates, largest = _proposed(mine, vectors, k + _SPARE, metric)
        distances[part], positions[part] = rerank_rows(mine, vectors, candidates, k, metric)
        doubtful = start + np.flatnonzero(~_certain(distances[part, -1], edge, mine, largest, metric))
        if doubtful.size:
            distances[doubtful], positions[doubtful] = exact_scan(queries[doubtful], vectors, k, metric)
    return distances, positions


def _proposed(
    queries: FloatArray, vectors: FloatArray, width: int, metric: Metric
) -> tuple[FloatArray, IntArray, float]:
    """The score of the last proposal of each query (nq,), the proposals (nq, width) in no order, and max |y|^2.

    The score is the squared distance; under inner product |x|^2 - 2xy, which orders rows like -xy.
    """
    faiss, nq = load_faiss(), len(queries)
    scores = np.empty((nq, _BLOCK_ROWS), np.float32)
    kept, candidates = np.empty((nq, width), np.float32), np.empty((nq, width), np.int64)
    largest = 0.0
    with translate_error("scanning many queries"):
        heap = _heap(faiss, kept, candidates)
        for start in range(0, len(vectors), _BLOCK_ROWS):
            block = vectors[start : start + _BLOCK_ROWS]
            out = scores.reshape(-1)[: nq * len(block)].reshape(nq, len(block))
            faiss.pairwise_L2sqr(
                block.shape[1], nq, faiss.swig_ptr(queries), len(block), faiss.swig_ptr(block), faiss.swig_ptr(out)
            )
            norms = np.einsum("ij,ij->i", block, block)  # the block is in the cache now
            largest = max(largest, float(norms.max()))
            if metric == "ip":
                out -= norms
            heap.addn(len(block), faiss.swig_ptr(out), start)
    return kept.max(axis=1), candidates, largest


def _heap(faiss: ModuleType, kept: FloatArray, candidates: IntArray) -> FaissObject:
    heap = faiss.float_maxheap_array_t()
    heap.nh, heap.k = kept.shape
    heap.val, heap.ids = faiss.swig_ptr(kept), faiss.swig_ptr(candidates)
    heap.heapify()
    return heap


def _certain(
    last: FloatArray, edge: FloatArray, queries: FloatArray, largest: float, metric: Metric
) -> npt.NDArray[np.bool_]:
    """For which queries no row that was not proposed can be among the k nearest; ``largest`` is max |y|^2."""
    own = np.einsum("ij,ij->i", queries, queries)
    error = (queries.shape[1] + 8) * _UNIT_ROUNDOFF * (own + largest)
    scores = last if metric == "l2" else 2.0 * last if metric == "cosine" else own + 2.0 * last
    certain: npt.NDArray[np.bool_] = scores + 2.0 * error < edge
    return certain
