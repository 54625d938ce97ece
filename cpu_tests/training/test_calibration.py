"""Does the effort that calibration finds keep its promise to questions that it has not seen?"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracle import METRICS, clustered, fitted, index_of, rows_of
from support import SEED

from memevolve_gpu.index import ivf
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.costs import scan_cost
from memevolve_gpu.index.registry import build
from memevolve_gpu.live.index_stats import IndexStats
from memevolve_gpu.training import search_param_sweep
from memevolve_gpu.training.calibration import (
    ENOUGH_REAL,
    KS,
    MIN_REAL,
    MOST_EVAL_QUERIES,
    TARGETS,
    Calibration,
    Entry,
    between,
    calibrate,
)
from memevolve_gpu.training.recall import recall_of, recalls_of
from memevolve_gpu.types import FloatArray, IndexPlan, Metric, SearchParams

ROWS, DIM = 5000, 96
TRIED = ("two_stage", "ivf", "hnsw")
INDEXES = [(kind, metric) for kind in TRIED for metric in METRICS if (kind, metric) != ("hnsw", "ip")]


def eval_queries(metric: Metric, count: int, seed: int = SEED + 1) -> FloatArray:
    return clustered(np.random.default_rng(seed), count, DIM, metric)


def elsewhere(count: int) -> FloatArray:
    """Questions in the directions in which the data varies, but nowhere near its clusters in particular."""
    base = eval_queries("l2", 2 * count, SEED + 3)
    return fitted(base[:count] - base[count:], "cosine")


def made(kind: str, metric: Metric = "cosine", rows: int = ROWS, nlist: int = 128) -> Index:
    vectors = clustered(np.random.default_rng(SEED), rows, DIM, metric)
    plan = IndexPlan(kind, nlist if kind == "ivf" else 0)  # type: ignore[arg-type]
    return build(plan, rows_of(vectors), metric, seed=SEED)


@pytest.fixture(scope="module")
def indexes() -> dict[tuple[str, Metric], Index]:
    return {
        (kind, metric): made(kind, metric) for kind in TRIED for metric in METRICS if (kind, metric) != ("hnsw", "ip")
    }


def recall_with(index: Index, asked: FloatArray, k: int, params: SearchParams) -> float:
    return recall_of(index.search(asked, k, params)[0], index.search(asked, k, SearchParams(exact=True))[0])


@pytest.mark.parametrize(("kind", "metric"), INDEXES)
def test_real_queries_get_what_was_promised(
    indexes: dict[tuple[str, Metric], Index], kind: str, metric: Metric
) -> None:
    index = indexes[kind, metric]
    found = calibrate(index, eval_queries(metric, ENOUGH_REAL), seed=SEED)
    assert found.source == "queries"
    unseen = eval_queries(metric, 400, SEED + 2)
    truth = index.search(unseen, 100, SearchParams(exact=True))[0]
    for k in (1, 10, 37, 100):
        assert found.search_params(k, 0.95) is not None
        for target in TARGETS:
            params = found.search_params(k, target)
            if params is not None:
                assert recall_of(index.search(unseen, k, params)[0], truth[:, :k]) >= target


@pytest.mark.parametrize("kind", TRIED)
def test_held_out_vectors_promise_enough_for_questions_near_and_far(
    indexes: dict[tuple[str, Metric], Index], kind: str
) -> None:
    index = indexes[kind, "cosine"]
    found = calibrate(index, seed=SEED)
    assert found.source == "held-out"
    near, far = eval_queries("cosine", 300, SEED + 2), elsewhere(300)
    for target in (0.9, 0.95, 0.99):
        params = found.search_params(10, target)
        assert params is not None
        assert recall_with(index, near, 10, params) >= target
        assert recall_with(index, far, 10, params) >= target


@pytest.fixture
def lists_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a store so large that codes lie in the lists, and scans are dear."""

    def dear(rows: int, dim: int) -> float:
        return scan_cost(rows, dim) * (1e6 if rows >= ROWS else 1.0)

    monkeypatch.setattr(ivf, "WHOLE_ROWS", 0)
    for module in (ivf, search_param_sweep):
        monkeypatch.setattr(module, "scan_cost", dear)


@pytest.mark.parametrize("asked", [None, "questions"])
def test_lists_are_probed_as_the_target_asks(lists_pay: None, asked: str | None) -> None:
    index = made("ivf", "l2")
    found = calibrate(index, eval_queries("l2", ENOUGH_REAL) if asked else None, seed=SEED)
    param_sets = [found.search_params(10, target) for target in TARGETS]
    probed = [params.nprobe for params in param_sets if params is not None]
    assert len(probed) == len(TARGETS)
    assert probed == sorted(probed)
    assert 0 < probed[0] < index.nlist / 2
    assert probed[0] < probed[-1]
    unseen = eval_queries("l2", 400, SEED + 2)
    for target, params in zip(TARGETS, param_sets, strict=True):
        assert params is not None
        assert recall_with(index, unseen, 10, params) >= target


