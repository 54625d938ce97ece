"""When single queries are recorded, and what happens when they cannot be; the recording itself needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from memevolve_gpu.index.torch_engine import replay
from memevolve_gpu.index.torch_engine.replay import Replays

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

    monkeypatch.setattr(replay, "_Recording", recording)
    monkeypatch.setattr(replay, "load_torch", lambda: SimpleNamespace(cuda=SimpleNamespace(synchronize=lambda _: None)))
    return made


def ask(replays: Replays, shape: tuple[int, int], device: Any = CARD) -> str:
    found: str = replays.run((*shape, False), Asked(), device, lambda _: Found())
    return found


def test_a_search_is_recorded_once_it_is_warm(recorded: list[int]) -> None:
    replays = Replays(pytest.fail)
    assert [ask(replays, (32, 0)) for _ in range(5)] == ["launched"] * 2 + ["replayed"] * 3
    assert recorded == [4]
    assert ask(replays, (64, 0)) == "launched", "another shape"
    assert [ask(replays, (32, 0), SimpleNamespace(type="cpu")) for _ in range(5)] == ["launched"] * 5


def test_shapes_that_change_all_the_time_are_launched_plainly(recorded: list[int]) -> None:
    replays = Replays(pytest.fail)
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

    monkeypatch.setattr(replay, "_Recording", failing)
    notes: list[str] = []
    replays = Replays(notes.append)
    assert [ask(replays, (32, 0)) for _ in range(6)] == ["launched"] * 6
    assert len(recorded) == len(notes) == 1
    assert "capturing" in notes[0]


def test_a_lost_device_is_not_taken_for_a_failed_recording(
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(replay, "_Recording", lost)
    monkeypatch.setattr(replay, "load_torch", lambda: SimpleNamespace(cuda=SimpleNamespace(synchronize=lost)))
    replays = Replays(pytest.fail)
    ask(replays, (32, 0))
    ask(replays, (32, 0))
    with pytest.raises(RuntimeError, match="illegal"):
        ask(replays, (32, 0))
