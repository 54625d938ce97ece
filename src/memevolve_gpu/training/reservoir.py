"""A bounded sample of a store's real queries."""

from __future__ import annotations

import math
import os
import random
import struct
import zlib

import numpy as np

from ..types import FloatArray
from ..utils.forking import lock

DEFAULT_CAPACITY = 512
DEFAULT_HALF_LIFE = 5000
"""Queries after which half of the sample has been replaced."""

_HEADER = struct.Struct("<4sHHIQI")
"""Magic, version, unused, dim, queries seen, checksum of everything else; then float32 rows, all little-endian."""
_MAGIC, _VERSION = b"MQRS", 1


class Reservoir:
    """A sample of at most ``capacity`` query vectors. Thread-safe.

    Uniform over everything seen at first (Algorithm R, Vitter 1985: the t-th query is taken with probability
    capacity / t and replaces a random one). Old queries would then keep their weight forever, so the probability does
    not fall below ln 2 * capacity / half_life: from then on the chance that a query is still in the sample halves with
    every ``half_life`` further queries (a biased reservoir, Aggarwal 2006). The half-life counts queries, not days: an
    idle store keeps its sample. With the defaults the sample is uniform over the first 7,200 queries.

    The next query to take is drawn in advance, so a query that is not taken costs one comparison. ``seen`` counts the
    queries that were offered, ``taken`` the changes of the sample since this object was made.
    """

    def __init__(
        self, dim: int, *, capacity: int = DEFAULT_CAPACITY, half_life: int = DEFAULT_HALF_LIFE, seed: int = 0
    ) -> None:
        """``dim`` and ``capacity`` are at least 1; a ``half_life`` below the capacity has no effect on its own.

        Raises:
            ValueError: one of them is not positive.
        """
        if min(dim, capacity, half_life) < 1:
            raise ValueError(f"dim, capacity and half_life must be at least 1, got {dim}, {capacity}, {half_life}")
        self.dim = dim
        self.capacity = capacity
        self._floor = min(1.0, math.log(2) * capacity / half_life)
        self._seed = seed
        self._kept = np.empty((0, dim), np.float32)
        self._count = 0
        self._lock = lock()
        self._offering = 0
        """The process in which a call of :meth:`offer` runs."""
        self._next = 1
        self._restart(0)

    def __len__(self) -> int:
        return self._count

    def offer(self, vectors: FloatArray) -> None:
        """Offer queries, float32 (nq, dim), to the sample; most are not taken.

        Raises:
            ValueError: a vector that would be taken has another length.
        """
        with self._lock:
            if self._offering == os.getpid():  # a signal handler interrupts this call: its queries are skipped
                return
            self._offering = os.getpid()
            try:
                first = self.seen + 1
                self.seen += len(vectors)
                self._next = max(self._next, first)  # an interrupt or a fork inside an earlier call left it behind
                while self._next <= self.seen:
                    self._take(vectors[self._next - first])
                    self._next += self._skip(self._next + 1)
            finally:
                self._offering = 0

    def sample(self) -> FloatArray:
        """A copy of the sample in no particular order, float32 (m, dim)."""
        with self._lock:
            kept: FloatArray = self._kept[: self._count].copy()
        return kept

    def to_bytes(self) -> bytes:
        """The sample and the count, for :meth:`from_bytes`: 24 bytes and 4 * dim for each vector."""
        with self._lock:
            rows = self._kept[: self._count].astype("<f4").tobytes()
            seen = self.seen
        blank = _HEADER.pack(_MAGIC, _VERSION, 0, self.dim, seen, 0)
        return _HEADER.pack(_MAGIC, _VERSION, 0, self.dim, seen, zlib.crc32(rows, zlib.crc32(blank))) + rows

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        dim: int,
        *,
        capacity: int = DEFAULT_CAPACITY,
        half_life: int = DEFAULT_HALF_LIFE,
        seed: int = 0,
    ) -> Reservoir:
        """Read what :meth:`to_bytes` wrote; anything else, or another ``dim``, gives an empty sample.

        A smaller ``capacity`` keeps a random part of it.
        """
        fresh = cls(dim, capacity=capacity, half_life=half_life, seed=seed)
        found = _parsed(data, dim)
        if found is not None:
            fresh._adopt(*found)
        return fresh

    def _adopt(self, rows: FloatArray, seen: int) -> None:
        if len(rows) > self.capacity:
            rows = rows[np.random.default_rng(self._seed).permutation(len(rows))[: self.capacity]]
        self._kept, self._count = self._buffer(len(rows)), len(rows)
        self._kept[: len(rows)] = rows
        self._restart(max(seen, len(rows)))

    def _restart(self, seen: int) -> None:
        self.seen = seen
        self.taken = 0
        self._random = random.Random(f"{self._seed} {seen}")  # noqa: S311 - a sample, not a secret
        self._next = seen + self._skip(seen + 1)

    def _take(self, vector: FloatArray) -> None:
        if self._count < self.capacity:
            if self._count == len(self._kept):
                grown = self._buffer(self._count + 1)
                grown[: self._count] = self._kept
                self._kept = grown
            place = self._count
            self._kept[place] = vector
            self._count += 1
        else:
            self._kept[self._random.randrange(self.capacity)] = vector
        self.taken += 1

    def _buffer(self, count: int) -> FloatArray:
        """Memory for ``count`` rows or more; it grows with the sample."""
        return np.empty((min(self.capacity, max(16, 2 * count)), self.dim), np.float32)

    def _skip(self, number: int) -> int:
        """How many queries ahead the next one to take is, if the coming one is the ``number``-th.

        By inversion: the first query at which the probability that none was taken falls below a random number.
        """
        if self._count < self.capacity:
            return 1
        wanted, none_taken, ahead = self._random.random(), 1.0, 0
        while none_taken > wanted or ahead == 0:
            none_taken *= 1.0 - max(self.capacity / (number + ahead), self._floor)
            ahead += 1
        return ahead


def _parsed(data: bytes, dim: int) -> tuple[FloatArray, int] | None:
    """Rows float32 (m, dim) and the count seen; None for anything incomplete, or of another dimension."""
    if len(data) < _HEADER.size:
        return None
    magic, version, unused, wide, seen, checksum = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if (magic, version, unused, wide) != (_MAGIC, _VERSION, 0, dim) or len(payload) % (4 * dim):
        return None
    if zlib.crc32(payload, zlib.crc32(_HEADER.pack(magic, version, unused, wide, seen, 0))) != checksum:
        return None
    rows = np.frombuffer(payload, "<f4").astype(np.float32).reshape(-1, dim)
    return (rows, seen) if np.isfinite(rows).all() else None
