"""Device failover: a smaller batch, then the host, and back when there is room again."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, TypeVar

from ...errors import DeviceError, EngineError
from ...types import DeviceIncident
from .runtime import Cause, begun_build, cause_of, current, device_errors, device_lock, forked, load_torch

__all__ = ["DeviceFailover", "building", "locked_device", "lost_devices"]

T = TypeVar("T")
Action = Literal["smaller-batch", "cpu", "cpu-until-restart", "device-again"]

_FIRST_REST_S, _LONGEST_REST_S = 15.0, 600.0
_PATIENCE_S = 20.0
"""So long a search waits for its turn: a device that has not answered another one by then is not going to."""
_INCIDENTS = 64
_SHORT = ("out-of-memory", "limit")

_lost: dict[str, str] = {}


def lost_devices() -> dict[str, str]:
    """Devices that failed for good in this process, and what they said."""
    return dict(_lost)


@contextmanager
def building(device: str) -> Iterator[None]:
    """Turn what torch raises while an index is built into a DeviceError that names its cause.

    A build takes its turns on the device step by step, so that other indexes are searched meanwhile.
    """
    if device in _lost:
        raise DeviceError(f"device {device} failed earlier: {_lost[device]}; restart the process", "device-lost")
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
            _lost[device] = _line(error)
        with suppress(DeviceError), locked_device(device):
            _release(device)
        raise DeviceError(f"device {device}: {_line(error)}; the CPU can hold this index", cause) from error


class DeviceFailover:
    """Decides, for one index, whether its device is asked, and what follows when it fails.

    Out of memory: the batch is halved and repeated, down to one query. When that does not fit, and after any other
    failure, the host answers and the device rests, 15 seconds first, twice as long each time, 10 minutes at most. An
    error after which CUDA refuses everything (an illegal access, a lost device) holds for every index on that device
    until the process ends. A forked child never asks the device.
    """

    def __init__(self, device: str, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self.device = device
        self._relieve: tuple[Callable[[], None], ...] = ()
        self._clock = clock
        self._pid = os.getpid()
        self._limit: int | None = None
        self._rest = 0.0
        self._until = float("-inf")
        self._larger_at = float("-inf")
        self._told: set[str] = set()
        self._incidents: deque[DeviceIncident] = deque(maxlen=_INCIDENTS)

    def relieved_by(self, *drops: Callable[[], None]) -> None:
        """``drops`` give up what the index keeps on the device for speed alone; called when memory is short."""
        self._relieve = drops

    @property
    def serving(self) -> bool:
        """Whether the next search asks the device."""
        return os.getpid() == self._pid and self.device not in _lost and self._clock() >= self._until

    @property
    def batch(self) -> int | None:
        """The most queries that fit into the device's memory at once, as far as is known."""
        return self._limit

    def note(self, cause: Cause | Literal["recovered"], action: Action, detail: str) -> None:
        """Remember an incident; the oldest is forgotten when there are too many."""
        self._incidents.append(DeviceIncident(self.device, cause, action, detail))

    def remark(self, detail: str) -> None:
        """Something on the device goes a slower way than was meant."""
        self.note("device-error", "device-again", detail)

    def incidents(self) -> list[DeviceIncident]:
        """What was noted since the last call."""
        found = []
        while self._incidents:
            try:
                found.append(self._incidents.popleft())
            except IndexError:  # another thread was quicker
                break
        return found

    def attempt(self, work: Callable[[int], T], most: int) -> T | None:
        """``work(batch)`` on the device's turn, for at most ``most`` queries at once; None: the host must answer."""
        if not self.serving:
            self._tell_why()
            return None
        batch: int | None = min(self._limit or most, most)
        while batch is not None:
            try:
                with locked_device(self.device), current(self.device):
                    found = work(batch)
            except device_errors() as error:
                short = cause_of(error) in _SHORT
                batch = self._failed(error, batch)
            else:
                self._succeeded(most)
                return found
            if short:  # now that the error no longer keeps alive what was made before it
                self._make_room()
        return None

    def refuse(self, error: EngineError) -> None:
        """The device could not take the rows: the host answers until the device has rested."""
        self._settle(cause_of(error) or "device-error", _line(error))

    def _make_room(self) -> None:
        """Drop what is kept for speed, and give what torch keeps back to the driver: on the device's turn, for another
        thread may be using or recording it."""
        with suppress(DeviceError), locked_device(self.device):
            for drop in self._relieve:
                drop()
            _release(self.device)

    def _failed(self, error: BaseException, batch: int) -> int | None:
        """The next batch to try, or None."""
        cause = cause_of(error) or "device-error"
        if cause in _SHORT and batch > 1:
            self._limit = max(1, batch // 2)
            self._larger_at = self._clock() + _FIRST_REST_S
            self.note(cause, "smaller-batch", f"{batch} queries at once: {_line(error)}; {self._limit} are tried")
            return self._limit
        self._settle(cause, _line(error))
        return None

    def _settle(self, cause: Cause, text: str) -> None:
        if cause == "device-lost":
            _lost[self.device] = text
            self._told.add("lost")
            self.note(cause, "cpu-until-restart", f"{text}; restart the process to use {self.device} again")
            return
        self._rest = min(_LONGEST_REST_S, max(_FIRST_REST_S, 2 * self._rest))
        self._until = self._clock() + self._rest
        self.note(cause, "cpu", f"{text}; the CPU answers, {self.device} is asked again in {self._rest:.0f} s")

    def _succeeded(self, most: int) -> None:
        """Forget what is over: a rest at once, a cut batch by one doubling every 15 seconds."""
        if self._rest:
            self._rest, self._until = 0.0, float("-inf")
            self.note("recovered", "device-again", f"{self.device} answers again")
        if self._limit is not None and most > self._limit and self._clock() >= self._larger_at:
            self._limit *= 2
            self._larger_at = self._clock() + _FIRST_REST_S

    def _tell_why(self) -> None:
        """An incident for what another index met, and for a fork, once each."""
        if os.getpid() != self._pid:
            why, cause, text = "fork", "fork", f"a forked process leaves {self.device} to its parent; the CPU answers"
        elif self.device in _lost:
            why, cause, text = "lost", "device-lost", f"{_lost[self.device]}; restart the process to use it again"
        else:
            return
        if why not in self._told:
            self._told.add(why)
            self.note("fork" if cause == "fork" else "device-lost", "cpu-until-restart", text)


@contextmanager
def locked_device(device: str) -> Iterator[None]:
    """The turn on a device, as a search takes it.

    Raises:
        DeviceError: whoever holds it does not come back.
    """
    lock = device_lock(device)
    if not lock.acquire(timeout=_PATIENCE_S):
        raise DeviceError(f"device {device} has not answered for {_PATIENCE_S:.0f} s", "device-error")
    try:
        yield
    finally:
        lock.release()


def _release(device: str) -> None:
    """Give what torch keeps in reserve back to the driver, where that is possible."""
    if device.startswith("cuda"):
        try:
            load_torch().cuda.empty_cache()
        except RuntimeError:  # the device is worse off than that; the next use will say so
            return


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
