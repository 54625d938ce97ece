"""Failover of a GPU index: smaller batches, then the CPU, and the device again when it has room.

Both GPU engines use it. It knows no engine: the work it runs raises DeviceError with a cause.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, TypeVar

from ..errors import DeviceError, EngineError
from ..types import DeviceIncident

T = TypeVar("T")
Cause = Literal["out-of-memory", "device-lost", "device-error", "fork", "limit"]
Action = Literal["smaller-batch", "cpu", "cpu-until-restart", "device-again"]

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 15.0, 600.0
_MAX_INCIDENTS = 64
_NO_MEMORY = ("out-of-memory", "limit")

_STICKY = (
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
"""Words of sticky CUDA errors, after which nothing works on the device until the process ends."""
_TRANSIENT = (
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
"""Words of CUDA errors after which the device still works."""
_FULL = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "alloc_failed", "not_initialized")
"""cuBLAS reports the last two when it finds no memory for its own buffers."""

_lost: dict[str, str] = {}


def lost_devices() -> dict[str, str]:
    """Devices that cannot be used until this process restarts, and their error."""
    return dict(_lost)


def mark_lost(device: str, reason: str) -> None:
    """Keep every index of this process off ``device`` until restart: CUDA refuses all calls after a sticky error."""
    _lost.setdefault(device, reason)


def cause_of(error: BaseException) -> Cause | None:
    """The cause that an exception of an engine or of a kernel names; None when it is not about the device."""
    if isinstance(error, DeviceError):
        return error.cause
    text = str(error).lower()
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or any(w in text for w in _FULL):
        return "out-of-memory"
    if any(word in text for word in _STICKY) and "cuda" in text:
        return "device-lost"
    if any(word in text for word in _TRANSIENT):
        return "device-error"
    if type(error).__name__ == "AcceleratorError" or text.startswith("cuda error"):
        return "device-lost"
    return "device-error" if isinstance(error, RuntimeError) else None


class BusyError(DeviceError):
    """Another thread builds on the device, which takes seconds; the CPU answers this call. Not an incident."""

    def __init__(self, device: str) -> None:
        super().__init__(f"{device} is being built on; the CPU answers", "limit")


class DeviceFailover:
    """Decides for one index whether its device is used, and what follows when it fails.

    Out of memory: the batch is halved and tried again, down to one query. When one query does not fit, and after any
    other error, the CPU answers and the device is left alone for 15 seconds, twice as long each time, 10 minutes at
    most. A sticky CUDA error (an illegal access, a lost device) keeps every index off that device until the process
    ends. A forked child never uses the device. Any thread may call.
    """

    def __init__(self, device: str, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self.device = device
        self._clock = clock
        self._pid = os.getpid()
        self._limit: int | None = None
        """The most queries that fit into the device's memory at once, as far as is known."""
        self._backoff = 0.0
        self._until = float("-inf")
        self._larger_at = float("-inf")
        self._reported: set[str] = set()
        self._incidents: deque[DeviceIncident] = deque(maxlen=_MAX_INCIDENTS)

    @property
    def serving(self) -> bool:
        """Whether the next search uses the device."""
        return os.getpid() == self._pid and self.device not in _lost and self._clock() >= self._until

    def note(self, cause: Cause | Literal["recovered"], action: Action, detail: str) -> None:
        """Record an incident; the oldest is dropped when there are too many."""
        self._incidents.append(DeviceIncident(self.device, cause, action, detail))

    def note_slower(self, detail: str) -> None:
        """Record that the device works, but in a slower way than intended."""
        self.note("device-error", "device-again", detail)

    def incidents(self) -> list[DeviceIncident]:
        """The incidents since the last call, oldest first."""
        found = []
        while self._incidents:
            try:
                found.append(self._incidents.popleft())
            except IndexError:  # another thread took the last one
                break
        return found

    def attempt(self, work: Callable[[int], T], most: int, free_memory: Callable[[], None] = lambda: None) -> T | None:
        """Run ``work(batch)`` on the device, ``batch`` at most ``most``.

        Args:
            work: searches in batches of the given number of queries; raises DeviceError where the device fails.
            most: the largest batch that is of use.
            free_memory: gives up what the index keeps on the device for speed alone; called after an out of memory.

        Returns:
            What ``work`` returned; None where the CPU must answer.
        """
        if not self.serving:
            self._report_reason()
            return None
        batch: int | None = min(self._limit or most, most)
        while batch is not None:
            try:
                found = work(batch)
            except BusyError:
                return None
            except DeviceError as error:
                no_memory = error.cause in _NO_MEMORY
                batch = self._after_failure(error, batch)
            else:
                self._after_success(most)
                return found
            if no_memory:  # after the except block: the error kept alive what was allocated before it
                free_memory()
        return None

    def refuse(self, error: EngineError) -> None:
        """The device could not take the index: the CPU answers until the back-off is over."""
        self._stop_using(error if isinstance(error, DeviceError) else DeviceError(str(error)))

    def _after_failure(self, error: DeviceError, batch: int) -> int | None:
        """The next batch to try, or None."""
        if error.cause in _NO_MEMORY and batch > 1:
            self._limit = max(1, batch // 2)
            self._larger_at = self._clock() + _FIRST_BACKOFF_S
            self.note(error.cause, "smaller-batch", f"{batch} queries at once: {error}; {self._limit} are tried")
            return self._limit
        self._stop_using(error)
        return None

    def _stop_using(self, error: DeviceError) -> None:
        if error.cause == "device-lost":
            mark_lost(self.device, str(error))
            self._report_reason()
        elif error.cause == "fork":
            self._until = float("inf")
            self.note("fork", "cpu-until-restart", str(error))
        elif self._clock() >= self._until:  # else another thread failed at the same time
            self._backoff = min(_LONGEST_BACKOFF_S, max(_FIRST_BACKOFF_S, 2 * self._backoff))
            self._until = self._clock() + self._backoff
            self.note(error.cause, "cpu", f"{error}; the CPU answers, {self.device} is tried in {self._backoff:.0f} s")

    def _after_success(self, most: int) -> None:
        """End the back-off at once; double a cut batch every 15 seconds."""
        if self._backoff:
            self._backoff, self._until = 0.0, float("-inf")
            self.note("recovered", "device-again", f"{self.device} answers again")
        if self._limit is not None and most > self._limit and self._clock() >= self._larger_at:
            self._limit *= 2
            self._larger_at = self._clock() + _FIRST_BACKOFF_S

    def _report_reason(self) -> None:
        """Record once that the device is lost, whichever index met the error, or that this process is forked."""
        if os.getpid() != self._pid:
            cause: Cause = "fork"
            text = f"a forked process leaves {self.device} to its parent; the CPU answers"
        elif self.device in _lost:
            cause, text = "device-lost", f"{_lost[self.device]}; restart the process to use {self.device} again"
        else:
            return
        if cause not in self._reported:
            self._reported.add(cause)
            self.note(cause, "cpu-until-restart", text)
