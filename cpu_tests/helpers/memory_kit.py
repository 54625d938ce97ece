"""Test doubles shared by the tests of management, retrieval and the memory system."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memevolve_gpu import VectorStore
from memevolve_gpu.components.store import StorageBackend
from memevolve_gpu.components.validation import ScratchStore

__all__ = ["DIM", "Given", "days_ago", "ids_of", "open_scratch", "store_at", "unit"]

DIM = 16


class Given:
    """An embedding function that sees the first word of a text only; unknown words lie in all directions."""

    dimension = DIM

    def __init__(self, vectors: Mapping[str, Sequence[float]] | None = None) -> None:
        self.vectors = {
            word: np.pad(np.asarray(row, np.float32), (0, DIM - len(row))) for word, row in (vectors or {}).items()
        }
        self.texts: list[str] = []

    def __call__(self, text: str, /) -> npt.NDArray[np.float32]:
        self.texts.append(text)
        word = text.split(" ", 1)[0]
        if word in self.vectors:
            return self.vectors[word]
        return np.array(_direction(word), dtype=np.float32)


@functools.lru_cache(maxsize=20_000)
def _direction(word: str) -> npt.NDArray[np.float32]:
    row = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(DIM)
    return np.asarray(row / np.linalg.norm(row), np.float32)


def store_at(path: Path, embed: Any = None, **settings: Any) -> VectorStore:
    """A store without a background thread."""
    return VectorStore(path / "m", embed or Given(), storage_config={"background": False, **settings})


def open_scratch() -> ScratchStore:
    return ScratchStore()


def unit(unit_id: str, content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": unit_id, "type": "lesson", "content": unit_id if content is None else content, **more}


def days_ago(days: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(days=days)).isoformat()


def ids_of(backend: StorageBackend) -> list[str]:
    return [one["id"] for one in backend.retrieve_all()]
