"""The index contract for the faiss indexes on a GPU: the same tests, on the stand-in."""

from __future__ import annotations

import numpy as np
import pytest
from fake_faiss_gpu import Card
from index.test_index_contract import (
    DIM,
    Case,
    N,
    index_preferred,
    test_a_stored_vector_finds_itself,
    test_bad_arguments_are_named,
    test_batch_answers_as_single_queries_do,
    test_default_effort_reaches_the_usual_target,
    test_exact_effort_is_exact,
    test_exact_effort_is_exact_where_little_effort_is_not,
    test_finds_the_nearest_with_their_exact_distances,
    test_index_answers_without_reading_every_vector,
    test_mask_that_allows_only_what_lies_far_away,
    test_mask_that_starves_the_index,
    test_masks_are_obeyed_and_lose_nothing,
    test_masks_are_obeyed_inside_the_index,
    test_masks_that_leave_few_or_nearly_all,
    test_more_results_than_rows,
    test_no_queries_no_results,
    test_slot_table,
    test_threads_search_one_body_at_the_same_time,
)
from oracle import check_answer, clustered, contents, fitted, nearest, pairs, parametrize_case, recall, rows_of

from memevolve_gpu.index.base import Index
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.registry import build, from_parts
from memevolve_gpu.types import FloatArray, IndexPlan, Metric, Precision, SearchParams

__all__ = [
    "index_preferred",
    "test_a_stored_vector_finds_itself",
    "test_bad_arguments_are_named",
    "test_batch_answers_as_single_queries_do",
    "test_default_effort_reaches_the_usual_target",
    "test_exact_effort_is_exact",
    "test_exact_effort_is_exact_where_little_effort_is_not",
    "test_finds_the_nearest_with_their_exact_distances",
    "test_index_answers_without_reading_every_vector",
    "test_mask_that_allows_only_what_lies_far_away",
    "test_mask_that_starves_the_index",
    "test_masks_are_obeyed_and_lose_nothing",
    "test_masks_are_obeyed_inside_the_index",
    "test_masks_that_leave_few_or_nearly_all",
    "test_more_results_than_rows",
    "test_no_queries_no_results",
    "test_slot_table",
    "test_threads_search_one_body_at_the_same_time",
]

KINDS = ("exact", "ivf")


