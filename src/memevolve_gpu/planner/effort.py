"""How hard a body must try before its own recall was measured: a conservative table.

From 39,320 real embeddings (384 dimensions, squared L2), 1,000 queries like the data and 1,000 out of distribution;
each entry reaches its target on both for ten results and stays near it from 1 to 100. Recall in / out of distribution:

* 4-bit codes, half as many as dimensions: rerank 40 0.999 / 0.992, 60 1.000 / 0.998, 100 1.000 / 0.9998; 100 results
  want 300 for 0.999 / 0.990 and 400 for 1.000 / 0.996.
* 256 lists, share probed 0.375 0.976 / 0.968, 0.5 0.985 / 0.983, 0.75 0.996 / 0.996; 64 lists, 0.375 0.970 / 0.951,
  0.5 0.982 / 0.974, 0.75 0.995 / 0.994; for 100 results out of distribution 0.75 0.982, 1 0.990.
* graph, beam 128 0.997 / 0.976, 256 0.999 / 0.992, 512 0.999 / 0.997; for 100 results 512 0.998 / 0.991.
"""

from __future__ import annotations

import math

from ..types import Effort, IndexPlan

__all__ = ["effort_for"]

_MEASURED_AT = 40_000
_FEW_ROWS = 10_000
"""Below it, half of the lists gave 0.941 out of distribution and three quarters 0.984 (76 lists, 3,000 units)."""
_CODES_SLOPE = 0.3
"""Rerank 40 suffices at 100,000 units and 200 at 1,000,000: candidates grow with about the cube root of n."""


def effort_for(plan: IndexPlan, n: int, k: int, target_recall: float) -> Effort:
    """The effort with which ``plan``'s body over ``n`` rows reaches ``target_recall`` at ``k`` results.

    ``target_recall`` is in (0, 1]; 1.0 asks for the exact scan. Calibration on a store's own queries overrides this.
    """
    if target_recall >= 1.0 or (plan.kind == "exact" and plan.engine == "cpu"):
        return Effort(exact=True)
    if plan.kind == "exact":
        return Effort()  # the device reads every row, in its own precision, and reranks as widely as it must
    if plan.kind == "hnsw":
        return Effort(ef=_beam(n, k, target_recall))
    rerank = _rerank(n, k, target_recall)
    if plan.kind == "two_stage":
        return Effort(rerank=rerank)
    nprobe = max(1, math.ceil(plan.nlist * _share(n, k, target_recall)))
    return Effort(nprobe=nprobe, rerank=0 if plan.engine == "torch" else rerank)  # torch knows how far float16 errs


def _rerank(n: int, k: int, target: float) -> int:
    wanted = 20 + 2 * k if target <= 0.95 else 40 + 3 * k if target <= 0.99 else 100 + 6 * k
    return math.ceil(wanted * math.pow(max(1.0, n / _MEASURED_AT), _CODES_SLOPE))


def _share(n: int, k: int, target: float) -> float:
    """The share of lists to probe: results spread over more of them when there are many, or when lists are short."""
    share = 0.35 if target <= 0.9 else 0.5 if target <= 0.95 else 0.75 if target <= 0.99 else 1.0
    return share if k <= 10 and n >= _FEW_ROWS else min(1.0, share * 1.35)


def _beam(n: int, k: int, target: float) -> int:
    wanted = 100 + 4 * k if target <= 0.95 else 260 + 4 * k if target <= 0.99 else 600 + 6 * k
    return math.ceil(wanted * math.sqrt(max(1.0, n / _MEASURED_AT)))
