"""Finding GPUs: whatever the driver does, the answer is a list or a sentence, and CUDA is never loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Forks
from gpu_kit import MB, line, on_disk, printing
from support import each

from memevolve_gpu.devices.gpu_probe import GpuList, Prober
from memevolve_gpu.devices.selection import select_device
from memevolve_gpu.devices.subprocess_query import run_subprocess


def found(*lines: str, visible: str | None = None, order: str | None = None) -> GpuList:
    return Prober(visible, order, command=printing(*lines)).look()


def test_a_card_is_described_by_its_driver() -> None:
    (gpu,) = found(line(name="NVIDIA H200, big", total=143_771, free=143_000)).gpus
    assert (gpu.device, gpu.name, gpu.capability) == ("cuda:0", "NVIDIA H200, big", (9, 0))
    assert (gpu.total_mb, gpu.free_mb, gpu.total) == (143_771, 143_000, 143_771 * MB)
    assert not gpu.problem


@each(
    ("lines", "said"),
    [
        ((), "lists no GPU"),
        (("No devices were found",), "lists no GPU"),
        ((line(driver="470.223.02"),), "driver 470.223.02 is too old; CUDA 12 needs 525.60 or newer"),
        ((line(capability="6.1"),), "compute capability 6.1; at least 7.0 is needed"),
        ((line(total="[N/A]", free="[N/A]"),), "does not tell its memory"),
        ((line(total="[Not Supported]"),), "does not tell its memory"),
        ((line(free="[Insufficient Permissions]"),), "does not tell its memory"),
        ((line(name="[Unknown Error]", total="[GPU requires reset]"),), "does not tell its memory"),
        ((line(free="\u00b2"),), "does not tell its memory"),
        ((line(mig="Enabled"),), "Test GPU is cut into MIG slices, which are not supported; use a whole GPU"),
        ((line(0, mig="Enabled"), line(1, capability="6.1")), "cut into MIG slices"),
    ],
)
def test_what_cannot_serve_becomes_a_sentence(lines: tuple[str, ...], said: str) -> None:
    answer = found(*lines)
    assert said in answer.problem
    assert answer.usable == ()
    assert said in select_device("cuda", lambda: answer).reason
    if lines and answer.gpus:
        assert said in select_device("cuda:0", lambda: answer).reason


def test_a_driver_that_fails_or_crashes_becomes_a_sentence() -> None:
    failed = Prober(command=["/bin/sh", "-c", "echo couldn\\'t communicate with the driver >&2; exit 9"]).look()
    assert "status 9: couldn't communicate with the driver" in failed.problem
    crashed = Prober(command=["/bin/sh", "-c", "kill -ABRT $$"]).look()
    assert "SIGABRT" in crashed.problem
    assert "cannot be started" in Prober(command=["./not/there"]).look().problem


def test_a_driver_that_hangs_costs_the_time_limit_once(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    prober = Prober(command=["/bin/sh", "-c", f"echo x >> {asked}; sleep 60"], timeout=0.3)
    started = time.monotonic()
    assert "did not answer within 0.3 s" in prober.look().problem
    assert "did not answer" in prober.look(max_age=0).problem
    assert time.monotonic() - started < 20
    assert asked.read_text() == "x\n"


def test_a_child_that_cannot_be_killed_is_left_behind() -> None:
    """A grandchild keeps the pipe open after the child is gone, as a process that sleeps inside a driver would."""
    started = time.monotonic()
    answer = run_subprocess(["/bin/sh", "-c", "setsid sleep 8 & wait"], 0.2)
    assert answer.code is None
    assert time.monotonic() - started < 6


@each(
    ("visible", "names"),
    [
        (None, ["A", "B", "C"]),
        ("0,1,2", ["A", "B", "C"]),
        ("1gpu2,2ampere", ["B", "C"]),
        ("0,0", []),
        ("2,1,2", []),
        ("0,-1,1", ["A"]),
        ("0,,1", ["A"]),
        ("none", []),
        ("NoDevFiles", []),
        ("3", []),
        ("\u00b2", []),
        ("99999999999999999999", []),
        ("GPU-2,GPU-0", ["C", "A"]),
        ("GPU-2aaaa,GPU-2", []),
        ("GPU-1aaaa,0", ["B"]),
        ("0,GPU-1aaaa", ["A"]),
        ("GPU-", []),
        ("GPU-7,GPU-0", []),
        ("gpu-1aaaa", []),
        ("MIG-GPU-1aaaa/1/0", []),
        (" ", []),
        ("2,0", ["C", "A"]),
        ("GPU-1aaaa", ["B"]),
        (" 1 , 7, 0", ["B"]),
        ("", []),
        ("-1", []),
        ("MIG-5", []),
    ],
)
def test_gpus_are_numbered_as_cuda_shows_them(visible: str | None, names: list[str]) -> None:
    answer = found(*(line(i, name) for i, name in enumerate("ABC")), visible=visible)
    assert [gpu.name for gpu in answer.gpus] == names
    assert [gpu.index for gpu in answer.gpus] == list(range(len(names)))
    assert bool(answer.problem) == (not names)


def test_an_ambiguous_uuid_ends_the_list() -> None:
    alike = [line(0, "A", uuid="GPU-ab1"), line(1, "B", uuid="GPU-ab2")]
    assert found(*alike, visible="GPU-ab").gpus == ()
    assert [gpu.name for gpu in found(*alike, visible="GPU-ab2").gpus] == ["B"]


def test_slices_that_alone_are_shown_are_named() -> None:
    answer = found(line(), visible="MIG-3f2a")
    assert "names MIG slices, which are not supported" in answer.problem
    assert answer.detected
    assert not found(line(), visible="").detected
    assert select_device("auto", lambda: answer).failed


def test_doubt_about_the_numbers_is_told_where_cards_differ() -> None:
    """CUDA puts the fastest first unless told otherwise; the driver's list is in the order of the bus."""
    mixed, alike = [line(0, "Slow"), line(1, "Fast")], [line(0), line(1)]
    for request in ("cuda", "cuda:1", "auto"):
        assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in select_device(request, lambda: found(*mixed)).reason
        assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in select_device(request, lambda: found(*mixed, visible="1,0")).reason
    assert found(*mixed, order="FASTEST_FIRST").doubt
    for sure in (
        found(*mixed, order="PCI_BUS_ID"),
        found(*mixed, visible="GPU-1aaaa,GPU-0aaaa"),
        found(*alike),
        found(mixed[0]),
    ):
        assert not sure.doubt
        assert "ORDER" not in select_device("cuda", lambda sure=sure: sure).reason  # type: ignore[misc]


