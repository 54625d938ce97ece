"""The parts of one open ``VectorStore`` and how they are opened: records, live index, maintenance, service samples."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.ma  # np.unique imports it at its first call, which the search of a signal handler could interrupt

from ...devices.gpu_probe import Prober
from ...devices.memory import host_budget
from ...devices.selection import Machine
from ...errors import (
    ConfigurationError,
    EngineError,
    MemEvolveError,
    ModelMismatchError,
)
from ...index.faiss_support import require_faiss
from ...index.torch_gpu.cuda_graphs import record_searches
from ...live import DeviceManager, Found, LiveIndex, LiveSettings, Maintenance, Worker
from ...live.namespaces import DEFAULT
from ...live.scheduler import Event
from ...live.view import View
from ...monitoring.events import EventLog
from ...records.check import Finding
from ...records.erasure import finish_erasure, is_unfinished
from ...records.filters import path_of
from ...records.records import Records
from ...records.schema import MODEL_KEY, StoreInfo
from ...types import FloatArray, Hit, JsonObject, MemoryUnit, Metric
from ...utils.arguments import shown
from ...utils.config import StorageConfig, gpu_order, visible_gpus
from ...utils.embeddings import Embedder, EmbeddingFunction
from ...utils.vectors import DeviceQueries, check_vectors, device_queries
from .access_stats import Accesses
from .legacy_import import Limits, import_legacy
from .namespaces import Path as Space
from .ranking import score_of
from .service_samples import Samples
from .units import UnitEmbedder, unit_to_text

INDEX_TYPE_KEY = "index_type"
FETCH_ATTEMPTS = 5

FLUSH_SECONDS = 1.0
"""How long the background waits for other writers to write access figures down; close() waits for the background."""
_ERASURE_SECONDS = 5.0
"""How long an opening waits for readers, to finish an erasure."""

FORESEEN_BY_WRITES = 2.0
"""Growth after which a write has the fields read that filters may name; a search has it sooner."""

APPLY_EVERY = 32
"""Single writes after which the index is brought up to date even without a search."""


AFTER_COMMIT = (MemEvolveError, OSError, MemoryError, RuntimeError, ValueError)
"""What the work after a commit may fail with. The write is durable by then, so it becomes an event and a state of
health, and the caller sees no error."""


@dataclass
class StoreSession:
    """The parts of an open store; ``records`` is the source of record."""

    prefix: str
    config: StorageConfig
    records: Records
    live: LiveIndex
    maintenance: Maintenance
    events: EventLog
    embedder: UnitEmbedder
    max_memory_bytes: int
    legacy_problem: str = ""
    fields: dict[tuple[str, ...], bool] = field(default_factory=dict)
    """The declared fields, and whether they hold moments."""
    recalled: dict[tuple[str, ...], bool] = field(default_factory=dict)
    """Fields that filters named before; the background reads them once."""
    closed: bool = False
    warned: set[str] = field(default_factory=set)
    """The limits, units or memory, that a warning was logged for; see ``capacity``."""
    unapplied: int = 0
    measured_room: int = 0
    """So many units fit into the memory limit, as it was measured; 0 until the next write measures it again."""
    lagging: str = ""
    """Why the index could not be brought up to date when that was last tried; empty when it was."""
    worker: Worker = field(init=False)
    accesses: Accesses = field(init=False)

    def __post_init__(self) -> None:
        self.worker = Worker(self._background_round, self.events)
        self.accesses = Accesses(self.records, self.events, weakref.WeakMethod(self.wake))

    # Index

    def clock(self) -> float:
        """The Unix time by which units expire."""
        return self.records.clock()

    def key_of(self, space: Space) -> int:
        """The key of a namespace; one that no unit has where it does not exist."""
        return self.records.namespace_key(space) if space else DEFAULT

    def written(self, rows: int = APPLY_EVERY) -> None:
        """Note that rows were committed; bring the index up to date when there are enough of them.

        Every search catches up before it answers, so nothing waits to be found; applying one row at a time cost a
        fifth of a single store (measured). Should it fail, the records stand and the next search tries again; nothing
        is raised.
        """
        if self.accesses.is_full and not self.config.background:
            self.accesses.flush()
        self.unapplied += rows
        if self.unapplied < APPLY_EVERY:
            return
        self.unapplied = self.measured_room = 0
        self.follow()
        self.consider_maintenance("written")

    def searched(self, queries: FloatArray | DeviceQueries) -> None:
        """A search was answered: sample its queries, and wake the background where that makes a round due."""
        if self.live.query_sample.note(queries):
            self.consider_maintenance("queries")
        elif self.live.device_manager.needs_look:
            self.consider_maintenance("device")
        elif self.worker.start_failure or self.live.needs_foresight():
            self.wake()

    def follow(self) -> View:
        """Bring the index up to date and return its view; the old view, an event and ``lagging`` where that fails."""
        try:
            view = self.live.catch_up()
        except AFTER_COMMIT as error:
            self.lagging = str(error) or type(error).__name__
            cause = f"{self.lagging}; the records stand, the next search tries again"
            self.events.record("apply-failed", cause, level=logging.WARNING)
            return self.live.view
        self.lagging = ""
        return view

    def consider_maintenance(self, event: Event) -> None:
        """Wake the background thread where there is work, or where it could not start before. Raises nothing."""
        try:
            due = self.maintenance.notify(event)
        except AFTER_COMMIT as error:
            self.events.record("maintenance-failed", f"cannot tell whether any is due: {error}", level=logging.ERROR)
            return
        if due or self.worker.start_failure or self.live.needs_foresight(FORESEEN_BY_WRITES):
            self.wake()

    def wake(self) -> bool:
        """Let the background thread look for work now; False where there is none."""
        return self.config.background and not self.records.read_only and self.worker.wake()

    def queries(self, given: object) -> FloatArray | DeviceQueries:
        """Check queries; they stay on the device where they lie if the index takes them there."""
        index, dim, metric = self.live.view.index, self.records.dim, self.records.metric
        if index.accepts_device_queries and index.device != "cpu":
            found = device_queries(given, dim, metric)
            if found is not None:
                return found
        return check_vectors(given, dim, metric, name="queries")

    def rows(self, page_size: int, key: int) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        """Yield every unit of a namespace with its vector, oldest first."""
        after, last = 0, self.records.head().last_slot
        while rows := self.records.scan(after, last, page_size, ns=key):
            units = self.records.units_at([row.slot for row in rows])
            for row in rows:
                if row.slot in units:
                    yield units[row.slot], np.frombuffer(row.vector, dtype="<f4")
            after = rows[-1].slot

    def hits(self, found: Found, again: Callable[[], Found | None], spaces: Mapping[int, Space]) -> list[Hit]:
        """Read the units of a search; search again when one of them was replaced meanwhile.

        spaces: the paths of the namespaces that were searched, by key.
        """
        for _ in range(FETCH_ATTEMPTS):
            slots = found.slots(0)
            units = self.records.units_at(slots)
            if len(units) == len(slots):
                break
            newer = again()
            if newer is None:
                return []
            found = newer
        distances, metric = found.distances[0].tolist(), self.records.metric
        one = next(iter(spaces.values())) if len(spaces) == 1 else None
        keys = self.records.namespaces_at(slots) if one is None else {}
        return [
            Hit(units[slot], unit_id, distance, score_of(distance, metric), spaces[keys[slot]] if one is None else one)
            for slot, unit_id, distance in zip(slots, found.ids(0), distances, strict=False)
            if slot in units and (one is not None or slot in keys)
        ]

    def check(self, fix: bool) -> list[Finding]:
        """Verify the records, and the index against them; repair what can be repaired with ``fix``."""
        findings = self.records.check(fix)
        if self.legacy_problem:
            findings.append(Finding("legacy-import", self.legacy_problem, False))
        mismatch = self._index_mismatch()
        if mismatch:
            if fix:
                self.live.reload("check found that the index differs from the records")
            findings.append(Finding("index-rows", mismatch, fix))
        if fix and any(finding.fixed for finding in findings):
            self.live.reload("check repaired the records")
        return findings

    def _index_mismatch(self) -> str:
        """Say which rows the index lacks or has too many; empty while others are writing."""
        view = self.live.catch_up()
        held, stored = view.live_slots(), self.records.matching(None)
        if np.array_equal(held, stored) or self.records.head().last_seq != view.watermark:
            return ""
        lacking, extra = len(np.setdiff1d(stored, held)), len(np.setdiff1d(held, stored))
        return f"the index lacks {lacking} of {len(stored)} units and holds {extra} that are gone"

    def close(self) -> None:
        """Stop the background thread, write what is buffered and close the records."""
        self.closed = self.maintenance.closing = True
        try:
            self.worker.stop()
            self.accesses.close()
            self.live.query_sample.save(timeout=0)
            self.live.save_fields(timeout=0)
            self.maintenance.close()
        finally:
            self.records.close()

    def _background_round(self) -> float | None:
        if self.accesses.is_full:
            self.accesses.flush(timeout=FLUSH_SECONDS)
        self.live.prepare(self.fields)
        recalled, self.recalled = self.recalled, {}
        self.live.foresee(recalled, lambda: self.closed)
        self.live.save_fields(FLUSH_SECONDS)
        return self.maintenance.run_if_due()


def open_session(
    prefix: str,
    function: EmbeddingFunction | None,
    dim: int | None,
    config: StorageConfig,
    machine: Machine | None = None,
    clock: Callable[[], float] | None = None,
) -> StoreSession:
    """Open or make the store; raises as ``VectorStore`` documents, and leaves nothing open then."""
    if prefix and not Path(prefix).is_absolute():
        prefix = f"{Path.cwd()}/{prefix}"  # once: a later chdir must not split the files of a store
    if machine is not None and not isinstance(machine, Machine):
        raise ConfigurationError(f"machine must be a Machine or None, got {shown(machine)}")
    given: object = clock
    if given is not None and not (callable(given) and isinstance(given(), (int, float))):
        raise ConfigurationError(f"clock must be a function that gives the Unix time, got {shown(clock)}")
    try:
        require_faiss()
    except EngineError as error:
        raise EngineError(f"Failed to create {config.index_type} index: {error}") from error
    info = Records.peek(prefix)
    embedder = None if function is None else Embedder(function, info.dim if info and dim is None else dim)
    records = Records.open(
        prefix,
        dim=_dimension(info, embedder, dim),
        metric=_metric(info, config),
        durability=config.durability,
        lock_timeout=config.lock_timeout,
        file_mode=int(config.file_mode, 8),
        stemming=config.keyword_stemming,
        text_of=unit_to_text,
    )
    try:
        if clock is not None:
            records.clock = clock
        records.history_days = config.history_days
        return _assemble(prefix, records, embedder, config, machine or this_machine(config))
    except BaseException:
        records.close()
        raise


@cache
def _prober() -> Prober:
    """Return the prober that all stores of the process share, so that the driver is queried once."""
    return Prober(visible_gpus(), gpu_order())


def this_machine(config: StorageConfig) -> Machine:
    """Return the devices of this machine as ``config`` selects them; nothing is probed yet."""
    return Machine(config.device, config.gpu_memory_fraction, prober=_prober())


def _assemble(
    prefix: str,
    records: Records,
    embedder: Embedder | None,
    config: StorageConfig,
    machine: Machine,
) -> StoreSession:
    events = EventLog()
    _remember_model(records, embedder)
    config = _remember_index_type(records, config)
    _finish_erasure(records, events)
    limit = _memory_limit(config)
    legacy_problem = import_legacy(prefix, records, embedder, events, Limits(config.max_memory_units, limit))
    device_manager = _device_manager(config, machine, events)
    live = LiveIndex(records, _settings(config, limit), events, Path(f"{prefix}.snapshot"), device_manager)
    samples = Samples(records, embedder, events, live.settings.seed)
    maintenance = Maintenance(live, Path(f"{prefix}.maintenance.lock"), samples.collect)
    embeds = UnitEmbedder(embedder, records.dim, records.metric)
    session = StoreSession(prefix, config, records, live, maintenance, events, embeds, limit, legacy_problem)
    session.consider_maintenance("written")
    _declare_fields(session)
    return session


def _declare_fields(session: StoreSession) -> None:
    """Have the indexes that the settings name, and let the background read these fields and those of past filters."""
    declared, session.recalled = session.config.indexed_fields, session.live.columns.kept.saved
    if session.recalled:
        session.wake()
    if declared is None:  # changes nothing
        return
    given = [] if declared.strip() == "none" else declared.split(",")
    kinds = dict(one.partition(":")[::2] for one in given)
    session.fields = {path_of(path.strip()): kind.strip() == "time" for path, kind in kinds.items()}
    if not session.records.read_only:
        session.records.declare_fields(list(session.fields))
    session.wake()


def _finish_erasure(records: Records, events: EventLog) -> None:
    """Complete an erasure that was interrupted; an event where that cannot be done now."""
    if records.read_only or not is_unfinished(records):
        return
    try:
        finish_erasure(records, _ERASURE_SECONDS)
    except MemEvolveError as error:
        events.record("erasure-unfinished", str(error), level=logging.ERROR)


def _dimension(info: StoreInfo | None, embedder: Embedder | None, given: int | None) -> int | None:
    if given is not None or info is not None:
        return given
    if embedder is None:
        raise ConfigurationError("embedding_dim is not known: give it, or an embedding_function, to make a new store")
    return embedder.dimension


def _metric(info: StoreInfo | None, config: StorageConfig) -> Metric:
    """Return the file's metric; an explicitly set one must match it."""
    if info is not None and "metric" not in config.model_fields_set:
        return info.metric
    return config.metric


