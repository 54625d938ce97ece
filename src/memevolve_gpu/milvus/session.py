"""The parts of one open ``MilvusStore``, and its health and statistics reports."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..components.store.base import Progress
from ..components.store.reports import OPERATIONS, Figures, event_reports, health, plain_details
from ..components.store.units import UnitEmbedder
from ..errors import CapacityError, StorageError
from ..monitoring.events import EventLog, LatencyRing
from ..types import FloatArray, MemoryUnit
from ..utils.arguments import word
from ..utils.config import MilvusConfig, StorageConfig
from ..utils.embeddings import Embedder, EmbeddingFunction
from ..utils.forking import lock
from ..utils.report_types import MilvusStatistics, OperationEntry, StorageHealth, TrainingReport
from .client import LONG, Client, MilvusClient, Version
from .collection import CollectionInfo, Table, describe, open_collection, record_of, serve
from .plan import ServerPlan
from .search import Search

_COUNT_AGE = 1.0
"""Seconds for which a count of all writers' units serves to tell how near the limit is."""

_INDEXED_FROM = 1024
"""Rows from which the server indexes a segment; smaller ones are compared row by row."""

_POLL = 0.25

_IN_FLIGHT = 60 * 10**9
"""Nanoseconds for which a row may have been on its way, or a writer's clock behind, when everything was sealed."""


@dataclass(eq=False)
class MilvusSession:
    """The parts of an open store."""

    config: StorageConfig
    place: MilvusConfig
    info: CollectionInfo
    version: Version
    plan: ServerPlan
    table: Table
    embedder: UnitEmbedder
    events: EventLog = field(default_factory=EventLog)
    latency: LatencyRing = field(default_factory=LatencyRing)
    operations: deque[OperationEntry] = field(default_factory=lambda: deque(maxlen=100))
    warned: bool = False

    def __post_init__(self) -> None:
        self.search = Search(self.table, self.plan, self.info.metric, self.config.target_recall)
        self._lock = lock()
        self._counted = (0, -_COUNT_AGE)

    # Writing

    def put(self, units: Sequence[MemoryUnit], vectors: FloatArray, births: Sequence[int]) -> None:
        """Write units that have ids, each id once; nothing is written when one of them is too long."""
        wrote = self.table.clock.next_timestamps(1)[0]
        names = ["unit"] if len(units) == 1 else [f"units[{i}]" for i in range(len(units))]
        rows = zip(units, vectors, births, names, strict=True)
        self.table.put([record_of(unit, vector, born, wrote, name) for unit, vector, born, name in rows])

    def drop(self, ids: list[str]) -> int:
        """Delete these units; how many went. Where that takes the store below the warning, it may warn again."""
        gone = self.table.drop(ids)
        self._less(gone)
        return gone

    def clear(self) -> None:
        """Delete every unit."""
        self.table.clear()
        self._less(None)

    def check_room(self, ids: Sequence[str | None]) -> None:
        """Raise CapacityError when the units of these ids (None: a new one each) do not fit; warn once per crossing.

        Far from the limit a count of at most a second ago decides; near it the server is asked who is there already.
        """
        limit = self.config.max_memory_units
        count = self._about(len(ids))
        if count > limit:
            named = list({unit_id for unit_id in ids if unit_id})
            new = len(named) - len(self.table.get(named, [])) + sum(not unit_id for unit_id in ids)
            held = self.table.count()
            count = held + new
            if new and count > limit:
                raise CapacityError(
                    f"the store holds {held} of at most {limit} units and cannot take {new} more; "
                    "delete units or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
                )
        above = count >= self.config.warning_threshold * limit
        if above and not self.warned:
            text = f"{count} of {limit} units: prune or consolidate, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
            self.events.record("near-limit", text, level=logging.WARNING, count=count, limit=limit)
        self.warned = above

    def _about(self, coming: int) -> int:
        """At most how many units there will be, as far as is known."""
        with self._lock:
            count, at = self._counted
        if time.monotonic() - at >= _COUNT_AGE:
            count, at = self.table.count(), time.monotonic()
        with self._lock:
            self._counted = (count + coming, at)
        return count + coming

    def _less(self, gone: int | None) -> None:
        """So many units went; None: all of them."""
        with self._lock:
            count, at = self._counted
            self._counted = (0 if gone is None else max(0, count - gone), at)
            if self._counted[0] < self.config.warning_threshold * self.config.max_memory_units:
                self.warned = False

    # Upkeep

    def unsettled(self) -> int:
        """Rows in segments that the server has not given the planned index yet."""
        least = math.inf if self.plan.index == "FLAT" else _INDEXED_FROM  # FLAT is no index, and never listed as one
        segments = self.table.segments() or []
        return sum(one.rows for one in segments if not one.loaded or (one.rows >= least and not one.indexed))

    def settle(self, progress: Progress | None = None) -> int:
        """Seal what was written and wait until it is indexed; how many rows had to be waited for.

        Raises StorageError when the server fails to index, or has not done it after ten minutes.
        """
        before = self.unsettled()
        begun = self.table.clock.next_timestamps(1)[0]
        self.table.flush()
        until = time.monotonic() + LONG
        most = max(1, before, self.unsettled())
        while left := self.unsettled():
            state = self.table.index_state()
            if str(state.get("state")) == "Failed":
                raise StorageError(f"the server could not build its {self.plan.index} index; see its log")
            if time.monotonic() > until:
                raise StorageError(f"{left} rows are still not indexed after {LONG:g} s; ask again later")
            if progress is not None:
                progress("index", 1 - left / max(most, left))
            time.sleep(_POLL)
        self.search.sealed_until = begun - _IN_FLIGHT
        return before


