"""GPU resources of faiss: one locked object per device, unusable after a fork."""

from __future__ import annotations

import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import ModuleType

from ...errors import DeviceError, MemEvolveError
from ...types import FaissIndex, FaissObject
from ...utils.forking import call_in_child, lock
from ..device_failover import BusyError, cause_of, lost_devices, mark_lost
from ..faiss_support import load_faiss
from .sizes import CODE_BYTES, TEMPORARY_BYTES

FreeBytes = Callable[[int], "int | None"]
"""Free bytes of the GPU with this number; None where unknown."""

_NEEDED = ("StandardGpuResources", "GpuIndexFlat", "GpuIndexIVFScalarQuantizer")
_BUSY_POLL_S = 0.1
"""Seconds that a search waits for a device on which another thread builds."""

_by_device: dict[int, GpuResources] = {}
_registry = lock()


class _Reading:
    """Where free bytes are read; set once by the device manager."""

    free_bytes: FreeBytes | None = None


def use_free_bytes(reader: FreeBytes | None) -> None:
    """Check ``reader``'s free bytes before an allocation; without a reader, faiss' own refusal decides."""
    _Reading.free_bytes = staticmethod(reader) if reader is not None else None


def resources_of(device: str) -> GpuResources:
    """The resources of ``device`` (cuda or cuda:N), one object per process, made on first use.

    Raises:
        DeviceError: this faiss has no GPU indexes, there is no such GPU, or this process can no longer use it.
        EngineError: faiss cannot be loaded.
    """
    kind, _, text = device.partition(":")
    if kind != "cuda" or not (text == "" or (text.isascii() and text.isdigit())):
        raise DeviceError(f"plan.device is {device!r}; the faiss engine needs cuda or cuda:N")
    number, faiss = int(text or 0), load_faiss()
    with _registry:
        found = _by_device.get(number)
        if found is None or found.faiss is not faiss:
            _check(faiss, number)
            found = _by_device[number] = GpuResources(faiss, number)
    found.check()
    return found


def _check(faiss: ModuleType, number: int) -> None:
    if any(not hasattr(faiss, name) for name in _NEEDED):
        raise DeviceError("this faiss has no GPU indexes; install faiss-gpu instead of faiss-cpu, or set device to cpu")
    try:
        count = int(faiss.get_num_gpus())
    except RuntimeError as error:
        raise DeviceError(f"faiss cannot count the GPUs: {_first_line(error)}; update the NVIDIA driver") from error
    if number >= count:
        raise DeviceError(f"device cuda:{number} does not exist for faiss, which sees {count}; set device to cpu")


