"""Each Triton kernel, in Triton's interpreter, against its reference; and all of them compiled for a real GPU."""

from __future__ import annotations

import json
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
from memevolve_gpu.index.torch_gpu import device_rows, ivf, kernel_ops, runtime, upload
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
from memevolve_gpu.index.torch_gpu.kernel_ops import Lists, ListWork, Many, Operations, best_columns, many_shapes
from memevolve_gpu.index.torch_gpu.memory_accounting import Account
from memevolve_gpu.index.torch_gpu.search import Probe, propose
from memevolve_gpu.types import Metric, Precision, SearchParams

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
    rows.put(0, quantization.enter(vectors, rows.columns, cpu))
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
    q = (queries.wide, queries.factor) if nq == 1 else queries.narrow(rows)
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
    got = kernel_way.list_minima(rows, *queries.narrow(rows), work)
    assert_close(got, kernel_ops.list_minima(rows, *queries.narrow(rows), work))
    everything = kernel_ops.minima(rows, *queries.narrow(rows))
    starts = np.cumsum([0, *sizes])
    for row, lists in enumerate(probed.tolist()):
        groups = [group for place in lists for group in range(starts[place], starts[place + 1])]
        columns = torch.arange(len(groups))[None].expand(nq, -1)
        assert work.groups_at(columns.contiguous())[row].tolist() == groups
        assert_close(got[row, : len(groups)], everything[row, groups])
        assert got[row, len(groups) :].isinf().all()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("probed", [[3], [1, 3, 1 + 4], [4, 0, 5, 2], [1], [0, 1, 2, 3, 4, 5]])
def test_the_lists_of_one_query(torch: Any, kernel_way: Operations, probed: list[int], *, int8: bool) -> None:
    """The groups of its lists one after another, also of empty ones; the same minima as those of a whole scan."""
    sizes = [3, 0, 1, 9, 2, 5]
    rows = rows_on_device(torch, GROUP * sum(sizes) - 11, 40, int8=int8)
    queries, lists = asked(torch, rows, 1, 40), Lists.of(sizes, "cpu")
    given = (rows, queries.wide, queries.factor, lists, torch.tensor([probed]))
    best, groups = kernel_way.list_minima_one(*given)
    plain = kernel_ops.list_minima_one(*given)
    assert torch.equal(groups, plain[1])
    assert_close(best, plain[0])
    starts = np.cumsum([0, *sizes])
    own = [group for place in probed for group in range(starts[place], starts[place + 1])]
    assert groups[0].tolist() == own + [-1] * (groups.shape[1] - len(own))
    everything = kernel_ops.minima(rows, queries.wide, queries.factor)
    assert_close(best[:, : len(own)], everything[:, own])
    assert best[:, len(own) :].isinf().all()


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


def test_a_batch_rescores_six_groups_more_than_results(
    card: Account, monkeypatch: pytest.MonkeyPatch, torch: Any
) -> None:
    """16 groups for 10 results, not 32: half of the gathered bytes, and float32 answers all the same."""
    vectors, queries = some(1, 4000, 48), some(2, 60, 48)
    index, widths = on_card("exact", vectors), []
    real = Operations.rescore

    def rescore(self: Operations, rows: Any, q: Any, factor: Any, chosen: Any) -> Any:
        widths.append(tuple(chosen.shape))
        return real(self, rows, q, factor, chosen)

    monkeypatch.setattr(Operations, "rescore", rescore)
    answer = index.search(queries, 10, SearchParams())
    assert widths == [(60, 16)]
    assert recall(answer[0], nearest(queries, vectors, "l2", 10), 1e-5) == 1.0


@pytest.mark.parametrize("nq", [2, 33])
def test_int8_rows_are_multiplied_by_int8_queries(torch: Any, kernel_way: Operations, nq: int) -> None:
    """Sums of integers are exact: kernel and reference agree to the last bit of the float that they become."""
    rows = rows_on_device(torch, 300, 150, int8=True)
    q, factor = asked(torch, rows, nq, 150).narrow(rows)
    assert q.dtype == torch.int8
    assert int(q.abs().max()) == 127
    exact = kernel_ops.minima(rows, q.double(), factor.double())
    np.testing.assert_allclose(kernel_way.minima(rows, q, factor).numpy(), exact.numpy(), rtol=1e-6, atol=1e-4)


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], Any]:
    """What this process has measured, empty; kernels of other tests count as not verified."""
    monkeypatch.setattr(kernel_ops, "_verified", set())
    monkeypatch.setattr(kernel_ops, "_chosen", {})
    return kernel_ops._chosen


