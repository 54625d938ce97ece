"""What every index promises, for pairs of kind and metric, against answers computed in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
from oracle import (
    EVERY_KIND,
    WAYS,
    all_distances,
    check_answer,
    clustered,
    contents,
    fitted,
    index_of,
    nearest,
    pairs,
    parametrize_case,
    plan_of,
    recall,
    rows_of,
)

from memevolve_gpu.errors import EngineError
from memevolve_gpu.index import costs, hnsw, ivf
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.registry import build
from memevolve_gpu.types import FloatArray, IndexPlan, Metric, SearchParams

N, DIM = 4000, 96
TRY = SearchParams(nprobe=24, rerank=100, ef=64)


@pytest.fixture
def index_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make plain scans look dear, so that small test data reaches the code that large data reaches by itself."""
    monkeypatch.setattr(costs, "SCANNED_FLOAT", 1e9)
    monkeypatch.setattr(hnsw, "HNSW_ROWS_PER_BEAM", 0)


Case = tuple[Index, FloatArray, FloatArray]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_case(metafunc, WAYS)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """An index over 4,000 clustered vectors, the vectors, and 40 queries of which half are far from the data."""
    kind, metric = request.param
    rng = np.random.default_rng(11)
    vectors = clustered(rng, N, DIM, metric)
    noise = 0.2 * vectors.std() * rng.standard_normal((40, DIM))
    inside, outside = vectors[rng.integers(N, size=20)], -vectors[rng.integers(N, size=20)]
    queries = fitted((np.concatenate((inside, outside)) + noise).astype(np.float32), metric)
    return index_of(kind, vectors, metric), vectors, queries


def test_finds_the_nearest_with_their_exact_distances(case: Case) -> None:
    index, vectors, queries = case
    for k in (1, 10, 100):
        answer = index.search(queries, k, TRY)
        check_answer(index, queries, vectors, answer)
        assert answer[0].shape == (len(queries), k)
        assert recall(answer[0], nearest(queries, vectors, index.metric, k)) >= 0.97, k


def test_default_effort_reaches_the_usual_target(case: Case) -> None:
    index, vectors, queries = case
    answer = index.search(queries, 10, SearchParams())
    assert recall(answer[0], nearest(queries, vectors, index.metric, 10)) >= 0.99


def test_exact_effort_is_exact(case: Case) -> None:
    index, vectors, queries = case
    answer = index.search(queries, 10, SearchParams(exact=True))
    check_answer(index, queries, vectors, answer)
    assert recall(answer[0], nearest(queries, vectors, index.metric, 10)) == 1.0


def test_index_answers_without_reading_every_vector(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _, queries = case
    if index.kind != "exact":
        monkeypatch.setattr(type(index.table), "scan", None)
    assert (index.search(queries, 5, TRY)[1] >= 0).all()
    assert (index.search(queries, 5, TRY, RowFilter(np.arange(N) % 4 > 0))[1] >= 0).all()


@pytest.mark.usefixtures("index_preferred")
def test_masks_are_obeyed_inside_the_index(case: Case, rng: np.random.Generator) -> None:
    index, vectors, queries = case
    for share in (0.9, 1 / 3):
        row_filter = RowFilter(rng.random(N) < share)
        answer = index.search(queries, 10, TRY, row_filter)
        check_answer(index, queries, vectors, answer, row_filter)
        assert recall(answer[0], nearest(queries, vectors, index.metric, 10, row_filter)) >= 0.97, share


@pytest.mark.usefixtures("index_preferred")
def test_mask_that_starves_the_index(case: Case) -> None:
    """Only rows far from the query pass and the search tries little, yet it returns k rows."""
    index, vectors, queries = case
    for query, share in product(queries[::8], (0.6, 0.2, 0.01)):
        one = query[None]
        distances = all_distances(one, vectors, index.metric)[0]
        row_filter = RowFilter(distances > np.quantile(distances, 1 - share))
        answer = index.search(one, 10, SearchParams(nprobe=1, rerank=40, ef=1), row_filter)
        check_answer(index, one, vectors, answer, row_filter)
        assert (answer[1] >= 0).all(), share
        if index.kind == "two_stage":
            assert recall(answer[0], nearest(one, vectors, index.metric, 10, row_filter)) >= 0.8, share


@pytest.mark.usefixtures("index_preferred")
def test_exact_effort_is_exact_where_little_effort_is_not(case: Case) -> None:
    index, vectors, queries = case
    truth = nearest(queries, vectors, index.metric, 10)
    found = {exact: index.search(queries, 10, SearchParams(1, 1, 1, exact))[0] for exact in (True, False)}
    assert recall(found[True], truth) == 1.0
    assert (recall(found[False], truth) == 1.0) == (index.kind == "exact")


def test_masks_are_obeyed_and_lose_nothing(case: Case, rng: np.random.Generator) -> None:
    index, vectors, queries = case
    for share in (0.9, 1 / 3, 0.05, 0.01):
        row_filter = RowFilter(rng.random(N) < share)
        answer = index.search(queries, 10, TRY, row_filter)
        check_answer(index, queries, vectors, answer, row_filter)
        assert recall(answer[0], nearest(queries, vectors, index.metric, 10, row_filter)) >= 0.97, share


def test_masks_that_leave_few_or_nearly_all(case: Case, rng: np.random.Generator) -> None:
    index, vectors, queries = case
    for count in (0, 1, 3, 9, 10, 11, N - 1, N):
        mask = np.zeros(N, np.bool_)
        mask[rng.choice(N, count, replace=False)] = True
        row_filter = RowFilter(mask)
        answer = index.search(queries, 10, TRY, row_filter)
        check_answer(index, queries, vectors, answer, row_filter)
        assert ((answer[1] >= 0).sum(axis=1) == min(10, count)).all(), count


def test_mask_that_allows_only_what_lies_far_away(case: Case) -> None:
    index, vectors, queries = case
    for query, share in product(queries[::10], (0.3, 0.1, 0.02)):
        one = query[None]
        distances = all_distances(one, vectors, index.metric)[0]
        row_filter = RowFilter(distances > np.quantile(distances, 1 - share))
        answer = index.search(one, 10, TRY, row_filter)
        check_answer(index, one, vectors, answer, row_filter)
        assert (answer[1] >= 0).all(), share
        assert recall(answer[0], nearest(one, vectors, index.metric, 10, row_filter)) >= 0.9, share


def test_more_results_than_rows(case: Case) -> None:
    index, vectors, queries = case
    answer = index.search(queries[:3], N + 50, TRY)
    check_answer(index, queries[:3], vectors, answer)
    assert ((answer[1] >= 0).sum(axis=1) == N).all()


def test_batch_answers_as_single_queries_do(case: Case, rng: np.random.Generator) -> None:
    index, _, queries = case
    for row_filter in (None, RowFilter(rng.random(N) < 0.5)):
        batch = index.search(queries, 10, TRY, row_filter)
        single = [index.search(query[None], 10, TRY, row_filter) for query in queries]
        np.testing.assert_allclose(batch[0], np.concatenate([d for d, _ in single]), rtol=1e-5, atol=1e-6)
        assert np.array_equal(np.sort(batch[1]), np.sort(np.concatenate([p for _, p in single])))


def test_no_queries_no_results(case: Case) -> None:
    index, _, queries = case
    distances, positions = index.search(queries[:0], 4, TRY)
    assert distances.shape == positions.shape == (0, 4)


def test_a_stored_vector_finds_itself(case: Case) -> None:
    index, vectors, _ = case
    distances, positions = index.search(vectors[:50], 1, TRY)
    if index.metric == "ip":  # a vector need not be its own largest dot product
        assert (distances[:, 0] <= -(vectors[:50] ** 2).sum(axis=1) * 0.9999).all()
        return
    assert positions[:, 0].tolist() == list(range(50))
    assert (distances == 0).all() if index.metric == "l2" else (distances < 1e-6).all()


def test_threads_search_one_body_at_the_same_time(case: Case, rng: np.random.Generator) -> None:
    index, _, queries = case
    row_filter = RowFilter(rng.random(N) < 0.4)
    jobs = [
        (query[None], mask, params)
        for query in queries
        for mask in (None, row_filter)
        for params in (TRY, SearchParams())
    ]
    expected = [index.search(query, 10, params, mask) for query, mask, params in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            got = pool.map(lambda job: index.search(job[0], 10, job[2], job[1]), jobs)
            for (distances, positions), (own_distances, own_positions) in zip(expected, got, strict=True):
                assert np.array_equal(positions, own_positions)
                assert np.array_equal(distances, own_distances)


def test_slot_table(case: Case) -> None:
    index, vectors, _ = case
    assert index.n == N
    assert index.ids_at(np.array([0, -1, 3999, 17])) == ["unit-é-0", None, "unit-é-3999", "unit-é-17"]
    assert index.position_of(np.array([10, 11, 13, 9, 10 + 3 * 3999, 10**9])).tolist() == [0, -1, 1, -1, 3999, -1]
    assert np.array_equal(index.vectors_at(np.array([5, 2, 5])), vectors[[5, 2, 5]])
    assert np.array_equal(index.vectors, vectors)
    assert index.nlist == (32 if index.kind == "ivf" else 0)


def test_same_seed_same_body(case: Case) -> None:
    index, vectors, _ = case
    whole = 0 if index.reads_lists else costs.WHOLE_ROWS
    with patch.object(ivf, "WHOLE_ROWS", whole):
        again, other = (build(index.plan, rows_of(vectors), index.metric, seed=seed) for seed in (7, 8))
    for name, array in contents(index).items():
        assert np.array_equal(array, contents(again)[name]), name
    if index.kind in {"two_stage", "ivf"}:
        trained = "faiss" if "faiss" in index.parts() else "centroids"
        assert not np.array_equal(contents(index)[trained], contents(other)[trained]), "the seed decides"


def test_bad_arguments_are_named(case: Case) -> None:
    index, _, queries = case
    with pytest.raises(ValueError, match="k at least 1"):
        index.search(queries, 0, TRY)
    with pytest.raises(ValueError, match="queries must be"):
        index.search(queries[:, :5], 3, TRY)
    with pytest.raises(ValueError, match="row_filter covers 3 rows"):
        index.search(queries, 3, TRY, RowFilter(np.ones(3, np.bool_)))


@pytest.mark.parametrize(("kind", "metric"), pairs(EVERY_KIND))
def test_odd_dimensions(kind: str, metric: Metric, rng: np.random.Generator) -> None:
    for dim in (1, 2, 3, 7, 8, 33, 384):
        vectors = clustered(rng, 400, dim, metric)
        queries = clustered(rng, 8, dim, metric)
        index = index_of(kind, vectors, metric)
        for params in (SearchParams(), SearchParams(exact=True)):
            answer = index.search(queries, 5, params)
            check_answer(index, queries, vectors, answer)
            assert recall(answer[0], nearest(queries, vectors, metric, 5)) >= 0.9, dim


@pytest.mark.parametrize(("kind", "metric"), pairs(EVERY_KIND, 1))
def test_few_rows(kind: str, metric: Metric, rng: np.random.Generator) -> None:
    for n in (16, 17, 31, 33):
        vectors = clustered(rng, n, 12, metric)
        index = index_of(kind, vectors, metric)
        answer = index.search(vectors, 40, SearchParams(nprobe=1, rerank=1, ef=1))
        check_answer(index, vectors, vectors, answer)
        assert ((answer[1] >= 0).sum(axis=1) == n).all(), n


@pytest.mark.parametrize(("kind", "metric"), pairs(["exact", "hnsw", "torch-exact"], 2))
def test_one_row_and_none(kind: str, metric: Metric, rng: np.random.Generator) -> None:
    one = clustered(rng, 1, 5, metric)
    distances, positions = index_of(kind, one, metric).search(one, 3, SearchParams())
    assert positions.tolist() == [[0, -1, -1]]
    assert np.isposinf(distances[0, 1:]).all()
    empty = index_of(kind, one[:0], metric)
    assert empty.search(one, 2, SearchParams())[1].tolist() == [[-1, -1]]
    assert empty.position_of(np.array([10])).tolist() == [-1]


@pytest.mark.parametrize("kind", ["two_stage", "ivf", "torch-ivf"])
def test_too_few_rows_to_train_are_refused(kind: str, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 15, 8, "l2")
    with pytest.raises(EngineError, match="exact index"):
        build(replace(plan_of(kind, vectors), nlist=4), rows_of(vectors), "l2", seed=1)


@pytest.mark.parametrize("kind", ["ivf", "torch-ivf"])
@pytest.mark.parametrize("nlist", [0, 601])
def test_lists_that_cannot_be_are_refused(kind: str, nlist: int, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 600, 8, "l2")
    with pytest.raises(EngineError, match="nlist"):
        build(replace(plan_of(kind, vectors), nlist=nlist), rows_of(vectors), "l2", seed=1)


def test_plans_and_rows_that_make_no_sense_are_refused(rng: np.random.Generator) -> None:
    rows = rows_of(clustered(rng, 20, 8, "l2"))
    with pytest.raises(EngineError, match=r"plan\.kind 'cagra' is unknown"):
        build(IndexPlan("cagra"), rows, "l2", seed=1)  # type: ignore[arg-type]
    short = type(rows)(rows.slots[:3], rows.id_bytes, rows.id_ends, rows.vectors)
    with pytest.raises(EngineError, match="3 slots, 20 ids, 20 vectors"):
        build(IndexPlan("exact"), short, "l2", seed=1)
    wide = type(rows)(rows.slots, rows.id_bytes, rows.id_ends, rows.vectors.astype(np.float64))
    with pytest.raises(EngineError, match="float64"):
        build(IndexPlan("exact"), wide, "l2", seed=1)


def test_training_rows_may_be_given(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 500, 16, "l2")
    plan = plan_of("ivf", vectors)
    with pytest.raises(EngineError, match="15"):
        build(plan, rows_of(vectors), "l2", seed=1, training=vectors[:15])
    index = build(plan, rows_of(vectors), "l2", seed=1, training=clustered(rng, 900, 16, "l2"))
    assert recall(index.search(vectors, 10, SearchParams())[0], nearest(vectors, vectors, "l2", 10)) >= 0.99


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_trained_quantisers_are_taken_over(kind: str, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 900, 16, "l2")
    plan = plan_of(kind, vectors)
    first = build(plan, rows_of(vectors), "l2", seed=1)
    fewer = np.ascontiguousarray(vectors[100:])
    stages: list[str] = []
    again = build(plan, rows_of(fewer), "l2", seed=1, reuse_from=first, progress=lambda stage, _: stages.append(stage))
    assert "train" not in stages
    answer = again.search(vectors[:50], 10, SearchParams())
    check_answer(again, vectors[:50], fewer, answer)
    assert recall(answer[0], nearest(vectors[:50], fewer, "l2", 10)) >= 0.98
    assert first.search(vectors[:50], 1, SearchParams())[1][:, 0].tolist() == list(range(50)), "the first is untouched"


def test_quantisers_trained_for_something_else_are_refused(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 900, 16, "l2")
    plan = plan_of("ivf", vectors)
    others = [
        index_of("two_stage", vectors, "l2"),
        index_of("ivf", vectors, "ip"),
        index_of("ivf", clustered(rng, 900, 12, "l2"), "l2"),
        build(IndexPlan("ivf", nlist=8), rows_of(vectors), "l2", seed=1),
        build(IndexPlan("ivf", nlist=plan.nlist, codes=8), rows_of(vectors), "l2", seed=1),
    ]
    for other in others:
        with pytest.raises(EngineError, match="reuse_from was trained for"):
            build(plan, rows_of(vectors), "l2", seed=1, reuse_from=other)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_progress_is_reported_and_stderr_stays_quiet(
    kind: str, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, float]] = []
    vectors = clustered(rng, 50, 8, "l2")
    build(plan_of(kind, vectors), rows_of(vectors), "l2", seed=1, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("add", 1.0)
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
