"""The vectors that decide: a table in float32, float16 or int8 that answers exact distances to what it holds.

float32 is exact. float16 keeps 11 significant bits: a relative error of at most 2**-11 in each component (absolute
2**-25 below 6.1e-5), refused above 65504. int8 rounds each row in steps of max|x| / 127 and gives the result the length
of the row, so that cosine and squared distance pay for the rounding once: a row is off by sqrt(dim) steps at the most.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..types import FloatArray, IntArray, Metric, Precision
from .allowed import Allowed
from .faiss_door import load_faiss, translated
from .growing import grown, roomy
from .scan import exact_scan, finished, padded, rerank_rows
from .scan_many import scan_many

__all__ = ["Float16Table", "Float32Table", "Int8Table", "VectorTable", "make_table", "merge_best", "table_from"]

_BLOCK_ROWS = 512
"""Widened rows stay in the second-level cache."""
_CHECK_ROWS = 8192
_FLOAT16_MAX = 65504.0
_FLOAT16_NORMAL = 2.0**-14
_FEW = 128
"""Below one allowed row in so many, fetching them beats asking the selector about every row (measured)."""


class VectorTable(ABC):
    """n vectors of one dimension, read-only."""

    precision: ClassVar[Precision]

    def __init__(self, n: int, dim: int, metric: Metric) -> None:
        self.n, self.dim = n, dim
        self.metric: Metric = metric

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def gather(self, positions: IntArray | slice) -> FloatArray:
        """The vectors at ``positions`` (m,), as float32 (m, dim), C-contiguous; a slice may give a view."""

    @abstractmethod
    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """What :func:`table_from` needs to make this table again."""

    def extended(self, vectors: FloatArray) -> VectorTable | None:  # noqa: ARG002 - for those who can
        """A table of these rows followed by float32 (m, dim); it shares memory where there is room (see
        :mod:`.growing`). None where this precision cannot hold the new ones."""
        return None

    def scan(self, queries: FloatArray, k: int, allowed: Allowed | None = None) -> tuple[FloatArray, IntArray]:
        """Exact search over all allowed rows; shapes as in :func:`~.scan.exact_scan`."""
        best = padded(queries.shape[0], k)
        for start, where in self._blocks(allowed):
            distances, found = exact_scan(queries, self.gather(where), k, self.metric)
            rows = found + start if isinstance(where, slice) else where[found]
            best = merge_best(best, (distances, np.where(found < 0, -1, rows)), k)
        return best

    def rerank(self, queries: FloatArray, candidates: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The k nearest of each query's candidates (nq, r); a row of candidates ends at its first -1."""
        distances, positions = padded(queries.shape[0], k)
        for row, own in enumerate(candidates):
            mine = own[own >= 0]
            if mine.size:
                near, at = exact_scan(queries[row : row + 1], self.gather(mine), k, self.metric)
                distances[row], positions[row] = near[0], np.where(at[0] < 0, -1, mine[at[0]])
        return distances, positions

    def _blocks(self, allowed: Allowed | None) -> Iterator[tuple[int, IntArray | slice]]:
        if allowed is None:
            for start in range(0, self.n, _BLOCK_ROWS):
                yield start, slice(start, min(start + _BLOCK_ROWS, self.n))
        else:
            for start in range(0, allowed.count, _BLOCK_ROWS):
                yield start, allowed.positions[start : start + _BLOCK_ROWS]


