"""How many bytes a plan takes on its device, by the arithmetic of the engine that will hold it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..index.faiss_gpu.sizes import TEMPORARY_BYTES
from ..index.faiss_gpu.sizes import plan_device_bytes as faiss_bytes
from ..index.torch_engine.memory import SCRATCH
from ..index.torch_engine.memory import predicted_bytes as torch_bytes
from ..types import IndexPlan

__all__ = ["device_bytes", "scratch_bytes", "sized"]

_SPARED = 0.5
"""Share of the limit up to which float32 rows may lie on the device beside the narrow ones: others want room, too."""


def device_bytes(plan: IndexPlan, n: int, dim: int) -> int:
    """Bytes on the device of ``n`` vectors of ``dim`` dimensions, mask and scratch included; 0 for plans on the CPU.

    Without :func:`scratch_bytes`, within 10 % of what the body reports. Of a torch body the least that it can do with:
    see :func:`sized`.
    """
    if plan.engine == "torch":
        return torch_bytes(n, dim, plan.precision, nlist=plan.nlist)
    return faiss_bytes(plan, n, dim) if plan.engine == "faiss" else 0


def scratch_bytes(plan: IndexPlan) -> int:
    """Bytes of :func:`device_bytes` that all searches on the device share, and that no body counts as its own."""
    return {"torch": SCRATCH, "faiss": TEMPORARY_BYTES}.get(plan.engine, 0)


def sized(plan: IndexPlan, n: int, dim: int, limit: int) -> Iterator[IndexPlan]:
    """``plan`` with its predicted ``device_bytes``, the shapes it can take within ``limit`` bytes, best first.

    torch decides among candidates on the device where its plan has room for float32 rows there; it saves a query the
    way to the host.
    """
    if plan.engine == "torch" and plan.precision == "float32":
        whole = torch_bytes(n, dim, plan.precision, nlist=plan.nlist, full=True)
        if whole <= _SPARED * limit:
            yield replace(plan, device_bytes=whole)
    least = device_bytes(plan, n, dim)
    if least <= limit:
        yield replace(plan, device_bytes=least)
