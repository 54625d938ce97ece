"""How many bytes an index takes on the host and on a GPU, and whether and in which shape it goes to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..index.costs import WHOLE_ROWS
from ..index.faiss_gpu.sizes import TEMPORARY_BYTES
from ..index.faiss_gpu.sizes import plan_device_bytes as faiss_bytes
from ..index.faiss_helpers import aligned_bytes
from ..index.sample import default_codes, padded_dim
from ..index.torch_gpu.memory_accounting import SCRATCH, WORKSPACE
from ..index.torch_gpu.memory_accounting import predicted_bytes as torch_bytes
from ..types import IndexPlan, Precision

EngineSetting = Literal["auto", "torch", "faiss"]

_SPARED = 0.5
"""Share of the limit up to which float32 rows may be on the device beside the narrow ones; the rest is for others."""


def device_bytes(plan: IndexPlan, n: int, dim: int) -> int:
    """Bytes on the device of ``n`` vectors of ``dim`` dimensions, mask and scratch included; 0 for plans on the CPU.

    Without :func:`scratch_bytes`, within 10 % of what the index reports. For a torch index the least that it needs: see
    :func:`sized`.
    """
    if plan.engine == "torch":
        return torch_bytes(n, dim, plan.precision, nlist=plan.nlist)
    return faiss_bytes(plan, n, dim) if plan.engine == "faiss" else 0


def scratch_bytes(plan: IndexPlan) -> int:
    """Bytes of :func:`device_bytes` that all searches on the device share, and that belong to no index."""
    return {"torch": SCRATCH + WORKSPACE, "faiss": TEMPORARY_BYTES}.get(plan.engine, 0)


def kept_bytes(plan: IndexPlan) -> int:
    """The part of :func:`scratch_bytes` that the engine keeps once it has been used; torch's allocator has the rest."""
    return {"torch": WORKSPACE if plan.device.startswith("cuda") else 0, "faiss": TEMPORARY_BYTES}.get(plan.engine, 0)


def sized(plan: IndexPlan, n: int, dim: int, limit: int) -> Iterator[IndexPlan]:
    """``plan`` with its predicted ``device_bytes``, in each form that fits ``limit`` bytes, best first.

    With float32 rows on the device, torch reranks there and needs no copy to the host.
    """
    if plan.engine == "torch" and plan.precision == "float32":
        whole = torch_bytes(n, dim, plan.precision, nlist=plan.nlist, float32_rows=True)
        if whole <= _SPARED * limit:
            yield replace(plan, device_bytes=whole)
    least = device_bytes(plan, n, dim)
    if least <= limit:
        yield replace(plan, device_bytes=least)


EXACT_BYTES = 2 << 30
"""Device bytes up to which an exact scan is preferred to lists under index_type auto: 2 GiB are read in 0.45 ms at
4.8 TB/s (an H200 by its datasheet), and in 7 ms at 0.3 TB/s. Not tuned on a GPU yet."""

_EXACT_RECALL = 0.995
"""Above this target lists save nothing."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What a plan needs to know of a GPU.

    device: ``cuda:N``. name: of the card. limit_bytes: what this store's index may take there; bound: the setting that
    limits it. engines: those that can be used, best first; missing: why the others cannot. setting: GPU_ENGINE.
    requested: the GPU is requested explicitly. problem: why the device is not used at present, else empty.
    """

    device: str
    name: str
    limit_bytes: int
    engines: tuple[Literal["torch", "faiss"], ...]
    missing: str = ""
    setting: EngineSetting = "auto"
    requested: bool = False
    problem: str = ""
    bound: Literal["GPU_MEMORY_FRACTION", "GPU_MAX_MEMORY_MB"] = "GPU_MEMORY_FRACTION"


def on_device(
    host: IndexPlan,
    state: DeviceState,
    *,
    count: int,
    dim: int,
    nlist: int,
    index_type: str,
    target_recall: float,
    precisions: tuple[Precision, ...],
    budget: int,
) -> IndexPlan:
    """The plan on the device, or ``host`` with a note that says why not, and a ``refusal`` where that is a failure.

    Args:
        host: the plan for the CPU.
        state: the device.
        count: how many vectors.
        dim: their dimension.
        nlist: number of lists, where lists are used.
        index_type: flat, ivf, hnsw or auto.
        target_recall: in (0, 1].
        precisions: of the rows on the device, best first; final distances are in float32.
        budget: host memory in bytes that the finished index may take.
    """
    if state.problem:
        return _noted(host, state.problem)
    if index_type == "hnsw":
        return _noted(host, "no GPU engine has graphs; the CPU instead", "kind")
    engine = next((each for each in state.engines if state.setting in ("auto", each)), None)
    if engine is None:
        why = "no GPU engine can be used" if state.setting == "auto" else f"GPU_ENGINE={state.setting} cannot be used"
        return _noted(host, f"{why} ({state.missing})" if state.missing else why, "engine")
    why = f"engine {engine}" + ("" if state.setting == "auto" else " by GPU_ENGINE")
    base = IndexPlan("exact", engine=engine, device=state.device)
    lists = replace(base, kind="ivf", nlist=nlist)
    smallest = 0
    for kind in _kinds(index_type, target_recall, lambda: device_bytes(base, count, dim)):
        for precision in precisions:
            plan = replace(base if kind == "exact" else lists, precision=precision)
            smallest = device_bytes(plan, count, dim)
            fitting = next(sized(plan, count, dim, state.limit_bytes), None)
            on_host = plan_bytes(replace(plan, kind="exact"), count, dim)
            if fitting is not None and on_host <= budget:
                return _described(replace(fitting, bytes=on_host), state, count, why)
    room = f"{smallest >> 20} MB do not fit the {state.limit_bytes >> 20} MB allowed there by {state.bound}"
    return _noted(host, f"{state.name} ({state.device}): {room}; the CPU instead", "limit")