class Float32Table(VectorTable):
    """Vectors as they were given."""

    precision: ClassVar[Precision] = "float32"

    def __init__(self, vectors: FloatArray, metric: Metric, owner: object = None) -> None:
        """``vectors`` float32 (n, dim), C-contiguous; ``owner`` keeps alive whoever holds their memory."""
        super().__init__(vectors.shape[0], vectors.shape[1], metric)
        self.vectors = vectors
        self._owner = owner

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def gather(self, positions: IntArray | slice) -> FloatArray:
        return self.vectors[positions]

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"vectors": self.vectors}

    def extended(self, vectors: FloatArray) -> Float32Table:
        return Float32Table(grown(self.vectors, vectors), self.metric)

    def scan(self, queries: FloatArray, k: int, allowed: Allowed | None = None) -> tuple[FloatArray, IntArray]:
        if allowed is None:
            return scan_many(queries, self.vectors, k, self.metric)
        return exact_scan(queries, self.vectors, k, self.metric, allowed)

    def rerank(self, queries: FloatArray, candidates: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        return rerank_rows(queries, self.vectors, candidates, k, self.metric)


class Float16Table(VectorTable):
    """Vectors in half the memory, held by numpy and scanned by faiss where they lie."""

    precision: ClassVar[Precision] = "float16"

    def __init__(self, halves: npt.NDArray[np.float16], metric: Metric) -> None:
        super().__init__(halves.shape[0], halves.shape[1], metric)
        faiss = load_faiss()
        with translated("storing float16 vectors"):
            self._storage: Any = faiss.IndexScalarQuantizer(
                self.dim,
                faiss.ScalarQuantizer.QT_fp16,
                faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT,
            )
            self.halves = _lent(faiss, self._storage, halves) if self.n else halves

    @property
    def nbytes(self) -> int:
        return self.halves.nbytes

    def gather(self, positions: IntArray | slice) -> FloatArray:
        return _widened(self.halves[positions])

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"vectors": self.halves}

    def extended(self, vectors: FloatArray) -> Float16Table | None:
        if not _fits_float16(vectors):
            return None
        return Float16Table(grown(self.halves, vectors.astype(np.float16)), self.metric)

    def scan(self, queries: FloatArray, k: int, allowed: Allowed | None = None) -> tuple[FloatArray, IntArray]:
        count = self.n if allowed is None else allowed.count
        if count * _FEW < self.n:
            return super().scan(queries, k, allowed)
        faiss, nq = load_faiss(), len(queries)
        found = min(k, count)
        distances, positions = np.empty((nq, found), np.float32), np.empty((nq, found), np.int64)
        selector = None if allowed is None else allowed.bitmap(faiss)
        ptr = faiss.swig_ptr
        with translated("scanning float16 vectors"):
            parameters = faiss.SearchParameters()
            parameters.sel = selector
            self._storage.search_c(nq, ptr(queries), found, ptr(distances), ptr(positions), parameters)
        return finished(distances, positions, k, self.metric)


class Int8Table(VectorTable):
    """Vectors in a quarter of the memory, each row with its own scale."""

    precision: ClassVar[Precision] = "int8"

    def __init__(self, rows: npt.NDArray[np.int8], scales: FloatArray, metric: Metric) -> None:
        """``rows`` int8 (n, dim) and ``scales`` float32 (n,): a vector is its row times its scale."""
        super().__init__(rows.shape[0], rows.shape[1], metric)
        self.rows = rows
        self.scales = scales

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.scales.nbytes

    def gather(self, positions: IntArray | slice) -> FloatArray:
        vectors: FloatArray = np.multiply(self.rows[positions], self.scales[positions, None], dtype=np.float32)
        return vectors

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"vectors": self.rows, "scales": self.scales}

    def extended(self, vectors: FloatArray) -> Int8Table:
        more = _int8_table(vectors, self.metric)
        return Int8Table(grown(self.rows, more.rows), grown(self.scales, more.scales), self.metric)


def make_table(vectors: FloatArray, precision: Precision, metric: Metric) -> VectorTable:
    """Store float32 (n, dim) vectors in ``precision``; float16 falls back to int8 where its range is left."""
    if precision == "float32":
        return Float32Table(np.ascontiguousarray(vectors), metric)
    if precision == "float16" and _fits_float16(vectors):
        halves = roomy(vectors.shape, np.float16)
        halves[:] = vectors
        return Float16Table(halves, metric)
    return _int8_table(vectors, metric)


