"""Arrays with room behind their last row, so that a longer one need not be a copy.

An array from :func:`roomy` or :func:`grown` is a view of a larger allocation. Whoever holds the longest view of it may
be followed by a longer one that shares its memory; nobody's rows are ever written again. Room that no row has touched
takes address space and no memory.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["grown", "lengthened", "roomy"]

_SHARE = 4
"""Room for a quarter more rows: a store that grows is trained anew before it needs a fourth allocation."""
_LEAST = 64

Scalar = TypeVar("Scalar", bound=np.generic)


class _Room(np.ndarray[Any, Any]):
    """An allocation, of which the first ``used`` rows belong to views."""

    used: int
    lock: threading.Lock
    copied: tuple[weakref.ref[Any], int] | None = None
    """Whose first rows lie here too, and how many of them."""


def roomy(shape: tuple[int, ...], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    """An array of ``shape``, not initialised, that :func:`grown` can lengthen without a copy."""
    rows = shape[0]
    room = np.ndarray.__new__(_Room, (rows + max(_LEAST, rows // _SHARE), *shape[1:]), dtype)
    room.used, room.lock = rows, threading.Lock()
    return _first(room, rows)


def grown(array: npt.NDArray[Scalar], more: npt.NDArray[Any]) -> npt.NDArray[Scalar]:
    """``array`` followed by the rows ``more``, in the memory of ``array`` where that has room and nobody was faster.

    ``array`` keeps its rows and its length. Any number of threads may call this for the same array; the second copies.
    Rows that :func:`lengthened` put behind ``array`` are there already.
    """
    room = _owner(more)
    if isinstance(room, _Room) and len(more) and _follows(room, array, more):
        return _first(room, len(array) + len(more))
    longer = lengthened(array, len(more))
    longer[len(array) :] = more
    return longer


def lengthened(array: npt.NDArray[Scalar], by: int) -> npt.NDArray[Scalar]:
    """``array`` and room for ``by`` more rows, not initialised, which the caller alone may write; as :func:`grown`."""
    n, total = len(array), len(array) + by
    room = _room_of(array)
    if room is not None and _taken(room, n, total):
        return _first(room, total)
    longer = roomy((total, *array.shape[1:]), array.dtype.type)
    longer[:n] = array
    _owner(longer).copied = (weakref.ref(_owner(array)), n)
    return longer


def _follows(room: _Room, array: npt.NDArray[Any], more: npt.NDArray[Any]) -> bool:
    """Do the rows ``more`` lie in ``room`` right behind those of ``array``, or behind the copy made of them?"""
    same = more.dtype == array.dtype == room.dtype and more.shape[1:] == array.shape[1:] == room.shape[1:]
    if not (same and more.flags.c_contiguous and more.ctypes.data == room.ctypes.data + array.nbytes):
        return False
    if _room_of(array) is room:
        return True
    return room.copied is not None and room.copied[0]() is _owner(array) and room.copied[1] == len(array)


def _first(room: _Room, rows: int) -> npt.NDArray[Any]:
    view: npt.NDArray[Any] = room[:rows].view(np.ndarray)
    return view


def _taken(room: _Room, n: int, total: int) -> bool:
    """Take the rows from ``n`` to ``total``, unless they are taken or beyond the end."""
    with room.lock:
        if room.used != n or total > len(room):
            return False
        room.used = total
        return True


def _room_of(array: npt.NDArray[Any]) -> _Room | None:
    """The allocation whose first rows ``array`` is."""
    owner = _owner(array)
    if not isinstance(owner, _Room):
        return None
    same = array.dtype == owner.dtype and array.shape[1:] == owner.shape[1:] and array.flags.c_contiguous
    return owner if same and array.ctypes.data == owner.ctypes.data else None


def _owner(array: npt.NDArray[Any]) -> Any:
    """The array whose memory ``array`` looks into; itself where it is nobody's view."""
    owner: Any = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner
