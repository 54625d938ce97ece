"""Inverted lists on the device, as float16 or 8-bit differences of vectors from their centroids.

Lists are filled on the host and sent in one piece: lists that grow on the device take up to twice their memory. The
trained index without rows stays on the host: a snapshot keeps it, the next index reuses it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np

from ...errors import EngineError
from ...types import FaissIndex, FloatArray, IndexPlan, IntArray, Metric, Precision, Rows, SearchParams
from ..base import Arrays, BuildJob, Parts, Progress, out_of_range
from ..bitmap import RowFilter
from ..faiss_helpers import Serialised, emptied, from_bytes, metric_of, quiet
from ..faiss_support import load_faiss, one_thread, translate_error
from ..sample import ADD_ROWS, POINTS_PER_LIST, training_sample
from ..vector_table import VectorTable
from .index import FaissGpuIndex, fits_float16
from .resources import GpuIndexHandle, GpuResources, resources_of
from .sizes import MOST, flat_bytes, flat_query_bytes, lists_bytes, lists_query_bytes

_SENT_BYTES = 512 << 20
"""What faiss sends at a time to be compared: up to twice 256 MiB."""
_STORED: dict[Precision, str] = {"float32": "QT_fp16", "float16": "QT_fp16", "int8": "QT_8bit"}
"""Float32 vectors decide on the host, so float16 proposes for them, too."""


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
        progress: Progress = lambda _stage, _share: None,
    ) -> None:
        """``trained`` is faiss' CPU index without rows."""
        self.trained, gpu_resources = trained, resources_of(plan.device)
        lists = _filled(gpu_resources, trained, table, progress)
        self._sizes: list[int] = [lists.invlists.list_size(number) for number in range(trained.nlist)]
        handle = _uploaded(gpu_resources, lists, lists_bytes(self._sizes, table.dim, plan.precision))
        del lists
        super().__init__(plan, metric, rows, table, handle)

    @classmethod
    def build(cls, job: BuildJob) -> FaissGpuIVFIndex:
        plan = job.plan
        if plan.precision != "int8" and not fits_float16(job.rows.vectors):
            plan = replace(plan, precision="int8", notes=(*plan.notes, out_of_range("float16")))
        if not 1 <= plan.nlist <= len(job.source):
            raise EngineError(f"nlist is {plan.nlist} with {len(job.source)} training vectors; keep the exact index")
        trained = _trained(job, resources_of(plan.device), _STORED[plan.precision])
        index = cls(plan, job.metric, job.rows, job.table(), trained, job.progress)
        job.progress("add", 1.0)
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> FaissGpuIVFIndex:
        rows, table = cls._stored(metric, parts)
        trained = from_bytes(parts, "faiss", "IndexIVFScalarQuantizer", 0, metric)
        if trained.d != table.dim or trained.nlist != plan.nlist or not trained.is_trained:
            found = f"{trained.nlist} lists of {trained.d} dimensions where the plan has {plan.nlist} of {table.dim}"
            raise EngineError(f"{found}; rebuild the index")
        if trained.sq.qtype != getattr(load_faiss().ScalarQuantizer, _STORED[plan.precision]):
            raise EngineError(f"lists of another precision than {plan.precision}; rebuild the index")
        return cls(plan, metric, rows, table, trained)

    @property
    def nlist(self) -> int:
        return int(self.trained.nlist)

    @property
    def list_sizes(self) -> list[int]:
        return self._sizes

    def _engine_parts(self) -> Parts:
        return {"faiss": Serialised(self.trained)}

    def _engine_bytes(self) -> int:
        return 4 * self.nlist * self.dim

    def _lists_to_probe(self, params: SearchParams, row_filter: RowFilter | None) -> int | None:
        wanted, most = min(params.nprobe or self.nlist, self.nlist), min(self.nlist, MOST)
        if params.nprobe and wanted > MOST:
            return None
        if row_filter is not None:
            wanted = math.ceil(wanted * math.sqrt(self.n / max(1, row_filter.count)))
        return min(wanted, most)

    def _query_bytes(self, fetch: int, nprobe: int) -> int:
        return lists_query_bytes(nprobe, self.dim, fetch) + flat_query_bytes(self.nlist, self.dim, nprobe)


def _trained(job: BuildJob, gpu_resources: GpuResources, stored: str) -> FaissIndex:
    """The CPU index of faiss without rows, by the centroids of the index to reuse or of k-means on the device."""
    faiss, dim, nlist = gpu_resources.faiss, job.rows.vectors.shape[1], job.plan.nlist
    kind, before = metric_of(faiss, job.metric), job.reuse_from
    if isinstance(before, FaissGpuIVFIndex) and _STORED[before.plan.precision] == stored:
        return emptied(before.trained)
    job.progress("train", 0.0)
    sample = training_sample(job.source, POINTS_PER_LIST * nlist, job.seed)
    quantiser = faiss.IndexFlat(dim, kind)
    trained = faiss.IndexIVFScalarQuantizer(quantiser, dim, nlist, getattr(faiss.ScalarQuantizer, stored), kind, True)
    quantiser.this.disown()
    trained.own_fields = True
    quiet(trained.cp, job.seed)
    if isinstance(before, FaissGpuIVFIndex):
        quantiser.add(_centroids_of(before.trained))
        with translate_error("training inverted lists"), one_thread():
            trained.train(sample)
    else:
        size = flat_bytes(nlist, dim, half=False) + min(sample.nbytes, _SENT_BYTES)
        with gpu_resources.building("training inverted lists", size, keep=False) as handle, one_thread():
            trained.clustering_index = handle.make("GpuIndexFlat", dim, kind)
            trained.train(sample)
            trained.clustering_index = None
    job.progress("train", 1.0)
    return trained


def _centroids_of(trained: FaissIndex) -> FloatArray:
    with translate_error("reading trained centroids"):
        centroids: FloatArray = load_faiss().downcast_index(trained.quantizer).reconstruct_n(0, trained.nlist)
    return centroids


def _filled(gpu_resources: GpuResources, trained: FaissIndex, table: VectorTable, progress: Progress) -> FaissIndex:
    """A copy of ``trained`` with the rows of ``table``; the device finds the nearest centroid of each."""
    lists, centroids, ptr = emptied(trained), _centroids_of(trained), gpu_resources.faiss.swig_ptr
    size = flat_bytes(len(centroids), table.dim, half=False)
    with gpu_resources.building("assigning rows to lists", size, keep=False) as handle:
        handle.make("GpuIndexFlat", table.dim, trained.metric_type).add(centroids)
        for start in range(0, table.n, ADD_ROWS):
            stop = min(start + ADD_ROWS, table.n)
            block = np.ascontiguousarray(table.gather(slice(start, stop)))
            numbers: IntArray = np.arange(start, stop, dtype=np.int64)
            own: IntArray = np.maximum(handle.engine.search(block, 1)[1][:, 0], 0)
            lists.add_core(len(block), ptr(block), ptr(numbers), ptr(own))
            progress("add", stop / table.n)
    return lists


def _uploaded(gpu_resources: GpuResources, lists: FaissIndex, size: int) -> GpuIndexHandle:
    with gpu_resources.building("loading inverted lists", size, keep=True) as handle:
        options = gpu_resources.faiss.INDICES_32_BIT
        handle.make("GpuIndexIVFScalarQuantizer", lists, indicesOptions=options)
    return handle
