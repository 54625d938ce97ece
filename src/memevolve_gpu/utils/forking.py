"""The one handler for ``os.fork``: what is closed before a fork, and what is renewed in the child.

A child has one thread and copies of everything. A lock that another thread held stays locked in it, and files that
must not be shared are open in it. Objects and functions register here; the package calls ``os.register_at_fork``
nowhere else.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class lazy(Generic[T]):  # noqa: N801 - a decorator, like property
    """``functools.cached_property`` without a lock: two threads at once may compute the value twice.

    Up to Python 3.11 the original holds one lock for all instances while it computes. A process forked meanwhile would
    wait for that lock forever.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, _owner: type | None = None) -> T:
        value: T = self._compute(instance)
        instance.__dict__[self._name] = value  # found before this descriptor from now on
        return value

    if TYPE_CHECKING:  # the value may be set, too

        def __set__(self, instance: object, value: T) -> None: ...


class AfterFork(Protocol):
    """Something that a forked child must set right."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""


class Forkable(Protocol):
    """Something that is closed before a fork and opened again after it, in the parent and in the child."""

    def before_fork(self) -> bool:
        """Close it; False when it is in use and cannot be closed. It stays open too when this raises."""

    def after_fork(self) -> None:
        """Called in the parent and in the child when :meth:`before_fork` returned True."""

    def disable_in_child(self) -> None:
        """Called in the child when :meth:`before_fork` returned False or raised."""


_forking = threading.RLock()
_to_close: weakref.WeakSet[Forkable] = weakref.WeakSet()
_to_renew: weakref.WeakSet[AfterFork] = weakref.WeakSet()
_to_call: list[Callable[[], object]] = []
_closed: list[Forkable] = []
_in_use: list[Forkable] = []
_collects: list[bool] = []


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


def never_free(one: object) -> None:
    """Keep ``one`` until the process ends: in a child, an engine that is freed may wait for threads that it lacks."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def _before() -> None:
    _forking.acquire()
    _collects.append(gc.isenabled())
    gc.disable()  # until all is renewed: in the child, garbage of the parent may wait for threads that it lacks
    with ExitStack() as every:  # one that fails keeps none of the others from its turn, here and below
        for one in list(_to_close):
            every.callback(_close, one)


def _close(one: Forkable) -> None:
    _in_use.append(one)  # until it is closed: a signal handler may raise here
    if one.before_fork():
        _closed.append(_in_use.pop())


def _after() -> None:
    with ExitStack() as every:
        every.callback(_forking.release)
        every.callback(_in_use.clear)
        every.callback(_closed.clear)
        for one in _closed:
            every.callback(one.after_fork)


def _collect() -> None:
    if _collects and _collects.pop():
        gc.enable()


def _in_parent() -> None:
    with ExitStack() as every:
        every.callback(_after)
        every.callback(_collect)


def _in_child() -> None:
    with ExitStack() as every:  # last in, first out
        every.callback(_collect)
        for function in reversed(_to_call):
            every.callback(function)
        for renewed in list(_to_renew):
            every.callback(renewed.after_fork)
        every.callback(_after)
        for one in _in_use:
            every.callback(one.disable_in_child)


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
