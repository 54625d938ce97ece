"""Data that trips indexes: duplicates, zeros, outliers, an offset, and narrow precisions."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import EVERY_KIND, KINDS, check_answer, clustered, index_of, nearest, pairs, recall

from memevolve_gpu.errors import EngineError
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.types import FloatArray, Metric, Precision, SearchParams


def few_distinct(rng: np.random.Generator, n: int, dim: int, distinct: int, metric: Metric) -> FloatArray:
    return np.ascontiguousarray(clustered(rng, distinct, dim, metric)[rng.integers(distinct, size=n)])


@pytest.mark.parametrize(("kind", "metric"), [*pairs(EVERY_KIND), *pairs(EVERY_KIND, 1)])
def test_fewer_distinct_vectors_than_lists(kind: str, metric: Metric, rng: np.random.Generator) -> None:
    for distinct in (1, 2, 7, 20):
        vectors = few_distinct(rng, 2000, 32, distinct, metric)
        index = index_of(kind, vectors, metric)
        queries = vectors[:10]
        answer = index.search(queries, 10, SearchParams())
        check_answer(index, queries, vectors, answer)
        assert (answer[1] >= 0).all(), distinct
        if metric != "ip":
            assert recall(answer[0], nearest(queries, vectors, metric, 1)) == 1.0, "an equal vector comes first"


@pytest.mark.parametrize(("kind", "metric"), [(kind, ("l2", "ip")[i % 2]) for i, kind in enumerate(EVERY_KIND)])
def test_zero_vectors(kind: str, metric: Metric, rng: np.random.Generator) -> None:
    for zeros in (750, 1500):
        vectors = clustered(rng, 1500, 24, metric)
        vectors[:zeros] = 0
        index = index_of(kind, vectors, metric)
        queries = np.concatenate((vectors[:2], clustered(rng, 5, 24, metric)))
        answer = index.search(queries, 10, SearchParams())
        check_answer(index, queries, vectors, answer)
        assert (answer[1] >= 0).all(), zeros


@pytest.mark.parametrize("kind", ["two_stage", "ivf", "torch-exact", "torch-ivf"])
def test_one_outlier_does_not_set_the_scale(kind: str, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 3000, 64, "l2")
    vectors[1234] *= 10_000
    index = index_of(kind, vectors, "l2")
    queries = clustered(rng, 100, 64, "l2")
    params = SearchParams(rerank=60)
    assert recall(index.search(queries, 10, params)[0], nearest(queries, vectors, "l2", 10)) >= 0.98
    assert index.search(vectors[1234:1235], 1, params)[1].tolist() == [[1234]]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_vectors_far_from_the_origin(kind: str, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 2000, 32, "l2") + np.float32(100)
    index = index_of(kind, vectors, "l2")
    queries = vectors[rng.integers(2000, size=30)] + rng.standard_normal((30, 32)).astype(np.float32)
    for params in (SearchParams(), SearchParams(exact=True)):
        answer = index.search(queries, 10, params)
        check_answer(index, queries, vectors, answer, tolerance=1e-3)
        assert recall(answer[0], nearest(queries, vectors, "l2", 10)) >= 0.98


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_very_large_and_very_small_vectors(kind: str, rng: np.random.Generator) -> None:
    for scale in (1e-6, 1e6):
        vectors = clustered(rng, 1500, 24, "l2") * np.float32(scale)
        index = index_of(kind, vectors, "l2")
        answer = index.search(vectors[:20], 5, SearchParams())
        truth = nearest(vectors[:20], vectors, "l2", 5)
        np.testing.assert_allclose(answer[0] / scale**2, truth / scale**2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize(("kind", "metric"), pairs(["torch-exact", "torch-ivf"]))
def test_float32_decides_beside_narrow_precisions(
    kind: str, metric: Metric, precision: Precision, rng: np.random.Generator
) -> None:
    vectors, queries = clustered(rng, 1500, 48, metric), clustered(rng, 20, 48, metric)
    index = index_of(kind, vectors, metric, precision)
    assert index.plan.precision == precision
    for mask in (None, RowFilter(rng.random(1500) < 0.5), RowFilter(rng.random(1500) < 0.005)):
        for params in (SearchParams(), SearchParams(exact=True)):
            answer = index.search(queries, 5, params, mask)
            check_answer(index, queries, vectors, answer, mask)
            truth = nearest(queries, vectors, metric, 5, mask)
            assert recall(answer[0], truth) >= (1.0 if params.exact else 0.98)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cpu_searches_float32_alone(kind: str, rng: np.random.Generator) -> None:
    with pytest.raises(EngineError, match="float32"):
        index_of(kind, clustered(rng, 100, 8, "l2"), "l2", "int8")