def table_from(precision: Precision, arrays: dict[str, npt.NDArray[np.generic]], metric: Metric) -> VectorTable:
    """Make a table from what :meth:`VectorTable.arrays` returned.

    Raises:
        EngineError: arrays are missing, of another dtype, or do not fit each other.
    """
    vectors, scales = arrays.get("vectors"), arrays.get("scales")
    if vectors is None or vectors.ndim != 2 or not vectors.flags.c_contiguous:
        raise EngineError("vectors are missing or not a C-contiguous matrix; rebuild the index")
    if precision == "float32" and vectors.dtype == np.float32:
        return Float32Table(vectors.astype(np.float32, copy=False), metric)
    if precision == "float16" and vectors.dtype == np.float16:
        return Float16Table(vectors.astype(np.float16, copy=False), metric)
    if precision == "int8" and vectors.dtype == np.int8 and scales is not None and scales.shape == vectors.shape[:1]:
        return Int8Table(vectors.astype(np.int8, copy=False), scales.astype(np.float32, copy=False), metric)
    raise EngineError(f"vectors of dtype {vectors.dtype} do not match precision {precision!r}; rebuild the index")


def merge_best(
    left: tuple[FloatArray, IntArray], right: tuple[FloatArray, IntArray], k: int
) -> tuple[FloatArray, IntArray]:
    """The k nearest of two results of the same queries; each (nq, any), ascending, padded with +inf and -1."""
    distances = np.concatenate((left[0], right[0]), axis=1)
    positions = np.concatenate((left[1], right[1]), axis=1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(positions, order, axis=1)


def _lent(faiss: Any, storage: Any, halves: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Let ``storage`` search ``halves`` (n, dim) in place; where faiss is too old for that it takes a copy, and the
    view of that copy is returned."""
    n, dim = halves.shape
    raw = halves.view(np.uint8)
    if hasattr(faiss, "MaybeOwnedVectorUInt8") and hasattr(storage.codes, "owner"):
        lend = faiss.MaybeOwnedVectorUInt8.create_view
        storage.codes = lend(faiss.swig_ptr(raw), raw.nbytes, storage.codes.owner)
        storage.ntotal = n
        return halves
    storage.add_sa_codes(raw)
    held: npt.NDArray[np.uint8] = faiss.rev_swig_ptr(storage.codes.data(), storage.codes.size())
    return held.view(np.float16).reshape(n, dim)


def _widened(halves: npt.NDArray[np.float16]) -> FloatArray:
    """float16 to float32, exactly, several times faster than ``astype``: the bits are shifted into place and the
    exponent's bias is corrected by a multiplication (15 to 127: times 2**112). Infinities and NaN do not occur.
    """
    bits = halves.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70000001)
    vectors = bits.view(np.float32)
    vectors *= np.float32(2.0**112)
    return vectors


def _fits_float16(vectors: FloatArray) -> bool:
    """Whether float16 can hold the vectors: nothing above 65504, and no row whose largest component is subnormal."""
    for start in range(0, len(vectors), _CHECK_ROWS):
        largest = np.abs(vectors[start : start + _CHECK_ROWS]).max(axis=1, initial=0.0)
        if (largest > _FLOAT16_MAX).any() or ((largest < _FLOAT16_NORMAL) & (largest > 0)).any():
            return False
    return True


def _int8_table(vectors: FloatArray, metric: Metric) -> Int8Table:
    scales = roomy((len(vectors),), np.float32)
    rows = roomy(vectors.shape, np.int8)
    for start in range(0, len(vectors), _CHECK_ROWS):
        block = vectors[start : start + _CHECK_ROWS]
        largest = np.abs(block).max(axis=1, initial=0.0)
        step = np.where(largest > 0, largest / np.float32(127), np.float32(1))
        rounded = np.rint(block / step[:, None])
        rows[start : start + len(block)] = rounded
        lengths, kept = np.linalg.norm(block / step[:, None], axis=1), np.linalg.norm(rounded, axis=1)
        scales[start : start + len(block)] = step * np.where(kept > 0, lengths / np.maximum(kept, 1), 1)
    return Int8Table(rows, scales, metric)
