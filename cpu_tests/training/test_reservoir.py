"""The sample of real queries: bounded, fair at first, forgetful later, and never a reason to fail."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import SEED

from memevolve_gpu.training.reservoir import Reservoir
from memevolve_gpu.types import FloatArray


def numbered(start: int, stop: int, dim: int = 3) -> FloatArray:
    """Vectors whose first component is the number of the query."""
    vectors = np.zeros((stop - start, dim), np.float32)
    vectors[:, 0] = np.arange(start, stop)
    return vectors


def numbers(reservoir: Reservoir) -> npt.NDArray[np.int64]:
    return reservoir.sample()[:, 0].astype(np.int64)


def test_everything_is_kept_while_there_is_room() -> None:
    reservoir = Reservoir(3, capacity=50)
    for i in range(20):
        reservoir.offer(numbered(i, i + 1))
    assert (len(reservoir), reservoir.seen, reservoir.taken) == (20, 20, 20)
    assert sorted(numbers(reservoir)) == list(range(20))
    assert reservoir.sample().dtype == np.float32


def test_it_goes_on_after_an_interrupt_inside_an_offer() -> None:
    """A forked child finds the same state when another thread of its parent was inside ``offer``."""

    class Interrupted(list[list[float]]):
        def __getitem__(self, _at: object) -> Any:
            raise KeyboardInterrupt

    for capacity in (4, 50):
        reservoir = Reservoir(3, capacity=capacity)
        reservoir.offer(numbered(0, 10))
        with pytest.raises(KeyboardInterrupt):
            reservoir.offer(cast("FloatArray", Interrupted([[0.0] * 3] * 100_000)))
        for i in range(10, 30):
            reservoir.offer(numbered(i, i + 1))
        assert reservoir.seen == 100_030
        assert set(numbers(reservoir)) <= set(range(30))
        assert len(reservoir) == min(capacity, 30)


def test_an_empty_one_gives_an_empty_sample() -> None:
    reservoir = Reservoir(7)
    reservoir.offer(np.empty((0, 7), np.float32))
    assert reservoir.sample().shape == (0, 7)
    assert reservoir.seen == 0


def test_it_never_grows_beyond_its_capacity() -> None:
    reservoir = Reservoir(3, capacity=32, half_life=100)
    for start in range(0, 3000, 100):
        reservoir.offer(numbered(start, start + 100))
        assert len(reservoir) <= 32
    assert reservoir.seen == 3000
    assert len(set(numbers(reservoir))) == 32


def test_at_first_every_query_has_the_same_chance() -> None:
    kept = np.zeros(400)
    for seed in range(300):
        reservoir = Reservoir(1, capacity=40, half_life=10_000, seed=seed)
        reservoir.offer(numbered(0, 400, 1))
        kept[numbers(reservoir)] += 1
    eighths = kept.reshape(8, 50).sum(axis=1) / (300 * 50)
    assert eighths == pytest.approx(np.full(8, 0.1), abs=0.012)


def test_half_of_the_sample_gives_way_in_a_half_life() -> None:
    ages = []
    for seed in range(20):
        reservoir = Reservoir(1, capacity=100, half_life=1000, seed=seed)
        reservoir.offer(numbered(0, 20_000, 1))
        ages.append(20_000 - numbers(reservoir))
    older = [np.mean(np.concatenate(ages) > age) for age in (1000, 2000, 4000)]
    assert older == pytest.approx([0.5, 0.25, 1 / 16], abs=0.04)


def test_a_batch_is_as_good_as_single_queries() -> None:
    single, batched = Reservoir(3, capacity=16, seed=SEED), Reservoir(3, capacity=16, seed=SEED)
    for i in range(500):
        single.offer(numbered(i, i + 1))
    for start in range(0, 500, 125):
        batched.offer(numbered(start, start + 125))
    np.testing.assert_array_equal(single.sample(), batched.sample())


def test_the_sample_is_a_copy() -> None:
    reservoir = Reservoir(3)
    reservoir.offer(numbered(1, 2))
    reservoir.sample()[:] = 7
    assert numbers(reservoir) == [1]


def test_threads_may_offer_at_the_same_time() -> None:
    reservoir = Reservoir(3, capacity=64, half_life=500, seed=SEED)

    def offer(thread: int) -> None:
        for i in range(2000):
            reservoir.offer(numbered(10_000 * thread + i, 10_000 * thread + i + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(offer, range(4)))
    assert reservoir.seen == 8000
    assert len(set(numbers(reservoir))) == 64


@pytest.mark.parametrize("count", [0, 5, 400])
def test_it_survives_being_written_and_read(count: int) -> None:
    first = Reservoir(3, capacity=64, half_life=100)
    first.offer(numbered(0, count))
    again = Reservoir.from_bytes(first.to_bytes(), 3, capacity=64, half_life=100)
    assert (again.seen, len(again), again.taken) == (count, min(count, 64), 0)
    np.testing.assert_array_equal(again.sample(), first.sample())
    again.offer(numbered(5000, 6000))
    assert again.seen == count + 1000
    assert (numbers(again) >= 5000).any()


def test_a_smaller_one_keeps_a_part_and_a_larger_one_fills_up() -> None:
    first = Reservoir(3, capacity=64)
    first.offer(numbered(0, 64))
    small = Reservoir.from_bytes(first.to_bytes(), 3, capacity=10)
    assert set(numbers(small)) < set(range(64))
    assert len(set(numbers(small))) == 10
    large = Reservoir.from_bytes(first.to_bytes(), 3, capacity=100)
    large.offer(numbered(64, 70))
    assert sorted(numbers(large)) == list(range(70))


@given(st.binary(max_size=200))
def test_garbage_gives_an_empty_sample(data: bytes) -> None:
    assert len(Reservoir.from_bytes(data, 3)) == 0


def test_every_damage_is_noticed() -> None:
    whole = Reservoir(3)
    whole.offer(numbered(1, 9))
    data = whole.to_bytes()
    rng = random.Random(SEED)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        assert Reservoir.from_bytes(bytes(damaged), 3).seen == 0
    assert Reservoir.from_bytes(data[:-1], 3).seen == 0
    assert Reservoir.from_bytes(data + b"1234" * 3, 3).seen == 0


def test_another_dimension_starts_afresh() -> None:
    first = Reservoir(3)
    first.offer(numbered(0, 5))
    assert len(Reservoir.from_bytes(first.to_bytes(), 4)) == 0


def test_vectors_that_are_no_numbers_are_not_taken_over() -> None:
    first = Reservoir(3)
    first.offer(np.full((2, 3), np.nan, np.float32))
    assert len(Reservoir.from_bytes(first.to_bytes(), 3)) == 0


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"dim": 3, "capacity": 0}, {"dim": 3, "half_life": 0}])
def test_sizes_must_be_positive(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Reservoir(wrong.pop("dim"), **wrong)
