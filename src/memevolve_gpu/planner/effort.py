"""How hard a body must try before its own recall was measured: a conservative table."""

from __future__ import annotations

from ..types import Effort, IndexPlan

__all__ = ["effort_for"]


def effort_for(plan: IndexPlan, n: int, k: int, target_recall: float) -> Effort:
    """The effort with which ``plan``'s body over ``n`` rows reaches ``target_recall`` at ``k`` results.

    ``target_recall`` is in (0, 1]; 1.0 asks for the exact scan. Calibration on a store's own queries overrides this.
    """
    rerank = max(100 if target_recall <= 0.95 else 150, 3 * k)
    if target_recall >= 1.0 or plan.kind == "exact" or n <= rerank:
        return Effort(exact=True)
    if plan.kind == "hnsw":
        return Effort(ef=max(4 * k, 256 if target_recall <= 0.95 else 512))
    if plan.kind == "two_stage":
        return Effort(rerank=rerank)
    share = 0.5 if target_recall <= 0.95 else 1.0
    return Effort(nprobe=max(1, round(plan.nlist * share)), rerank=rerank)
