"""What is known of a body beyond its rows; it travels with the body, into its snapshot and out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..training.quality import Quality

__all__ = ["BodyFacts"]


@dataclass(frozen=True, slots=True)
class BodyFacts:
    """trained_rows: live rows when the quantisers in use were trained, 0 for a body that needs none.

    refused_rows: live rows when the planned kind was refused and this exact body took its place, else 0.
    quality: how the body did when it was verified.
    """

    trained_rows: int = 0
    refused_rows: int = 0
    quality: Quality | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a snapshot."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BodyFacts:
        """What ``to_dict`` gave; anything that is not of that form counts as unknown."""
        try:
            quality = values.get("quality")
            return cls(
                int(values.get("trained_rows", 0)),
                int(values.get("refused_rows", 0)),
                None if quality is None else Quality(**quality),
            )
        except (TypeError, ValueError, AttributeError):
            return cls()
