"""A lock file that lets one process at a time maintain a store."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["one_process"]

_held: set[int] = set()
"""Open descriptors of lock files."""


@contextmanager
def one_process(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the maintenance lock of a store; yields False when another process has it and ``wait`` is off.

    On a read-only file system nobody else can write a snapshot either, so the lock is granted without a file.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield True
        return
    _held.add(handle)
    try:
        yield _locked(handle, wait)
    finally:
        if handle in _held:  # not in a child forked meanwhile
            _held.discard(handle)
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing would not do: such a child has the file open too
            os.close(handle)


def _locked(handle: int, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _in_child() -> None:
    """The round goes on in the parent; its lock must not live as long as the child does."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
