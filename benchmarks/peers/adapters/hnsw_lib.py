"""hnswlib: the reference HNSW."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol import EF, Array, Facts, Payload, Peer

SPARE = 20_000
"""Rows that can be added before the index must be resized."""


class Hnswlib(Peer):
    facts = Facts(
        name="hnswlib",
        kind="library",
        modules=("hnswlib",),
        knobs=EF,
        knob="ef",
        settings="l2, M=16, ef_construction=200, allow_replace_deleted=False",
        durability="none: in memory; the file is written by close()",
        synced=False,
        payloads=False,
        filters=False,
    )

    def open(self, folder: Path, dim: int) -> None:
        import hnswlib

        self.file = folder / "index.hnsw"
        self.index: Any = hnswlib.Index("l2", dim)
        self.index.set_num_threads(1)
        if self.file.exists():
            self.index.load_index(str(self.file))
            self._room(SPARE)
        else:
            self.index.init_index(SPARE, ef_construction=200, M=16)

    def _room(self, rows: int) -> None:
        wanted = self.index.get_current_count() + rows
        if wanted > self.index.get_max_elements():
            self.index.resize_index(wanted)

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:  # noqa: ARG002
        self._room(len(ids) + SPARE)
        self.index.add_items(vectors, np.asarray(ids), num_threads=1)

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        self.index.set_ef(int(knob))
        found: list[list[int]] = self.index.knn_query(vectors, k, num_threads=1)[0].tolist()
        return found

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - memory only
        self._room(1)
        self.index.add_items(vector[None], [number], num_threads=1)

    def delete(self, number: int, synced: bool) -> None:  # noqa: ARG002 - memory only
        self.index.mark_deleted(number)

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:
        self.insert(number, vector, payload, synced)

    def close(self) -> None:
        self.index.save_index(str(self.file))