def test_a_lost_card_does_not_hide_the_others() -> None:
    """nvidia-smi lists what it can and fails; CUDA counts what works, without gaps."""
    complaint = "Unable to determine the device handle for GPU0000:04:00.0: GPU is lost.  Reboot the system"
    script = f"echo '{line(0, 'A')}'; echo '{complaint}'; echo '{line(2, 'C')}'; exit 15"
    answer = Prober(command=["/bin/sh", "-c", script]).look()
    assert [(gpu.device, gpu.name) for gpu in answer.usable] == [("cuda:0", "A"), ("cuda:1", "C")]
    assert not answer.problem


def test_a_driver_without_devices_is_no_failure(tmp_path: Path) -> None:
    sign = tmp_path / "nvidiactl"
    sign.touch()
    answer = Prober(command=["/bin/sh", "-c", "echo No devices were found; exit 6"], signs=[sign]).look()
    assert answer.problem == "the GPU driver lists no GPU"
    assert not answer.detected


def test_a_driver_that_fails_speaks_for_a_card_only_where_it_is_loaded(tmp_path: Path) -> None:
    fails, (control, wsl) = ["/bin/sh", "-c", "exit 9"], (tmp_path / "nvidiactl", tmp_path / "dxg")
    wsl.touch()
    assert not Prober(command=fails, signs=[control, wsl]).look().detected, "WSL has its sign with every maker's card"
    control.touch()
    assert Prober(command=fails, signs=[control, wsl]).look().detected
    assert not Prober(command=["./not/there"], signs=[control]).look().detected
    for broken in ("sleep 9", "kill -SEGV $$"):
        assert Prober(command=["/bin/sh", "-c", broken], signs=[], timeout=0.3).look().detected


