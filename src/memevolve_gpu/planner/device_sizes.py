"""How many bytes a plan takes on its device, by the arithmetic of the engine that will hold it."""

from __future__ import annotations

from ..index.faiss_gpu.sizes import plan_device_bytes as faiss_bytes
from ..types import IndexPlan, Precision

__all__ = ["device_bytes", "torch_bytes"]

_WIDTH: dict[Precision, int] = {"float32": 2, "float16": 2, "int8": 1}
"""float32 vectors lie on the device as float16: the host's own decide among the candidates."""
_SCRATCH = 256 << 20


def device_bytes(plan: IndexPlan, n: int, dim: int) -> int:
    """Bytes on the device of ``n`` vectors of ``dim`` dimensions, mask and scratch included; 0 for plans on the CPU.

    Within 10 % of what the body reports.
    """
    if plan.engine == "torch":
        return torch_bytes(plan, n, dim)
    return faiss_bytes(plan, n, dim) if plan.engine == "faiss" else 0


def torch_bytes(plan: IndexPlan, n: int, dim: int) -> int:
    """A torch body: rows, a mask of one byte each, scratch; with lists their centroids and each row's place."""
    total = n * (dim * _WIDTH[plan.precision] + 1) + _SCRATCH
    return total if plan.kind == "exact" else total + plan.nlist * dim * 4 + n * 4
