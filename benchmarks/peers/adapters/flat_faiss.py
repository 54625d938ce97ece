"""faiss itself: IndexFlat, which reads every vector, and IndexHNSWFlat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol import EF, Array, Facts, Payload, Peer

NONE = "none: in memory; the file is written by close()"


class Faiss(Peer):
    """Positions are the ids: ids are given in order from 0 on."""

    def made(self, dim: int) -> Any:
        raise NotImplementedError

    def open(self, folder: Path, dim: int) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self.faiss: Any = faiss
        self.file = folder / "index.faiss"
        self.index: Any = faiss.read_index(str(self.file)) if self.file.exists() else self.made(dim)

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:  # noqa: ARG002
        self.index.add(vectors)

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - memory only
        self.index.add(vector[None])

    def close(self) -> None:
        self.faiss.write_index(self.index, str(self.file))


class FaissFlat(Faiss):
    facts = Facts(
        name="faiss Flat",
        kind="library",
        modules=("faiss",),
        knobs=(0,),
        knob="none (exact scan)",
        settings="IndexFlatL2",
        durability=NONE,
        synced=False,
        payloads=False,
        filters=False,
        updates=False,
        deletes=False,
    )

    def made(self, dim: int) -> Any:
        return self.faiss.IndexFlatL2(dim)

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:  # noqa: ARG002 - nothing to set
        return listed(self.index.search(vectors, k)[1])


class FaissHnsw(Faiss):
    facts = Facts(
        name="faiss HNSW",
        kind="library",
        modules=("faiss",),
        knobs=EF,
        knob="efSearch",
        settings="IndexHNSWFlat M=32, efConstruction=40 (defaults)",
        durability=NONE,
        synced=False,
        payloads=False,
        filters=False,
        updates=False,
        deletes=False,
    )

    def made(self, dim: int) -> Any:
        return self.faiss.IndexHNSWFlat(dim, 32)

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        self.index.hnsw.efSearch = int(knob)
        return listed(self.index.search(vectors, k)[1])


def listed(found: Any) -> list[list[int]]:
    rows: list[list[int]] = np.asarray(found).tolist()
    return [[i for i in row if i >= 0] for row in rows]
