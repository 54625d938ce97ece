"""turbovec: a scan of 4-bit codes, its candidates ranked again by float vectors that the adapter keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol import Array, Facts, Payload, Peer

SAMPLE = 2048
"""Rows, drawn at random, that its codes are calibrated on; its manual calls 1,024 enough."""


class Turbovec(Peer):
    facts = Facts(
        name="turbovec",
        kind="library",
        modules=("turbovec",),
        knobs=(10, 15, 20, 30, 40, 60, 80, 160, 320),
        knob="candidates, ranked again by float32 above 10",
        settings="IdMapIndex, 4 bits, calibrated on 2,048 rows; float vectors beside it for the ranking",
        durability="none for the float vectors; synced: sync() of the codes; by default in memory",
        synced=False,
        payloads=False,
        filters=False,
    )

    def open(self, folder: Path, dim: int) -> None:
        from turbovec import IdMapIndex

        self.codes_file, self.rows_file = folder / "codes.tvim", folder / "rows.npy"
        there = self.codes_file.exists()
        self.index: Any = IdMapIndex.load(str(self.codes_file)) if there else IdMapIndex(dim=dim, bit_width=4)
        self.rows: Array = np.load(self.rows_file) if there else np.zeros((0, dim), dtype=np.float32)

    def _keep(self, number: int, vectors: Array) -> None:
        end = number + len(vectors)
        if end > len(self.rows):
            grown = np.zeros((end + end // 4, vectors.shape[1]), dtype=np.float32)
            grown[: len(self.rows)] = self.rows
            self.rows = grown
        self.rows[number:end] = vectors

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:  # noqa: ARG002
        sample = np.random.default_rng(1).choice(len(vectors), min(SAMPLE, len(vectors)), replace=False)
        self.index.calibrate(vectors[sample])
        self._keep(ids[0], vectors)
        self.index.add_with_ids(vectors, np.asarray(ids, dtype=np.uint64))

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        found = self.index.search(vectors, max(k, int(knob)))[1].astype(np.int64)
        if knob > k:
            scores = np.einsum("qkd,qd->qk", self.rows[found], vectors)
            found = np.take_along_axis(found, np.argsort(-scores, axis=1)[:, :k], axis=1)
        rows: list[list[int]] = found.tolist()
        return rows

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - memory only
        self._keep(number, vector[None])
        self.index.add_with_ids(vector[None], np.asarray([number], dtype=np.uint64))

    def delete(self, number: int, synced: bool) -> None:  # noqa: ARG002 - memory only
        self.index.remove(number)

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:
        self.index.remove(number)
        self.insert(number, vector, payload, synced)

    def close(self) -> None:
        self.index.write(str(self.codes_file))
        np.save(self.rows_file, self.rows)
