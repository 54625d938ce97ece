"""A new body beside the old one: gather the living rows, and swap with what happened meanwhile."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..index.base import Body
from ..index.growing import lengthened, roomy
from ..types import FloatArray, IntArray, Rows
from .facts import BodyFacts
from .tail import Tail
from .view import View

__all__ = ["Gathered", "gather", "gather_tail", "swapped"]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Rows of ``view`` in slot order, and where each row of the body that they make comes from: body positions, then
    tail positions."""

    view: View
    rows: Rows
    from_body: IntArray | slice
    from_tail: IntArray


def gather(view: View) -> Gathered:
    """The living rows of a view. Body slots are all older than tail slots, so the order is kept.

    Where no row of the body has died they share its memory, if it is not a graph; else they are a copy.
    """
    from_body = np.flatnonzero(view.body_died > view.watermark).astype(np.int64)
    living = _living(view)
    if len(from_body) == view.body.n and _may_grow(view.body):
        vectors = lengthened(view.body.vectors, living.count)
    else:
        vectors = roomy((len(from_body) + living.count, view.body.dim), np.float32)
        vectors[: len(from_body)] = view.body.vectors_at(from_body)
    living.put(vectors[len(from_body) :])
    slots = np.concatenate([view.body.slots[from_body], living.slots])
    id_bytes, id_ends = _joined_ids(view, from_body, living.positions)
    return Gathered(view, Rows(slots, id_bytes, id_ends, vectors), from_body, living.positions)


def gather_tail(view: View) -> Gathered:
    """The living rows of a view's tail, to be put behind all rows of its body, those that died included."""
    body, living = view.body, _living(view)
    if _may_grow(body):
        vectors = lengthened(body.vectors, living.count)[body.n :]
    else:
        vectors = np.empty((living.count, body.dim), np.float32)
    living.put(vectors)
    rows = Rows(living.slots, *_tail_ids(view, living.positions), vectors)
    return Gathered(view, rows, slice(0, body.n), living.positions)


@dataclass(frozen=True, slots=True)
class _Living:
    """The living rows of a tail: their slots and positions, int64 (count,), and where their vectors are."""

    slots: IntArray
    positions: IntArray
    vectors: list[tuple[FloatArray, IntArray]]

    @property
    def count(self) -> int:
        return len(self.slots)

    def put(self, out: FloatArray) -> None:
        """Write the vectors into ``out`` (count, dim)."""
        at = 0
        for vectors, keep in self.vectors:
            np.take(vectors, keep, axis=0, out=out[at : at + len(keep)], mode="clip")
            at += len(keep)


def _living(view: View) -> _Living:
    pieces = list(view.tail.pieces(0, view.tail_n))
    keeps = [np.flatnonzero(piece.died > view.watermark).astype(np.int64) for piece in pieces]
    none = np.empty(0, dtype=np.int64)
    return _Living(
        slots=np.concatenate([none, *[piece.slots[keep] for piece, keep in zip(pieces, keeps, strict=True)]]),
        positions=np.concatenate([none, *[piece.start + keep for piece, keep in zip(pieces, keeps, strict=True)]]),
        vectors=[(piece.vectors, keep) for piece, keep in zip(pieces, keeps, strict=True)],
    )


def _may_grow(body: Body) -> bool:
    """Can rows be put behind the body's own in its memory? A graph's vectors are in memory that faiss holds."""
    return body.kind != "hnsw"


def swapped(gathered: Gathered, body: Body, facts: BodyFacts, now: View) -> View:
    """The view ``now`` with ``body`` in place of what was gathered; the caller holds the mutex.

    Rows that died since carry their deaths over; rows that came since make up the new tail.
    """
    old = gathered.view
    died = np.concatenate([old.body_died[gathered.from_body], _tail_deaths(old.tail, gathered.from_tail)])
    tail = now.tail.rest(old.tail_n, now.tail_n)
    deaths = array("q", np.flatnonzero(died <= now.watermark).tolist())
    tail_dead = sum(int((piece.died <= now.watermark).sum()) for piece in tail.pieces(0, tail.n))
    return View(
        now.watermark, body, old.watermark, died, deaths, len(deaths), tail, tail.n, tail_dead, now.metric, facts
    )


def _tail_deaths(tail: Tail, positions: IntArray) -> IntArray:
    deaths = [piece.died for piece in tail.pieces(0, int(positions[-1]) + 1)] if len(positions) else []
    everything = np.concatenate([np.empty(0, dtype=np.int64), *deaths])
    return everything[positions]


def _joined_ids(view: View, from_body: IntArray, from_tail: IntArray) -> tuple[npt.NDArray[np.uint8], IntArray]:
    body_bytes, body_ends = _taken(view.body.id_bytes, view.body.id_ends, from_body)
    tail_bytes, tail_ends = _tail_ids(view, from_tail)
    return np.concatenate([body_bytes, tail_bytes]), np.concatenate([body_ends, tail_ends + len(body_bytes)])


def _tail_ids(view: View, positions: IntArray) -> tuple[npt.NDArray[np.uint8], IntArray]:
    ids = [view.tail.ids[position].encode() for position in positions.tolist()]
    return np.frombuffer(b"".join(ids), dtype=np.uint8), np.cumsum([len(one) for one in ids], dtype=np.int64)


def _taken(
    id_bytes: npt.NDArray[np.uint8], id_ends: IntArray, keep: IntArray
) -> tuple[npt.NDArray[np.uint8], IntArray]:
    if len(keep) == len(id_ends):
        return id_bytes, id_ends
    starts = np.concatenate([np.zeros(1, dtype=np.int64), id_ends[:-1]]) if len(id_ends) else id_ends
    lengths = (id_ends - starts)[keep]
    ends = np.cumsum(lengths, dtype=np.int64)
    shift = np.repeat(starts[keep] - (ends - lengths), lengths)
    return id_bytes[np.arange(len(shift), dtype=np.int64) + shift], ends
