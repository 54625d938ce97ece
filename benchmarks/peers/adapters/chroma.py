"""chromadb, its persistent client: SQLite beside an HNSW index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..protocol import EF, Array, Facts, Payload, Peer, part_of

BATCH = 5000
"""Below the client's own limit, which hangs on the SQLite it was built with."""


class Chroma(Peer):
    facts = Facts(
        name="chromadb",
        kind="store",
        modules=("chromadb",),
        knobs=EF,
        knob="ef_search",
        settings="PersistentClient, hnsw space=l2, M=16, ef_construction=100 (defaults), sync_threshold=1000",
        durability="synced: one SQLite transaction a call; by default the same. HNSW files every 1,000 changes",
        default_is_synced=True,
    )

    def open(self, folder: Path, dim: int) -> None:  # noqa: ARG002 - taken from the first vector
        import chromadb
        from chromadb.config import Settings

        self.client: Any = chromadb.PersistentClient(str(folder), Settings(anonymized_telemetry=False))
        hnsw = {"space": "l2", "max_neighbors": 16, "ef_construction": 100, "ef_search": 100, "num_threads": 1}
        self.table: Any = self.client.get_or_create_collection(
            "units", configuration={"hnsw": hnsw}, embedding_function=None
        )
        self.knob: float = 0

    def _rows(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> dict[str, Any]:
        return {
            "ids": [str(i) for i in ids],
            "embeddings": vectors,
            "documents": [json.dumps(unit) for unit in payloads],
            "metadatas": [{"part": part_of(unit)} for unit in payloads],
        }

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:
        for at in range(0, len(ids), BATCH):
            end = at + BATCH
            self.table.add(**self._rows(ids[at:end], vectors[at:end], payloads[at:end]))
        self.search(vectors[-1:], 1, 10)  # what is still in its log is applied here

    def _query(self, vectors: Array, k: int, knob: float, include: list[str], where: Any = None) -> Any:
        if knob != self.knob:
            self.table.modify(configuration={"hnsw": {"ef_search": int(knob)}})
            self.knob = knob
        return self.table.query(query_embeddings=vectors, n_results=k, include=include, where=where)

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        return [[int(i) for i in row] for row in self._query(vectors, k, knob, [])["ids"]]

    def search_units(self, vectors: Array, k: int, knob: float) -> list[list[Payload]]:
        return [[json.loads(text) for text in row] for row in self._query(vectors, k, knob, ["documents"])["documents"]]

    def search_filtered(self, vectors: Array, k: int, knob: float, below: int) -> list[list[int]]:
        found = self._query(vectors, k, knob, [], {"part": {"$lt": below}})
        return [[int(i) for i in row] for row in found["ids"]]

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - always is
        self.table.add(**self._rows([number], vector[None], [payload]))

    def delete(self, number: int, synced: bool) -> None:  # noqa: ARG002 - always is
        self.table.delete(ids=[str(number)])

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - always is
        self.table.update(**self._rows([number], vector[None], [payload]))

    def close(self) -> None:
        self.client.close()
