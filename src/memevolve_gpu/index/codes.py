"""The 4-bit codes of rows, in pieces that later indexes share.

An index with new rows keeps the pieces of the one before, and its own piece begins behind them: a copy of all codes
would take their memory a second time while both indexes are in use. Pieces are joined, by a copy, before they are many.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..types import FaissIndex, FloatArray, IntArray, Metric
from .base import Arrays, Parts
from .faiss_helpers import Serialised, check_codes, from_bytes, in_one_piece, searched
from .faiss_support import load_faiss, one_thread, translate_error
from .sample import ADD_ROWS, padded_columns

MOST_PIECES = 4
"""More are joined. A search of a million rows in four pieces took 1.60 to 1.69 ms, in one 1.59 to 1.62."""
SMALL_ROWS = 65_536
"""Pieces of no more rows together are joined: a copy takes little memory, and a search has one piece less to visit."""
BLOCK_ROWS = 32
"""Rows whose codes lie interleaved, so that a piece can only be continued behind a whole block."""


class _Piece(NamedTuple):
    """The first ``rows`` rows of an engine: all, or its whole blocks where another piece has the rest as well."""

    engine: FaissIndex
    rows: int


class Codes:
    """The codes of n rows, each row by each of ``m`` codes. They never change."""

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self._pieces = tuple(pieces)
        self.trained = self._pieces[0].engine
        """An engine with the centroids of the codes."""
        self.columns, self.m = int(self.trained.d), int(self.trained.pq.M)
        self.n = sum(piece.rows for piece in self._pieces)

    @classmethod
    def of(cls, engine: FaissIndex) -> Codes:
        """Those of one engine, an IndexPQFastScan that gets no more rows."""
        return cls([_Piece(engine, int(engine.ntotal))])

    @classmethod
    def from_parts(cls, parts: Arrays, name: str, n: int, dim: int, metric: Metric) -> Codes:
        """What :meth:`parts` returned.

        Raises:
            EngineError: the parts are incomplete, contradict each other, or are not for n rows of ``dim`` dimensions.
        """
        names = [name, *(f"{name}_{number}" for number in range(1, MOST_PIECES) if f"{name}_{number}" in parts)]
        engines = [from_bytes(parts, each, "IndexPQFastScan", None, metric) for each in names]
        for engine in engines:
            check_codes(engine, dim)
        *before, last = engines
        pieces = [_Piece(engine, _whole_blocks(engine)) for engine in before]
        codes = cls([*pieces, _Piece(last, int(last.ntotal))])
        if codes.n != n or len({int(engine.pq.M) for engine in engines}) > 1:
            raise EngineError(f"codes of {codes.n} rows for {n} vectors; rebuild the index")
        return codes

    def parts(self, name: str) -> Parts:
        """What to save: the first piece under ``name``, the others under that and a number."""
        return {f"{name}_{at}" if at else name: Serialised(one.engine) for at, one in enumerate(self._pieces)}

    @property
    def nbytes(self) -> int:
        """Bytes of codes and centroids. faiss takes addresses for up to twice as much, which no row has touched."""
        return int(sum(piece.engine.codes.size() for piece in self._pieces) + 4 * self.trained.pq.centroids.size())

    def extended(self, vectors: FloatArray) -> Codes:
        """The codes of float32 (m, dim) ``vectors``, of which the first n are those of these codes."""
        *kept, last = self._pieces
        kept.append(last._replace(rows=_whole_blocks(last.engine)))
        start, joined = sum(piece.rows for piece in kept), list[_Piece]()
        first = start
        while kept and _are_joined(kept, len(vectors) - first):
            joined.insert(0, kept.pop())
            first -= joined[0].rows
        with translate_error("adding 4-bit codes"), one_thread():
            engine = with_room(in_one_piece(self.trained), len(vectors) - first)
            for piece in joined:
                _append(engine, _packed(piece), piece.rows)
            for at in range(start, len(vectors), ADD_ROWS):
                engine.add(padded_columns(vectors[at : at + ADD_ROWS], self.columns))
        return Codes([*kept, _Piece(engine, len(vectors) - first)])

    def nearest(self, queries: FloatArray, width: int) -> IntArray:
        """The ``width`` nearest rows by their codes, int64 (nq, width), nearest first; -1 at the end where fewer exist.

        queries: float32 (nq, dim).
        """
        queries = padded_columns(queries, self.columns)
        if len(self._pieces) == 1:
            return searched(self.trained, queries, width, "searching 4-bit codes")[1]
        nq, at, start = len(queries), 0, 0
        wide = (width + BLOCK_ROWS) * len(self._pieces)
        far, found = np.empty((nq, wide), np.float32), np.empty((nq, wide), np.int64)
        for engine, rows in self._pieces:
            own = slice(at, at + width + int(engine.ntotal) - rows)
            distances, positions = searched(engine, queries, own.stop - at, "searching 4-bit codes")
            if engine.metric_type != load_faiss().METRIC_L2:
                np.negative(distances, out=distances)
            outside = (positions < 0) | (positions >= rows)
            distances[outside], positions[outside] = np.inf, -1 - start
            far[:, own], found[:, own] = distances, positions + start
            at, start = own.stop, start + rows
        order = np.argsort(far[:, :at], axis=1, kind="stable")[:, :width]
        return np.take_along_axis(found, order, axis=1)


def _are_joined(before: list[_Piece], rows: int) -> bool:
    """Whether the last piece is joined with a new one of so many rows."""
    last = before[-1].rows
    return last <= rows or last + rows <= SMALL_ROWS or len(before) >= MOST_PIECES


def _whole_blocks(engine: FaissIndex) -> int:
    return int(engine.ntotal) // BLOCK_ROWS * BLOCK_ROWS


def with_room(engine: FaissIndex, rows: int) -> FaissIndex:
    """The empty ``engine``, an IndexPQFastScan, with memory for so many rows: else faiss moves codes while it grows."""
    size = _packed_bytes(engine, rows)
    engine.codes.resize(size)
    _seen(engine, size)[:] = 0  # faiss adds bits to what is there
    return engine


def _packed_bytes(engine: FaissIndex, rows: int) -> int:
    """Bytes of whole blocks for so many rows."""
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS * int(engine.M2) // 2


def _packed(piece: _Piece) -> npt.NDArray[np.uint8]:
    """The codes of a piece as they lie in its memory, uint8 (m,), without a copy."""
    return _seen(piece.engine, _packed_bytes(piece.engine, piece.rows))


def _seen(engine: FaissIndex, size: int) -> npt.NDArray[np.uint8]:
    """The first bytes of the codes of an engine, uint8 (size,), without a copy."""
    if not size:
        return np.empty(0, np.uint8)
    found: npt.NDArray[np.uint8] = load_faiss().rev_swig_ptr(engine.codes.get(), size)
    return found


def _append(engine: FaissIndex, packed: npt.NDArray[np.uint8], rows: int) -> None:
    """Put the codes of so many rows behind those of ``engine``, which end with a whole block and have room."""
    at = _packed_bytes(engine, int(engine.ntotal))
    _seen(engine, at + len(packed))[at:] = packed
    engine.ntotal += rows
    engine.ntotal2 = -(-engine.ntotal // BLOCK_ROWS) * BLOCK_ROWS
