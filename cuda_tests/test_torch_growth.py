"""What the torch engine keeps on a real GPU beside an index that never changes: newest rows, deaths, longer indexes."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_tests.torch_kit import (
    DEVICE,
    Newer,
    cut,
    here,
    host_is_not_asked,
    on_card,
    overlap,
    vectors_of,
)

from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.exact_scan import exact_scan
from memevolve_gpu.index.torch_gpu.index import TorchIndex
from memevolve_gpu.index.torch_gpu.memory_accounting import account_of
from memevolve_gpu.live.delta_buffer import NEVER
from memevolve_gpu.live.view import LiveRows
from memevolve_gpu.types import FloatArray, Metric, Precision, SearchParams

N = 20_000
KINDS = ("exact", "ivf")


class Deaths:
    """An index's deaths, as views of a store see them."""

    def __init__(self, n: int) -> None:
        self.died, self.log = np.full(n, NEVER, np.int64), array("q")

    def add(self, positions: list[int]) -> LiveRows:
        """These die one after the other."""
        for position in positions:
            self.died[position] = len(self.log) + 1
            self.log.append(position)
        return LiveRows(self.died, len(self.log), self.log, len(self.log))

    @property
    def mask(self) -> RowFilter:
        """The same as a plain mask."""
        return RowFilter(self.died == NEVER)


@pytest.mark.parametrize("kind", KINDS)
def test_deaths_reach_recorded_searches(torch: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording reads the dead where they lie: those that die later must be seen by it."""
    vectors, query, deaths = vectors_of(N, 128), vectors_of(1, 128, 2), Deaths(N)
    index = on_card(kind, vectors)
    host_is_not_asked(index, monkeypatch)
    params, everything = SearchParams(nprobe=16), exact_scan(query, vectors, 200, "l2")[1][0].tolist()
    for lock in range(10):
        now = deaths.add(everything[5 * lock : 5 * lock + 5])
        expected = everything[5 * lock + 5 : 5 * lock + 15]
        for _ in range(2):
            found = index.search(query, 10, params, now)[1]
            assert deaths.mask.test(found).all(), "nobody comes back"
            if kind == "exact":
                assert overlap(found, np.array([expected])) >= 0.9
        assert overlap(index.search(query, 10, params)[1], np.array([everything[:10]])) >= 0.9 or kind == "ivf"
    if here() != "cpu":
        assert len(index._graphs._kept) == 2, "with and without the dead"
    assert index.incidents() == []


@pytest.mark.parametrize("nq", [1, 3, 200])
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_newer_rows_are_scanned_as_on_the_host(
    torch: Any, metric: Metric, nq: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = vectors_of(N + 30_000, 384, metric=metric), vectors_of(nq, 384, 2, metric)
    index, newer = on_card("exact", vectors[:N], metric), Newer(vectors[N:])
    host_is_not_asked(index, monkeypatch)
    for n in (1, 33, 5000, 30_000, 12_000):  # the last is an older view
        half = RowFilter(np.arange(n) % 2 == 0)
        for row_filter in (None, half):
            given = [queries, torch.from_numpy(queries).to(here())]
            truth, expected = exact_scan(queries, newer.vectors[:n], 10, metric, row_filter)
            for one in given:
                answer = index.search_delta(newer, n, one, 10, row_filter)
                assert answer is not None
                np.testing.assert_allclose(answer[0], truth, rtol=1e-3, atol=1e-3)
                assert (answer[1] == expected).mean() >= 0.98, "ties aside"
    assert index.incidents() == []


def test_newer_rows_without_room_stay_on_the_host(torch: Any, small_card: Callable[[int | None], None]) -> None:
    vectors, queries = vectors_of(N + 100_000, 384), vectors_of(200, 384, 2)
    index, newer = on_card("exact", vectors[:N]), Newer(vectors[N:])
    used = account_of(DEVICE).used
    assert index.search_delta(newer, 2000, queries, 10) is not None
    small_card(16 << 20)
    assert index.search_delta(newer, 100_000, queries, 10) is None
    assert account_of(DEVICE).used == used, "what it had taken is given back"
    expected = exact_scan(queries, vectors[:N], 10, "l2")[1]
    assert overlap(index.search(queries, 10, SearchParams())[1], expected) >= 0.999, "the body is not concerned"
    assert index.incidents()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("float32_rows", [False, True])
def test_longer_bodies_answer_as_new_ones(
    torch: Any, kind: str, precision: Precision, monkeypatch: pytest.MonkeyPatch, *, float32_rows: bool
) -> None:
    vectors, queries = vectors_of(N + 5000, 128), vectors_of(200, 128, 2)
    index = on_card(kind, vectors[:N], precision=precision, float32_rows=float32_rows)
    host_is_not_asked(index, monkeypatch)
    for end in (N + 1, N + 700, N + 5000):
        longer = index.extended(cut(vectors, index.n, end))
        assert isinstance(longer, TorchIndex)
        index = longer
        assert index.device == DEVICE
    _, expected = exact_scan(queries, np.ascontiguousarray(index.vectors), 10, "l2")
    assert overlap(index.search(queries, 10, SearchParams())[1], expected) >= 0.999
    for row in range(5):
        one = slice(row, row + 1)
        assert overlap(index.search(queries[one], 10, SearchParams())[1], expected[one]) >= 0.9
    assert index.search(vectors[N::100], 1, SearchParams(nprobe=1))[1][:, 0].tolist() == list(range(N, N + 5000, 100))
    assert index.incidents() == []


def test_a_longer_body_without_room_is_refused(torch: Any, small_card: Callable[[int | None], None]) -> None:
    vectors, queries = vectors_of(200_000, 384), vectors_of(100, 384, 2)
    index, used = on_card("exact", vectors[:150_000]), account_of(DEVICE).used
    expected = exact_scan(queries, vectors[:150_000], 10, "l2")[1]
    small_card(32 << 20)
    with pytest.raises(DeviceError, match="out of memory") as caught:
        index.extended(cut(vectors, 150_000, 200_000))
    assert caught.value.cause == "out-of-memory"
    assert account_of(DEVICE).used == used
    assert overlap(_answers(index, queries), expected) >= 0.999
    small_card(None)
    longer = index.extended(cut(vectors, 150_000, 200_000))
    assert longer is not None
    assert longer.device == DEVICE


def _answers(index: TorchIndex, queries: FloatArray) -> Any:
    return index.search(queries, 10, SearchParams())[1]