def _kinds(index_type: str, target_recall: float, exact_bytes: Callable[[], int]) -> tuple[str, ...]:
    """The kinds to try, best first."""
    if index_type == "flat" or target_recall > _EXACT_RECALL:
        return ("exact",)
    if index_type == "ivf":
        return ("ivf",)
    return ("exact",) if exact_bytes() <= EXACT_BYTES else ("ivf", "exact")


def _described(plan: IndexPlan, state: DeviceState, count: int, why: str) -> IndexPlan:
    shape = f"{plan.nlist} lists" if plan.kind == "ivf" else "exact scan"
    there = f"{plan.device_bytes >> 20} MB of {state.limit_bytes >> 20} MB allowed on the device"
    note = f"{there}, {plan.bytes >> 20} MB on the host"
    reason = f"{shape} of {count} units on {state.name} ({state.device}); {why}; {note}"
    return replace(plan, reason=reason, notes=(why, note))


def _noted(host: IndexPlan, note: str, refusal: Literal["", "limit", "engine", "kind"] = "") -> IndexPlan:
    return replace(host, reason=f"{host.reason}; {note}", notes=(*host.notes, note), refusal=refusal)


DEFAULT_ID_BYTES = 16.0
"""Assumed length of an id in UTF-8 bytes."""

_SLOT_BYTES = 8 + 8
"""A slot and the end of its id."""
_ASSIGNED = 4
"""The list of a row; the centroids of the lists are mapped from a file."""
_HNSW_LINKS = 32
_BLOCK = 32
_CENTROID_VALUES = 16


def plan_bytes(plan: IndexPlan, n: int, dim: int, id_bytes: float = DEFAULT_ID_BYTES) -> int:
    """Memory in bytes of the finished index that ``plan`` makes of ``n`` vectors of ``dim`` dimensions.

    Vectors mapped from a file are not counted; only a graph keeps its own. ``id_bytes`` is the mean length of
    an id. Within 10 % of what the index reports (tested).
    """
    total = n * (_SLOT_BYTES + id_bytes)
    codes = plan.codes or default_codes(dim)
    if plan.kind == "two_stage":
        total += code_bytes(n, dim, codes)
    elif plan.kind == "ivf":
        whole = n <= WHOLE_ROWS
        total += code_bytes(n, dim, codes) + _ASSIGNED * n if whole else _list_bytes(n, dim, codes, max(1, plan.nlist))
    elif plan.kind == "hnsw":
        # Links of 32 bits: 64 on the ground level, 32 on each higher one (reached by a 32nd part); offsets and levels.
        links = 4 * (2 * _HNSW_LINKS + _HNSW_LINKS / (_HNSW_LINKS - 1)) + 8 + 4
        total += n * links + 4 * n * dim
    return int(total)


def code_bytes(n: int, dim: int, codes: int) -> int:
    """Bytes of ``n`` rows of 4-bit codes, packed in blocks of 32 rows, and their 16 centroids."""
    packed = -(-n // _BLOCK) * _BLOCK * ((codes + 1) // 2)
    return packed + _CENTROID_VALUES * 4 * padded_dim(dim, codes)


def _list_bytes(n: int, dim: int, codes: int, nlist: int) -> int:
    """Codes in lists whose lengths spread around the mean, a 64-bit row number each, and both kinds of centroids."""
    mean = n / nlist
    one_list = sum(
        aligned_bytes(-(-max(1, int(mean * share)) // _BLOCK) * _BLOCK * ((codes + 1) // 2))
        for share in (0.5, 0.75, 1, 1.25, 1.5)
    )
    width = padded_dim(dim, codes)
    return nlist * one_list // 5 + 8 * n + nlist * width * 4 + _CENTROID_VALUES * 4 * width
