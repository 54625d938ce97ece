"""usearch: HNSW with SIMD kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol import EF, Array, Facts, Payload, Peer


class Usearch(Peer):
    facts = Facts(
        name="usearch",
        kind="library",
        modules=("usearch",),
        knobs=EF,
        knob="expansion_search",
        settings="l2sq, f32, connectivity=16, expansion_add=128 (defaults)",
        durability="none: in memory; the file is written by close()",
        synced=False,
        payloads=False,
        filters=False,
    )

    def open(self, folder: Path, dim: int) -> None:
        from usearch.index import Index

        self.file = folder / "index.usearch"
        self.index: Any = Index(ndim=dim, metric="l2sq", dtype="f32")
        if self.file.exists():
            self.index.load(str(self.file))

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:  # noqa: ARG002
        self.index.add(np.asarray(ids, dtype=np.uint64), vectors, threads=1)

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        self.index.expansion_search = int(knob)
        found = self.index.search(vectors, k, threads=1)
        rows: list[list[int]] = np.atleast_2d(found.keys).tolist()
        return rows

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - memory only
        self.index.add(number, vector, threads=1)

    def delete(self, number: int, synced: bool) -> None:  # noqa: ARG002 - memory only
        self.index.remove(number)

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:
        self.index.remove(number)
        self.insert(number, vector, payload, synced)

    def close(self) -> None:
        self.index.save(str(self.file))
