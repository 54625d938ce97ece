"""What the running store needs to know, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..types import Precision

__all__ = ["LiveSettings"]


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """The part of ``StorageConfig`` that concerns the index; ``budget_bytes`` bounds body, vectors and maps."""

    index_type: Literal["flat", "ivf", "hnsw", "auto"] = "ivf"
    target_recall: float = 0.95
    min_training_units: int = 1000
    adaptive_nlist: bool = True
    vectors_per_centroid: int = 39
    nlist_min: int = 10
    nlist_max: int | None = None
    precision: Literal["auto"] | Precision = "auto"
    budget_bytes: int = 2048 * 2**20
    background: bool = True
    sample_queries: bool = True
    seed: int = 20_240_607
