"""The faiss engine on a GPU: the contract of all indexes, its memory, and a device that is full.

The tests of ``cpu_tests/index/faiss_gpu`` run here once more, on the device instead of its stand-in.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_faiss_gpu as stand_in
import numpy as np
import pytest
from cuda_tests.card_kit import Hooks, embeddings, filled_card, free_bytes, need_engine
from index.faiss_gpu import test_faiss_gpu_contract as contract
from oracle import check_answer, clustered, nearest, recall, rows_of
from support import as_child

from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.exact_scan import exact_scan
from memevolve_gpu.index.faiss_gpu import resources as owner_module
from memevolve_gpu.index.faiss_gpu.index import FaissGpuIndex
from memevolve_gpu.index.faiss_gpu.resources import resources_of, use_free_bytes
from memevolve_gpu.index.faiss_gpu.sizes import TEMPORARY_BYTES, plan_device_bytes
from memevolve_gpu.index.faiss_support import load_faiss
from memevolve_gpu.index.registry import build
from memevolve_gpu.types import FloatArray, IndexPlan, IntArray, Precision, SearchParams

# The tests of the contract and their cases, collected here as if they were written here.
globals().update({name: found for name, found in vars(contract).items() if name.startswith("test_")})
case, index_preferred = contract.case, contract.index_preferred
pytest_generate_tests = contract.pytest_generate_tests  # pairs of kind and metric for those that take a case


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    need_engine("faiss")


@pytest.fixture
def card() -> None:
    """Takes the place of the stand-in: the real card needs nothing."""


@pytest.fixture(scope="module")
def shared_card(_engine: None) -> None:
    """The same for the module."""


REHEARSED = Hooks.tensors == "cpu"
"""On a stand-in: fewer rows."""


def plan_of(kind: str, n: int, precision: Precision = "float32", nlist: int = 256) -> IndexPlan:
    return IndexPlan(kind, nlist if kind == "ivf" else 0, precision=precision, engine="faiss", device="cuda:0")  # type: ignore[arg-type]


def allocated() -> int:
    """Bytes that faiss says it holds on the device for this process, temporary memory included."""
    kinds = resources_of("cuda:0").resources.getMemoryInfo().get(0, {})
    return sum(int(size) for _, size in kinds.values())


def same_neighbours(found: IntArray, truth: IntArray) -> float:
    """Share of the true neighbours that were found."""
    pairs = zip(found.tolist(), truth.tolist(), strict=True)
    return float(np.mean([len(set(ours) & set(theirs)) / len(theirs) for ours, theirs in pairs]))


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_real_queries_are_answered_as_the_cpu_answers_them(precision: Precision, shared_data: Path) -> None:
    vectors = np.load(shared_data / "tldr_minilm_f16.npy").astype(np.float32)
    for name in ("tldr_queries", "ood_queries"):
        queries = np.load(shared_data / f"{name}_minilm_f16.npy").astype(np.float32)
        index = build(plan_of("exact", len(vectors), precision), rows_of(vectors), "l2", seed=1)
        distances, found = index.search(queries, 10, SearchParams())
        truth = index.table.scan(queries, 10)
        assert same_neighbours(found, truth[1]) >= 0.999
        np.testing.assert_allclose(distances, truth[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_real_queries_find_their_neighbours_in_lists(precision: Precision, shared_data: Path) -> None:
    vectors = np.load(shared_data / "tldr_minilm_f16.npy").astype(np.float32)
    queries = np.load(shared_data / "tldr_queries_minilm_f16.npy").astype(np.float32)
    truth = exact_scan(queries, vectors, 10, "l2")[1]
    index = build(plan_of("ivf", len(vectors), precision), rows_of(vectors), "l2", seed=1)
    recalls = [same_neighbours(index.search(queries, 10, SearchParams(nprobe=n))[1], truth) for n in (8, 64, 256)]
    assert recalls == sorted(recalls)
    assert recalls[1] >= 0.93
    assert recalls[2] >= (0.97 if precision == "int8" else 0.999)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_predicted_bytes_are_what_the_device_reports(kind: str, precision: Precision, shared_data: Path) -> None:
    """Of real embeddings, repeated with noise: how unequal lists are decides how many pages they take."""
    real = np.load(shared_data / "tldr_minilm_f16.npy").astype(np.float32)
    n, dim = 60_000 if REHEARSED else 300_000, real.shape[1]
    vectors = np.resize(real, (n, dim))
    vectors += np.random.default_rng(1).standard_normal((n, dim), dtype=np.float32) * np.float32(0.02)
    nlist = n // 293
    plan = plan_of(kind, n, precision, nlist=nlist)
    # The same on fewer rows first: CUDA loads the code of kernels when they are first launched, and keeps it.
    first = build(plan_of(kind, 40_000, precision, nlist=nlist), rows_of(vectors[:40_000]), "l2", seed=1)
    first.search(vectors[:100], 10, SearchParams())
    rows = rows_of(vectors)
    index: Index | None = None
    gc.collect()
    before, ours = free_bytes(), allocated()
    index = build(plan, rows, "l2", seed=1)
    after, held = free_bytes(), allocated() - ours
    predicted = plan_device_bytes(plan, n, dim) - TEMPORARY_BYTES
    print(f"{kind} {precision}: predicted {predicted}, said {index.device_bytes}, faiss {held}, card {before - after}")
    assert index.device_bytes == pytest.approx(predicted, rel=0.1)
    widths = {"float32": 4, "float16": 2, "int8": 2} if kind == "exact" else {"float32": 2, "float16": 2, "int8": 1}
    least = n * dim * widths[precision]
    assert least <= held <= 1.02 * index.device_bytes, "faiss knows nothing of pages"
    assert before - after == pytest.approx(predicted, rel=0.1)
    del index
    gc.collect()
    assert free_bytes() >= before - (16 << 20), "what a body held is given back"
    assert first.device == "cuda:0"


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_large_batches_are_tiled(kind: str) -> None:
    vectors = embeddings(10_000 if REHEARSED else 200_000, 384)
    index = build(plan_of(kind, len(vectors), nlist=len(vectors) // 195), rows_of(vectors), "cosine", seed=1)
    queries = embeddings(3000, 384, seed=2)
    params = SearchParams(nprobe=1024)
    distances, _ = index.search(queries, 10, params)
    single = np.concatenate([index.search(query[None], 10, params)[0] for query in queries[::100]])
    np.testing.assert_allclose(distances[::100], single, atol=1e-5)
    assert index.incidents() == []


def test_many_threads_and_bodies_share_the_device() -> None:
    vectors = embeddings(20_000, 96)
    indexes = [
        build(plan_of(kind, len(vectors), nlist=64), rows_of(vectors), "l2", seed=1) for kind in ("exact", "ivf")
    ]
    mask = RowFilter(np.arange(len(vectors)) % 3 > 0)

    def fetch(row: int) -> bool:
        index = indexes[row % 2]
        found = index.search(vectors[row : row + 1], 5, SearchParams(nprobe=64), mask if row % 3 else None)[1][0]
        build(plan_of("exact", 500), rows_of(vectors[:500]), "l2", seed=1)
        return int(found[0]) == row

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(fetch, range(600)))
    assert all(index.incidents() == [] and index.device == "cuda:0" for index in indexes)


def test_faiss_has_what_its_stand_in_has() -> None:
    faiss: Any = load_faiss()
    for name, fields in stand_in.FIELDS.items():
        config = getattr(faiss, name)()
        assert {field: getattr(config, field) for field in fields} == fields
        assert config.device == 0
        assert isinstance(config.use_cuvs, bool)
        with pytest.raises(AttributeError):
            _ = config.no_such_field
    gpu_resources = resources_of("cuda:0")
    with gpu_resources.building("looking", 0, keep=False) as handle:
        handle.make("GpuIndexFlat", 4, faiss.METRIC_L2, useFloat16=True)
        assert [name for name in stand_in.HIDDEN if hasattr(handle.engine, name)] == []
        assert handle.engine.this.own()
    assert faiss.INDICES_32_BIT == 2


def test_temporary_memory_is_what_we_asked_for() -> None:
    index = build(plan_of("exact", 100), rows_of(embeddings(100, 16)), "l2", seed=1)
    kinds = resources_of("cuda:0").resources.getMemoryInfo()[0]
    if "TemporaryMemoryBuffer" in kinds:
        assert kinds["TemporaryMemoryBuffer"][1] == pytest.approx(TEMPORARY_BYTES, rel=0.01)
    assert allocated() >= TEMPORARY_BYTES + index.device_bytes


@pytest.mark.parametrize("kind", ["exact", "ivf"])
@pytest.mark.parametrize(("k", "lists"), [(2048, 64), (2049, 64), (10, 3000)])
def test_limits_of_faiss_are_the_hosts_to_serve(kind: str, k: int, lists: int) -> None:
    vectors = embeddings(20_000, 32)
    index = build(plan_of(kind, len(vectors), nlist=lists), rows_of(vectors), "l2", seed=1)
    distances, found = index.search(vectors[:5], k, SearchParams(nprobe=lists))
    assert recall(distances, nearest(vectors[:5], vectors, "l2", k)) >= 0.999
    assert (found >= 0).all()
    assert index.incidents() == []
    assert index.device == "cuda:0"


@pytest.mark.parametrize("kind", ["exact", "ivf"])
@pytest.mark.parametrize("deleted", [1, 400, 3000, 19_990])
def test_deleted_rows_are_passed_over(kind: str, deleted: int) -> None:
    vectors = embeddings(20_000, 64)
    index = build(plan_of(kind, len(vectors), nlist=64), rows_of(vectors), "l2", seed=1)
    for row in range(3):
        near = ((vectors - vectors[row]) ** 2).sum(axis=1).argsort()
        mask = np.ones(len(vectors), np.bool_)
        mask[near[:deleted]] = False
        answer = index.search(vectors[row : row + 1], 10, SearchParams(nprobe=64), RowFilter(mask))
        check_answer(index, vectors[row : row + 1], vectors, answer, RowFilter(mask))
        assert recall(answer[0], nearest(vectors[row : row + 1], vectors, "l2", 10, RowFilter(mask))) >= 0.99
    assert index.incidents() == []


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("largest", [0.001, 1.0, 1000.0, 60_000.0])
def test_squares_that_leave_float16_lose_no_rows(largest: float, precision: Precision) -> None:
    vectors = clustered(np.random.default_rng(1), 5000, 48, "l2")
    vectors *= np.float32(1 / np.abs(vectors).max())
    vectors[::10] *= np.float32(largest)
    index = build(plan_of("exact", len(vectors), precision), rows_of(vectors), "l2", seed=1)
    assert index.search(vectors[:200:10], 1, SearchParams())[1][:, 0].tolist() == list(range(0, 200, 10))


def test_lists_leave_nothing_on_the_host() -> None:
    vectors = embeddings(5000, 64)
    index = build(plan_of("ivf", len(vectors), nlist=64), rows_of(vectors), "l2", seed=1)
    assert isinstance(index, FaissGpuIndex)
    assert index.handle is not None
    assert index.handle.engine.referenced_objects == []
    gc.collect()
    assert int(index.search(vectors[:1], 1, SearchParams())[1][0, 0]) == 0


@pytest.fixture
def handle() -> tuple[Index, FloatArray]:
    """An index on the device, and its vectors."""
    vectors = embeddings(50_000, 384)
    return build(plan_of("exact", len(vectors)), rows_of(vectors), "l2", seed=1), vectors


@pytest.fixture(params=["asked first", "refused by faiss"])
def _reading(request: pytest.FixtureRequest) -> Iterator[None]:
    """Free bytes are known beforehand, or not."""
    use_free_bytes((lambda _: free_bytes()) if request.param == "asked first" else None)
    yield
    use_free_bytes(None)


@pytest.mark.usefixtures("_reading")
def test_a_full_card_refuses_bodies_and_answers_from_those_it_holds(handle: tuple[Index, FloatArray]) -> None:
    index, vectors = handle
    index.search(vectors[:2000], 1, SearchParams())
    with filled_card(leave=50_000 * 384):
        for kind in ("exact", "ivf"):
            with pytest.raises(DeviceError) as caught:
                build(plan_of(kind, len(vectors)), rows_of(vectors), "l2", seed=1)
            assert caught.value.cause == "out-of-memory"
        found = index.search(vectors[:2000], 1, SearchParams())[1][:, 0]
        assert found.tolist() == list(range(2000))
        assert index.device == "cuda:0"
    again = build(plan_of("exact", len(vectors)), rows_of(vectors), "l2", seed=1)
    assert again.search(vectors[:10], 1, SearchParams())[1][:, 0].tolist() == list(range(10))
    assert again.device == "cuda:0"


@pytest.mark.usefixtures("_reading")
def test_scratch_that_does_not_fit_cuts_batches_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly any temporary memory, and tiles cut for much: faiss allocates the rest, which a full card refuses."""
    monkeypatch.setattr(owner_module, "_by_device", {})
    monkeypatch.setattr(owner_module, "TEMPORARY_BYTES", 1 << 20)
    vectors = embeddings(50_000, 64)
    index = build(plan_of("exact", len(vectors)), rows_of(vectors), "l2", seed=1)
    assert index.search(vectors[:2000], 1, SearchParams())[1][:, 0].tolist() == list(range(2000))
    assert index.incidents() == []
    with filled_card():
        assert index.search(vectors[:2000], 1, SearchParams())[1][:, 0].tolist() == list(range(2000))
        told = {incident.cause for incident in index.incidents()}
        assert told == ({"out-of-memory"} if Hooks.filled is None else set())
    assert index.search(vectors[:10], 1, SearchParams())[1][:, 0].tolist() == list(range(10))
    del index
    gc.collect()


