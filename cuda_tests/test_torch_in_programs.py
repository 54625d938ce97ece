"""The torch engine on a real GPU inside programs that use torch themselves: threads, streams, graphs, autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_tests.card_kit import open_store
from cuda_tests.torch_kit import (
    DEVICE,
    alone,
    here,
    host_is_not_asked,
    meanwhile,
    need_card,
    on_card,
    overlap,
    vectors_of,
)

from memevolve_gpu.index.device_failover import lost_devices
from memevolve_gpu.index.exact_scan import exact_scan
from memevolve_gpu.types import SearchParams


def test_bodies_are_built_while_others_record(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build waits for the device, which CUDA forbids while a search is being recorded: neither may fail for it."""
    vectors, query = vectors_of(60_000, 128), vectors_of(1, 128, 2)
    monkeypatch.setattr("memevolve_gpu.index.torch_gpu.index._DEVICE_CALL", 0.0)
    expected = exact_scan(query, vectors, 10, "l2")[1]

    def build() -> None:
        on_card("exact", vectors[:20_000])

    with meanwhile(build):
        for _ in range(4 if here() == "cpu" else 20):
            index = on_card("exact", vectors)
            for k in (10, 20, 40):
                for _ in range(4):
                    assert overlap(index.search(query, k, SearchParams())[1][:, :10], expected) >= 0.9
            assert index.incidents() == []
            assert index.device == DEVICE
    assert lost_devices() == {}


PREPARE = """
import torch
from memevolve_gpu.index.exact_scan import exact_scan
from memevolve_gpu.index.torch_gpu import index as index_module
from memevolve_gpu.index.device_failover import lost_devices
from memevolve_gpu.index.torch_gpu.cuda_graphs import record_searches
index_module._DEVICE_CALL = 0.0
record_searches(True)
vectors, queries = vectors_of(60_000, 128), vectors_of(40, 128, 2)
expected = exact_scan(queries, vectors, 10, "l2")[1]
"""


def test_a_program_that_waits_for_the_device_all_the_time(torch: Any) -> None:
    """Its waiting may spoil a recording: searches are answered, the device is kept, the thread keeps its stream, and
    torch's allocator gives back what it holds, as it does not while it believes that something is being recorded.
    """
    need_card()
    program = """
own, right = torch.cuda.current_stream(), []
with meanwhile(torch.cuda.synchronize, RuntimeError) as refused:
    for _ in range(10):
        index = on_card("exact", vectors)
        right += [overlap(index.search(queries[:1], 10, SearchParams())[1], expected[:1]) >= 0.9 for _ in range(8)]
        right += [index.device == DEVICE]
same = torch.cuda.current_stream() == own
room = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
del room
before = torch.cuda.memory_reserved()
torch.cuda.empty_cache()
print(len(refused), "calls of the program were refused")
print(all(right), lost_devices(), same, torch.cuda.memory_reserved() < before)
"""
    assert alone(PREPARE + program) == "True {} True True"


def test_a_program_that_records_graphs_of_its_own(torch: Any) -> None:
    """Under torch's default mode most calls of other threads fail meanwhile: answers come from the host then, and
    nothing that passes is taken for the end."""
    need_card()
    program = """
index, right = on_card("exact", vectors), []
x = torch.ones(1024, device=DEVICE)
def record():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(50):
            x.add_(1)
    graph.replay()
with meanwhile(record, RuntimeError) as refused:
    for _ in range(30):
        right += [overlap(index.search(queries, 10, SearchParams())[1], expected) >= 0.999]
        right += [overlap(index.search(queries[:1], 10, SearchParams())[1], expected[:1]) >= 0.9]
print(len(refused), "recordings of the program broke off", index.incidents())
print(all(right), lost_devices(), flush=True)
import os
os._exit(0)  # what broke off is the program's own affair
"""
    assert alone(PREPARE + program) == "True {}"


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_autocast_tf32_and_default_device_of_the_program_do_no_harm(
    torch: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = 100 * vectors_of(20_000, 128), 100 * vectors_of(200, 128, 2)
    index = on_card(kind, vectors)
    host_is_not_asked(index, monkeypatch)
    param_sets = (SearchParams(), SearchParams(nprobe=4))
    expected = [index.search(queries, 10, params) for params in param_sets]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        kind = "cuda" if here() != "cpu" else "cpu"
        with torch.device(here()), torch.autocast(kind, dtype=torch.bfloat16), torch.inference_mode():
            for params, (distances, positions) in zip(param_sets, expected, strict=True):
                found = index.search(queries, 10, params)
                assert overlap(found[1], positions) >= 0.995
                single = np.concatenate([index.search(queries[row : row + 1], 10, params)[1] for row in range(8)])
                assert overlap(single, positions[:8]) >= 0.95
                np.testing.assert_allclose(np.median(found[0]), np.median(distances), rtol=1e-3)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert index.incidents() == []


def test_what_another_stream_still_writes_is_waited_for(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """cupy says which stream writes an array; reading before that is done would read something else."""
    need_card()
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    vectors, queries = vectors_of(60_000, 384), vectors_of(64, 384, 2)
    index = on_card("exact", vectors, float32_rows=True)
    host_is_not_asked(index, monkeypatch)
    expected = index.search(queries, 10, SearchParams())[1]
    source, large = cupy.asarray(queries), cupy.ones((8192, 8192), cupy.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    for _ in range(5):
        late = cupy.zeros_like(source)
        cupy.cuda.Device().synchronize()
        with stream:
            for _ in range(20):
                cupy.matmul(large, large)
            late[...] = source
            found = index.search(late, 10, SearchParams())[1]
        assert overlap(found, expected) >= 0.99


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1.0])
def test_a_program_may_end_while_its_store_builds(torch: Any, seconds: float, tmp_path: Path) -> None:
    """Without closing it: a thread that the interpreter stops inside torch would take the process with it."""
    program = f"""
import time
from pathlib import Path
from cuda_tests.card_kit import embeddings, open_store, units
store = open_store(Path({str(tmp_path)!r}) / "memory", "torch", dim=96, index_type="ivf", background=True)
store.store_batch(units(0, 20_000), embeddings=embeddings(20_000, 96))
time.sleep({seconds})
print("the end", flush=True)
"""
    assert alone(program) == "the end"
    with open_store(tmp_path / "memory", "torch") as store:
        assert store.count() == 20_000
        assert store.check() == []
