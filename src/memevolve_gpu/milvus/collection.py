"""The collection of a store: schema, index and load, rows, timestamps, and unit conversion."""

from __future__ import annotations

import json
import secrets
import time
import zlib
from base64 import b85decode, b85encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import (
    ConfigurationError,
    CorruptStoreError,
    DimensionMismatchError,
    InvalidUnitError,
    ModelMismatchError,
    NewerSchemaError,
    NotAStoreError,
    StorageError,
)
from ..types import FloatArray, Json, JsonObject, MemoryUnit, Metric
from ..utils.config import StorageConfig
from ..utils.forking import lock, renew_in_child
from ..utils.plain import json_text
from .client import LONG, Client, MilvusClient, Version
from .filters import born_between, facts_of, ids_expression, joined
from .plan import METRICS, ServerPlan, plan_for

_LOGICAL_BITS = 18
"""A timestamp of Milvus: milliseconds since the epoch, then 18 bits that count within one."""

_IDS_PER_NUMBER = 1_000_000


class Clock:
    """One writer's view of the server's clock. Safe to use from several threads.

    Reads carry a *guarantee timestamp*: the server answers when it has seen everything up to it. ``wrote`` moves it
    beyond what this writer has had acknowledged, so that the writer, and only the writer, waits for its own writes.
    pymilvus' own Session level is not used: the server reports no time for deletes (measured with 2.3.5: a count right
    after a delete was the old one), and a new process would begin without any.
    """

    level: str
    """session, strong, bounded or eventually; strong instead of session where the server has no clock to ask."""

    def __init__(self, server: MilvusClient) -> None:
        """Asks the server for its time: everything that anyone had acknowledged before is seen from here on."""
        self._server = server
        self._lock = lock()
        self._guarantee = 0
        self._offset = 0
        self._last_born = 0
        self._ids: Iterator[str] = iter(())
        self.level = server.config.consistency
        renew_in_child(self)
        moment = server.timestamp()
        if moment is None and self.level == "session":
            self.level = "strong"
        if moment is not None:
            self._guarantee = moment
            self._offset = (moment >> _LOGICAL_BITS) * 1_000_000 - time.time_ns()

    def after_fork(self) -> None:
        """A child is another writer: it takes numbers of its own."""
        self._ids = iter(())

    def reading(self) -> JsonObject:
        """What every read tells the server."""
        if self.level == "session":
            return {"consistency_level": "Customized", "guarantee_timestamp": self._guarantee}
        return {"consistency_level": self.level.capitalize()}

    def wrote(self) -> None:
        """A write was acknowledged, by this writer or, as far as it knows, by another."""
        if self.level != "session":
            return
        moment = self._server.timestamp()
        with self._lock:
            self._guarantee = max(self._guarantee, moment or 0)

    def next_timestamps(self, count: int) -> range:
        """Moments in nanoseconds, ascending, after all that this writer was given before."""
        with self._lock:
            first = max(self._last_born + 1, time.time_ns() + self._offset)
            self._last_born = first + count - 1
        return range(first, first + count)

    def next_id(self) -> str:
        """``unit_<n>`` with an n that no other writer is given: the server hands out each timestamp once."""
        with self._lock:
            unit_id = next(self._ids, None)
        if unit_id is not None:
            return unit_id
        number = self._server.timestamp() or secrets.randbits(63)
        fresh = (f"unit_{number * _IDS_PER_NUMBER + i}" for i in range(_IDS_PER_NUMBER))
        with self._lock:
            self._ids = fresh
            return next(fresh)


MAX_BODY_BYTES = 65_535
"""The longest text that a Milvus column takes."""

MAX_KIND_CHARS = 255
_PACKED = "z"


def record_of(unit: MemoryUnit, vector: FloatArray, born: int, wrote: int, where: str = "unit") -> JsonObject:
    """A row as the client takes it. Raises InvalidUnitError, naming ``where``, for a unit that is too long.

    vector: float32 (dim,). ``born``, its place in the order, and ``wrote``, when it was sent, are nanoseconds by the
    server's clock.
    """
    (facts, vague), kind = facts_of(unit), unit.get("type")
    return {
        "id": str(unit["id"]),
        "vector": vector,
        "body": _body_of(unit, where),
        "kind": "" if kind is None else str(kind)[:MAX_KIND_CHARS],
        "born": born,
        "wrote": wrote,
        "facts": facts,
        "vague": vague,
    }