def plan_of(kind: str, n: int, precision: Precision = "float32") -> IndexPlan:
    nlist = max(1, min(32, n // 20)) if kind == "ivf" else 0
    return IndexPlan(kind, nlist=nlist, precision=precision, engine="faiss", device="cuda:0")  # type: ignore[arg-type]


def index_of(kind: str, vectors: FloatArray, metric: Metric, precision: Precision = "float32", seed: int = 7) -> Index:
    return build(plan_of(kind, len(vectors), precision), rows_of(vectors), metric, seed=seed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_case(metafunc, KINDS)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, shared_card: Card) -> Case:
    """As for the indexes of the CPU: 4,000 clustered vectors, and 40 queries of which half are far from the data."""
    kind, metric = request.param
    rng = np.random.default_rng(11)
    vectors = clustered(rng, N, DIM, metric)
    noise = 0.2 * vectors.std() * rng.standard_normal((40, DIM))
    inside, outside = vectors[rng.integers(N, size=20)], -vectors[rng.integers(N, size=20)]
    queries = fitted((np.concatenate((inside, outside)) + noise).astype(np.float32), metric)
    return index_of(kind, vectors, metric), vectors, queries


@pytest.mark.parametrize(("kind", "metric"), pairs(KINDS))
def test_odd_dimensions(kind: str, metric: Metric, card: Card, rng: np.random.Generator) -> None:
    for dim in (1, 3, 33, 384):
        vectors, queries = clustered(rng, 400, dim, metric), clustered(rng, 8, dim, metric)
        index = index_of(kind, vectors, metric)
        for params in (SearchParams(), SearchParams(exact=True)):
            answer = index.search(queries, 5, params)
            check_answer(index, queries, vectors, answer)
            assert recall(answer[0], nearest(queries, vectors, metric, 5)) >= 0.9, dim


@pytest.mark.parametrize(("kind", "metric"), pairs(KINDS, 1))
@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 0.01), ("int8", 0.05)])
def test_narrow_precisions_stay_within_their_error(
    kind: str, metric: Metric, precision: Precision, tolerance: float, card: Card, rng: np.random.Generator
) -> None:
    vectors, queries = clustered(rng, 1500, 48, metric), clustered(rng, 20, 48, metric)
    index = index_of(kind, vectors, metric, precision)
    assert index.plan.precision == precision
    for mask in (None, RowFilter(rng.random(1500) < 0.5), RowFilter(rng.random(1500) < 0.005)):
        for params in (SearchParams(), SearchParams(exact=True)):
            answer = index.search(queries, 5, params, mask)
            check_answer(index, queries, vectors, answer, mask, tolerance=tolerance)
            assert recall(answer[0], nearest(queries, vectors, metric, 5, mask), tolerance) >= 0.98


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_vectors_of_any_size(kind: str, precision: Precision, card: Card, rng: np.random.Generator) -> None:
    for scale in (1e-7, 1.0, 1e6):
        vectors = clustered(rng, 1500, 24, "l2") * np.float32(scale)
        index = index_of(kind, vectors, "l2", precision)
        distances, positions = index.search(vectors[:20], 5, SearchParams())
        truth = nearest(vectors[:20], vectors, "l2", 5)
        loose = 1e-3 if index.plan.precision == "float32" else 0.3
        np.testing.assert_allclose(distances / scale**2, truth / scale**2, rtol=loose, atol=loose)
        assert (positions[:, 0] == np.arange(20)).all(), scale


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_far_from_the_origin(kind: str, card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 2000, 32, "l2") + np.float32(100)
    index = index_of(kind, vectors, "l2")
    queries = vectors[rng.integers(2000, size=30)] + rng.standard_normal((30, 32)).astype(np.float32)
    answer = index.search(queries, 10, SearchParams())
    check_answer(index, queries, vectors, answer, tolerance=1e-3)
    assert recall(answer[0], nearest(queries, vectors, "l2", 10)) >= 0.98


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_make_the_same_body_again(kind: str, precision: Precision, card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 900, 24, "cosine")
    index = index_of(kind, vectors, "cosine", precision)
    parts = {name: array.copy() for name, array in contents(index).items()}
    again = from_parts(index.plan, "cosine", parts)
    first, second = index.search(vectors[:40], 5, SearchParams()), again.search(vectors[:40], 5, SearchParams())
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert again.list_sizes == index.list_sizes
    assert again.device_bytes == index.device_bytes


def test_same_seed_same_lists(card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 900, 24, "l2")
    one, same, other = [contents(index_of("ivf", vectors, "l2", seed=seed)) for seed in (7, 7, 8)]
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["faiss"], other["faiss"])


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_trained_lists_are_taken_over(precision: Precision, card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 900, 16, "l2")
    first = index_of("ivf", vectors, "l2")
    plan = IndexPlan("ivf", nlist=first.nlist, precision=precision, engine="faiss", device="cuda:0")
    fewer = np.ascontiguousarray(vectors[100:])
    again = build(plan, rows_of(fewer), "l2", seed=1, reuse_from=first)
    answer = again.search(vectors[:50], 10, SearchParams())
    check_answer(again, vectors[:50], fewer, answer, tolerance=2e-4 if precision == "float32" else 0.05)
    assert first.search(vectors[:50], 1, SearchParams())[1][:, 0].tolist() == list(range(50)), "the first is untouched"


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_distinct_vectors_than_lists(kind: str, card: Card, rng: np.random.Generator) -> None:
    for distinct in (1, 2, 7):
        vectors = np.ascontiguousarray(clustered(rng, distinct, 32, "l2")[rng.integers(distinct, size=2000)])
        answer = index_of(kind, vectors, "l2").search(vectors[:10], 10, SearchParams())
        assert (answer[0] == 0).all(), distinct
        assert (answer[1] >= 0).all(), distinct


def test_one_row_and_none(card: Card, rng: np.random.Generator) -> None:
    one = clustered(rng, 1, 5, "l2")
    assert index_of("exact", one, "l2").search(one, 3, SearchParams())[1].tolist() == [[0, -1, -1]]
    empty = index_of("exact", one[:0], "l2")
    assert empty.search(one, 2, SearchParams())[1].tolist() == [[-1, -1]]
    assert (empty.device, empty.device_bytes) == ("cpu", 0)
