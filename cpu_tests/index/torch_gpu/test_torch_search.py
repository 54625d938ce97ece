"""A torch index beyond the contract: tiles, masks, float32 rows, queries from a device, threads, real data."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index.torch_gpu.conftest import CARD
from oracle import METRICS, check_answer, contents, rows_of
from torch_gpu_kit import DIM, N, card_plan, fails_when, on_card, some

from memevolve_gpu.errors import EngineError
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.exact_scan import exact_scan
from memevolve_gpu.index.faiss_support import load_faiss
from memevolve_gpu.index.registry import build, from_parts
from memevolve_gpu.index.torch_gpu import index as index_module
from memevolve_gpu.index.torch_gpu import kernel_ops, search
from memevolve_gpu.index.torch_gpu.index import TorchIndex
from memevolve_gpu.index.torch_gpu.ivf import _step as kmeans_step
from memevolve_gpu.index.torch_gpu.ivf import norms_of, train
from memevolve_gpu.index.torch_gpu.kernel_ops import Operations
from memevolve_gpu.index.torch_gpu.memory_accounting import SCRATCH, WORKSPACE, Account, predicted_bytes, resident_bytes
from memevolve_gpu.types import FloatArray, IntArray, Metric, Precision, SearchParams
from memevolve_gpu.utils.vectors import DeviceQueries

KINDS = ("exact", "ivf")
LISTS = SearchParams(nprobe=8)
LEAST: dict[Precision, float] = {"float32": 0.999, "float16": 0.995, "int8": 0.97}
"""Recall@10 of what each precision keeps; the data lie in float16, where rounding to it loses nothing."""


def host_way(index: TorchIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make scans on the host fail the test."""

    def scan(*_: object) -> None:
        pytest.fail("the host was asked")

    monkeypatch.setattr(type(index.table), "scan", scan)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_on_the_device_decide_as_those_of_the_host_do(
    kind: str, metric: Metric, card: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = some(1, metric=metric), some(2, 60, metric=metric)
    by_host, by_device = on_card(kind, vectors, metric), on_card(kind, vectors, metric, float32_rows=True)
    assert by_device.device_bytes - by_host.device_bytes == vectors.nbytes
    expected = by_host.search(queries, 10, LISTS)
    monkeypatch.setattr(type(by_device.table), "rerank", None)
    for mask in (None, RowFilter(np.arange(N) % 3 > 0)):
        answer = by_device.search(queries, 10, LISTS, mask)
        check_answer(by_device, queries, vectors, answer, mask)
        if mask is None:
            np.testing.assert_allclose(answer[0], expected[0], rtol=1e-5, atol=1e-5)
            assert (answer[1] == expected[1]).mean() > 0.999


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("float32_rows", [False, True])
def test_a_batch_is_cut_so_that_scratch_stays_bounded(
    kind: str, card: Account, monkeypatch: pytest.MonkeyPatch, *, float32_rows: bool
) -> None:
    vectors, queries = some(1), some(2, 50)
    index = on_card(kind, vectors, float32_rows=float32_rows)
    whole = index.search(queries, 10, LISTS)
    asked = fails_when(monkeypatch, lambda _: None)
    monkeypatch.setattr(search, "SCRATCH", 100_000)
    parts = index.search(queries, 10, LISTS)
    assert len(asked) > 2
    assert sum(asked) == 50
    assert max(asked) - min(asked) <= len(asked), "no part is a small rest"
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_kept_while_they_are_used(kind: str, card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries, index = some(1), some(2, 30), on_card(kind, some(1))
    host_way(index, monkeypatch)
    masks = [RowFilter(np.arange(N) % 12 != rest) for rest in range(12)]
    for mask in [*masks, *masks[::-1]]:
        for params in (LISTS, SearchParams()):
            answer = index.search(queries, 10, params, mask)
            check_answer(index, queries, vectors, answer, mask)
    assert len(index._masks._kept) <= 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_nothing_that_is_given_need_be_writable(kind: str, precision: Precision, card: Account) -> None:
    vectors, queries, rows = some(1), some(2, 30), np.arange(N) % 2 == 0
    for array in (vectors, queries, rows):
        array.flags.writeable = False
    index = on_card(kind, vectors, precision=precision)
    parts = {name: array.copy() for name, array in contents(index).items()}
    for array in parts.values():
        array.flags.writeable = False
    again = from_parts(index.plan, "l2", parts)
    answer = again.search(queries, 10, LISTS, RowFilter(rows))
    check_answer(again, queries, vectors, answer, RowFilter(rows), tolerance=2e-4 if precision == "float32" else 0.05)


@pytest.mark.parametrize("few", [1, 5])
def test_lists_that_hold_too_few_allowed_rows_are_not_the_end(
    few: int, card: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = some(1), some(2, 30)
    index = on_card("ivf", vectors)
    far = np.zeros(N, np.bool_)
    far[np.argsort(((vectors - queries[0]) ** 2).sum(1))[-N // 4 :]] = True
    host_way(index, monkeypatch)
    monkeypatch.setattr(index_module, "_DEVICE_CALL", 0.0)
    answer = index.search(queries[:few], 10, SearchParams(nprobe=1), RowFilter(far))
    check_answer(index, queries[:few], vectors, answer, RowFilter(far))
    assert (answer[1] >= 0).all()


class Lent:
    """An array of another library: it can only be had through DLPack."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)

    def __dlpack__(self, **how: Any) -> Any:
        return self._tensor.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        pytest.fail("it was brought to the host")


@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_lie_on_the_device_stay_there(
    kind: str, card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = some(1), some(2, 30)
    index = on_card(kind, vectors, float32_rows=True)
    expected = index.search(queries, 10, LISTS)
    half = RowFilter(np.arange(N) % 2 == 0)
    masked = index.search(queries, 10, LISTS, half)
    host_way(index, monkeypatch)
    tensor = torch.from_numpy(queries)
    for given in (tensor, tensor.double(), tensor.clone().requires_grad_(), Lent(tensor), DeviceQueries(tensor)):
        answer = index.search(given, 10, LISTS)
        assert np.array_equal(answer[1], expected[1])
        assert np.array_equal(answer[0], expected[0])
        assert np.array_equal(index.search(given, 10, LISTS, half)[1], masked[1])
        assert np.array_equal(index.search(given, 10, LISTS, RowFilter(np.ones(N, np.bool_)))[1], expected[1])


def test_queries_on_a_device_are_checked_like_others(card: Account, torch: Any) -> None:
    index = on_card("exact", some(1))
    queries = torch.from_numpy(some(2, 4))
    with pytest.raises(ValueError, match="queries must be"):
        index.search(queries[:, :5], 3, LISTS)
    with pytest.raises(ValueError, match="k at least 1"):
        index.search(queries, 0, LISTS)
    with pytest.raises(ValueError, match="row_filter covers 3 rows"):
        index.search(queries, 3, LISTS, RowFilter(np.ones(3, np.bool_)))
    assert index.search(queries[:0], 3, LISTS)[1].shape == (0, 3)
    nothing = index.search(queries, 3, LISTS, RowFilter(np.zeros(N, np.bool_)))
    assert (nothing[1] == -1).all()
    exact = index.search(DeviceQueries(queries), 3, SearchParams(exact=True))
    assert np.array_equal(exact[1], index.search(queries.numpy(), 3, SearchParams(exact=True))[1])


def test_the_settings_of_the_calling_thread_do_no_harm(torch: Any) -> None:
    vectors, queries = some(1), some(2, 30)
    plan = card_plan("ivf", vectors)
    with torch.inference_mode():
        index = build(type(plan)("ivf", nlist=plan.nlist, engine="torch"), rows_of(vectors), "l2", seed=7)
        within = index.search(queries, 10, LISTS)
    torch.set_default_dtype(torch.float64)
    try:
        outside = index.search(queries, 10, LISTS)
        again = build(index.plan, rows_of(vectors), "l2", seed=7).search(queries, 10, LISTS)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = index.search(queries, 10, LISTS)
        recast = build(index.plan, rows_of(vectors), "l2", seed=7).search(queries, 10, LISTS)
    for other in (outside, again, cast, recast):
        assert np.array_equal(within[1], other[1])
        assert np.array_equal(within[0], other[0])


@pytest.mark.parametrize("tile", [1, 5000, 1 << 24])
def test_references_keep_to_their_tiles(tile: int, card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = some(1), some(2, 9)
    monkeypatch.setattr(index_module, "_DEVICE_CALL", 0.0)
    expected = [on_card(kind, vectors).search(queries, 10, SearchParams(nprobe=3)) for kind in KINDS]
    monkeypatch.setattr(kernel_ops, "_TILE", tile)
    for kind, answer in zip(KINDS, expected, strict=True):
        index = on_card(kind, vectors)
        for some_queries in (queries, queries[:1]):
            found = index.search(some_queries, 10, SearchParams(nprobe=3))
            assert np.array_equal(found[1], answer[1][: len(some_queries)])


def test_threads_with_masks_batches_and_faults(card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = some(1)
    indexes = [on_card(kind, vectors) for kind in KINDS]
    mask = RowFilter(np.arange(N) % 5 > 0)
    jobs = [
        (index, some(seed, nq), row_filter)
        for index in indexes
        for seed in range(5)
        for nq in (17, 40)
        for row_filter in (None, mask)
    ]
    expected = [index.search(queries, 10, LISTS, row_filter) for index, queries, row_filter in jobs]
    lock = iter(range(10_000))
    fails_when(monkeypatch, lambda _: MemoryError() if next(lock) % 7 == 0 else None)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda job: job[0].search(job[1], 10, LISTS, job[2]), jobs))
    for (index, queries, row_filter), answer, (distances, _) in zip(jobs, answers, expected, strict=True):
        check_answer(index, queries, vectors, answer, row_filter)
        assert (answer[0] <= distances + 1e-3).all(), "as good as without faults; the host's answers may be better"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("float32_rows", [False, True])
def test_predicted_bytes_are_those_that_are_held(
    kind: str, precision: Precision, card: Account, *, float32_rows: bool
) -> None:
    for n, dim in ((2000, 48), (5000, 100)):
        vectors = some(1, n, dim)
        index = on_card(kind, vectors, precision=precision, float32_rows=float32_rows)
        wide = float32_rows and precision == "float32"
        predicted = predicted_bytes(n, dim, precision, nlist=index.nlist, float32_rows=wide)
        assert index.device_bytes == pytest.approx(predicted - SCRATCH - WORKSPACE, rel=0.1)
        held = resident_bytes(n, dim, precision, nlist=index.nlist, float32_rows=wide)
        assert index.device_bytes == pytest.approx(held, rel=0.1)


def test_a_plan_with_room_gets_float32_rows(card: Account) -> None:
    vectors = some(1)
    plan = card_plan("exact", vectors)
    for extra, float32_rows in ((-1, False), (0, True)):
        room = predicted_bytes(N, DIM, "float32", float32_rows=True) + extra
        index = build(
            type(plan)("exact", engine="torch", device=CARD, device_bytes=room), rows_of(vectors), "l2", seed=1
        )
        assert isinstance(index, TorchIndex)
        assert (index._ready().rows.float32_rows is not None) == float32_rows


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("centroids", lambda a: a[:-1]),
        ("centroids", lambda a: np.full_like(a, np.nan)),
        ("assignment", lambda a: a + 1000),
        ("assignment", lambda a: a - 1000),
        ("assignment", lambda a: a[1:]),
        ("scale", lambda a: a * 0),
        ("scale", lambda a: np.zeros(0, np.float32)),
        ("centre", lambda a: a * np.inf),
        ("centre", lambda a: a.astype(np.float16)),
    ],
)
def test_parts_that_make_no_sense_are_refused(card: Account, name: str, damage: Any) -> None:
    index = on_card("ivf", some(1))
    with np.errstate(invalid="ignore"):
        parts = contents(index) | {name: damage(contents(index)[name])}
    with pytest.raises(EngineError, match="rebuild"):
        from_parts(index.plan, "l2", parts)


def test_kmeans_does_as_well_as_that_of_faiss(torch: Any) -> None:
    points = some(5, 6000, 32).astype(np.float16)
    operations = Operations(torch.device("cpu"), pytest.fail)
    seen: list[float] = []
    x = torch.from_numpy(points)
    found = train(x, 150, seed=3, operations=operations, iterations=20, progress=seen.append)
    assert torch.equal(found, train(x, 150, seed=3, operations=operations, iterations=20))
    assert not torch.equal(found, train(x, 150, seed=4, operations=operations, iterations=20))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    theirs = load_faiss().Kmeans(32, 150, niter=20, seed=3)
    theirs.train(points.astype(np.float32))
    objectives = [
        exact_scan(points.astype(np.float32), own, 1, "l2")[0].sum() for own in (found.numpy(), theirs.centroids)
    ]
    assert objectives[0] <= 1.03 * objectives[1], "two runs of faiss differ by as much"


def test_kmeans_gives_empty_lists_half_of_a_large_one(torch: Any) -> None:
    points = np.repeat(np.eye(16, dtype=np.float16), 100, axis=0)
    points += 0.01 * np.random.default_rng(1).standard_normal(points.shape).astype(np.float16)
    operations = Operations(torch.device("cpu"), pytest.fail)
    x = torch.from_numpy(points)
    centroids = torch.cat([x[:1].float().repeat(30, 1), x[::160].float()])
    labels, _ = operations.assign(x, centroids.half(), norms_of(centroids.half()))
    assert len(labels.unique()) <= 11
    for _ in range(6):
        centroids, _ = kmeans_step(x, centroids, operations)
    labels, _ = operations.assign(x, centroids.half(), norms_of(centroids.half()))
    assert len(labels.unique()) >= 30


@pytest.fixture(scope="module")
def real(shared_data: Path) -> tuple[FloatArray, dict[str, FloatArray]]:
    vectors = np.load(shared_data / "tldr_minilm_f16.npy")[:12_000].astype(np.float32)
    names = {"in": "tldr_queries_minilm_f16.npy", "out": "ood_queries_minilm_f16.npy"}
    return vectors, {key: np.load(shared_data / name)[::2].astype(np.float32) for key, name in names.items()}


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_exact_is_exact_on_real_queries(
    precision: Precision, real: tuple[FloatArray, dict[str, FloatArray]], card: Account
) -> None:
    vectors, queries = real
    index = on_card("exact", vectors, precision=precision)
    for own in queries.values():
        truth, expected = exact_scan(own, vectors, 10, "l2")
        distances, positions = index.search(own, 10, SearchParams())
        assert overlap(positions, expected) >= LEAST[precision]
        if precision == "float32":
            np.testing.assert_allclose(distances, truth, rtol=1e-4, atol=1e-5)


def overlap(found: IntArray, expected: IntArray) -> float:
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    return sum(hits) / expected.size


def test_lists_reach_their_recall_on_real_queries(
    real: tuple[FloatArray, dict[str, FloatArray]], card: Account
) -> None:
    vectors, queries = real
    plan = card_plan("ivf", vectors)
    index = build(type(plan)("ivf", nlist=128, engine="torch", device=CARD), rows_of(vectors), "l2", seed=3)
    assert sum(index.list_sizes) == len(vectors)
    for name, own, target in (("in", queries["in"], 0.95), ("out", queries["out"], 0.9)):
        _, expected = exact_scan(own, vectors, 10, "l2")
        assert overlap(index.search(own, 10, SearchParams(nprobe=40))[1], expected) >= target, name