def _body_of(unit: MemoryUnit, where: str) -> str:
    """The unit's JSON, packed when it is too long for a column. Raises InvalidUnitError when that does not help."""
    text = json_text(unit)
    if len(text.encode()) <= MAX_BODY_BYTES:
        return text
    packed = _PACKED + b85encode(zlib.compress(text.encode(), 9)).decode()
    if len(packed) > MAX_BODY_BYTES:
        raise InvalidUnitError(
            f"{where} has {len(text.encode())} bytes as JSON and {len(packed)} packed; a row of Milvus takes "
            f"{MAX_BODY_BYTES}: split it"
        )
    return packed


def unit_of(body: str) -> MemoryUnit:
    """The unit of a column. Raises CorruptStoreError for what we have not written."""
    try:
        text = zlib.decompress(b85decode(body[1:])).decode() if body.startswith(_PACKED) else body
        unit = json.loads(text)
    except (ValueError, zlib.error) as error:
        raise CorruptStoreError(f"column body holds no unit of ours ({error}); was it written by others?") from error
    if not isinstance(unit, dict):
        raise CorruptStoreError("column body holds no unit of ours; was it written by others?")
    return unit


def vector_of(value: object) -> FloatArray:
    """float32 (dim,) as it was written."""
    return np.asarray(value, dtype=np.float32)


FORMAT = 1
_MARK = "memevolve-gpu "
_COLUMNS = {"id", "vector", "body", "kind", "born", "wrote", "facts", "vague"}


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """What a collection says of itself; ``model`` None: it was made without a name for it."""

    dim: int
    metric: Metric
    model: str | None


def describe(server: MilvusClient) -> CollectionInfo | None:
    """What the collection is; None when there is none. Raises NotAStoreError, NewerSchemaError."""
    name = server.config.collection
    if not server.call("has_collection", name):
        return None
    found = server.call("describe_collection", name)
    text = str(found.get("description") or "")
    fields = {field["name"]: field for field in found["fields"]}
    if not text.startswith(_MARK) or not _COLUMNS.issubset(fields):
        raise NotAStoreError(f"the collection {name!r} is not one of ours; name another: MEMEVOLVE_MILVUS_COLLECTION")
    about = json.loads(text[len(_MARK) :])
    if about["format"] > FORMAT:
        raise NewerSchemaError(
            f"the collection {name!r} has format {about['format']}, this version reads {FORMAT}; upgrade"
        )
    return CollectionInfo(int(fields["vector"]["params"]["dim"]), about["metric"], about.get("model"))


def open_collection(server: MilvusClient, dim: int | None, model: str | None, config: StorageConfig) -> CollectionInfo:
    """The collection, created when there is none, and compared with the caller's settings.

    Raises ConfigurationError, DimensionMismatchError or ModelMismatchError when they do not fit.
    """
    info = describe(server)
    if info is None:
        if dim is None:
            raise ConfigurationError(
                "embedding_dim is not known: give it, or an embedding_function, to make a new store"
            )
        make(server, CollectionInfo(dim, config.metric, model))
        info = describe(server)
    if info is None:
        raise StorageError(
            f"the collection {server.config.collection!r} was dropped while it was opened; open it again"
        )
    if dim is not None and dim != info.dim:
        raise DimensionMismatchError(info.dim, dim, "use the embedding model that filled the store")
    if "metric" in config.model_fields_set and config.metric != info.metric:
        raise ConfigurationError(f"MEMEVOLVE_STORAGE_METRIC={config.metric}: the store was made with {info.metric}")
    if model and info.model and model != info.model:
        raise ModelMismatchError(
            f"the store was filled by the embedding model {info.model!r}, embedding_function is {model!r}; "
            "use the same model, or export and embed into a new store"
        )
    return info


def make(server: MilvusClient, info: CollectionInfo) -> None:
    """Create the collection. Two that do so at once make the same one."""
    about = {"format": FORMAT, "metric": info.metric, "model": info.model}
    config = server.config

    def create(client: Client, seconds: float) -> None:
        client.create_collection(
            config.collection,
            schema=_schema(client, info.dim, _MARK + json.dumps(about)),
            num_shards=config.shards,
            consistency_level="Session",
            timeout=seconds,
        )

    server.attempt(create)


def serve(server: MilvusClient, info: CollectionInfo, version: Version, config: StorageConfig) -> ServerPlan:
    """Index and load the collection, unless that is done; the plan of the index that is there."""
    name = server.config.collection
    held = server.call("list_indexes", name)
    if "vector" not in held:
        plan = plan_for(version, info.dim, info.metric, config)
        _create_index(server, plan, info.metric)
    else:
        plan = held_plan(server)
    _load(server)
    return plan


