"""Copy a store into another of any kind: page by page, resumable, and verified against the source.

The namespaces below that of the source are copied too, with the times of expiry of their units and with their limits.

Every page is compared with what the target holds before it is written, so that an interrupted copy goes on where it
was, and a repeated one writes nothing. No state is kept beside the two stores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

import numpy as np

from ...errors import CapacityError, ConfigurationError, DimensionMismatchError, StorageError
from ...training.recall import recall_of
from ...types import FloatArray, JsonObject, MemoryUnit
from ...utils.arguments import callback, switch, whole_number
from .base import Progress, StorageBackend
from .foreign import as_backend, delete_units
from .namespaces import NamespaceInfo, Path

PAGE = 1_000
MOST_ROWS = 10_000
"""Rows that are copied at once, however many the caller asks for."""
MOST_PASSES = 20
SAMPLED = 1_000
QUERIES, NEIGHBOURS = 64, 10
_SEED = 7
_FIGURES = ("copied", "replaced", "present", "removed")
_CLOSE = 1e-3
"""Distances of two engines, both in float32, differ by less than this share."""


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What :func:`copy_store` did and verified."""

    copied: int
    """Units that the target lacked."""
    replaced: int
    """Units that the target had with other content."""
    present: int
    """Units that the target had already."""
    removed: int
    """Units that were copied, and deleted from the source meanwhile."""
    others: int
    """Units of the target that the source has not."""
    count: int
    """Units of the source."""
    passes: int
    """Walks over the source until one found no change."""
    vectors_compared: int
    recall_before: float | None
    """recall@10 of the source at its own target recall; None for less than ten units."""
    recall_after: float | None
    """The same of the target, on the same queries."""
    seconds: float
    namespaces: int = 1
    """Namespaces that were copied, that of the source included."""

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain JSON values."""
        return asdict(self)


def copy_store(
    source: StorageBackend,
    target: StorageBackend,
    *,
    replace: bool = False,
    page_size: int = PAGE,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy every unit with its vector, id and time of expiry, in order, and verify the copy.

    The namespace of the source is copied into that of the target, and those below it likewise.

    An interrupted copy goes on where it was when it is called again. Changes of the source meanwhile are followed until
    a pass finds none. Units of the target that the source has not are left alone.

    Args:
        source: The store to read.
        target: The store to write.
        replace: Whether to replace units of the target that have an id of the source's and other content. Without it
            they are an error, before anything is written.
        page_size: Units that are copied at once, at most 10,000 of them.
        progress: Called with (stage, share done).

    Returns:
        The report.

    Raises:
        ConfigurationError: A store has no vectors, the metrics differ, ids are taken, or the target lacks the
            namespaces or the expiry that the source uses.
        DimensionMismatchError: The vectors have different lengths.
        CapacityError: The source is larger than the target's limit.
        StorageError: The copy differs from the source, or the source does not stop changing.
    """
    started = time.monotonic()
    rows = min(whole_number("page_size", page_size, error=ConfigurationError), MOST_ROWS)
    told = callback("progress", progress) or _silent
    tree = _Tree(_checked(source, "source"), _checked(target, "target"), rows, told)
    tree.check()
    if not switch("replace", replace):
        tree.refuse_conflicts()
    tree.follow()
    tree.target.run_maintenance()
    return CopyReport(**tree.verified(), seconds=round(time.monotonic() - started, 3))


Rows = list[tuple[MemoryUnit, FloatArray]]


