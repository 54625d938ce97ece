"""The delta buffer: an append-only buffer of rows that no index contains yet; it is searched exactly.

Rows are stored in chunks that never move or shrink, so a reader that knows how many rows its view may see needs no
lock. Dead rows stay: ``died`` holds the log entry of a row's death, and a view at watermark w sees rows with
``died > w``.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..index.vector_table import copy_rows, growable, in_memory
from ..types import FloatArray, IntArray
from .namespaces import DEFAULT

NEVER = np.iinfo(np.int64).max
"""``died`` of a live row."""

SMALLEST_CHUNK, SMALLEST_BYTES = 2048, 8 << 20
"""Rows of the smallest chunk, and bytes of its vectors at most: as many rows as wait between two appends to a small
index. Each chunk is a call of its own in a search, around which other threads take Python's lock."""
LARGEST_CHUNK = 65_536


def row_bytes(dim: int) -> int:
    """About as many bytes as one row takes: vector, slot, death, namespace, and an id of 36 bytes, as uuid makes."""
    return 4 * dim + _FIXED_BYTES + 36


_FIXED_BYTES = 8 + 8 + 4 + 4 + 8
"""Slot, death, namespace, position in the namespace, and end of the id."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Space for ``len(slots)`` rows from delta position ``start`` on.

    slots int64 (c,), died int64 (c,), vectors float32 (c, dim).
    """

    start: int
    slots: IntArray
    died: IntArray
    vectors: FloatArray
    spilled: bool = False
    """Whether the vectors lie in a spill."""

    @property
    def end(self) -> int:
        return self.start + len(self.slots)