def held_plan(server: MilvusClient) -> ServerPlan:
    """The index as the server describes it."""
    found = server.call("describe_index", server.config.collection, "vector") or {}
    index = str(found.get("index_type", ""))
    return ServerPlan(index, int(found.get("nlist") or 0), index in ("FLAT", "GPU_BRUTE_FORCE"), "as it was made")


def _create_index(server: MilvusClient, plan: ServerPlan, metric: Metric) -> None:
    def create(client: Client, seconds: float) -> None:
        wanted = client.prepare_index_params()
        wanted.add_index(
            field_name="vector",
            index_name="vector",
            index_type=plan.index,
            metric_type=METRICS[metric],
            params=plan.params,
        )
        client.create_index(server.config.collection, wanted, timeout=seconds)

    server.attempt(create, LONG)


def _load(server: MilvusClient) -> None:
    name, replicas = server.config.collection, server.config.replicas
    if "Loaded" in str(server.call("get_load_state", name).get("state")):
        return
    try:
        server.call("load_collection", name, seconds=LONG, replica_number=replicas)
    except StorageError as error:
        if replicas == 1:
            raise
        raise ConfigurationError(
            f"MEMEVOLVE_MILVUS_REPLICAS={replicas}: the server cannot hold so many ({error}); each needs a query node"
        ) from error


def _schema(client: Client, dim: int, description: str) -> Any:
    made = client.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
    for name, kind, options in (
        ("id", "VARCHAR", {"is_primary": True, "max_length": 4096}),
        ("vector", "FLOAT_VECTOR", {"dim": dim}),
        ("body", "VARCHAR", {"max_length": 65_535}),
        ("kind", "VARCHAR", {"max_length": 1024}),
        ("born", "INT64", {}),
        ("wrote", "INT64", {}),
        ("facts", "JSON", {}),
        ("vague", "BOOL", {}),
    ):
        made.add_field(name, _types()[kind], **options)
    return made


def _types() -> JsonObject:
    """Numbers of ``schema.proto``'s DataType: what the client's own enumeration holds."""
    numbers = {"BOOL": 1, "INT64": 5, "VARCHAR": 21, "JSON": 23, "FLOAT_VECTOR": 101}
    try:
        from pymilvus import DataType
    except ImportError:
        return dict(numbers)
    return {name: DataType(number) for name, number in numbers.items()}


WINDOW = 16_384
"""Most rows that Milvus returns for one request."""

_IDS = 1_000
_BATCH_BYTES = 16 * 2**20
"""Bytes of one upsert: the server takes 64 MiB."""

_SEALED = frozenset({3, 4, 5})
"""Sealed, Flushed and Flushing, in the numbers of ``common.proto``'s SegmentState."""

_SECOND = 10**9
_FROM, _LATEST = 0, 2**62
_PAGE_BYTES = 32 * 2**20


class Segment(NamedTuple):
    """A sealed segment of the collection.

    loaded: a query node holds it in its sealed form; indexed: it has the planned index.
    """

    rows: int
    loaded: bool
    indexed: bool


