"""This store, with the index that it picks by itself and with IVF lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from memevolve_gpu import StorageConfig, VectorStore

from ..protocol import BEFORE, Array, Facts, Payload, Peer

BATCH = 100_000
"""Units of one transaction: what a million of dicts takes is not held twice."""
FULL = "synced: WAL with synchronous=FULL, one transaction a call; by default the same"


def facts(name: str, index_type: str) -> Facts:
    return Facts(
        name=name,
        kind="store",
        modules=("memevolve_gpu", "faiss", "apsw"),
        knobs=(0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0),
        knob="recall",
        settings=f"index_type={index_type}, metric=l2, background=True, durability=full",
        durability=FULL,
        default_is_synced=True,
    )


class Ours(Peer):
    index_type: ClassVar[str]

    def open(self, folder: Path, dim: int) -> None:
        config = StorageConfig(max_memory_units=10**7, max_memory_mb=16_384, index_type=self.index_type)
        self.vector = np.zeros(dim, dtype=np.float32)
        self.store = VectorStore(folder / "memory", lambda _: self.vector, dim, storage_config=config)
        self.asked = 0

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:
        for at in range(0, len(ids), BATCH):
            units = [{**payloads[i], "id": f"u{ids[i]}"} for i in range(at, min(at + BATCH, len(ids)))]
            self.store.store_batch(units, vectors[at : at + BATCH])

    def settle(self) -> None:
        self.store.run_maintenance()

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        return numbers(self.store.search_vectors(vectors, k, recall=knob)[1])

    def search_filtered(self, vectors: Array, k: int, knob: float, below: int) -> list[list[int]]:
        filters = {"metadata.part": {"lt": below}}
        return numbers(self.store.search_vectors(vectors, k, filters=filters, recall=knob)[1])

    def search_units(self, vectors: Array, k: int, knob: float) -> list[list[Payload]]:
        found = []
        for self.vector in vectors:
            self.asked += 1  # the text differs each time, as it would in earnest
            found.append([hit.unit for hit in self.store.search_units(f"query {self.asked}", k, recall=knob)])
        return found

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - always is
        self.vector = vector
        self.store.store({**payload, "id": f"u{number}"})

    def delete(self, number: int, synced: bool) -> None:  # noqa: ARG002 - always is
        self.store.delete(f"u{number}")

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - always is
        self.vector = vector
        self.store.update(f"u{number}", payload)

    def close(self) -> None:
        self.store.close()


class OursAuto(Ours):
    facts = facts("memevolve-gpu", "auto")
    index_type = "auto"


class OursIvf(Ours):
    facts = facts("memevolve-gpu ivf", "ivf")
    index_type = "ivf"


class OursBefore(Ours):
    facts = facts(BEFORE, "auto")
    index_type = "auto"


def numbers(found: list[list[str | None]]) -> list[list[int]]:
    return [[int(name[1:]) for name in row if name is not None] for row in found]
