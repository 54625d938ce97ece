"""Groups of near-duplicate units, found through the index without comparing all pairs.

The index is searched for the few nearest neighbours of each stored vector. Pairs that are near enough form components.
Within a component exact cosines decide: the unit that ranks first takes those within the threshold of *itself*, so that
no chain of near pairs joins units that are far apart. The work is linear in the number of units.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ...types import FloatArray, IntArray, MemoryUnit
from ..store.base import StorageBackend, VectorDoors, units_of
from ..store.units import unit_to_text

__all__ = ["near_groups"]

BLOCK = 256
"""Vectors in one search of the index."""

NEIGHBOURS = 8
"""Neighbours of each vector, the unit itself among them."""

RECALL = 0.8
"""Recall of the search: duplicates are so near that a low one finds them, and each pair is searched from both sides."""

SLACK = 2e-3
"""Pairs this far below the threshold are checked exactly: int8 indexes have an error of about 1e-4 in a cosine."""

TOLERANCE = 1e-6
"""Rounding error of a float32 cosine; that of equal vectors may be this far below 1."""

LONGEST_RUN = 2048
"""Larger components are split into runs of this many, so that the work stays linear."""

Rank = Callable[[str], int]
Apart = Callable[[MemoryUnit], Hashable]


def near_groups(
    backend: StorageBackend,
    threshold: float,
    *,
    only: Sequence[str] | None = None,
    rank: Rank | None = None,
    apart: Apart | None = None,
) -> list[list[str]]:
    """Return groups of two or more ids; each unit is within the cosine ``threshold`` of the first of its group.

    only: ids to consider, None for all. rank: the unit of the smallest rank comes first in its group; None: the oldest.
    apart: units with different values are never in one group. A backend without vectors gives groups of equal text,
    ignoring case and white space.
    """
    if not isinstance(backend, VectorDoors):
        return _equal_texts(_units(backend, only), rank, apart)
    found = _Neighbourhood(backend.metric)
    filters = {"id": list(only)} if only is not None and len(only) <= 1000 else None
    for units, vectors in _blocks(backend, only):
        distances, ids = backend.search_vectors(vectors, NEIGHBOURS, filters, RECALL)
        found.add(units, vectors, distances, ids, apart)
    return _groups(backend, found, threshold, rank)


class _Neighbourhood:
    """Nearest neighbours of the units seen so far; ids are numbered in the order of their first appearance."""

    def __init__(self, metric: str) -> None:
        self.ordinal: dict[str, int] = {}
        self.order: dict[str, int] = {}
        self._metric = metric
        self._norms: list[tuple[IntArray, FloatArray]] = []
        self._labels: dict[int, Hashable] = {}
        self._pairs: list[tuple[IntArray, IntArray, FloatArray]] = []

    def add(
        self,
        units: list[MemoryUnit],
        vectors: FloatArray,
        distances: FloatArray,
        ids: list[list[str | None]],
        apart: Apart | None,
    ) -> None:
        """Add units with their vectors (n, dim), and the distances (n, k) and ids of their neighbours."""
        own = self._ordinals([unit["id"] for unit in units])
        for unit, number in zip(units, own.tolist(), strict=True):
            self.order[unit["id"]] = len(self.order)
            if apart is not None:
                self._labels[number] = apart(unit)
        self._norms.append((own, np.linalg.norm(vectors, axis=1).astype(np.float32)))
        near = self._ordinals([name for row in ids for name in row])
        left = np.repeat(own, distances.shape[1])
        keep = (near >= 0) & (near != left)
        self._pairs.append((left[keep], near[keep], distances.ravel()[keep]))

    def near(self, cosine: float) -> tuple[IntArray, IntArray]:
        """Return pairs of ordinals whose cosine is at least ``cosine`` by the index's distances."""
        if not self._pairs:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        left, right, distances = (np.concatenate(column) for column in zip(*self._pairs, strict=True))
        keep = self._cosines(left, right, distances) >= cosine
        left, right = left[keep], right[keep]
        if self._labels:
            alike = [self._labels[a] == self._labels[b] for a, b in zip(left.tolist(), right.tolist(), strict=True)]
            left, right = left[alike], right[alike]
        return left, right

    def _cosines(self, left: IntArray, right: IntArray, distances: FloatArray) -> FloatArray:
        """Return cosines; NaN, which fails every comparison, for a neighbour not yet seen or a zero vector."""
        norms = np.full(len(self.ordinal), np.nan, np.float32)
        for own, lengths in self._norms:
            norms[own] = lengths
        a, b = norms[left], norms[right]
        with np.errstate(divide="ignore", invalid="ignore"):
            if self._metric == "cosine":
                cosines = (1.0 - distances) * (a / a) * (b / b)
            elif self._metric == "ip":
                cosines = -distances / (a * b)
            else:
                cosines = (a * a + b * b - distances) / (2.0 * a * b)
        return np.asarray(cosines, dtype=np.float32)

    def _ordinals(self, ids: Sequence[str | None]) -> IntArray:
        number = self.ordinal
        return np.array([-1 if one is None else number.setdefault(one, len(number)) for one in ids], dtype=np.int64)


