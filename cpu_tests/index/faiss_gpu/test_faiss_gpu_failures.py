"""A device that is full, broken, shared or inherited: the answers stay, and what happened is told."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from fake_faiss_gpu import Card
from index.faiss_gpu.conftest import others_on
from index.faiss_gpu.test_faiss_gpu_contract import KINDS, index_of, plan_of
from oracle import check_answer, clustered, contents, nearest, recall, rows_of
from support import as_child

from memevolve_gpu.errors import DeviceError, EngineError
from memevolve_gpu.index import faiss_support
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.device_failover import DeviceFailover, mark_lost
from memevolve_gpu.index.faiss_gpu import index as index_module
from memevolve_gpu.index.faiss_gpu import resources, sizes
from memevolve_gpu.index.registry import build, from_parts
from memevolve_gpu.types import FloatArray, IndexPlan, SearchParams

N, DIM = 3000, 32
ILLEGAL = "Error in run: Error: CUDA error 700 an illegal memory access was encountered"


@pytest.fixture
def vectors(rng: np.random.Generator) -> FloatArray:
    return clustered(rng, N, DIM, "l2")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def right(
    index: Index, vectors: FloatArray, queries: FloatArray, row_filter: RowFilter | None = None, k: int = 10
) -> None:
    answer = index.search(queries, k, SearchParams(), row_filter)
    check_answer(index, queries, vectors, answer, row_filter)
    assert recall(answer[0], nearest(queries, vectors, "l2", k, row_filter)) >= 0.99


def causes(index: Index) -> list[tuple[str, str]]:
    return [(told.cause, told.action) for told in index.incidents()]


# -------------------------------------------------------------------------------------------------------- no room


@pytest.mark.parametrize("asked_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_building_without_room_is_refused_with_its_cause(
    kind: str, asked_first: bool, card: Card, vectors: FloatArray
) -> None:
    resources.use_free_bytes(card.free if asked_first else None)
    card.others = card.total - sizes.TEMPORARY_BYTES - 100_000
    with pytest.raises(DeviceError, match="needs" if asked_first else "out of memory") as caught:
        index_of(kind, vectors, "l2")
    assert caught.value.cause == "out-of-memory"
    assert sum(card.held.values()) <= sizes.TEMPORARY_BYTES, "what was begun is freed, though the error is kept"
    card.others = 0
    right(index_of(kind, vectors, "l2"), vectors, vectors[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_without_room_for_a_batch_it_is_cut_smaller(kind: str, card: Card, vectors: FloatArray) -> None:
    index = index_of(kind, vectors, "l2")
    index.search(vectors[:1], 10, SearchParams())
    card.scratch_left = 5 * (N * 8 if kind == "exact" else index.nlist * DIM * 4)
    right(index, vectors, vectors[:100])
    assert max(nq for nq, _, _ in card.searches[-20:]) <= 5
    assert set(causes(index)) == {("out-of-memory", "smaller-batch")}
    assert causes(index) == [], "told once"
    assert index.device == "cuda:0"


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_room_the_host_answers_until_there_is(
    kind: str, card: Card, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    built_index = index_of(kind, vectors, "l2")
    built_index._failover = DeviceFailover("cuda:0", clock)  # type: ignore[attr-defined]
    card.scratch_left = 0
    right(built_index, vectors, vectors[:50])
    told = causes(built_index)
    assert set(told[:-1]) == {("out-of-memory", "smaller-batch")}
    assert told[-1] == ("out-of-memory", "cpu")
    assert built_index.device == "cpu"
    before = len(card.searches)
    right(built_index, vectors, vectors[:50])
    card.scratch_left = None
    right(built_index, vectors, vectors[:50])
    assert len(card.searches) == before, "it rests"
    clock.now += 15.5
    right(built_index, vectors, vectors[:50])
    assert causes(built_index) == [("recovered", "device-again")]
    assert built_index.device == "cuda:0"
    assert card.searches[-1][0] == 50 or sum(nq for nq, _, _ in card.searches[before:]) >= 50


# --------------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_device_is_left_alone_by_all(kind: str, card: Card, vectors: FloatArray) -> None:
    index, other = index_of(kind, vectors, "l2"), index_of("exact", vectors, "l2")
    card.failing = ILLEGAL
    right(index, vectors, vectors[:20])
    card.failing = ""
    before = len(card.searches)
    right(index, vectors, vectors[:20])
    right(other, vectors, vectors[:20])
    assert len(card.searches) == before
    assert causes(index) == causes(other) == [("device-lost", "cpu-until-restart")]
    assert index.device == other.device == "cpu"
    with pytest.raises(DeviceError, match="restart this process") as caught:
        index_of("exact", vectors, "l2")
    assert caught.value.cause == "device-lost"
    held = dict(card.held)
    del index, other
    gc.collect()
    assert card.held == held, "nothing is freed on a device that is gone"


def test_a_device_that_the_other_engine_has_lost_is_left_alone(card: Card, vectors: FloatArray) -> None:
    """faiss would end the process in its first call to it, also in one that frees memory."""
    index = index_of("exact", vectors, "l2")
    mark_lost("cuda:0", "CUDA error: an illegal memory access was encountered")
    before, held = len(card.searches), dict(card.held)
    right(index, vectors, vectors[:20])
    with pytest.raises(DeviceError, match="restart this process") as caught:
        index_of("exact", vectors, "l2")
    assert caught.value.cause == "device-lost"
    del index
    gc.collect()
    resources._by_device.clear()
    gc.collect()
    assert (len(card.searches), card.held) == (before, held)


def test_a_device_that_breaks_while_lists_are_made_is_left_alone(card: Card, vectors: FloatArray) -> None:
    card.failing = ILLEGAL
    with pytest.raises(DeviceError, match="restart this process") as caught:
        index_of("ivf", vectors, "l2")
    assert caught.value.cause == "device-lost"
    held = dict(card.held)
    assert sum(held.values()) > sizes.TEMPORARY_BYTES, "what was begun stays: freeing it is a call to the device"
    gc.collect()
    assert card.held == held


def test_an_odd_refusal_keeps_its_body_only_off_the_device(card: Card, vectors: FloatArray) -> None:
    index, other = index_of("exact", vectors, "l2"), index_of("exact", vectors, "l2")
    card.failing = "Error in search: Error: 'x' failed: something that nobody foresaw"
    right(index, vectors, vectors[:20])
    card.failing = ""
    right(index, vectors, vectors[:20])
    right(other, vectors, vectors[:20])
    assert (index.device, other.device) == ("cpu", "cuda:0")
    assert causes(index) == [("device-error", "cpu")]


def test_faiss_without_gpu_indexes_is_named(card: Card, vectors: FloatArray) -> None:
    module = faiss_support.load_faiss()
    del module.GpuIndexIVFScalarQuantizer
    with pytest.raises(DeviceError, match="install faiss-gpu"):
        index_of("exact", vectors, "l2")


@pytest.mark.parametrize(("device", "message"), [("cuda:1", "sees 1"), ("cpu", "cuda:N"), ("cuda:x", "cuda:N")])
def test_devices_that_do_not_exist_are_refused(device: str, message: str, card: Card, vectors: FloatArray) -> None:
    plan = IndexPlan("exact", engine="faiss", device=device)
    with pytest.raises(DeviceError, match=message):
        build(plan, rows_of(vectors), "l2", seed=1)


def test_a_driver_that_refuses_is_named(card: Card, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing() -> int:
        raise RuntimeError("Error: CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(faiss_support.load_faiss(), "get_num_gpus", refusing, raising=False)
    with pytest.raises(DeviceError, match=r"insufficient.*update the NVIDIA driver"):
        index_of("exact", vectors, "l2")


# --------------------------------------------------------------------------------------------------- its limits


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_2048_results_come_from_the_host(kind: str, card: Card, vectors: FloatArray) -> None:
    index = index_of(kind, vectors, "l2")
    before = len(card.searches)
    right(index, vectors, vectors[:2], k=2049)
    assert len(card.searches) == before
    right(index, vectors, vectors[:2], k=2048)
    assert len(card.searches) > before


def test_more_than_2048_lists_come_from_the_host(card: Card, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 4000, 8, "l2")
    plan = IndexPlan("ivf", nlist=2100, engine="faiss", device="cuda:0")
    index = build(plan, rows_of(vectors), "l2", seed=1)
    before = len(card.searches)
    distances, _ = index.search(vectors[:3], 5, SearchParams(nprobe=2100))
    assert np.allclose(distances, nearest(vectors[:3], vectors, "l2", 5), atol=1e-5)
    assert len(card.searches) == before
    index.search(vectors[:3], 5, SearchParams())
    assert card.searches[-1][2] == 2048


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_tiled_to_the_temporary_memory(
    kind: str, card: Card, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "TEMPORARY_BYTES", 1 << 20)
    index = index_of(kind, vectors, "l2")
    card.searches.clear()
    right(index, vectors, vectors[:500])
    each = N * 8 if kind == "exact" else index.nlist * DIM * 4
    assert sum(nq for nq, _, _ in card.searches) >= 500
    assert all(nq * each <= 1 << 20 for nq, _, _ in card.searches)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_filter_leaves_short_is_answered_by_the_host(kind: str, card: Card, vectors: FloatArray) -> None:
    """One fetch for all queries, larger by the share that the filter takes; the host scans for the starved query."""
    index = index_of(kind, vectors, "l2")
    near = ((vectors - vectors[:1]) ** 2).sum(axis=1).argsort()
    mask = np.ones(N, np.bool_)
    mask[near[:400]] = False
    scanned, scan = [], index.table.scan

    def watched(queries: FloatArray, *rest: object) -> object:
        scanned.append(len(queries))
        return scan(queries, *rest)  # type: ignore[arg-type]

    index.table.scan = watched  # type: ignore[method-assign, assignment]
    card.searches.clear()
    right(index, vectors, vectors[[0, int(near[-1])]], RowFilter(mask))
    assert len(card.searches) == 1
    assert 26 < card.searches[0][1] < 60
    assert scanned == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_few_allowed_rows_are_read_on_the_host(kind: str, card: Card, vectors: FloatArray) -> None:
    index = index_of(kind, vectors, "l2")
    mask = np.zeros(N, np.bool_)
    mask[:20] = True
    before = len(card.searches)
    right(index, vectors, vectors[:5], RowFilter(mask))
    assert len(card.searches) == before


# ------------------------------------------------------------------------------------------- threads and processes


def test_bodies_share_a_device_and_are_freed_on_its_turn(card: Card, vectors: FloatArray) -> None:
    """Searches in eight threads while others build and drop indexes; the card notices two at once."""
    card.slow = 0.0002
    index, stop = index_of("ivf", vectors, "l2"), threading.Event()

    def churn() -> int:
        made = 0
        while not stop.is_set():
            index_of("exact", vectors[:200], "l2").search(vectors[:1], 3, SearchParams())
            made += 1
        return made

    def fetch(row: int) -> bool:
        return int(index.search(vectors[row : row + 1], 1, SearchParams())[1][0, 0]) == row

    with ThreadPoolExecutor(8) as pool:
        churning = [pool.submit(churn) for _ in range(2)]
        assert all(pool.map(fetch, range(150)))
        stop.set()
        assert all(done.result() > 0 for done in churning)
    del churning
    gc.collect()
    with resources.resources_of("cuda:0").using("looking"):
        pass
    assert sum(card.held.values()) == sizes.TEMPORARY_BYTES + index.device_bytes
    assert card.violations == 0


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_fork_the_host_answers(kind: str, card: Card, vectors: FloatArray) -> None:
    index = index_of(kind, vectors, "l2")
    index.search(vectors[:1], 1, SearchParams())
    searched = len(card.searches)
    assert as_child(lambda: _child_is_right(index, vectors, card, searched)) == 0
    assert causes(index) == []
    assert index.device == "cuda:0"
    right(index, vectors, vectors[:20])


def _child_is_right(index: Index, vectors: FloatArray, card: Card, searched: int) -> None:
    found = index.search(vectors[:20], 1, SearchParams())[1][:, 0].tolist()
    told, held = causes(index), dict(card.held)
    with pytest.raises(DeviceError) as refused:
        index_of("exact", vectors, "l2")
    away = index.device
    del index
    gc.collect()
    facts = (found, told, refused.value.cause, away, len(card.searches), card.held)
    assert facts == (list(range(20)), [("fork", "cpu-until-restart")], "fork", "cpu", searched, held)


def test_the_lock_of_another_thread_does_not_reach_the_child(card: Card, vectors: FloatArray) -> None:
    index = index_of("exact", vectors, "l2")

    def act() -> None:
        right(index, vectors, vectors[:3])
        assert causes(index) == [("fork", "cpu-until-restart")]

    with others_on("cuda:0"):
        assert as_child(act) == 0


# ------------------------------------------------------------------------------------------------------- its bytes


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "dim"), [(3000, 32), (2500, 100)])
def test_predicted_bytes_are_what_the_card_holds(
    kind: str, precision: str, n: int, dim: int, card: Card, rng: np.random.Generator
) -> None:
    plan = plan_of(kind, n, precision)  # type: ignore[arg-type]
    index = build(plan, rows_of(clustered(rng, n, dim, "l2")), "l2", seed=1)
    assert index.device_bytes + sizes.TEMPORARY_BYTES == sum(card.held.values())
    predicted = sizes.plan_device_bytes(plan, n, dim) - sizes.TEMPORARY_BYTES
    assert predicted == pytest.approx(index.device_bytes, rel=0.1)


def test_a_snapshot_is_refused_where_the_device_is_full(card: Card, vectors: FloatArray) -> None:
    index = index_of("ivf", vectors, "l2")
    parts = contents(index)
    with pytest.raises(EngineError, match="33 of 32"):
        from_parts(replace(index.plan, nlist=33), "l2", parts)
    with pytest.raises(EngineError, match="another precision"):
        from_parts(replace(index.plan, precision="int8"), "l2", parts)
    card.others = card.total
    with pytest.raises(DeviceError):
        from_parts(index.plan, "l2", parts)
