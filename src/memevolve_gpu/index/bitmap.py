"""Row filters of an index: which rows a search may return."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt

from ..types import AnyArray, FaissObject, IntArray


class RowFilter:
    """A mask over the n rows of an index.

    ``rows`` is bool (n,) and must not change afterwards; ``count`` is the number of rows that may be returned.
    Safe to share between threads: what is derived from the mask is computed once and never changes.
    """

    __slots__ = ("_packed", "_positions", "count", "n", "rows")

    def __init__(self, rows: npt.NDArray[np.bool_]) -> None:
        if rows.dtype != np.bool_ or rows.ndim != 1:
            raise ValueError(f"rows must be bool (n,), got {rows.dtype} {rows.shape}")
        self.rows = rows
        self.n = int(rows.shape[0])
        self.count = int(np.count_nonzero(rows))
        self._packed: npt.NDArray[np.uint8] | None = None
        self._positions: IntArray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the mask."""
        return self.n

    def test(self, positions: IntArray) -> npt.NDArray[np.bool_]:
        """Which of ``positions`` (int64, any shape) may be returned; -1 is never allowed."""
        if self.n == 0:
            return np.zeros(positions.shape, dtype=np.bool_)
        hits: npt.NDArray[np.bool_] = self.rows.take(positions, mode="wrap")
        hits &= positions >= 0
        return hits

    def part(self, start: int, end: int) -> RowFilter:
        """The filter of the rows from ``start`` to ``end`` (exclusive) alone."""
        return RowFilter(self.rows[start:end])

    def dead_since(self, other: RowFilter | None) -> IntArray | None:  # noqa: ARG002 - for masks that know
        """The rows that ``other`` (None: all n) allows and this mask does not, int64 (m,) in any order, where this one
        allows no others and that is known without a look at every row; None where it is not."""
        return None

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """The mask as a bitmap, uint8 (ceil(n / 8),), lowest bit first."""
        if self._packed is None:
            self._packed = np.packbits(self.rows, bitorder="little")
        return self._packed

    @property
    def positions(self) -> IntArray:
        """The allowed rows, int64 (count,), ascending."""
        if self._positions is None:
            self._positions = np.flatnonzero(self.rows).astype(np.int64, copy=False)
        return self._positions

    def bitmap(self, faiss: ModuleType) -> FaissObject:
        """A selector that faiss tests row by row."""
        packed = self.packed
        return _holding(faiss.IDSelectorBitmap(self.n, faiss.swig_ptr(packed)), packed)


class RowList(RowFilter):
    """A filter that allows few of the n rows: it holds their positions, and makes the mask only when it is needed.

    ``positions`` is int64 (count,), ascending, and must not change afterwards.
    """

    def __init__(self, n: int, positions: IntArray) -> None:
        self.n = n
        self.count = len(positions)
        self._packed = None
        self._positions = positions

    @property
    def nbytes(self) -> int:
        """Bytes of the positions."""
        return self.positions.nbytes

    @property
    def rows(self) -> npt.NDArray[np.bool_]:  # type: ignore[override]
        """The mask, made at each access."""
        rows = np.zeros(self.n, dtype=np.bool_)
        rows[self._positions] = True
        return rows

    def test(self, positions: IntArray) -> npt.NDArray[np.bool_]:
        """As in :class:`RowFilter`."""
        held = self.positions
        if not len(held):
            return np.zeros(positions.shape, dtype=np.bool_)
        at = np.minimum(np.searchsorted(held, positions), len(held) - 1)
        found: npt.NDArray[np.bool_] = held[at] == positions
        return found

    def part(self, start: int, end: int) -> RowFilter:
        """As in :class:`RowFilter`."""
        low, high = np.searchsorted(self.positions, [start, end]).tolist()
        return RowList(end - start, self.positions[low:high] - start)


def _holding(selector: FaissObject, memory: AnyArray) -> FaissObject:
    """The selector, which keeps the memory that it points to: of two threads that derive it at once, one sees its own
    copy replaced, and freed, while its search is on.
    """
    selector.memory = memory
    return selector
