"""lancedb: columnar files in versions, an IVF index of HNSW graphs over scalar-quantised vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..protocol import EF, Array, Facts, Payload, Peer, part_of


class Lance(Peer):
    facts = Facts(
        name="lancedb",
        kind="store",
        modules=("lancedb",),
        knobs=EF[3:],
        knob="ef, refine_factor 4",
        settings="IVF_HNSW_SQ, l2, defaults (one partition up to 1,048,576 rows), BTREE on id and part",
        durability="not synced: a new version of the table is renamed into place; by default the same",
        synced=False,
    )

    def open(self, folder: Path, dim: int) -> None:
        import lancedb
        import pyarrow as pa

        self.dim = dim
        self.schema = pa.schema(
            [
                ("id", pa.int64()),
                ("vector", pa.list_(pa.float32(), dim)),
                ("part", pa.int32()),
                ("unit", pa.string()),
            ]
        )
        self.db: Any = lancedb.connect(str(folder))
        self.table: Any = self.db.create_table("units", schema=self.schema, exist_ok=True)

    def _rows(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> Any:
        import pyarrow as pa

        flat = pa.array(vectors.reshape(-1), pa.float32())
        columns = [
            pa.array(list(ids), pa.int64()),
            pa.FixedSizeListArray.from_arrays(flat, self.dim),
            pa.array([part_of(unit) for unit in payloads], pa.int32()),
            pa.array([json.dumps(unit) for unit in payloads], pa.string()),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:
        self.table.add(self._rows(ids, vectors, payloads))

    def settle(self) -> None:
        self.table.create_index(metric="l2", index_type="IVF_HNSW_SQ", num_partitions=1)
        self.table.create_scalar_index("part", index_type="BTREE")
        self.table.create_scalar_index("id", index_type="BTREE")

    def _query(self, vector: Array, k: int, knob: float) -> Any:
        return self.table.search(vector).distance_type("l2").limit(k).ef(int(knob)).refine_factor(4)

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:
        return [self._query(v, k, knob).select(["id", "_distance"]).to_arrow()["id"].to_pylist() for v in vectors]

    def search_units(self, vectors: Array, k: int, knob: float) -> list[list[Payload]]:
        texts = [self._query(v, k, knob).select(["unit", "_distance"]).to_arrow()["unit"].to_pylist() for v in vectors]
        return [[json.loads(text) for text in row] for row in texts]

    def search_filtered(self, vectors: Array, k: int, knob: float, below: int) -> list[list[int]]:
        queries = [self._query(v, k, knob).where(f"part < {below}", prefilter=True) for v in vectors]
        return [query.select(["id", "_distance"]).to_arrow()["id"].to_pylist() for query in queries]

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - never is
        self.table.add(self._rows([number], vector[None], [payload]))

    def delete(self, number: int, synced: bool) -> None:  # noqa: ARG002 - never is
        self.table.delete(f"id = {number}")

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - never is
        rows = self._rows([number], vector[None], [payload])
        self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def close(self) -> None:
        del self.table, self.db
