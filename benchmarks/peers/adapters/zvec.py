"""zvec: an HNSW engine with its own files in the process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..protocol import EF, Array, Facts, Payload, Peer, part_of

BATCH = 1000


class Zvec(Peer):
    facts = Facts(
        name="zvec",
        kind="store",
        modules=("zvec",),
        knobs=EF,
        knob="ef",
        settings="HNSW m=50, ef_construction=500 (defaults), FP32, IP; one thread; inverted index on part",
        durability="synced: flush() after the call; by default in the write-ahead log, not synced",
    )

    def open(self, folder: Path, dim: int) -> None:
        import zvec as z

        self.z: Any = z
        with suppress(RuntimeError):  # once a process; with more than one query thread a search after an insert hangs
            z.init(query_threads=1, optimize_threads=1, log_level=z.LogLevel.ERROR)
        home = folder / "units"
        if home.exists():
            self.table: Any = z.open(str(home))
            return
        index = z.HnswIndexParam(metric_type=z.MetricType.IP, m=50, ef_construction=500)
        ranges = z.InvertIndexParam(enable_range_optimization=True)
        schema = z.CollectionSchema(
            name="units",
            fields=[
                z.FieldSchema("part", z.DataType.INT32, index_param=ranges),
                z.FieldSchema("unit", z.DataType.STRING),
            ],
            vectors=z.VectorSchema("vector", z.DataType.VECTOR_FP32, dim, index_param=index),
        )
        self.table = z.create_and_open(str(home), schema)

    def _row(self, number: int, vector: Array, payload: Payload) -> Any:
        fields = {"part": part_of(payload), "unit": json.dumps(payload)}
        return self.z.Doc(id=str(number), vectors={"vector": vector.tolist()}, fields=fields)

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:
        for at in range(0, len(ids), BATCH):
            rows = zip(ids[at : at + BATCH], vectors[at : at + BATCH], payloads[at : at + BATCH], strict=True)
            checked(self.table.insert([self._row(*one) for one in rows]))
        self.table.flush()

    def settle(self) -> None:
        self.table.optimize(self.z.OptimizeOption(concurrency=1))

    def _query(self, vector: Array, k: int, knob: float, fields: list[str], filters: str | None = None) -> Any:
        param = self.z.HnswQueryParam(ef=int(knob))
        query = self.z.Query("vector", vector=vector.tolist(), param=param)
        return self.table.query(query, topk=k, filter=filters, output_fields=fields)

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        return [[int(hit.id) for hit in self._query(vector, k, knob, [])] for vector in vectors]

    def search_units(self, vectors: Array, k: int, knob: float) -> list[list[Payload]]:
        return [[json.loads(hit.field("unit")) for hit in self._query(v, k, knob, ["unit"])] for v in vectors]

    def search_filtered(self, vectors: Array, k: int, knob: float, below: int) -> list[list[int]]:
        return [[int(hit.id) for hit in self._query(vector, k, knob, [], f"part < {below}")] for vector in vectors]

    def _synced(self, status: Any, synced: bool) -> None:
        checked([status])
        if synced:
            self.table.flush()

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:
        self._synced(self.table.insert(self._row(number, vector, payload)), synced)

    def delete(self, number: int, synced: bool) -> None:
        self._synced(self.table.delete(str(number)), synced)

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:
        self._synced(self.table.upsert(self._row(number, vector, payload)), synced)

    def close(self) -> None:
        self.table.close()


def checked(statuses: list[Any]) -> None:
    for status in statuses:
        if not status.ok():
            raise RuntimeError(f"zvec refused a row: {status.message()}")
