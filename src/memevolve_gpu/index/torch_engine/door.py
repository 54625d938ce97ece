"""The one place where torch and triton come in, and where what they raise is read."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import DeviceError, EngineError
from ...utils.device_arrays import wait_for_maker

__all__ = [
    "Cause",
    "cause_of",
    "current",
    "device_errors",
    "device_tensor",
    "forked",
    "host_tensor",
    "kernel_errors",
    "load_torch",
    "open_device",
    "settled",
    "triton_kernels",
    "unusable",
]

Cause = Literal["out-of-memory", "device-lost", "device-error", "fork", "limit"]

_INSTALL = "pip install 'memevolve-gpu[torch]'"
_LASTING = (
    "illegal",
    "misaligned",
    "unspecified launch failure",
    "device-side assert",
    "ecc error",
    "uncorrectable",
    "lost",
    "hardware stack",
    "unrecoverable",
    "launch timed out",
    "invalid program counter",
    "shared address space",
    "context is destroyed",
    "unknown error",
)
"""Words of CUDA's errors after which nothing works on the device until the process ends."""
_PASSING = (
    "captur",
    "invalid argument",
    "invalid configuration",
    "invalid device function",
    "no kernel image",
    "busy or unavailable",
    "not supported",
    "too many resources",
    "initialization error",
)
"""Words of those after which it goes on. One that lasts after all says so again, in other words or the same."""
_NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "not_initialized")
"""Among them what cuBLAS says when it finds no room for its own buffers."""

_lock = threading.Lock()
_streams: dict[str, Any] = {}
_owner: int | None = None
"""The process that opened a GPU first; its children must leave it alone."""


def load_torch() -> Any:
    """The torch module.

    Raises:
        EngineError: torch is missing or cannot be loaded; the message says what to install.
    """
    try:
        return sys.modules.get("torch") or importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise EngineError(f"torch is not installed, and gpu_engine 'torch' needs it. Run: {_INSTALL}") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise EngineError(f"torch cannot be loaded: {_first_line(error)}. Reinstall it: {_INSTALL}") from error


def unusable(device: str) -> str:
    """Why this engine cannot use ``device`` (``cpu``, ``cuda:N``) in this process; empty when it can."""
    try:
        open_device(device)
    except EngineError as error:
        return str(error)
    return ""


def open_device(device: str) -> Any:
    """The ``torch.device`` called ``device``, after it was seen to work.

    Raises:
        DeviceError: there is no such device, its driver refuses, or this process was forked from one that uses it.
        EngineError: torch is missing.
    """
    global _owner  # noqa: PLW0603 - a process-wide fact
    torch = load_torch()
    if device == "cpu":
        return torch.device("cpu")
    if forked():
        raise DeviceError(f"device {device} belongs to the parent process; use the CPU after a fork, or spawn", "fork")
    try:
        if not torch.cuda.is_available():
            raise DeviceError(f"device {device}: torch {torch.__version__} sees no GPU; set device to 'cpu'")
        found = torch.device(device)
        with _lock:
            torch.empty(1, device=found)
            _owner = os.getpid()
    except RuntimeError as error:
        if isinstance(error, EngineError):
            raise
        raise DeviceError(f"device {device}: {_first_line(error)}", cause_of(error) or "device-error") from error
    return found


def forked() -> bool:
    """Whether this process was forked from one that had opened a GPU here."""
    return _owner is not None and _owner != os.getpid()


def triton_kernels(device: Any) -> tuple[Any, str]:
    """The Triton kernels for ``device`` and "", or None and why there are none: they want a GPU of compute capability
    8.0 or later.
    """
    if device.type != "cuda":
        return None, "the CPU has no Triton; torch's own operations answer"
    if load_torch().cuda.get_device_capability(device) < (8, 0):
        return None, f"{device} is older than compute capability 8.0; torch's own operations answer"
    try:
        from . import kernels

        return kernels.load(), ""
    except (ImportError, AttributeError, OSError) as error:
        return None, f"triton cannot be used ({_first_line(error)}); torch's own operations answer"


