"""The end of the process: a thread that it stops in the middle of a call to torch ends it with an abort instead."""

from __future__ import annotations

import atexit
import threading
import weakref

from ...errors import EngineError
from .guard import keep_all

__all__ = ["stop", "wait_for"]

_PATIENCE_S = 10.0

_ends = threading.Event()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def wait_for(thread: threading.Thread) -> None:
    """Have the end of the process wait for ``thread``, which calls :func:`stop` every now and then."""
    _threads.add(thread)


def stop(_fraction: float) -> None:
    """Go on, unless the process ends; a callback for progress.

    Raises:
        EngineError: it does.
    """
    if _ends.is_set():
        raise EngineError("the process ends")


@atexit.register
def _end() -> None:
    _ends.set()
    for thread in list(_threads):
        thread.join(_PATIENCE_S)
    keep_all()
