"""The torch runtime: imports, device locks, transfers and error classification.

One search at a time uses a device: two would share its bandwidth anyway, and this way buffers and recorded graphs can
be reused and scratch memory is that of one batch. A thread that is stopped inside torch aborts the process, so at exit
builds stop at their next step, are waited for, and all device locks are taken and kept.
"""

from __future__ import annotations

import atexit
import importlib
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DeviceError, EngineError, first_line
from ...types import AnyArray, Device, Event, FloatArray, Matrix, Stream, Tensor
from ...utils.forking import call_in_child, lock
from ...utils.vectors import as_tensor
from ..device_failover import cause_of, lost_devices, mark_lost


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
    """What torch raises where a device or memory is not available. CUDA's start raises AssertionError, and a class of
    its own for calls that it deferred until then."""
    late = getattr(getattr(sys.modules.get("torch"), "cuda", None), "DeferredCudaCallError", RuntimeError)
    return (RuntimeError, MemoryError, AssertionError, late)


_LOCK_TIMEOUT_S = 20.0
"""So long a search waits for the device: one that has not finished another search by then hangs."""
_EXIT_TIMEOUT_S = 10.0
"""For each build, and each device, at the end of the process."""


class DeviceLock:
    """A reentrant lock that refuses a build's next step once the process ends."""

    def __init__(self) -> None:
        self._lock = lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As of ``threading.RLock``."""
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        """As of ``threading.RLock``."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()
        if _Process.ends and _Process.builds_here.depth:
            self._lock.release()
            raise EngineError("the process ends")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class _Depth(threading.local):
    depth = 0


class _Process:
    """What all threads share."""

    ends = False
    locks: dict[str, DeviceLock] = {}  # noqa: RUF012 - one for the process
    known = lock()
    builds = 0
    fewer_builds = threading.Condition()
    builds_here = _Depth()


def device_lock(device: str) -> DeviceLock:
    """The lock of ``device``, one object per process."""
    with _Process.known:
        return _Process.locks.setdefault(device, DeviceLock())


@contextmanager
def begun_build() -> Iterator[None]:
    """Count a build in this thread, which the end of the process waits for; it takes the device's lock step by step."""
    with _Process.fewer_builds:
        _Process.builds += 1
    _Process.builds_here.depth += 1
    try:
        yield
    except EngineError as error:
        traceback.clear_frames(error.__traceback__)  # their tensors go while torch may still be called
        raise
    finally:
        _Process.builds_here.depth -= 1
        with _Process.fewer_builds:
            _Process.builds -= 1
            _Process.fewer_builds.notify_all()


@atexit.register
def _end() -> None:
    _Process.ends = True
    with _Process.fewer_builds:
        _Process.fewer_builds.wait_for(lambda: _Process.builds == 0, _EXIT_TIMEOUT_S)
    for held in list(_Process.locks.values()):
        held.acquire(timeout=_EXIT_TIMEOUT_S)


def _in_child() -> None:
    """Locks that the parent's threads held would never be released."""
    _Process.fewer_builds, _Process.builds = threading.Condition(), 0
    _Process.locks.clear()
    _stagings.clear()


call_in_child(_in_child)


_INSTALL = "pip install 'memevolve-gpu[torch]'"
_lock = lock()
_streams: dict[str, Stream] = {}
_owner: int | None = None
"""The process that opened a GPU first; its children must not use it."""


def load_torch() -> ModuleType:
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


def open_device(device: str) -> Device:
    """The ``torch.device`` called ``device``, after an allocation on it.

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
        with device_lock(device), _lock:
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


def triton_kernels(device: Device) -> tuple[Any, str]:
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


@contextmanager
def locked_device(device: str) -> Iterator[None]:
    """Hold the lock of ``device``, as a search does.

    Raises:
        DeviceError: its holder has not given it back for 20 seconds.
    """
    lock = device_lock(device)
    if not lock.acquire(timeout=_LOCK_TIMEOUT_S):
        raise DeviceError(f"device {device} has not answered for {_LOCK_TIMEOUT_S:.0f} s", "device-error")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Search on ``device``: alone on it, on its stream, with torch's errors turned into DeviceError."""
    try:
        with locked_device(device), current(device):
            yield
    except DeviceError:
        raise
    except device_errors() as error:
        raise DeviceError(first_line(error), cause_of(error) or "device-error") from error


