"""Held-out queries made of stored vectors."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import METRICS, clustered, index_of
from support import SEED

from memevolve_gpu.index.base import Index
from memevolve_gpu.training.calibration import perturbed
from memevolve_gpu.training.recall import EvalQueries, RecallEvaluator
from memevolve_gpu.types import Metric, SearchParams


def stored(metric: Metric, n: int = 1500, kind: str = "exact") -> Index:
    return index_of(kind, clustered(np.random.default_rng(SEED), n, 48, metric), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_no_spread_gives_the_vectors_themselves(metric: Metric) -> None:
    index = stored(metric)
    queries, source = perturbed(index, 64, 0.0, np.random.default_rng(SEED))
    np.testing.assert_allclose(queries, index.vectors_at(source), atol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_the_queries_vary_as_the_data_does(spread: float) -> None:
    index = stored("l2")
    queries, _ = perturbed(index, 1000, spread, np.random.default_rng(SEED))
    own, theirs = np.var(index.vectors, axis=0).sum(), np.var(queries, axis=0).sum()
    assert theirs == pytest.approx(own, rel=0.15)
    along = np.linalg.eigh(np.cov(index.vectors.T))[1][:, -12:]
    share = np.var(queries @ along, axis=0).sum() / theirs
    assert share > 0.9, "moves stay in the directions in which the data varies"


def test_more_spread_leads_further_from_the_stored_vectors() -> None:
    index = stored("cosine")
    far = []
    for spread in (0.0, 1.0, 2.0):
        queries, source = perturbed(index, 200, spread, np.random.default_rng(SEED))
        far.append(float(np.linalg.norm(queries - index.vectors_at(source), axis=1).mean()))
    assert far[0] < far[1] < far[2]


def test_under_cosine_they_have_unit_length() -> None:
    queries, _ = perturbed(stored("cosine"), 100, 2.0, np.random.default_rng(SEED))
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1.0, atol=1e-5)


def test_identical_rows_are_no_obstacle() -> None:
    index = index_of("exact", np.ones((40, 8), np.float32), "l2")
    queries, _ = perturbed(index, 100, 2.0, np.random.default_rng(SEED))
    assert queries.shape == (100, 8)
    np.testing.assert_allclose(queries, 1.0, atol=1e-6)


def test_the_row_that_a_query_was_made_of_does_not_count() -> None:
    index = stored("l2", 300)
    queries, source = perturbed(index, 20, 0.0, np.random.default_rng(SEED))
    evaluator = RecallEvaluator(index, EvalQueries(queries, np.zeros(20, np.int64), source), (1, 5))
    plain = index.search(queries, 6, SearchParams(exact=True))[0]
    np.testing.assert_allclose(evaluator.truth, plain[:, 1:], atol=1e-4)
