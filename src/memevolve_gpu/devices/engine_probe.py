"""Probe in a child process whether a GPU engine works on a device.

A library that is half installed, of another CUDA version than the driver, or without code for the device raises, hangs
or ends the process. Each of these becomes a sentence here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from typing import Literal

from ..types import FAISS_FOR_GPUS
from ..utils.forking import lock
from .subprocess_query import Answer, run_subprocess

ENGINES: tuple[Literal["torch", "faiss"], ...] = ("torch", "faiss")
"""The engines that can search on a GPU, best first."""

TIMEOUT = 120.0
"""Seconds; a first import of torch from a cold disk takes tens of them."""

_TORCH = """
import sys, torch
if torch.version.cuda is None:
    sys.exit("this torch was built without CUDA; install a build for CUDA")
ones = torch.ones((64, 64), dtype=torch.float16, device="cuda:" + sys.argv[1])
if float((ones @ ones).float().sum()) != 64.0 ** 3:
    sys.exit("a product of two small matrices came out wrong")
print("it works")
"""

_FAISS = """
import sys, numpy, faiss
if not hasattr(faiss, "StandardGpuResources"):
    sys.exit("this faiss was built without GPU support; install faiss-gpu in its place")
resources = faiss.StandardGpuResources()
resources.setTempMemory(1 << 20)
options = faiss.GpuIndexFlatConfig()
options.device = int(sys.argv[1])
index = faiss.GpuIndexFlatL2(resources, 4, options)
index.add(numpy.eye(4, dtype="float32"))
if index.search(numpy.eye(4, dtype="float32"), 1)[1][:, 0].tolist() != [0, 1, 2, 3]:
    sys.exit("a search among four vectors came out wrong")
print("it works")
"""

_PROGRAMS = {"torch": _TORCH, "faiss": _FAISS}
_WORKS = "it works"
"""Printed at the end. A status of 0 proves nothing: a process that ignores SIGCHLD reads 0 for every child, and
sys.executable inside another program may be that program."""

_NO_CODE = (
    "install a build that has code for this GPU: those for CUDA 13 begin at compute capability 7.5, and conda's faiss "
    "for CUDA 12.9 has none for 7.0"
)
_REMEDIES = (
    ("driver on your system is too old", "update the GPU driver, or install a build for an older CUDA"),
    ("driver version is insufficient", "update the GPU driver, or install a build for an older CUDA"),
    ("no kernel image is available", _NO_CODE),
    ("invalid device function", _NO_CODE),
    ("unsupported toolchain", _NO_CODE),
    ("cannot open shared object file", "a CUDA library is missing: install the package again with its dependencies"),
    ("No CUDA GPUs are available", "see whether CUDA_VISIBLE_DEVICES names it, and whether it is cut into slices"),
    ("system not yet initialized", "start the service nvidia-fabricmanager, which GPUs behind an NVSwitch need"),
    ("forward compatibility was attempted", "take cuda-compat off the library path: this GPU does not support it"),
    ("out of memory", "another process fills the GPU"),
    ("CUBLAS_STATUS_ALLOC_FAILED", "another process fills the GPU"),
    ("CUBLAS_STATUS_NOT_INITIALIZED", "another process fills the GPU, or the library does not fit the driver"),
    ("busy or unavailable", "another process has the GPU for itself"),
)
_TEMPORARY = "another process"
"""In the sentence about a GPU that may work later."""


class _Known:
    """What this process has found out."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, int], str] = {}
        self.lock = lock()


_known = _Known()


def installed(engine: str) -> str:
    """Why ``engine`` cannot be there, judged by what is installed and without loading it; empty when it may be."""
    if engine == "torch":
        if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
            return "torch is not installed"
        return "this torch was built without CUDA" if _version("torch").endswith("+cpu") else ""
    loaded = sys.modules.get("faiss")
    if loaded is not None:
        return "" if hasattr(loaded, "StandardGpuResources") else "this faiss was built without GPU support"
    if importlib.util.find_spec("faiss") is None:
        return "faiss is not installed"
    only_cpu = _version("faiss-cpu") and not any(map(_version, FAISS_FOR_GPUS))
    return "this faiss was built without GPU support" if only_cpu else ""


def try_engine(engine: str, index: int, *, command: Sequence[str] | None = None, timeout: float = TIMEOUT) -> str:
    """Let ``engine`` compute on ``cuda:index`` in a child process.

    Args:
        engine: torch or faiss.
        index: number of the device as CUDA counts in this process.
        command: how to start Python; None for the interpreter of this process.
        timeout: seconds to wait.

    Returns:
        Empty when it works, else why not, one sentence. The answer is remembered, except for a full or busy GPU.
    """
    missing = installed(engine)
    if missing:
        return missing
    with _known.lock:
        if (engine, index) not in _known.answers:
            start = command or ([sys.executable] if sys.executable and not getattr(sys, "frozen", False) else None)
            if start is None:
                return ""  # embedded in another program: there is no Python to start; the engine itself raises
            anything: list[object] = list(sys.path)
            places = [place for place in anything if isinstance(place, str)]  # Python passes over others, too
            same_path = f"import sys; sys.path[:] = {places!r}\n"
            answer = run_subprocess([*start, "-c", same_path + _PROGRAMS[engine], str(index)], timeout)
            problem = _sentence(engine, answer)
            if _TEMPORARY in problem:
                return problem
            _known.answers[engine, index] = problem
        return _known.answers[engine, index]


def _sentence(engine: str, answer: Answer) -> str:
    if answer.out.rstrip().endswith(_WORKS) and not answer.problem:
        return ""
    if not answer.problem:
        return f"{engine} does not work on this GPU: its trial ended without output"
    said = answer.problem.partition(": ")[2] or answer.problem
    remedy = next((remedy for sign, remedy in _REMEDIES if sign in said), "")
    how = said if answer.code is not None and answer.code > 0 else answer.problem
    return f"{engine} does not work on this GPU: {how}" + (f"; {remedy}" if remedy else "")


def _version(distribution: str) -> str:
    """The version that an installed distribution states; empty for one that is missing, or half removed."""
    try:
        return importlib.metadata.version(distribution) or ""
    except (importlib.metadata.PackageNotFoundError, KeyError, TypeError, ValueError, OSError):
        return ""