def _remember_model(records: Records, embedder: Embedder | None) -> None:
    """Keep the name of the embedding model in the store, and refuse another one."""
    name = embedder.model_name if embedder is not None else None
    if not name:
        return
    held = records.get_meta_text(MODEL_KEY)
    if held is None:
        if not records.read_only:
            with records.write() as tx:
                tx.set_meta(MODEL_KEY, name.encode())
    elif held != name:
        raise ModelMismatchError(
            f"the store was filled by the embedding model {held!r}, embedding_function is {name!r}; "
            "use the same model, or export and embed into a new store"
        )


def _remember_index_type(records: Records, config: StorageConfig) -> StorageConfig:
    """Keep an explicitly set index type with the store until another one is set."""
    held = records.get_meta_text(INDEX_TYPE_KEY)
    if "index_type" not in config.model_fields_set:
        return config if held is None else config.replace(index_type=held)
    if not records.read_only and held != config.index_type:
        with records.write() as tx:
            tx.set_meta(INDEX_TYPE_KEY, config.index_type.encode())
    return config


def _device_manager(config: StorageConfig, machine: Machine, events: EventLog) -> DeviceManager:
    """Make the device manager. A GPU that was requested by name is looked for at once, to report when there is none."""
    most = None if config.gpu_max_memory_mb == "auto" else int(float(config.gpu_max_memory_mb) * 2**20)
    if config.gpu_graphs:
        record_searches(True)
    device_manager = DeviceManager(
        machine, events, setting=config.gpu_engine, min_units=config.min_training_units, most_bytes=most
    )
    if machine.request.startswith("cuda"):
        device_manager.find()
    return device_manager


def _memory_limit(config: StorageConfig) -> int:
    """Return the limit of host memory in bytes; device memory has a budget of its own."""
    if config.max_memory_mb == "auto":
        return host_budget().limit
    return int(float(config.max_memory_mb) * 2**20)


def _settings(config: StorageConfig, limit: int) -> LiveSettings:
    names: JsonObject = {
        name: getattr(config, name)
        for name in LiveSettings.__dataclass_fields__
        if name not in ("budget_bytes", "seed")
    }
    if "nlist_max" not in config.model_fields_set:
        names["nlist_max"] = None  # the default grows with the store, an explicit limit does not
    return LiveSettings(budget_bytes=limit, **names)