def test_a_hard_half_is_not_hidden_by_an_easy_one() -> None:
    index = made("hnsw", rows=8000)
    easy = eval_queries("cosine", ENOUGH_REAL)
    noise = np.random.default_rng(SEED).standard_normal(easy.shape)
    hard = fitted(noise.astype(np.float32), "cosine")
    half = ENOUGH_REAL // 2
    mixed = calibrate(index, np.concatenate([easy[:half], hard[:half]]), seed=SEED).search_params(10, 0.95)
    alone = calibrate(index, easy, seed=SEED).search_params(10, 0.95)
    assert mixed is not None
    assert alone is not None
    assert recall_with(index, hard[half:], 10, mixed) >= 0.95 > recall_with(index, hard[half:], 10, alone)


@pytest.mark.parametrize("kind", ["two_stage", "ivf", "lists", "hnsw"])
def test_more_asked_never_takes_less(kind: str) -> None:
    """Up to the highest target of the table and beyond it; no field of the parameters falls, and no recall."""
    index = index_of(kind, clustered(np.random.default_rng(SEED), 6000, 32, "l2"), "l2")
    stats = IndexStats(calibration=calibrate(index, seed=SEED))
    queries = between(index, 200, np.random.default_rng(SEED + 1))[0]
    for k in (1, 10, 100):
        asked = [stats.search_params(index, k, target) for target in (0.5, *TARGETS, 0.996, 0.999, 1.0)]
        for less, more in pairwise(asked):
            assert more.exact or (
                not less.exact and more.nprobe >= less.nprobe and more.rerank >= less.rerank and more.ef >= less.ef
            )
        found = [recall_with(index, queries, k, params) for params in asked]
        assert found[-1] == 1.0
        assert all(more >= less - 1e-3 for less, more in pairwise(found))


def test_the_same_seed_finds_the_same(indexes: dict[tuple[str, Metric], Index]) -> None:
    first, second = (calibrate(indexes["ivf", "cosine"], seed=SEED) for _ in range(2))
    assert first.entries == second.entries


def test_between_the_grid_points_the_next_stricter_one_serves() -> None:
    entries = tuple(Entry(k, t, SearchParams(nprobe=k, rerank=round(t * 1000)), t, t) for k in KS for t in TARGETS)
    table = Calibration("ivf", 1, 1, "queries", 100, 0.1, entries)
    assert table.search_params(1, 0.5) == SearchParams(nprobe=1, rerank=900)
    assert table.search_params(7, 0.95) == SearchParams(nprobe=10, rerank=950)
    assert table.search_params(10, 0.951) == SearchParams(nprobe=10, rerank=980)
    assert table.search_params(51, 0.991) == SearchParams(nprobe=100, rerank=995)
    assert table.search_params(101, 0.9) is None
    assert table.search_params(10, 0.999) is None


def test_what_could_not_be_shown_is_not_in_the_table() -> None:
    table = Calibration("ivf", 1, 1, "queries", 100, 0.1, (Entry(10, 0.9, SearchParams(nprobe=3), 0.93, 0.91),))
    assert table.search_params(10, 0.9) == SearchParams(nprobe=3)
    assert table.search_params(10, 0.95) is None
    assert table.search_params(20, 0.9) is None


def test_an_exact_body_needs_no_measurement() -> None:
    found = calibrate(index_of("exact", eval_queries("l2", 50), "l2"))
    assert (found.queries, found.search_params(100, 0.995)) == (0, SearchParams(exact=True))


def test_an_empty_body_has_nothing_to_promise() -> None:
    index = made("two_stage", rows=64)
    index.n = 0
    assert calibrate(index).entries == ()


@pytest.mark.parametrize("kind", TRIED)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_copies_of_one_vector_are_all_hits(kind: str, metric: Metric) -> None:
    one = eval_queries(metric, 1)
    index = build(
        IndexPlan(kind, 4 if kind == "ivf" else 0),  # type: ignore[arg-type]
        rows_of(np.repeat(one, 300, axis=0)),
        metric,
        seed=SEED,
    )
    found = calibrate(index, seed=SEED)
    params = found.search_params(10, 0.995)
    assert params is not None
    assert recall_with(index, one, 10, params) == 1.0


def test_few_rows_are_scanned() -> None:
    index = made("ivf", rows=80, nlist=4)
    params = calibrate(index, seed=SEED).search_params(100, 0.995)
    assert params is not None
    assert recall_with(index, eval_queries("cosine", 20), 100, params) == 1.0


