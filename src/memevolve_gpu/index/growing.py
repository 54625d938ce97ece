"""Arrays with room behind their last row, so that a longer one need not be a copy.

An array from :func:`roomy` or :func:`grown` is a view of a larger allocation. Whoever holds the longest view of it may
be followed by a longer one that shares its memory; nobody's rows are ever written again. Room that no row has touched
takes address space and no memory. The first rows may be those of a file (:func:`mapped`): the system reads them when
they are needed, and drops them when memory is short.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["grown", "in_memory", "lengthened", "mapped", "roomy"]

_SHARE = 4
"""Room for a quarter more rows: a store that grows is trained anew before it needs a fourth allocation."""
_LEAST = 64
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0x40

Scalar = TypeVar("Scalar", bound=np.generic)


class _Room(np.ndarray[Any, Any]):
    """An allocation, of which the first ``used`` rows belong to views."""

    used: int
    lock: threading.Lock
    copied: tuple[weakref.ref[Any], int] | None = None
    """Whose first rows lie here too, and how many of them."""
    from_file: int = 0
    """How many of the first rows are mapped from a file."""


def roomy(shape: tuple[int, ...], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    """An array of ``shape``, not initialised, that :func:`grown` can lengthen without a copy."""
    rows = shape[0]
    room = np.ndarray.__new__(_Room, (_with_room(rows), *shape[1:]), dtype)
    room.used, room.lock = rows, threading.Lock()
    return _first(room, rows)


def mapped(file: int, offset: int, shape: tuple[int, ...], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    """An array of ``shape`` that a file holds from ``offset`` bytes on, mapped in place; :func:`grown` can lengthen it.

    ``file`` is a descriptor that may be closed afterwards. The rows must lie within the file, and nobody may ever cut
    it or write to it: it is replaced by renaming another over it. What is written to the array stays in this process.

    Raises:
        OSError: the system cannot map this file there.
    """
    rows, width = shape[0], math.prod(shape[1:]) * np.dtype(dtype).itemsize
    if offset % mmap.PAGESIZE or os.fstat(file).st_size < offset + rows * width:
        raise OSError(f"{rows} rows of {width} bytes at byte {offset} cannot be mapped")
    capacity = _with_room(rows)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    region = mmap.mmap(-1, max(1, capacity * width), flags=flags)
    if rows * width:
        _lay_over(region, file, offset, rows * width)
    room = np.ndarray.__new__(_Room, (capacity, *shape[1:]), dtype, buffer=region)
    room.used, room.lock, room.from_file = rows, threading.Lock(), rows
    return _first(room, rows)


def in_memory(array: npt.NDArray[Any]) -> int:
    """Bytes of the rows of ``array`` that no file holds."""
    room = _room_of(array)
    if room is None or not len(array):
        return array.nbytes
    return max(0, len(array) - room.from_file) * (array.nbytes // len(array))


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


def _with_room(rows: int) -> int:
    return rows + max(_LEAST, rows // _SHARE)


def _lay_over(region: mmap.mmap, file: int, offset: int, size: int) -> None:
    """Put ``size`` bytes of a file in place of the first of ``region``, whose end unmaps both."""
    library = ctypes.CDLL(None, use_errno=True)
    place = library.mmap
    place.restype = ctypes.c_void_p
    place.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
    if place(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


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
