"""Inverted lists on the device: trained there, laid out list after list, and read for many queries at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ...errors import EngineError
from ...types import Device, FloatArray, IndexPlan, IntArray, Metric, Rows, Tensor
from ..base import Arrays, BuildJob, Parts, part
from ..sample import CODE_TRAINING_POINTS, POINTS_PER_LIST, training_sample
from ..vector_table import VectorTable
from .device_rows import GROUP, Quantization, blocks_of, measured_quantization, padded_columns, padded_groups
from .index import TorchIndex
from .kernel_ops import Operations
from .memory_accounting import account_of
from .runtime import building, device_lock, host_tensor, load_torch, open_device
from .upload import DeviceIndex, Layout

_ENTER_ROWS = 16_384
_LARGEST = 60_000.0


class TorchIVFIndex(TorchIndex):
    """``plan.nlist`` lists; without ``nprobe`` a search probes all of them."""

    kind: ClassVar[str] = "ivf"

    def __init__(
        self,
        plan: IndexPlan,
        metric: Metric,
        rows: Rows,
        table: VectorTable,
        quantization: Quantization,
        centroids: FloatArray,
        assignment: npt.NDArray[np.int32],
    ) -> None:
        """``centroids`` float32 (nlist, dim), as vectors are given; ``assignment`` int32 (n,), each row's list."""
        super().__init__(plan, metric, rows, table, quantization)
        self.centroids = centroids
        self._assignment = assignment
        self._sizes = np.bincount(assignment, minlength=len(centroids)).astype(np.int64)

    @classmethod
    def build(cls, job: BuildJob) -> TorchIVFIndex:
        """Train k-means on a sample, assign the rows, and bring them to the device list by list.

        Raises:
            DeviceError: the device refuses.
            EngineError: fewer training vectors than lists, or than 16.
        """
        plan = job.plan
        if not 1 <= plan.nlist <= len(job.source):
            raise EngineError(f"nlist is {plan.nlist} with {len(job.source)} training vectors; keep the exact index")
        table = job.table()
        with building(plan.device):
            lock, device = device_lock(plan.device), open_device(plan.device)
            quantization = measured_quantization(table, plan.precision)
            centroids = (
                job.reuse_from.centroids
                if isinstance(job.reuse_from, TorchIVFIndex)
                else _trained(job, quantization, device, lock)
            )
            assignment = _assigned(table, quantization, centroids, device, lock)
            index = cls(plan, job.metric, job.rows, table, quantization, centroids, assignment)
            index._load(lambda fraction: job.progress("add", fraction))
        return index

    @classmethod
    def from_parts(cls, plan: IndexPlan, metric: Metric, parts: Arrays) -> TorchIVFIndex:
        rows, table = cls._stored(metric, parts)
        centroids = part(parts, "centroids", np.float32, (plan.nlist, table.dim))
        assignment = part(parts, "assignment", np.int64, (table.n,))
        if not np.isfinite(centroids).all() or ((assignment < 0) | (assignment >= plan.nlist)).any():
            raise EngineError("centroids or list numbers are out of range; rebuild the index")
        quantization = cls._space_of(parts, table.dim)
        index = cls(plan, metric, rows, table, quantization, centroids, assignment.astype(np.int32))
        index._load_or_fail_over()
        return index

    @property
    def nlist(self) -> int:
        return len(self.centroids)

    @property
    def list_sizes(self) -> list[int]:
        sizes: list[int] = self._sizes.tolist()
        return sizes

    def _engine_parts(self) -> Parts:
        return super()._engine_parts() | {
            "centroids": self.centroids,
            "assignment": self._assignment.astype(np.int64),
        }

    def _engine_bytes(self) -> int:
        return super()._engine_bytes() + self.centroids.nbytes + self._assignment.nbytes + self._sizes.nbytes

    def _layout(self, device: Device) -> Layout:
        with device_lock(self.plan.device):
            centroids = self._quantization.enter(self.centroids, padded_columns(self.dim), device)
        return _listed(self._assignment, np.zeros_like(self._sizes), centroids)

    def _longer(
        self, plan: IndexPlan, rows: Rows, table: VectorTable, vectors: FloatArray, held: DeviceIndex
    ) -> tuple[TorchIVFIndex, Layout]:
        new, lock = VectorTable(vectors, self.metric), device_lock(plan.device)
        assigned = _assigned(new, self._quantization, self.centroids, held.device, lock)
        assignment = np.concatenate([self._assignment, assigned])
        index = TorchIVFIndex(plan, self.metric, rows, table, self._quantization, self.centroids, assignment)
        return index, _listed(assignment, self._sizes, held.centroids)


