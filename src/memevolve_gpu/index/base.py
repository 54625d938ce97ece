"""The contract of every index, n vectors with slots and ids that never change, and the flat index, which scans them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..types import DeviceIncident, FloatArray, IndexPlan, IntArray, Metric, Precision, Rows, SearchParams
from ..utils.vectors import DeviceQueries
from .bitmap import RowFilter
from .exact_scan import padded
from .sample import padded_columns
from .vector_table import VectorTable, grown, table_from

Arrays = dict[str, npt.NDArray[np.generic]]
VECTORS, CENTROIDS = "vectors", "centroids"
"""The parts of an index that may be read from a file instead of memory, by their names."""
Progress = Callable[[str, float], None]
"""Called with the name of a stage and its finished fraction, 0 to 1."""

_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class BuildJob:
    """The arguments of :func:`~.registry.build`, which describes them."""

    plan: IndexPlan
    rows: Rows
    metric: Metric
    seed: int
    training: FloatArray | None
    reuse_from: Index | None
    progress: Progress

    @property
    def source(self) -> FloatArray:
        """The vectors that quantisers are trained on, float32 (m, dim): those given for it, else the rows."""
        return self.rows.vectors if self.training is None else self.training

    def table(self) -> VectorTable:
        """The rows' vectors as a table, float32 (n, dim)."""
        return VectorTable(np.ascontiguousarray(self.rows.vectors), self.metric)

    def blocks(self, size: int, width: int) -> Iterator[FloatArray]:
        """The rows' vectors in blocks float32 (size, width), padded with zero columns; reports ``add`` progress."""
        n = len(self.rows.vectors)
        for start in range(0, n, size):
            yield padded_columns(self.rows.vectors[start : start + size], width)
            self.progress("add", min(1.0, (start + size) / n))


class DeltaRows(Protocol):
    """Rows that came after an index was built. More may follow; none ever changes."""

    def blocks(self, start: int, end: int) -> Iterator[FloatArray]:
        """The vectors from position ``start`` to ``end`` (exclusive), in blocks float32 (m, dim)."""