@dataclass
class _Copy:
    source: StorageBackend
    target: StorageBackend
    page_size: int
    progress: Progress
    ours: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    figures: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*_FIGURES, "passes"), 0))

    @property
    def expires(self) -> bool:
        """Whether units of the target can expire."""
        return "set_expiry" in self.target.capabilities

    def refuse_lost_times(self) -> None:
        """Raise ConfigurationError when units expire that would not in the target."""
        if self.expires or "set_expiry" not in self.source.capabilities:
            return
        ids = (unit["id"] for unit in self.source.units())
        while page := list(islice(ids, self.page_size)):
            times = self.source.expiries(page)
            if times:
                raise ConfigurationError(
                    f"target: units of a {type(self.target).__name__} do not expire, and {next(iter(times))!r} of the "
                    "source's does; take its time away with set_expiry, or name a target with expiry; nothing was "
                    "written"
                )

    def check_pair(self) -> None:
        if self.source.metric != self.target.metric:
            raise ConfigurationError(
                f"target: its metric is {self.target.metric}, the source's is {self.source.metric}; distances would "
                "change: copy into a new store"
            )
        dims = [getattr(store, "embedding_dim", None) for store in (self.source, self.target)]
        if None not in dims and dims[0] != dims[1]:
            raise DimensionMismatchError(int(dims[1] or 0), int(dims[0] or 0), "copy into a new store")
        limit = getattr(getattr(self.target, "config", None), "max_memory_units", None)
        if limit is not None and self.source.count() > limit:
            raise CapacityError(
                f"the source holds {self.source.count()} units, the target takes {limit}; "
                "raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
            )

    def refuse_conflicts(self) -> None:
        """Raise ConfigurationError when the target has other units under ids of the source's."""
        if not self.target.count():
            return
        taken: list[str] = []
        for rows in self._pages("comparing"):
            taken += self._different(rows)[1]
        if taken:
            shown = ", ".join(map(repr, taken[:5])) + (", ..." if len(taken) > 5 else "")
            raise ConfigurationError(
                f"target: it holds other units under {len(taken)} ids of the source's ({shown}); ask to replace them, "
                "or name another target; nothing was written"
            )

    def walk(self) -> bool:
        """Walk over the source once; return whether anything changed."""
        self.source.refresh()
        self.figures["passes"] += 1
        blank = self.figures["passes"] == 1 and not self.target.count()
        before, seen, present = sum(self.figures.values()), set[str](), 0
        for rows in self._pages("copying"):
            seen.update(unit["id"] for unit, _ in rows)
            missing, other = ([unit["id"] for unit, _ in rows], []) if blank else self._different(rows)
            self._write(rows, missing, other)
            present += len(rows) - len(missing) - len(other)
        gone = [unit_id for unit_id in self.ours - seen if not self.source.exists(unit_id)]
        removed = delete_units(self.target, gone, None)
        self.ours.difference_update(removed)
        self.figures["removed"] += len(removed)
        changed = sum(self.figures.values()) != before
        if self.figures["passes"] == 1:
            self.figures["present"] = present
        return changed

    def _write(self, rows: Rows, missing: Sequence[str], other: Sequence[str]) -> None:
        chosen = {*missing, *other}
        if not chosen:
            return
        taken = [(unit, vector) for unit, vector in rows if unit["id"] in chosen]
        units, vectors = [unit for unit, _ in taken], np.array([vector for _, vector in taken])
        times = self.source.expiries([unit["id"] for unit in units])
        more = {"expires_at": [times.get(unit["id"], math.inf) for unit in units]} if self.expires else {}
        self.target.store_batch(units, vectors, **more)  # type: ignore[call-arg] # it has vectors
        self.ours.update(missing)
        self.figures["copied"] += len(missing)
        self.figures["replaced"] += sum(unit_id not in self.written for unit_id in other)
        self.written |= chosen

    def _different(self, rows: Rows) -> tuple[list[str], list[str]]:
        """Ids that the target lacks, and those under which it holds something else."""
        ids = [unit["id"] for unit, _ in rows]
        units: Mapping[str, MemoryUnit] = self.target.retrieve_batch(ids)
        vectors = self.target.vectors_of(list(units))
        missing = [unit_id for unit_id in ids if unit_id not in units]
        times = [store.expiries(list(units)) for store in (self.source, self.target)]
        other = [
            unit["id"]
            for unit, vector in rows
            if unit["id"] in units
            and not (
                unit == units[unit["id"]]
                and _equal(vector, vectors.get(unit["id"]))
                and times[0].get(unit["id"]) == times[1].get(unit["id"])
            )
        ]
        return missing, other

    def _pages(self, stage: str) -> Iterator[Rows]:
        total, done = max(1, self.source.count()), 0
        rows = self.source.export_rows(self.page_size)
        while page := list(islice(rows, self.page_size)):
            yield page
            done += len(page)
            self.progress(stage, min(1.0, done / total))

    def verify(self) -> dict[str, int]:
        """Compare the target with the source: every id and unit, the count, and the vectors of a sample."""
        self.target.refresh()
        count = 0
        for rows in self._pages("verifying"):
            ids = [unit["id"] for unit, _ in rows]
            held: Mapping[str, MemoryUnit] = self.target.retrieve_batch(ids)
            times = [store.expiries(ids) for store in (self.source, self.target)]
            wrong = [
                unit["id"]
                for unit, _ in rows
                if (held.get(unit["id"]) != unit or times[0].get(unit["id"]) != times[1].get(unit["id"]))
                and self.source.exists(unit["id"])  # it may expire at this moment
            ]
            if wrong:
                raise StorageError(
                    f"target: unit {wrong[0]!r} and {len(wrong) - 1} more are not the source's; copy again"
                )
            count += len(rows)
        others = self.target.count() - min(count, self.source.count())
        if others < 0:
            raise StorageError(f"target: it counts {-others} units less than it holds; copy again")
        return {"count": count, "others": others, "vectors_compared": self._verify_vectors()}

    def _verify_vectors(self) -> int:
        sample: Mapping[str, FloatArray] = self.source.sample_vectors(SAMPLED)
        held = self.target.vectors_of(list(sample))
        wrong = [unit_id for unit_id, vector in sample.items() if not _equal(vector, held.get(unit_id))]
        if wrong:
            raise StorageError(
                f"target: the vector of {wrong[0]!r} and {len(wrong) - 1} more are not the source's; copy again"
            )
        return len(sample)

    def recalls(self) -> tuple[float | None, float | None]:
        """recall@10 of both on points between stored vectors; StorageError when their exact answers differ."""
        sample = list(self.source.sample_vectors(2 * QUERIES).values())
        if len(sample) < NEIGHBOURS:
            return None, None
        queries = _between(np.array(sample))
        exact = [store.search_vectors(queries, NEIGHBOURS, recall=1.0)[0] for store in (self.source, self.target)]
        worse = exact[1] > exact[0] + _CLOSE * np.abs(exact[0]) + _CLOSE
        if worse.any():
            raise StorageError(
                f"target: its exact search misses {int(worse.sum())} neighbours of the source's; copy again"
            )
        found = [store.search_vectors(queries, NEIGHBOURS)[0] for store in (self.source, self.target)]
        return recall_of(found[0], exact[0]), recall_of(found[1], exact[1])