def _listed(assignment: npt.NDArray[np.int32], held: IntArray, centroids: Tensor) -> Layout:
    """Rows list after list, each list from a group of its own on.

    Args:
        assignment: int32 (n,), the list of each row.
        held: int64 (nlist,), how many of the first rows lie in each list already.
        centroids: on the device.
    """
    kept, sizes = int(held.sum()), np.bincount(assignment, minlength=len(held))
    groups, held_groups = -(-sizes // GROUP), -(-held // GROUP)
    first_group, held_first = np.cumsum(groups) - groups, np.cumsum(held_groups) - held_groups
    moved = np.arange(int(held_groups.sum())) + np.repeat(first_group - held_first, held_groups)
    order = np.argsort(assignment[kept:], kind="stable")
    own, more = assignment[kept:][order], sizes - held
    places = np.empty(len(own), np.int32)
    places[order] = (first_group * GROUP + held)[own] + np.arange(len(own)) - (np.cumsum(more) - more)[own]
    return Layout(padded_groups(int(groups.sum())), groups.tolist(), places, centroids, kept, moved)


def _trained(
    job: BuildJob, quantization: Quantization, device: Device, lock: AbstractContextManager[object]
) -> FloatArray:
    """Centroids float32 (nlist, dim) of a sample, as vectors are given."""
    nlist = job.plan.nlist
    job.progress("train", 0.0)
    sample = training_sample(job.source, max(CODE_TRAINING_POINTS, POINTS_PER_LIST * nlist), job.seed)
    operations, size = Operations(device, lambda _: None), 2 * len(sample) * padded_columns(sample.shape[1])
    with account_of(job.plan.device).scratch(size, "training"):
        with lock:
            x = _narrow(quantization, sample, device)
        found = train(
            x, nlist, seed=job.seed, operations=operations, progress=lambda f: job.progress("train", f), lock=lock
        )
        del x
    with lock:
        own: FloatArray = found[:, : sample.shape[1]].cpu().numpy()
    return np.ascontiguousarray(own / np.float32(quantization.scale) + quantization.centre, dtype=np.float32)


def _assigned(
    table: VectorTable,
    quantization: Quantization,
    centroids: FloatArray,
    device: Device,
    lock: AbstractContextManager[object],
) -> npt.NDArray[np.int32]:
    """The list of each row."""
    operations = Operations(device, lambda _: None)
    with lock:
        narrow = _narrow(quantization, centroids, device)
        norms = norms_of(narrow)
    found = np.empty(table.n, np.int32)
    for start, block in blocks_of(table):
        with lock:
            labels, _ = operations.assign(_narrow(quantization, block, device), narrow, norms)
            found[start : start + len(block)] = labels.cpu().numpy()
    return found


def _narrow(quantization: Quantization, vectors: FloatArray, device: Device) -> Tensor:
    """float16 (m, columns) on the device; what a training vector has beyond float16's range is cut."""
    torch, columns = load_torch(), padded_columns(vectors.shape[1])
    narrow = torch.empty((len(vectors), columns), dtype=torch.float16, device=device)
    for start in range(0, len(vectors), _ENTER_ROWS):
        wide = quantization.enter(vectors[start : start + _ENTER_ROWS], columns, device)
        narrow[start : start + _ENTER_ROWS] = wide.clamp_(-_LARGEST, _LARGEST)
    return narrow


ITERATIONS = 10
"""What faiss gives inverted lists; more improve the objective by less than 1 %."""
_NO_LOCK: AbstractContextManager[object] = nullcontext()
_ENOUGH = 1e-4
"""A relative improvement of the objective below this ends the training."""
_APART = 2.0**-7
"""By this share the two centroids of a split list are moved apart: 16 steps of float16."""


def train(
    x: Tensor,
    nlist: int,
    *,
    seed: int,
    operations: Operations,
    iterations: int = ITERATIONS,
    progress: Callable[[float], None] = lambda _: None,
    lock: AbstractContextManager[object] = _NO_LOCK,
) -> Tensor:
    """Centroids of the rows of ``x`` by Lloyd's steps: float32 (nlist, columns) on its device.

    The same arguments give the same bits.

    Args:
        x: float16 (m, columns), m at least nlist.
        nlist: how many.
        seed: decides the rows that training starts from.
        operations: for the device of ``x``.
        iterations: at most.
        progress: called with the finished fraction, 0 to 1.
        lock: the device's lock, held step by step.
    """
    torch = load_torch()
    chosen = np.sort(np.random.default_rng(seed).choice(len(x), nlist, replace=False))
    with lock:
        centroids = x[host_tensor(chosen).to(x.device)].to(torch.float32)
        before, own = float("inf"), float(torch.linalg.vector_norm(x, dtype=torch.float32)) ** 2 / len(x)
    for step in range(iterations):
        with lock:
            centroids, scores = _step(x, centroids, operations)
            now = own + float(scores.mean())
        progress((step + 1) / iterations)
        if before - now <= _ENOUGH * abs(now) and step:
            break
        before = now
    progress(1.0)
    return centroids


def norms_of(narrow: Tensor) -> Tensor:
    """|c|^2 of float16 rows, float32."""
    return narrow.to(load_torch().float32).square().sum(1)


def _step(x: Tensor, centroids: Tensor, operations: Operations) -> tuple[Tensor, Tensor]:
    """The means of the lists that the centroids make, and each row's score there."""
    torch = load_torch()
    narrow = centroids.to(torch.float16)
    labels, scores = operations.assign(x, narrow, norms_of(narrow))
    ordered = torch.sort(labels, stable=True)
    bounds = torch.arange(len(centroids) + 1, dtype=torch.int32, device=x.device)
    starts = torch.searchsorted(ordered.values, bounds)
    counts = starts.diff()
    sums = operations.sum_lists(x, ordered.indices, starts)
    means = sums / counts.clamp_min(1)[:, None]
    return _refilled(means, counts), scores


def _refilled(means: Tensor, counts: Tensor) -> Tensor:
    """Each empty list takes half of one of the largest: both centroids start a little apart."""
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return means
    large = counts.argsort(descending=True, stable=True)[: len(empty)]
    large, empty = large[counts[large] > 1], empty[: int((counts[large] > 1).sum())]
    means[empty] = means[large] * (1 + _APART)
    means[large] = means[large] * (1 - _APART)
    return means
