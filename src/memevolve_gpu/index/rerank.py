"""The vectors that decide: float32 rows, in memory or mapped from a file, of which a search reads what it needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..types import FloatArray, IntArray, Metric
from .allowed import Allowed
from .growing import grown, in_memory
from .scan import exact_scan, rerank_rows
from .scan_many import scan_many

__all__ = ["VectorTable", "merge_best", "table_from"]


class VectorTable:
    """n vectors of one dimension as they were given, float32."""

    def __init__(self, vectors: FloatArray, metric: Metric, owner: object = None) -> None:
        """``vectors`` float32 (n, dim), C-contiguous; ``owner`` keeps alive whoever holds their memory."""
        self.n, self.dim = int(vectors.shape[0]), int(vectors.shape[1])
        self.metric: Metric = metric
        self.vectors = vectors
        self._owner = owner

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
        return self.vectors[positions]

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """What :func:`table_from` needs to make this table again."""
        return {"vectors": self.vectors}

    def extended(self, vectors: FloatArray) -> VectorTable:
        """A table of these rows followed by float32 (m, dim); it shares memory where there is room (see
        :mod:`.growing`)."""
        return VectorTable(grown(self.vectors, vectors), self.metric)

    def scan(self, queries: FloatArray, k: int, allowed: Allowed | None = None) -> tuple[FloatArray, IntArray]:
        """Exact search over all allowed rows; shapes as in :func:`~.scan.exact_scan`."""
        if allowed is None:
            return scan_many(queries, self.vectors, k, self.metric)
        return exact_scan(queries, self.vectors, k, self.metric, allowed)

    def rerank(self, queries: FloatArray, candidates: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The k nearest of each query's candidates (nq, r); a row of candidates ends at its first -1."""
        return rerank_rows(queries, self.vectors, candidates, k, self.metric)


def table_from(arrays: dict[str, npt.NDArray[np.generic]], metric: Metric) -> VectorTable:
    """Make a table from what :meth:`VectorTable.arrays` returned.

    Raises:
        EngineError: the vectors are missing or not float32 (n, dim).
    """
    vectors = arrays.get("vectors")
    if vectors is None or vectors.ndim != 2 or vectors.dtype != np.float32 or not vectors.flags.c_contiguous:
        raise EngineError("vectors are missing or not a C-contiguous float32 matrix; rebuild the index")
    return VectorTable(vectors.view(np.float32), metric)


def merge_best(
    left: tuple[FloatArray, IntArray], right: tuple[FloatArray, IntArray], k: int
) -> tuple[FloatArray, IntArray]:
    """The k nearest of two results of the same queries; each (nq, any), ascending, padded with +inf and -1."""
    distances = np.concatenate((left[0], right[0]), axis=1)
    positions = np.concatenate((left[1], right[1]), axis=1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(positions, order, axis=1)