class Table:
    """The rows of the collection. Reads see the acknowledged writes of this writer; every write may be repeated."""

    def __init__(self, server: MilvusClient, dim: int) -> None:
        self.client = server
        self.dim = dim
        self.name = server.config.collection
        self.clock = Clock(server)

    # Writing

    def put(self, rows: Sequence[JsonObject]) -> None:
        """Write rows, each in the place of the one with its id. No id may occur twice.

        Acknowledged in batches of at most 16 MiB: when one fails, those before it stand.
        """
        try:
            for batch in _batches(rows, 4 * self.dim):
                self.client.call("upsert", self.name, batch)
        finally:
            self.clock.wrote()

    def drop(self, ids: Sequence[str]) -> int:
        """Delete rows; return how many existed. Concurrent deletes of the same rows may be counted twice."""
        dropped = 0
        for some in _chunks(ids, _IDS):
            there = list(self.get(some, []))
            if there:
                self.client.call("delete", self.name, filter=ids_expression(there))
                self.clock.wrote()
            dropped += len(there)
        return dropped

    def clear(self) -> None:
        """Delete every row. One that is written later than a second from now stays, should the call arrive twice."""
        moment = self.clock.next_timestamps(1)[0] + _SECOND
        self.client.call("delete", self.name, filter=f"wrote < {moment:d}")
        self.clock.wrote()

    # Reading

    def query(self, expression: str, columns: list[str], limit: int | None = None) -> list[JsonObject]:
        """Rows of which the expression is true, in no order."""
        named = {} if limit is None else {"limit": limit}
        found = self.client.call(
            "query", self.name, filter=expression, output_fields=columns, **named, **self.clock.reading()
        )
        return [dict(row) for row in found]

    def count(self, expression: str = "") -> int:
        """How many rows the expression is true of."""
        return int(self.query(expression, ["count(*)"])[0]["count(*)"])

    def get(self, ids: Sequence[str], columns: list[str]) -> dict[str, JsonObject]:
        """The rows that exist, by id, in the order of ``ids``."""
        ids = [unit_id for unit_id in ids if _can_be_asked(unit_id)]
        found: dict[str, JsonObject] = {}
        for some in _chunks(ids, _IDS):
            found.update((str(row["id"]), row) for row in self.query(ids_expression(some), ["id", *columns]))
        return {unit_id: found[unit_id] for unit_id in ids if unit_id in found}

    def units(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``."""
        return {unit_id: unit_of(row["body"]) for unit_id, row in self.get(ids, ["body"]).items()}

    def vectors(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """The vectors of those that exist, by id, in the order of ``ids``."""
        return {unit_id: vector_of(row["vector"]) for unit_id, row in self.get(ids, ["vector"]).items()}

    def in_order(self, columns: list[str], expression: str = "", page: int | None = None) -> Iterator[JsonObject]:
        """Rows one by one, oldest first, in pages: those that were written before now and stay as they are.

        The server does not sort, so the time is halved until what was written within a piece of it fits one page.
        """
        most = min(WINDOW, max(1, page or self._page(columns)))
        wanted = ["id", "born", *columns]
        spans = [(_FROM, _LATEST, self.count(expression))]
        while spans:
            low, high, held = spans.pop()
            if 0 < held <= most or (held and high - low <= 1):
                rows = self.query(joined(born_between(low, high), expression), wanted, WINDOW)
                yield from sorted(rows, key=lambda row: (row["born"], row["id"]))
            elif held:
                middle = self._middle(low, high)
                older = self.count(joined(born_between(low, middle), expression))
                spans += [(middle, high, held - older), (low, middle, older)]

    def _middle(self, low: int, high: int) -> int:
        """Halfway; but nothing is younger than now, and all that is older than 2020 is nothing."""
        now = self.clock.next_timestamps(1)[0]
        if high == _LATEST and low < now:
            return now
        return 1_577_836_800_000_000_000 if low == _FROM else (low + high) // 2

    def _page(self, columns: Iterable[str]) -> int:
        """Rows that make about 32 MiB at most, taking long contents for granted."""
        widths = {"vector": 4 * self.dim, "body": 16_384}
        return _PAGE_BYTES // (64 + sum(widths.get(name, 64) for name in columns))

    # Upkeep

    def flush(self) -> None:
        """Seal what was written, so that the server indexes it."""
        self.client.call("flush", self.name, seconds=LONG)

    def index_state(self) -> Mapping[str, Json]:
        """What the server says of the index on the vectors."""
        return dict(self.client.call("describe_index", self.name, "vector") or {})

    def segments(self) -> list[Segment] | None:
        """Everything that is sealed; None where the client cannot ask. What still grows is listed nowhere."""

        def ask(client: Client, seconds: float) -> list[Segment] | None:
            connection: Any = getattr(client, "_get_connection", lambda: None)()
            if not hasattr(connection, "get_query_segment_info"):
                return None
            loaded = connection.get_query_segment_info(self.name, timeout=seconds)
            names = {int(one.segmentID): one.index_name for one in loaded}
            sealed = connection.get_persistent_segment_infos(self.name, timeout=seconds)
            numbered = ((int(one.segmentID), int(one.num_rows)) for one in sealed if int(one.state) in _SEALED)
            return [Segment(rows, number in names, names.get(number) == "vector") for number, rows in numbered]

        found: list[Segment] | None = self.client.attempt(ask)
        return found


def _batches(rows: Sequence[JsonObject], vector_bytes: int) -> Iterator[list[JsonObject]]:
    batch: list[JsonObject] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += 2 * len(row["body"].encode()) + vector_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _can_be_asked(unit_id: str) -> bool:
    """Whether the id is valid Unicode; no other can have been stored."""
    return not any("\ud800" <= one <= "\udfff" for one in unit_id)


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