def test_a_driver_too_old_for_the_question_is_called_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "#!/bin/sh\necho 'Field \"compute_cap\" is not a valid field to query.'; echo; exit 2\n"
    on_disk(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    answer = Prober(signs=[]).look()
    assert answer.problem == "the GPU driver is too old; CUDA 12 needs 525.60 or newer"
    assert answer.detected


def test_the_question_is_the_one_that_the_answer_is_read_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvml(monkeypatch)
    on_disk(tmp_path, "nvidia-smi", f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{line()}'\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert Prober().look().usable
    query = "--query-gpu=index,name,uuid,compute_cap,memory.total,memory.free,mig.mode.current,driver_version"
    assert (tmp_path / "asked").read_text().split() == [query, "--format=csv,noheader,nounits"]


def test_all_of_a_short_complaint_is_told() -> None:
    """The last line of this one is a version number, and says nothing."""
    script = "echo 'Failed to initialize NVML: Driver/library version mismatch'; echo 'NVML library version: 535.104'"
    answer = Prober(command=["/bin/sh", "-c", f"{script}; exit 18"]).look()
    assert "Driver/library version mismatch; NVML library version: 535.104" in answer.problem


def test_an_interrupted_question_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    communicate = subprocess.Popen.communicate

    def interrupted(self: subprocess.Popen[str], *arguments: object, **named: object) -> object:
        if not started:
            started.append(self)
            raise KeyboardInterrupt
        return communicate(self, *arguments, **named)  # type: ignore[arg-type, misc]

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_subprocess(["/bin/sh", "-c", "sleep 60"], 50)
    assert started[0].returncode == -9


def test_a_frozen_program_is_not_started_again(driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sys.executable of a bundled application is the application itself."""
    (tmp_path / "pynvml.py").write_text(f"FAILS = False\n{NVML}")
    monkeypatch.syspath_prepend(tmp_path)
    assert Prober(signs=[driver]).look().usable
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert Prober(signs=[driver]).look().gpus == ()


def test_the_request_is_resolved_with_its_reason() -> None:
    cards = [line(0, "A", free=100), line(1, "B", free=300), line(2, "C", free=300)]
    three = found(*cards, order="PCI_BUS_ID")
    assert select_device("auto", lambda: three).device == "cuda:1"
    assert "most memory free" in select_device("auto", lambda: three).reason
    assert select_device("cuda:2", lambda: three).gpu == three.gpus[2]
    missing = select_device("cuda:3", lambda: three)
    assert (missing.device, missing.unmet) == ("cpu", True)
    assert "there are 3" in missing.reason
    none = GpuList(problem="there is no NVIDIA driver on this machine")
    assert select_device("cuda", lambda: none).unmet
    assert not select_device("auto", lambda: none).unmet


def test_the_cpu_is_had_without_a_look() -> None:
    def looked() -> GpuList:
        raise AssertionError("the driver was asked")

    assert select_device("cpu", looked).device == "cpu"


def test_memory_is_asked_anew_when_the_answer_is_old(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_text(line(free=900) + "\n")
    prober = Prober(command=["/bin/cat", str(state)])
    assert prober.look().gpus[0].free_mb == 900
    state.write_text(line(free=500) + "\n")
    assert prober.look(max_age=3600).gpus[0].free_mb == 900
    assert prober.look(max_age=0).gpus[0].free_mb == 500


def test_a_driver_that_stops_answering_has_no_memory_to_give(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_text(f"echo '{line(free=900)}'")
    prober = Prober(command=["/bin/sh", str(state)])
    assert prober.look().gpus[0].free_mb == 900
    state.write_text(f"echo x >> {tmp_path}/asked; exit 9")
    for _ in range(3):
        (gpu,) = prober.look(max_age=0).gpus
        assert (gpu.free_mb, gpu.total_mb, gpu.problem) == (0, 1000, "")
    assert (tmp_path / "asked").read_text() == "x\n", "it is left alone for a while"
    state.write_text(f"echo '{line(free=800)}'")
    prober._at -= 3600
    assert prober.look(max_age=0).gpus[0].free_mb == 800


NVML = """
from types import SimpleNamespace

class NVMLError(Exception):
    pass

class NVMLError_DriverNotLoaded(NVMLError):
    pass

def nvmlInit():
    if FAILS:
        raise NVMLError_DriverNotLoaded("Driver Not Loaded")

def nvmlSystemGetDriverVersion():
    return "580.65.06"

def nvmlDeviceGetCount():
    return 5

def nvmlDeviceGetHandleByIndex(index):
    if index == 1:
        raise NVMLError("GPU is lost")
    return 1000 + index

def nvmlDeviceGetMemoryInfo(handle):
    if handle == 1004:
        raise NVMLError("Insufficient Permissions")
    return SimpleNamespace(total=3000 << 20, free=handle << 20)

def nvmlDeviceGetCudaComputeCapability(handle):
    return (9, 0)

def nvmlDeviceGetMigMode(handle):
    if handle == 1000:
        raise NVMLError("Not Supported")
    return [int(handle == 1003), 0]

def nvmlDeviceGetName(handle):
    return "NVML GPU, big"

def nvmlDeviceGetUUID(handle):
    return "GPU-77"
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sign of a driver, and no nvidia-smi on the path."""
    sign = tmp_path / "nvidiactl"
    sign.touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    return sign


def without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.parametrize("package", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_driver_is_queried_by_nvidia_ml_py_in_a_child(
    fails: bool, package: bool, driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site"
    file = folder / "pynvml" / "__init__.py" if package else folder / "pynvml.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"FAILS = {fails}\n{NVML}")
    monkeypatch.syspath_prepend(folder)
    answer = Prober(signs=[driver]).look()
    assert "pynvml" not in sys.modules
    if fails:
        assert "Driver Not Loaded" in answer.problem
        assert answer.detected
        return
    assert [(gpu.device, gpu.name, gpu.capability, gpu.total_mb, gpu.free_mb) for gpu in answer.usable] == [
        ("cuda:0", "NVML GPU, big", (9, 0), 3000, 1000),
        ("cuda:1", "NVML GPU, big", (9, 0), 3000, 1002),
    ]
    assert "MIG" in answer.gpus[2].problem
    assert "does not tell its memory" in answer.gpus[3].problem
    assert answer.driver == "580.65.06"


def test_without_nvidia_ml_py_the_drivers_tool_is_asked(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_nvml(monkeypatch)
    answer = Prober(signs=[driver]).look()
    assert "install nvidia-ml-py" in answer.problem
    assert answer.detected
    assert Prober(signs=[]).look().problem == "there is no NVIDIA driver on this machine"
    on_disk(tmp_path, "nvidia-smi", f"#!/bin/sh\necho '{line(name='from the tool')}'\n")
    for signs in ([], [driver]):
        assert Prober(signs=signs).look().gpus[0].name == "from the tool"


def test_looking_loads_no_gpu_library(fresh: Forks) -> None:
    program = """
import sys
from memevolve_gpu.devices.selection import Machine
machine = Machine("auto")
machine.choice, machine.engines(), machine.budget()
print([name for name in ("torch", "cupy", "pynvml", "triton", "faiss") if name in sys.modules])
"""
    done = fresh(program)
    assert done.stdout.strip() == "[]"
