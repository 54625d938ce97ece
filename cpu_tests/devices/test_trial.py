"""Engines prove themselves in a child process; whatever becomes of it is a sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from gpu_kit import on_disk

from memevolve_gpu.devices import trial
from memevolve_gpu.devices.trial import installed, try_engine


@pytest.fixture
def looks_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that may or may not work, and a faiss for GPUs."""
    fake = ModuleType("faiss")
    fake.StandardGpuResources = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "faiss", fake)
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setattr(trial, "_version", lambda _name: "2.11.0")
    monkeypatch.setattr(trial, "_known", type(trial._known)())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 0", ""),
        ("echo 'RuntimeError: The NVIDIA driver on your system is too old' >&2; exit 1", "update the GPU driver"),
        ("echo 'libcudart.so.13: cannot open shared object file' >&2; exit 1", "a CUDA library is missing"),
        ("echo 'ImportError: half installed' >&2; exit 1", "torch does not work on this GPU: ImportError"),
        ("kill -ABRT $$", "SIGABRT"),
        ("kill -SEGV $$", "SIGSEGV"),
        ("sleep 60", "did not answer within 0.5 s"),
    ],
)
@pytest.mark.usefixtures("looks_installed")
def test_a_failed_trial_becomes_a_sentence(script: str, said: str, tmp_path: Path) -> None:
    python = on_disk(tmp_path, "python", f"#!/bin/sh\n{script}\n")
    answer = try_engine("torch", 0, command=[python], timeout=0.5)
    assert (said in answer) if said else answer == ""


@pytest.mark.usefixtures("looks_installed")
def test_the_answer_is_remembered_unless_it_may_change(tmp_path: Path) -> None:
    count = tmp_path / "count"
    broken = on_disk(tmp_path, "broken", f"#!/bin/sh\necho x >> {count}\necho nothing works; exit 1\n")
    for _ in range(3):
        assert "nothing works" in try_engine("torch", 0, command=[broken])
    assert count.read_text() == "x\n"
    full = on_disk(tmp_path, "full", f"#!/bin/sh\necho x >> {count}\necho CUDA error: out of memory; exit 1\n")
    for _ in range(2):
        assert "another process fills the GPU" in try_engine("torch", 1, command=[full])
    assert count.read_text() == "x\n" * 3


def test_the_programs_run_with_what_is_installed_here() -> None:
    """Neither engine has a GPU here, but each program must get as far as finding that out."""
    for engine in ("torch", "faiss"):
        missing = installed(engine)
        assert missing
        assert try_engine(engine, 0) == missing


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_each_program_asks_its_library(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "installed", lambda _engine: "")
    monkeypatch.setattr(trial, "_known", type(trial._known)())
    answer = try_engine(engine, 0)
    assert f"{engine} does not work on this GPU" in answer
    assert "without" in answer or "No module" in answer
