"""Statistics of an index beyond its rows; they travel with it into its snapshot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import EngineError
from ..index.base import Index
from ..planner.plan import search_params_for
from ..training.calibration import Calibration
from ..training.recall import Quality
from ..training.retrain_rules import Balance
from ..types import SearchParams

__all__ = ["IndexStats"]

EVEN = Balance()
CARRIED_FROM, CARRIED_TO = 3 / 4, 2.0
"""A calibration serves the same quantisers while the rows are between so many times those that it was made with. From
19,660 to 39,320 real embeddings, in random order and by topics, recall@10 of two sets of 1,000 questions at an effort
calibrated for 0.95 and 0.99 fell by 0.003 at the most, and by nothing in most cases."""


@dataclass(frozen=True, slots=True)
class IndexStats:
    """trained_rows: live rows when the quantisers in use were trained, 0 for an index that needs none; trained_balance
    and balance: how evenly rows lay in the lists then, and lie in this index.

    refused_rows: live rows when the planned kind was refused and this exact index took its place, else 0.
    quality: how the index did when it was verified; measured_rows: its rows when the recall was measured. calibration:
    the least efforts that reach each target, measured when there were calibrated_rows and asked queries had been seen.
    by_request: trained although the units were few. probed: recall@10 of real queries, measured in use.
    """

    trained_rows: int = 0
    trained_balance: Balance = EVEN
    balance: Balance = EVEN
    refused_rows: int = 0
    quality: Quality | None = None
    calibration: Calibration | None = None
    calibrated_rows: int = 0
    asked: int = 0
    by_request: bool = False
    probed: float | None = None
    measured_rows: int = 0

    def carried_to(self, index: Index) -> IndexStats | None:
        """The same for an index with the same quantisers over a few more or fewer rows; None for many."""
        held = self.calibration
        if held is None or not CARRIED_FROM <= index.n / max(1, self.calibrated_rows) <= CARRIED_TO:
            return None
        return replace(self, quality=None, calibration=replace(held, rows=index.n))

    def effort(self, index: Index, k: int, target_recall: float) -> SearchParams:
        """The calibrated effort; where none was measured, the conservative one of the planner's table."""
        found = self.calibration.effort(k, target_recall) if self.calibration is not None else None
        return found or search_params_for(index.plan, index.n, k, target_recall)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a snapshot."""
        return {
            "trained_rows": self.trained_rows,
            "trained_balance": asdict(self.trained_balance),
            "balance": asdict(self.balance),
            "refused_rows": self.refused_rows,
            "quality": None if self.quality is None else asdict(self.quality),
            "calibrated_rows": self.calibrated_rows,
            "asked": self.asked,
            "by_request": self.by_request,
            "measured_rows": self.measured_rows,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], index: Index) -> IndexStats:
        """What ``to_dict`` gave; what is not of that form, or was measured on another index, counts as unknown."""
        try:
            quality, calibration = values.get("quality"), values.get("calibration")
            measured = None if calibration is None else Calibration.from_dict(calibration)
            return cls(
                int(values.get("trained_rows", 0)),
                Balance(**values.get("trained_balance", {})),
                Balance(**values.get("balance", {})),
                int(values.get("refused_rows", 0)),
                None if quality is None else Quality(**quality),
                measured if measured is not None and measured.fits(index) else None,
                int(values.get("calibrated_rows", 0)),
                int(values.get("asked", 0)),
                bool(values.get("by_request", False)),
                measured_rows=int(values.get("measured_rows", 0)),
            )
        except (TypeError, ValueError, AttributeError, EngineError):
            return cls()
