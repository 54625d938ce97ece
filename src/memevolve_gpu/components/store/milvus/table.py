"""The rows of one collection: written by id, read by id, by age, or by a filter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ....types import FloatArray, MemoryUnit
from .clock import Clock
from .door import LONG, Door
from .expressions import born_between, ids_expression, joined
from .rows import Row, body_of, record_of, unit_of, vector_of

__all__ = ["WINDOW", "Segment", "Table", "bodies_of"]

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
    """A sealed piece of the collection. loaded: a query node holds it as such, and not as it was while it grew;
    indexed: with the index that we asked for.
    """

    rows: int
    loaded: bool
    indexed: bool


class Table:
    """Reads see what this writer has had acknowledged; every write may be repeated without harm."""

    def __init__(self, door: Door, dim: int) -> None:
        self.door = door
        self.dim = dim
        self.name = door.config.collection
        self.clock = Clock(door)

    # Writing

    def put(self, rows: Sequence[Row], bodies: Sequence[str]) -> None:
        """Write rows, each in the place of the one with its id. No id may occur twice.

        Acknowledged in batches of at most 16 MiB: when one fails, those before it stand.
        """
        try:
            for batch in _batches(rows, bodies, 4 * self.dim):
                self.door.call("upsert", self.name, batch)
        finally:
            self.clock.wrote()

    def drop(self, ids: Sequence[str]) -> int:
        """Delete the rows that exist; their number, as far as nobody else deleted them in the same moment."""
        dropped = 0
        for some in _chunks(ids, _IDS):
            there = list(self.get(some, []))
            if there:
                self.door.call("delete", self.name, filter=ids_expression(there))
                self.clock.wrote()
            dropped += len(there)
        return dropped

    def clear(self) -> None:
        """Delete every row. One that is written later than a second from now stays, should the call arrive twice."""
        moment = self.clock.births(1)[0] + _SECOND
        self.door.call("delete", self.name, filter=f"wrote < {moment:d}")
        self.clock.wrote()

    # Reading

    def query(self, expression: str, columns: list[str], limit: int | None = None) -> list[dict[str, Any]]:
        """Rows of which the expression is true, in no order."""
        named = {} if limit is None else {"limit": limit}
        found = self.door.call(
            "query", self.name, filter=expression, output_fields=columns, **named, **self.clock.reading()
        )
        return [dict(row) for row in found]

    def count(self, expression: str = "") -> int:
        """How many rows the expression is true of."""
        return int(self.query(expression, ["count(*)"])[0]["count(*)"])

    def get(self, ids: Sequence[str], columns: list[str]) -> dict[str, dict[str, Any]]:
        """The rows that exist, by id, in the order of ``ids``."""
        ids = [unit_id for unit_id in ids if _can_be_asked(unit_id)]
        found: dict[str, dict[str, Any]] = {}
        for some in _chunks(ids, _IDS):
            found.update((str(row["id"]), row) for row in self.query(ids_expression(some), ["id", *columns]))
        return {unit_id: found[unit_id] for unit_id in ids if unit_id in found}

    def units(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``."""
        return {unit_id: unit_of(row["body"]) for unit_id, row in self.get(ids, ["body"]).items()}

    def vectors(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """The vectors of those that exist, by id, in the order of ``ids``."""
        return {unit_id: vector_of(row["vector"]) for unit_id, row in self.get(ids, ["vector"]).items()}

    def in_order(self, columns: list[str], expression: str = "", page: int | None = None) -> Iterator[dict[str, Any]]:
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
        now = self.clock.births(1)[0]
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
        self.door.call("flush", self.name, seconds=LONG)

    def index_state(self) -> Mapping[str, Any]:
        """What the server says of the index on the vectors."""
        return dict(self.door.call("describe_index", self.name, "vector") or {})

    def segments(self) -> list[Segment] | None:
        """Everything that is sealed; None where the client cannot ask. What still grows is listed nowhere."""

        def ask(client: Any, seconds: float) -> list[Segment] | None:
            connection: Any = getattr(client, "_get_connection", lambda: None)()
            if not hasattr(connection, "get_query_segment_info"):
                return None
            loaded = {int(one.segmentID): one for one in connection.get_query_segment_info(self.name, timeout=seconds)}
            sealed = connection.get_persistent_segment_infos(self.name, timeout=seconds)
            return [_segment(one, loaded.get(int(one.segmentID))) for one in sealed if int(one.state) in _SEALED]

        found: list[Segment] | None = self.door.attempt(ask)
        return found

    def close(self) -> None:
        self.door.close()


def _segment(sealed: Any, loaded: Any | None) -> Segment:
    return Segment(int(sealed.num_rows), loaded is not None, loaded is not None and loaded.index_name == "vector")


def _batches(rows: Sequence[Row], bodies: Sequence[str], vector_bytes: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for row, body in zip(rows, bodies, strict=True):
        batch.append(record_of(row, body))
        size += 2 * len(body.encode()) + vector_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _can_be_asked(unit_id: str) -> bool:
    """Is it Unicode? What is not cannot have been stored."""
    return not any("\ud800" <= one <= "\udfff" for one in unit_id)


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def bodies_of(units: Sequence[MemoryUnit]) -> list[str]:
    """The contents of the rows, all of them before the first is written. Raises InvalidUnitError."""
    return [body_of(unit, f"units[{i}]") for i, unit in enumerate(units)]