def test_candidates_are_measured_once_and_the_fastest_is_kept(
    torch: Any, kernels: SimpleNamespace, untuned: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not compile is left out, and all give one result."""
    monkeypatch.setattr(kernel_ops, "MEASURED_QUERIES", (1,))
    monkeypatch.setattr(kernel_ops, "_SELECT_BLOCK", 64)
    rows = rows_on_device(torch, 2200, 768)
    queries, given = asked(torch, rows, 1, 768), (torch.device("cpu"), pytest.fail, kernels)
    want, asked_of = kernel_ops.minima(rows, queries.wide, queries.factor), []
    clock = iter([3.0, None, 1.0, 2.0, 1.0, 2.0, 1.0])

    def seconds(call: Any) -> float:
        call()
        asked_of.append(call)
        found = next(clock)
        if found is None:
            raise RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 101376.")
        return found

    operations = Operations(*given)
    operations.tune(rows, seconds)
    Operations(*given).tune(rows, lambda _: pytest.fail("timed again"))
    assert len(asked_of) == len(kernel_ops.one_shapes(768)) + 2 == 5
    assert list(untuned.values()) == [2, 1], "the third shape; the kernel"
    launched: list[dict[str, Any]] = []
    operations._kernels = _Noting(kernels.minima_one, launched)
    assert_close(operations._minima_one(rows, queries.wide, queries.factor), want)
    assert [(one["block_g"], one["num_warps"], one["span"]) for one in launched] == [(2, 8, 768)]
    for shape in kernel_ops.one_shapes(768):
        assert_close(operations._minima_one(rows, queries.wide, queries.factor, shape), want)


class _Noting:
    """Kernels whose single-query scan notes how it is launched."""

    def __init__(self, real: Any, launched: list[dict[str, Any]]) -> None:
        self._real, self._launched = real, launched
        self.minima_one = self

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **how: Any) -> None:
            self._launched.append(how)
            self._real[grid](*arguments, **how)

        return launch


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("n", "dim", "nq"), [(500, 20, 2), (700, 384, 257), (300, 768, 40), (1000, 150, 16), (130, 1536, 33), (40, 3072, 5)]
)
def test_queries_that_stay_while_rows_stream_by(
    torch: Any, kernel_way: Operations, n: int, dim: int, nq: int, *, int8: bool
) -> None:
    """Every candidate gives the answer of plain torch; a program's share may be any number of tiles."""
    rows = rows_on_device(torch, n, dim, int8=int8, metric="ip" if nq == 40 else "l2")
    given = asked(torch, rows, nq, dim).narrow(rows)
    want = kernel_ops.minima(rows, *given)
    shapes = many_shapes(rows.columns, rows.x.element_size(), nq)
    held = [shape for shape in shapes if shape.held] or [Many(16, 2, 4, 1, held=True)]
    for shape in held:
        assert_close(kernel_way._minima_many(rows, *given, shape), want)


@pytest.mark.parametrize(
    ("nq", "width", "want"), [(3, 4096, 4), (2, 40, 40), (1, 8, 3), (1, 512, 32), (5, 1000, 17), (2, 5000, 60)]
)
def test_one_kernel_selects_the_best_columns_of_each_query(
    torch: Any, kernel_way: Operations, nq: int, width: int, want: int
) -> None:
    """As a stable sort does: infinities, equal values, both zeros, values below zero."""
    values = torch.from_numpy(np.random.default_rng(SEED).standard_normal((nq, width)).astype(np.float32))
    values[:, ::3], values[:, 1::7] = float("inf"), values[0, 1]
    values[:, 2::9] = torch.tensor([0.0, -0.0]).repeat(width)[: len(range(2, width, 9))]
    near = kernel_way._select(values, want)
    wanted = torch.sort(values, dim=1, stable=True)
    assert torch.equal(near.values, wanted.values[:, :want])
    assert torch.equal(values.gather(1, near.indices), near.values)
    assert all(len(set(row)) == want for row in near.indices.tolist())


@pytest.mark.parametrize(("width", "want", "selects"), [(2000, 16, 1), (2001, 16, 0), (2000, 65, 0), (40, 99, 1)])
def test_what_the_selecting_kernel_cannot_take_is_selected_by_torch(
    torch: Any, kernels: SimpleNamespace, untuned: dict[Any, Any], width: int, want: int, selects: int
) -> None:
    """Rows of any number of lists: a row that does not begin at a multiple of 32 bytes would be read wrongly."""
    asked_of: list[int] = []

    def select(given: Any, most: int) -> kernel_ops.Near:
        asked_of.append(most)
        return best_columns(given, most)

    operations, values = Operations(torch.device("cpu"), pytest.fail, kernels), torch.arange(2.0 * width).view(2, -1)
    operations._select = select  # type: ignore[method-assign, assignment]
    untuned[kernel_ops._selection_key(values)] = 1
    assert operations.best(values, want).indices.tolist() == [list(range(min(want, width)))] * 2
    assert bool(asked_of) == bool(selects)


def test_selection_asks_topk_for_the_largest_alone(
    torch: Any, kernel_way: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.6, which comes with torch 2.11, knows no other: the kernel did not compile there."""
    language = pytest.importorskip("triton.language")
    real = language.topk

    def topk(x: Any, k: Any) -> Any:
        return real(x, k)

    monkeypatch.setattr(language, "topk", topk)
    values = torch.from_numpy(np.random.default_rng(SEED).standard_normal((2, 600)).astype(np.float32))
    assert torch.equal(kernel_way._select(values, 5).values, torch.sort(values, dim=1).values[:, :5])


def test_a_kernel_that_answers_wrongly_is_left_out_and_reported(
    torch: Any, kernels: SimpleNamespace, untuned: dict[Any, Any]
) -> None:
    """By the trial of candidates after a build, and by the first result of a step that has none."""
    wrong = SimpleNamespace(**vars(kernels))
    wrong.minima_stream = wrong.select = wrong.rescore = _Doing(lambda *_, **__: None)
    notes: list[str] = []
    operations, rows = Operations(torch.device("cpu"), notes.append, wrong), rows_on_device(torch, 600, 48)
    torch.empty((64, rows.groups)).fill_(7.0)  # so that memory that is not written to does not happen to be right
    operations.tune(rows, lambda call: call() is None)
    assert all(not chosen for chosen in untuned.values()), "the ways that were there before"
    assert any("minima by Many" in note for note in notes)
    assert any("select by" in note for note in notes)
    queries, chosen = asked(torch, rows, 3, 48), torch.zeros((3, 2), dtype=torch.int64)
    want = kernel_ops.rescore(rows, queries.wide, queries.factor, chosen)
    for _ in range(2):
        assert torch.equal(operations.rescore(rows, queries.wide, queries.factor, chosen), want)
    assert sum("kernel rescore does not run here" in note for note in notes) == 1


def test_a_form_that_does_not_compile_is_reported(
    torch: Any, kernels: SimpleNamespace, untuned: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the device lacks the memory for it: a selection that never ran was not missed for weeks."""
    monkeypatch.setattr(kernel_ops, "MEASURED_QUERIES", (1,))

    def refuses(*_: Any, **__: Any) -> None:
        raise TypeError("topk() got an unexpected keyword argument 'descending'")

    broken = SimpleNamespace(**vars(kernels))
    broken.select, notes = _Doing(refuses), list[str]()
    operations = Operations(torch.device("cpu"), notes.append, broken)
    operations.tune(rows_on_device(torch, 600, 48), lambda call: call() is None)
    assert len(notes) == 1, "told once"
    assert notes[0].startswith("a form of select does not run here (topk() got an unexpected keyword")


class _Doing:
    """A kernel that does something else."""

    def __init__(self, does: Any) -> None:
        self._does = does

    def __getitem__(self, grid: Any) -> Any:
        return self._does


@pytest.mark.parametrize(("kind", "tables"), [("exact", 1), ("ivf", 2)])
def test_a_build_sends_each_row_once_and_once_more_for_its_list(
    kind: str, tables: int, card: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the columns are read on the host, and float32 rows on the device are those that were narrowed."""
    vectors, sent = some(1, 3000, 48), []
    real = runtime.host_tensor

    def host_tensor(array: Any) -> Any:
        if array.ndim == 2 and array.shape[1] == 48:
            sent.append(len(array))
        return real(array)

    for module in (device_rows, upload, ivf, runtime):
        monkeypatch.setattr(module, "host_tensor", host_tensor, raising=False)
    index = on_card(kind, vectors, float32_rows=True)
    trained = (2048 + 2 * index.nlist) if kind == "ivf" else 0  # the sample, and the centroids twice
    assert sum(sent) == tables * 3000 + trained


def test_what_travels_goes_through_two_pinned_buffers_that_are_reused(torch: Any) -> None:
    """A buffer is written again only when what it held has been read, and grows to the largest array."""
    waited: list[str] = []

    class OnHost(runtime.Staging):
        def _pinned(self, size: int) -> Any:
            waited.append(f"pinned {size}")
            return torch.empty(size, dtype=torch.uint8)

        def _event(self) -> Any:
            return SimpleNamespace(synchronize=lambda: waited.append("waited"))

    staging = OnHost(torch.device("cpu"))
    arrays = [some(1, 4, 8), some(2, 9, 8), some(3, 7, 8)]
    for array in arrays:
        assert np.array_equal(staging.send(array).clone().numpy(), array)
    assert waited == ["pinned 65536", "pinned 65536", "waited"]
    result = torch.arange(12).reshape(3, 4)
    found = staging.fetch(result)
    staging.fetch(result + 1)
    assert np.array_equal(found, result.numpy()), "what was returned does not change"
    assert waited[3:] == ["pinned 65536", "waited", "waited"]
    staging.send(some(3, 3000, 8))
    assert waited[6:] == ["waited", "pinned 131072"]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_rows_are_uploaded_through_pinned_memory(
    precision: Precision, card: Account, monkeypatch: pytest.MonkeyPatch, torch: Any
) -> None:
    """Rows of both passes of a build of lists, and the sample that trains them; int8 rows are made on the device.

    What is pageable is small: the centre in each block, the list of each row once, and the places of the lists.
    """
    pinned, pageable = [0], [0]
    real, plain = runtime.sent, runtime.host_tensor

    def noted(given: Any, device: Any) -> Any:
        pinned[0] += given.nbytes
        pageable[0] -= given.nbytes  # here it is made a tensor by the same function
        return real(given, device)

    def host_tensor(array: Any) -> Any:
        pageable[0] += array.nbytes
        return plain(array)

    for module in (device_rows, upload, ivf, runtime):
        monkeypatch.setattr(module, "host_tensor", host_tensor, raising=False)
    for module in (device_rows, upload):
        monkeypatch.setattr(module, "sent", noted)
    index = on_card("ivf", some(1, 3000, 48), precision=precision)
    assert pinned[0] == (2 * 3000 + 2048 + 2 * index.nlist) * 48 * 4
    assert pageable[0] <= 3000 * 4 + 64 * index.nlist + 20 * 48 * 4


class Launches:
    """Counts what a card would launch: operations of torch that are no views, and kernels."""

    def __init__(self, torch: Any, kernels: SimpleNamespace) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        self.names: list[str] = []
        free = {"view", "_unsafe_view", "as_strided", "empty", "slice", "unsqueeze", "select", "t", "expand", "detach"}
        free |= {"alias", "new_empty", "unflatten", "transpose", "permute", "squeeze", "_to_copy.cpu"}

        class Counting(TorchDispatchMode):  # type: ignore[misc]  # torch is Any here
            def __torch_dispatch__(mode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: N805
                name = func._schema.name.split("::")[1]
                if name not in free:
                    self.names.append(name)
                return func(*args, **(kwargs or {}))

        self.watching = Counting
        self.kernels = SimpleNamespace(**{name: _Counted(self, name, k) for name, k in vars(kernels).items()})


class _Counted:
    def __init__(self, launches: Launches, name: str, kernel: Any) -> None:
        self._launches, self._name, self._kernel = launches, name, kernel

    def __getitem__(self, grid: Any) -> Any:
        from torch.utils._python_dispatch import _disable_current_modes

        def launch(*arguments: Any, **how: Any) -> None:
            self._launches.names.append(f"kernel {self._name}")
            with _disable_current_modes():
                self._kernel[grid](*arguments, **how)

        return launch


WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"}
"""Operations of torch that end when the device has computed their arguments."""


@pytest.mark.parametrize(
    ("nq", "nprobe", "most", "waits"),
    [(1, 0, 7, 0), (3, 0, 16, 0), (1, 3, 12, 0), (3, 3, 50, 1)],
    ids=["one", "batch", "one of lists", "batch of lists"],
)
def test_how_many_launches_a_search_takes(
    torch: Any,
    kernels: SimpleNamespace,
    untuned: dict[Any, Any],
    nq: int,
    nprobe: int,
    most: int,
    waits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a card: what a card would be asked to do for candidates, when the kernels measured faster.

    The host waits for the device once, for the results, and in a batch of lists once more, to know the work.
    """
    monkeypatch.setattr(kernel_ops, "_SELECT_BLOCK", 32)
    launches = Launches(torch, kernels)
    operations = Operations(torch.device("cpu"), pytest.fail, launches.kernels)
    rows = rows_on_device(torch, 1000, 48)
    queries, probe = asked(torch, rows, nq, 48), None
    if nprobe:
        centroids = torch.from_numpy(np.random.default_rng(SEED).standard_normal((8, rows.columns)).astype(np.float32))
        probe = Probe(Lists.of([4] * 8, "cpu"), centroids, centroids.square().sum(1), nprobe)
    for width in (rows.groups, 16 * GROUP, 8):
        untuned[kernel_ops._selection_key(torch.empty((nq, width)))] = 1
    found = propose(rows, queries, (32, 16), operations, probe)  # the first results are verified
    with launches.watching():
        launches.names.clear()
        again = propose(rows, queries, (32, 16), operations, probe)
    assert torch.equal(found, again)
    assert len(launches.names) <= most, launches.names
    assert len(WAITS.intersection(launches.names)) == sum(name in WAITS for name in launches.names) == waits
    kernel = [name for name in launches.names if name.startswith("kernel")]
    assert len(kernel) == (6 if nprobe else 5)


COMPILE = """
import json, re, subprocess, sys, tempfile
from memevolve_gpu.index.torch_gpu import kernels as module
from memevolve_gpu.index.torch_gpu.device_rows import span_columns, tile_columns
from memevolve_gpu.index.torch_gpu.kernel_ops import _held_bytes, many_shapes, one_shapes
kernels = module.load()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
if "nvidia" not in triton.backends.backends:
    sys.exit(3)
whole = "nq nlist nprobe width count m".split()
longs = "probed groups indices out chosen work_start tiles first_pair pairs columns list_start order starts".split()
kinds = {"x": "*fp16", "centroids": "*fp16", "work_list": "*i32", "labels": "*i32"}
kinds |= dict.fromkeys(whole, "i32") | dict.fromkeys(longs, "*i64")

def report(name, arch, dim, warps=4, int8=False, stages=3, **cut):
    cut = {"dim": dim, "block_d": tile_columns(dim, 64), "span": span_columns(dim), "block_g": 4, "block_q": 64,
           "block_n": 128, "block_c": 128, "block_r": 32, "block": 64, "scaled": int8} | cut
    kernel = getattr(kernels, name)
    own = {"x": "*i8"} if int8 else {}
    own |= {"q": "*i8" if int8 else "*fp16"} if name in ("minima_many", "minima_stream", "list_minima") else {}
    own |= {"order": "*i32"} if name == "locate" else {"out": "*fp32"}
    own |= {} if name in ("locate", "list_minima_one") else {"groups": "i32"}
    types = {a: "constexpr" if a in cut else (kinds | own).get(a, "*fp32") for a in kernel.arg_names}
    values = {(at,): cut[a] for at, a in enumerate(kernel.arg_names) if a in cut}
    aligned = {(at,): [["tt.divisibility", 16]] for at, a in enumerate(kernel.arg_names) if types[a][0] == "*"}
    found = triton.compile(
        ASTSource(kernel, types, values, aligned), target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as code:
        code.write(found.asm["cubin"])
        code.flush()
        said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", code.name], capture_output=True,
                              text=True, check=True).stdout
    ptx = found.asm["ptx"]
    units = "wgmma" if "wgmma" in ptx else "mma.sync" if "mma.sync" in ptx else ""
    print(json.dumps({
        "name": name, "arch": arch, "dim": dim, "int8": int8, "warps": warps, "stages": stages, "units": units,
        "int8_units": bool(re.search(r"mma\\S*[.]s8[.]s8|mma\\S*[.]s32[.]s8", ptx)),
        "registers": int(re.search(r"REG:(\\d+)", said)[1]), "spilled": int(re.search(r"STACK:(\\d+)", said)[1]),
        "shared": found.metadata.shared, "cut": {a: v for a, v in cut.items() if a in kernel.arg_names},
    }))

SHARED = {80: 163 << 10, 90: 227 << 10}
for arch in (80, 90):
    for int8 in (False, True):
        for dim, nq in ((384, 16), (384, 1024), (1536, 1024)) if int8 else ((384, 16), (384, 1024), (768, 1024)):
            for shape in many_shapes(dim, 2 - int8, nq):
                if shape.held and _held_bytes(shape.queries, dim * (2 - int8), shape.stages) <= SHARED[arch]:
                    report("minima_stream", arch, dim, shape.warps, int8, shape.stages, block_q=shape.queries,
                           block_g=shape.groups, block_d=tile_columns(dim))
    report("select", arch, 384, 8, want=16, kept=32, fold=8, block=512)
    report("select", arch, 384, 8, want=32, kept=32, fold=1, block=512)
    for name in "rescore locate assign sum_lists".split():
        tile = tile_columns(384, 128 if name == "rescore" else 64)
        report(name, arch, 384, 8 if name == "assign" else 4, block_d=tile)
    for int8 in (False, True):
        report("minima_many", arch, 384, 8, int8, block_q=128)
        report("list_minima", arch, 384, 4, int8)
    for dim in (384, 768, 1536):
        report("rescore", arch, dim, block_d=tile_columns(dim))
        report("list_minima_one", arch, dim, block_d=tile_columns(dim), block_p=32)
        for groups, warps, span in one_shapes(dim):
            report("minima_one", arch, dim, warps, block_g=groups, span=span, block_d=tile_columns(dim))
"""


def test_all_kernels_compile_for_two_kinds_of_gpu_without_spills(kernels: SimpleNamespace, tmp_path: Any) -> None:
    """Triton brings the assembler along, so that needs no GPU; the interpreter must be off, hence another process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 3:
        pytest.skip("this triton was built without NVIDIA's back end")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["name"] for one in found} == {
        *(
            "minima_one",
            "minima_many",
            "minima_stream",
            "select",
            "rescore",
            "locate",
            "list_minima",
            "list_minima_one",
            "assign",
            "sum_lists",
        )
    }
    assert {one["arch"] for one in found} == {80, 90}
    for one in found:
        assert one["spilled"] <= (8 if one["arch"] == 80 and one["name"] in ("assign", "minima_one") else 0), one
        assert one["registers"] <= 255, one
        assert one["shared"] <= {80: 163, 90: 227}[one["arch"]] << 10, one
        batch = one["name"] in ("minima_many", "minima_stream", "list_minima", "assign")
        assert bool(one["units"]) == batch, f"matrix units: {one}"
        assert one["int8_units"] == one["int8"], one
        if (
            one["name"] == "minima_stream"
        ):  # its queries stay in shared memory, and the figure that is planned with holds
            held = one["cut"]["block_q"] * one["dim"] * (2 - one["int8"])
            assert (
                held
                <= one["shared"]
                <= kernel_ops._held_bytes(one["cut"]["block_q"], one["dim"] * (2 - one["int8"]), one["stages"])
            ), one
    widest = [one for one in found if one["name"] == "minima_stream" and (one["arch"], one["dim"]) == (90, 384)]
    assert max(one["cut"]["block_q"] for one in widest if not one["int8"]) == 256