class GpuResources:
    """Holds a device's faiss resources and its lock."""

    def __init__(self, faiss: ModuleType, number: int) -> None:
        self.faiss, self.number, self.name = faiss, number, f"cuda:{number}"
        self._lock, self._forked = lock(), False
        self.resources: FaissObject = None
        self._handles: weakref.WeakSet[GpuIndexHandle] = weakref.WeakSet()
        self._retired: deque[list[FaissIndex]] = deque()
        self._building = 0
        self._seen_shapes: set[Hashable] = set()

    @property
    def lost(self) -> DeviceError | None:
        """Why this process can no longer use the device, whichever engine has lost it; None while it can."""
        if self._forked:
            return DeviceError(f"{self.name} belongs to the process before the fork; spawn instead", "fork")
        reason = lost_devices().get(self.name)
        return None if reason is None else DeviceError(f"{reason}; restart this process to use it again", "device-lost")

    def check(self) -> None:
        """Raise :attr:`lost`, if it is."""
        lost = self.lost
        if lost is not None:
            self.give_up()
            raise lost

    @contextmanager
    def using(self, doing: str, needed: int = 0, *, waits: bool = True) -> Iterator[None]:
        """Hold the device's lock, with its resources set up, after ``needed`` bytes were found to be free.

        Raises:
            BusyError: another thread builds there, and ``waits`` is False.
            DeviceError: the bytes are not free, faiss failed inside, or the device is lost to this process.
        """
        lock = self._lock
        while not lock.acquire(timeout=_BUSY_POLL_S):
            if self._building and not waits:
                raise BusyError(self.name)
        try:
            self.check()
            self._free_retired()
            self._require(doing, needed + (TEMPORARY_BYTES + CODE_BYTES if self.resources is None else 0))
            if self.resources is None:
                self.resources = _resources(self.faiss, self.number)
            yield
        except MemEvolveError:  # a progress callback may end a build
            raise
        except (RuntimeError, MemoryError) as error:
            traceback.clear_frames(error.__traceback__)
            raise self._refused(error, doing) from error
        finally:
            traceback.clear_frames(sys.exc_info()[2])  # calls that failed hold the index they were made on
            self._free_retired()
            lock.release()

    @contextmanager
    def searching(self, shape: Hashable) -> Iterator[None]:
        """As :meth:`using`, for a search that does not wait for builders. CUDA loads the code of a kernel when it is
        first launched, and faiss ends the process where there is no room for that: the first search of each ``shape``
        asks for it beforehand."""
        with self.using("searching", 0 if shape in self._seen_shapes else CODE_BYTES, waits=False):
            yield
            self._seen_shapes.add(shape)

    @contextmanager
    def building(self, doing: str, needed: int, *, keep: bool) -> Iterator[GpuIndexHandle]:
        """As :meth:`using`, with a handle for an index of ``needed`` bytes, which is freed under the lock unless the
        block succeeds and ``keep`` is set."""
        with self.using(doing, needed + CODE_BYTES):
            handle, kept = GpuIndexHandle(self, needed), False
            self._handles.add(handle)
            self._building += 1
            try:
                yield handle
                kept = keep
            finally:
                self._building -= 1
                if not kept:
                    self._retired.append(handle.held)

    def retire(self, held: list[FaissIndex]) -> None:
        """Free the indexes in ``held``: at once where the lock is free, else when it is next taken."""
        self._retired.append(held)
        if self._lock.acquire(blocking=False):
            try:
                self._free_retired()
            finally:
                self._lock.release()

    def give_up(self) -> None:
        """Never free what is on the device: that would be a call to a lost one, which ends the process."""
        for engine in (engine for handle in list(self._handles) for engine in handle.held):
            engine.this.disown()
        if self.resources is not None:
            self.resources.this.disown()

    def after_fork(self) -> None:
        """In a child: the parent's CUDA context does not exist."""
        self._forked = True
        self.give_up()

    def _free_retired(self) -> None:
        while self._retired:
            held = self._retired.popleft()
            for engine in held if self.lost is not None else ():
                engine.this.disown()
            held.clear()

    def _require(self, doing: str, needed: int) -> None:
        reader = _Reading.free_bytes
        free = None if reader is None or needed == 0 else reader(self.number)
        if free is not None and free < needed:
            raise DeviceError(
                f"{doing} needs {needed} bytes on {self.name}, {free} are free; lower gpu_memory_fraction or precision",
                "out-of-memory",
            )

    def _refused(self, error: BaseException, doing: str) -> DeviceError:
        """Any other error of CUDA inside faiss counts as one after which nothing works there."""
        cause, text = cause_of(error), str(error).lower()
        message = f"faiss failed on {self.name} while {doing}: {_first_line(error)}"
        if cause == "out-of-memory":
            return DeviceError(f"{message}; free memory on the device or lower precision", "out-of-memory")
        if cause == "device-lost" or "cuda" in text or "cublas" in text:
            mark_lost(self.name, message)
            self.give_up()
            return DeviceError(f"{message}; restart this process to use it again", "device-lost")
        return DeviceError(message, "device-error")


class GpuIndexHandle:
    """An index on a device, ``nbytes`` there. Its resources free it when this object is collected, in any thread.

    It is freed under their lock, when they empty ``held``, the list that holds it: a second reference would free it
    elsewhere, so keep none.
    """

    def __init__(self, gpu_resources: GpuResources, nbytes: int) -> None:
        self.gpu_resources, self.nbytes = gpu_resources, nbytes
        self.held: list[FaissIndex] = []
        weakref.finalize(self, gpu_resources.retire, self.held)

    @property
    def engine(self) -> FaissIndex:
        """The index."""
        return self.held[0]

    def make(self, name: str, *arguments: object, **fields: FaissIndex) -> FaissIndex:
        """Make the index, of faiss' class ``name`` without cuVS; ``fields`` of its configuration. Under the lock.

        Its Python part keeps arguments of the constructor for as long as it lives; one may be the index whose rows were
        just copied to the device, so they are taken away.
        """
        faiss = self.gpu_resources.faiss
        config = getattr(faiss, f"{name}Config")()
        config.device, config.use_cuvs = self.gpu_resources.number, False
        for field, value in fields.items():
            setattr(config, field, value)
        self.held.append(getattr(faiss, name)(self.gpu_resources.resources, *arguments, config))
        self.engine.referenced_objects = []
        return self.engine


def _resources(faiss: ModuleType, number: int) -> FaissObject:
    """Resources with a fixed amount of temporary memory and no pinned host memory, since transfers are small.

    Made in full or not at all: faiss would use half-made ones and follow a null pointer later.
    """
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(TEMPORARY_BYTES)
    resources.setPinnedMemory(0)
    resources.getDefaultStream(number)  # sets up all that belongs to the device, temporary memory last
    return resources


def _first_line(error: BaseException) -> str:
    """The message of a faiss error, without the function and source line in front of it."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.rpartition("Error: ")[2][:300]


def _after_fork() -> None:
    for gpu_resources in _by_device.values():
        gpu_resources.after_fork()


call_in_child(_after_fork)
