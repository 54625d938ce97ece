"""What happens to open stores when the process forks.

SQLite keeps, per process and file, a record of the POSIX locks that it holds. A child inherits the record but not the
locks: a connection that it opens to the same file believes in locks that do not exist, and the parent may delete the
write-ahead log under it. So every connection is closed before the fork, and opened again afterwards on both sides when
it is needed. Where a call of another thread does not end in time, the child may not touch those files.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..errors import StoreClosedError

__all__ = ["held_off", "watch"]


class Forkable(Protocol):
    """What the hooks need of a store."""

    path: Path

    def before_fork(self) -> bool: ...

    def after_fork(self) -> None: ...

    def strand(self) -> list[object]: ...


_stores: weakref.WeakSet[Forkable] = weakref.WeakSet()
_opening = threading.RLock()
_prepared: list[Forkable] = []
_unprepared: list[Forkable] = []
_stranded_paths: set[Path] = set()
_inherited: list[object] = []


@contextmanager
def held_off(path: Path) -> Iterator[None]:
    """No fork happens inside the block. Raises StoreClosedError when this process must not touch the file."""
    if path in _stranded_paths:
        raise StoreClosedError(
            f"{path} was in use by another thread, or inside write(), when this process was forked from it; "
            "fork while no call is running, or start the process with spawn"
        )
    with _opening:
        yield


def watch(store: Forkable) -> None:
    """Look after an open store at every fork to come."""
    _stores.add(store)


def _before() -> None:
    _opening.acquire()
    for store in list(_stores):
        (_prepared if store.before_fork() else _unprepared).append(store)


def _after() -> None:
    for store in _prepared:
        store.after_fork()
    _prepared.clear()
    _unprepared.clear()
    _opening.release()


def _in_child() -> None:
    for store in _unprepared:
        _inherited.extend(store.strand())
        _stranded_paths.add(store.path)
    _after()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
