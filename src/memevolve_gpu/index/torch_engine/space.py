"""How vectors become what a device holds, and where the rows of a table lie in that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...types import FloatArray, Precision
from ..rerank import VectorTable
from .door import host_tensor, load_torch
from .turns import Turn

__all__ = ["Space", "blocks_of", "measured_space"]

_BLOCK_BYTES = 32 << 20
_TYPICAL_NORM = 16.0
_LARGEST = 2.0**14
_FARTHEST = 128
"""So many times its own width a new cluster of rows, as wide as that of usual ones, may lie away. float16 rounds rows
by their length: in 8 to 1,024 dimensions recall@10 among 2,000 such rows was 1.0 up to 256 times, 0.92 to 1.0 at 400,
and 0.34 (384 dimensions) at 1,000 times."""
_CENTRE_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Space:
    """How vectors become what the device holds: ``(vector - centre) * scale``, in float16.

    Moving the origin changes no squared distance and moves all dot products of a query alike, so the order of rows
    stays. Around their median, in units in which a usual row has length 16 and no component exceeds 2**14, float16's
    11 significant bits serve vectors of any size and any place.
    """

    centre: FloatArray
    scale: float
    farthest: float = _FARTHEST * _TYPICAL_NORM
    """The length here of the longest row that is taken although the space was not made for it."""

    @classmethod
    def around(cls, sample: FloatArray, least: FloatArray, most: FloatArray, *, centred: bool) -> Space:
        """For rows like ``sample`` (m, dim) whose columns lie between ``least`` and ``most`` (dim,)."""
        rows = sample[:: max(1, len(sample) // _CENTRE_ROWS)]
        centre = np.median(rows, axis=0).astype(np.float32) if centred and len(rows) else np.zeros_like(least)
        norms = np.linalg.norm((rows - centre).astype(np.float64), axis=1) if len(rows) else np.zeros(1)
        norm, long = (float(one) for one in np.quantile(norms, (0.5, 0.9)))
        reach = float(np.maximum(most - centre, centre - least).max(initial=0.0))
        scale = min(
            _TYPICAL_NORM / norm if norm > 0 else np.inf,
            _LARGEST / reach if reach > 0 else np.inf,
        )
        scale = float(np.float32(scale)) if np.isfinite(scale) else 1.0
        return cls(centre, scale, scale * max(_FARTHEST * norm, 2 * long) or _FARTHEST * _TYPICAL_NORM)

    def holds(self, vectors: FloatArray) -> bool:
        """Does float16 tell ``vectors`` (m, dim) from each other here, which the space was not made for?"""
        far = vectors - self.centre
        longest = float(np.einsum("ij,ij->i", far, far, dtype=np.float64).max(initial=0.0)) ** 0.5
        reach = float(np.abs(far, out=far).max(initial=0.0))
        return longest * self.scale <= self.farthest and reach * self.scale <= 2 * _LARGEST

    def enter(self, vectors: FloatArray, columns: int, device: Any) -> Any:
        """``vectors`` (m, dim) on the device: float32 (m, columns)."""
        torch = load_torch()
        rows = host_tensor(vectors).to(device)
        rows = rows.sub(host_tensor(self.centre).to(device)).mul_(self.scale)
        return torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))


def blocks_of(table: VectorTable, first: int = 0) -> Iterator[tuple[int, FloatArray]]:
    """The rows from ``first`` on in blocks of 32 MB with the position of the first."""
    step = max(1024, _BLOCK_BYTES // (4 * table.dim))
    for start in range(first, table.n, step):
        yield start, np.ascontiguousarray(table.gather(slice(start, min(start + step, table.n))))


def measured_space(table: VectorTable, precision: Precision, device: Any, turn: Turn) -> Space:
    """The space of a table's rows; around the origin for int8, whose codes are of the rows as they are."""
    least = np.full(table.dim, np.inf, np.float32)
    most = np.full(table.dim, -np.inf, np.float32)
    for _, block in blocks_of(table):
        with turn:
            rows = host_tensor(block).to(device)
            np.minimum(least, rows.amin(0).cpu().numpy(), out=least)
            np.maximum(most, rows.amax(0).cpu().numpy(), out=most)
    step = max(1, table.n // 1024)
    sample = table.gather(np.arange(0, table.n, step, dtype=np.int64))
    return Space.around(sample, least, most, centred=precision != "int8")
