"""The vectors that decide: a table in float32, float16 or int8 that answers exact distances to what it holds.

float32 is exact. float16 keeps 11 significant bits: a relative error of at most 2**-11 in each component (absolute
2**-25 below 6.1e-5), refused above 65504. int8 scales each row by max|x| / 127: an absolute error of at most
max|x| / 254 in each component of that row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..types import FloatArray, IntArray, Metric, Precision
from .allowed import Allowed
from .scan import exact_scan, padded, rerank_rows

__all__ = [
    "Float16Table",
    "Float32Table",
    "Int8Table",
    "VectorTable",
    "fits_float16",
    "make_table",
    "merge_best",
    "table_from",
]

_SCRATCH_BYTES = 64 << 20
_BLOCK_ROWS = 4096
_FLOAT16_MAX = 65504.0
_FLOAT16_NORMAL = 6.1035e-05


class VectorTable(ABC):
    """n vectors of one dimension, read-only."""

    precision: ClassVar[Precision]

    n: int
    dim: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def gather(self, positions: IntArray) -> FloatArray:
        """The vectors at ``positions`` (m,), as float32 (m, dim)."""

    @abstractmethod
    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """What :func:`table_from` needs to make this table again."""

    @abstractmethod
    def block(self, start: int, stop: int) -> FloatArray:
        """Rows start to stop as float32, C-contiguous; a view where that costs nothing."""

    def scan(
        self, queries: FloatArray, k: int, metric: Metric, allowed: Allowed | None = None
    ) -> tuple[FloatArray, IntArray]:
        """Exact search over all allowed rows; shapes as in :func:`~.scan.exact_scan`."""
        best = padded(queries.shape[0], k)
        for start, vectors, positions in self._blocks(allowed):
            distances, found = exact_scan(queries, vectors, k, metric)
            found = np.where(found < 0, -1, found + start if positions is None else positions[found])
            best = merge_best(best, (distances, found), k)
        return best

    def rerank(self, queries: FloatArray, candidates: IntArray, k: int, metric: Metric) -> tuple[FloatArray, IntArray]:
        """The k nearest of each query's candidates (nq, r); a row of candidates ends at its first -1."""
        distances, positions = padded(queries.shape[0], k)
        for row, own in enumerate(candidates):
            mine = own[own >= 0]
            if mine.size:
                near, at = exact_scan(queries[row : row + 1], self.gather(mine), k, metric)
                distances[row], positions[row] = near[0], np.where(at[0] < 0, -1, mine[at[0]])
        return distances, positions

    def _blocks(self, allowed: Allowed | None):  # type: ignore[no-untyped-def]
        if allowed is None:
            for start in range(0, self.n, _BLOCK_ROWS):
                yield start, self.block(start, min(start + _BLOCK_ROWS, self.n)), None
            return
        for start in range(0, allowed.count, _BLOCK_ROWS):
            positions = allowed.positions[start : start + _BLOCK_ROWS]
            yield start, self.gather(positions), positions


class Float32Table(VectorTable):
    """Vectors as they were given."""

    precision: ClassVar[Precision] = "float32"

    def __init__(self, vectors: FloatArray, owner: object = None) -> None:
        """``vectors`` float32 (n, dim), C-contiguous; ``owner`` keeps alive whoever holds their memory."""
        self.vectors = vectors
        self.n, self.dim = vectors.shape
        self._owner = owner

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def gather(self, positions: IntArray) -> FloatArray:
        return self.vectors[positions]

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"vectors": self.vectors}

    def block(self, start: int, stop: int) -> FloatArray:
        return self.vectors[start:stop]

    def scan(
        self, queries: FloatArray, k: int, metric: Metric, allowed: Allowed | None = None
    ) -> tuple[FloatArray, IntArray]:
        return exact_scan(queries, self.vectors, k, metric, allowed)

    def rerank(self, queries: FloatArray, candidates: IntArray, k: int, metric: Metric) -> tuple[FloatArray, IntArray]:
        return rerank_rows(queries, self.vectors, candidates, k, metric)


