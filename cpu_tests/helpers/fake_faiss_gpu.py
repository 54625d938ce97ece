"""A faiss with GPU indexes for machines without a GPU: CPU indexes that refuse whatever faiss-gpu refuses.

Selectors are ignored, more than 2,048 results or lists are an error, nothing can be removed, memory is limited, and two
threads on one card at once are noticed. What would end the process there raises :class:`Ended` here, which nobody
catches. Names that faiss' classes do not have are refused, and arguments that its Python keeps alive are kept.

Written after faiss 1.15.1. Loaded through the loader of faiss.
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

__all__ = ["CODE", "FIELDS", "HIDDEN", "Card", "Ended", "gpu_faiss"]

faiss: Any = importlib.import_module("faiss")  # its stubs know nothing of the parts that wrappers use
MOST = 2048
CODE = 1 << 16
"""Bytes that a kernel's code takes when it is first launched."""
FIELDS: dict[str, dict[str, Any]] = {
    "GpuIndexFlatConfig": {"useFloat16": False, "storeTransposed": False},
    "GpuIndexIVFScalarQuantizerConfig": {
        "indicesOptions": 3,
        "interleavedLayout": True,
        "allowCpuCoarseQuantizer": False,
    },
}
"""What each configuration has beside ``device``, ``memorySpace`` and ``use_cuvs``, with its default."""
HIDDEN = {"code_size", "codes", "compute_distance_subset", "get_CodePacker", "get_FlatCodesDistanceComputer", "get_xb"}
HIDDEN |= {"permute_entries", "permute_entries_c"}
"""What a flat index on the CPU has and one on a GPU has not."""


class Ended(BaseException):
    """The process would have ended here."""


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
        self.handles: set[int] = set()
        """Resources that have begun to set up the device."""
        self.violations = 0
        self.searches: list[tuple[int, int, int]] = []
        """(queries, results, lists) of each search."""
        self.slow = 0.0
        self.loaded: set[tuple[object, ...]] = set()
        """Kernels whose code is there."""
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

    def launch(self, *kernel: object) -> None:
        """Load the code of a kernel that was not launched before."""
        if kernel not in self.loaded and self.free() < CODE:
            raise Ended(f"no room for the code of {kernel}")
        self.loaded.add(kernel)

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
        self._owned = True

    def disown(self) -> None:
        self._owned = False

    def own(self) -> bool:
        return self._owned


def gpu_faiss(card: Card) -> ModuleType:
    """The installed faiss with GPU classes that lie on ``card``, GPU number 0."""
    module = ModuleType("faiss")
    module.__dict__.update(faiss.__dict__)
    for made in (*_classes(card), *_configs()):
        setattr(module, made.__name__, made)
    module.get_num_gpus = lambda: 1  # type: ignore[attr-defined]
    module.INDICES_32_BIT, module.INDICES_64_BIT = 2, 3  # type: ignore[attr-defined]
    return module


def _classes(card: Card) -> list[type]:
    on = {"card": card}
    return [
        type("StandardGpuResources", (_Resources,), on),
        type("GpuIndexFlat", (_Flat,), on),
        type("GpuIndexIVFScalarQuantizer", (_Lists,), on),
    ]


class _Config:
    """Fields with defaults; SWIG would take a misspelt one in silence."""

    def __setattr__(self, name: str, value: object) -> None:
        if not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        super().__setattr__(name, value)


def _configs() -> list[type]:
    shared = {"device": 0, "memorySpace": 1, "use_cuvs": False}
    return [type(name, (_Config,), shared | own) for name, own in FIELDS.items()]


def _check_arguments(index: str, resources: Any, config: Any) -> None:
    """Refuse what the constructor of a GPU index refuses."""
    if type(resources).__name__ != "StandardGpuResources" or type(config).__name__ != f"{index}Config":
        raise TypeError(f"Wrong number or type of arguments for overloaded function 'new_{index}'.")
    if config.device != 0:
        raise RuntimeError(f"Error: 'config_.device < getNumDevices()' failed: Invalid GPU device {config.device}")
    if config.use_cuvs:
        raise RuntimeError("Error: cuVS has not been compiled into the current version so it cannot be used.")


class _Resources:
    card: Card

    def __init__(self) -> None:
        self.this = _Handle()
        self.begun = self.whole = False
        self.temporary = 1536 << 20

    def __del__(self) -> None:
        if self.this.own():
            self.card.held.pop(id(self), None)
            self.card.handles.discard(id(self))

    def setTempMemory(self, size: int) -> None:  # noqa: N802 - faiss' name
        self.temporary = size

    def setPinnedMemory(self, size: int) -> None:  # noqa: N802 - faiss' name
        if self.begun:
            raise Ended("pinned memory of devices in use")
        self.pinned = size

    def getDefaultStream(self, number: int) -> object:  # noqa: N802 - faiss' name
        if number != 0:
            raise Ended("device < getNumDevices()")
        with self.card.entered():
            self.initialise()
        return object()

    def initialise(self) -> None:
        if self.begun:
            if not self.whole:
                raise Ended("a null pointer in resources that were set up half")
            return
        self.begun = True
        self.card.handles.add(id(self))
        self.card.take(id(self), self.temporary)
        self.whole = True

    def getMemoryInfo(self) -> dict[int, dict[str, tuple[int, int]]]:  # noqa: N802 - faiss' name
        with self.card.entered():
            return {0: {"FlatData": (len(self.card.held), sum(self.card.held.values()))}} if self.whole else {}


