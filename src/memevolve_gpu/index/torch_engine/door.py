"""The one place where torch and triton come in, and where arrays go to a device."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DeviceError, EngineError
from ...utils.device_arrays import as_tensor
from .failures import cause_of, first_line

__all__ = [
    "current",
    "device_tensor",
    "forked",
    "host_tensor",
    "load_torch",
    "open_device",
    "settled",
    "triton_kernels",
]

_INSTALL = "pip install 'memevolve-gpu[torch]'"
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
        raise EngineError(f"torch cannot be loaded: {first_line(error)}. Reinstall it: {_INSTALL}") from error


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
        raise DeviceError(f"device {device}: {first_line(error)}", cause_of(error) or "device-error") from error
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
        return None, f"triton cannot be used ({first_line(error)}); torch's own operations answer"


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

    Taken are numpy arrays, and what :func:`~....utils.device_arrays.as_tensor` takes.
    """
    torch = load_torch()
    if isinstance(queries, np.ndarray):
        found = host_tensor(queries.astype(np.float32, copy=False))
    else:
        found = as_tensor(queries, torch, device)
    return found.to(device=device, dtype=torch.float32).contiguous()


def settled(tensor: Any, given: Any) -> Any:
    """``tensor``, made of ``given`` by :func:`device_tensor`, once other streams may read it: what was converted was so
    on the engine's own, while a float32 tensor of the same device is the memory that was given."""
    torch = load_torch()
    same = isinstance(given, torch.Tensor) and given.data_ptr() == tensor.data_ptr()
    if tensor.device.type == "cuda" and not same:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor
