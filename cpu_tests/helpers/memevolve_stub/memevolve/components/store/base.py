"""The contract that the stand-in checks its backends for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class StorageBackend(ABC):
    """Keeps units."""

    @abstractmethod
    def store(self, unit: dict[str, Any]) -> str:
        """Keep a unit and return its id."""
