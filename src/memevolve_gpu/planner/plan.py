"""Which body to build: a pure function of the store's size, its settings and the memory it may use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from ..errors import CapacityError
from ..index.costs import LIST, codes_cost, scan_cost
from ..index.sample import default_codes
from ..types import IndexPlan, Metric, Precision
from .device import DeviceFacts, on_device
from .effort import effort_for
from .nlist import DEFAULT_NLIST_MIN, DEFAULT_VECTORS_PER_CENTROID, should_recreate
from .nlist import adaptive_nlist as nlist_by_rule
from .sizes import DEFAULT_ID_BYTES, plan_bytes

__all__ = ["IndexType", "PrecisionSetting", "plan_index", "search_cost"]

IndexType = Literal["flat", "ivf", "hnsw", "auto"]
PrecisionSetting = Literal["auto", "float32", "float16", "int8"]

_ORDER: tuple[Precision, ...] = ("float32", "float16", "int8")
_HANDICAP = {"exact": 1.0, "two_stage": 3.0, "ivf": 3.75}
"""What is trained must pay for its training: three times as fast as a scan, and lists a quarter faster than none."""
_RESULTS = 10
"""Bodies are compared by a query of so many results."""


def plan_index(
    *,
    count: int,
    dim: int,
    metric: Metric,
    index_type: IndexType,
    target_recall: float,
    budget_bytes: int,
    min_training_units: int = 1000,
    adaptive_nlist: bool = True,
    vectors_per_centroid: int = DEFAULT_VECTORS_PER_CENTROID,
    nlist_min: int = DEFAULT_NLIST_MIN,
    nlist_max: int | None = None,
    precision: PrecisionSetting = "auto",
    current_nlist: int | None = None,
    id_bytes: float = DEFAULT_ID_BYTES,
    device: DeviceFacts | None = None,
) -> IndexPlan:
    """The body for ``count`` vectors of ``dim`` dimensions.

    Args:
        count: live vectors.
        dim: their dimension.
        metric: l2, cosine or ip.
        index_type: flat, ivf or hnsw as the user asked; auto takes the cheapest that meets the target.
        target_recall: in (0, 1].
        budget_bytes: memory that the finished body may take.
        min_training_units: below it nothing is trained, whatever ``index_type`` says.
        adaptive_nlist: False keeps ``current_nlist`` however the store grows.
        vectors_per_centroid, nlist_min, nlist_max: the rule for lists; see :func:`~.nlist.adaptive_nlist`.
        precision: of the rows on a GPU; auto narrows them where float32 does not fit there. On the host float32
            decides, mapped from a file.
        current_nlist: lists of the body in use; kept while they differ from the rule by less than a quarter.
        id_bytes: mean length of an id.
        device: a GPU that may be used; None keeps the plan on the CPU.

    Returns:
        The plan with predicted bytes and its reason.

    Raises:
        CapacityError: nothing fits ``budget_bytes``.
    """
    del metric  # every kind serves every metric
    needed = max(min_training_units, 1)
    size: dict[str, Any] = {"count": count, "dim": dim, "budget": budget_bytes, "id_bytes": id_bytes}
    if count < needed and index_type != "flat":
        wanted = IndexPlan("exact", reason=f"{count} units are fewer than the {needed} from which an index is trained")
        return _fitted(wanted, **size)
    rule: dict[str, Any] = {
        "vectors_per_centroid": vectors_per_centroid,
        "nlist_min": nlist_min,
        "nlist_max": nlist_max,
    }
    nlist = _nlist(count, current_nlist, adaptive_nlist, rule)
    host = _fitted(_wanted(index_type, count, dim, nlist, target_recall), **size)
    if device is None or count < needed:
        return host
    precisions: tuple[Precision, ...] = _ORDER if precision == "auto" else (precision,)
    asked: dict[str, Any] = {"index_type": index_type, "target_recall": target_recall, "precisions": precisions}
    return on_device(host, device, nlist=nlist, **size, **asked)


def search_cost(plan: IndexPlan, n: int, dim: int, target_recall: float) -> float:
    """Time of one query of ten results, in the units of :mod:`..index.costs`; for the kinds that ``auto`` considers."""
    if plan.kind == "exact":
        return scan_cost(n, dim)
    effort = effort_for(plan, n, _RESULTS, target_recall)
    reads = float(n * (plan.codes or default_codes(dim)))
    if plan.kind == "ivf":
        reads = reads * effort.nprobe / plan.nlist + effort.nprobe * LIST + scan_cost(plan.nlist, dim)
    return codes_cost(reads, effort.rerank, effort.rerank, dim)


def _nlist(count: int, current: int | None, adaptive: bool, rule: dict[str, Any]) -> int:
    planned = nlist_by_rule(count, **rule)
    return current if current and (not adaptive or not should_recreate(current, planned)) else planned


def _wanted(index_type: IndexType, count: int, dim: int, nlist: int, target_recall: float) -> IndexPlan:
    """The body that the settings ask for, before its size is looked at."""
    codes = default_codes(dim)
    if index_type == "flat":
        return IndexPlan("exact", reason="index_type is flat")
    if target_recall >= 1.0 and index_type == "auto":
        return IndexPlan("exact", reason="target_recall 1 leaves nothing to approximate")
    if index_type == "ivf":
        return IndexPlan("ivf", nlist, codes, reason=f"index_type is ivf: {nlist} lists for {count} units by the rule")
    if index_type == "hnsw":
        return IndexPlan("hnsw", reason="index_type is hnsw")
    options = (IndexPlan("exact"), IndexPlan("two_stage", 0, codes), IndexPlan("ivf", nlist, codes))
    best = min(options, key=lambda plan: _HANDICAP[plan.kind] * search_cost(plan, count, dim, target_recall))
    return replace(best, reason=f"cheapest at recall {target_recall:g} for {count} units of {dim} dimensions")


def _fitted(wanted: IndexPlan, *, count: int, dim: int, budget: int, id_bytes: float) -> IndexPlan:
    """``wanted`` where the budget allows; codes in place of a graph, which holds its vectors in memory."""
    options = [wanted]
    if wanted.kind == "hnsw":
        note = f"hnsw does not fit {budget} bytes; two_stage instead"
        reason = f"{wanted.reason}; {note}"
        options.append(IndexPlan("two_stage", codes=default_codes(dim), reason=reason, notes=(note,)))
    smallest = 0
    for plan in options:
        smallest = plan_bytes(plan, count, dim, id_bytes)
        if smallest <= budget:
            return replace(plan, bytes=smallest)
    raise CapacityError(
        f"{count} units of {dim} dimensions need {smallest} bytes as {options[-1].kind} at the least, "
        f"max_memory_mb leaves {budget}; raise max_memory_mb or lower max_memory_units"
    )