@contextmanager
def building(device: str) -> Iterator[None]:
    """Build an index on ``device``, with torch's errors turned into DeviceError.

    A build takes the device's lock step by step, so that other indexes are searched meanwhile.
    """
    lost = lost_devices().get(device)
    if lost is not None:
        raise DeviceError(f"device {device} failed earlier: {lost}; restart the process", "device-lost")
    if forked():
        raise DeviceError(f"device {device} belongs to the parent process; use the CPU after a fork, or spawn", "fork")
    try:
        with begun_build(), current(device):
            yield
    except EngineError:
        raise
    except device_errors() as error:
        cause = cause_of(error) or "device-error"
        if cause == "device-lost":
            mark_lost(device, first_line(error))
        free_memory(device)
        raise DeviceError(f"device {device}: {first_line(error)}; the CPU can hold this index", cause) from error


def free_memory(device: str, *drops: Callable[[], None]) -> None:
    """Call ``drops`` and give torch's reserve back to the driver, under the lock: another thread may be using what they
    drop, or recording a graph."""
    with suppress(DeviceError), locked_device(device):
        for drop in drops:
            drop()
        _release(device)


def _release(device: str) -> None:
    if device.startswith("cuda"):
        with suppress(RuntimeError):  # the device is in a worse state; its next use says so
            load_torch().cuda.empty_cache()


def _stream_of(torch: ModuleType, device: str) -> Stream:
    """The stream of all work on ``device``: it does not queue behind the kernels of the program's own models, and what
    torch keeps for each stream is kept once.

    Results are waited for before a caller goes on, so nothing here is still being read when its memory is free again.
    """
    with _lock:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        return _streams[device]


def host_tensor(array: AnyArray) -> Tensor:
    """``array`` as a tensor, C-contiguous; copied only where it is read-only, which torch cannot share."""
    own = np.ascontiguousarray(array)
    return load_torch().from_numpy(own if own.flags.writeable else own.copy())


def device_tensor(queries: Matrix, device: Device) -> Tensor:
    """``queries`` as a float32 tensor on ``device``, without a copy where they lie there as float32 already.

    Accepts numpy arrays and what :func:`~....utils.vectors.as_tensor` accepts.
    """
    torch = load_torch()
    if isinstance(queries, np.ndarray):
        found = host_tensor(queries.astype(np.float32, copy=False))
    else:
        found = as_tensor(queries, torch, device)
    return found.to(device=device, dtype=torch.float32).contiguous()


class Staging:
    """Pinned host memory through which rows, queries and results of one device travel: the driver copies pageable
    memory through buffers of its own, and waits meanwhile. Used under the device's lock; grows to the largest array.

    Two buffers take turns, so that one is filled while the other is being read.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._sent: list[Event | None] = [None, None]
        self._turn = 0

    def send(self, array: FloatArray) -> Tensor:
        """``array`` as a tensor on the device; it may be changed afterwards."""
        self._turn = 1 - self._turn
        if (before := self._sent[self._turn]) is not None:
            before.synchronize()  # what the buffer held is still being read
        held = self._buffer(f"sent {self._turn}", host_tensor(array))
        held.copy_(host_tensor(array))
        found = held.to(self._device, non_blocking=True)
        self._sent[self._turn] = self._event()
        return found

    def fetch(self, tensor: Tensor) -> npt.NDArray[Any]:
        """``tensor`` on the host, once the device has computed it."""
        held = self._buffer("results", tensor)
        held.copy_(tensor, non_blocking=True)
        self._event().synchronize()
        return np.array(held.numpy())

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._pinned(1 << max(16, (size - 1).bit_length()))
        return self._buffers[name][:size].view(like.dtype).view(like.shape)

    def _pinned(self, size: int) -> Tensor:
        torch = load_torch()
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)  # whatever the default device

    def _event(self) -> Event:
        event = load_torch().cuda.Event()
        event.record()
        return event


_stagings: dict[str, Staging] = {}


def sent(given: Matrix, device: Device) -> Tensor:
    """As :func:`device_tensor`; what lies on the host goes to a GPU through pinned memory."""
    if device.type != "cuda" or not isinstance(given, np.ndarray):
        return device_tensor(given, device)
    return _stagings.setdefault(str(device), Staging(device)).send(given.astype(np.float32, copy=False))


def fetched(tensor: Tensor) -> npt.NDArray[Any]:
    """``tensor`` on the host, from a GPU through pinned memory."""
    if tensor.device.type != "cuda":
        found: npt.NDArray[Any] = tensor.numpy()
        return found
    return _stagings.setdefault(str(tensor.device), Staging(tensor.device)).fetch(tensor)


def settled(tensor: Tensor, given: Matrix) -> Tensor:
    """``tensor``, made of ``given`` by :func:`device_tensor`, once other streams may read it: a conversion ran on the
    engine's own stream, while a float32 tensor of the same device is the given memory."""
    torch = load_torch()
    same = isinstance(given, torch.Tensor) and given.data_ptr() == tensor.data_ptr()
    if tensor.device.type == "cuda" and not same:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor
