"""Whose turn a device is: one search, or one step of a build, at a time; and nobody's once the process ends.

Kernels of two searches would share the bandwidth anyway; this way buffers and recorded graphs are free to be reused,
and scratch memory is that of one batch. A thread that the end of the interpreter stops inside torch ends the process
with an abort, so the end of the process stops builds at their next step, waits for them, and takes all turns for good.
"""

from __future__ import annotations

import atexit
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from ...errors import EngineError

__all__ = ["Turn", "begun_build", "turn_on"]

_PATIENCE_S = 10.0
"""For each build, and each turn, at the end of the process."""


class Turn:
    """A lock that a thread may take again, and that refuses a build's next step once the process ends."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

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
    turns: dict[str, Turn] = {}  # noqa: RUF012 - one for the process
    lock = threading.RLock()
    builds = 0
    fewer_builds = threading.Condition()
    builds_here = _Depth()


def turn_on(device: str) -> Turn:
    """The turn on ``device``, one object for the whole process."""
    with _Process.lock:
        return _Process.turns.setdefault(device, Turn())


@contextmanager
def begun_build() -> Iterator[None]:
    """A build is under way in this thread, which the end of the process waits for; it takes its turns step by step."""
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
        _Process.fewer_builds.wait_for(lambda: _Process.builds == 0, _PATIENCE_S)
    for turn in list(_Process.turns.values()):
        turn.acquire(timeout=_PATIENCE_S)


def _in_child() -> None:
    """Locks that the parent's threads held would never be given back."""
    _Process.lock, _Process.fewer_builds, _Process.builds = threading.RLock(), threading.Condition(), 0
    _Process.turns.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
