"""The bound below a mean recall: does it hold as often as it says, without asking for the impossible?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from support import SEED

from memevolve_gpu.training.recall import lower_bounds


def drawn(rng: np.random.Generator, draws: int, n: int, lost: float, rare: float) -> npt.NDArray[np.float64]:
    """Recalls@10 of ``draws`` samples: each result is lost with probability ``lost``, now and then nearly all are."""
    some = rng.binomial(10, lost, (draws, n)) / 10
    return np.asarray(1.0 - np.where(rng.random((draws, n)) < rare, 0.8, some))


@pytest.mark.parametrize("lost", [0.003, 0.01, 0.05])
@pytest.mark.parametrize("n", [64, 192])
def test_it_holds_in_about_nineteen_of_twenty_draws(n: int, lost: float) -> None:
    rng = np.random.default_rng(SEED)
    mean = float(drawn(rng, 1000, 1000, lost, 0.0).mean())
    held = [lower_bounds(sample[:, None], (10,))[0] <= mean for sample in drawn(rng, 400, n, lost, 0.0)]
    assert np.mean(held) >= 0.92


def test_rare_total_misses_are_better_allowed_for_than_by_the_bare_normal_bound() -> None:
    rng = np.random.default_rng(SEED)
    mean = float(drawn(rng, 1000, 1000, 0.003, 0.005).mean())
    samples = drawn(rng, 400, 64, 0.003, 0.005)
    bare = samples.mean(axis=1) - 1.645 * samples.std(axis=1, ddof=1) / 8
    held = [lower_bounds(sample[:, None], (10,))[0] <= mean for sample in samples]
    assert np.mean(held) > np.mean(bare <= mean) + 0.15


def test_two_hundred_good_queries_can_show_a_recall_of_99_percent() -> None:
    recalls = np.ones((200, 1))
    recalls[::20] = 0.9
    assert 0.985 < lower_bounds(recalls, (10,))[0] < 0.995


def test_a_sample_without_a_miss_is_no_certainty() -> None:
    few, many = (lower_bounds(np.ones((n, 2)), (1, 10)) for n in (30, 300))
    assert (few < many).all()
    assert (many < 1.0).all()


def test_one_result_alone_says_less_than_ten() -> None:
    assert lower_bounds(np.ones((100, 1)), (1,))[0] < lower_bounds(np.ones((100, 1)), (10,))[0]


def test_fewer_results_are_found_no_worse_than_more() -> None:
    recalls = np.column_stack([np.zeros(50), np.ones(50), np.full(50, 0.5)])
    bounds = lower_bounds(recalls, (1, 10, 100))
    assert bounds[0] == bounds[1] > bounds[2]


def test_what_was_not_measured_has_no_bound() -> None:
    recalls = np.column_stack([np.ones(50), np.full(50, np.nan)])
    bounds = lower_bounds(recalls, (1, 10))
    assert bounds[0] > 0.9
    assert bounds[1] == -np.inf
    assert (lower_bounds(np.empty((0, 2)), (1, 10)) == -np.inf).all()
