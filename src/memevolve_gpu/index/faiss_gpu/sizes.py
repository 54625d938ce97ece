"""Bytes that faiss' GPU indexes take on the device: what they hold, and what a search adds for a moment.

Written down from how the indexes are laid out (faiss 1.11 to 1.15, without cuVS): a flat index holds its vectors and
one float32 norm each; inverted lists hold codes in blocks of 32 rows, a 32-bit row number each, three tables of one
entry a list, and float32 centroids with their norms. The indexes here are filled in one piece, so that nothing grows.
CUDA backs allocations with pages of 2 MiB: what is large gets pages of its own, what is small shares them (assumed, as
other allocators for CUDA do; not measured here yet).
"""

from __future__ import annotations

from collections.abc import Sequence

from ...types import IndexPlan, Precision

MOST = 2048
"""The most results, and the most lists, of one search."""
TEMPORARY_BYTES = 512 << 20
"""Scratch memory set aside for each device: what 250 queries of a flat scan, or 500 that probe 512 lists of 384
dimensions, need at a time. What a search needs beyond it faiss allocates and frees, which is slow but works."""
CODE_BYTES = 32 << 20
"""Room for the code of kernels, which CUDA loads when they are first launched (a guess on the safe side: a few MiB each
time, not measured here yet)."""

_BLOCK = 32
_POINTERS = 8 + 8 + 8
_PAGE = 2 << 20
_SCANNED_AT_ONCE = 262_144
"""Rows whose distances a flat scan holds at a time on cards above 8 GiB: 1 GiB / 2 / 4 bytes / 512 queries; of float16
twice as many, of at most 32 dimensions half as many. What is counted is enough for all of them."""
_SHARES = (
    *(0.191, 0.307, 0.391, 0.464, 0.531, 0.595, 0.659, 0.722, 0.787, 0.854),
    *(0.925, 0.999, 1.079, 1.168, 1.268, 1.384, 1.522, 1.701, 1.961, 2.491),
)
"""Rows of a list over the mean, for each twentieth of the lists: a gamma distribution whose standard deviation is 0.6
of its mean. k-means over 39,320 real embeddings left 0.59 (256 lists) and 0.62 (128), over 120,000 0.69 and 0.76. It
matters where lists are about as long as a page: with equal ones the sum was up to 48 % off, with these 6 %."""
_WIDTH: dict[Precision, int] = {"float32": 2, "float16": 2, "int8": 1}
"""Bytes of a component in lists."""


def flat_bytes(n: int, dim: int, half: bool) -> int:
    """A flat index of ``n`` vectors of ``dim`` dimensions, stored as float16 where ``half``, else as float32."""
    return _granted(n * dim * (2 if half else 4)) + _granted(4 * n)


def lists_bytes(sizes: Sequence[int], dim: int, precision: Precision) -> int:
    """Inverted lists of ``sizes`` rows each, whose components take 2 bytes, or 1 for int8."""
    block = _BLOCK * dim * _WIDTH[precision]
    rows = sum(_granted(-(-size // _BLOCK) * block) + _granted(4 * size) for size in sizes)
    return rows + len(sizes) * (4 * dim + 4 + _POINTERS)


def flat_query_bytes(n: int, dim: int, fetch: int) -> int:
    """Scratch of one query of a flat index: two tiles of distances, the results of all tiles twice (8 + 4 bytes each)
    and once merged, the query in both widths."""
    tiles = -(-n // (_SCANNED_AT_ONCE // 2))
    return 2 * 4 * min(n, 2 * _SCANNED_AT_ONCE) + (2 * tiles + 1) * 12 * fetch + 6 * dim


def lists_query_bytes(nprobe: int, dim: int, fetch: int) -> int:
    """Scratch of one query of inverted lists: for each probed list its centroid, its number, its distance and its
    ``fetch`` results; the results once merged, and the query."""
    return nprobe * (4 * dim + 12 + 12 * fetch) + 12 * fetch + 4 * dim


def plan_device_bytes(plan: IndexPlan, n: int, dim: int) -> int:
    """Memory in bytes that ``plan`` takes on its device for ``n`` vectors of ``dim`` dimensions, scratch included.

    All indexes on a device share the scratch; the CUDA context is not counted. Lists are as unequal as k-means leaves
    them, with half a block to spare.
    """
    if plan.kind == "exact":
        return flat_bytes(n, dim, half=plan.precision != "float32") + TEMPORARY_BYTES
    nlist = max(1, plan.nlist)
    row = dim * _WIDTH[plan.precision]
    lists = [_granted(int((n / nlist * share + _BLOCK / 2) * row)) for share in _SHARES]
    return nlist * (sum(lists) // len(lists) + 4 * dim + 4 + _POINTERS) + 4 * n + TEMPORARY_BYTES


def _granted(size: int) -> int:
    """What an allocation of ``size`` bytes takes: from half a page on, whole pages."""
    return size if size < _PAGE // 2 else -(-size // _PAGE) * _PAGE
