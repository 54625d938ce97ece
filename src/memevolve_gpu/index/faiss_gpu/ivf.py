"""Inverted lists on the device, by float32 vectors, or by float16 or 8-bit differences from their centroids.

Lists are filled on the host and sent in one piece: lists that grow on the device take up to twice their memory. The
trained index without rows and the list of each row stay on the host: a snapshot keeps them, the next index reuses them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ...errors import EngineError
from ...types import FaissIndex, FloatArray, IndexPlan, IntArray, Metric, Precision, Rows, SearchParams
from ..base import Arrays, BuildJob, out_of_range, part
from ..bitmap import RowFilter
from ..faiss_helpers import emptied, from_bytes, metric_of, quiet, to_bytes
from ..faiss_support import load_faiss, one_thread, translate_error
from ..sample import ADD_ROWS, POINTS_PER_LIST, training_sample
from ..vector_table import VectorTable
from .index import FaissGpuIndex, fits_float16
from .resources import GpuIndexHandle, GpuResources, resources_of
from .sizes import MOST, flat_bytes, flat_query_bytes, lists_bytes, lists_query_bytes

_ROUNDS = 10
"""Rounds of k-means, as many as faiss does for its lists."""
_SCALE_POINTS = 16_384
"""Rows from which the range of 8-bit components is taken; 2**-8 of it is lost on either side at the most."""
_SENT_BYTES = 512 << 20
"""What faiss sends at a time to be compared: up to twice 256 MiB."""
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
        trained: FaissIndex,
        assigned: npt.NDArray[np.int32],
    ) -> None:
        """``trained`` is faiss' CPU index without rows; ``assigned`` int32 (n,) the list of each row."""
        self.trained, self._assigned = trained, assigned
        self._sizes: list[int] = np.bincount(assigned, minlength=trained.nlist).tolist()
        super().__init__(plan, metric, rows, table, self._uploaded(plan, table))

    @classmethod
    def build(cls, job: BuildJob) -> FaissGpuIVFIndex:
        table, plan = job.table(), job.plan
        if plan.precision == "float16" and not fits_float16(job.rows.vectors):
            plan = replace(plan, precision="int8", notes=(*plan.notes, out_of_range(plan.precision)))
        if not 1 <= plan.nlist <= len(job.source):
            raise EngineError(f"nlist is {plan.nlist} with {len(job.source)} training vectors; keep the exact index")
        gpu_resources = resources_of(plan.device)
        trained = _trained(job, gpu_resources, plan.precision)
        index = cls(plan, job.metric, job.rows, table, trained, _assigned(gpu_resources, trained, job))
        job.progress("add", 1.0)
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FaissGpuIVFIndex:
        rows, stored = cls._rows_of(parts), _STORED[plan.precision]
        table = cls._table_of(metric, rows, parts)
        trained = from_bytes(parts, "faiss", "IndexIVFScalarQuantizer" if stored else "IndexIVFFlat", 0, metric)
        if trained.d != table.dim or trained.nlist != plan.nlist or not trained.is_trained:
            found = f"{trained.nlist} lists of {trained.d} dimensions where the plan has {plan.nlist} of {table.dim}"
            raise EngineError(f"{found}; rebuild the index")
        if stored and trained.sq.qtype != getattr(load_faiss().ScalarQuantizer, stored):
            raise EngineError(f"lists of another precision than {plan.precision}; rebuild the index")
        numbers: IntArray = part(parts, "lists", np.int64, (table.n,))
        if table.n and not (int(numbers.min()) >= 0 and int(numbers.max()) < plan.nlist):
            raise EngineError(f"part 'lists' names lists beyond the {plan.nlist} of the plan; rebuild the index")
        return cls(plan, metric, rows, table, trained, numbers.astype(np.int32))

    @property
    def nlist(self) -> int:
        return int(self.trained.nlist)

    @property
    def list_sizes(self) -> list[int]:
        return self._sizes

    def _engine_parts(self) -> Arrays:
        return {"faiss": to_bytes(self.trained), "lists": self._assigned.astype(np.int64)}

    def _engine_bytes(self) -> int:
        return int(self._assigned.nbytes + 4 * self.nlist * self.dim)

    def _lists_to_probe(self, params: SearchParams, row_filter: RowFilter | None) -> int | None:
        wanted, most = min(params.nprobe or self.nlist, self.nlist), min(self.nlist, MOST)
        if params.nprobe and wanted > MOST:
            return None
        if row_filter is not None:
            wanted = math.ceil(wanted * math.sqrt(self.n / max(1, row_filter.count)))
        return min(wanted, most)

    def _query_bytes(self, fetch: int, nprobe: int) -> int:
        return lists_query_bytes(nprobe, self.dim, fetch) + flat_query_bytes(self.nlist, self.dim, nprobe)

    def _uploaded(self, plan: IndexPlan, table: VectorTable) -> GpuIndexHandle:
        """The lists, filled on the host and sent to the device in one piece."""
        gpu_resources = resources_of(plan.device)
        name = "GpuIndexIVFScalarQuantizer" if _STORED[plan.precision] else "GpuIndexIVFFlat"
        size, lists = lists_bytes(self._sizes, table.dim, plan.precision), _filled(table, self.trained, self._assigned)
        with gpu_resources.building("loading inverted lists", size, keep=True) as (resources, held):
            config = gpu_resources.config(f"{name}Config")
            config.indicesOptions = gpu_resources.faiss.INDICES_32_BIT
            held.append(gpu_resources.made(name, resources, lists, config))
        return GpuIndexHandle(gpu_resources, held, size)