def test_queries_count_from_a_minimum_on_and_alone_once_they_are_many() -> None:
    index = made("two_stage", rows=2000)
    asked = eval_queries("cosine", ENOUGH_REAL)
    assert calibrate(index, asked[: MIN_REAL - 1]).source == "held-out"
    few = calibrate(index, asked[:MIN_REAL])
    assert (few.source, few.queries) == ("mixed", MIN_REAL + MOST_EVAL_QUERIES // 2)
    many = calibrate(index, asked)
    assert (many.source, many.queries) == ("queries", min(ENOUGH_REAL, MOST_EVAL_QUERIES))


def test_easy_questions_at_the_start_do_not_starve_the_hard_ones_that_follow(lists_pay: None) -> None:
    """All that is asked first is about one thing."""
    index = made("ivf", "cosine")
    first = fitted(index.vectors_at(np.full(200, 7)) + 0.01 * eval_queries("l2", 200), "cosine")
    params = calibrate(index, first, seed=SEED).search_params(10, 0.95)
    assert params is not None
    assert recall_with(index, elsewhere(300), 10, params) >= 0.95


def test_work_is_bounded_and_gives_way() -> None:
    index = made("ivf")
    asked, exact, pauses = [0], [0], [0]
    search = index.search

    def counted(queries: FloatArray, k: int, params: SearchParams, row_filter: Any = None) -> Any:
        (exact if params.exact else asked)[0] += len(queries)
        return search(queries, k, params, row_filter)

    def pause() -> None:
        pauses[0] += 1

    index.search = counted  # type: ignore[method-assign]
    found = calibrate(index, eval_queries("cosine", 5000), pause=pause)
    assert found.queries == exact[0] <= MOST_EVAL_QUERIES
    assert asked[0] <= 60 * MOST_EVAL_QUERIES
    assert pauses[0] >= asked[0] / 32


def test_a_pause_may_end_it() -> None:
    class EnoughError(Exception):
        pass

    def pause() -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        calibrate(made("two_stage", rows=2000), pause=pause)


def test_it_belongs_to_the_body_it_was_measured_on() -> None:
    index = made("ivf", rows=2000, nlist=50)
    found = calibrate(index)
    assert found.fits(index)
    assert not found.fits(made("ivf", rows=2001, nlist=50))
    assert not found.fits(made("two_stage", rows=2000))


def _read(values: dict[str, Any], kept: Calibration) -> IndexStats:
    """What a snapshot says of the index that the calibration was made on."""
    body: Any = SimpleNamespace(kind=kept.kind, n=kept.rows, nlist=kept.nlist)
    return IndexStats.from_dict(values, body)


def test_it_survives_json() -> None:
    found = calibrate(made("ivf", rows=2000, nlist=50))
    assert found.entries
    assert _read(json.loads(json.dumps(IndexStats(calibration=found).to_dict())), found).calibration == found


def _set(*path: Any) -> Callable[[Any], None]:
    *where, last, value = path

    def change(data: Any) -> None:
        for step in where:
            data = data[step]
        data[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("version", 2),
        _set("kind", None),
        _set("rows", "many"),
        _set("rows", -1),
        _set("rows", True),
        _set("source", "guess"),
        _set("seconds", float("nan")),
        _set("entries", {}),
        _set("entries", [7]),
        _set("entries", 0, "k", 2.5),
        _set("entries", 0, "recall", float("inf")),
        _set("entries", 0, "effort", None),
        _set("entries", 0, "effort", "nprobe", -3),
        _set("entries", 0, "effort", "exact", 1),
    ],
)
def test_garbage_counts_as_unknown(change: Callable[[Any], None]) -> None:
    entry = Entry(10, 0.95, SearchParams(nprobe=3, rerank=40), 0.97, 0.96)
    kept = Calibration("ivf", 9, 3, "queries", 100, 0.5, (entry,))
    values = json.loads(json.dumps(IndexStats(trained_rows=9, calibration=kept).to_dict()))
    assert _read(values, kept) == IndexStats(trained_rows=9, calibration=kept)
    change(values["calibration"])
    assert _read(values, kept) == IndexStats()


def test_recall_of_each_query_counts_ties_and_ignores_what_does_not_exist() -> None:
    truth = np.array([[1.0, 2.0, 2.0], [1.0, np.inf, np.inf], [np.inf] * 3], np.float32)
    found = np.array([[1.0, 2.0, 3.0], [1.0, np.inf, np.inf], [np.inf] * 3], np.float32)
    assert recalls_of(found, truth) == pytest.approx([2 / 3, 1.0, 1.0])
    assert recall_of(found, truth) == pytest.approx(8 / 9)


def test_a_store_of_real_units_that_has_seen_no_question(shared_data: Path) -> None:
    vectors, asked, odd = (
        fitted(np.load(shared_data / f"{name}_minilm_f16.npy").astype(np.float32), "cosine")
        for name in ("tldr", "tldr_queries", "ood_queries")
    )
    chosen = np.sort(np.random.default_rng(SEED).choice(len(vectors), 5000, replace=False))
    index = build(IndexPlan("ivf", 128), rows_of(vectors[chosen]), "cosine", seed=SEED)
    found = calibrate(index, seed=SEED)
    for target in (0.95, 0.99):
        params = found.search_params(10, target)
        assert params is not None
        assert min(recall_with(index, sample[:500], 10, params) for sample in (asked, odd)) >= target
