"""A faiss with GPU indexes for machines without a GPU: CPU indexes that refuse whatever faiss-gpu refuses.

Selectors are ignored, more than 2,048 results or lists are an error, nothing can be removed, memory is limited, and two
threads on one card at once are noticed. Loaded through the faiss door.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["Card", "gpu_faiss"]

faiss: Any = importlib.import_module("faiss")  # its stubs know nothing of the parts that wrappers use
MOST = 2048


class Card:
    """The memory of one GPU, and who is on it. ``others`` are bytes that other processes hold."""

    def __init__(self, total: int = 1 << 40) -> None:
        self.total = total
        self.others = 0
        self.scratch_left: int | None = None
        """Bytes that a search may take for a moment; None for any."""
        self.failing = ""
        """The text of the error that every search raises."""
        self.held: dict[int, int] = {}
        self.violations = 0
        self.searches: list[tuple[int, int, int]] = []
        """(queries, results, lists) of each search."""
        self.slow = 0.0
        self._busy = threading.Lock()

    def free(self, number: int = 0) -> int:
        del number
        return max(0, self.total - self.others - sum(self.held.values()))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Notice whoever comes while another is inside."""
        if not self._busy.acquire(blocking=False):
            self.violations += 1
            raise RuntimeError("two threads on one device")
        try:
            time.sleep(self.slow)
            yield
        finally:
            self._busy.release()

    def take(self, key: int, size: int) -> None:
        if size > self.free():
            raise refused(size)
        self.held[key] = self.held.get(key, 0) + size

    def search(self, nq: int, k: int, nprobe: int, scratch: int) -> None:
        if k > MOST or nprobe > MOST:
            raise RuntimeError(f"Error in search: Error: GPU index only supports min/max-K selection up to {MOST}")
        if self.failing:
            raise RuntimeError(self.failing)
        if self.scratch_left is not None and scratch > self.scratch_left:
            raise refused(scratch)
        self.searches.append((nq, k, nprobe))


def refused(size: int) -> RuntimeError:
    return RuntimeError(
        "Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory(const faiss::gpu::AllocRequest&) at "
        "/project/faiss/gpu/StandardGpuResources.cpp:582: Error: 'err == cudaSuccess' failed: StandardGpuResources: "
        f"alloc fail type TemporaryMemoryOverflow dev 0 space Device stream 0x1 size {size} bytes (cudaMalloc error "
        "out of memory [2])\n"
    )


class _Handle:
    """What SWIG keeps of an object: whether Python frees it."""

    def __init__(self) -> None:
        self.owned = True

    def disown(self) -> None:
        self.owned = False


def gpu_faiss(card: Card) -> ModuleType:
    """The installed faiss with GPU classes that lie on ``card``, GPU number 0."""
    module = ModuleType("faiss")
    module.__dict__.update(faiss.__dict__)
    for made in (_resources(card), _flat(card), *_lists(card), *_configs()):
        setattr(module, made.__name__, made)
    module.get_num_gpus = lambda: 1  # type: ignore[attr-defined]
    module.INDICES_32_BIT, module.INDICES_64_BIT = 2, 3  # type: ignore[attr-defined]
    return module


def _configs() -> list[type]:
    fields = {"device": 0, "use_cuvs": False}
    own: dict[str, dict[str, Any]] = {
        "GpuIndexFlatConfig": {"useFloat16": False},
        "GpuIndexIVFFlatConfig": {"indicesOptions": 3},
        "GpuIndexIVFScalarQuantizerConfig": {"indicesOptions": 3},
    }
    return [type(name, (), fields | more) for name, more in own.items()]


