"""Test doubles for the LangChain tests: embedding models, and a backend with nothing optional."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from support import FakeEmbedder

from memevolve_gpu.components.store.base import StorageBackend
from memevolve_gpu.records.filters import matches
from memevolve_gpu.types import FloatArray, MemoryUnit

__all__ = ["AsyncOnly", "Plain", "Words", "documents"]


class Words(Embeddings):
    """Texts that share words are near; counts what it embedded."""

    def __init__(self, dim: int = 16) -> None:
        self.fake = FakeEmbedder(dim)
        self.documents: list[str] = []
        self.queries: list[str] = []
        self.batches = 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.batches += 1
        self.documents += texts
        return [self.fake.vector(text).tolist() for text in texts]

    def embed_query(self, text: str) -> list[float]:
        self.queries.append(text)
        vector: list[float] = self.fake.vector(text).tolist()
        return vector


class AsyncOnly(Words):
    """Fails where somebody waits for it in a thread, except for the probe of the dimension."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if texts != ["dimension probe"]:
            raise AssertionError("embed_documents was called where aembed_documents is there")
        return super().embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        raise AssertionError("embed_query was called where aembed_query is there")

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return super().embed_documents(texts)

    async def aembed_query(self, text: str) -> list[float]:
        return super().embed_query(text)


class Plain(StorageBackend):
    """Units in a dict, searched one by one: a backend with the verbs that every one has, and vectors.

    ``between``, once set, is called with the ids found after the next search.
    """

    metric = "l2"

    def __init__(self) -> None:
        self.held: dict[str, tuple[MemoryUnit, FloatArray]] = {}
        self.between: Any = None

    def store(self, unit: MemoryUnit) -> str:
        raise NotImplementedError

    def store_batch(self, units: Sequence[MemoryUnit], embeddings: Any = None) -> list[str]:
        for unit, vector in zip(units, embeddings, strict=True):
            self.held[unit["id"]] = (unit, np.asarray(vector, dtype=np.float32))
        return [unit["id"] for unit in units]

    def retrieve(self, unit_id: str) -> MemoryUnit | None:
        return self.held[unit_id][0] if unit_id in self.held else None

    def retrieve_all(self) -> list[MemoryUnit]:
        return [unit for unit, _ in self.held.values()]

    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        raise NotImplementedError

    def delete(self, unit_id: str) -> bool:
        return self.held.pop(unit_id, None) is not None

    def exists(self, unit_id: str) -> bool:
        return unit_id in self.held

    def count(self) -> int:
        return len(self.held)

    def clear(self) -> None:
        self.held.clear()

    def get_metadata(self, unit_id: str) -> dict[str, Any] | None:
        raise NotImplementedError

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        yield from self.held.values()

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        return {unit_id: self.held[unit_id][1] for unit_id in ids if unit_id in self.held}

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        raise NotImplementedError

    def search_vectors(
        self, queries: Any, top_k: int = 5, filters: Mapping[str, Any] | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        found = [(unit_id, vector) for unit_id, (unit, vector) in self.held.items() if matches(filters, unit)]
        distances = np.full((1, top_k), np.inf, dtype=np.float32)
        near = sorted((float(((vector - np.asarray(queries[0])) ** 2).sum()), unit_id) for unit_id, vector in found)
        ids: list[str | None] = [None] * top_k
        for place, (distance, unit_id) in enumerate(near[:top_k]):
            distances[0, place], ids[place] = distance, unit_id
        if self.between is not None:
            change, self.between = self.between, None
            change()
        return distances, [ids]


def documents(count: int, **metadata: Any) -> list[Document]:
    """``count`` documents that share no word but ``number``, with their number in the metadata."""
    return [Document(page_content=f"number w{n}", metadata={"n": n, **metadata}) for n in range(count)]
