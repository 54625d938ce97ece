"""Each Triton kernel, in Triton's interpreter, against its reference; and all of them compiled for a real GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracle import check_answer, nearest, recall
from torch_gpu_kit import on_card, some

from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.torch_gpu import kernel_ops
from memevolve_gpu.index.torch_gpu import kernel_ops as operations_module
from memevolve_gpu.index.torch_gpu.device_rows import (
    GROUP,
    DeviceRows,
    Quantization,
    Queries,
    padded_groups,
    span_columns,
    tile_columns,
)
from memevolve_gpu.index.torch_gpu.kernel_ops import Lists, ListWork, Operations
from memevolve_gpu.index.torch_gpu.memory_accounting import Account
from memevolve_gpu.index.torch_gpu.search import best_columns
from memevolve_gpu.types import Metric, SearchParams

SEED = 20_260_404


@pytest.fixture
def kernel_way(torch: Any, kernels: SimpleNamespace) -> Operations:
    """Operations that fail the test when a kernel does."""
    return Operations(torch.device("cpu"), pytest.fail, kernels)


def rows_on_device(torch: Any, n: int, dim: int, *, int8: bool = False, metric: Metric = "l2") -> DeviceRows:
    vectors = np.random.default_rng(SEED).standard_normal((n, dim)).astype(np.float32)
    quantization = Quantization.around(vectors, vectors.min(0), vectors.max(0), centred=not int8)
    shape, cpu = (n, dim, padded_groups(-(-n // GROUP))), torch.device("cpu")
    rows = DeviceRows.empty(metric, quantization, shape, cpu, int8=int8, float32_rows=False)
    codes = None
    if int8:
        scales = np.abs(vectors).max(1) / np.float32(127)
        codes = (torch.from_numpy(np.rint(vectors / scales[:, None]).astype(np.int8)), torch.from_numpy(scales))
    rows.put(0, quantization.enter(vectors, rows.columns, cpu), torch.arange(n), codes, None)
    return rows


def asked(torch: Any, rows: DeviceRows, nq: int, dim: int) -> Queries:
    raw = np.random.default_rng(SEED + 1).standard_normal((nq, dim)).astype(np.float32)
    return Queries.prepare(torch.from_numpy(raw), rows)


def assert_close(got: Any, want: Any) -> None:
    """Equal but for the order of a float32 sum; infinities in the same places."""
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-5, atol=1e-3)


SHAPES = [(500, 20, 1), (500, 20, 7), (300, 150, 17), (40, 5, 3), (300, 24, 70), (70, 1100, 1), (31, 600, 2)]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("n", "dim", "nq"), SHAPES)
def test_minima(torch: Any, kernel_way: Operations, n: int, dim: int, nq: int, *, int8: bool) -> None:
    rows = rows_on_device(torch, n, dim, int8=int8, metric="ip" if nq == 7 else "l2")
    queries = asked(torch, rows, nq, dim)
    q = (queries.wide, queries.factor) if nq == 1 else queries.narrow()
    got = kernel_way.minima(rows, *q)
    assert_close(got, kernel_ops.minima(rows, *q))
    assert got[:, -(-n // GROUP) :].isinf().all(), "padding is never near"


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("n", "dim", "nq"), SHAPES)
def test_rescore(torch: Any, kernel_way: Operations, n: int, dim: int, nq: int, *, int8: bool) -> None:
    rows = rows_on_device(torch, n, dim, int8=int8)
    queries = asked(torch, rows, nq, dim)
    chosen = torch.from_numpy(np.random.default_rng(SEED).integers(-1, rows.groups, (nq, 3)))
    q = (queries.wide, queries.factor)
    scores = kernel_way.rescore(rows, *q, chosen)
    assert_close(scores, kernel_ops.rescore(rows, *q, chosen))
    near = torch.topk(scores, 40, dim=1, largest=False)
    found = kernel_way.locate(rows, chosen, near)
    assert torch.equal(found, kernel_ops.locate(rows, chosen, near))
    assert found.dtype == torch.int64
    assert ((found < 0) == near.values.isinf()).all()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("nq", "nprobe"), [(1, 1), (1, 4), (9, 3), (40, 6)])
def test_list_minima(torch: Any, kernel_way: Operations, nq: int, nprobe: int, *, int8: bool) -> None:
    rng, sizes = np.random.default_rng(SEED), [3, 0, 1, 9, 2, 5]
    rows = rows_on_device(torch, GROUP * sum(sizes) - 11, 40, int8=int8)
    queries = asked(torch, rows, nq, 40)
    probed = torch.from_numpy(np.stack([rng.permutation(len(sizes))[:nprobe] for _ in range(nq)]))
    work = ListWork.of(Lists.of(sizes, "cpu"), probed)
    got = kernel_way.list_minima(rows, *queries.narrow(), work)
    assert_close(got, kernel_ops.list_minima(rows, *queries.narrow(), work))
    everything = kernel_ops.minima(rows, *queries.narrow())
    starts = np.cumsum([0, *sizes])
    for row, lists in enumerate(probed.tolist()):
        groups = [group for place in lists for group in range(starts[place], starts[place + 1])]
        columns = torch.arange(len(groups))[None].expand(nq, -1)
        assert work.groups_at(columns.contiguous())[row].tolist() == groups
        assert_close(got[row, : len(groups)], everything[row, groups])
        assert got[row, len(groups) :].isinf().all()


@pytest.mark.parametrize(("m", "dim", "nlist"), [(300, 48, 37), (5, 16, 3), (129, 32, 129), (200, 16, 1)])
def test_assign_and_sum_lists(torch: Any, kernel_way: Operations, m: int, dim: int, nlist: int) -> None:
    rng = np.random.default_rng(SEED)
    x = torch.from_numpy(rng.standard_normal((m, dim)).astype(np.float16))
    centroids = x[torch.from_numpy(rng.permutation(m)[:nlist])].contiguous()
    norms = centroids.float().square().sum(1)
    labels, scores = kernel_way.assign(x, centroids, norms)
    expected = kernel_ops.assign(x, centroids, norms)
    assert labels.tolist() == expected[0].tolist()
    assert_close(scores, expected[1])
    ordered = torch.sort(labels, stable=True)
    starts = torch.searchsorted(ordered.values, torch.arange(nlist + 1, dtype=torch.int32))
    sums = kernel_way.sum_lists(x, ordered.indices, starts)
    assert_close(sums, kernel_ops.sum_lists(x, ordered.indices, starts))
    again = kernel_way.sum_lists(x, ordered.indices, starts)
    assert torch.equal(sums, again)


def test_the_first_of_equal_centroids_is_taken(torch: Any, kernel_way: Operations) -> None:
    x = torch.ones((20, 16), dtype=torch.float16)
    labels, _ = kernel_way.assign(x, torch.ones((300, 16), dtype=torch.float16), torch.full((300,), 16.0))
    assert labels.tolist() == [0] * 20


@pytest.mark.parametrize(("kind", "precision"), [("exact", "float32"), ("ivf", "int8")])
def test_whole_searches_by_kernels(
    kind: str, precision: str, card: Account, kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations_module, "triton_kernels", lambda _: (kernels, ""))
    monkeypatch.setattr("memevolve_gpu.index.torch_gpu.index._DEVICE_CALL", 0.0)
    vectors, queries = some(1, 400, 24), some(2, 3, 24)
    index = on_card(kind, vectors, precision=precision)
    half = RowFilter(np.arange(400) % 2 == 0)
    for few in (queries, queries[:1]):
        for mask in (None, half):
            answer = index.search(few, 5, SearchParams(nprobe=4), mask)
            check_answer(index, few, vectors, answer, mask, tolerance=2e-4 if precision == "float32" else 0.05)
            if kind == "exact":
                truth = nearest(few, vectors, "l2", 5, mask)
                assert recall(answer[0], truth, 1e-5 if precision == "float32" else 0.05) == 1.0
    assert index.incidents() == []


@pytest.mark.parametrize(("nq", "width", "want"), [(1, 4096, 4), (3, 4096, 4), (3, 4100, 4), (5, 512, 8), (5, 64, 100)])
def test_the_best_columns_are_found_in_folds_too(torch: Any, nq: int, width: int, want: int) -> None:
    best = torch.from_numpy(np.random.default_rng(SEED).standard_normal((nq, width)).astype(np.float32))
    best[:, ::3] = float("inf")
    values, columns = best_columns(best, want)
    expected = torch.topk(best, min(want, width), dim=1, largest=False, sorted=True).values
    assert torch.equal(values.sort(dim=1).values, expected)
    assert torch.equal(best.gather(1, columns), values)


@pytest.mark.parametrize("columns", [16, 48, 112, 128, 160, 384, 448, 768, 1024, 1536, 3072, 4096])
def test_tiles_divide_what_they_cut(columns: int) -> None:
    tile, span = tile_columns(columns), span_columns(columns)
    assert tile >= 16
    assert tile & (tile - 1) == 0
    assert span % tile == columns % span == 0
    assert span <= 512


COMPILE = """
import sys
from memevolve_gpu.index.torch_gpu import kernels as module
kernels = module.load()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
if "nvidia" not in triton.backends.backends:
    sys.exit(3)
