"""When the centroids are trained again, and when that would not help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import SEED

from memevolve_gpu.index.registry import build
from memevolve_gpu.live.index_stats import Balance, IndexStats, list_balance
from memevolve_gpu.live.scheduler import SHARES, MaintenanceScheduler, Spent, rebuild_reason
from memevolve_gpu.live.view import View
from memevolve_gpu.live.view_builder import view_of
from memevolve_gpu.types import IndexPlan, Rows

ROWS, NLIST = 600, 12


@pytest.fixture(scope="module")
def trained() -> View:
    """600 rows in 12 lists."""
    rng, ends = np.random.default_rng(SEED), np.arange(1, ROWS + 1)
    rows = Rows(ends - 1, np.zeros(ROWS, np.uint8), ends, rng.standard_normal((ROWS, 8), dtype=np.float32))
    return view_of(build(IndexPlan("ivf", NLIST, 4), rows, "l2", seed=0), ROWS)


def reason(view: View, planned_nlist: int = NLIST, **stats: Any) -> str:
    known = IndexStats(**{"trained_rows": ROWS, "trained_balance": Balance(1.3), "balance": Balance(1.3), **stats})
    found = rebuild_reason(replace(view, stats=known), IndexPlan("ivf", planned_nlist, 4), 24)
    return "" if found is None else found.text


def test_a_store_as_it_was_needs_nothing(trained: View) -> None:
    assert reason(trained) == ""
    assert reason(trained, trained_rows=301, balance=Balance(1.9, 0.2)) == ""


@pytest.mark.parametrize(
    ("planned_nlist", "stats", "words"),
    [
        (17, {}, "nlist 12 is off the planned 17"),
        (9, {}, "nlist 12 is off the planned 9"),
        (NLIST, {"trained_rows": 300}, "600 units, and the index was trained on 300"),
        (NLIST, {"balance": Balance(2.0)}, "imbalance has grown from 1.30 to 2.00"),
        (NLIST, {"balance": Balance(1.3, 0.25)}, "25% of the lists are empty, 0% were"),
    ],
)
def test_each_cause_is_named(planned_nlist: int, stats: dict[str, Any], words: str, trained: View) -> None:
    assert words in reason(trained, planned_nlist, **stats)


def test_uneven_data_is_not_trained_again_and_again(trained: View) -> None:
    sizes = [100] + [0] * 9
    assert reason(trained, trained_balance=list_balance(sizes), balance=list_balance([120] + [0] * 9)) == ""


def test_an_index_without_quantisers_is_never_trained_again(trained: View) -> None:
    assert reason(trained, trained_rows=0, balance=Balance(9.0, 0.9)) == ""


def test_equal_lists_have_a_factor_of_one() -> None:
    assert list_balance(np.full(17, 3)) == Balance(1.0, 0.0)


def test_one_list_with_everything_has_a_factor_of_nlist() -> None:
    assert list_balance([0, 50, 0, 0]) == Balance(4.0, 0.75)


def test_the_factor_is_that_of_the_expected_length_of_a_probed_list() -> None:
    sizes = np.random.default_rng(SEED).integers(0, 100, 40)
    met = np.repeat(sizes, sizes).mean()
    assert list_balance(sizes).imbalance_factor == pytest.approx(met / sizes.mean())


@pytest.mark.parametrize(("sizes", "empty"), [([], 0.0), ([0, 0, 0], 1.0)])
def test_lists_that_hold_nothing_are_even(sizes: list[int], empty: float) -> None:
    assert list_balance(sizes) == Balance(1.0, empty)


def test_a_training_for_another_number_of_lists_waits_for_its_share_of_the_time(trained: View) -> None:
    now, view = 1000.0, replace(trained, stats=IndexStats(trained_rows=trained.count))
    scheduler = MaintenanceScheduler(
        lambda _view: IndexPlan("ivf", 17, 4), 24, lambda: False, lambda: False, lambda: now
    )
    assert scheduler.next_action(view).delay == 0.0
    scheduler.notify(Spent("train", 3.0), view)
    assert scheduler.next_action(view).delay == pytest.approx(3.0 / SHARES["train"])
    assert scheduler.reason(view, patient=True) is None
    assert scheduler.reason(view) is not None, "a caller who asks for maintenance does not wait"
    outgrown = replace(view, stats=IndexStats(trained_rows=view.count // 2))
    assert scheduler.next_action(outgrown).delay == 0.0, "what costs recall does not wait"
    now += 3.0 / SHARES["train"] + 1e-6
    assert scheduler.next_action(view).delay == 0.0
