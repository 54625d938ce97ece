"""When the centroids are trained anew, and when that would not help."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import SEED

from memevolve_gpu.training.retrain_rules import Balance, Now, Trained, list_balance, needs_retraining

TARGET = 0.95
AS_TRAINED = Trained(10_000, 256, Balance(1.3, 0.0), 0.97)


def reason(trained: Trained = AS_TRAINED, **now: Any) -> str | None:
    return needs_retraining(trained, Now(**{"units": 10_000, "planned_nlist": 256, **now}), TARGET)


def test_a_store_as_it_was_needs_nothing() -> None:
    assert reason() is None
    assert reason(units=19_999, balance=Balance(1.9, 0.2), recall=0.945, removed=2999) is None


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"planned_nlist": 350}, "nlist 256 is off the planned 350"),
        ({"planned_nlist": 200}, "nlist 256 is off the planned 200"),
        ({"units": 20_000}, "20000 units have come of the 10000"),
        ({"removed": 3000}, "removed 3000 units"),
        ({"balance": Balance(2.0, 0.0)}, "imbalance has grown from 1.30 to 2.00"),
        ({"balance": Balance(1.3, 0.25)}, "25% of the lists are empty, 0% were"),
        ({"recall": 0.93}, "probed recall 0.930 has fallen below 0.950"),
    ],
)
def test_each_cause_is_named(now: dict[str, Any], words: str) -> None:
    found = reason(**now)
    assert found is not None
    assert words in found


def test_uneven_data_does_not_ask_again_and_again() -> None:
    copies = Trained(100, 10, list_balance([100] + [0] * 9), 1.0)
    again = Now(100, 10, list_balance([120] + [0] * 9), 1.0)
    assert needs_retraining(copies, again, TARGET) is None


def test_queries_that_no_training_serves_do_not_ask_again_and_again() -> None:
    hard = Trained(10_000, 256, Balance(1.3), 0.91)
    assert reason(hard, recall=0.905) is None
    assert reason(hard, recall=0.89) is not None
    assert reason(Trained(10_000, 256, Balance(1.3)), recall=0.93) is not None


def test_a_body_without_lists_has_none_to_balance() -> None:
    assert reason(Trained(10_000), balance=Balance(9.0, 0.9), planned_nlist=0) is None


def test_a_store_that_was_empty_has_no_share_removed() -> None:
    assert reason(Trained(0)) is None


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
