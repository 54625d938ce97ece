"""Inverted lists on the device, by float32 vectors, or by float16 or 8-bit differences from their centroids.

Lists are filled on the host and sent in one piece: lists that grow on the device take up to twice their memory. The
trained index without rows and the list of each row stay on the host: a snapshot keeps them and the next index reuses
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ...errors import EngineError
from ...types import FloatArray, IndexPlan, IntArray, Metric, Precision, Rows, SearchParams
from ..base import Arrays, BuildJob, out_of_range, part
from ..bitmap import RowFilter
from ..faiss_helpers import emptied, from_bytes, metric_of, quiet, to_bytes
from ..faiss_support import load_faiss, one_thread, translate_error
from ..sample import ADD_ROWS, POINTS_PER_LIST, padded_columns, training_sample
from ..vector_table import VectorTable, grown
from .index import FaissGpuIndex, Fetch, doubled
from .resources import GpuIndexHandle, GpuResources, resources_of
from .sizes import MOST, flat_bytes, flat_query_bytes, lists_bytes, lists_query_bytes, sent_bytes

_ROUNDS = 10
"""Rounds of k-means, as many as faiss does for its lists."""
_SCALE_POINTS = 16_384
"""Rows from which the range of 8-bit components is taken; 2**-8 of it is lost on either side at the most."""
_FLOAT16_MAX, _FLOAT16_NORMAL = 65504.0, 2.0**-14
_STORED: dict[Precision, str] = {"float32": "", "float16": "QT_fp16", "int8": "QT_8bit"}


class FaissGpuIVFIndex(FaissGpuIndex):
    """``plan.nlist`` lists; without ``nprobe`` a search probes all of them, at most 2,048."""

    kind: ClassVar[str] = "ivf"

    def __init__(
        self,
        plan: IndexPlan,
        metric: Metric,
        rows: Rows,
        table: VectorTable,
        trained: Any,
        assigned: npt.NDArray[np.int32],
        *,
        beside: bool = False,
    ) -> None:
        """``trained`` is faiss' CPU index without rows; ``assigned`` int32 (n,) the list of each row. ``beside``: need
        twice the memory, since the index that this one follows is still there."""
        self._trained = trained
        self._assigned = assigned
        self._nlist = int(trained.nlist)
        self._sizes: list[int] = np.bincount(assigned, minlength=self._nlist).tolist()
        handle = _uploaded(plan, table, trained, assigned, self._sizes, beside)
        super().__init__(plan, metric, rows, table, handle)

    @classmethod
    def build(cls, job: BuildJob) -> FaissGpuIVFIndex:
        table, plan = job.table(), _within_range(job.plan, job.rows.vectors)
        if not 1 <= plan.nlist <= len(job.source):
            raise EngineError(f"nlist is {plan.nlist} with {len(job.source)} training vectors; keep the exact index")
        gpu_resources = resources_of(plan.device)
        if isinstance(job.reuse_from, FaissGpuIVFIndex) and job.reuse_from.plan.precision == plan.precision:
            trained = emptied(job.reuse_from.trained)
        else:
            trained = _trained(job, gpu_resources, plan.precision)
        assigned = _assigned(gpu_resources, trained, len(job.rows.vectors), job.blocks(ADD_ROWS, trained.d))
        index = cls(plan, job.metric, job.rows, table, trained, assigned)
        job.progress("add", 1.0)
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FaissGpuIVFIndex:
        rows = cls._rows_of(parts)
        table = cls._table_of(metric, rows, parts)
        name = "IndexIVFScalarQuantizer" if _STORED[plan.precision] else "IndexIVFFlat"
        trained = from_bytes(parts, "faiss", name, 0, metric)
        _check_trained(trained, plan, table)
        return cls(plan, metric, rows, table, trained, _checked_lists(parts, table.n, plan.nlist))

    def _extended(self, rows: Rows) -> FaissGpuIVFIndex | None:
        table, gpu_resources, m = self.table.extended(rows.vectors), resources_of(self.plan.device), len(rows.slots)
        if _within_range(self.plan, rows.vectors) is not self.plan:
            return None
        blocks = (padded_columns(rows.vectors[at : at + ADD_ROWS], self.dim) for at in range(0, m, ADD_ROWS))
        assigned = grown(self._assigned, _assigned(gpu_resources, self._trained, m, blocks))
        plan, slots = self._plan_with(table), self._slot_table_with(rows)
        return FaissGpuIVFIndex(plan, self.metric, slots, table, self._trained, assigned, beside=True)

    @property
    def nlist(self) -> int:
        return self._nlist

    @property
    def list_sizes(self) -> list[int]:
        return self._sizes

    @property
    def trained(self) -> Any:
        """The trained CPU index without rows."""
        return self._trained

    def _engine_parts(self) -> Arrays:
        return {"faiss": to_bytes(self._trained), "lists": self._assigned.astype(np.int64)}

    def _engine_bytes(self) -> int:
        return int(self._assigned.nbytes + 4 * self._nlist * self.dim)

    def _probes(self, params: SearchParams, row_filter: RowFilter | None) -> int | None:
        wanted, most = min(params.nprobe or self._nlist, self._nlist), min(self._nlist, MOST)
        if params.nprobe and wanted > MOST:
            return None
        if row_filter is not None:
            wanted = math.ceil(wanted * math.sqrt(self.n / row_filter.count))
        return min(wanted, most)

    def _wider(self, fetch: Fetch, exhausted: bool) -> Fetch | None:
        """More lists where those probed hold too few, more of their rows where they may hold enough."""
        most = min(self._nlist, MOST)
        if exhausted and fetch.nprobe < most:
            return replace(fetch, nprobe=min(2 * fetch.nprobe, most))
        return doubled(fetch, self.n)

    def _query_bytes(self, fetch: Fetch) -> int:
        coarse = flat_query_bytes(self._nlist, self.dim, fetch.nprobe)
        return lists_query_bytes(fetch.nprobe, self.dim, fetch.fetch) + coarse

    def _parameters(self, fetch: Fetch) -> Any:
        parameters = load_faiss().SearchParametersIVF()
        parameters.nprobe = fetch.nprobe
        return parameters


def _within_range(plan: IndexPlan, vectors: FloatArray) -> IndexPlan:
    """``plan``; with int8 for float16 where a vector has more than 65504 or nothing but subnormal components."""
    if plan.precision != "float16":
        return plan
    for start in range(0, len(vectors), ADD_ROWS):
        largest = np.abs(vectors[start : start + ADD_ROWS]).max(axis=1, initial=0.0)
        if (largest > _FLOAT16_MAX).any() or ((largest < _FLOAT16_NORMAL) & (largest > 0)).any():
            return replace(plan, precision="int8", notes=(*plan.notes, out_of_range(plan.precision)))
    return plan


def _trained(job: BuildJob, gpu_resources: GpuResources, precision: Precision) -> Any:
    """The CPU index of faiss without rows, its centroids found by k-means on the device."""
    faiss, dim, kind = gpu_resources.faiss, job.rows.vectors.shape[1], metric_of(gpu_resources.faiss, job.metric)
    sample = training_sample(job.source, POINTS_PER_LIST * job.plan.nlist, job.seed)
    job.progress("train", 0.0)
    if isinstance(job.reuse_from, FaissGpuIVFIndex):
        centroids = _centroids_of(job.reuse_from.trained)
    else:
        centroids = _centroids(gpu_resources, sample, job.plan.nlist, job.metric, job.seed)
    with translate_error("training inverted lists"), one_thread():
        quantiser = faiss.IndexFlat(dim, kind)
        quantiser.add(centroids)
        trained = _cpu_lists(faiss, quantiser, job.plan.nlist, precision)
        trained.train(sample[:_SCALE_POINTS])
    job.progress("train", 1.0)
    return trained


def _centroids(gpu_resources: GpuResources, sample: FloatArray, nlist: int, metric: Metric, seed: int) -> FloatArray:
    faiss, dim = gpu_resources.faiss, sample.shape[1]
    clustering = faiss.Clustering(dim, nlist)
    quiet(clustering, seed)
    clustering.niter = _ROUNDS
    clustering.spherical = metric != "l2"
    size = flat_bytes(nlist, dim, half=False) + sent_bytes(len(sample), dim)
    with gpu_resources.building("training inverted lists", size, keep=False) as (resources, held):
        config = gpu_resources.config("GpuIndexFlatConfig")
        held.append(gpu_resources.made("GpuIndexFlat", resources, dim, metric_of(faiss, metric), config))
        clustering.train(sample, held[0])
    centroids: FloatArray = faiss.vector_to_array(clustering.centroids).reshape(nlist, dim)
    return centroids


def _centroids_of(trained: Any) -> FloatArray:
    with translate_error("taking over trained quantisers"):
        centroids: FloatArray = load_faiss().downcast_index(trained.quantizer).reconstruct_n(0, trained.nlist)
    return centroids


def _cpu_lists(faiss: ModuleType, quantiser: Any, nlist: int, precision: Precision) -> Any:
    """An index for rows stored in ``precision``, which owns its quantiser."""
    stored, dim, kind = _STORED[precision], quantiser.d, quantiser.metric_type
    if stored:
        way = getattr(faiss.ScalarQuantizer, stored)
        lists = faiss.IndexIVFScalarQuantizer(quantiser, dim, nlist, way, kind, True)
    else:
        lists = faiss.IndexIVFFlat(quantiser, dim, nlist, kind)
    quantiser.this.disown()
    lists.own_fields = True
    return lists


def _assigned(gpu_resources: GpuResources, trained: Any, n: int, blocks: Iterable[FloatArray]) -> npt.NDArray[np.int32]:
    """The nearest centroid of each of n rows that come in blocks, int32 (n,), found on the device."""
    assigned, kind = np.empty(n, np.int32), trained.metric_type
    centroids = _centroids_of(trained)
    size = flat_bytes(len(centroids), trained.d, half=False)
    with gpu_resources.building("assigning rows to lists", size, keep=False) as (resources, held):
        held.append(
            gpu_resources.made("GpuIndexFlat", resources, trained.d, kind, gpu_resources.config("GpuIndexFlatConfig"))
        )
        held[0].add(centroids)
        at = 0
        for block in blocks:
            assigned[at : at + len(block)] = held[0].search(block, 1)[1][:, 0]
            at += len(block)
    np.maximum(assigned, 0, out=assigned)
    return assigned


def _uploaded(
    plan: IndexPlan, table: VectorTable, trained: Any, assigned: npt.NDArray[np.int32], sizes: list[int], beside: bool
) -> GpuIndexHandle:
    """The lists, filled on the host and sent to the device in one piece."""
    gpu_resources, narrow = resources_of(plan.device), bool(_STORED[plan.precision])
    name = "GpuIndexIVFScalarQuantizer" if narrow else "GpuIndexIVFFlat"
    size = lists_bytes(sizes, table.dim, plan.precision)
    gpu_resources.check()
    lists = _filled(table, trained, assigned)
    with gpu_resources.building("loading inverted lists", 2 * size if beside else size, keep=True) as (resources, held):
        config = gpu_resources.config(f"{name}Config")
        config.indicesOptions = gpu_resources.faiss.INDICES_32_BIT
        held.append(gpu_resources.made(name, resources, lists, config))
    return GpuIndexHandle(gpu_resources, held, size)


def _filled(table: VectorTable, trained: Any, assigned: npt.NDArray[np.int32]) -> Any:
    faiss, lists = load_faiss(), emptied(trained)
    ptr = faiss.swig_ptr
    with translate_error("filling inverted lists"):
        for start in range(0, table.n, ADD_ROWS):
            part = slice(start, min(start + ADD_ROWS, table.n))
            block = np.ascontiguousarray(table.gather(part))
            numbers: IntArray = np.arange(part.start, part.stop, dtype=np.int64)
            own: IntArray = assigned[part].astype(np.int64)
            lists.add_core(len(block), ptr(block), ptr(numbers), ptr(own))
    return lists


def _check_trained(trained: Any, plan: IndexPlan, table: VectorTable) -> None:
    if trained.d != table.dim or trained.nlist != plan.nlist or not trained.is_trained:
        raise EngineError(
            f"{trained.nlist} lists of {trained.d} dimensions where the plan has {plan.nlist} of {table.dim}; "
            "rebuild the index"
        )
    if _STORED[plan.precision] and trained.sq.qtype != getattr(load_faiss().ScalarQuantizer, _STORED[plan.precision]):
        raise EngineError(f"lists of another precision than {plan.precision}; rebuild the index")


def _checked_lists(parts: Arrays, n: int, nlist: int) -> npt.NDArray[np.int32]:
    numbers: IntArray = part(parts, "lists", np.int64, (n,))
    if n and not (int(numbers.min()) >= 0 and int(numbers.max()) < nlist):
        raise EngineError(f"part 'lists' names lists beyond the {nlist} of the plan; rebuild the index")
    return numbers.astype(np.int32)
