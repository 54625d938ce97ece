"""Whatever a device does, every query is answered, rightly, and somebody is told."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from index.torch_gpu.conftest import CARD
from oracle import check_answer, contents, nearest, recall, rows_of
from support import HANGS, as_child, each
from torch_gpu_kit import ILLEGAL, card_plan, fails_when, on_card, out_of_memory, some

from memevolve_gpu.errors import DeviceError, EngineError
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.device_failover import cause_of
from memevolve_gpu.index.registry import build, from_parts
from memevolve_gpu.index.torch_gpu import device_rows, runtime
from memevolve_gpu.index.torch_gpu import index as index_module
from memevolve_gpu.index.torch_gpu import ivf as ivf_module
from memevolve_gpu.index.torch_gpu import upload as loaded_module
from memevolve_gpu.index.torch_gpu.device_rows import DeviceRows
from memevolve_gpu.index.torch_gpu.index import TorchIndex
from memevolve_gpu.index.torch_gpu.kernel_ops import Operations
from memevolve_gpu.index.torch_gpu.memory_accounting import Account, resident_bytes
from memevolve_gpu.index.torch_gpu.runtime import device_lock
from memevolve_gpu.types import FloatArray, IndexPlan, SearchParams

KINDS = ("exact", "ivf")


def assert_right(
    index: TorchIndex, queries: FloatArray, vectors: FloatArray, params: SearchParams | None = None
) -> None:
    answer = index.search(queries, 10, params or SearchParams())
    check_answer(index, queries, vectors, answer)
    assert recall(answer[0], nearest(queries, vectors, index.metric, 10)) >= 0.999


def what_happened(index: TorchIndex) -> list[tuple[str, str]]:
    return [(incident.cause, incident.action) for incident in index.incidents()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cause", ["out-of-memory", "limit"])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    kind: str, cause: str, card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = some(1), some(2, 40)
    index = on_card(kind, vectors)
    error = out_of_memory(torch) if cause == "out-of-memory" else DeviceError("no room", "limit")
    asked = fails_when(monkeypatch, lambda at_once: error if at_once > 8 else None)
    assert_right(index, queries, vectors)
    assert asked == [40, 20, 10, 5, 5, 5, 5, 5, 5, 5, 5]
    assert what_happened(index) == [(cause, "smaller-batch")] * 3
    assert index.device == CARD
    assert_right(index, queries, vectors)
    assert max(asked[11:]) == 5, "what was learnt is kept"
    assert index.incidents() == []


def test_filters_are_dropped_when_memory_is_short(card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries, mask = some(1), some(2, 40), RowFilter(np.arange(2000) % 2 == 0)
    index = on_card("exact", vectors)
    index.search(queries, 10, SearchParams(), mask)
    assert len(index._masks._kept) == 1
    fails_when(monkeypatch, lambda at_once: out_of_memory(torch) if at_once > 8 else None)
    assert_right(index, queries, vectors)
    assert len(index._masks._kept) == 0


def test_room_is_made_on_the_devices_turn_and_only_where_it_is_short(
    card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = some(1), some(2, 40)
    index, free = on_card("exact", vectors), []

    def look() -> None:
        with ThreadPoolExecutor(1) as pool:  # another thread would get the lock only if nobody had it
            free.append(pool.submit(device_lock(CARD).acquire, False).result())

    monkeypatch.setattr(index._graphs, "clear", look)
    fails_when(monkeypatch, lambda _: RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))
    assert_right(index, queries, vectors)
    assert free == [], "nothing is dropped for what is no want of room"
    monkeypatch.setattr(index._failover, "_clock", lambda: float("inf"))
    fails_when(monkeypatch, lambda at_once: out_of_memory(torch) if at_once > 20 else None)
    assert_right(index, queries, vectors)
    assert free == [False]


def test_work_on_a_device_has_a_stream_of_its_own(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Stream:
        def __init__(self, device: str) -> None:
            done.append(("made", device))

        def wait_stream(self, other: Any) -> None:
            done.append(("waits for", other))

    @contextmanager
    def to_device_space(what: Any) -> Iterator[None]:
        done.append(("in", what if isinstance(what, str) else "own"))
        yield

    monkeypatch.setattr(runtime, "_streams", {})
    for name, fake in {
        "Stream": Stream,
        "stream": to_device_space,
        "device": to_device_space,
        "current_stream": lambda _: "caller",
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for _ in range(2):
        with runtime.current("cuda:3"):
            done.append("work")
    once = [("waits for", "caller"), ("in", "own"), "work"]
    assert done == [("in", "cuda:3"), ("made", "cuda:3"), *once, ("in", "cuda:3"), *once]


def test_a_cut_batch_grows_again(card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = some(1), some(2, 40)
    index, now = on_card("exact", vectors), [0.0]
    monkeypatch.setattr(index._failover, "_clock", lambda: now[0])
    room = [8]
    asked = fails_when(monkeypatch, lambda at_once: out_of_memory(torch) if at_once > room[0] else None)
    assert_right(index, queries, vectors)
    room[0] = 100
    for _ in range(5):
        now[0] += 60.0
        assert_right(index, queries, vectors)
    assert asked[-1] == 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_with_a_byte_limit_answers_in_smaller_batches(kind: str, card: Account) -> None:
    vectors, queries = some(1), some(2, 64)
    index = on_card(kind, vectors)
    card.limit = card.used + 40_000
    assert_right(index, queries, vectors)
    assert {cause for cause, _ in what_happened(index)} == {"limit"}
    assert index.device == CARD
    card.limit = card.used + 100
    assert_right(index, queries, vectors)
    assert what_happened(index)[-1] == ("limit", "cpu")
    assert index.device == "cpu"
    assert index.device_bytes > 0, "the rows wait there"


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_answers_until_the_device_has_room_again(
    kind: str, card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = some(1), some(2, 20)
    index, now, float32_rows = on_card(kind, vectors), [1000.0], [True]
    monkeypatch.setattr(index._failover, "_clock", lambda: now[0])
    asked = fails_when(monkeypatch, lambda _: out_of_memory(torch) if float32_rows[0] else None)
    assert_right(index, queries, vectors)
    assert what_happened(index)[-1] == ("out-of-memory", "cpu")
    before = len(asked)
    for _ in range(3):
        assert_right(index, queries, vectors)
    assert len(asked) == before, "a resting device is left alone"
    now[0] += 16.0
    assert_right(index, queries, vectors)
    assert len(asked) > before
    assert what_happened(index) == [("out-of-memory", "cpu")]
    float32_rows[0] = False
    now[0] += 16.0
    assert index.device == "cpu", "it rests twice as long the second time"
    now[0] += 15.0
    assert_right(index, queries, vectors)
    assert what_happened(index) == [("recovered", "device-again")]
    assert index.device == CARD


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_device_is_left_alone_until_restart(kind: str, card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = some(1), some(2, 20)
    index, other = on_card(kind, vectors), on_card("exact", vectors)
    asked = fails_when(monkeypatch, lambda _: RuntimeError(ILLEGAL))
    assert_right(index, queries, vectors)
    assert_right(index, queries, vectors)
    assert_right(other, queries, vectors)
    assert asked == [20]
    assert what_happened(index) == what_happened(other) == [("device-lost", "cpu-until-restart")]
    assert index.device == other.device == "cpu"
    assert_right(other, queries, vectors)
    assert other.incidents() == []
    with pytest.raises(DeviceError, match="restart") as caught:
        on_card(kind, vectors)
    assert caught.value.cause == "device-lost"


def test_single_queries_are_answered_too(card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = some(1, 40_000)
    index = on_card("exact", vectors)
    fails_when(monkeypatch, lambda _: RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))
    assert_right(index, some(2, 1), vectors)
    assert what_happened(index) == [("device-error", "cpu")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_child_leaves_the_device_alone(kind: str, card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = some(1), some(2, 20)
    index = on_card(kind, vectors)
    expected = index.search(queries, 10, SearchParams())[1]
    asked = fails_when(monkeypatch, lambda _: None)

    def act() -> None:
        found = index.search(queries, 10, SearchParams())[1]
        assert np.array_equal(np.sort(found), np.sort(expected))
        assert what_happened(index) == [("fork", "cpu-until-restart")]
        assert asked == []
        assert index.device == "cpu"

    with device_lock(CARD):
        assert as_child(act) == 0
    assert index.device == CARD


@pytest.mark.parametrize("kind", KINDS)
def test_building_without_room_is_refused_and_leaves_nothing(
    kind: str, card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, used = some(1), card.used
    card.limit = used + 100_000
    with pytest.raises(DeviceError, match="gpu_memory_fraction") as caught:
        on_card(kind, vectors)
    assert caught.value.cause == "limit"
    card.limit = None

    def float32_rows(*_: object, **__: object) -> None:
        raise out_of_memory(torch)

    monkeypatch.setattr(DeviceRows, "empty", float32_rows)
    with pytest.raises(DeviceError, match="out of memory") as caught:
        on_card(kind, vectors)
    assert caught.value.cause == "out-of-memory"
    assert card.used == used


def test_what_a_body_held_is_given_back_when_it_is_gone(card: Account) -> None:
    gc.collect()
    vectors, used = some(1), card.used
    index = on_card("exact", vectors)
    held = card.used - used
    assert held == pytest.approx(resident_bytes(len(vectors), vectors.shape[1], "float32"), rel=0.1)
    assert held == pytest.approx(index.device_bytes, rel=0.01)
    index.search(vectors[:50], 10, SearchParams())
    del index
    assert card.used == used, "at once, not when garbage is collected"


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_opens_where_its_device_is_missing(
    kind: str, card: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = some(1), some(2, 20)
    parts, plan = contents(on_card(kind, vectors)), card_plan(kind, vectors)

    def missing(device: str) -> None:
        raise DeviceError(f"device {device}: no GPU", "device-error")

    with monkeypatch.context() as without:
        without.setattr(index_module, "open_device", missing)
        index = from_parts(plan, "l2", parts)
        assert isinstance(index, TorchIndex)
        assert_right(index, queries, vectors)
        assert (index.device, index.device_bytes, index.plan.engine) == ("cpu", 0, "torch")
        assert what_happened(index) == [("device-error", "cpu")]
    monkeypatch.setattr(index._failover, "_clock", lambda: float("inf"))
    assert_right(index, queries, vectors)
    assert index._loader is not None
    index._loader.join()
    assert index.device == CARD, "it comes back by itself"
    assert_right(index, queries, vectors)
    assert what_happened(index) == [("recovered", "device-again")]


def test_a_device_that_does_not_come_back_holds_nobody_else(card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_LOCK_TIMEOUT_S", 0.05)
    vectors, queries = some(1), some(2, 20)
    index, hangs, go_on = on_card("exact", vectors), threading.Event(), threading.Event()

    def hanging() -> None:
        with device_lock(CARD):
            hangs.set()
            go_on.wait(HANGS)

    thread = threading.Thread(target=hanging)
    thread.start()
    hangs.wait(HANGS)
    try:
        assert_right(index, queries, vectors)
        assert what_happened(index) == [("device-error", "cpu")]
    finally:
        go_on.set()
        thread.join()


def test_a_thread_that_cannot_be_had_fails_no_search(card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = some(1), some(2, 20)
    parts, plan = contents(on_card("exact", vectors)), card_plan("exact", vectors)

    def refused(*_: object) -> None:
        raise DeviceError("no GPU")

    with monkeypatch.context() as without:
        without.setattr(index_module, "open_device", refused)
        index = from_parts(plan, "l2", parts)
    assert isinstance(index, TorchIndex)
    now = [1e6]
    monkeypatch.setattr(index._failover, "_clock", lambda: now[0])
    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no thread")))
        assert_right(index, queries, vectors)
    assert "no thread" in index.incidents()[-1].detail
    now[0] += 1e6
    assert_right(index, queries, vectors)
    assert index._loader is not None
    index._loader.join()
    assert index.device == CARD


def test_the_end_of_the_process_stops_builds_and_waits_for_them() -> None:
    program = """
