"""Builds its store as MemEvolve does: by keyword, checked against its own contract."""

from __future__ import annotations

from typing import Any

from .components.store import StorageBackend, VectorStore


class MemorySystem:
    """Remembers units in a vector store."""

    def __init__(self, path: str, embed: Any, dim: int) -> None:
        store = VectorStore(index_file=path, embedding_function=embed, embedding_dim=dim, index_type="flat")
        if not isinstance(store, StorageBackend):
            raise TypeError("the storage backend must be a StorageBackend")
        self.storage: Any = store

    def remember(self, content: str) -> str:
        """Keep a lesson and return its id."""
        if not self.storage:
            raise RuntimeError("there is no storage")
        return str(self.storage.store({"type": "lesson", "content": content}))
