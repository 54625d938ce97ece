"""The one handler for ``os.fork``: what is closed before a fork, and what is renewed in the child.

A child has one thread and copies of everything. A lock that another thread held stays locked in it, and files that
must not be shared are open in it. Objects and functions register here; the package calls ``os.register_at_fork``
nowhere else.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol


class AfterFork(Protocol):
    """Something that a forked child must set right."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""


class Forkable(Protocol):
    """Something that is closed before a fork and opened again after it, in the parent and in the child."""

    def before_fork(self) -> bool:
        """Close it; False when it is in use and cannot be closed."""

    def after_fork(self) -> None:
        """Called in the parent and in the child when :meth:`before_fork` returned True."""

    def disable_in_child(self) -> None:
        """Called in the child when :meth:`before_fork` returned False."""


_forking = threading.RLock()
_to_close: weakref.WeakSet[Forkable] = weakref.WeakSet()
_to_renew: weakref.WeakSet[AfterFork] = weakref.WeakSet()
_to_call: list[Callable[[], object]] = []
_closed: list[Forkable] = []
_in_use: list[Forkable] = []


@contextmanager
def no_fork() -> Iterator[None]:
    """No fork happens inside the block."""
    with _forking:
        yield


def close_for_fork(one: Forkable) -> None:
    """Close ``one`` at every fork while it is alive."""
    _to_close.add(one)


def renew_in_child(one: AfterFork) -> None:
    """Have ``one.after_fork()`` called in every child forked while ``one`` is alive."""
    _to_renew.add(one)


def call_in_child(function: Callable[[], object]) -> None:
    """Have ``function()`` called in every child."""
    _to_call.append(function)


def _before() -> None:
    _forking.acquire()
    for one in list(_to_close):
        (_closed if one.before_fork() else _in_use).append(one)


def _after() -> None:
    for one in _closed:
        one.after_fork()
    _closed.clear()
    _in_use.clear()
    _forking.release()


def _in_child() -> None:
    with ExitStack() as every:  # last in, first out; one that fails keeps none of the others from its turn
        for function in reversed(_to_call):
            every.callback(function)
        for renewed in list(_to_renew):
            every.callback(renewed.after_fork)
        every.callback(_after)
        for one in _in_use:
            every.callback(one.disable_in_child)


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
