"""Index classes by engine and kind, and the functions that build one or restore it."""

from __future__ import annotations

import numpy as np

from ..errors import EngineError
from ..types import FloatArray, IndexPlan, Metric, Rows
from .base import Arrays, BuildJob, FlatIndex, Index, Progress
from .faiss_gpu.index import FaissGpuFlatIndex
from .faiss_gpu.ivf import FaissGpuIVFIndex
from .fastscan import TwoStageIndex
from .hnsw import HNSWIndex
from .ivf import IVFIndex
from .sample import default_codes
from .torch_gpu.index import TorchFlatIndex
from .torch_gpu.ivf import TorchIVFIndex

ENGINES: dict[tuple[str, str], type[Index]] = {
    ("cpu", "exact"): FlatIndex,
    ("cpu", "two_stage"): TwoStageIndex,
    ("cpu", "ivf"): IVFIndex,
    ("cpu", "hnsw"): HNSWIndex,
    ("faiss", "exact"): FaissGpuFlatIndex,
    ("faiss", "ivf"): FaissGpuIVFIndex,
    ("torch", "exact"): TorchFlatIndex,
    ("torch", "ivf"): TorchIVFIndex,
}
"""What searches an index, and its kind. Importing these classes imports no engine."""
KINDS = frozenset(kind for _, kind in ENGINES)


def build(
    plan: IndexPlan,
    rows: Rows,
    metric: Metric,
    *,
    seed: int,
    training: FloatArray | None = None,
    reuse_from: Index | None = None,
    progress: Progress | None = None,
) -> Index:
    """Build the index that ``plan`` asks for over ``rows``.

    Args:
        plan: kind, lists, codes and precision.
        rows: n row versions; their arrays are kept, not copied, where the index can use them as they are.
        metric: l2, cosine (vectors already normalised) or ip.
        seed: decides the training sample and k-means; the same seed and rows give the same index.
        training: float32 (m, dim) to train on instead of a sample of the rows.
        reuse_from: an index of the same kind whose trained quantisers are taken over; nothing is trained then.
        progress: called with the stage (``train``, ``add``) and its finished fraction.

    Raises:
        DeviceError: the plan's device has no room, is lost or cannot be used; the same plan for the CPU can be built.
        EngineError: an engine is missing or fails, the rows are too few for this kind, or ``reuse_from`` was trained
            for something else; an exact index on the CPU always works.
    """
    _check(plan, rows)
    if reuse_from is not None:
        _check_reuse(reuse_from, plan, rows.vectors.shape[1], metric)
    return _index_class(plan).build(BuildJob(plan, rows, metric, seed, training, reuse_from, progress or _silent))


def from_parts(plan: IndexPlan, metric: Metric, parts: Arrays) -> Index:
    """Load an index from what :meth:`~.base.Index.parts` returned.

    Raises:
        EngineError: the parts are incomplete or contradict each other or the plan.
    """
    return _index_class(plan).from_parts(plan, metric, parts)


def _index_class(plan: IndexPlan) -> type[Index]:
    if plan.kind not in KINDS:
        raise EngineError(f"plan.kind {plan.kind!r} is unknown; known are {', '.join(sorted(KINDS))}")
    if plan.engine == "cpu" and plan.precision != "float32":
        raise EngineError(f"plan.precision {plan.precision!r} is for a device; the CPU searches float32")
    found = ENGINES.get((plan.engine, plan.kind))
    if found is None:
        known = sorted(kind for engine, kind in ENGINES if engine == plan.engine)
        raise EngineError(
            f"plan.engine {plan.engine!r} has no kind {plan.kind!r}; "
            + (f"it has {', '.join(known)}" if known else f"known are {', '.join(sorted({e for e, _ in ENGINES}))}")
        )
    return found


def _check(plan: IndexPlan, rows: Rows) -> None:
    _index_class(plan)
    if rows.vectors.ndim != 2 or rows.vectors.dtype != np.float32:
        raise EngineError(f"rows.vectors must be float32 (n, dim), got {rows.vectors.dtype} {rows.vectors.shape}")
    if not len(rows.slots) == len(rows.id_ends) == len(rows.vectors):
        raise EngineError(
            f"rows has {len(rows.slots)} slots, {len(rows.id_ends)} ids, {len(rows.vectors)} vectors; they must agree"
        )


def _check_reuse(reuse_from: Index, plan: IndexPlan, dim: int, metric: Metric) -> None:
    """Refuse quantisers of another shape, which would read foreign memory."""
    own = reuse_from.plan
    trained = (
        own.engine,
        reuse_from.kind,
        reuse_from.metric,
        reuse_from.dim,
        reuse_from.nlist,
        own.codes or default_codes(reuse_from.dim),
    )
    nlist = plan.nlist if plan.kind == "ivf" else 0
    wanted = (plan.engine, plan.kind, metric, dim, nlist, plan.codes or default_codes(dim))
    if trained != wanted:
        raise EngineError(
            f"reuse_from was trained for (engine, kind, metric, dim, nlist, codes) {trained}, the plan wants {wanted}"
        )


def _silent(stage: str, fraction: float) -> None:
    """Ignore progress."""
