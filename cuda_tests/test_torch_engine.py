"""The torch engine on a real GPU: kernels, answers, memory, and what goes wrong there."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_tests.torch_kit import (
    DEVICE,
    SEED,
    alone,
    here,
    host_is_not_asked,
    need_card,
    on_card,
    overlap,
    vectors_of,
)
from oracle import contents, rows_of

from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.exact_scan import exact_scan
from memevolve_gpu.index.registry import build, from_parts
from memevolve_gpu.index.torch_gpu import index as index_module
from memevolve_gpu.index.torch_gpu import kernel_ops
from memevolve_gpu.index.torch_gpu.device_rows import GROUP, DeviceRows, Quantization, Queries, padded_groups
from memevolve_gpu.index.torch_gpu.index import TorchIndex
from memevolve_gpu.index.torch_gpu.ivf import train
from memevolve_gpu.index.torch_gpu.kernel_ops import Lists, ListWork, Operations
from memevolve_gpu.index.torch_gpu.memory_accounting import SCRATCH, WORKSPACE, account_of, predicted_bytes
from memevolve_gpu.index.torch_gpu.runtime import kernel_errors
from memevolve_gpu.types import FloatArray, IndexPlan, IntArray, Metric, Precision, SearchParams


@pytest.fixture
def operations(torch: Any) -> Operations:
    """Operations that fail the test when a kernel gives way to its reference."""
    return Operations(torch.device(here()), pytest.fail)


# ----------------------------------------------------------------------------------------------------------- kernels


def rows_on_device(torch: Any, n: int, dim: int, *, int8: bool) -> DeviceRows:
    vectors, card = vectors_of(n, dim), torch.device(here())
    quantization = Quantization.around(vectors, vectors.min(0), vectors.max(0), centred=not int8)
    shape = (n, dim, padded_groups(-(-n // GROUP)))
    rows = DeviceRows.empty("l2", quantization, shape, card, int8=int8, float32_rows=False)
    rows.put(0, quantization.enter(vectors, rows.columns, card))
    return rows


def assert_close(got: Any, want: Any) -> None:
    """Equal but for the order of a float32 sum, relative to the largest; infinities in the same places."""
    got, want = got.cpu().numpy(), want.cpu().numpy()
    assert np.array_equal(np.isinf(got), np.isinf(want))
    finite = np.isfinite(want)
    assert np.isfinite(got[finite]).all()
    assert np.abs(got[finite] - want[finite]).max() <= 1e-4 * max(1.0, np.abs(want[finite]).max())


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dim", [5, 100, 384, 768, 1100, 1536, 3072])
@pytest.mark.parametrize("nq", [1, 3, 16, 33, 64, 200])
def test_minima_and_rescore(torch: Any, operations: Operations, nq: int, dim: int, *, int8: bool) -> None:
    rows = rows_on_device(torch, 5000, dim, int8=int8)
    queries = Queries.prepare(torch.from_numpy(vectors_of(nq, dim, 1)).to(here()), rows)
    q = (queries.wide, queries.factor) if nq == 1 else queries.narrow(rows)
    assert_close(operations.minima(rows, *q), kernel_ops.minima(rows, *q))
    chosen = torch.from_numpy(np.random.default_rng(SEED).integers(-1, rows.groups, (nq, 5))).to(here())
    wide = (queries.wide, queries.factor)
    scores = operations.rescore(rows, *wide, chosen)
    assert_close(scores, kernel_ops.rescore(rows, *wide, chosen))
    near = torch.topk(scores, 40, dim=1, largest=False)
    assert torch.equal(operations.locate(rows, chosen, near), kernel_ops.locate(rows, chosen, near))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("n", "dim", "nq"), [(5000, 384, 1024), (5000, 384, 257), (33, 768, 40), (5000, 768, 300), (900, 1536, 70)]
)
def test_every_form_of_the_scan_of_a_batch(
    torch: Any, operations: Operations, n: int, dim: int, nq: int, *, int8: bool
) -> None:
    """Those that hold their queries, too; a form that a card has no room for may refuse, and is left out by a build."""
    need_card()
    rows = rows_on_device(torch, n, dim, int8=int8)
    q = Queries.prepare(torch.from_numpy(vectors_of(nq, dim, 1)).to(here()), rows).narrow(rows)
    want = kernel_ops.minima(rows, *q)
    for shape in kernel_ops.many_shapes(rows.columns, rows.x.element_size(), kernel_ops._usual(nq)):
        found, refused = None, ""
        try:
            found = operations._minima_many(rows, *q, shape)
        except kernel_errors() as error:
            refused = str(error)
        if found is None:
            assert "shared memory" in refused or "resource" in refused, (shape, refused)
        else:
            assert_close(found, want)


@pytest.mark.parametrize(("nq", "width", "want"), [(1, 31_256, 16), (1024, 31_256, 16), (3, 40, 40), (200, 512, 32)])
def test_one_kernel_selects_the_best_columns(
    torch: Any, operations: Operations, nq: int, width: int, want: int
) -> None:
    need_card()
    values = torch.from_numpy(np.random.default_rng(SEED).standard_normal((nq, width)).astype(np.float32)).to(here())
    values[:, ::3] = float("inf")
    near = operations._select(values, want)
    assert torch.equal(near.values, torch.sort(values, dim=1).values[:, :want])
    assert torch.equal(values.gather(1, near.indices), near.values)


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_a_build_measures_and_trusts_its_kernels(torch: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has a fastest form afterwards, and no kernel was found to be wrong."""
    need_card()
    monkeypatch.setattr(kernel_ops, "_chosen", {})
    monkeypatch.setattr(kernel_ops, "_verified", set())
    vectors = vectors_of(60_000, 384)
    plan = IndexPlan(kind, 64 if kind == "ivf" else 0, engine="torch", device="cuda:0")  # type: ignore[arg-type]
    index = build(plan, rows_of(vectors), "l2", seed=1)
    print({key: kernel_ops._chosen[key] for key in sorted(kernel_ops._chosen, key=str)})
    assert {key[-1] for key in kernel_ops._chosen if key[0] == "minima"} == set(kernel_ops.MEASURED_QUERIES)
    assert {key[0] for key in kernel_ops._chosen} == {"minima", "select"}
    assert index.incidents() == []


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("nprobe", [1, 20, 50])
def test_the_lists_of_one_query(torch: Any, operations: Operations, nprobe: int, *, int8: bool) -> None:
    rng = np.random.default_rng(SEED)
    sizes = [int(size) for size in rng.integers(0, 12, 50)]
    rows = rows_on_device(torch, GROUP * sum(sizes) - 7, 384, int8=int8)
    query = Queries.prepare(torch.from_numpy(vectors_of(1, 384, 1)).to(here()), rows)
    probed = torch.from_numpy(rng.permutation(50)[None, :nprobe]).to(here())
    given = (rows, query.wide, query.factor, Lists.of(sizes, torch.device(here())), probed)
    best, groups = operations.list_minima_one(*given)
    plain = kernel_ops.list_minima_one(*given)
    assert torch.equal(groups, plain[1])
    assert_close(best, plain[0])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("nq", "nprobe"), [(1, 1), (1, 20), (9, 3), (70, 20), (500, 7)])
