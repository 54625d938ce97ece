"""The one handler for ``os.fork``: what is closed before a fork, and what is renewed in the child.

A child has one thread and copies of everything. A lock that another thread held stays locked in it, and files that
must not be shared are open in it. So the package takes its locks from :func:`lock`, which are free again in a child,
and objects and functions register here; the package calls ``os.register_at_fork`` nowhere else.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - its handler takes a lock that an import may need, so it runs after ours
import ctypes
import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
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


PATIENCE = 2.0
"""Seconds that a fork waits for calls of other threads."""
_IMPORTING = 30
"""How many times as long it waits for imports that go on."""

_register = os.register_at_fork
_registered: list[dict[str, Callable[[], object]]] = []
_begun: list[int] = []
"""The threads that are in the midst of a fork."""
_forking = threading.RLock()
_locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()
_awaited: weakref.WeakSet[threading.RLock] = weakref.WeakSet()
_taken: list[threading.RLock] = []
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


def lock(*, awaited: bool = False) -> threading.RLock:
    """A re-entrant lock that is free in a forked child, unless the thread that forked holds it.

    awaited: a fork waits for the thread that holds it, at most :data:`PATIENCE` seconds.
    """
    one = threading.RLock()
    _locks.add(one)
    if awaited:
        with _forking:  # a fork goes through them
            _awaited.add(one)
    return one


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
    _begun.append(threading.get_ident())
    os.register_at_fork = _register_later  # type: ignore[assignment]
    with ExitStack() as every:  # last in, first out; one that fails keeps none of the others from its turn
        every.callback(_take_logging)
        every.callback(_take, _awaited)
        every.callback(_close_all)
        every.callback(_stop_collecting)
        every.callback(_forking.acquire)
        every.callback(_wait_for_imports)  # while nothing is held that they may need, such as a store


def _stop_collecting() -> None:
    """Until all is renewed: in the child, garbage of the parent may wait for threads that it lacks."""
    _collects.append(gc.isenabled())
    gc.disable()


def _register_later(**handlers: Callable[[], object]) -> None:
    """In place of ``os.register_at_fork`` while this module waits: of a module that is imported meanwhile, the handlers
    for after the fork would run without the one for before it, and give back locks that others hold."""
    if os.register_at_fork is _register:
        _register(**handlers)
    else:
        _registered.append(handlers)


def _register_now() -> None:
    with suppress(ValueError):  # none is left in a child
        _begun.remove(threading.get_ident())
    if _begun:
        return
    os.register_at_fork = _register
    while _registered:
        _register(**_registered.pop(0))


def _take(locks: Iterable[threading.RLock]) -> None:
    deadline = time.monotonic() + PATIENCE
    for one in list(locks):
        _taken.append(one)
        if not one.acquire(timeout=max(0.0, deadline - time.monotonic())):
            _taken.remove(one)


def _take_logging() -> None:
    """Take the locks of logging while no other thread imports: most modules ask for a logger when they are imported."""
    held, deadline = len(_taken), time.monotonic() + PATIENCE
    while True:
        _wait_for_imports()
        _take(_logging())
        if time.monotonic() > deadline or not _others_import():
            return
        _give_back(held)


def _logging() -> list[threading.RLock]:
    """The locks of the handlers of logging, after that of the module, which its functions take first.

    The module frees them in a child, but not the buffer of a file that another thread writes a record to.
    """
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler: None for one in loggers for handler in getattr(one, "handlers", ())}
    found = [vars(logging).get("_lock"), *(handler.lock for handler in handlers)]
    return [one for one in found if isinstance(one, type(_forking))]


def _wait_for_imports() -> None:
    """Wait for other threads that import modules, until none has come for a while, or for long.

    A child would wait for ever for the lock of a module that was half imported when it was forked. To free the lock and
    import the module again there is no way out: numpy and torch then fail, or end the process.
    """
    count, deadline, end = -1, 0.0, time.monotonic() + _IMPORTING * PATIENCE
    while _others_import():
        if len(sys.modules) != count:
            count, deadline = len(sys.modules), time.monotonic() + PATIENCE
        if time.monotonic() > min(deadline, end):
            return
        time.sleep(0.001)


def _others_import() -> bool:
    frames = sys._current_frames()  # noqa: SLF001 - a documented function of CPython and PyPy
    del frames[threading.get_ident()]  # it would hold itself, and with it all others
    return any(map(_imports, frames.values()))


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load" and "importlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _close_all() -> None:
    with ExitStack() as every:
        for one in list(_to_close):
            every.callback(_close, one)


def _close(one: Forkable) -> None:
    _in_use.append(one)  # until it is closed: a signal handler may raise here
    if one.before_fork():
        _closed.append(_in_use.pop())


def _give_back(held: int = 0) -> None:
    while len(_taken) > held:
        with suppress(RuntimeError):  # logging has freed its own in a child
            _taken.pop().release()


def _after() -> None:
    with ExitStack() as every:
        every.callback(_forking.release)
        every.callback(_register_now)
        every.callback(_give_back)
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


def _free_locks() -> None:
    """Free the locks that threads of the parent held: those that this thread cannot take."""
    for one in list(_locks):
        if one.acquire(blocking=False):
            one.release()
        else:
            one._at_fork_reinit()  # type: ignore[attr-defined]  # noqa: SLF001 - what the standard library calls


def _in_child() -> None:
    with ExitStack() as every:
        every.callback(_collect)
        for function in reversed(_to_call):
            every.callback(function)
        for renewed in list(_to_renew):
            every.callback(renewed.after_fork)
        every.callback(_after)
        for one in _in_use:
            every.callback(one.disable_in_child)
        every.callback(_free_locks)
        every.callback(_begun.clear)


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
