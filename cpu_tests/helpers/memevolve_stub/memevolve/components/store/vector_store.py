"""The store that the drop-in replaces."""

from __future__ import annotations

from typing import Any

from .base import StorageBackend

REPLACED = False


class VectorStore(StorageBackend):
    """Forgets everything."""

    def __init__(
        self, index_file: str, embedding_function: Any, embedding_dim: int = 384, index_type: str = "flat"
    ) -> None:
        self.arguments = index_file, embedding_function, embedding_dim, index_type

    def store(self, unit: dict[str, Any]) -> str:
        """Forget the unit."""
        return "forgotten"
