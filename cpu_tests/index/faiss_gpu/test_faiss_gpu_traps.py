"""What faiss-gpu does that nobody would guess: each would end the process, lose rows or hold memory for ever."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest
from fake_faiss_gpu import CODE, Card, Ended
from index.faiss_gpu.conftest import others_on
from index.faiss_gpu.test_faiss_gpu_contract import KINDS, index_of, plan_of
from oracle import check_answer, clustered, nearest, recall, rows_of

from memevolve_gpu.errors import CapacityError, DeviceError
from memevolve_gpu.index import faiss_support
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.faiss_gpu import index as index_module
from memevolve_gpu.index.faiss_gpu import ivf, sizes
from memevolve_gpu.index.faiss_gpu import resources as resources_module
from memevolve_gpu.index.registry import build
from memevolve_gpu.types import FloatArray, IndexPlan, Metric, SearchParams

N, DIM = 3000, 32


@pytest.fixture
def vectors(rng: np.random.Generator) -> FloatArray:
    return clustered(rng, N, DIM, "l2")


def right(index: Index, vectors: FloatArray, queries: FloatArray, metric: Metric = "l2", k: int = 10) -> None:
    answer = index.search(queries, k, SearchParams())
    assert recall(answer[0], nearest(queries, vectors, metric, k)) >= 0.99


def alloc_failed(why: str) -> str:
    return (
        "Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory(const faiss::gpu::AllocRequest&) at "
        "/project/faiss/gpu/StandardGpuResources.cpp:582: Error: 'err == cudaSuccess' failed: StandardGpuResources: "
        f"alloc fail type FlatData dev 0 space Device stream 0x1 size 256 bytes (cudaMalloc error {why})\n"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_resources_that_failed_half_way_are_not_used_again(kind: str, card: Card, vectors: FloatArray) -> None:
    """faiss marks a device as ready before it takes the temporary memory, whose absence it then never checks."""
    resources_module.use_free_bytes(None)
    card.others = card.total - sizes.TEMPORARY_BYTES + 1
    for _ in range(2):
        with pytest.raises(DeviceError, match="out of memory") as caught:
            index_of(kind, vectors, "l2")
        assert caught.value.cause == "out-of-memory"
        assert card.handles == set(), "given back, though the error is kept"
    assert card.held == {}
    card.others = 0
    index = index_of(kind, vectors, "l2")
    right(index, vectors, vectors[:5])
    assert index.device == "cuda:0"


@pytest.mark.parametrize("kind", KINDS)
def test_code_is_loaded_where_there_is_room_for_it(kind: str, card: Card, vectors: FloatArray) -> None:
    """A kernel that cannot be loaded ends the process: the first search of its sort asks for room."""
    index, met = index_of(kind, vectors, "l2"), index_of(kind, vectors, "l2")
    right(met, vectors, vectors[:4])
    card.others = card.total - sum(card.held.values()) - (CODE - 1)
    before = len(card.searches)
    right(index, vectors, vectors[:4])
    assert len(card.searches) > before, "known kernels need no more room"
    before = len(card.searches)
    right(index, vectors, vectors[:4], k=300)
    assert len(card.searches) == before
    assert {told.cause for told in index.incidents()} == {"out-of-memory"}
    right(met, vectors, vectors[:4])
    assert len(card.searches) > before


def test_the_host_keeps_no_second_copy_of_the_rows(
    card: Card, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faiss' Python holds on to the index that was copied to the device."""
    filled: list[weakref.ref[Any]] = []
    fill = ivf._filled

    def watched(*arguments: Any) -> Any:
        lists = fill(*arguments)
        filled.append(weakref.ref(lists))
        return lists

    monkeypatch.setattr(ivf, "_filled", watched)
    index = index_of("ivf", vectors, "l2")
    gc.collect()
    assert [lists() for lists in filled] == [None]
    right(index, vectors, vectors[:5])


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (alloc_failed("out of memory [2]"), "out-of-memory"),
        (alloc_failed("an illegal memory access was encountered [700]"), "device-lost"),
        (alloc_failed("uncorrectable ECC error encountered [214]"), "device-lost"),
        ("after dispatching: cudaErrorMemoryAllocation: out of memory", "out-of-memory"),
        ("std::bad_alloc", "out-of-memory"),
    ],
)
def test_errors_that_stay_are_told_from_a_full_card(text: str, cause: str, card: Card, vectors: FloatArray) -> None:
    index = index_of("exact", vectors, "l2")
    card.failing = text
    right(index, vectors, vectors[:5])
    assert {told.cause for told in index.incidents()} == {cause}
    assert (resources_module._by_device[0].lost is not None) == (cause == "device-lost")


def test_what_failed_is_freed_at_once_though_the_error_is_kept(card: Card, vectors: FloatArray) -> None:
    """The frames of the error hold the index: freed with them, it would be freed in any thread at any moment."""
    resources_module.use_free_bytes(None)
    card.others = card.total - sizes.TEMPORARY_BYTES - vectors.nbytes - 100_000
    kept = index_of("exact", vectors[:10], "l2")
    card.others = card.total - sum(card.held.values()) - vectors.nbytes - N
    with pytest.raises(DeviceError, match="out of memory") as caught:
        index_of("exact", vectors, "l2")
    assert caught.value.__cause__ is not None
    assert sum(card.held.values()) == sizes.TEMPORARY_BYTES + kept.device_bytes


@pytest.mark.parametrize("error", [CapacityError("illegal"), KeyboardInterrupt(), ZeroDivisionError()])
def test_who_ends_a_build_is_not_taken_for_the_device(error: BaseException, card: Card, vectors: FloatArray) -> None:
    def progress(stage: str, share: float) -> None:
        if stage == "add":
            raise error

    plan = plan_of("ivf", N)
    with pytest.raises(type(error)) as caught:
        build(plan, rows_of(vectors), "l2", seed=1, progress=progress)
    assert caught.value is error
    assert sum(card.held.values()) == sizes.TEMPORARY_BYTES
    right(build(plan, rows_of(vectors), "l2", seed=1), vectors, vectors[:5])


def test_a_lost_device_keeps_no_vectors(card: Card, vectors: FloatArray) -> None:
    index = index_of("exact", vectors, "l2")
    card.failing = alloc_failed("unspecified launch failure [719]")
    right(index, vectors, vectors[:5])
    gone = weakref.ref(index)
    del index
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", KINDS)
def test_searches_do_not_wait_for_a_training(kind: str, card: Card, vectors: FloatArray) -> None:
    index, inside, leave = index_of(kind, vectors, "l2"), threading.Event(), threading.Event()
    right(index, vectors, vectors[:5])

    def train() -> None:
        with resources_module.resources_of("cuda:0").building("training", 0, keep=False):
            inside.set()
            leave.wait()

    trainer = threading.Thread(target=train)
    trainer.start()
    inside.wait()
    before = len(card.searches)
    try:
        right(index, vectors, vectors[:5])
        assert len(card.searches) == before
    finally:
        leave.set()
        trainer.join()
    assert index.device == "cuda:0"
    assert index.incidents() == [], "nothing is wrong"
    right(index, vectors, vectors[:5])
    assert len(card.searches) > before


def test_what_is_dropped_while_others_are_on_the_device_is_freed_when_they_leave(
    card: Card, vectors: FloatArray
) -> None:
    index = index_of("exact", vectors, "l2")
    with others_on("cuda:0"):
        del index
        gc.collect()
        assert sum(card.held.values()) > sizes.TEMPORARY_BYTES
    assert sum(card.held.values()) == sizes.TEMPORARY_BYTES


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3000.0])
def test_squares_that_leave_float16_lose_no_rows(
    scale: float, metric: Metric, precision: Any, card: Card, rng: np.random.Generator
) -> None:
    """Under l2 faiss rounds the squares of components to float16: 300 squared is infinite there."""
    vectors = clustered(rng, N, DIM, metric)
    if metric != "cosine":
        vectors *= np.float32(scale / np.abs(vectors).max())
    index = index_of("exact", vectors, metric, precision)
    assert index.plan.precision == precision
    queries = vectors[rng.integers(N, size=40)]
    answer = index.search(queries, 10, SearchParams())
    check_answer(index, queries, vectors, answer, tolerance=0.05)
    assert recall(answer[0], nearest(queries, vectors, metric, 10), 0.05) >= 0.98
    half = metric != "l2" or scale == 1.0
    assert index.device_bytes == sizes.flat_bytes(N, DIM, half)
    if metric == "l2":
        far = np.full((1, DIM), 300, np.float32)
        assert index.search(far, 1, SearchParams())[1][0, 0] >= 0


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_few_large_rows_among_small_ones_are_found(precision: Any, card: Card, vectors: FloatArray) -> None:
    """Rows that the device loses are not missed where it has others to offer."""
    mixed = vectors * np.float32(1 / np.abs(vectors).max())
    mixed[::10] *= np.float32(1000)
    found = index_of("exact", mixed, "l2", precision).search(mixed[:100:10], 1, SearchParams())[1][:, 0]
    assert found.tolist() == list(range(0, 100, 10))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [10, 700])