def _groups(backend: VectorDoors, found: _Neighbourhood, threshold: float, rank: Rank | None) -> list[list[str]]:
    left, right = found.near(threshold - SLACK)
    names = list(found.ordinal)
    place: Callable[[str], Any] = found.order.__getitem__
    first = place if rank is None else (lambda name: (rank(name), place(name)))
    groups: list[list[str]] = []
    for run in _runs(_components(left, right), names, first):
        vectors = backend.vectors_of(run)
        present = [name for name in run if name in vectors]
        if len(present) > 1:
            groups += _led(present, np.array([vectors[name] for name in present]), threshold)
    return sorted(groups, key=lambda group: place(group[0]))


def _components(left: IntArray, right: IntArray) -> list[list[int]]:
    """Return the connected components of the pairs."""
    parent: dict[int, int] = {}

    def root(one: int) -> int:
        top = one
        while (above := parent.setdefault(top, top)) != top:
            top = above
        while parent[one] != top:
            parent[one], one = top, parent[one]
        return top

    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        parent[root(a)] = root(b)
    members: dict[int, list[int]] = {}
    for one in parent:
        members.setdefault(root(one), []).append(one)
    return list(members.values())


def _runs(components: list[list[int]], names: list[str], first: Callable[[str], Any]) -> Iterator[list[str]]:
    for component in components:
        ranked = sorted((names[one] for one in component), key=first)
        for start in range(0, len(ranked), LONGEST_RUN):
            yield ranked[start : start + LONGEST_RUN]


def _led(names: list[str], vectors: FloatArray, threshold: float) -> list[list[str]]:
    """Group vectors (n, dim): the first takes those near it, then the first of the rest, and so on."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.where(norms > 0, norms, 1)
    free = np.arange(len(names))
    groups = []
    while len(free) > 1:
        near = units[free] @ units[free[0]] >= threshold - TOLERANCE
        near[0] = True
        if near.sum() > 1:
            groups.append([names[one] for one in free[near].tolist()])
        free = free[~near]
    return groups


def _blocks(backend: Any, only: Sequence[str] | None) -> Iterator[tuple[list[MemoryUnit], FloatArray]]:
    rows = backend.export_rows() if only is None else _rows_of(backend, only)
    while block := list(islice(rows, BLOCK)):
        yield [unit for unit, _ in block], np.array([vector for _, vector in block], dtype=np.float32)


def _rows_of(backend: Any, ids: Sequence[str]) -> Iterator[tuple[MemoryUnit, FloatArray]]:
    units = _units(backend, ids)
    while block := list(islice(units, BLOCK)):
        vectors = backend.vectors_of([unit["id"] for unit in block])
        yield from ((unit, vectors[unit["id"]]) for unit in block if unit["id"] in vectors)


def _units(backend: StorageBackend, only: Sequence[str] | None) -> Iterator[MemoryUnit]:
    """Yield the units, oldest first."""
    if only is None:
        yield from units_of(backend)
    elif len(only) <= 1000:
        yield from units_of(backend, {"id": list(only)})
    else:
        wanted = set(only)
        yield from (unit for unit in units_of(backend) if unit["id"] in wanted)


def _equal_texts(units: Iterator[MemoryUnit], rank: Rank | None, apart: Apart | None) -> list[list[str]]:
    same: dict[Hashable, list[str]] = {}
    for unit in units:
        text = " ".join(unit_to_text(unit).casefold().split())
        same.setdefault((text, apart(unit) if apart is not None else None), []).append(unit["id"])
    groups = [group for group in same.values() if len(group) > 1]
    return groups if rank is None else [sorted(group, key=rank) for group in groups]
