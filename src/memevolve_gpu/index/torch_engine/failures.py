"""What exceptions of torch, CUDA and Triton say about a device."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Literal

from ...errors import DeviceError

__all__ = ["Cause", "cause_of", "device_errors", "first_line", "kernel_errors"]

Cause = Literal["out-of-memory", "device-lost", "device-error", "fork", "limit"]

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
    late = getattr(getattr(sys.modules.get("torch"), "cuda", None), "DeferredCudaCallError", RuntimeError)
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


def first_line(error: BaseException) -> str:
    """What an exception says, up to 300 characters of its first line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
