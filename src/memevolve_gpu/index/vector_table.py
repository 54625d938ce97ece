"""Tables of float32 vectors that answer exact distances, and arrays with spare capacity to grow.

An array from :func:`growable` or :func:`grown` is a view of a larger allocation. The longest view of it may
be followed by a longer one that shares its memory; rows are never written twice. Space that no row has touched takes
addresses and no memory. The first rows may be those of a file (:func:`mapped`): the system reads them when
they are needed, and drops them when memory is short. For the same reason, rows of large arrays that come later lie in a
:mod:`.spill`, a file without a name in the same folder; where the disk has little room for it they are in memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import EngineError, StorageFullError
from ..types import AnyArray, FloatArray, IntArray, Metric
from ..utils.forking import lock
from .bitmap import RowFilter
from .exact_scan import distances_by_row, exact_scan, rerank_rows, scan_many
from .spill import FIRST_ROW, Descriptor, Spill

_SHARE = 4
"""Capacity for a quarter more rows: a growing store trains its index again before it needs a fourth allocation."""
_LEAST = 64
SPILLED_BYTES = 16 << 20
"""Arrays from this size on take their memory from a spill."""
_COPIED_BYTES = 16 << 20
_LARGE_PAGE = 2 << 20
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0x40

Scalar = TypeVar("Scalar", bound=np.generic)


class _Growable(np.ndarray[Any, Any]):
    """An allocation, of which the first ``used`` rows belong to views."""

    used: int
    lock: threading.RLock
    copied: tuple[weakref.ref[AnyArray], int] | None = None
    """The allocation whose first rows were copied here, and how many of them."""
    from_file: int = 0
    """How many of the first rows are mapped from a file."""
    folder: Path | None = None
    """Where longer ones may have their spill."""
    spill: Spill | None = None
    source: tuple[Descriptor, int] | None = None
    """The file of the first rows, and where it holds them."""

    def in_files(self) -> int:
        """How many bytes of the first ``used`` rows are not in memory of this process alone."""
        width = self.strides[0] if len(self) else 0
        return (self.used if self.spill is not None else self.from_file) * width


def growable(
    shape: tuple[int, ...], dtype: type[Scalar], folder: Path | None = None, reserved: int | None = None
) -> npt.NDArray[Scalar]:
    """An array of ``shape``, not initialised, that :func:`grown` can lengthen without a copy.

    folder: for the spill, where the array is large; None keeps it in memory. reserved: how many of the first rows may
    be written at once, None for all; the others after :func:`reserve_rows`.
    """
    rows, capacity = shape[0], _with_spare(shape[0])
    width = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    if folder is not None and rows * width >= SPILLED_BYTES:
        try:
            spill = Spill(folder, 0, capacity * width)
            if spill.reserve(0, (rows if reserved is None else reserved) * width):
                region = mmap.mmap(spill.file, capacity * width, offset=FIRST_ROW)
                return _first(_allocation((capacity, *shape[1:]), dtype, rows, region, folder, spill), rows)
        except OSError:
            pass
    return _first(_allocation((capacity, *shape[1:]), dtype, rows, None, folder), rows)


def growable_like(
    array: npt.NDArray[Scalar], rows: int, reserved: int | None = None, *, most: float = math.inf
) -> npt.NDArray[Scalar]:
    """:func:`growable` for ``rows`` rows like those of ``array``, in the folder of its spill.

    Raises:
        StorageFullError: they would take more than ``most`` bytes of memory.
    """
    return _within(growable((rows, *array.shape[1:]), array.dtype.type, spill_folder(array), reserved), most)


def _within(made: npt.NDArray[Scalar], most: float) -> npt.NDArray[Scalar]:
    """``made``, of which no row is written yet, where it takes at most so many bytes of memory."""
    if (held := in_memory(made)) > most:
        raise StorageFullError(
            f"the disk has no room for the vectors of {len(made)} units, which would take {held >> 20} MB of memory; "
            "make room on the disk or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB"
        )
    return made


def spill_folder(array: AnyArray) -> Path | None:
    """Where arrays that take the place of ``array`` may have their spill."""
    owner = _owner(array)
    return owner.folder if isinstance(owner, _Growable) else None


def mapped(
    file: int, offset: int, shape: tuple[int, ...], dtype: type[Scalar], folder: Path | None = None, room: int = 0
) -> npt.NDArray[Scalar]:
    """An array of ``shape`` that a file holds from ``offset`` bytes on, mapped in place; :func:`grown` can lengthen it.

    ``file`` is a descriptor that may be closed afterwards. The rows must lie within the file, which must never be
    cut or written to: it is replaced by renaming another over it. What is written to the array stays in this process.
    folder: for the spill of rows that follow, where the array is large; None keeps them in memory. room: for how many
    rows there must be addresses.

    Raises:
        OSError: the system cannot map this file there.
    """
    rows, width = shape[0], math.prod(shape[1:]) * np.dtype(dtype).itemsize
    if offset % mmap.PAGESIZE or os.fstat(file).st_size < offset + rows * width:
        raise OSError(f"{rows} rows of {width} bytes at byte {offset} cannot be mapped")
    capacity = _with_spare(max(rows, room))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    size = capacity * width
    region = mmap.mmap(-1, size + _LARGE_PAGE, flags=flags)
    # as far from a border of large pages as in the file: the system maps whole ones where its cache holds such
    first = (offset - ctypes.addressof(ctypes.c_char.from_buffer(region))) % _LARGE_PAGE
    if rows * width:
        _lay_over(region, first, file, offset, rows * width)
    spill = None
    if folder is not None and max(rows, room) * width >= SPILLED_BYTES:
        spill = _spill_after(region, first, rows * width, size, folder)
    buffer = _allocation((capacity, *shape[1:]), dtype, rows, region, folder, spill, first)
    buffer.from_file, buffer.source = rows, (Descriptor(file), offset)
    return _first(buffer, rows)


def _spill_after(region: mmap.mmap, first: int, end: int, size: int, folder: Path) -> Spill | None:
    """A spill for what follows the page of byte ``end`` of an allocation of ``size`` bytes, which begins at byte
    ``first`` of the region; None where there can be none."""
    start = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
    if size <= start:
        return None
    try:
        spill = Spill(folder, start, size)
        _lay_over(region, first + start, spill.file, FIRST_ROW + start, size - start, shared=True)
    except OSError:
        return None
    return spill


def _allocation(
    shape: tuple[int, ...],
    dtype: type[Scalar],
    used: int,
    region: mmap.mmap | None,
    folder: Path | None,
    spill: Spill | None = None,
    first: int = 0,
) -> _Growable:
    buffer: _Growable = np.ndarray.__new__(_Growable, shape, dtype, buffer=region, offset=first)
    buffer.used, buffer.lock, buffer.folder, buffer.spill = used, lock(), folder, spill
    return buffer


def in_memory(array: AnyArray) -> int:
    """Bytes of the rows of ``array`` that no file holds."""
    buffer = _growable_of(array)
    return array.nbytes if buffer is None else max(0, array.nbytes - buffer.in_files())


def grown(array: npt.NDArray[Scalar], more: AnyArray) -> npt.NDArray[Scalar]:
    """``array`` followed by the rows ``more``, in its memory where that has space that no other call took first.

    ``array`` keeps its rows and its length. Any number of threads may call this for the same array; the second copies.
    Rows that :func:`lengthened` put behind ``array`` are there already.
    """
    buffer = _owner(more)
    if isinstance(buffer, _Growable) and len(more) and _follows(buffer, array, more):
        return _first(buffer, len(array) + len(more))
    longer = lengthened(array, len(more))
    longer[len(array) :] = more
    return longer


def lengthened(
    array: npt.NDArray[Scalar], by: int, reserved: int | None = None, *, most: float = math.inf
) -> npt.NDArray[Scalar]:
    """``array`` and ``by`` more rows, not initialised, which only the caller may write; as :func:`grown`.

    reserved: how many of the new rows may be written at once, None for all; the others after :func:`reserve_rows`.

    Raises:
        StorageFullError: a copy is needed that would take more than ``most`` bytes of memory.
    """
    n, total = len(array), len(array) + by
    ready = total if reserved is None else n + reserved
    buffer = _growable_of(array)
    if buffer is not None and _taken(buffer, n, total, ready):
        return _first(buffer, total)
    remapped = None if buffer is None else _mapped_again(buffer, n, total, ready)
    longer = growable_like(array, total, ready, most=most) if remapped is None else remapped
    kept = 0 if remapped is None else _owner(longer).from_file
    copy_rows(array[kept:], longer[kept:])
    _owner(longer).copied = (weakref.ref(_owner(array)), n)
    return longer


def _mapped_again(buffer: _Growable, n: int, total: int, ready: int) -> npt.NDArray[Any] | None:
    """``total`` rows of another allocation, of which those of the file are mapped from there; None without such.

    Where the disk has no room for a spill, the rows that follow are in memory.
    """
    if buffer.source is None or not 0 < buffer.from_file <= n:
        return None
    (source, offset), rows = buffer.source, buffer.from_file
    for folder in (buffer.folder, None):
        try:
            first = mapped(source.file, offset, (rows, *buffer.shape[1:]), buffer.dtype.type, folder, total)
        except OSError:
            return None
        other = _owner(first)
        other.folder = buffer.folder
        if _taken(other, rows, total, ready):
            return _first(other, total)
    return None


def reserve_rows(array: AnyArray, low: int, high: int) -> bool:
    """Whether the rows ``low`` to ``high`` of an array that was made with fewer ``reserved`` may be written."""
    buffer, width = _growable_of(array), array.strides[0]
    return buffer is None or buffer.spill is None or buffer.spill.reserve(low * width, high * width)


def without_spill(array: npt.NDArray[Scalar], rows: int, base: AnyArray, most: float = math.inf) -> npt.NDArray[Scalar]:
    """``array`` with the first ``rows`` rows copied to memory, those of a file excepted, and space for the others.

    base: the array that was :func:`lengthened`; its rows come first.

    Raises:
        StorageFullError: that would take more than ``most`` bytes of memory.
    """
    buffer, longer = _owner(array), None
    if buffer.source is not None:
        (source, offset), first = buffer.source, buffer.from_file
        with suppress(OSError):
            longer = mapped(source.file, offset, (first, *array.shape[1:]), array.dtype.type, None, len(array))
            longer = lengthened(longer, len(array) - first)
    kept = 0 if longer is None else buffer.from_file
    longer = _within(growable(array.shape, array.dtype.type) if longer is None else longer, most)
    copy_rows(array[kept:rows], longer[kept:])
    _owner(longer).folder, _owner(longer).copied = buffer.folder, (weakref.ref(_owner(base)), len(base))
    return longer


def sealed_spill(array: AnyArray) -> Spill | None:
    """The spill that holds the last rows of ``array``, and nothing after them, for a snapshot to take over.

    No rows may follow from now on, until :meth:`.spill.Spill.give_back`. None where there is no such spill, other rows
    follow already, or it is that of a parent process.
    """
    buffer = _growable_of(array)
    if buffer is None or buffer.spill is None or not buffer.spill.may_become_a_snapshot:
        return None
    with buffer.lock:
        if buffer.used != len(array) or array.nbytes <= buffer.spill.start or buffer.spill.sealed:
            return None
        buffer.spill.sealed = True
    return buffer.spill


def copy_rows(source: AnyArray, out: AnyArray, rows: IntArray | None = None) -> None:
    """Copy ``source``, or its ``rows``, to the first rows of ``out``, a piece at a time."""
    n = len(source) if rows is None else len(rows)
    step = max(1, _COPIED_BYTES // max(1, source.strides[0] if len(source) else 1))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        out[part] = source[part if rows is None else rows[part]]


def _with_spare(rows: int) -> int:
    return rows + max(_LEAST, rows // _SHARE)


def _lay_over(region: mmap.mmap, start: int, file: int, offset: int, size: int, *, shared: bool = False) -> None:
    """Put ``size`` bytes of a file in place of those of ``region`` from ``start`` on; the region's end unmaps both."""
    library = ctypes.CDLL(None, use_errno=True)
    place = library.mmap
    place.restype = ctypes.c_void_p
    place.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    address = ctypes.addressof(ctypes.c_char.from_buffer(region)) + start
    flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | _MAP_FIXED | _MAP_NORESERVE
    if place(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _follows(buffer: _Growable, array: AnyArray, more: AnyArray) -> bool:
    """Whether the rows ``more`` lie in ``buffer`` right behind those of ``array``, or behind the copy made of them."""
    same = more.dtype == array.dtype == buffer.dtype and more.shape[1:] == array.shape[1:] == buffer.shape[1:]
    if not (same and more.flags.c_contiguous and more.ctypes.data == buffer.ctypes.data + array.nbytes):
        return False
    if _growable_of(array) is buffer:
        return True
    return buffer.copied is not None and buffer.copied[0]() is _owner(array) and buffer.copied[1] == len(array)


def _first(buffer: _Growable, rows: int) -> npt.NDArray[Any]:
    view: npt.NDArray[Any] = buffer[:rows].view(np.ndarray)
    return view


def _taken(buffer: _Growable, n: int, total: int, ready: int) -> bool:
    """Take the rows ``n`` to ``total``, unless they are taken or beyond the end, and reserve those up to ``ready``."""
    spill, width = buffer.spill, buffer.strides[0]
    with buffer.lock:
        if buffer.used != n or total > len(buffer):
            return False
        if spill is not None and (spill.sealed or not spill.reserve(n * width, ready * width)):
            return False
        buffer.used = total
        return True


def _growable_of(array: AnyArray) -> _Growable | None:
    """The allocation whose first rows ``array`` is."""
    owner = _owner(array)
    if not isinstance(owner, _Growable):
        return None
    same = array.dtype == owner.dtype and array.shape[1:] == owner.shape[1:] and array.flags.c_contiguous
    return owner if same and array.ctypes.data == owner.ctypes.data else None


def _owner(array: AnyArray) -> Any:
    """The array whose memory ``array`` views; ``array`` itself where it is no view."""
    owner: Any = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner


CHECKED_BYTES = 8192
"""Most bytes of rows that share a checksum, unless one row is longer. Larger blocks cost the first searches more time,
since each of their rows lies in another block; smaller ones more calls when all are compared. From 5 KiB on zlib lets
other threads run meanwhile."""
_STEP_BYTES = 6 << 20
"""Compared between two pauses."""


def rows_per_checksum(dim: int) -> int:
    """How many rows of float32 (dim,) share a checksum in a snapshot that is written now."""
    return max(1, CHECKED_BYTES // (4 * max(1, dim)))


def checksums_of(vectors: AnyArray) -> npt.NDArray[np.uint32]:
    """The CRC-32 of each block of rows of float32 (n, dim), C-contiguous: uint32 (blocks,)."""
    size = rows_per_checksum(vectors.shape[1])
    blocks = range(0, len(vectors), size)
    return np.fromiter((zlib.crc32(vectors[at : at + size].data) for at in blocks), np.uint32, len(blocks))


class _Unchecked:
    """Blocks of ``size`` rows of a file whose checksums were not compared yet. Threads may check at the same time."""

    def __init__(self, vectors: FloatArray, checksums: npt.NDArray[np.uint32], size: int) -> None:
        self._vectors, self._checksums, self._size = vectors, checksums, size
        self._held = np.zeros(len(checksums), np.bool_)

    def check(self, positions: IntArray) -> None:
        """Compare the blocks of ``positions``, int64 of any shape; -1 and rows after the file's are passed over."""
        blocks = positions[(positions >= 0) & (positions < len(self._vectors))] // self._size
        self._compare(np.unique(blocks[~self._held[blocks]]))

    def check_all(self, pause: Callable[[], None] | None = None) -> None:
        """Compare every block that was not compared; call ``pause`` after every few of them."""
        blocks = np.flatnonzero(~self._held)
        step = max(1, _STEP_BYTES // max(1, self._size * self._vectors.strides[0]))
        for start in range(0, len(blocks), step):
            self._compare(blocks[start : start + step])
            if pause is not None:
                pause()

    def _compare(self, blocks: IntArray) -> None:
        raw, size, end = self._vectors.reshape(-1).view(np.uint8).data, self._size, len(self._vectors)
        width, crc = self._vectors.strides[0], zlib.crc32
        for block, expected in zip(blocks.tolist(), self._checksums[blocks].tolist(), strict=True):
            if crc(raw[block * size * width : (block + 1) * size * width]) != expected:
                at = block * size
                raise DamagedVectorsError(f"vectors {at} to {min(at + size, end)} of the snapshot fail their checksum")
        self._held[blocks] = True


class DamagedVectorsError(EngineError):
    """Vectors mapped from a file do not have the checksum with which they were written."""


class VectorTable:
    """n vectors of one dimension as they were given, float32.

    Those of a file that was just opened are compared with its checksums when they are first used; every call below
    raises DamagedVectorsError where they differ.
    """

    def __init__(
        self, vectors: FloatArray, metric: Metric, owner: object = None, unchecked: _Unchecked | None = None
    ) -> None:
        """``vectors`` float32 (n, dim), C-contiguous; ``owner``: an object to keep alive: it holds their memory."""
        self.n, self.dim = int(vectors.shape[0]), int(vectors.shape[1])
        self.metric: Metric = metric
        self.vectors = vectors
        self._owner = owner
        self._unchecked = unchecked

    def check_with(self, checksums: AnyArray, size: int) -> None:
        """Compare the rows with ``checksums`` (see :func:`checksums_of`), one for ``size`` rows each, before they are
        used.

        Raises:
            EngineError: there are more or fewer checksums than blocks of rows.
        """
        if checksums.dtype != np.uint32 or size < 1 or checksums.shape != (-(-self.n // size),):
            raise EngineError(f"{checksums.shape} checksums for {self.n} vectors; rebuild the index")
        self._unchecked = _Unchecked(self.vectors, checksums.view(np.uint32), min(size, max(1, self.n)))
        if self._owner is not None:  # an engine reads them too
            self.check()

    @property
    def is_checked(self) -> bool:
        """Whether every row of a file was compared with its checksum."""
        return self._unchecked is None

    def check(self, pause: Callable[[], None] | None = None) -> None:
        """Compare all rows that were not compared yet; ``pause`` is called after every few of them."""
        if (unchecked := self._unchecked) is not None:  # another thread may set it to None at any time
            unchecked.check_all(pause)
            self._unchecked = None

    def _check_rows(self, positions: IntArray | slice) -> None:
        """Compare the rows at these positions that were not compared yet."""
        if (unchecked := self._unchecked) is not None:
            unchecked.check(np.arange(self.n)[positions] if isinstance(positions, slice) else positions)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, wherever they are."""
        return self.vectors.nbytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the rows that take memory: those that are not mapped from a file."""
        return in_memory(self.vectors)

    def moved_to(self, vectors: FloatArray) -> None:
        """Read the rows from ``vectors``, which hold the same, from now on; searches that run go on as they are.

        Rows that an engine holds stay with it.
        """
        if self._owner is None:
            self.vectors = vectors

    def gather(self, positions: IntArray | slice) -> FloatArray:
        """The vectors at ``positions`` (m,), as float32 (m, dim), C-contiguous; a slice may give a view."""
        self._check_rows(positions)
        return self.vectors[positions]

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """What :func:`table_from` needs to make this table again."""
        self.check()
        return {"vectors": self.vectors}

    def extended(self, vectors: FloatArray) -> VectorTable:
        """A table of these rows followed by float32 (m, dim); it shares memory where there is capacity (see
        :mod:`.vector_table`)."""
        return VectorTable(grown(self.vectors, vectors), self.metric, unchecked=self._unchecked)

    def scan(self, queries: FloatArray, k: int, row_filter: RowFilter | None = None) -> tuple[FloatArray, IntArray]:
        """Exact search over all allowed rows; shapes as in :func:`~.exact_scan.exact_scan`."""
        if row_filter is None:
            self.check()
            return scan_many(queries, self.vectors, k, self.metric)
        self._check_rows(row_filter.positions)
        return exact_scan(queries, self.vectors, k, self.metric, row_filter)

    def rerank(self, queries: FloatArray, candidates: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The k nearest of each query's candidates (nq, r); a row of candidates ends at its first -1."""
        self._check_rows(candidates)
        return rerank_rows(queries, self.vectors, candidates, k, self.metric)

    def distances(self, queries: FloatArray, rows: IntArray) -> FloatArray:
        """The distances of each query's own ``rows`` int64 (nq, r), in their order: float32 (nq, r), +inf for -1."""
        self._check_rows(rows)
        return distances_by_row(queries, self.vectors, rows, self.metric)


def table_from(arrays: dict[str, npt.NDArray[np.generic]], metric: Metric) -> VectorTable:
    """Make a table from what :meth:`VectorTable.arrays` returned.

    Raises:
        EngineError: the vectors are missing or not float32 (n, dim).
    """
    vectors = arrays.get("vectors")
    if vectors is None or vectors.ndim != 2 or vectors.dtype != np.float32 or not vectors.flags.c_contiguous:
        raise EngineError("vectors are missing or not a C-contiguous float32 matrix; rebuild the index")
    return VectorTable(vectors.view(np.float32), metric)
