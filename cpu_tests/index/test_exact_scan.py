"""Exact scans over plain memory, candidate reranking, masks, and the arithmetic around them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import METRICS, all_distances, clustered, fitted, nearest

from memevolve_gpu.errors import EngineError
from memevolve_gpu.index.base import chunks
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.exact_scan import exact_scan, rerank_rows, scan_many
from memevolve_gpu.index.faiss_support import load_faiss
from memevolve_gpu.index.sample import default_codes, padded_columns, padded_dim, training_sample
from memevolve_gpu.types import FloatArray, Metric


@pytest.mark.parametrize("metric", METRICS)
def test_scan_of_a_slice_of_a_larger_buffer(metric: Metric, rng: np.random.Generator) -> None:
    for nq in (1, 19, 20, 45):
        buffer = clustered(rng, 300, 20, metric)
        vectors, queries = buffer[40:140], clustered(rng, nq, 20, metric)
        distances, positions = exact_scan(queries, vectors, 7, metric)
        truth = all_distances(queries, vectors, metric)
        assert np.array_equal(positions, np.argsort(truth, axis=1)[:, :7]), nq
        np.testing.assert_allclose(distances, np.sort(truth, axis=1)[:, :7], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_scan_under_a_mask(metric: Metric, rng: np.random.Generator) -> None:
    vectors, queries = clustered(rng, 120, 9, metric), clustered(rng, 23, 9, metric)
    for k, share in product((1, 10, 150), (0.0, 0.02, 0.6, 1.0)):
        row_filter = RowFilter(rng.random(120) < share)
        distances, positions = exact_scan(queries, vectors, k, metric, row_filter)
        assert row_filter.rows[positions[positions >= 0]].all(), (k, share)
        assert ((positions >= 0).sum(axis=1) == min(k, row_filter.count)).all(), (k, share)
        np.testing.assert_allclose(distances, nearest(queries, vectors, metric, k, row_filter), rtol=1e-5, atol=1e-4)


def _far_away(vectors: FloatArray) -> FloatArray:
    moved: FloatArray = vectors + np.float32(1000)
    return moved


def _copies(vectors: FloatArray) -> FloatArray:
    return np.ascontiguousarray(np.repeat(vectors[::64], 64, axis=0))


def _one_outlier(vectors: FloatArray) -> FloatArray:
    return np.concatenate([vectors[:-1], vectors[-1:] * np.float32(1e4)])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [np.copy, _far_away, _copies, _one_outlier])
def test_many_queries_find_what_each_finds_alone(
    metric: Metric, shape: Callable[[FloatArray], FloatArray], rng: np.random.Generator
) -> None:
    """The matrix product behind it cancels on such data; what it cannot certify is scanned."""
    vectors = fitted(shape(clustered(rng, 9000, 24, metric)), metric)
    queries = np.concatenate([vectors[:200:10], vectors[-5:], clustered(rng, 20, 24, metric)])
    truth = all_distances(queries, vectors, metric)
    for k in (1, 10, 100):
        distances, positions = scan_many(queries, vectors, k, metric)
        assert np.array_equal(distances, exact_scan(queries, vectors, k, metric)[0]), k
        again = np.take_along_axis(truth, positions, axis=1)
        np.testing.assert_allclose(distances, again, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("nq", [1, 20, 100])
def test_equal_vectors_have_distance_zero_however_faiss_is_tuned(
    nq: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through |x|^2 + |y|^2 - 2xy, which this threshold asks for, they would not."""
    monkeypatch.setattr(load_faiss().cvar, "distance_compute_blas_threshold", 0)
    vectors = clustered(rng, 100, 384, "l2") + np.float32(1000)
    distances, positions = exact_scan(vectors[:nq], vectors, 5, "l2")
    assert (distances[:, 0] == 0).all()
    assert positions[:, 0].tolist() == list(range(nq))


def test_cosine_distances_are_never_negative(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 500, 384, "cosine")
    assert (exact_scan(vectors, vectors, 3, "cosine")[0] >= 0).all()


def test_nothing_to_scan() -> None:
    none, some = np.empty((0, 4), np.float32), np.ones((3, 4), np.float32)
    assert exact_scan(some, none, 2, "l2")[1].tolist() == [[-1, -1]] * 3
    assert exact_scan(none, some, 2, "l2")[1].shape == (0, 2)