class _Flat(faiss.IndexFlat):  # type: ignore[misc]  # faiss is Any here
    """A CPU index to faiss' k-means, a GPU index to Python."""

    card: Card
    half = False

    def __init__(self, resources: Any, dim: int, metric: int, config: Any) -> None:
        _check_arguments("GpuIndexFlat", resources, config)
        super().__init__(dim, metric)
        self.half = config.useFloat16
        with self.card.entered():
            resources.initialise()
        self.referenced_objects = [dim]

    def __getattribute__(self, name: str) -> Any:
        if name in HIDDEN:
            raise AttributeError(f"'GpuIndexFlat' object has no attribute {name!r}")
        return super().__getattribute__(name)

    def __del__(self) -> None:
        if getattr(self, "this", None) is not None and self.this.own() and id(self) in self.card.held:
            with self.card.entered():
                del self.card.held[id(self)]

    def add(self, x: Any) -> None:
        with self.card.entered():
            self.card.launch("norms", self.half)
            self.card.take(id(self), x.shape[0] * x.shape[1] * (2 if self.half else 4))
            self.card.take(id(self), 4 * x.shape[0])
            super().add(self._stored(x))

    def search(self, x: Any, k: int) -> Any:
        distances, labels = np.empty((len(x), k), np.float32), np.empty((len(x), k), np.int64)
        ptr = faiss.swig_ptr
        self.search_c(len(x), ptr(x), k, ptr(distances), ptr(labels))
        return distances, labels

    def search_c(self, nq: int, x: Any, k: int, distances: Any, labels: Any, params: Any = None) -> None:
        del params
        with self.card.entered():
            self.card.launch("flat", self.half, self.metric_type, (k - 1).bit_length())
            self.card.search(nq, k, 0, nq * min(self.ntotal, 262_144) * 8)
            queries = self._stored(faiss.rev_swig_ptr(x, nq * self.d).reshape(nq, self.d))
            if self.half and self.metric_type == faiss.METRIC_L2:
                near, found = self._by_squares(queries, k)
                faiss.rev_swig_ptr(distances, nq * k)[:] = near.ravel()
                faiss.rev_swig_ptr(labels, nq * k)[:] = found.ravel()
            else:
                super().search_c(nq, faiss.swig_ptr(queries), k, distances, labels)

    def remove_ids(self, x: Any) -> None:
        raise RuntimeError("remove_ids not implemented for this type of index")

    def _stored(self, x: Any) -> Any:
        return x.astype(np.float16).astype(np.float32) if self.half else np.ascontiguousarray(x)

    def _by_squares(self, queries: Any, k: int) -> tuple[Any, Any]:
        """Squares of components are rounded to float16, and may be infinite there."""
        rows = self.reconstruct_n(0, self.ntotal)
        with np.errstate(over="ignore"):
            squares = (rows.astype(np.float16) ** 2).astype(np.float32).sum(axis=1)
        near = squares - 2 * queries @ rows.T
        order = np.argsort(near, axis=1, kind="stable")[:, :k]
        near = np.take_along_axis(near, order, axis=1)
        missing = ((0, 0), (0, k - order.shape[1]))
        found = np.pad(np.where(np.isfinite(near), order, -1), missing, constant_values=-1)
        return np.pad(near, missing, constant_values=np.inf), found


class _Lists:
    card: Card

    def __init__(self, resources: Any, index: Any, config: Any) -> None:
        _check_arguments(type(self).__name__, resources, config)
        if type(index).__name__ != "IndexIVFScalarQuantizer":
            raise TypeError(f"Wrong number or type of arguments: {type(index).__name__}")
        self.this = _Handle()
        self._indices = config.indicesOptions
        self._cpu = faiss.clone_index(index)
        with self.card.entered():
            resources.initialise()
            lengths = [index.invlists.list_size(i) for i in range(index.nlist)]
            rows = sum(-(-length // 32) * 32 for length in lengths)
            numbers = (4 if self._indices == 2 else 8) * index.ntotal
            self.card.take(id(self), rows * index.code_size + numbers + index.nlist * (4 * index.d + 28))
        self.referenced_objects = [index]

    def __del__(self) -> None:
        if getattr(self, "this", None) is not None and self.this.own() and id(self) in self.card.held:
            with self.card.entered():
                del self.card.held[id(self)]

    def search_c(self, nq: int, x: Any, k: int, distances: Any, labels: Any, params: Any = None) -> None:
        if params is not None and type(params).__name__ != "SearchParametersIVF":
            raise RuntimeError("Error: GPU IVF index: passed unhandled SearchParameters class to search function")
        obeyed = faiss.SearchParametersIVF()
        obeyed.nprobe = 1 if params is None else params.nprobe
        with self.card.entered():
            self.card.launch(type(self).__name__, self._cpu.metric_type, (k - 1).bit_length())
            scratch = nq * obeyed.nprobe * (self._cpu.d * 4 + 12 * k)
            self.card.search(nq, k, obeyed.nprobe, scratch)
            self._cpu.search_c(nq, x, k, distances, labels, obeyed)

    def remove_ids(self, x: Any) -> None:
        raise RuntimeError("remove_ids not implemented for this type of index")