class DeltaBuffer:
    """Rows in slot order. One writer at a time (the caller's mutex), any number of readers below ``n``.

    The vectors of large chunks lie in a spill in ``folder`` (see :mod:`~memevolve_gpu.index.vector_table`), if any.
    """

    def __init__(self, dim: int, folder: Path | None = None) -> None:
        self.dim = dim
        self.folder = folder
        self.n = 0
        self._id_bytes, self._id_ends = bytearray(), array("q")
        """The ids in UTF-8, one behind the other, and where each ends."""
        self.namespaces = array("i")
        """The key of each row's namespace."""
        self._groups: dict[int, array[int]] = {}
        """The positions of the rows of each namespace, ascending."""
        self._chunks: list[Chunk] = []

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the rows in use."""
        return self.n * (4 * self.dim + _FIXED_BYTES) + len(self._id_bytes) - self.spilled * 4 * self.dim

    @property
    def spilled(self) -> int:
        """How many rows have their vectors in a spill, which a forked child shares with its parent."""
        return sum(max(0, min(self.n, chunk.end) - chunk.start) for chunk in self._chunks if chunk.spilled)

    def extend(
        self, slots: Sequence[int], ids: Sequence[str], vectors: FloatArray, namespaces: Sequence[int] | None = None
    ) -> None:
        """Append m rows: slots ascending and above all before, vectors float32 (m, dim); namespaces: their keys."""
        done, m = 0, len(slots)
        while done < m:
            chunk = self._free_chunk()
            low = self.n - chunk.start
            high = min(low + m - done, len(chunk.slots))
            upto = done + high - low
            chunk.slots[low:high] = slots[done:upto]
            chunk.died[low:high] = NEVER
            chunk.vectors[low:high] = vectors[done:upto]
            encoded, end = [one.encode() for one in ids[done:upto]], len(self._id_bytes)
            self._id_bytes += b"".join(encoded)
            self._id_ends.extend(end + more for more in accumulate(map(len, encoded)))
            self.n += high - low
            done = upto
        self._group([DEFAULT] * m if namespaces is None else namespaces)

    def truncate(self, n: int) -> None:
        """Drop rows from position n on, half-done ones of an interrupted :meth:`extend` too; no published view may
        contain them."""
        kept = self._id_ends[n - 1] if n else 0
        if n == self.n == len(self.namespaces) == len(self._id_ends) and kept == len(self._id_bytes):
            return
        for key in set(self.namespaces[n:]) & self._groups.keys():
            group = self._groups[key]
            del group[bisect_left(group, n) :]
        del self._id_bytes[kept:], self._id_ends[n:], self.namespaces[n:]
        self.n = n

    def rows_of(self, keys: Sequence[int], end: int) -> IntArray:
        """Positions below ``end`` of the rows of these namespaces, int64 (m,), ascending."""
        groups = (self._groups.get(key) for key in keys)
        found = [np.array(group[: bisect_left(group, end)], np.int64) for group in groups if group]
        if len(found) == 1:
            return found[0]
        return np.sort(np.concatenate([np.empty(0, np.int64), *found]))

    def covered_by(self, keys: Sequence[int]) -> bool:
        """Whether every row is of one of these namespaces."""
        return len(self._groups) <= len(keys) and set(self._groups) <= set(keys)

    def position_of(self, slot: int) -> int:
        """Delta position of ``slot``; -1 where it is not in the delta buffer."""
        for chunk in reversed(self._chunks):
            used = min(self.n, chunk.end) - chunk.start
            if used > 0 and chunk.slots[0] <= slot:
                at = int(np.searchsorted(chunk.slots[:used], slot))
                return chunk.start + at if at < used and chunk.slots[at] == slot else -1
        return -1

    def mark_dead(self, position: int, seq: int) -> None:
        """Record that the row died with log entry ``seq``."""
        chunk = self._chunk_at(position)
        chunk.died[position - chunk.start] = seq

    def died_at(self, position: int) -> int:
        chunk = self._chunk_at(position)
        return int(chunk.died[position - chunk.start])

    def id_at(self, position: int) -> str:
        return self._id_bytes[self._id_ends[position - 1] if position else 0 : self._id_ends[position]].decode()

    def ids(self, start: int, end: int) -> tuple[npt.NDArray[np.uint8], IntArray]:
        """A copy of the ids from position ``start`` to ``end`` (exclusive): their UTF-8 bytes, and where each ends."""
        first, ends = self._id_ends[start - 1] if start else 0, np.array(self._id_ends[start:end], np.int64)
        last = int(ends[-1]) if len(ends) else first
        return np.frombuffer(bytes(self._id_bytes[first:last]), np.uint8), ends - first

    def slot_at(self, position: int) -> int:
        chunk = self._chunk_at(position)
        return int(chunk.slots[position - chunk.start])

    def pieces(self, start: int, end: int) -> Iterator[Chunk]:
        """The rows from position ``start`` to ``end`` (exclusive), as chunks that share the buffer's memory."""
        for chunk in self._chunks:
            low, high = max(start, chunk.start) - chunk.start, min(end, chunk.end) - chunk.start
            if low < high:
                yield Chunk(chunk.start + low, chunk.slots[low:high], chunk.died[low:high], chunk.vectors[low:high])

    def blocks(self, start: int, end: int) -> Iterator[FloatArray]:
        """The vectors of these rows, in arrays float32 (m, dim) that share the buffer's memory."""
        return (piece.vectors for piece in self.pieces(start, end))

    def share(self, start: int, vectors: FloatArray, *, in_file: bool) -> None:
        """Let the chunk at ``start`` read its rows from ``vectors``, if these are all of its rows, which they equal.

        Its own memory is free once no reader has it. Rows of a file stay in one. ``in_file``: whether vectors do.
        """
        for at, chunk in enumerate(self._chunks):
            if chunk.start == start and len(chunk.slots) == len(vectors) and in_file >= chunk.spilled:
                self._chunks[at] = replace(chunk, vectors=vectors, spilled=in_file)

    def rest(self, start: int, end: int) -> DeltaBuffer:
        """A delta buffer of the rows from position ``start`` to ``end`` (exclusive), for later views.

        It shares the memory of this one, which must not be written any more. Readers of older views are not affected:
        later rows are beyond their ``n``, and later deaths above their watermark. Only the chunk that contains
        ``start`` is copied, so that the rows before it can be freed. Space that no row uses is not taken over.
        """
        other = DeltaBuffer(self.dim, self.folder)
        other.n = end - start
        id_bytes, id_ends = self.ids(start, end)
        other._id_bytes, other._id_ends = bytearray(id_bytes), array("q", id_ends.tobytes())
        other._group(self.namespaces[start:end])
        for chunk in self._chunks:
            if start <= chunk.start < end:
                other._chunks.append(replace(chunk, start=chunk.start - start))
            elif chunk.start < start < min(chunk.end, end):
                low = start - chunk.start
                vectors = growable((len(chunk.slots) - low, self.dim), np.float32, self.folder)
                copy_rows(chunk.vectors[low : end - chunk.start], vectors)
                slots, died = chunk.slots[low:].copy(), chunk.died[low:].copy()
                other._chunks.append(Chunk(0, slots, died, vectors, not in_memory(vectors)))
        return other

    def copy(self, end: int) -> DeltaBuffer:
        """A copy of the rows up to position ``end``."""
        other = DeltaBuffer(self.dim, self.folder)
        for piece in self.pieces(0, end):
            part = slice(piece.start, piece.end)
            ids = [self.id_at(position) for position in range(piece.start, piece.end)]
            other.extend(piece.slots.tolist(), ids, piece.vectors, self.namespaces[part])
        for chunk in other._chunks:
            for piece in self.pieces(chunk.start, min(chunk.end, end)):
                low = piece.start - chunk.start
                chunk.died[low : low + len(piece.died)] = piece.died
        return other

    def _group(self, namespaces: Sequence[int]) -> None:
        """Enter the namespaces of the newest rows."""
        first = len(self.namespaces)
        self.namespaces.extend(namespaces)
        for at, key in enumerate(namespaces, first):
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = array("i")
            group.append(at)

    def _chunk_at(self, position: int) -> Chunk:
        return next(chunk for chunk in reversed(self._chunks) if chunk.start <= position)

    def _free_chunk(self) -> Chunk:
        for chunk in reversed(self._chunks):
            if chunk.start <= self.n < chunk.end:
                return chunk
        least = min(SMALLEST_CHUNK, max(1, SMALLEST_BYTES // (4 * self.dim)))
        size = min(LARGEST_CHUNK, max(least, self.n))
        vectors = growable((size, self.dim), np.float32, self.folder)
        chunk = Chunk(
            start=self.n,
            slots=np.empty(size, dtype=np.int64),
            died=np.full(size, NEVER, dtype=np.int64),
            vectors=vectors,
            spilled=not in_memory(vectors),
        )
        self._chunks.append(chunk)
        return chunk