@pytest.mark.parametrize("metric", METRICS)
def test_rerank_ends_at_the_first_gap(metric: Metric, rng: np.random.Generator) -> None:
    vectors, queries = clustered(rng, 50, 8, metric), clustered(rng, 3, 8, metric)
    candidates = np.array([[4, 9, 2, -1], [7, 7, 7, 7], [-1, -1, -1, -1]])
    distances, positions = rerank_rows(queries, vectors, candidates, 6, metric)
    truth = all_distances(queries, vectors, metric)
    assert positions[0].tolist() == [*sorted([4, 9, 2], key=lambda at: truth[0, at]), -1, -1, -1]
    assert positions[1].tolist() == [7, 7, 7, 7, -1, -1]
    assert np.isposinf(distances[2]).all()
    assert rerank_rows(queries, vectors, candidates[:, :0], 2, metric)[1].tolist() == [[-1, -1]] * 3


@example(mask=[True], probes=[-1])
@given(mask=st.lists(st.booleans(), max_size=70), probes=st.lists(st.integers(-1, 69), max_size=20))
def test_allowed_forms_agree(mask: list[bool], probes: list[int]) -> None:
    rows = np.array(mask, dtype=np.bool_)
    row_filter = RowFilter(rows)
    asked = np.array([probe for probe in probes if probe < len(mask)], dtype=np.int64)
    assert (row_filter.n, row_filter.count) == (len(mask), sum(mask))
    assert row_filter.test(asked).tolist() == [probe >= 0 and mask[probe] for probe in asked.tolist()]
    assert row_filter.positions.tolist() == [at for at, yes in enumerate(mask) if yes]
    bits = [bool(row_filter.packed[at >> 3] >> (at & 7) & 1) for at in range(len(mask))]
    assert bits == mask


def test_a_selector_outlives_the_mask_that_made_it() -> None:
    """Two threads may derive the same mask at once; the search of the one whose copy is dropped must not notice."""
    n = 2_000_000
    selector = RowFilter(np.arange(n) % 3 == 0).bitmap(load_faiss())
    gc.collect()
    others = [np.zeros(size, np.uint8) for size in (n // 8, n // 8, 8 * (n // 3 + 1), 8 * (n // 3 + 1))]
    assert [selector.is_member(row) for row in range(0, n, 9_973)] == [row % 3 == 0 for row in range(0, n, 9_973)]
    assert not any(other.any() for other in others)


@pytest.mark.parametrize("rows", [np.ones(3, np.int8), np.ones((2, 2), np.bool_)])
def test_masks_are_booleans_over_rows(rows: npt.NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match="rows must be bool"):
        RowFilter(rows)  # type: ignore[arg-type]


@given(nq=st.integers(0, 300), bytes_each=st.integers(0, 1 << 28))
def test_chunks_cover_every_query_once_within_scratch(nq: int, bytes_each: int) -> None:
    parts = list(chunks(nq, bytes_each))
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(nq))
    assert all((part.stop - part.start) * bytes_each <= 64 << 20 or part.stop - part.start == 1 for part in parts)


@given(dim=st.integers(1, 4096))
def test_codes_divide_the_padded_dimension(dim: int) -> None:
    codes = default_codes(dim)
    assert 1 <= codes <= dim
    assert padded_dim(dim, codes) % codes == 0
    assert dim <= padded_dim(dim, codes) < dim + codes


def test_padding_adds_zeros_and_copies_only_then(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 5, 7, "l2")
    assert padded_columns(vectors, 7) is vectors
    wide = padded_columns(vectors, 10)
    assert np.array_equal(wide[:, :7], vectors)
    assert not wide[:, 7:].any()


def test_sample_is_seeded_bounded_and_pulls_outliers_in(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 2000, 16, "l2")
    vectors[3] = 1e30
    before = vectors.copy()
    first, again, other = (training_sample(vectors, 500, seed) for seed in (1, 1, 2))
    assert first.shape == (500, 16)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    whole = training_sample(vectors, 5000, 1)
    assert np.isfinite(whole).all()
    usual = np.linalg.norm(vectors[4:] - np.median(vectors, axis=0), axis=1)
    assert np.linalg.norm(whole[3] - np.median(vectors, axis=0)) <= 5 * np.quantile(usual, 0.95)
    assert np.array_equal(np.delete(whole, 3, axis=0), np.delete(vectors, 3, axis=0))
    assert np.array_equal(vectors, before), "the rows themselves are left alone"


def test_sample_of_mostly_equal_rows_keeps_the_others() -> None:
    vectors = np.ones((40, 3), np.float32)
    vectors[39] = 5
    assert np.array_equal(training_sample(vectors, 100, 1), vectors)


def test_sample_needs_sixteen_rows(rng: np.random.Generator) -> None:
    with pytest.raises(EngineError, match="at least 16 vectors to train, got 15"):
        training_sample(clustered(rng, 15, 4, "l2"), 100, 1)