def test_list_minima(torch: Any, operations: Operations, nq: int, nprobe: int, *, int8: bool) -> None:
    rng = np.random.default_rng(SEED)
    sizes = [int(size) for size in rng.integers(0, 12, 50)]
    rows = rows_on_device(torch, GROUP * sum(sizes) - 7, 384, int8=int8)
    queries = Queries.prepare(torch.from_numpy(vectors_of(nq, 384, 1)).to(here()), rows)
    probed = torch.from_numpy(np.stack([rng.permutation(50)[:nprobe] for _ in range(nq)])).to(here())
    work = ListWork.of(Lists.of(sizes, torch.device(here())), probed)
    q = queries.narrow(rows)
    assert_close(operations.list_minima(rows, *q, work), kernel_ops.list_minima(rows, *q, work))


@pytest.mark.parametrize(("m", "dim", "nlist"), [(20_000, 384, 300), (5, 16, 3), (3000, 768, 129), (700, 48, 1)])
def test_assign_and_sum_lists(torch: Any, operations: Operations, m: int, dim: int, nlist: int) -> None:
    x = torch.from_numpy(vectors_of(m, dim)).to(here()).half()
    centroids = x[:nlist].contiguous()
    norms = centroids.float().square().sum(1)
    labels, scores = operations.assign(x, centroids, norms)
    expected = kernel_ops.assign(x, centroids, norms)
    assert (labels == expected[0]).float().mean() >= 0.999
    assert_close(scores, expected[1])
    ordered = torch.sort(labels, stable=True)
    starts = torch.searchsorted(ordered.values, torch.arange(nlist + 1, dtype=torch.int32, device=here()))
    sums = operations.sum_lists(x, ordered.indices, starts)
    assert_close(sums, kernel_ops.sum_lists(x, ordered.indices, starts))
    assert torch.equal(sums, operations.sum_lists(x, ordered.indices, starts)), "equal bits each time"


