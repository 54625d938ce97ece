"""The reading connections that all threads share."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path

import apsw

from ..errors import StoreClosedError
from . import keyword
from .connections import connect, shut, shut_on_failure
from .failures import FOREIGN, translated

__all__ = ["IDLE_READERS", "ReaderPool"]

IDLE_READERS = 8
"""Connections kept open while nobody uses them."""


class ReaderPool:
    """Connections for reading. Any thread may take one; a connection is used by one thread at a time.

    One that is taken and, by an interrupt, never handed back is closed when it is forgotten.
    """

    def __init__(self, path: Path, *, vfs: str | None, immutable: bool) -> None:
        self.path = path
        self.vfs = vfs
        self._immutable = immutable
        self._idle: list[apsw.Connection] = []
        self._all: weakref.WeakSet[apsw.Connection] = weakref.WeakSet()
        self._opening = threading.RLock()
        self._barred = False
        self._refusal: str | None = None

    def take(self) -> apsw.Connection:
        """An idle connection, or a new one. Raises StoreClosedError."""
        if self._barred:
            self._wait()
        try:
            return self._idle.pop()
        except IndexError:
            return self._new()

    def give(self, con: apsw.Connection) -> None:
        """Hand a connection back."""
        self._idle.append(con)
        if self._barred or len(self._idle) > IDLE_READERS:
            self._close_one()

    def refuse_if_closed(self) -> None:
        """Raise StoreClosedError when the pool may no longer be used."""
        if self._refusal is not None:
            raise StoreClosedError(f"{self.path}: {self._refusal}")

    def close(self) -> None:
        """Close what is idle now, and what is handed back later."""
        self._bar("the store was closed; open it again")
        while self._close_one():
            pass

    def pause(self, timeout: float) -> bool:
        """Close every connection, waiting for those in use, and open no other until :meth:`resume`."""
        deadline = time.monotonic() + timeout
        if not self._opening.acquire(timeout=timeout):
            return False
        self._barred = True
        while self._all:
            if self._close_one():
                continue
            if time.monotonic() > deadline:
                self.resume()
                return False
            time.sleep(0.0005)
        return True

    def resume(self) -> None:
        """End :meth:`pause`."""
        self._barred = self._refusal is not None
        self._opening.release()

    def strand(self) -> list[apsw.Connection]:
        """In a forked child that could not be prepared: refuse use, and return what must be neither used nor closed."""
        inherited, self._idle, self._all = list(self._all), [], weakref.WeakSet()
        self._opening = threading.RLock()
        self._bar("the process was forked while the store was in use; fork while no call is running, or use spawn")
        return inherited

    def _bar(self, refusal: str) -> None:
        self._refusal = refusal
        self._barred = True

    def _wait(self) -> None:
        """Outlast a pause."""
        self.refuse_if_closed()
        with self._opening:
            self.refuse_if_closed()

    def _new(self) -> apsw.Connection:
        with self._opening:
            try:
                con = connect(self.path, read_only=True, immutable=self._immutable, vfs=self.vfs)
                with shut_on_failure(con):
                    keyword.register(con)
            except FOREIGN as error:
                raise translated(error, self.path) from error
            self._all.add(con)
            return con

    def _close_one(self) -> bool:
        try:
            con = self._idle.pop()
        except IndexError:
            return False
        shut(con)
        self._all.discard(con)
        return True