def open_session(
    place: MilvusConfig,
    function: EmbeddingFunction | None,
    dim: int | None,
    config: StorageConfig,
    make: Callable[[float], Client] | None,
) -> MilvusSession:
    """Open or make the collection; raises as ``MilvusStore`` documents, and leaves no connection behind then."""
    client = MilvusClient(place, make)
    try:
        version = client.version()
        held = describe(client)
        embedder = None if function is None else Embedder(function, held.dim if held and dim is None else dim)
        wanted = dim
        if wanted is None and held is None and embedder is not None:
            wanted = embedder.dimension
        model = embedder.model_name if embedder is not None else None
        info = open_collection(client, wanted, model, config)
        plan = serve(client, info, version, config)
        embeds = UnitEmbedder(embedder, info.dim, info.metric)
        return MilvusSession(config, place, info, version, plan, Table(client, info.dim), embeds)
    except BaseException:
        client.close()
        raise


_DEFAULT_MB = 2048.0


def health_report(session: MilvusSession) -> StorageHealth:
    """The report of ``MilvusStore.get_storage_health``."""
    config, count = session.config, session.table.count()
    waiting = session.unsettled()
    most = _DEFAULT_MB if config.max_memory_mb == "auto" else float(config.max_memory_mb)
    figures = Figures(
        config=config,
        count=count,
        usage=count / config.max_memory_units,
        rows=count,
        max_units=config.max_memory_units,
        max_memory_bytes=int(most * 2**20),
        build_cause=f"{waiting} rows wait for the server's {session.plan.index}" if waiting else "",
        training=TrainingReport(
            trained=session.plan.index != "FLAT",
            source=None if session.plan.index == "FLAT" else "existing",
            units=0,
            samples=0,
            samples_kept=0,
            next_source=None,
            next_samples=0,
            min_training_units=0,
            last_samples=None,
            reason="the server trains an index for each segment, on its own vectors",
            setting="MEMEVOLVE_STORAGE_INDEX_TYPE",
        ),
    )
    report = health(figures)
    if count > config.performance_threshold:
        report["latency"] = session.latency.percentiles()
    return report


def statistics_report(session: MilvusSession) -> MilvusStatistics:
    """The report of ``MilvusStore.statistics``."""
    segments = session.table.segments() or []
    return {
        "store": session.place.address,
        "count": session.table.count(),
        "dim": session.info.dim,
        "embedding_model": session.info.model,
        "metric": session.info.metric,
        "index": {"kind": session.plan.index, "nlist": session.plan.nlist, "reason": session.plan.reason},
        "server": {
            "version": session.version.text,
            "gpu": session.version.gpu,
            "consistency": session.table.clock.level,
            "segments": len(segments),
            "rows_indexed": sum(one.rows for one in segments if one.indexed),
            "rows_not_indexed": sum(one.rows for one in segments if not one.indexed),
        },
        "management": list(session.operations)[-20:],
        "latency": session.latency.percentiles(),
        "event_totals": session.events.totals(),
        "events": event_reports(session.events),
    }


def registered(session: MilvusSession, operation: str, details: object) -> OperationEntry:
    """Keep an operation in the history of this process. The server maintains its indexes by itself."""
    word("operation_type", operation, OPERATIONS)
    entry: OperationEntry = {"operation": operation, "at": time.time(), "details": plain_details(details)}
    session.operations.append(entry)
    session.events.record("management", f"{operation}: nothing")
    return {**entry, "count_after": session.table.count(), "decision": "nothing"}
