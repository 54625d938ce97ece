"""Engines prove themselves in a child process; whatever becomes of it is a sentence."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
from gpu_kit import on_disk

from memevolve_gpu.devices import engine_probe
from memevolve_gpu.devices.engine_probe import installed, try_engine

NO_KERNEL = """UserWarning: Test GPU with CUDA capability sm_120 is not compatible with the current installation.
Traceback (most recent call last):
  File "<string>", line 6, in <module>
RuntimeError: CUDA error: no kernel image is available for execution on the device
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.

"""
"""What torch says goes on below the error itself."""


@pytest.fixture
def looks_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that may or may not work, and a faiss for GPUs."""
    fake = ModuleType("faiss")
    fake.StandardGpuResources = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "faiss", fake)
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setattr(engine_probe, "_version", lambda _name: "2.11.0")
    monkeypatch.setattr(engine_probe, "_known", type(engine_probe._known)())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo a warning; echo it works", ""),
        ("exit 0", "its trial ended without output"),
        ("echo it works; exit 1", "torch does not work on this GPU"),
        ("echo 'RuntimeError: The NVIDIA driver on your system is too old' >&2; exit 1", "update the GPU driver"),
        ("echo 'libcudart.so.13: cannot open shared object file' >&2; exit 1", "a CUDA library is missing"),
        ("echo 'Error 802: system not yet initialized' >&2; exit 1", "nvidia-fabricmanager"),
        ("echo 'RuntimeError: No CUDA GPUs are available' >&2; exit 1", "CUDA_VISIBLE_DEVICES"),
        ("echo 'ImportError: half installed' >&2; exit 1", "torch does not work on this GPU: ImportError"),
        ("cat >&2 <<'E'\n" + NO_KERNEL + "E\nexit 1", "no kernel image is available"),
        ("cat >&2 <<'E'\n" + NO_KERNEL + "E\nexit 1", "install a build that has code for this GPU"),
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
    said = NO_KERNEL.replace("no kernel image is available for execution on the device", "out of memory")
    full = on_disk(tmp_path, "full", f"#!/bin/sh\necho x >> {count}\ncat >&2 <<'E'\n{said}E\nexit 1\n")
    for _ in range(2):
        assert "another process fills the GPU" in try_engine("torch", 1, command=[full])
    assert count.read_text() == "x\n" * 3
    said = "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"
    full = on_disk(tmp_path, "full", f"#!/bin/sh\necho x >> {count}\necho '{said}' >&2; exit 1\n")
    for _ in range(2):
        assert "another process fills the GPU" in try_engine("torch", 1, command=[full])
    assert count.read_text() == "x\n" * 5


@pytest.mark.usefixtures("looks_installed")
def test_a_process_that_ignores_its_children_is_not_deceived(tmp_path: Path) -> None:
    """Where SIGCHLD is ignored, the system reaps children itself and every status reads as 0."""
    broken = on_disk(tmp_path, "broken", "#!/bin/sh\nsleep 0.2; exit 1\n")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert "does not work" in try_engine("torch", 0, command=[broken])
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("looks_installed")
def test_a_frozen_program_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(engine_probe, "run_subprocess", pytest.fail)
    assert try_engine("torch", 0) == ""


def test_the_programs_run_with_what_is_installed_here() -> None:
    """Neither engine has a GPU here, but each program must get as far as finding that out."""
    for engine in ("torch", "faiss"):
        missing = installed(engine)
        assert missing
        assert try_engine(engine, 0) == missing


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_each_program_asks_its_library(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_probe, "installed", lambda _engine: "")
    monkeypatch.setattr(engine_probe, "_known", type(engine_probe._known)())
    answer = try_engine(engine, 0)
    assert f"{engine} does not work on this GPU" in answer
    assert "without" in answer or "No module" in answer


def test_a_distribution_that_was_half_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert installed("torch") == "", "its name alone is there; the trial will tell"


@pytest.mark.usefixtures("looks_installed")
def test_the_trial_finds_what_this_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it lies; and entries that are no texts, which Python passes over, do not break it."""
    (tmp_path / "torch.py").write_text("raise ImportError('this is the one')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), tmp_path, *sys.path])
    assert "ImportError: this is the one" in try_engine("torch", 0)


@pytest.mark.parametrize(
    "name",
    [
        *("faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs"),
        *("faiss-gpu-cu12-cuvs", "faiss-gpu-cu13-cuvs", "faiss-cuda"),
    ],
)
def test_every_build_of_faiss_for_gpus_is_known_beside_the_one_for_the_cpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr(engine_probe, "_version", lambda each: "1.15.1" if each in ("faiss-cpu", name) else "")
    assert installed("faiss") == ""
    monkeypatch.setattr(engine_probe, "_version", lambda each: "1.15.1" if each == "faiss-cpu" else "")
    assert installed("faiss") == "this faiss was built without GPU support"


@pytest.mark.usefixtures("looks_installed")
def test_a_build_without_code_for_an_old_gpu_is_named(tmp_path: Path) -> None:
    said = "RuntimeError: CUDA error 209 no kernel image is available for execution on the device"
    answer = try_engine("faiss", 0, command=[on_disk(tmp_path, "old", f"#!/bin/sh\necho '{said}' >&2; exit 134\n")])
    assert "install a build that has code for this GPU" in answer
    assert "conda's faiss for CUDA 12.9 has none for 7.0" in answer
