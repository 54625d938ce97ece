"""sqlite-vec: a virtual table that scans every vector exactly, in SQLite's own durability."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..protocol import Array, Facts, Payload, Peer, part_of


class SqliteVec(Peer):
    facts = Facts(
        name="sqlite-vec",
        kind="store",
        modules=("sqlite_vec", "apsw"),
        knobs=(0,),
        knob="none (exact scan)",
        settings="vec0 float[dim], l2, part as a metadata column, unit as an auxiliary column; WAL",
        durability="synced: one transaction a call, synchronous=FULL; by default the same",
        default_is_synced=True,
    )

    def open(self, folder: Path, dim: int) -> None:
        self.file, self.readers = str(folder / "units.db"), threading.local()
        self.db = self.readers.db = self._connected()
        self.db.execute("pragma journal_mode = wal")
        self.db.execute("pragma synchronous = full")
        columns = f"id integer primary key, vector float[{dim}], part integer, +unit text"
        self.db.execute(f"create virtual table if not exists units using vec0({columns})")

    def _connected(self) -> Any:
        import apsw  # many a Python's own sqlite3 cannot load extensions
        import sqlite_vec

        made = apsw.Connection(self.file)
        made.enable_load_extension(True)
        made.load_extension(sqlite_vec.loadable_path())
        return made

    def ingest(self, ids: Sequence[int], vectors: Array, payloads: Sequence[Payload]) -> None:
        rows = (row(*one) for one in zip(ids, vectors, payloads, strict=True))
        self.db.execute("begin")
        self.db.executemany("insert into units (id, vector, part, unit) values (?, ?, ?, ?)", rows)
        self.db.execute("commit")

    def _query(self, what: str, vector: Array, k: int, condition: str = "") -> list[Any]:
        text = f"select {what} from units where vector match ? and k = ? {condition} order by distance"
        if not hasattr(self.readers, "db"):
            self.readers.db = self._connected()  # one for each thread
        return [found[0] for found in self.readers.db.execute(text, (vector.tobytes(), k))]

    def search(self, vectors: Array, k: int, knob: float) -> list[list[int]]:  # noqa: ARG002 - nothing to set
        return [self._query("id", vector, k) for vector in vectors]

    def search_units(self, vectors: Array, k: int, knob: float) -> list[list[Payload]]:  # noqa: ARG002 - nothing to set
        return [[json.loads(text) for text in self._query("unit", vector, k)] for vector in vectors]

    def search_filtered(self, vectors: Array, k: int, knob: float, below: int) -> list[list[int]]:  # noqa: ARG002
        return [self._query("id", vector, k, f"and part < {below:d}") for vector in vectors]

    def insert(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - always is
        self.db.execute("insert into units (id, vector, part, unit) values (?, ?, ?, ?)", row(number, vector, payload))

    def delete(self, number: int, synced: bool) -> None:  # noqa: ARG002 - always is
        self.db.execute("delete from units where id = ?", (number,))

    def update(self, number: int, vector: Array, payload: Payload, synced: bool) -> None:  # noqa: ARG002 - always is
        text = "update units set vector = ?, part = ?, unit = ? where id = ?"
        self.db.execute(text, (*row(number, vector, payload)[1:], number))

    def close(self) -> None:
        self.db.close()


def row(number: int, vector: Array, payload: Payload) -> tuple[int, bytes, int, str]:
    return number, vector.tobytes(), part_of(payload), json.dumps(payload)