def test_batches_never_need_more_than_the_temporary_memory(
    kind: str, k: int, card: Card, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists keep ``k`` results each before they are merged."""
    monkeypatch.setattr(index_module, "TEMPORARY_BYTES", 4 << 20)
    index = index_of(kind, vectors, "l2")
    card.scratch_left = 4 << 20
    right(index, vectors, vectors[:100], k=k)
    right(index, vectors, vectors[:3], k=k)
    mask = RowFilter(np.arange(N) % 3 > 0)
    index.search(vectors[:100], k, SearchParams(), mask)
    assert index.incidents() == []


def test_large_batches_under_a_mask_take_little_of_the_host(card: Card, vectors: FloatArray) -> None:
    index, mask = index_of("exact", vectors, "l2"), RowFilter(np.arange(N) % 2 > 0)
    queries = np.ascontiguousarray(np.tile(vectors, (2, 1)))
    tracemalloc.start()
    try:
        answer = index.search(queries, 700, SearchParams(), mask)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    own = sum(array.nbytes for array in answer) + 8 * 716 * len(queries)
    assert peak < own + (160 << 20), f"{peak >> 20} MiB, of which {own >> 20} are the answer and its candidates"
    assert recall(answer[0][:50], nearest(queries[:50], vectors, "l2", 700, mask)) >= 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_body_is_searched_once_while_there_is_room(kind: str, card: Card, vectors: FloatArray) -> None:
    """The first real search then needs no room for code, and takes no longer than the next."""
    index = index_of(kind, vectors, "l2")
    assert card.searches[-1][0] == 1
    card.others = card.total - sum(card.held.values())
    before = len(card.searches)
    right(index, vectors, vectors[:1])
    assert len(card.searches) == before + 1


def test_scratch_of_a_flat_scan_grows_with_its_tiles() -> None:
    few, many = (sizes.flat_query_bytes(n, 384, 2048) for n in (524_288, 5_242_880))
    assert many - few == 2 * 36 * 12 * 2048, "the results of each tile are kept until they are merged"
    assert few >= 2 * 4 * 524_288


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("spread", [0.5, 0.6, 0.7])
def test_pages_of_unequal_lists_are_predicted(spread: float, precision: Any, rng: np.random.Generator) -> None:
    """Lists beyond half a page take whole ones; k-means leaves few that are as long as the mean."""
    shares = rng.gamma(spread**-2, spread**2, 1024)
    for rows in (50, 200, 391, 500, 700, 1000, 2000, 5000):
        lengths = (shares * rows / shares.mean()).astype(int)
        plan = IndexPlan("ivf", nlist=1024, precision=precision, engine="faiss", device="cuda:0")
        predicted = sizes.plan_device_bytes(plan, int(lengths.sum()), 384) - sizes.TEMPORARY_BYTES
        assert predicted == pytest.approx(sizes.lists_bytes(lengths.tolist(), 384, precision), rel=0.1), rows


def test_the_stand_in_is_as_strict_as_faiss(card: Card) -> None:
    faiss: Any = faiss_support.load_faiss()
    config = faiss.GpuIndexFlatConfig()
    with pytest.raises(AttributeError, match="use_raft"):
        config.use_raft = False
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlat(resources, 4, faiss.METRIC_L2, config)
    for name in ("codes", "get_xb", "setNumProbes"):
        with pytest.raises(AttributeError, match=name):
            getattr(index, name)
    with pytest.raises(TypeError, match="Wrong number or type"):
        faiss.GpuIndexFlat(resources, 4, faiss.METRIC_L2, faiss.GpuIndexIVFScalarQuantizerConfig())
    with pytest.raises(Ended):
        resources.setPinnedMemory(0)
    config.device = 1
    with pytest.raises(RuntimeError, match="Invalid GPU device"):
        faiss.GpuIndexFlat(resources, 4, faiss.METRIC_L2, config)
