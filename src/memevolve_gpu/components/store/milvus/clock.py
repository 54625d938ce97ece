"""The server's clock: what a reader must wait for, when a row was written, and numbers that nobody else has."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

from ....utils.forking import renew_in_child
from .door import Door

__all__ = ["Clock"]

_LOGICAL_BITS = 18
"""A timestamp of Milvus: milliseconds since the epoch, then 18 bits that count within one."""

_IDS_PER_NUMBER = 1_000_000


class Clock:
    """One writer's view of the server's clock. Safe to use from several threads.

    Reads carry a *guarantee timestamp*: the server answers when it has seen everything up to it. ``wrote`` moves it
    beyond what this writer has had acknowledged, so that the writer, and only the writer, waits for its own writes.
    pymilvus' own Session level is not used: the server reports no time for deletes (measured with 2.3.5: a count right
    after a delete was the old one), and a new process would begin without any.
    """

    def __init__(self, door: Door) -> None:
        """Asks the server for its time: everything that anyone had acknowledged before is seen from here on."""
        self._door = door
        self._lock = threading.Lock()
        self._guarantee = 0
        self._offset = 0
        self._last_born = 0
        self._ids: Iterator[str] = iter(())
        self._level = door.config.consistency
        renew_in_child(self)
        moment = door.timestamp()
        if moment is None and self._level == "session":
            self._level = "strong"
        if moment is not None:
            self._guarantee = moment
            self._offset = (moment >> _LOGICAL_BITS) * 1_000_000 - time.time_ns()

    def after_fork(self) -> None:
        """A child is another writer: it takes numbers of its own."""
        self._lock = threading.Lock()
        self._ids = iter(())

    @property
    def level(self) -> str:
        """session, strong, bounded or eventually; strong instead of session where the server has no clock to ask."""
        return self._level

    def reading(self) -> dict[str, Any]:
        """What every read tells the server."""
        if self._level == "session":
            return {"consistency_level": "Customized", "guarantee_timestamp": self._guarantee}
        return {"consistency_level": self._level.capitalize()}

    def wrote(self) -> None:
        """A write was acknowledged, by this writer or, as far as it knows, by another."""
        if self._level != "session":
            return
        moment = self._door.timestamp()
        with self._lock:
            self._guarantee = max(self._guarantee, moment or 0)

    def births(self, count: int) -> range:
        """Moments in nanoseconds, ascending, after all that this writer was given before."""
        with self._lock:
            first = max(self._last_born + 1, time.time_ns() + self._offset)
            self._last_born = first + count - 1
        return range(first, first + count)

    def next_id(self) -> str:
        """``unit_<n>`` with an n that no other writer is given: the server hands out each timestamp once."""
        with self._lock:
            unit_id = next(self._ids, None)
        if unit_id is not None:
            return unit_id
        number = self._door.timestamp() or secrets.randbits(63)
        fresh = (f"unit_{number * _IDS_PER_NUMBER + i}" for i in range(_IDS_PER_NUMBER))
        with self._lock:
            self._ids = fresh
            return next(fresh)
