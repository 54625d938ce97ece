"""Groups of near-duplicate units, found through the index without comparing all pairs.

The index is searched for the few nearest neighbours of each stored vector. Pairs that are near enough form components.
Within a component exact cosines decide: the unit that ranks first takes those within the threshold of *itself*, so that
no chain of near pairs joins units that are far apart. The work is linear in the number of units.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from ...types import FloatArray, IntArray, JsonObject, MemoryUnit
from ..store.base import StorageBackend
from ..store.foreign import with_vectors
from ..store.units import unit_to_text
from .meaning import Meaning, Verdict, compare, meaning_of

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

MOST_LISTED = 100
"""Conflicts and pairs that a report lists; their number is exact."""

Rank = Callable[[str], int]
Apart = Callable[[MemoryUnit], Hashable]


class Judge:
    """Decides by the texts of near units which may be merged, and collects the pairs and the conflicts.

    related: True lets units of different statements merge too (for texts that are joined), but no conflicts.
    """

    def __init__(self, *, related: bool = False) -> None:
        self.related = related
        self.conflicts: list[JsonObject] = []
        self.conflict_count = 0
        self.pairs: list[JsonObject] = []
        self._meanings: dict[str, Meaning] = {}

    def load(self, units: Iterable[MemoryUnit]) -> None:
        """Read the texts of the units that are compared next; earlier ones are forgotten."""
        self._meanings = {unit["id"]: meaning_of(unit_to_text(unit)) for unit in units}

    def verdict(self, a: str, b: str) -> Verdict:
        """Judge two loaded units."""
        return compare(self._meanings[a], self._meanings[b])

    def joins(self, group: Sequence[str], other: str, cosine: float) -> bool:
        """Whether a unit may join a group, whose first unit it is near to."""
        verdict = self.verdict(group[0], other)
        if verdict.kind == "same" or (
            self.related and all(self.verdict(member, other).kind != "conflict" for member in group)
        ):
            if len(self.pairs) < MOST_LISTED:
                self.pairs.append({"ids": [group[0], other], "cosine": round(cosine, 4), "reason": verdict.reason})
            return True
        return False

    def note(self, a: str, b: str, cosine: float) -> None:
        """Collect the pair if it is a conflict."""
        verdict = self.verdict(a, b)
        if verdict.kind == "conflict":
            self.conflict_count += 1
            if len(self.conflicts) < MOST_LISTED:
                self.conflicts.append({"ids": [a, b], "cosine": round(cosine, 4), "reason": verdict.reason})


def near_groups(
    backend: StorageBackend,
    threshold: float,
    *,
    only: Sequence[str] | None = None,
    rank: Rank | None = None,
    apart: Apart | None = None,
    judge: Judge | None = None,
    newest: bool = False,
) -> list[list[str]]:
    """Return groups of two or more ids; each unit is within the cosine ``threshold`` of the first of its group.

    only: ids to consider, None for all. rank: the unit of the smallest rank comes first in its group; among equals the
    oldest, or the newest. apart: units with different values are never in one group. judge: decides which near units
    are merged; None: all. A backend without vectors gives groups of equal text, ignoring case and white space.
    """
    if "search_vectors" not in backend.capabilities:
        return _equal_texts(_units(backend, only), rank, apart, newest)
    found = _Neighbourhood(backend.metric, by_text=judge is not None)
    filters = {"id": list(only)} if only is not None and len(only) <= 1000 else None
    for units, vectors in _blocks(backend, only):
        distances, ids = backend.search_vectors(vectors, NEIGHBOURS, filters, RECALL)
        found.add(units, vectors, distances, ids, apart)
    return _groups(backend, found, threshold, _first(found, rank, newest), judge)


class _Neighbourhood:
    """Nearest neighbours of the units seen so far; ids are numbered in the order of their first appearance."""

    def __init__(self, metric: str, by_text: bool) -> None:
        self.ordinal: dict[str, int] = {}
        self._seen: dict[int, int] | None = {} if by_text else None
        self._alike: list[tuple[int, int]] = []
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
            if self._seen is not None:  # copies that more than NEIGHBOURS of other labels hide from the index
                said = hash((self._labels.get(number), meaning_of(unit_to_text(unit)).bag))
                self._alike.append((self._seen.setdefault(said, number), number))
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
        same = np.array([pair for pair in self._alike if pair[0] != pair[1]], dtype=np.int64).reshape(-1, 2)
        return np.concatenate([left, same[:, 0]]), np.concatenate([right, same[:, 1]])

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


def _first(found: _Neighbourhood, rank: Rank | None, newest: bool) -> Callable[[str], tuple[int, int]]:
    """The sort key that puts the unit to keep first."""
    sign = -1 if newest else 1
    return lambda name: (0 if rank is None else rank(name), sign * found.order[name])


def _groups(
    backend: StorageBackend,
    found: _Neighbourhood,
    threshold: float,
    first: Callable[[str], tuple[int, int]],
    judge: Judge | None,
) -> list[list[str]]:
    left, right = found.near(threshold - SLACK)
    names = list(found.ordinal)
    known = np.fromiter((name in found.order for name in names), bool, len(names))
    near = {
        (names[min(a, b)], names[max(a, b)]) for a, b in zip(left.tolist(), right.tolist(), strict=True) if known[b]
    }
    partners: dict[str, list[str]] = {}
    for a, b in sorted(near) if judge is not None else ():
        partners.setdefault(a, []).append(b)
    groups: list[list[str]] = []
    for run in _runs(_components(left, right), names, first):
        vectors = backend.vectors_of(run)
        if judge is not None:
            units = backend.retrieve_batch(run)
            vectors = {name: vectors[name] for name in vectors if name in units}
            judge.load(units.values())
            _note_conflicts(judge, partners, vectors, threshold)
        present = [name for name in run if name in vectors]
        if len(present) > 1:
            groups += _led(present, np.array([vectors[name] for name in present]), threshold, judge)
    return sorted(groups, key=lambda group: min(found.order[name] for name in group))


def _note_conflicts(
    judge: Judge, partners: dict[str, list[str]], vectors: dict[str, FloatArray], threshold: float
) -> None:
    for a, x in vectors.items():
        for b in partners.get(a, ()):
            y = vectors.get(b)
            if y is not None:
                cosine = float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y) or 1.0))
                if cosine >= threshold - TOLERANCE:
                    judge.note(a, b, cosine)


def _components(left: IntArray, right: IntArray) -> list[list[int]]:
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


def _runs(
    components: list[list[int]], names: list[str], first: Callable[[str], tuple[int, int]]
) -> Iterator[list[str]]:
    for component in components:
        ranked = sorted((names[one] for one in component), key=first)
        for start in range(0, len(ranked), LONGEST_RUN):
            yield ranked[start : start + LONGEST_RUN]


def _led(names: list[str], vectors: FloatArray, threshold: float, judge: Judge | None) -> list[list[str]]:
    """Group vectors (n, dim): the first takes those near it that the judge lets join, then the first of the rest."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.where(norms > 0, norms, 1)
    free = np.arange(len(names))
    groups = []
    while len(free) > 1:
        cosines = units[free] @ units[free[0]]
        taken = [0]
        group = [names[free[0]]]
        for at in np.flatnonzero(cosines >= threshold - TOLERANCE).tolist():
            if at and (judge is None or judge.joins(group, names[free[at]], float(cosines[at]))):
                taken.append(at)
                group.append(names[free[at]])
        if len(group) > 1:
            groups.append(group)
        free = np.delete(free, taken)
    return groups


def _blocks(backend: StorageBackend, only: Sequence[str] | None) -> Iterator[tuple[list[MemoryUnit], FloatArray]]:
    rows = backend.export_rows() if only is None else with_vectors(backend, _units(backend, only))
    while block := list(islice(rows, BLOCK)):
        yield [unit for unit, _ in block], np.array([vector for _, vector in block], dtype=np.float32)


def _units(backend: StorageBackend, only: Sequence[str] | None) -> Iterator[MemoryUnit]:
    """Yield the units, oldest first."""
    if only is None:
        yield from backend.units()
    elif len(only) <= 1000:
        yield from backend.units({"id": list(only)})
    else:
        wanted = set(only)
        yield from (unit for unit in backend.units() if unit["id"] in wanted)


def _equal_texts(units: Iterator[MemoryUnit], rank: Rank | None, apart: Apart | None, newest: bool) -> list[list[str]]:
    same: dict[Hashable, list[str]] = {}
    for unit in units:
        text = " ".join(unit_to_text(unit).casefold().split())
        same.setdefault((text, apart(unit) if apart is not None else None), []).append(unit["id"])
    groups = [group[::-1] if newest else group for group in same.values() if len(group) > 1]
    return groups if rank is None else [sorted(group, key=rank) for group in groups]
