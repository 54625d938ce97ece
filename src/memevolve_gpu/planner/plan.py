"""Which index to build, and the search parameters before calibration: pure functions of size, settings and memory.

Measured on 39,320 real embeddings (384 dimensions, squared L2) with 1,000 queries like the data and 1,000 out of
distribution. Each entry reaches its target on both for ten results, and stays near it from 1 to 100. Recall in / out of
distribution:

* 4-bit codes, a quarter as many as dimensions: rerank 60 0.994 / 0.954, 100 0.999 / 0.982, 150 1.000 / 0.992, 450
  1.000 / 0.999.
* 256 lists, share probed 0.375 0.976 / 0.968, 0.5 0.985 / 0.983, 0.75 0.996 / 0.996; 64 lists, 0.375 0.970 / 0.951,
  0.5 0.982 / 0.974, 0.75 0.995 / 0.994; for 100 results out of distribution 0.75 0.982, 1 0.990.
* graph, beam 128 0.997 / 0.976, 256 0.999 / 0.992, 512 0.999 / 0.997; for 100 results 512 0.998 / 0.991.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from ..errors import CapacityError
from ..index.costs import WHOLE_ROWS, codes_cost, lists_cost, scan_cost
from ..index.sample import default_codes
from ..types import IndexPlan, JsonObject, Precision, SearchParams
from .device_plan import DeviceState, on_device, plan_bytes
from .nlist import DEFAULT_RULE, ListsRule, should_recreate

_MEASURED_AT = 40_000
_FEW_ROWS = 10_000
"""Below it, half of the lists gave 0.941 out of distribution and three quarters 0.984 (76 lists, 3,000 units)."""
_CODES_SLOPE = 0.55
"""Out of distribution 60 candidates find 0.95 at 40,000 units, 450 at 1,000,000; 150 and 900 find 0.99."""


def search_params_for(plan: IndexPlan, n: int, k: int, target_recall: float) -> SearchParams:
    """The parameters with which ``plan``'s index of ``n`` rows reaches ``target_recall`` at ``k`` results.

    ``target_recall`` is in (0, 1]; 1.0 means exact search. Calibration on a store's own queries overrides this.
    """
    if target_recall >= 1.0 or (plan.kind == "exact" and plan.engine == "cpu"):
        return SearchParams(exact=True)
    if plan.kind == "exact":
        return SearchParams()  # the device reads every row, and reranks as many as its precision needs
    if plan.kind == "hnsw":
        return SearchParams(ef=_beam(n, k, target_recall))
    rerank = _rerank(n, k, target_recall)
    if plan.kind == "two_stage" or (plan.engine == "cpu" and n <= WHOLE_ROWS):
        return SearchParams(rerank=rerank)
    nprobe = max(1, math.ceil(plan.nlist * _share(n, k, target_recall)))
    return SearchParams(nprobe=nprobe, rerank=0 if plan.engine == "torch" else rerank)  # torch bounds float16's error


def _rerank(n: int, k: int, target: float) -> int:
    wanted = 50 + 5 * k if target <= 0.95 else 150 + 10 * k if target <= 0.99 else 300 + 15 * k
    return math.ceil(wanted * math.pow(max(1.0, n / _MEASURED_AT), _CODES_SLOPE))


def _share(n: int, k: int, target: float) -> float:
    """The share of lists to probe: results spread over more of them when there are many, or when lists are short."""
    share = 0.35 if target <= 0.9 else 0.5 if target <= 0.95 else 0.75 if target <= 0.99 else 1.0
    return share if k <= 10 and n >= _FEW_ROWS else min(1.0, share * 1.35)


def _beam(n: int, k: int, target: float) -> int:
    wanted = 100 + 4 * k if target <= 0.95 else 260 + 4 * k if target <= 0.99 else 600 + 6 * k
    return math.ceil(wanted * math.sqrt(max(1.0, n / _MEASURED_AT)))


IndexType = Literal["flat", "ivf", "hnsw", "auto"]
PrecisionSetting = Literal["auto", "float32", "float16", "int8"]

_ORDER: tuple[Precision, ...] = ("float32", "float16", "int8")
_HANDICAP = {"exact": 1.0, "two_stage": 3.0, "ivf": 3.75}
"""A trained index must be worth its training: three times as fast as a scan, and lists a quarter faster than none."""
_RESULTS = 10
"""Results of the query by which indexes are compared."""


def plan_index(
    *,
    count: int,
    dim: int,
    index_type: IndexType,
    target_recall: float,
    budget_bytes: int,
    min_training_units: int = 1000,
    lists: ListsRule = DEFAULT_RULE,
    precision: PrecisionSetting = "auto",
    current_nlist: int | None = None,
    device: DeviceState | None = None,
) -> IndexPlan:
    """The index for ``count`` vectors of ``dim`` dimensions.

    Args:
        count: live vectors.
        dim: their dimension.
        index_type: flat, ivf or hnsw, or auto for the cheapest that meets the target.
        target_recall: in (0, 1].
        budget_bytes: memory that the finished index may take.
        min_training_units: below it nothing is trained, whatever ``index_type`` says.
        lists: how many lists there are.
        precision: of the rows on a GPU; auto narrows them where float32 does not fit there. On the host float32
            decides, mapped from a file.
        current_nlist: lists of the index in use; kept while they differ from the rule by less than a quarter.
        device: a GPU that may be used; None keeps the plan on the CPU.

    Returns:
        The plan with predicted bytes and its reason.

    Raises:
        CapacityError: nothing fits ``budget_bytes``.
    """
    needed = max(min_training_units, 1)
    size: JsonObject = {"count": count, "dim": dim, "budget": budget_bytes}
    if count < needed and index_type != "flat":
        wanted = IndexPlan("exact", reason=f"{count} units are fewer than the {needed} from which an index is trained")
        return _fitted(wanted, **size)
    nlist = lists.lists_for(count)
    if current_nlist and not (lists.adaptive and should_recreate(current_nlist, nlist)):
        nlist = current_nlist
    host = _fitted(_wanted(index_type, count, dim, nlist, target_recall), **size)
    if device is None or count < needed:
        return host
    precisions: tuple[Precision, ...] = _ORDER if precision == "auto" else (precision,)
    targets: JsonObject = {"index_type": index_type, "target_recall": target_recall, "precisions": precisions}
    return on_device(host, device, nlist=nlist, **size, **targets)


def search_cost(plan: IndexPlan, n: int, dim: int, target_recall: float) -> float:
    """Time of one query of ten results, in the units of :mod:`memevolve_gpu.index.costs`; for the kinds that ``auto``
    considers."""
    if plan.kind == "exact":
        return scan_cost(n, dim)
    params = search_params_for(plan, n, _RESULTS, target_recall)
    codes = plan.codes or default_codes(dim)
    if params.nprobe:
        return lists_cost(n, dim, codes, (params.nprobe, plan.nlist), params.rerank)
    return codes_cost(float(n * codes), params.rerank, params.rerank, dim)


def _wanted(index_type: IndexType, count: int, dim: int, nlist: int, target_recall: float) -> IndexPlan:
    """The index that the settings ask for, before its size is looked at."""
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


def _fitted(wanted: IndexPlan, *, count: int, dim: int, budget: int) -> IndexPlan:
    """``wanted`` where the budget allows; codes in place of a graph, which holds its vectors in memory."""
    options = [wanted]
    if wanted.kind == "hnsw":
        note = f"hnsw does not fit {budget} bytes; two_stage instead"
        reason = f"{wanted.reason}; {note}"
        options.append(IndexPlan("two_stage", codes=default_codes(dim), reason=reason, notes=(note,)))
    smallest = 0
    for plan in options:
        smallest = plan_bytes(plan, count, dim)
        if smallest <= budget:
            return replace(plan, bytes=smallest)
    raise CapacityError(
        f"{count} units of {dim} dimensions need {smallest} bytes as {options[-1].kind} at the least, "
        f"max_memory_mb leaves {budget}; raise max_memory_mb or lower max_memory_units"
    )
