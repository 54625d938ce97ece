"""The torch engine on a real GPU inside programs that use torch themselves: threads, streams, graphs, autocast."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cuda_tests.torch_kit import DEVICE, here, host_is_not_asked, need_card, on_card, overlap, vectors_of

from memevolve_gpu.index.scan import exact_scan
from memevolve_gpu.index.torch_engine.guard import lost_devices
from memevolve_gpu.types import Effort


@contextmanager
def meanwhile(work: Callable[[], None], *mishaps: type[BaseException]) -> Iterator[list[BaseException]]:
    """Another thread does ``work`` over and over; what it raises is kept, and must be one of ``mishaps``."""
    over, raised = threading.Event(), list[BaseException]()

    def run() -> None:
        while not over.is_set():
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - kept, and judged below
                raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield raised
    finally:
        over.set()
        thread.join(60)
    assert all(isinstance(error, mishaps) for error in raised), raised


def test_bodies_are_built_while_others_record(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build waits for the device, which CUDA forbids while a search is being recorded: neither may fail for it."""
    vectors, query = vectors_of(60_000, 128), vectors_of(1, 128, 2)
    monkeypatch.setattr("memevolve_gpu.index.torch_engine.body._DEVICE_CALL", 0.0)
    expected = exact_scan(query, vectors, 10, "l2")[1]

    def build() -> None:
        on_card("exact", vectors[:20_000])

    with meanwhile(build):
        for _ in range(4 if here() == "cpu" else 20):
            body = on_card("exact", vectors)
            for k in (10, 20, 40):
                for _ in range(4):
                    assert overlap(body.search(query, k, Effort())[1][:, :10], expected) >= 0.9
            assert body.incidents() == []
            assert body.device == DEVICE
    assert lost_devices() == {}


def test_a_program_that_waits_for_the_device_all_the_time(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its waiting may spoil a recording: searches are answered, the device is kept, and the thread keeps its stream."""
    need_card()
    vectors, query = vectors_of(60_000, 128), vectors_of(1, 128, 2)
    monkeypatch.setattr("memevolve_gpu.index.torch_engine.body._DEVICE_CALL", 0.0)
    expected, own = exact_scan(query, vectors, 10, "l2")[1], torch.cuda.current_stream()
    with meanwhile(torch.cuda.synchronize, RuntimeError) as raised:
        for _ in range(10):
            body = on_card("exact", vectors)
            for _ in range(8):
                assert overlap(body.search(query, 10, Effort())[1], expected) >= 0.9
            assert body.device == DEVICE
    print(f"the program's own waiting was refused {len(raised)} times")
    assert lost_devices() == {}
    assert torch.cuda.current_stream() == own
    room = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
    del room
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before, "the allocator works as before"


def test_a_program_that_records_graphs_of_its_own(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch's default mode most calls of other threads fail meanwhile: answers come from the host then."""
    need_card()
    vectors, queries = vectors_of(60_000, 128), vectors_of(40, 128, 2)
    body = on_card("exact", vectors)
    monkeypatch.setattr("memevolve_gpu.index.torch_engine.body._DEVICE_CALL", 0.0)
    expected = exact_scan(queries, vectors, 10, "l2")[1]
    x = torch.ones(1024, device=DEVICE)

    def record() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(50):
                x.add_(1)
        graph.replay()

    with meanwhile(record, RuntimeError):
        for _ in range(30):
            assert overlap(body.search(queries, 10, Effort())[1], expected) >= 0.999
            assert overlap(body.search(queries[:1], 10, Effort())[1], expected[:1]) >= 0.9
    assert lost_devices() == {}, "nothing that passes is taken for the end"


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_autocast_and_tf32_of_the_program_do_no_harm(torch: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = 100 * vectors_of(20_000, 128), 100 * vectors_of(200, 128, 2)
    body = on_card(kind, vectors)
    host_is_not_asked(body, monkeypatch)
    efforts = (Effort(), Effort(nprobe=4))
    expected = [body.search(queries, 10, effort) for effort in efforts]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda" if here() != "cpu" else "cpu", dtype=torch.bfloat16), torch.inference_mode():
            for effort, (distances, positions) in zip(efforts, expected, strict=True):
                found = body.search(queries, 10, effort)
                assert overlap(found[1], positions) >= 0.995
                single = np.concatenate([body.search(queries[row : row + 1], 10, effort)[1] for row in range(8)])
                assert overlap(single, positions[:8]) >= 0.95
                np.testing.assert_allclose(np.median(found[0]), np.median(distances), rtol=1e-3)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert body.incidents() == []


def test_what_another_stream_still_writes_is_waited_for(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """cupy says which stream writes an array; reading before that is done would read something else."""
    need_card()
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    vectors, queries = vectors_of(60_000, 384), vectors_of(64, 384, 2)
    body = on_card("exact", vectors, full=True)
    host_is_not_asked(body, monkeypatch)
    expected = body.search(queries, 10, Effort())[1]
    source, large = cupy.asarray(queries), cupy.ones((8192, 8192), cupy.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    for _ in range(5):
        late = cupy.zeros_like(source)
        cupy.cuda.Device().synchronize()
        with stream:
            for _ in range(20):
                cupy.matmul(large, large)
            late[...] = source
            found = body.search(late, 10, Effort())[1]
        assert overlap(found, expected) >= 0.99
