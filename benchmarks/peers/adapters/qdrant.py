"""qdrant-edge-py: one shard in the process, HNSW segments and a write-ahead log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..protocol import EF, Array, Facts, Payload, Peer

BATCH = 1000


class Qdrant(Peer):
    facts = Facts(
        name="qdrant-edge",
        kind="store",
        modules=("qdrant_edge",),
        knobs=EF,
        knob="hnsw_ef",
        settings="HNSW m=16, ef_construct=100 (defaults), Dot, one search thread, integer index on part",
        durability="synced: flush() after the call; by default in the write-ahead log, not synced",
    )

    def open(self, folder: Path, dim: int) -> None:
        import qdrant_edge as q

        self.q: Any = q
        config = q.EdgeConfig(
            vectors=q.EdgeVectorParams(dim, q.Distance.Dot),
            hnsw_config=q.HnswIndexConfig(16, 100, 10_000, 1),
            optimizers=q.EdgeOptimizersConfig(default_segment_number=1, indexing_threshold=1000),
            max_search_threads=1,
        )
        home = folder / "shard"
        self.shard: Any = q.EdgeShard.load(str(home)) if home.exists() else self._made(home, config)

    def _made(self, home: Path, config: Any) -> Any:
        home.mkdir(parents=True)
        shard = self.q.EdgeShard.create(str(home), config)
        shard.update(self.q.UpdateOperation.create_field_index("metadata.part", self.q.PayloadSchemaType.Integer))
        return shard

    def _put(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:
        rows = zip(ids, vectors, payloads, strict=True)
        points = [self.q.Point(i, vector.tolist(), payload) for i, vector, payload in rows]
        self.shard.update(self.q.UpdateOperation.upsert_points(points))

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:
        for at in range(0, len(ids), BATCH):
            end = at + BATCH
            self._put(ids[at:end], vectors[at:end], payloads[at:end])
        self.shard.flush()

    def settle(self) -> None:
        self.shard.optimize()
        self.shard.flush()

    def _query(self, vector: Array, k: int, knob: float, payload: bool = False, filters: Any = None) -> Any:
        nearest = self.q.Query.Nearest(vector.tolist())
        params = self.q.SearchParams(hnsw_ef=int(knob))
        request = self.q.SearchRequest(query=nearest, limit=k, filter=filters, params=params, with_payload=payload)
        return self.shard.search(request)

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        return [[point.id for point in self._query(vector, k, knob)] for vector in vectors]

    def search_units(self, vectors: Array, k: int, knob: float) -> list[list[Payload]]:
        return [[point.payload for point in self._query(vector, k, knob, True)] for vector in vectors]

    def search_filtered(self, vectors: Array, k: int, knob: float, below: int) -> list[list[int]]:
        condition = self.q.FieldCondition("metadata.part", range=self.q.RangeFloat(lt=float(below)))
        filters = self.q.Filter(must=[condition])
        return [[point.id for point in self._query(vector, k, knob, False, filters)] for vector in vectors]

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:
        self._put([number], vector[None], [payload])
        if synced:
            self.shard.flush()

    def delete(self, number: int, synced: bool) -> None:
        self.shard.update(self.q.UpdateOperation.delete_points([number]))
        if synced:
            self.shard.flush()

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:
        self.insert(number, vector, payload, synced)

    def close(self) -> None:
        self.shard.flush()
        self.shard.close()
