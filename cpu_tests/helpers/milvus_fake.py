"""A server in memory that answers like Milvus, behind the client's verbs that the store uses.

It is as unhelpful as the real one may be: a read sees only what its guarantee timestamp asks for, a search may return
less than there is, and calls fail when a test says so. Expressions are evaluated as they are, for those that we write
mean the same in Python.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

__all__ = ["FakeError", "FakeMilvus"]

LIMITS = {"id": 4096, "body": 65_535, "kind": 1024}


class FakeError(ConnectionError):
    """What the client raises: a number and a text."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class _Nothing:
    """A missing key: no comparison with it is true."""

    def __lt__(self, _other: object) -> bool:
        return False

    __gt__ = __le__ = __ge__ = __lt__


class _Json(dict[str, Any]):
    def __missing__(self, _key: str) -> Any:
        return _Nothing()


def _contains_any(held: list[str], wanted: list[str]) -> bool:
    return not set(wanted).isdisjoint(held)


class _Collection:
    def __init__(self, schema: Any) -> None:
        self.fields: list[dict[str, Any]] = schema.fields
        self.description: str = schema.description
        self.indexes: dict[str, dict[str, Any]] = {}
        self.loaded = 0
        self.rows: dict[str, dict[str, Any]] = {}
        self.waiting: deque[tuple[int, Callable[[], None]]] = deque()

    def see(self, until: float) -> None:
        while self.waiting and self.waiting[0][0] <= until:
            self.waiting.popleft()[1]()

    def matching(self, expression: str) -> list[dict[str, Any]]:
        code = compile(expression or "True", "<expression>", "eval")
        names = {"__builtins__": {}, "json_contains_any": _contains_any, "true": True, "false": False}
        return [row for row in self.rows.values() if eval(code, names, row)]


class FakeMilvus:
    """The server; ``connect`` is what ``MilvusStore`` takes as ``client``.

    failing: errors that the next calls raise, by verb, oldest first. most_found: most rows that a search returns.
    calls: how often each verb was called. segments: sealed ones that it
    claims to hold, as (rows, index), the index None where no node has loaded it.
    """

    def __init__(self, version: str = "v2.3.5") -> None:
        self.version = version
        self.collections: dict[str, _Collection] = {}
        self.failing: dict[str, deque[Exception]] = {}
        self.most_found: int | None = None
        self.calls: Counter[str] = Counter()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.segments: list[tuple[int, str | None]] = []
        self.has_clock = True
        self.query_nodes = 1
        self.lock = threading.RLock()
        self._last = 0

    def connect(self, _seconds: float) -> _Client:
        return _Client(self)

    def fail(self, verb: str, *errors: Exception) -> None:
        self.failing[verb] = deque(errors)

    def moment(self) -> int:
        self._last = max(self._last + 1, int(time.time() * 1000) << 18)
        return self._last


class _Schema:
    def __init__(self, description: str) -> None:
        self.description = description
        self.fields: list[dict[str, Any]] = []

    def add_field(self, name: str, _kind: Any, **params: Any) -> None:
        self.fields.append({"name": name, "params": params})


class _IndexParams(list[dict[str, Any]]):
    def add_index(self, **named: Any) -> None:
        self.append(named)