def _resources(card: Card) -> type:
    class StandardGpuResources:
        def __init__(self) -> None:
            self.this = _Handle()
            self.temporary = 1536 << 20

        def setTempMemory(self, size: int) -> None:  # noqa: N802 - faiss' name
            self.temporary = size

        def setPinnedMemory(self, size: int) -> None:  # noqa: N802 - faiss' name
            self.pinned = size

        def initialise(self) -> None:
            if id(card) not in card.held:
                card.take(id(card), self.temporary)

        def getMemoryInfo(self) -> dict[int, dict[str, tuple[int, int]]]:  # noqa: N802 - faiss' name
            with card.entered():
                return {0: {"FlatData": (len(card.held), sum(card.held.values()))}}

    return StandardGpuResources


def _flat(card: Card) -> type:
    class GpuIndexFlat(faiss.IndexFlat):  # type: ignore[misc]  # faiss is Any here
        """A CPU index to faiss' k-means, a GPU index to Python."""

        half = False

        def __init__(self, resources: Any, dim: int, metric: int, config: Any) -> None:
            super().__init__(dim, metric)
            self.half = config.useFloat16
            with card.entered():
                resources.initialise()

        def __del__(self) -> None:
            if getattr(self, "this", None) is not None and self.this.own() and id(self) in card.held:
                with card.entered():
                    del card.held[id(self)]

        def add(self, x: Any) -> None:
            with card.entered():
                card.take(id(self), x.shape[0] * (x.shape[1] * (2 if self.half else 4) + 4))
                super().add(self._stored(x))

        def search(self, x: Any, k: int) -> Any:
            distances, labels = np.empty((len(x), k), np.float32), np.empty((len(x), k), np.int64)
            ptr = faiss.swig_ptr
            self.search_c(len(x), ptr(x), k, ptr(distances), ptr(labels))
            return distances, labels

        def search_c(self, nq: int, x: Any, k: int, distances: Any, labels: Any, params: Any = None) -> None:
            del params
            with card.entered():
                card.search(nq, k, 0, nq * min(self.ntotal, 262_144) * 8)
                queries = self._stored(faiss.rev_swig_ptr(x, nq * self.d).reshape(nq, self.d))
                super().search_c(nq, faiss.swig_ptr(queries), k, distances, labels)

        def remove_ids(self, x: Any) -> None:
            raise RuntimeError("remove_ids not implemented for this type of index")

        def _stored(self, x: Any) -> Any:
            return x.astype(np.float16).astype(np.float32) if self.half else np.ascontiguousarray(x)

    return GpuIndexFlat


def _lists(card: Card) -> list[type]:
    class Base:
        kind: type

        def __init__(self, resources: Any, index: Any, config: Any) -> None:
            if type(index).__name__ != self.kind.__name__:
                raise TypeError(f"Wrong number or type of arguments: {type(index).__name__}")
            self.this = _Handle()
            self.indices = config.indicesOptions
            self._cpu = faiss.clone_index(index)
            with card.entered():
                resources.initialise()
                lengths = [index.invlists.list_size(i) for i in range(index.nlist)]
                rows = sum(-(-length // 32) * 32 for length in lengths)
                numbers = (4 if self.indices == 2 else 8) * index.ntotal
                card.take(id(self), rows * index.code_size + numbers + index.nlist * (4 * index.d + 28))

        def __del__(self) -> None:
            if getattr(self, "this", None) is not None and self.this.owned and id(self) in card.held:
                with card.entered():
                    del card.held[id(self)]

        def search_c(self, nq: int, x: Any, k: int, distances: Any, labels: Any, params: Any = None) -> None:
            obeyed = faiss.SearchParametersIVF()
            obeyed.nprobe = 1 if params is None else params.nprobe
            with card.entered():
                card.search(nq, k, obeyed.nprobe, nq * obeyed.nprobe * self._cpu.d * 4)
                self._cpu.search_c(nq, x, k, distances, labels, obeyed)

        def remove_ids(self, x: Any) -> None:
            raise RuntimeError("remove_ids not implemented for this type of index")

    return [
        type("GpuIndexIVFFlat", (Base,), {"kind": faiss.IndexIVFFlat}),
        type("GpuIndexIVFScalarQuantizer", (Base,), {"kind": faiss.IndexIVFScalarQuantizer}),
    ]
