"""When a body asks its device, in how large batches, and what it has to report about that."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ...errors import DeviceError
from ...types import DeviceIncident

__all__ = ["Duty"]

_SHORTEST_REST = 1.0
_LONGEST_REST = 60.0
"""Seconds until a device that had no room is asked again; doubled each time in vain."""
_KEPT = 32
_LASTING = ("device-lost", "device-error", "fork")


class Duty:
    """Out of memory halves the batch, at one query the device rests a while; anything worse is for good.

    A rest that was in vain doubles the next one. Any thread may call. Incidents are told when a state begins or ends,
    not for each query.
    """

    def __init__(self, device: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._clock = clock
        self._lock = threading.Lock()
        self._incidents: deque[DeviceIncident] = deque(maxlen=_KEPT)
        self._limit: int | None = None
        self._over = False
        self._rest = _SHORTEST_REST
        self._again_at = 0.0

    @property
    def serving(self) -> bool:
        """Whether the device is asked at the moment."""
        return self.batch(1) > 0

    def batch(self, wanted: int) -> int:
        """Queries to ask at once, at most ``wanted``; 0 while the host has to answer."""
        with self._lock:
            if self._over:
                return 0
            if self._limit is None:
                return wanted
            if self._clock() >= self._again_at:
                return max(1, min(wanted, 2 * self._limit))
            return min(wanted, self._limit)

    def worked(self, batch: int, wanted: int) -> None:
        """``batch`` queries were answered; a limit that did not bind any more is forgotten."""
        with self._lock:
            if self._limit is None or batch <= self._limit:
                return
            self._limit = batch
            if batch >= wanted:
                self._limit, self._rest = None, _SHORTEST_REST
                self._tell("recovered", "device-again", f"{self._device} answers {batch} queries at once again")

    def failed(self, error: DeviceError, batch: int) -> None:
        """``batch`` queries at once were refused."""
        with self._lock:
            if self._over:
                return
            if error.cause in _LASTING:
                self._over = True
                self._tell(error.cause, "cpu-until-restart", str(error))
                return
            before, now = self._limit, self._clock()
            if before is not None and now >= self._again_at:
                self._rest = min(2 * self._rest, _LONGEST_REST)
            self._again_at = now + self._rest
            self._limit = batch // 2 if before is None else min(before, batch // 2)
            if before is None or (before and not self._limit):
                self._tell(error.cause, "smaller-batch" if self._limit else "cpu", str(error))

    def incidents(self) -> list[DeviceIncident]:
        """What happened since the last call, oldest first."""
        with self._lock:
            told = list(self._incidents)
            self._incidents.clear()
            return told

    def _tell(self, cause: str, action: str, detail: str) -> None:
        self._incidents.append(DeviceIncident(self._device, cause, action, detail))  # type: ignore[arg-type]
