"""Predicted memory of an index on the host."""

from __future__ import annotations

from ..index.costs import WHOLE_ROWS
from ..index.faiss_helpers import aligned_bytes
from ..index.sample import default_codes, padded_dim
from ..types import IndexPlan

__all__ = ["DEFAULT_ID_BYTES", "code_bytes", "plan_bytes"]

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
        total += _graph_bytes(n) + 4 * n * dim
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


def _graph_bytes(n: int) -> int:
    """Links of 32 bits: 64 on the ground level, 32 on each higher one (reached by a 32nd part); offsets and levels."""
    per_row = 4 * (2 * _HNSW_LINKS + _HNSW_LINKS / (_HNSW_LINKS - 1)) + 8 + 4
    return int(n * per_row)
