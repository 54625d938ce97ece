"""An index on the device with more rows: made beside the old one, which does not notice."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fake_faiss_gpu import Card
from index.faiss_gpu.test_faiss_gpu_contract import KINDS, index_of
from index.test_extended import cut
from oracle import check_answer, clustered, nearest, pairs, recall, rows_of

from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.faiss_gpu import resources, sizes
from memevolve_gpu.index.registry import from_parts
from memevolve_gpu.types import FloatArray, Metric, Precision, SearchParams

N, M, DIM = 1500, 333, 40
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
TOLERANCE: dict[Precision, float] = {"float32": 2e-4, "float16": 2e-2, "int8": 1e-1}


def contents(index: Index) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in index.parts().items()}


def extended(index: Index, vectors: FloatArray) -> Index:
    """``index`` with the rest of ``vectors`` behind its rows."""
    longer = index.extended(cut(rows_of(vectors), index.n, len(vectors)))
    assert longer is not None
    return longer


@pytest.mark.parametrize(
    ("kind", "metric", "precision"),
    [(kind, metric, p) for turn, p in enumerate(PRECISIONS) for kind, metric in pairs(KINDS, turn)],
)
def test_old_rows_then_new_ones(
    kind: str, metric: Metric, precision: Precision, card: Card, rng: np.random.Generator
) -> None:
    vectors, queries = clustered(rng, N + M, DIM, metric), clustered(rng, 30, DIM, metric)
    old = index_of(kind, vectors[:N], metric, precision)
    before, answered = contents(old), [array.tobytes() for array in old.search(queries, 9, SearchParams())]
    searched = len(card.searches)
    new = extended(old, vectors)
    assert (new.n, new.kind, new.nlist, new.device) == (N + M, kind, old.nlist, "cuda:0")
    assert np.array_equal(new.slots, rows_of(vectors).slots)
    assert new.ids_at(np.array([0, N, N + M - 1])) == [f"unit-é-{i}" for i in (0, N, N + M - 1)]
    answer = new.search(queries, 10, SearchParams())
    check_answer(new, queries, vectors, answer, tolerance=TOLERANCE[precision])
    assert recall(answer[0], nearest(queries, vectors, metric, 10), TOLERANCE[precision]) >= 0.98
    assert len(card.searches) > searched
    assert contents(old) == before
    assert [array.tobytes() for array in old.search(queries, 9, SearchParams())] == answered
    again = from_parts(new.plan, metric, {name: array.copy() for name, array in new.parts().items()})
    assert np.array_equal(again.search(queries, 10, SearchParams())[1], answer[1])
    assert again.list_sizes == new.list_sizes
    assert sum(new.list_sizes) == (new.n if kind == "ivf" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_its_bytes_are_counted_anew(kind: str, card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 2 * N, DIM, "l2")
    old = index_of(kind, vectors[:N], "l2")
    new = extended(old, vectors)
    assert sum(card.held.values()) == sizes.TEMPORARY_BYTES + old.device_bytes + new.device_bytes
    assert new.plan.device_bytes - sizes.TEMPORARY_BYTES == pytest.approx(new.device_bytes, rel=0.1)
    del old
    gc.collect()
    assert sum(card.held.values()) == sizes.TEMPORARY_BYTES + new.device_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_two_extensions_of_one_body(kind: str, card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, N + 2 * M, DIM, "l2")
    old, rows = index_of(kind, vectors[:N], "l2"), rows_of(vectors)
    first, second = old.extended(cut(rows, N, N + M)), old.extended(cut(rows, N + M, N + 2 * M))
    assert first is not None
    assert second is not None
    for index, own in ((first, vectors[: N + M]), (second, np.delete(vectors, slice(N, N + M), axis=0))):
        assert index.search(own[-M:], 1, SearchParams())[1][:, 0].tolist() == list(range(N, N + M))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_extend_and_search_at_the_same_time(kind: str, card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, N + 8 * 20, DIM, "l2")
    old, rows = index_of(kind, vectors[:N], "l2"), rows_of(vectors)

    def work(turn: int) -> bool:
        start = N + 20 * (turn % 8)
        new = old.extended(cut(rows, start, start + 20))
        assert new is not None
        mine = new.search(vectors[start : start + 20], 1, SearchParams())[1][:, 0]
        theirs = old.search(vectors[:5], 1, SearchParams())[1][:, 0]
        return np.array_equal(mine, np.arange(N, N + 20)) and np.array_equal(theirs, np.arange(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))


@pytest.mark.parametrize("asked_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_without_room_beside_the_old_body_there_is_none(
    kind: str, asked_first: bool, card: Card, rng: np.random.Generator
) -> None:
    vectors = clustered(rng, 200_000 // DIM, DIM, "l2")
    old = index_of(kind, vectors[:N], "l2")
    resources.use_free_bytes(card.free if asked_first else None)
    room = sizes.CODE_BYTES + sizes.flat_bytes(len(vectors), DIM, half=False) * 3 // 2 if asked_first else 100_000
    card.others = card.total - sum(card.held.values()) - room
    held = dict(card.held)
    with pytest.raises(DeviceError) as caught:
        extended(old, vectors)
    assert caught.value.cause == "out-of-memory"
    assert card.held == held
    card.others = 0
    assert old.search(vectors[:5], 1, SearchParams())[1][:, 0].tolist() == list(range(5))
    assert extended(old, vectors).search(vectors[-5:], 1, SearchParams())[1][:, 0].tolist() == [
        *range(len(vectors) - 5, len(vectors))
    ]


def test_what_the_precision_cannot_hold_is_left_to_a_new_body(card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, N, DIM, "l2")
    far: Callable[[], Any] = lambda: cut(rows_of(np.concatenate((vectors, vectors[:3] * 1e6))), N, N + 3)  # noqa: E731
    assert index_of("ivf", vectors, "l2", "float16").extended(far()) is None


def test_squares_of_new_rows_are_looked_at(card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, N + M, DIM, "l2") / np.float32(10)
    vectors[N:] *= np.float32(3000)
    old = index_of("exact", vectors[:N], "l2", "float16")
    new = extended(old, vectors)
    assert new.search(vectors[N:], 1, SearchParams())[1][:, 0].tolist() == list(range(N, N + M))
    assert new.device_bytes == sizes.flat_bytes(N + M, DIM, half=False)