@dataclass
class _Tree:
    """The copies of a namespace and of all below it, by relative path."""

    source: StorageBackend
    target: StorageBackend
    page_size: int
    progress: Progress
    copies: dict[Path, _Copy] = field(default_factory=dict)
    passes: int = 0

    def look(self) -> dict[Path, NamespaceInfo]:
        """The namespaces below the source's that hold units or have limits; makes the copies that there are none of."""
        found = namespaces_below(self.source)
        for path in ((), *found):
            if path not in self.copies:
                ours, theirs = (store.namespace(*path) if path else store for store in (self.source, self.target))
                self.copies[path] = _Copy(ours, theirs, self.page_size, self.progress)
        return found

    def check(self) -> None:
        """Raise when the target cannot take what the source has."""
        below = [path for path in namespaces_below(self.source) if path]
        if below and "namespace" not in self.target.capabilities:
            raise ConfigurationError(
                f"target: a {type(self.target).__name__} has no namespaces, and the source has {'/'.join(below[0])!r}; "
                "copy each namespace into a store of its own; nothing was written"
            )
        self.look()
        for copy in self.copies.values():
            copy.check_pair()
            copy.refuse_lost_times()

    def refuse_conflicts(self) -> None:
        """Raise ConfigurationError when the target has other units under ids of the source's."""
        for copy in self.copies.values():
            copy.refuse_conflicts()

    def follow(self) -> None:
        """Copy until a pass over all namespaces finds no change."""
        while self.passes < MOST_PASSES:
            self.passes += 1
            mark = self.source.change_number
            found = self.look()
            changed = [copy.walk() for copy in self.copies.values()]
            quiet = self.source.change_number == mark if mark is not None else not any(changed)
            if quiet:
                self._limit(found)
                return
        raise StorageError(
            f"source: it changed during each of {MOST_PASSES} passes; stop its writers and copy again, what is there "
            "is kept"
        )

    def _limit(self, found: Mapping[Path, NamespaceInfo]) -> None:
        """Give namespaces of the target the limits of the source's, where they have none."""
        held = namespaces_below(self.target)
        for path, info in found.items():
            own = held.get(path)
            if (info.max_units or info.default_ttl) and not (own and (own.max_units or own.default_ttl)):
                target = self.copies[path].target
                target.set_limits(max_units=info.max_units, default_ttl=info.default_ttl)

    def verified(self) -> JsonObject:
        """Compare the copies with their sources; the sums of all figures, and the recall of the largest one."""
        copies = list(self.copies.values())
        verified = [copy.verify() for copy in copies]
        largest = max(range(len(copies)), key=lambda at: verified[at]["count"])
        before, after = copies[largest].recalls()
        sums = {name: sum(copy.figures[name] for copy in copies) for name in _FIGURES}
        sums |= {name: sum(one[name] for one in verified) for name in ("count", "others", "vectors_compared")}
        recalls = {"recall_before": before, "recall_after": after}
        return {**sums, **recalls, "passes": self.passes, "namespaces": len(copies)}


def namespaces_below(store: StorageBackend) -> dict[Path, NamespaceInfo]:
    """The namespaces of a store by the path below its own one."""
    if "namespaces" not in store.capabilities:
        return {}
    skipped = len(getattr(store, "namespace_path", ()))
    return {info.path[skipped:]: info for info in store.namespaces()}


def _checked(store: StorageBackend, name: str) -> StorageBackend:
    backend = as_backend(store)
    if not {"export_rows", "vectors_of", "search_vectors"} <= backend.capabilities:
        raise ConfigurationError(
            f"{name}: a {type(store).__name__} cannot give vectors; embed its units into a new store"
        )
    return backend


def _equal(vector: FloatArray, held: FloatArray | None) -> bool:
    return held is not None and np.array_equal(vector, held)


def _between(vectors: FloatArray) -> FloatArray:
    """Points two thirds of the way from a vector to another: float32 (at most QUERIES, dim)."""
    rng = np.random.default_rng(_SEED)
    ends = rng.permutation(len(vectors))[:QUERIES]
    starts = vectors[:QUERIES][: len(ends)]
    return np.ascontiguousarray(starts + np.float32(2 / 3) * (vectors[ends] - starts) + np.float32(1e-6))


def _silent(_stage: str, _share: float) -> None:
    return