class Float16Table(VectorTable):
    """Vectors in half the memory."""

    precision: ClassVar[Precision] = "float16"

    def __init__(self, halves: npt.NDArray[np.float16]) -> None:
        self.halves = halves
        self.n, self.dim = halves.shape

    @property
    def nbytes(self) -> int:
        return self.halves.nbytes

    def gather(self, positions: IntArray) -> FloatArray:
        return self.halves[positions].astype(np.float32)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"vectors": self.halves}

    def block(self, start: int, stop: int) -> FloatArray:
        return self.halves[start:stop].astype(np.float32)


class Int8Table(VectorTable):
    """Vectors in a quarter of the memory, each row with its own scale."""

    precision: ClassVar[Precision] = "int8"

    def __init__(self, bytes_: npt.NDArray[np.int8], scales: FloatArray) -> None:
        self.bytes = bytes_
        self.scales = scales
        self.n, self.dim = bytes_.shape

    @property
    def nbytes(self) -> int:
        return self.bytes.nbytes + self.scales.nbytes

    def gather(self, positions: IntArray) -> FloatArray:
        rows: FloatArray = np.multiply(self.bytes[positions], self.scales[positions, None], dtype=np.float32)
        return rows

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"vectors": self.bytes, "scales": self.scales}

    def block(self, start: int, stop: int) -> FloatArray:
        rows: FloatArray = np.multiply(self.bytes[start:stop], self.scales[start:stop, None], dtype=np.float32)
        return rows


def fits_float16(vectors: FloatArray) -> bool:
    """Whether float16 can hold the vectors: nothing above 65504, and no row whose largest component is subnormal."""
    for start in range(0, len(vectors), _BLOCK_ROWS):
        largest = np.abs(vectors[start : start + _BLOCK_ROWS]).max(axis=1, initial=0.0)
        if (largest > _FLOAT16_MAX).any() or ((largest < _FLOAT16_NORMAL) & (largest > 0)).any():
            return False
    return True


def make_table(vectors: FloatArray, precision: Precision) -> VectorTable:
    """Store float32 (n, dim) vectors in ``precision``; float16 falls back to int8 where its range is left."""
    if precision == "float32":
        return Float32Table(np.ascontiguousarray(vectors))
    if precision == "float16" and fits_float16(vectors):
        return Float16Table(vectors.astype(np.float16))
    return _int8_table(vectors)


def table_from(precision: Precision, arrays: dict[str, npt.NDArray[np.generic]]) -> VectorTable:
    """Make a table from what :meth:`VectorTable.arrays` returned.

    Raises:
        EngineError: arrays are missing, of another dtype, or do not fit each other.
    """
    vectors = arrays.get("vectors")
    if vectors is None or vectors.ndim != 2 or not vectors.flags.c_contiguous:
        raise EngineError("vectors are missing or not a C-contiguous matrix; rebuild the index")
    if precision == "float32" and vectors.dtype == np.float32:
        return Float32Table(vectors.astype(np.float32, copy=False))
    if precision == "float16" and vectors.dtype == np.float16:
        return Float16Table(vectors.astype(np.float16, copy=False))
    scales = arrays.get("scales")
    if precision == "int8" and vectors.dtype == np.int8 and scales is not None and scales.shape == vectors.shape[:1]:
        return Int8Table(vectors.astype(np.int8, copy=False), scales.astype(np.float32, copy=False))
    raise EngineError(f"vectors of dtype {vectors.dtype} do not match precision {precision!r}; rebuild the index")


def merge_best(
    left: tuple[FloatArray, IntArray], right: tuple[FloatArray, IntArray], k: int
) -> tuple[FloatArray, IntArray]:
    """The k nearest of two results of the same queries; each (nq, any), ascending, padded with +inf and -1."""
    distances = np.concatenate((left[0], right[0]), axis=1)
    positions = np.concatenate((left[1], right[1]), axis=1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(positions, order, axis=1)


def _int8_table(vectors: FloatArray) -> Int8Table:
    scales = np.empty(len(vectors), np.float32)
    rows = np.empty(vectors.shape, np.int8)
    for start in range(0, len(vectors), _BLOCK_ROWS):
        block = vectors[start : start + _BLOCK_ROWS]
        largest = np.abs(block).max(axis=1, initial=0.0)
        scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
        scales[start : start + len(block)] = scale
        rows[start : start + len(block)] = np.rint(block / scale[:, None])
    return Int8Table(rows, scales)