def test_resources_refused_by_a_full_card_are_made_when_it_has_room(
    handle: tuple[Index, FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their temporary memory is the last thing that faiss sets up, and never looked at again if that fails."""
    index, vectors = handle
    index.search(vectors[:10], 1, SearchParams())
    monkeypatch.setattr(owner_module, "_by_device", {})
    with filled_card(leave=400 << 20):
        for _ in range(2):
            with pytest.raises(DeviceError) as caught:
                build(plan_of("exact", 1000), rows_of(vectors[:1000]), "l2", seed=1)
            assert caught.value.cause == "out-of-memory"
    again = build(plan_of("exact", 1000), rows_of(vectors[:1000]), "l2", seed=1)
    assert again.search(vectors[:10], 1, SearchParams())[1][:, 0].tolist() == list(range(10))
    assert again.device == "cuda:0"
    del again
    gc.collect()


def test_a_body_without_room_leaves_none_taken(handle: tuple[Index, FloatArray]) -> None:
    index, vectors = handle
    del index
    gc.collect()
    with resources_of("cuda:0").using("looking"):
        pass
    before = allocated()
    with filled_card(leave=50_000 * 384):  # half of the lists, a quarter of the flat index
        for kind in ("exact", "ivf"):
            with pytest.raises(DeviceError) as caught:
                build(plan_of(kind, len(vectors)), rows_of(vectors), "l2", seed=1)
            assert allocated() == before, f"{kind}: kept, though {caught.value} is all there is"


def test_searches_do_not_wait_for_a_training(handle: tuple[Index, FloatArray]) -> None:
    index, vectors = handle
    inside, leave = threading.Event(), threading.Event()

    def train() -> None:
        with resources_of("cuda:0").building("training", 0, keep=False):
            inside.set()
            leave.wait(60)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        assert inside.wait(60)
        assert index.search(vectors[:10], 1, SearchParams())[1][:, 0].tolist() == list(range(10))
        assert not leave.is_set()
    finally:
        leave.set()
        trainer.join()
    assert index.incidents() == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_after_a_fork_the_host_answers(kind: str) -> None:
    vectors = embeddings(5000, 64)
    index = build(plan_of(kind, len(vectors), nlist=64), rows_of(vectors), "l2", seed=1)
    index.search(vectors[:10], 1, SearchParams())

    def child() -> None:
        assert index.search(vectors[:20], 1, SearchParams())[1][:, 0].tolist() == list(range(20))
        with pytest.raises(DeviceError) as refused:
            build(plan_of("exact", 100), rows_of(vectors[:100]), "l2", seed=1)
        assert (index.device, refused.value.cause) == ("cpu", "fork")

    assert as_child(child) == 0
    assert index.search(vectors[:20], 1, SearchParams())[1][:, 0].tolist() == list(range(20))
    assert index.device == "cuda:0"