class _Client:
    def __init__(self, server: FakeMilvus) -> None:
        self._server = server

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name.startswith("_") or not callable(found):
            return found
        server = object.__getattribute__(self, "_server")

        def call(*arguments: Any, **named: Any) -> Any:
            with server.lock:
                server.calls[name] += 1
                server.asked.append((name, {**named, "arguments": arguments}))
                if server.failing.get(name):
                    raise server.failing[name].popleft()
                return found(*arguments, **named)

        return call

    def get_server_version(self, timeout: float) -> str:
        return self._server.version

    def _get_connection(self) -> Any:
        return self if self._server.has_clock else None

    def alloc_timestamp(self, timeout: float) -> int:
        return self._server.moment()

    def get_query_segment_info(self, name: str, timeout: float) -> list[Any]:
        held = enumerate(self._server.segments)
        return [SimpleNamespace(segmentID=at, index_name=index) for at, (_, index) in held if index is not None]

    def get_persistent_segment_infos(self, name: str, timeout: float) -> list[Any]:
        held = enumerate(self._server.segments)
        return [SimpleNamespace(segmentID=at, num_rows=rows, state=4) for at, (rows, _) in held]

    def has_collection(self, name: str, timeout: float) -> bool:
        return name in self._server.collections

    def describe_collection(self, name: str, timeout: float) -> dict[str, Any]:
        held = self._collection(name)
        return {"description": held.description, "fields": held.fields}

    def create_schema(self, description: str, **_named: Any) -> _Schema:
        return _Schema(description)

    def create_collection(self, name: str, schema: _Schema, timeout: float, **_named: Any) -> None:
        self._server.collections.setdefault(name, _Collection(schema))

    def prepare_index_params(self) -> _IndexParams:
        return _IndexParams()

    def create_index(self, name: str, wanted: _IndexParams, timeout: float) -> None:
        self._collection(name).indexes.update((one["index_name"], one) for one in wanted)

    def list_indexes(self, name: str, timeout: float) -> list[str]:
        return list(self._collection(name).indexes)

    def describe_index(self, name: str, index: str, timeout: float) -> dict[str, Any]:
        held = self._collection(name).indexes[index]
        return {"index_type": held["index_type"], "state": "Finished", **held["params"]}

    def get_load_state(self, name: str, timeout: float) -> dict[str, Any]:
        return {"state": "Loaded" if self._collection(name).loaded else "NotLoad"}

    def load_collection(self, name: str, replica_number: int, timeout: float) -> None:
        if replica_number > self._server.query_nodes:
            raise FakeError(1100, "invalid parameter: more replicas than query nodes")
        self._collection(name).loaded = replica_number

    def upsert(self, name: str, rows: list[Mapping[str, Any]], timeout: float) -> dict[str, Any]:
        held, fresh = self._collection(name), [self._row(row) for row in rows]
        if len({row["id"] for row in fresh}) < len(fresh):
            raise FakeError(1100, "invalid parameter: duplicate primary keys")
        held.waiting.append((self._server.moment(), lambda: held.rows.update((row["id"], row) for row in fresh)))
        return {"upsert_count": len(rows)}

    def delete(self, name: str, filter: str, timeout: float) -> dict[str, Any]:  # noqa: A002 - the client's word
        held = self._collection(name)

        def drop() -> None:
            for row in held.matching(filter):
                del held.rows[row["id"]]

        held.waiting.append((self._server.moment(), drop))
        return {"delete_count": 0}

    def query(
        self,
        name: str,
        filter: str,  # noqa: A002
        output_fields: list[str],
        timeout: float,
        limit: int | None = None,
        **reading: Any,
    ) -> list[dict[str, Any]]:
        held = self._seen(name, reading)
        found = held.matching(filter)
        if output_fields == ["count(*)"]:
            return [{"count(*)": len(found)}]
        chosen = found[::-1][:limit]
        return [{column: row[column] for column in {"id", *output_fields}} for row in chosen]

    def search(
        self,
        name: str,
        data: list[Any],
        filter: str,  # noqa: A002
        limit: int,
        output_fields: list[str],
        search_params: dict[str, Any],
        timeout: float,
        anns_field: str,
        **reading: Any,
    ) -> list[list[dict[str, Any]]]:
        held = self._seen(name, reading)
        rows = held.matching(filter)
        if not rows:
            return [[] for _ in data]
        vectors = np.array([row["vector"] for row in rows])
        most = min(limit, self._server.most_found or limit)
        answers = []
        for query in data:
            near = _nearness(np.asarray(query), vectors, search_params["metric_type"])
            sign = 1 if search_params["metric_type"] == "L2" else -1
            order = np.argsort(sign * near, kind="stable")[:most]
            answers.append(
                [
                    {
                        "id": rows[at]["id"],
                        "distance": float(near[at]),
                        "entity": {column: rows[at][column] for column in output_fields},
                    }
                    for at in order
                ]
            )
        return answers

    def flush(self, name: str, timeout: float) -> None:
        self._server.segments = [(rows, "vector") for rows, _ in self._server.segments]

    def close(self) -> None:
        return

    def _collection(self, name: str) -> _Collection:
        if name not in self._server.collections:
            raise FakeError(100, f"collection not found: {name}")
        return self._server.collections[name]

    def _seen(self, name: str, reading: Mapping[str, Any]) -> _Collection:
        held = self._collection(name)
        level = reading["consistency_level"]
        held.see(float("inf") if level == "Strong" else reading.get("guarantee_timestamp", 0))
        return held

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        for column, most in LIMITS.items():
            if len(row[column].encode()) > most:
                raise FakeError(1100, f"invalid parameter: length of varchar field {column} exceeds {most}")
        facts = json.dumps(row["facts"])
        if len(facts) > 65_536:
            raise FakeError(1100, "invalid parameter: length of json field exceeds 65536")
        vector = np.asarray(row["vector"], dtype=np.float32).tolist()
        return {**row, "facts": _Json(json.loads(facts)), "vector": vector}


def _nearness(query: Any, vectors: Any, metric: str) -> Any:
    if metric == "L2":
        return np.square(vectors - query).sum(axis=1)
    dots = vectors @ query
    if metric == "IP":
        return dots
    return dots / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))