def _trained(job: BuildJob, gpu_resources: GpuResources, precision: Precision) -> FaissIndex:
    """The CPU index of faiss without rows, by the centroids of the index to reuse or of k-means on the device."""
    faiss, dim, nlist = gpu_resources.faiss, job.rows.vectors.shape[1], job.plan.nlist
    kind, before = metric_of(faiss, job.metric), job.reuse_from
    if isinstance(before, FaissGpuIVFIndex) and before.plan.precision == precision:
        return emptied(before.trained)
    job.progress("train", 0.0)
    sample = training_sample(job.source, POINTS_PER_LIST * nlist, job.seed)
    if isinstance(before, FaissGpuIVFIndex):
        centroids = _centroids_of(before.trained)
    else:
        centroids = _centroids(gpu_resources, sample, nlist, job.metric, job.seed)
    with translate_error("training inverted lists"), one_thread():
        quantiser = faiss.IndexFlat(dim, kind)
        quantiser.add(centroids)
        if _STORED[precision]:
            way = getattr(faiss.ScalarQuantizer, _STORED[precision])
            trained = faiss.IndexIVFScalarQuantizer(quantiser, dim, nlist, way, kind, True)
        else:
            trained = faiss.IndexIVFFlat(quantiser, dim, nlist, kind)
        quantiser.this.disown()
        trained.own_fields = True
        trained.train(sample[:_SCALE_POINTS])
    job.progress("train", 1.0)
    return trained


def _centroids(gpu_resources: GpuResources, sample: FloatArray, nlist: int, metric: Metric, seed: int) -> FloatArray:
    faiss, dim = gpu_resources.faiss, sample.shape[1]
    clustering = faiss.Clustering(dim, nlist)
    quiet(clustering, seed)
    clustering.niter, clustering.spherical = _ROUNDS, metric != "l2"
    size = flat_bytes(nlist, dim, half=False) + min(sample.nbytes, _SENT_BYTES)
    with gpu_resources.building("training inverted lists", size, keep=False) as (resources, held):
        config, kind = gpu_resources.config("GpuIndexFlatConfig"), metric_of(faiss, metric)
        held.append(gpu_resources.made("GpuIndexFlat", resources, dim, kind, config))
        clustering.train(sample, held[0])
    centroids: FloatArray = faiss.vector_to_array(clustering.centroids).reshape(nlist, dim)
    return centroids


def _centroids_of(trained: FaissIndex) -> FloatArray:
    with translate_error("reading trained centroids"):
        centroids: FloatArray = load_faiss().downcast_index(trained.quantizer).reconstruct_n(0, trained.nlist)
    return centroids


def _assigned(gpu_resources: GpuResources, trained: FaissIndex, job: BuildJob) -> npt.NDArray[np.int32]:
    """The nearest centroid of each row of ``job``, int32 (n,), found on the device."""
    assigned, centroids, at = np.empty(len(job.rows.vectors), np.int32), _centroids_of(trained), 0
    size = flat_bytes(len(centroids), trained.d, half=False)
    with gpu_resources.building("assigning rows to lists", size, keep=False) as (resources, held):
        config = gpu_resources.config("GpuIndexFlatConfig")
        held.append(gpu_resources.made("GpuIndexFlat", resources, trained.d, trained.metric_type, config))
        held[0].add(centroids)
        for block in job.blocks(ADD_ROWS, trained.d):
            assigned[at : at + len(block)] = held[0].search(block, 1)[1][:, 0]
            at += len(block)
    np.maximum(assigned, 0, out=assigned)
    return assigned


def _filled(table: VectorTable, trained: FaissIndex, assigned: npt.NDArray[np.int32]) -> FaissIndex:
    faiss, lists = load_faiss(), emptied(trained)
    ptr = faiss.swig_ptr
    with translate_error("filling inverted lists"):
        for start in range(0, table.n, ADD_ROWS):
            rows = slice(start, min(start + ADD_ROWS, table.n))
            block = np.ascontiguousarray(table.gather(rows))
            numbers: IntArray = np.arange(rows.start, rows.stop, dtype=np.int64)
            own: IntArray = assigned[rows].astype(np.int64)
            lists.add_core(len(block), ptr(block), ptr(numbers), ptr(own))
    return lists
