"""Helpers for faiss objects that several indexes share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from ..errors import EngineError
from ..types import FaissIndex, FaissObject, FloatArray, IntArray, Metric
from .base import Arrays, part
from .faiss_support import load_faiss, one_thread, translate_error
from .sample import POINTS_PER_CENTROID, padded_columns, padded_dim

_PIECE = 1 << 20


def metric_of(faiss: ModuleType, metric: Metric) -> int:
    """The faiss metric: unit vectors under cosine are ranked by their dot product."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def quiet(parameters: FaissObject, seed: int, rounds: int | None = None) -> None:
    """Set clustering parameters: seeded, bounded points a centroid, no warnings about few points; ``rounds`` of k-means
    if not as many as faiss makes by itself."""
    if rounds is not None:
        parameters.niter = rounds
    parameters.seed = seed & 0x7FFFFFFF
    parameters.min_points_per_centroid = 1
    parameters.max_points_per_centroid = POINTS_PER_CENTROID
    parameters.verbose = False


def searched(
    engine: FaissIndex, queries: FloatArray, k: int, doing: str, parameters: FaissObject = None
) -> tuple[FloatArray, IntArray]:
    """Faiss' own distances and positions, float32 and int64 (nq, k), -1 at the end where fewer were met."""
    nq = len(queries)
    distances, positions = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    ptr = load_faiss().swig_ptr
    with translate_error(doing):
        engine.search_c(nq, ptr(queries), k, ptr(distances), ptr(positions), parameters)
    return distances, positions


def emptied(engine: FaissIndex) -> FaissIndex:
    """A copy of an index that keeps what it was trained to and holds no rows."""
    faiss = load_faiss()
    with translate_error("taking over trained quantisers"):
        copy = faiss.clone_index(engine)
        copy.reset()
    return copy


def with_rows(engine: FaissIndex, vectors: FloatArray, step: int) -> FaissIndex:
    """A copy of an index that holds float32 (m, dim) ``vectors`` as well, added ``step`` at a time in one thread."""
    faiss = load_faiss()
    with translate_error("extending an index"), one_thread():
        copy = faiss.clone_index(engine)
        for start in range(0, len(vectors), step):
            copy.add(padded_columns(vectors[start : start + step], copy.d))
    return copy


def in_one_piece(engine: FaissIndex) -> FaissIndex:
    """An empty index of 4-bit codes without lists that shares the codes' centroids of ``engine``."""
    faiss = load_faiss()
    whole = faiss.IndexPQFastScan(engine.d, engine.pq.M, 4, engine.metric_type)
    faiss.copy_array_to_vector(faiss.vector_to_array(engine.pq.centroids), whole.pq.centroids)
    whole.is_trained = True
    return whole


class Serialised:
    """An index as faiss itself writes it, made piece by piece at each writing, since all of it takes much memory."""

    def __init__(self, engine: FaissIndex, flags: int = 0) -> None:
        self._engine, self._flags = engine, flags
        self.nbytes = 0
        self.write(self._count)

    def write(self, sink: Callable[[bytes], object]) -> None:
        """Call ``sink`` with each piece in order."""
        faiss = load_faiss()
        with translate_error("serialising an index"):
            faiss.write_index(self._engine, faiss.PyCallbackIOWriter(sink, _PIECE), self._flags)

    def _count(self, piece: bytes) -> None:
        self.nbytes += len(piece)


def from_bytes(parts: Arrays, name: str, kind: str, n: int | None, metric: Metric) -> FaissIndex:
    """The index in the part ``name``, whose checksum the caller has verified, if it is what it should be, over n rows.

    Raises:
        EngineError: bytes missing, not readable by this faiss, or another kind, size or metric of index.
    """
    data = memoryview(part(parts, name, np.uint8, (None,)).data)
    faiss, at = load_faiss(), 0

    def read(size: int) -> bytes:
        nonlocal at
        at += size
        return bytes(data[at - size : at])

    with translate_error("reading an index"):
        engine = faiss.read_index(faiss.PyCallbackIOReader(read, _PIECE))
    found = type(engine).__name__, engine.metric_type
    if found != (kind, metric_of(faiss, metric)) or n not in (None, engine.ntotal):
        raise EngineError(f"expected {kind} over {n} rows, found {found[0]} over {engine.ntotal}; rebuild the index")
    return engine


def check_codes(engine: FaissIndex, dim: int) -> None:
    """Refuse 4-bit codes that were not made for vectors of ``dim`` dimensions.

    Raises:
        EngineError: they were not.
    """
    codes = int(engine.pq.M)
    if codes > dim or engine.d != padded_dim(dim, codes):
        raise EngineError(f"{codes} codes over {engine.d} columns for vectors of {dim} dimensions; rebuild the index")


def aligned_bytes(size: int) -> int:
    """Bytes that an aligned table of faiss occupies: ``size`` rounded up to a power of two, at least 256."""
    return 0 if size == 0 else max(256, 1 << (size - 1).bit_length())