import atexit, threading, time

def last():
    print("over" if over else "under way", device_lock("cuda:1").acquire(timeout=1), flush=True)

atexit.register(last)  # what is registered first runs last
from memevolve_gpu.errors import EngineError
from memevolve_gpu.index.torch_gpu.runtime import begun_build, device_lock

over = []

def build():
    try:
        with begun_build():
            while True:
                with device_lock("cuda:0"):
                    begun[0].set()
                    time.sleep(0.3)
    except EngineError as error:
        over.append(error)

def search():
    while True:
        with device_lock("cuda:1"):
            begun[1].set()
            time.sleep(0.01)
        time.sleep(0.001)  # or the end of the process might never get the lock

begun = threading.Event(), threading.Event()
for work in (build, search):
    threading.Thread(target=work, daemon=True).start()
for one in begun:
    one.wait()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert (found.returncode, found.stdout) == (0, "over True\n"), found.stderr


def test_other_bodies_are_searched_while_one_is_built(card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = some(1), some(2, 20)
    index, real, searched = on_card("exact", vectors), device_rows.blocks_of, []

    def blocks(table: Any, first: int = 0) -> Iterator[Any]:
        for block in real(table, first):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(assert_right, index, queries, vectors).result(timeout=HANGS)
            searched.append(1)
            yield block

    monkeypatch.setattr(loaded_module, "blocks_of", blocks)
    monkeypatch.setattr(device_rows, "blocks_of", blocks)
    monkeypatch.setattr(ivf_module, "blocks_of", blocks)
    on_card("ivf", vectors)
    assert len(searched) == 3


def test_without_torch_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    vectors = some(1, 100)
    with pytest.raises(EngineError, match=r"pip install 'memevolve-gpu\[torch\]'"):
        build(IndexPlan("exact", engine="torch"), rows_of(vectors), "l2", seed=1)
    with pytest.raises(EngineError, match="pip install"):
        runtime.open_device("cpu")


def test_a_machine_without_a_gpu_says_so(torch: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="sees no GPU"):
        runtime.open_device("cuda:0")
    assert runtime.open_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such instruction"),
        subprocess.CalledProcessError(1, ["gcc"]),
        AssertionError("libcuda.so cannot found!"),
    ],
)
def test_a_kernel_that_does_not_run_gives_way_to_its_reference(error: Exception, torch: Any) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise error

    notes: list[str] = []
    operations = Operations(torch.device("cpu"), notes.append, Broken())
    x = torch.eye(16, dtype=torch.float16)
    for _ in range(2):
        labels, _ = operations.assign(x, x, torch.ones(16))
        assert labels.tolist() == list(range(16))
    assert len(notes) == 1
    assert "kernel assign" in notes[0]


