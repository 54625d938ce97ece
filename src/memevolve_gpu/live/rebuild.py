"""A new body beside the old one: gather the living rows, and swap with what happened meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..index.base import Body
from ..index.growing import roomy
from ..types import IntArray, Rows
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
    """Copy the living rows of a view. Body slots are all older than tail slots, so the order is kept."""
    from_body = np.flatnonzero(view.body_died > view.watermark).astype(np.int64)
    pieces = list(view.tail.pieces(0, view.tail_n))
    keeps = [np.flatnonzero(piece.died > view.watermark) for piece in pieces]
    from_tail = [piece.start + keep for piece, keep in zip(pieces, keeps, strict=True)]
    n_body, n = len(from_body), len(from_body) + sum(map(len, keeps))
    vectors = roomy((n, view.body.dim), np.float32)
    slots = np.empty(n, dtype=np.int64)
    vectors[:n_body] = view.body.vectors_at(from_body)
    slots[:n_body] = view.body.slots[from_body]
    at = n_body
    for piece, keep in zip(pieces, keeps, strict=True):
        vectors[at : at + len(keep)] = piece.vectors[keep]
        slots[at : at + len(keep)] = piece.slots[keep]
        at += len(keep)
    tail_positions = np.concatenate([np.empty(0, dtype=np.int64), *from_tail]).astype(np.int64)
    id_bytes, id_ends = _joined_ids(view, from_body, tail_positions)
    return Gathered(view, Rows(slots, id_bytes, id_ends, vectors), from_body, tail_positions)


def gather_tail(view: View) -> Gathered:
    """The living rows of a view's tail, to be put behind all rows of its body, those that died included."""
    pieces = list(view.tail.pieces(0, view.tail_n))
    keeps = [np.flatnonzero(piece.died > view.watermark).astype(np.int64) for piece in pieces]
    none = np.empty(0, dtype=np.int64)
    at = np.concatenate([none, *[piece.start + keep for piece, keep in zip(pieces, keeps, strict=True)]])
    slots = np.concatenate([none, *[piece.slots[keep] for piece, keep in zip(pieces, keeps, strict=True)]])
    vectors = np.concatenate(
        [
            np.empty((0, view.body.dim), dtype=np.float32),
            *[piece.vectors[keep] for piece, keep in zip(pieces, keeps, strict=True)],
        ]
    )
    return Gathered(view, Rows(slots, *_tail_ids(view, at), vectors), slice(0, view.body.n), at)


def swapped(gathered: Gathered, body: Body, facts: BodyFacts, now: View) -> View:
    """The view ``now`` with ``body`` in place of what was gathered; the caller holds the mutex.

    Rows that died since carry their deaths over; rows that came since make up the new tail.
    """
    old = gathered.view
    died = np.concatenate([old.body_died[gathered.from_body], _tail_deaths(old.tail, gathered.from_tail)])
    tail = Tail(body.dim)
    for piece in now.tail.pieces(old.tail_n, now.tail_n):
        start = tail.n
        tail.extend(piece.slots.tolist(), now.tail.ids[piece.start : piece.end], piece.vectors)
        for at in np.flatnonzero(piece.died <= now.watermark).tolist():
            tail.mark_dead(start + at, int(piece.died[at]))
    body_dead = int((died <= now.watermark).sum())
    tail_dead = sum(int((piece.died <= now.watermark).sum()) for piece in tail.pieces(0, tail.n))
    return View(now.watermark, body, old.watermark, died, body_dead, tail, tail.n, tail_dead, now.metric, facts)


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
