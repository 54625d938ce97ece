"""milvus-lite through pymilvus, as its users have it: a local file, an engine behind gRPC in the process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..protocol import EF, Array, Facts, Payload, Peer, part_of

BATCH = 2000


class Milvus(Peer):
    facts = Facts(
        name="milvus-lite",
        kind="store",
        modules=("milvus_lite", "pymilvus"),
        knobs=EF,
        knob="ef",
        settings="HNSW M=16, efConstruction=200, L2; unit as a JSON field",
        durability="not synced: a write-ahead log that is synced when it is closed; by default the same",
        synced=False,
    )

    def open(self, folder: Path, dim: int) -> None:
        from pymilvus import DataType, MilvusClient

        self.client: Any = MilvusClient(str(folder / "units.db"))
        if not self.client.has_collection("units"):
            schema = MilvusClient.create_schema(auto_id=False)
            schema.add_field("id", DataType.INT64, is_primary=True)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
            schema.add_field("part", DataType.INT64)
            schema.add_field("unit", DataType.JSON)
            self.client.create_collection("units", schema=schema)
        else:
            self.client.load_collection("units")

    def _rows(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> list[dict[str, Any]]:
        rows = zip(ids, vectors, payloads, strict=True)
        return [{"id": i, "vector": v.tolist(), "part": part_of(unit), "unit": unit} for i, v, unit in rows]

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:
        for at in range(0, len(ids), BATCH):
            end = at + BATCH
            self.client.insert("units", self._rows(ids[at:end], vectors[at:end], payloads[at:end]))
        self.client.flush("units")

    def settle(self) -> None:
        params = self.client.prepare_index_params()
        params.add_index("vector", index_type="HNSW", metric_type="L2", params={"M": 16, "efConstruction": 200})
        self.client.create_index("units", params)
        self.client.load_collection("units")

    def _query(self, vectors: Array, k: int, knob: float, fields: list[str], filters: str = "") -> Any:
        params = {"metric_type": "L2", "params": {"ef": int(knob)}}
        rows = [vector.tolist() for vector in vectors]
        return self.client.search(
            "units",
            rows,
            limit=k,
            filter=filters,
            search_params=params,
            output_fields=fields,
            anns_field="vector",
        )

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        return [[hit["id"] for hit in row] for row in self._query(vectors, k, knob, [])]

    def search_units(self, vectors: Array, k: int, knob: float) -> list[list[Payload]]:
        return [[hit["entity"]["unit"] for hit in row] for row in self._query(vectors, k, knob, ["unit"])]

    def search_filtered(self, vectors: Array, k: int, knob: float, below: int) -> list[list[int]]:
        return [[hit["id"] for hit in row] for row in self._query(vectors, k, knob, [], f"part < {below}")]

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - never is
        self.client.insert("units", self._rows([number], vector[None], [payload]))

    def delete(self, number: int, synced: bool) -> None:  # noqa: ARG002 - never is
        self.client.delete("units", ids=[number])

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - never is
        self.client.upsert("units", self._rows([number], vector[None], [payload]))

    def close(self) -> None:
        from milvus_lite.server_manager import server_manager_instance

        self.client.close()
        server_manager_instance.release_all()