target = GPUTarget("cuda", 90, 32)
whole = "nq nlist nprobe width count m".split()
longs = "groups indices out chosen work_start tiles first_pair pairs columns list_start order starts".split()
kinds = {"x": "*fp16", "centroids": "*fp16", "work_list": "*i32", "labels": "*i32"}
kinds |= dict.fromkeys(whole, "i32") | dict.fromkeys(longs, "*i64")
cut = {"dim": 384, "block_d": 64, "span": 384, "block_g": 4, "block_q": 64, "scaled": False}
cut |= {"block_n": 128, "block_c": 128, "block_r": 32, "block": 64}
for name in "minima_one minima_many rescore locate list_minima assign sum_lists".split():
    warps = 8 if name == "assign" else 4
    kernel = getattr(kernels, name)
    own = {"q": "*fp16"} if name in ("minima_many", "list_minima") else {}
    own |= {"order": "*i32"} if name == "locate" else {"out": "*fp32", "groups": "i32"}
    types = {a: "constexpr" if a in cut else (kinds | own).get(a, "*fp32") for a in kernel.arg_names}
    values = {(at,): cut[a] for at, a in enumerate(kernel.arg_names) if a in cut}
    aligned = {(at,): [["tt.divisibility", 16]] for at, a in enumerate(kernel.arg_names) if types[a][0] == "*"}
    found = triton.compile(
        ASTSource(kernel, types, values, aligned), target=target, options={"num_warps": warps, "num_stages": 3}
    )
    matrix = "wgmma" in found.asm["ptx"]
    print(name, len(found.asm["cubin"]) > 0, matrix)
"""


def test_all_kernels_compile_for_a_gpu(kernels: SimpleNamespace, tmp_path: Any) -> None:
    """Triton brings the assembler along, so that needs no GPU; the interpreter must be off, hence another process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 3:
        pytest.skip("this triton was built without NVIDIA's back end")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [
        "minima_one",
        "minima_many",
        "rescore",
        "locate",
        "list_minima",
        "assign",
        "sum_lists",
    ]
    assert all(line[1] == "True" for line in lines)
    assert {line[0] for line in lines if line[2] == "True"} == {"minima_many", "list_minima", "assign"}, "matrix units"
