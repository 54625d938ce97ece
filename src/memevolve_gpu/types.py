"""Values that several packages share, without logic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # named here, imported where it is used: it need not be installed
    import torch

FAISS_FOR_GPUS = (
    *("faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs"),
    *("faiss-gpu-cu12-cuvs", "faiss-gpu-cu13-cuvs", "faiss-cuda"),
)
"""Distributions of faiss with GPU indexes; each installs the folder ``faiss``."""

Json: TypeAlias = Any
"""A JSON value of a unit, a filter or a file: None, a bool, a number, a text, or a list or an object of them."""
JsonObject = dict[str, Json]
MemoryUnit = JsonObject
"""A JSON object with ``id``, ``type``, ``content``, ``tags`` and ``metadata``; other keys are kept as they are."""
Filters = Mapping[str, object]
"""Conditions on units, such as ``{"type": "skill"}`` or ``{"metadata.score": {"gte": 0.5}}``."""
Ttl = float | timedelta | None
"""Seconds, or a timedelta, after which a unit expires; None where none is given."""
Moment = float | datetime | None
"""Unix time in seconds, or a datetime with its zone; None where none is given."""
T = TypeVar("T")
Each: TypeAlias = T | Sequence[T]
"""One value for all units, or a list with one for each."""
Vectors: TypeAlias = "npt.ArrayLike | torch.Tensor"
"""Numbers (n, dim) that numpy can read, or an array on a device: torch, cupy, or one with ``__dlpack__``."""

Metric = Literal["l2", "cosine", "ip"]
Precision = Literal["float32", "float16", "int8"]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
DoubleArray = npt.NDArray[np.float64]
AnyArray = npt.NDArray[np.generic]
"""An array of any type of numbers."""
FaissIndex: TypeAlias = Any
"""An index of faiss, of any of its classes, which have no complete types."""
FaissObject: TypeAlias = Any
"""Parameters, selectors and resources of faiss; likewise."""
Tensor: TypeAlias = "torch.Tensor"
Matrix: TypeAlias = "FloatArray | torch.Tensor"
"""Rows of float32 on the host or on a device."""
Device: TypeAlias = "torch.device"
Stream: TypeAlias = "torch.cuda.Stream"
Event: TypeAlias = "torch.cuda.Event"


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result.

    Attributes:
        unit: the stored unit, a copy.
        id: its id.
        distance: squared L2, 1 - cosine or -dot, by the store's metric; the smaller, the more similar.
        score: 1 / (1 + distance) for l2, the cosine for cosine, the dot product for ip; the larger, the more similar.
        namespace: the path of its namespace; empty for the default one.

    Examples:
        >>> from memevolve_gpu import Hit
        >>> hit = Hit({"id": "a", "content": "close the file"}, "a", distance=0.25, score=0.8)
        >>> hit.unit["content"], hit.score
        ('close the file', 0.8)
    """

    unit: MemoryUnit
    id: str
    distance: float
    score: float
    namespace: tuple[str, ...] = ()


class Op:
    """What a log entry did to its slot."""

    PUT = 1
    """A row version was stored."""
    DROP = 2
    """A row version is gone (deleted, or replaced by a PUT of the same transaction)."""
    EDIT = 3
    """The unit changed in place; its vector did not."""
    CLEAR = 4
    """Every slot up to and including this one is gone."""


class Head(NamedTuple):
    """The counters of a store, as of one moment.

    ``last_seq`` numbers the newest log entry, ``horizon`` the newest purged one (both 0 in a new store);
    ``last_slot`` is the newest slot ever given out; ``count`` the live units.
    """

    last_seq: int
    horizon: int
    last_slot: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which means nothing here


class Change(NamedTuple):
    """A log entry with its row; ``id`` and ``vector`` are None when that row is already gone.

    ``op`` is one of :class:`Op`; ``vector`` holds ``dim`` little-endian float32; ``ns`` is the key of the row's
    namespace, ``expires_at`` the Unix time from which the row is gone, None for never.
    """

    seq: int
    op: int
    slot: int
    id: str | None
    vector: bytes | None
    ns: int = 0
    expires_at: float | None = None


class Row(NamedTuple):
    """A live row version for an index; as in :class:`Change`."""

    slot: int
    id: str
    vector: bytes
    ns: int = 0
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Parallel arrays of n row versions, slots strictly ascending: what an index is built from.

    slots int64 (n,); id_bytes uint8, the UTF-8 ids one after another; id_ends int64 (n,), where each id ends in
    ``id_bytes``; vectors float32 (n, dim), C-contiguous, already normalised under cosine.
    """

    slots: IntArray
    id_bytes: npt.NDArray[np.uint8]
    id_ends: IntArray
    vectors: FloatArray


@dataclass(frozen=True, slots=True)
class SearchParams:
    """How hard an index tries: lists probed, candidates reranked, HNSW beam width. Each index reads what it knows.

    goes_on: whether queries that are not sure of their results take more (see ``index/fastscan.py``).
    """

    nprobe: int = 0
    rerank: int = 0
    ef: int = 0
    exact: bool = False
    goes_on: bool = True


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """Which index to build and why.

    kind: exact, two_stage, ivf or hnsw; nlist: 0 where no lists are used; codes: number of 4-bit codes per vector,
    0 where none; precision of the rerank vectors; bytes: predicted memory of the finished index; reason: one sentence.
    engine: what searches it, faiss-cpu (``cpu``), torch or faiss-gpu (``faiss``); device: ``cpu`` or ``cuda:N``;
    device_bytes: predicted memory on that device, scratch included, 0 on the CPU. refusal: what keeps it from a device
    that could be of use (no room there, no engine that works, no engine with such an index); empty where nothing does.
    """

    kind: Literal["exact", "two_stage", "ivf", "hnsw"]
    nlist: int = 0
    codes: int = 0
    precision: Precision = "float32"
    bytes: int = 0
    reason: str = ""
    notes: tuple[str, ...] = field(default=())
    engine: Literal["cpu", "torch", "faiss"] = "cpu"
    device: str = "cpu"
    device_bytes: int = 0
    refusal: Literal["", "limit", "engine", "kind"] = ""


@dataclass(frozen=True, slots=True)
class DeviceIncident:
    """What went wrong on a device, and what was done instead. The query was answered.

    cause: what the device said; action: the batch was cut smaller, the CPU answered (until the device has room again,
    or until this process restarts), or the device serves again; detail: one sentence for the operator.
    """

    device: str
    cause: Literal["out-of-memory", "device-lost", "device-error", "fork", "limit", "recovered"]
    action: Literal["smaller-batch", "cpu", "cpu-until-restart", "device-again"]
    detail: str
