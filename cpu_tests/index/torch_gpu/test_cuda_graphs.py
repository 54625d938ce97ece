"""When single queries are recorded, and what happens when they cannot be; the recording itself needs a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from memevolve_gpu.index.torch_gpu import cuda_graphs
from memevolve_gpu.index.torch_gpu.cuda_graphs import CudaGraphCache

CARD = SimpleNamespace(type="cuda")


class Asked:
    """A query of four columns that can be brought anywhere."""

    shape = (1, 4)

    def to(self, _: object) -> Asked:
        return self


class Found:
    def cpu(self) -> str:
        return "launched"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns of each recording that was made."""
    made: list[int] = []

    def recording(columns: int, device: object, search: object) -> Any:
        made.append(columns)
        return SimpleNamespace(run=lambda _: "replayed")

    monkeypatch.setattr(cuda_graphs, "_Recording", recording)
    monkeypatch.setattr(cuda_graphs, "load_torch", lambda: waiting(lambda: None))
    monkeypatch.setattr(cuda_graphs._Switch, "on", True)
    return made


def waiting(synchronize: Any) -> Any:
    """torch, whose current stream waits like this."""
    stream = SimpleNamespace(synchronize=synchronize)
    return SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda _: stream))


def ask(replays: CudaGraphCache, shape: tuple[int, int], device: Any = CARD) -> str:
    found: str = replays.run((*shape, 0, False), Asked(), device, lambda _: Found())
    return found


def test_a_search_is_recorded_once_it_is_warm(recorded: list[int]) -> None:
    replays = CudaGraphCache(pytest.fail)
    assert [ask(replays, (32, 0)) for _ in range(5)] == ["launched"] * 2 + ["replayed"] * 3
    assert recorded == [4]
    assert ask(replays, (64, 0)) == "launched", "another shape"
    assert [ask(replays, (32, 0), SimpleNamespace(type="cpu")) for _ in range(5)] == ["launched"] * 5


def test_shapes_that_change_all_the_time_are_launched_plainly(recorded: list[int]) -> None:
    replays = CudaGraphCache(pytest.fail)
    for _ in range(10):
        for want in range(8):
            ask(replays, (32 << want, 0))
    assert len(recorded) == 16
    assert len(replays._kept) == 4
    assert ask(replays, (32, 0)) == "launched"


def test_what_cannot_be_recorded_is_launched_and_told_once(
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        recorded.append(1)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "_Recording", failing)
    notes: list[str] = []
    replays = CudaGraphCache(notes.append)
    assert [ask(replays, (32, 0)) for _ in range(6)] == ["launched"] * 6
    assert len(recorded) == len(notes) == 1
    assert "capturing" in notes[0]


def test_a_lost_device_is_not_taken_for_a_failed_recording(
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_graphs, "_Recording", lost)
    monkeypatch.setattr(cuda_graphs, "load_torch", lambda: waiting(lost))
    replays = CudaGraphCache(pytest.fail)
    ask(replays, (32, 0))
    ask(replays, (32, 0))
    with pytest.raises(RuntimeError, match="illegal"):
        ask(replays, (32, 0))


def test_nothing_is_recorded_unless_it_is_asked_for(recorded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_graphs.record_searches(False)
    replays = CudaGraphCache(pytest.fail)
    assert [ask(replays, (32, 0)) for _ in range(6)] == ["launched"] * 6
    cuda_graphs.record_searches(True)
    assert [ask(replays, (32, 0)) for _ in range(3)] == ["launched"] * 2 + ["replayed"]


def test_a_full_device_is_not_taken_for_a_failed_recording(
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cuda_graphs._Recording

    def float32_rows(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(cuda_graphs, "_Recording", float32_rows)
    replays = CudaGraphCache(pytest.fail)
    ask(replays, (32, 0))
    ask(replays, (32, 0))
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(replays, (32, 0))
    monkeypatch.setattr(cuda_graphs, "_Recording", real)
    assert ask(replays, (32, 0)) == "replayed", "it is tried again once there is room"


def test_a_recording_that_breaks_off_leaves_the_thread_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Stream:
        device_index = 3

        def wait_stream(self, _: object) -> None: ...

        def synchronize(self) -> None: ...

    before = Stream()

    class Breaks:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    cuda = SimpleNamespace(
        current_stream=lambda _: before,
        Stream=lambda _: Stream(),
        stream=lambda _: nullcontext(),
        CUDAGraph=object,
        graph_pool_handle=lambda: "pool",
        graph=Breaks,
        set_stream=done.append,
    )
    bindings = SimpleNamespace(_cuda_endAllocateToPool=lambda *given: done.append(given))
    torch = SimpleNamespace(cuda=cuda, _C=bindings, zeros=lambda *_, **__: None, float32=None)
    monkeypatch.setattr(cuda_graphs, "load_torch", lambda: torch)
    with pytest.raises(RuntimeError, match="capture"):
        cuda_graphs._Recording(4, CARD, lambda _: None)
    assert done == [before, (3, "pool")]
