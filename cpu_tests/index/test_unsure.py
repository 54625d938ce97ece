"""Queries that are unlike the vectors take more candidates, and only they."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracle import clustered, fitted, rows_of

from memevolve_gpu.index import ivf
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.fastscan import unsure
from memevolve_gpu.index.registry import build
from memevolve_gpu.training.calibration import Calibration, Entry, calibrate
from memevolve_gpu.training.recall import recall_of
from memevolve_gpu.types import FloatArray, IndexPlan, SearchParams

SEED, DIM, ROWS, K = 20261129, 64, 60_000, 10
PARAMS = SearchParams(nprobe=40, rerank=30)


@pytest.fixture(scope="module", params=["two_stage", "ivf", "lists"])
def index(request: pytest.FixtureRequest) -> Index:
    vectors = clustered(np.random.default_rng(SEED), ROWS, DIM, "cosine")
    plan = IndexPlan("two_stage") if request.param == "two_stage" else IndexPlan("ivf", 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ivf, "WHOLE_ROWS", 0 if request.param == "lists" else 10**9)
        return build(plan, rows_of(vectors), "cosine", seed=SEED)


def foreign(count: int) -> FloatArray:
    """Differences of queries like the data: where it varies, but near none of its clusters."""
    base = clustered(np.random.default_rng(SEED + 1), 2 * count, DIM, "cosine")
    return fitted(base[:count] - base[count:], "cosine")


def first_candidates(index: Index, queries: FloatArray) -> float:
    """Recall of the first candidates alone."""
    found = index.candidates(queries, PARAMS.rerank)
    assert found is not None
    distances = np.sort(1 - np.einsum("qd,qrd->qr", queries, index.vectors_at(found.ravel()).reshape(*found.shape, -1)))
    return recall_of(distances[:, :K].astype(np.float32), index.search(queries, K, SearchParams(exact=True))[0])


def recall(index: Index, queries: FloatArray, row_filter: RowFilter | None = None) -> float:
    truth = index.search(queries, K, SearchParams(exact=True), row_filter)[0]
    batch = recall_of(index.search(queries, K, PARAMS, row_filter)[0], truth)
    alone = [index.search(queries[at : at + 1], K, PARAMS, row_filter)[0] for at in range(len(queries))]
    assert recall_of(np.concatenate(alone), truth) == pytest.approx(batch, abs=0.01), "alone as in a batch"
    return batch


def test_foreign_queries_find_more_than_their_first_candidates_hold(index: Index) -> None:
    queries = foreign(100)
    found = recall(index, queries)
    print(found)
    assert found >= 0.95
    if not index.reads_lists:
        assert first_candidates(index, queries) < found - 0.03


def test_the_same_under_a_filter(index: Index) -> None:
    allowed = RowFilter(np.arange(ROWS) % 2 == 0)
    assert recall(index, foreign(50), allowed) >= 0.95


def test_who_is_unsure() -> None:
    candidates = np.arange(40, dtype=np.int64).reshape(2, 20)
    early, late = np.arange(10, dtype=np.int64), np.arange(29, 39, dtype=np.int64)
    assert unsure(candidates, np.stack([early, late]), 10) == [1]
    assert unsure(candidates[:1], np.append(early[:9], 19)[None], 10) == [], "a tenth is not more than a tenth"
    assert unsure(candidates[:1], np.append(early[:8], [18, 19])[None], 10) == [0]
    many = np.arange(200, dtype=np.int64)[None]
    assert unsure(many, np.append(early[:9], 100)[None], 10) == [0], "of many candidates one late result is enough"
    assert unsure(many, np.append(early[:9], 99)[None], 10) == []
    ended = candidates.copy()
    ended[1, -1] = -1
    assert unsure(ended, np.stack([early, late]), 10) == [], "there are no more candidates"


@pytest.mark.slow
def test_a_calibration_that_is_carried_on_grows_with_the_rows(index: Index) -> None:
    held = calibrate(index, seed=SEED)
    grown = held.grown_to(2 * ROWS).grown_to(ROWS)
    assert grown.rows == ROWS
    assert held.grown_to(ROWS // 2) == replace(held, rows=ROWS // 2), "fewer rows take no fewer candidates"
    entries = (Entry(10, 0.95, SearchParams(rerank=150), 1.0, 1.0),)
    small = Calibration("two_stage", 800, 0, "held-out", 9, 0.1, entries, 800)
    assert small.grown_to(1000).search_params(10, 0.95) == SearchParams(rerank=188)
