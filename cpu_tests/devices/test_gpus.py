"""Finding GPUs: whatever the driver does, the answer is a list or a sentence, and CUDA is never loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_kit import MB, line, on_disk, printing

from memevolve_gpu.devices.asking import ask
from memevolve_gpu.devices.gpu import GpuList, Prober
from memevolve_gpu.devices.nvml_child import PROGRAM
from memevolve_gpu.devices.request import resolve


def found(*lines: str, visible: str | None = None) -> GpuList:
    return Prober(visible, command=printing(*lines)).look()


def test_a_card_is_described_by_its_driver() -> None:
    (gpu,) = found(line(name="NVIDIA H200, big", total=143_771, free=143_000)).gpus
    assert (gpu.device, gpu.name, gpu.capability) == ("cuda:0", "NVIDIA H200, big", (9, 0))
    assert (gpu.total_mb, gpu.free_mb, gpu.total) == (143_771, 143_000, 143_771 * MB)
    assert not gpu.problem


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "lists no GPU"),
        (("No devices were found",), "lists no GPU"),
        ((line(driver="470.223.02"),), "driver 470.223.02 is too old; CUDA 12 needs 525.60 or newer"),
        ((line(capability="6.1"),), "compute capability 6.1; at least 7.0 is needed"),
        (("0, Grace, GPU-1, 12.1, [N/A], [N/A], 580.1",), "does not tell its memory"),
    ],
)
def test_what_cannot_serve_becomes_a_sentence(lines: tuple[str, ...], said: str) -> None:
    answer = found(*lines)
    assert said in answer.problem
    assert answer.usable == ()
    assert said in resolve("cuda", lambda: answer).reason
    if lines and answer.gpus:
        assert said in resolve("cuda:0", lambda: answer).reason


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
    answer = ask(["/bin/sh", "-c", "setsid sleep 8 & wait"], 0.2)
    assert answer.code is None
    assert time.monotonic() - started < 6


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["A", "B", "C"]),
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


def test_the_request_is_resolved_with_its_reason() -> None:
    three = found(line(0, "A", free=100), line(1, "B", free=300), line(2, "C", free=300))
    assert resolve("auto", lambda: three).device == "cuda:1"
    assert "most memory free" in resolve("auto", lambda: three).reason
    assert resolve("cuda:2", lambda: three).gpu == three.gpus[2]
    missing = resolve("cuda:3", lambda: three)
    assert (missing.device, missing.disappointed) == ("cpu", True)
    assert "there are 3" in missing.reason
    none = GpuList(problem="there is no NVIDIA driver on this machine")
    assert resolve("cuda", lambda: none).disappointed
    assert not resolve("auto", lambda: none).disappointed


def test_the_cpu_is_had_without_a_look() -> None:
    def looked() -> GpuList:
        raise AssertionError("the driver was asked")

    assert resolve("cpu", looked).device == "cpu"


def test_memory_is_asked_anew_when_the_answer_is_old(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_text(line(free=900) + "\n")
    prober = Prober(command=["/bin/cat", str(state)])
    assert prober.look().gpus[0].free_mb == 900
    state.write_text(line(free=500) + "\n")
    assert prober.look(max_age=3600).gpus[0].free_mb == 900
    assert prober.look(max_age=0).gpus[0].free_mb == 500


def test_without_tool_the_drivers_library_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signs of a driver alone lead to NVML in a child; here its library is missing, which is a sentence."""
    sign = tmp_path / "nvidiactl"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no NVIDIA driver" in Prober(signs=[sign]).look().problem
    sign.touch()
    assert "NVML cannot be loaded" in Prober(signs=[sign]).look().problem
    on_disk(tmp_path, "nvidia-smi", f"#!/bin/sh\necho '{line(name='from the tool')}'\n")
    assert Prober(signs=[]).look().gpus[0].name == "from the tool"


NVML = """
#include <string.h>
int nvmlInit_v2(void) { return FAIL; }
int nvmlSystemGetDriverVersion(char *text, unsigned n) { strncpy(text, "580.65.06", n); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (char *)0 + 1000 + index; return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    memory[0] = 3000ull << 20; memory[1] = (unsigned long long)((char *)handle - (char *)0) << 20; memory[2] = 0;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned n) { strncpy(text, "NVML GPU", n); return 0; }
int nvmlDeviceGetUUID(void *handle, char *text, unsigned n) { strncpy(text, "GPU-77", n); return 0; }
"""


@pytest.mark.parametrize("status", [0, 9])
def test_the_child_reads_nvml_by_its_c_interface(status: int, tmp_path: Path) -> None:
    compiler = next((each for each in ("/usr/bin/cc", "/usr/bin/gcc") if os.access(each, os.X_OK)), None)
    if compiler is None:
        pytest.skip("no C compiler to make a stand-in for NVML with")
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(NVML)
    subprocess.run([compiler, f"-DFAIL={status}", "-shared", "-fPIC", "-o", library, source], check=True)
    answer = Prober(command=[sys.executable, "-I", "-S", "-c", PROGRAM, str(library)]).look()
    if status:
        assert "nvmlInit_v2 answers error 9" in answer.problem
    else:
        assert [(gpu.name, gpu.total_mb, gpu.free_mb) for gpu in answer.usable] == [
            ("NVML GPU", 3000, 1000),
            ("NVML GPU", 3000, 1001),
        ]


def test_looking_loads_no_gpu_library(tmp_path: Path) -> None:
    program = """
import sys
from memevolve_gpu.devices.machine import Machine
machine = Machine("auto")
machine.choice, machine.engines(), machine.budget()
print([name for name in ("torch", "cupy", "pynvml", "triton", "faiss") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