def test_kmeans_reaches_the_objective_of_faiss(torch: Any, operations: Operations) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss is not installed, to compare with")
    points = vectors_of(60_000, 96)
    found = train(torch.from_numpy(points).to(here()).half(), 256, seed=1, operations=operations, iterations=25)
    theirs = faiss.Kmeans(96, 256, niter=25, seed=1)
    theirs.train(points)
    objectives = [float(exact_scan(points, own, 1, "l2")[0].sum()) for own in (found.cpu().numpy(), theirs.centroids)]
    assert objectives[0] <= 1.02 * objectives[1]


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("float32_rows", [False, True])
def test_exact_answers_as_the_cpu_does(
    torch: Any, metric: Metric, precision: Precision, monkeypatch: pytest.MonkeyPatch, *, float32_rows: bool
) -> None:
    vectors, queries = vectors_of(60_000, 384, metric=metric), vectors_of(300, 384, 2, metric)
    index = on_card("exact", vectors, metric, precision=precision, float32_rows=float32_rows)
    truth, expected = exact_scan(queries, np.ascontiguousarray(index.vectors), 10, metric)
    host_is_not_asked(index, monkeypatch)
    for nq in (300, 16, 3):
        distances, positions = index.search(queries[:nq], 10, SearchParams())
        assert overlap(positions, expected[:nq]) >= 0.999
        np.testing.assert_allclose(distances, truth[:nq], rtol=1e-3, atol=1e-4)
    for row in range(12):  # the plain way first, then recorded
        positions = index.search(queries[row : row + 1], 10, SearchParams())[1]
        assert overlap(positions, expected[row : row + 1]) >= 0.9
    assert index.incidents() == [], "single queries were recorded"
    if here() != "cpu":
        assert len(index._graphs._kept) == 1


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_lists_answer_as_on_the_cpu(
    torch: Any, metric: Metric, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = vectors_of(40_000, 128, metric=metric), vectors_of(200, 128, 2, metric)
    index = on_card("ivf", vectors, metric, precision=precision, nlist=100)
    parts = contents(index)
    on_cpu = from_parts(IndexPlan("ivf", nlist=100, engine="torch", precision=precision), metric, parts)
    host_is_not_asked(index, monkeypatch)
    mask = RowFilter(np.arange(len(vectors)) % 3 > 0)
    for nprobe in (1, 8, 40):
        params = SearchParams(nprobe=nprobe)
        for row_filter in (None, mask):
            expected = on_cpu.search(queries, 10, params, row_filter)[1]
            assert overlap(index.search(queries, 10, params, row_filter)[1], expected) >= 0.995
        single = np.concatenate([index.search(queries[row : row + 1], 10, params)[1] for row in range(20)])
        assert overlap(single, on_cpu.search(queries[:20], 10, params)[1]) >= 0.99
    assert index.incidents() == []


def test_real_queries_get_the_answers_of_the_oracle(torch: Any, shared_data: Path) -> None:
    vectors = np.load(shared_data / "tldr_minilm_f16.npy").astype(np.float32)
    exact, lists = on_card("exact", vectors), on_card("ivf", vectors, nlist=256)
    for name in ("tldr_queries", "ood_queries"):
        queries = np.load(shared_data / f"{name}_minilm_f16.npy")[:1000].astype(np.float32)
        _, expected = exact_scan(queries, vectors, 10, "l2")
        assert overlap(exact.search(queries, 10, SearchParams())[1], expected) >= 0.999
        assert overlap(lists.search(queries, 10, SearchParams(nprobe=96))[1], expected) >= 0.95


def test_masks_and_starved_lists(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = vectors_of(40_000, 128), vectors_of(50, 128, 2)
    for kind in ("exact", "ivf"):
        index = on_card(kind, vectors)
        for share in (0.9, 0.3, 0.02):
            mask = RowFilter(np.random.default_rng(SEED).random(len(vectors)) < share)
            _, expected = exact_scan(queries, vectors, 10, "l2", mask)
            with monkeypatch.context() as strict:
                host_is_not_asked(index, strict)
                for params in (SearchParams(), SearchParams(nprobe=1)):
                    found = index.search(queries, 10, params, mask)[1]
                    assert mask.test(found).all()
                    if not params.nprobe:
                        assert overlap(found, expected) >= 0.999


def test_threads_get_the_answers_of_one(torch: Any) -> None:
    need_card()
    vectors = vectors_of(60_000, 384)
    indexes = [on_card("exact", vectors, float32_rows=True), on_card("ivf", vectors)]
    jobs = [(index, vectors_of(nq, 384, seed)) for index in indexes for seed in range(8) for nq in (1, 1, 1, 20, 130)]
    expected = [index.search(queries, 10, SearchParams(nprobe=8))[1] for index, queries in jobs]
    streams = threading.local()

    def search(job: tuple[TorchIndex, FloatArray]) -> IntArray:
        if not hasattr(streams, "own"):
            streams.own = torch.cuda.Stream()
        with torch.cuda.stream(streams.own):
            return job[0].search(job[1], 10, SearchParams(nprobe=8))[1]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found, own in zip(pool.map(search, jobs), expected, strict=True):
                assert overlap(found, own) >= 0.999
    assert all(index.incidents() == [] for index in indexes)


def test_queries_on_the_device_stay_there(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = vectors_of(60_000, 384), vectors_of(40, 384, 2)
    index = on_card("exact", vectors, float32_rows=True)
    expected = index.search(queries, 10, SearchParams())
    host_is_not_asked(index, monkeypatch)
    monkeypatch.setattr(index_module, "host_queries", None)
    tensor = torch.from_numpy(queries).to(here())
    given = [tensor, tensor.double(), tensor.half().float() + 0, torch.utils.dlpack.from_dlpack(tensor)]
    try:
        import cupy

        given.append(cupy.asarray(queries))
    except ImportError:
        pass
    for one in given:
        distances, positions = index.search(one, 10, SearchParams())
        assert overlap(positions, expected[1]) >= 0.99
        np.testing.assert_allclose(distances, expected[0], rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("kind", ["exact", "ivf"])
@pytest.mark.parametrize(
    ("precision", "float32_rows"), [("float32", False), ("float32", True), ("float16", False), ("int8", False)]
)
def test_predicted_bytes_are_those_of_the_allocator(
    torch: Any, kind: str, precision: Precision, *, float32_rows: bool
) -> None:
    need_card()
    vectors = vectors_of(200_000, 384)
    (
        torch.zeros((16, 16), device=here()) @ torch.zeros((16, 16), device=here())
    ).sum().item()  # cuBLAS takes its buffers
    before = torch.cuda.memory_allocated(DEVICE)
    index = on_card(kind, vectors, precision=precision, float32_rows=float32_rows)
    held = torch.cuda.memory_allocated(DEVICE) - before
    predicted = predicted_bytes(len(vectors), 384, precision, nlist=index.nlist, float32_rows=float32_rows)
    assert predicted - SCRATCH - WORKSPACE == pytest.approx(held, rel=0.1)
    assert index.device_bytes == pytest.approx(held, rel=0.1)
    used = account_of(DEVICE).used
    torch.cuda.reset_peak_memory_stats()
    index.search(vectors[:4096], 10, SearchParams())
    assert torch.cuda.max_memory_allocated() - before - held <= 2 * SCRATCH, "scratch is bounded"
    del index
    gc.collect()
    assert torch.cuda.memory_allocated(DEVICE) <= before + (1 << 20), "nothing is left behind"
    assert account_of(DEVICE).used < used


def test_building_without_room_is_refused(torch: Any, small_card: Callable[[int | None], None]) -> None:
    vectors = vectors_of(200_000, 384)
    small_card(64 << 20)
    with pytest.raises(DeviceError, match="out of memory") as caught:
        on_card("exact", vectors)
    assert caught.value.cause == "out-of-memory"


def test_a_search_without_room_is_answered(
    torch: Any, small_card: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = vectors_of(200_000, 384), vectors_of(2048, 384, 2)
    index = on_card("exact", vectors)
    _, expected = exact_scan(queries[:50], vectors, 10, "l2")
    small_card(24 << 20)
    found = index.search(queries, 10, SearchParams())[1]
    assert overlap(found[:50], expected) >= 0.999
    assert "smaller-batch" in {incident.action for incident in index.incidents()}
    small_card(0)
    found = index.search(queries[:50], 10, SearchParams())[1]
    assert overlap(found, expected) >= 0.999
    small_card(None)
    monkeypatch.setattr(index._failover, "_clock", lambda: float("inf"))
    assert overlap(index.search(queries[:50], 10, SearchParams())[1], expected) >= 0.999
    assert index.device == DEVICE


# ---------------------------------------------------------------------------------- errors that end a process's use


PREPARE = """
import gc, os, torch
from memevolve_gpu.index.torch_gpu import index as index_module
from memevolve_gpu.index.torch_gpu.cuda_graphs import record_searches
index_module._DEVICE_CALL = 0.0
record_searches(True)
vectors, queries = vectors_of(60_000, 128), vectors_of(50, 128, 2)
index = on_card("exact", vectors)
expected = index.search(queries, 10, SearchParams())[1]
for _ in range(5):  # the last ones are recorded
    index.search(queries[:1], 10, SearchParams())
"""


def test_a_device_that_fails_for_good_is_left_to_others(torch: Any) -> None:
    """The index is dropped afterwards: what it recorded must not end the process when its memory is given back."""
    need_card()
    program = """
x = torch.zeros(4, device="cuda:0")
try:
    x[torch.tensor([10 ** 6], device="cuda:0")].sum().item()
except RuntimeError:
    pass
found = index.search(queries, 10, SearchParams())[1]
one = index.search(queries[:1], 10, SearchParams())[1]
incidents = [(one.cause, one.action) for one in index.incidents()]
told = (overlap(found, expected) >= 0.999, overlap(one, expected[:1]) >= 0.9, incidents, index.device)
del index
gc.collect()
print(*told, flush=True)
os._exit(0)
"""
    assert alone(PREPARE + program) == "True True [('device-lost', 'cpu-until-restart')] cpu"


def test_a_forked_child_answers_from_the_host(torch: Any) -> None:
    """And drops what it inherited: nothing of that may need the device that it must not touch."""
    program = """
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    found = index.search(queries, 10, SearchParams())[1]
    incidents = [(one.cause, one.action) for one in index.incidents()]
    told = f"{overlap(found, expected) >= 0.999} {incidents} {index.device}"
    del index
    gc.collect()
    os.write(writing, told.encode())
    os._exit(0)
status = os.waitpid(child, 0)[1]
own = overlap(index.search(queries, 10, SearchParams())[1], expected) == 1.0
print(os.read(reading, 1000).decode() if status == 0 else f"the child ended with {status}", own, index.device)
"""
    assert alone(PREPARE + program) == "True [('fork', 'cpu-until-restart')] cpu True cuda:0"


def test_a_forked_child_that_ends_as_programs_do(torch: Any) -> None:
    """Without os._exit: the interpreter clears away what the parent had made."""
    program = """
child = os.fork()
if child == 0:
    index.search(queries, 10, SearchParams())
    sys.exit(0)
print(os.waitpid(child, 0)[1], index.device)
"""
    assert alone(PREPARE + program) == "0 cuda:0"


def test_a_program_may_end_while_rows_are_on_their_way(torch: Any) -> None:
    """An index of a snapshot comes to the device behind searches; the interpreter may end meanwhile."""
    program = """
from memevolve_gpu.index.registry import build, from_parts
many = vectors_of(400_000, 128)
parts, plan = on_card("exact", many).parts(), index.plan
again = from_parts(plan, "l2", parts)
again._loaded = None
again._load_in_background()
print(again.search(queries, 10, SearchParams())[1].shape, flush=True)
"""
    assert alone(PREPARE + program) == "(50, 10)"