@pytest.mark.parametrize("error", ["CUDA out of memory. Tried to allocate 2 GiB", ILLEGAL])
def test_what_is_no_kernels_fault_is_raised(torch: Any, error: str) -> None:
    class Failing:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(error)

    operations = Operations(torch.device("cpu"), lambda _: None, Failing())
    with pytest.raises(RuntimeError, match=error[:9]):
        operations.assign(torch.eye(16), torch.eye(16), torch.ones(16))


@each(
    ("text", "cause"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB", "out-of-memory"),
        ("CUDA error: out of memory", "out-of-memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "out-of-memory"),
        ("Triton Error [CUDA]: out of memory", "out-of-memory"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", "out-of-memory"),
        (ILLEGAL, "device-lost"),
        ("CUDA error: device-side assert triggered", "device-lost"),
        ("Triton Error [CUDA]: an illegal memory access was encountered", "device-lost"),
        ("CUDA error: uncorrectable ECC error encountered", "device-lost"),
        ("Triton Error [CUDA]: device kernel image is invalid", "device-error"),
        ("CUDA error: operation not permitted when stream is capturing", "device-error"),
        ("CUDA error: no kernel image is available for execution on the device", "device-error"),
        ("CUDA error: invalid argument", "device-error"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "device-error"),
        ("CUDA error: operation not supported on global/shared address space", "device-lost"),
        ("CUDA error: unknown error", "device-lost"),
        ("CUDA error: something that is not known yet", "device-lost"),
        ("expected scalar type Half but found Float", "device-error"),
    ],
)
def test_what_torch_says_is_understood(text: str, cause: str) -> None:
    assert cause_of(RuntimeError(text)) == cause


@pytest.mark.parametrize("error", [AssertionError("Torch not compiled with CUDA enabled"), RuntimeError("no driver")])
def test_a_torch_that_cannot_begin_is_refused(
    error: Exception, card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(runtime, "current", fails)
    with pytest.raises(DeviceError, match=f"{error}; the CPU can hold this index"):
        on_card("exact", some(1))