@contextmanager
def current(device: str) -> Iterator[None]:
    """Work on ``device``, whatever the calling thread has set for its own use of torch: under its autocast, products of
    float32 would be those of float16."""
    torch, kind = load_torch(), device.split(":", 1)[0]
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False), ExitStack() as stack:
        if kind == "cuda":
            stack.enter_context(torch.cuda.device(device))
            own = _stream_of(torch, device)
            own.wait_stream(torch.cuda.current_stream(device))  # the caller's arrays may still be being filled
            stack.enter_context(torch.cuda.stream(own))
        yield


def _stream_of(torch: Any, device: str) -> Any:
    """The stream of all work on ``device``: it does not queue behind the kernels of the program's own models, and what
    torch keeps for each stream is kept once.

    Results are waited for before a caller goes on, so nothing here is still being read when its memory is free again.
    """
    with _lock:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        return _streams[device]


def host_tensor(array: npt.NDArray[Any]) -> Any:
    """``array`` as a tensor, C-contiguous; a copy only of what may not be written to, which torch cannot share."""
    own = np.ascontiguousarray(array)
    return load_torch().from_numpy(own if own.flags.writeable else own.copy())


def device_tensor(queries: Any, device: Any) -> Any:
    """``queries`` as a float32 tensor on ``device``, without a copy where they lie there as float32 already.

    Taken are numpy arrays, torch tensors, what has ``__dlpack__``, whose maker is asked to wait until it is filled, and
    what has ``__cuda_array_interface__``, where the stream that it names is waited for.
    """
    torch = load_torch()
    if isinstance(queries, np.ndarray):
        found = host_tensor(queries.astype(np.float32, copy=False))
    elif isinstance(queries, torch.Tensor):
        found = queries.detach()
    elif hasattr(queries, "__dlpack__"):
        found = torch.from_dlpack(queries)
    else:
        wait_for_maker(queries, torch)
        found = torch.as_tensor(queries, device=device)
    return found.to(device=device, dtype=torch.float32).contiguous()


def settled(tensor: Any, given: Any) -> Any:
    """``tensor``, made of ``given`` by :func:`device_tensor`, once other streams may read it: what was converted was so
    on the engine's own."""
    if tensor is not given and tensor.device.type == "cuda":
        load_torch().cuda.current_stream(tensor.device).synchronize()
    return tensor


def kernel_errors() -> tuple[type[BaseException], ...]:
    """What compiling or launching a kernel raises, CUDA's own errors among it (see :func:`cause_of`)."""
    kinds: list[type[BaseException]] = [RuntimeError, ImportError, OSError, TypeError, ValueError, AttributeError]
    kinds += [subprocess.SubprocessError, AssertionError]  # a C compiler without Python's headers, a driver not found
    try:
        kinds.append(importlib.import_module("triton.errors").TritonError)
    except (ImportError, AttributeError):
        kinds.append(KeyError)
    return tuple(kinds)


def device_errors() -> tuple[type[BaseException], ...]:
    """What torch raises where a device, or the memory for something, cannot be had; when CUDA starts up it asserts, and
    has an exception of its own for what it put off until then."""
    late = getattr(load_torch().cuda, "DeferredCudaCallError", RuntimeError)
    return (RuntimeError, MemoryError, AssertionError, late)


def cause_of(error: BaseException) -> Cause | None:
    """What an exception of torch or of a kernel says about the device; None when it says nothing of it."""
    if isinstance(error, DeviceError):
        return error.cause
    text = str(error).lower()
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or any(w in text for w in _NO_ROOM):
        return "out-of-memory"
    if any(word in text for word in _LASTING) and "cuda" in text:
        return "device-lost"
    if any(word in text for word in _PASSING):
        return "device-error"
    if type(error).__name__ == "AcceleratorError" or text.startswith("cuda error"):
        return "device-lost"
    return "device-error" if isinstance(error, RuntimeError) else None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