class Index(ABC):
    """An index over n row versions that never changes. Any number of threads may search it at the same time.

    Every class has the same calls: ``build`` and ``extended`` make an index from rows, ``search`` finds neighbours,
    ``parts`` and ``from_parts`` save and load it (:mod:`.snapshot_file` writes the parts to a file).

    Attributes:
        plan: what was built, and where.
        metric: l2, cosine or ip.
        slots: int64 (n,), strictly ascending: the slot of each row.
        id_bytes: uint8 (m,), the ids in UTF-8, one behind the other.
        id_ends: int64 (n,), where each id ends in ``id_bytes``.
        table: the float32 vectors (n, dim) that decide every search.
        n: number of rows. Results are positions, 0 to n - 1, into the arrays above.
        dim: length of a vector.
    """

    kind: ClassVar[str]
    accepts_device_queries: ClassVar[bool] = False
    """Whether ``search`` takes torch tensors, float32 (nq, dim), as they lie on a device."""

    def __init__(self, plan: IndexPlan, metric: Metric, rows: Rows, table: VectorTable) -> None:
        self.plan = plan
        self.metric: Metric = metric
        self.slots = rows.slots
        self.id_bytes = rows.id_bytes
        self.id_ends = rows.id_ends
        self.table = table
        self.n = table.n
        self.dim = table.dim
        self._text = memoryview(rows.id_bytes.data)

    @classmethod
    @abstractmethod
    def build(cls, job: BuildJob) -> Index:
        """Build an index.

        Args:
            job: plan, rows, metric and seed; see :func:`~.registry.build`.

        Raises:
            DeviceError: the plan's device has no memory or cannot be used.
            EngineError: the engine is missing or fails, or the rows are too few for this kind.
        """

    @classmethod
    @abstractmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> Index:
        """Load an index from its parts.

        Args:
            plan: of the index that was saved.
            metric: of the index that was saved.
            parts: the arrays of :meth:`parts`, by name.

        Raises:
            EngineError: the parts are incomplete or contradict each other.
        """

    def extended(self, rows: Rows) -> Index | None:
        """An index over these rows followed by new ones, with the same quantisers.

        It takes the time of the new rows and of a copy of what the engine holds. Vectors, slots and ids share memory
        with this index where there is space. This index does not change and may be searched meanwhile; any number of
        threads may extend it, and the first one shares its memory.

        Args:
            rows: m new rows: vectors float32 (m, dim), slots int64 (m,) above all slots of this index.

        Returns:
            The longer index; this one where m is 0; None where it has to be built again.

        Raises:
            EngineError: slots do not ascend beyond these, or the vectors are not float32 (m, dim); the engine fails.
        """
        vectors, slots = rows.vectors, rows.slots
        if not len(slots):
            return self
        if vectors.dtype != np.float32 or vectors.shape != (len(slots), self.dim) or len(rows.id_ends) != len(slots):
            raise EngineError(f"rows.vectors {vectors.dtype} {vectors.shape} do not fit {self.dim} dimensions")
        if (self.n and slots[0] <= self.slots[-1]) or not bool((np.diff(slots) > 0).all()):
            raise EngineError("rows.slots do not ascend beyond those of the index; build a new one")
        return self._extended(rows)

    def parts(self) -> Arrays:
        """The arrays to save, by name: slots, ids, vectors and what the engine adds."""
        own: Arrays = {"slots": self.slots, "id_bytes": self.id_bytes, "id_ends": self.id_ends}
        return own | self.table.arrays() | self._engine_parts()

    def moved_to(self, arrays: Arrays) -> None:
        """Read the parts in ``arrays`` from there from now on: they hold the same. Searches that run go on as they are.

        arrays: ``VECTORS`` and ``CENTROIDS``, as far as :meth:`parts` has them.
        """
        self.table.moved_to(part(arrays, VECTORS, np.float32, (self.n, self.dim)))

    @property
    def nlist(self) -> int:
        """Number of inverted lists; 0 where none."""
        return 0

    @property
    def reads_lists(self) -> bool:
        """Whether the codes lie in the lists, so that a search reads those it probes; else it reads all."""
        return False

    @property
    def list_sizes(self) -> list[int]:
        """Rows in each inverted list; empty where there are no lists."""
        return []

    @property
    def device(self) -> str:
        """Where this index searches now: ``cpu`` or ``cuda:N``."""
        return "cpu"

    @property
    def device_bytes(self) -> int:
        """Bytes that this index holds on its device; 0 on the CPU."""
        return 0

    def incidents(self) -> list[DeviceIncident]:
        """What went wrong on the device since the last call, oldest first, at most 64. Any thread may call."""
        return []

    @property
    def vectors(self) -> FloatArray:
        """All vectors as float32 (n, dim), a view."""
        return self.table.gather(slice(0, self.n))

    @property
    def nbytes(self) -> int:
        """Bytes of host memory: slots, ids, what the engine holds, and the vectors that are not mapped from a file."""
        own = self.slots.nbytes + self.id_bytes.nbytes + self.id_ends.nbytes
        return own + self.table.resident_bytes + self._engine_bytes()

    @property
    def mapped_bytes(self) -> int:
        """Bytes of vectors that are mapped from a file: the system reads and drops them as needed."""
        return self.table.nbytes - self.table.resident_bytes

    def search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None = None
    ) -> tuple[FloatArray, IntArray]:
        """The k nearest rows of each query.

        Args:
            queries: float32 (nq, dim); normalised under cosine.
            k: results per query, at least 1, may exceed n.
            params: how much work to do; a field of 0 means the index's default, ``exact`` an exact scan.
            row_filter: the rows that may be returned, over exactly n rows; None for all.

        Returns:
            Exact distances float32 (nq, k), ascending, and positions int64 (nq, k), padded with +inf and -1. l2 gives
            squared distances, cosine 1 - dot, ip -dot.

        Raises:
            EngineError: the engine fails.
            ValueError: queries, k or row_filter do not fit this index.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim or k < 1:
            raise ValueError(f"queries must be (nq, {self.dim}) and k at least 1, got {queries.shape} and {k}")
        if row_filter is not None:
            if row_filter.n != self.n:
                raise ValueError(f"row_filter covers {row_filter.n} rows, the index has {self.n}")
            if row_filter.count == self.n:
                row_filter = None
        if self.n == 0 or (row_filter is not None and row_filter.count == 0):
            return padded(len(queries), k)
        if params.exact:
            return self.table.scan(queries, k, row_filter)
        return self._search(queries, k, params, row_filter)

    def candidates(self, queries: FloatArray, width: int) -> IntArray | None:  # noqa: ARG002 - for indexes that can
        """The ``width`` rows that a search with ``rerank=width`` compares exactly, nearest by their codes first.

        A search for fewer candidates compares the first of them.

        Args:
            queries: as for :meth:`search`.
            width: at most a quarter of the rows.

        Returns:
            Positions int64 (nq, width); None for an index without codes, or whose searches leave rows out.
        """
        return None

    def search_delta(
        self,
        newer: DeltaRows,  # noqa: ARG002 - for indexes that can
        n: int,  # noqa: ARG002
        queries: FloatArray | DeviceQueries,  # noqa: ARG002
        k: int,  # noqa: ARG002
        row_filter: RowFilter | None = None,  # noqa: ARG002
    ) -> tuple[FloatArray, IntArray] | None:
        """The k nearest of the newest rows, by the device of this index.

        Args:
            newer: the rows that came after this index was built.
            n: how many of them to search.
            queries: float32 (nq, dim) on the host, or where ``accepts_device_queries`` on a device.
            k: results per query.
            row_filter: the rows that may be returned, over exactly n rows; None for all.

        Returns:
            As :meth:`search`, positions counting from the first row of ``newer``; None where the host should scan
            them: there is no device, it fails, or the scan is faster than a call to it.
        """
        return None

    def ids_at(self, positions: IntArray) -> list[str | None]:
        """The m ids at ``positions`` int64 (m,); None where a position is -1."""
        text, end_of = self._text, self.id_ends.item  # for a few ids this is faster than arrays
        return [
            None if at < 0 else str(text[end_of(at - 1) if at else 0 : end_of(at)], "utf-8")
            for at in positions.tolist()
        ]

    def vectors_at(self, positions: IntArray) -> FloatArray:
        """The vectors float32 (m, dim) at ``positions`` int64 (m,)."""
        return self.table.gather(np.asarray(positions, dtype=np.int64))

    def position_of(self, slots: IntArray) -> IntArray:
        """The positions of ``slots`` int64 (any shape), int64 of the same shape; -1 where absent."""
        slots = np.asarray(slots, dtype=np.int64)
        if self.n == 0:
            return np.full(slots.shape, -1, np.int64)
        first = int(self.slots[0])
        if int(self.slots[-1]) - first == self.n - 1:  # no slot between them is missing
            at = slots - first
            return np.where((at >= 0) & (at < self.n), at, -1)
        at = np.minimum(np.searchsorted(self.slots, slots), self.n - 1)
        return np.where(self.slots[at] == slots, at, -1).astype(np.int64, copy=False)

    @abstractmethod
    def _search(
        self, queries: FloatArray, k: int, params: SearchParams, row_filter: RowFilter | None
    ) -> tuple[FloatArray, IntArray]:
        """:meth:`search` after the arguments were checked and the trivial cases answered."""

    def _extended(self, rows: Rows) -> Index | None:  # noqa: ARG002 - for indexes that can
        """:meth:`extended` after the arguments were checked; at least one row."""
        return None

    def _slot_table_with(self, rows: Rows) -> Rows:
        """The slot table of this index followed by that of ``rows``; its ``vectors`` are left empty."""
        return Rows(
            grown(self.slots, rows.slots),
            grown(self.id_bytes, rows.id_bytes),
            grown(self.id_ends, rows.id_ends + len(self.id_bytes)),
            np.empty((0, 0), np.float32),
        )

    def _engine_parts(self) -> Arrays:
        return {}

    def _engine_bytes(self) -> int:
        return 0

    @staticmethod
    def _stored(metric: Metric, parts: Arrays) -> tuple[Rows, VectorTable]:
        """The slot table of ``parts``, checked for consistency, with its ``vectors`` left empty, and the vectors."""
        slots: IntArray = part(parts, "slots", np.int64, (None,))
        id_bytes: npt.NDArray[np.uint8] = part(parts, "id_bytes", np.uint8, (None,))
        id_ends: IntArray = part(parts, "id_ends", np.int64, (None,))
        ascending = bool((np.diff(slots) > 0).all() and (np.diff(id_ends, prepend=0) >= 0).all())
        last = int(id_ends[-1]) if id_ends.size else 0
        if slots.shape != id_ends.shape or not ascending or last != id_bytes.size:
            raise EngineError("the slot table contradicts itself; rebuild the index")
        table = table_from(parts, metric)
        if table.n != len(slots):
            raise EngineError(f"{table.n} vectors for {len(slots)} slots; rebuild the index")
        return Rows(slots, id_bytes, id_ends, np.empty((0, 0), np.float32)), table


def part(parts: Arrays, name: str, dtype: type[np.generic], shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """The array ``name`` of ``parts``, checked.

    Args:
        parts: the arrays of an index.
        name: of the array.
        dtype: it must have.
        shape: it must have; None stands for any length.

    Raises:
        EngineError: it is missing or of another dtype or shape.
    """
    array = parts.get(name)
    fits = array is not None and array.dtype == dtype and array.ndim == len(shape)
    if array is None or not fits or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        wanted = f"({', '.join('n' if n is None else str(n) for n in shape)}{',' if len(shape) == 1 else ''})"
        raise EngineError(f"part {name!r} is missing or not {np.dtype(dtype).name} {wanted}; rebuild the index")
    return array


def out_of_range(precision: Precision) -> str:
    """The note in the plan of an index that could not hold its vectors in ``precision``."""
    return f"vectors leave the range of {precision}"


def chunks(nq: int, bytes_each: int) -> Iterator[slice]:
    """Cut nq queries of ``bytes_each`` scratch bytes into slices that need about 64 MB each."""
    step = max(1, _SCRATCH_BYTES // max(1, bytes_each))
    for start in range(0, nq, step):
        yield slice(start, min(start + step, nq))


class FlatIndex(Index):
    """Vectors and nothing else."""

    kind: ClassVar[str] = "exact"

    @classmethod
    def build(cls, job: BuildJob) -> FlatIndex:
        """Keep the vectors; nothing is trained."""
        index = cls(job.plan, job.metric, job.rows, job.table())
        job.progress("add", 1.0)
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FlatIndex:
        return cls(plan, metric, *cls._stored(metric, parts))

    def _extended(self, rows: Rows) -> FlatIndex:
        table = self.table.extended(rows.vectors)
        return FlatIndex(self.plan, self.metric, self._slot_table_with(rows), table)

    def _search(
        self,
        queries: FloatArray,
        k: int,
        params: SearchParams,  # noqa: ARG002 - there is nothing to choose
        row_filter: RowFilter | None,
    ) -> tuple[FloatArray, IntArray]:
        return self.table.scan(queries, k, row_filter)
