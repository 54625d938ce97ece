"""Arrays with room behind their last row, so that a longer one need not be a copy.

An array from :func:`roomy` or :func:`grown` is a view of a larger allocation. Whoever holds the longest view of it may
be followed by a longer one that shares its memory; nobody's rows are ever written again. Room that no row has touched
takes address space and no memory.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["grown", "roomy"]

_SHARE = 4
"""Room for a quarter more rows: a store that grows is trained anew before it needs a fourth allocation."""
_LEAST = 64

Scalar = TypeVar("Scalar", bound=np.generic)


class _Room(np.ndarray[Any, Any]):
    """An allocation, of which the first ``used`` rows belong to views."""

    used: int
    lock: threading.Lock


def roomy(shape: tuple[int, ...], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    """An array of ``shape``, not initialised, that :func:`grown` can lengthen without a copy."""
    rows = shape[0]
    room = np.ndarray.__new__(_Room, (rows + max(_LEAST, rows // _SHARE), *shape[1:]), dtype)
    room.used, room.lock = rows, threading.Lock()
    return _first(room, rows)


def grown(array: npt.NDArray[Scalar], more: npt.NDArray[Any]) -> npt.NDArray[Scalar]:
    """``array`` followed by the rows ``more``, in the memory of ``array`` where that has room and nobody was faster.

    ``array`` keeps its rows and its length. Any number of threads may call this for the same array; the second copies.
    """
    n, total = len(array), len(array) + len(more)
    room = _room_of(array)
    if room is not None and _taken(room, n, total):
        longer: npt.NDArray[Scalar] = _first(room, total)
    else:
        longer = roomy((total, *array.shape[1:]), array.dtype.type)
        longer[:n] = array
    longer[n:] = more
    return longer


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
    owner: Any = array.base
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    if not isinstance(owner, _Room):
        return None
    same = array.dtype == owner.dtype and array.shape[1:] == owner.shape[1:] and array.flags.c_contiguous
    return owner if same and array.ctypes.data == owner.ctypes.data else None
