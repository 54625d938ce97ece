"""The parts of one open ``VectorStore``: records, live index, maintenance, limits and service samples."""

from __future__ import annotations

import json
import logging
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...devices.gpu_probe import Prober
from ...devices.memory import host_budget
from ...devices.selection import Machine
from ...errors import (
    CapacityError,
    ConfigurationError,
    EmbeddingError,
    EngineError,
    MemEvolveError,
    ModelMismatchError,
    StorageError,
)
from ...index.faiss_support import require_faiss
from ...index.torch_gpu.cuda_graphs import record_searches
from ...live import DeviceManager, Found, LiveIndex, LiveSettings, Maintenance, Worker
from ...live.delta_buffer import row_bytes
from ...live.view import View
from ...monitoring.events import EventLog
from ...planner.engine_table import TABLE, EngineTable, read_engine_table
from ...records.check import Finding
from ...records.records import Records
from ...records.schema import MODEL_KEY, StoreInfo
from ...records.transaction import Transaction
from ...training.training_set import TrainingSet, collect
from ...types import FloatArray, Hit, Metric
from ...utils.config import StorageConfig, gpu_order, visible_gpus
from ...utils.embeddings import Embedder, EmbeddingFunction
from ...utils.vectors import check_vector, check_vectors
from .access_stats import Accesses
from .legacy_import import Limits, import_legacy

__all__ = [
    "AFTER_COMMIT",
    "Samples",
    "StoreSession",
    "check_room",
    "engine_table",
    "new_units",
    "open_session",
    "this_machine",
]

KEY = "service_samples/{}"
_TEXTS_LENGTH = struct.Struct("<I")


class Samples:
    """The store's source of training data beyond its own vectors, and its cache (a ``SampleCache``)."""

    def __init__(self, records: Records, embedder: Embedder | None, events: EventLog, seed: int) -> None:
        self._records, self._embedder, self._events, self._seed = records, embedder, events, seed

    @property
    def kept(self) -> int:
        """Samples that are embedded and kept."""
        return len(self.load()[0])

    def collect(self, existing: FloatArray) -> TrainingSet:
        """What to train on beside ``existing``, float32 (n, dim): by count, service samples, or fallbacks for them."""
        embed = None if self._embedder is None else self._embedder.embed_many
        found = collect(existing, metric=self._records.metric, seed=self._seed, embed=embed, cache=self)
        if found.source != "existing":
            self._events.record(
                "samples",
                found.reason or f"training on {found.source} samples",
                existing=found.existing,
                service=found.service,
                cached=found.cached,
                fallbacks=found.fallbacks,
            )
        return found

    def load(self) -> tuple[Sequence[str], FloatArray]:
        """All texts kept and their vectors, float32 (m, dim)."""
        texts: list[str] = []
        pieces = [np.empty((0, self._records.dim), dtype=np.float32)]
        for batch in self._batches():
            try:
                more, vectors = _opened_batch(batch, self._records.dim)
            except (ValueError, struct.error) as error:
                self._events.record("samples-damaged", f"they are embedded again when they are needed: {error}")
                continue
            texts += more
            pieces.append(vectors)
        return texts, np.concatenate(pieces)

    def save(self, texts: Sequence[str], vectors: FloatArray) -> None:
        """Keep these as well. Samples that cannot be kept are embedded again another time."""
        if self._records.read_only:
            return
        written = json.dumps(list(texts)).encode()
        value = _TEXTS_LENGTH.pack(len(written)) + written + np.asarray(vectors, dtype="<f4").tobytes()
        try:
            with self._records.write() as tx:
                tx.set_meta(KEY.format(sum(1 for _ in self._batches())), value)
        except StorageError as error:
            self._events.record("samples-unsaved", str(error))

    def _batches(self) -> Iterator[bytes]:
        number = 0
        while (batch := self._records.get_meta(KEY.format(number))) is not None:
            yield batch
            number += 1


def _opened_batch(batch: bytes, dim: int) -> tuple[list[str], FloatArray]:
    """Texts and vectors, float32 (m, dim), of a kept batch. Raises ValueError or struct.error when it is damaged."""
    (length,) = _TEXTS_LENGTH.unpack_from(batch)
    start = _TEXTS_LENGTH.size
    texts = json.loads(batch[start : start + length])
    vectors = np.frombuffer(batch[start + length :], dtype="<f4").reshape(-1, dim)
    if not isinstance(texts, list) or len(texts) != len(vectors):
        raise ValueError("texts and vectors differ in number")
    return texts, vectors


INDEX_TYPE_KEY = "index_type"
FETCH_ATTEMPTS = 5

APPLY_EVERY = 32
"""Single writes after which the index is brought up to date although nobody has searched."""


AFTER_COMMIT = (MemEvolveError, OSError, MemoryError, RuntimeError, ValueError)
"""What the work after a commit may fail with. The write is durable by then, so it becomes an event and a state of
health, and the caller sees no error."""


@dataclass
class StoreSession:
    """records: the truth; live: the index; maintenance and worker: its upkeep; embedder: None when none was given."""

    prefix: str
    config: StorageConfig
    records: Records
    live: LiveIndex
    maintenance: Maintenance
    events: EventLog
    embedder: Embedder | None
    max_memory_bytes: int
    legacy_problem: str = ""
    warned: set[str] = field(default_factory=set)
    """Which limits, units or memory, a warning was logged for; see ``limits``."""
    unapplied: int = 0
    lagging: str = ""
    """Why the index could not be brought up to date when that was last tried; empty when it was."""
    worker: Worker = field(init=False)
    accesses: Accesses = field(init=False)

    def __post_init__(self) -> None:
        self.worker = Worker(self._background_round, self.events)
        self.accesses = Accesses(self.records, self.events, weakref.WeakMethod(self.wake))

    # Embedding

    def embed(self, text: str) -> FloatArray:
        vector = self._embedder().embed(text)
        if self.records.metric == "cosine":  # everything else about it has been checked
            check_vector(vector, self.records.dim, "cosine")
        return vector

    def embed_query(self, text: str) -> FloatArray:
        return self._embedder().embed_query(text)

    def embed_many(self, texts: list[str], progress: Callable[[str, float], None] | None) -> FloatArray:
        vectors = self._embedder().embed_many(texts, progress and (lambda done, of: progress("embed", done / of)))
        return check_vectors(vectors, self.records.dim, self.records.metric)

    def _embedder(self) -> Embedder:
        if self.embedder is None:
            raise EmbeddingError("embedding_function is None: open the store with one, or give embeddings")
        return self.embedder

    # Index

    def written(self, rows: int = APPLY_EVERY) -> None:
        """So many rows were committed; bring the index up to date when enough have come together.

        Every search catches up before it answers, so nothing waits to be found; applying one row at a time cost a
        fifth of a single store (measured). Should it fail, the records stand and the next search tries again; nothing
        is raised.
        """
        self.unapplied += rows
        if self.unapplied < APPLY_EVERY:
            return
        self.unapplied = 0
        self.follow()
        self.consider_maintenance()

    def follow(self) -> View:
        """Bring the index up to date; as it was, with an event and ``lagging``, when it cannot be. Raises nothing."""
        try:
            view = self.live.catch_up()
        except AFTER_COMMIT as error:
            self.lagging = str(error) or type(error).__name__
            cause = f"{self.lagging}; the records stand, the next search tries again"
            self.events.record("apply-failed", cause, level=logging.WARNING)
            return self.live.view
        self.lagging = ""
        return view

    def consider_maintenance(self) -> None:
        """Wake the background where there is work, or where its thread could not start before. Raises nothing."""
        try:
            due = self.maintenance.due()
        except AFTER_COMMIT as error:
            self.events.record("maintenance-failed", f"cannot tell whether any is due: {error}", level=logging.ERROR)
            return
        if due or self.worker.start_failure:
            self.wake()

    def wake(self) -> bool:
        """Let the background look for work now; False where there is no background."""
        return self.config.background and not self.records.read_only and self.worker.wake()

    def hits(self, found: Found, again: Callable[[], Found | None]) -> list[Hit]:
        """Fetch the units of a search; when one was replaced meanwhile the search is made again."""
        for _ in range(FETCH_ATTEMPTS):
            slots = found.slots(0)
            units = self.records.units_at(slots)
            if len(units) == len(slots):
                break
            newer = again()
            if newer is None:
                return []
            found = newer
        distances = found.distances[0].tolist()
        rows = zip(slots, found.ids(0), distances, strict=False)
        return [
            Hit(units[slot], unit_id, distance, score_of(distance, self.records.metric))
            for slot, unit_id, distance in rows
            if slot in units
        ]

    def check(self, fix: bool) -> list[Finding]:
        findings = self.records.check(fix)
        if self.legacy_problem:
            findings.append(Finding("legacy-import", self.legacy_problem, False))
        mismatch = self._index_mismatch()
        if mismatch:
            if fix:
                self.live.reload("check found the index at odds with the records")
            findings.append(Finding("index-rows", mismatch, fix))
        if fix and any(finding.fixed for finding in findings):
            self.live.reload("check repaired the records")
        return findings

    def _index_mismatch(self) -> str:
        """Which rows the index has too few or too many; nothing while others are writing."""
        view = self.live.catch_up()
        held, true = view.live_slots(), self.records.matching(None)
        if np.array_equal(held, true) or self.records.head().last_seq != view.watermark:
            return ""
        lacking, extra = len(np.setdiff1d(true, held)), len(np.setdiff1d(held, true))
        return f"the index lacks {lacking} of {len(true)} units and holds {extra} that are gone"

    def close(self) -> None:
        try:
            self.worker.stop()
            self.accesses.flush()
            self.live.asked.save()
            self.maintenance.close()
        finally:
            self.records.close()

    def _background_round(self) -> float | None:
        if self.accesses.is_full:
            self.accesses.flush()
        return self.maintenance.run_if_due()


def score_of(distance: float, metric: str) -> float:
    """A similarity: 1 / (1 + distance) under l2, the cosine, or the dot product."""
    if metric == "cosine":
        return 1.0 - distance
    return -distance if metric == "ip" else 1.0 / (1.0 + distance)


def open_session(
    prefix: str,
    function: EmbeddingFunction | None,
    dim: int | None,
    config: StorageConfig,
    machine: Machine | None = None,
) -> StoreSession:
    """Open or make the store; raises as ``VectorStore`` documents, and leaves nothing open then."""
    if prefix and not Path(prefix).is_absolute():
        prefix = f"{Path.cwd()}/{prefix}"  # once: a later chdir must not split the files of a store
    table = engine_table(config)
    try:
        require_faiss()
    except EngineError as error:
        raise EngineError(f"Failed to create {config.index_type} index: {error}") from error
    facts = Records.peek(prefix)
    embedder = None if function is None else Embedder(function, facts.dim if facts and dim is None else dim)
    records = Records.open(
        prefix,
        dim=_dimension(facts, embedder, dim),
        metric=_metric(facts, config),
        durability=config.durability,
        lock_timeout=config.lock_timeout,
        file_mode=int(config.file_mode, 8),
    )
    try:
        return _assemble(prefix, records, embedder, config, machine or this_machine(config), table)
    except BaseException:
        records.close()
        raise


@cache
def _prober() -> Prober:
    """One for all stores of the process, so that the driver is asked once."""
    return Prober(visible_gpus(), gpu_order())


def this_machine(config: StorageConfig) -> Machine:
    """The devices of this machine as ``config`` wants them; nothing is looked at yet."""
    return Machine(config.device, config.gpu_memory_fraction, prober=_prober())


def engine_table(config: StorageConfig) -> EngineTable:
    """Which engine is quicker for how many units: as ``config`` says, else as this package believes.

    Raises:
        ConfigurationError: the file that ``config`` names holds no such table.
    """
    return TABLE if config.gpu_engine_table is None else read_engine_table(config.gpu_engine_table)


def _assemble(
    prefix: str,
    records: Records,
    embedder: Embedder | None,
    config: StorageConfig,
    machine: Machine,
    table: EngineTable,
) -> StoreSession:
    events = EventLog()
    _remember_model(records, embedder)
    config = _remember_index_type(records, config)
    limit = _memory_limit(config)
    legacy_problem = import_legacy(prefix, records, embedder, events, Limits(config.max_memory_units, limit))
    device_manager = _device_manager(config, machine, table, events)
    live = LiveIndex(records, _settings(config, limit), events, Path(f"{prefix}.snapshot"), device_manager)
    samples = Samples(records, embedder, events, live.settings.seed)
    maintenance = Maintenance(live, Path(f"{prefix}.maintenance.lock"), samples.collect)
    session = StoreSession(prefix, config, records, live, maintenance, events, embedder, limit, legacy_problem)
    session.consider_maintenance()
    return session


def _dimension(facts: StoreInfo | None, embedder: Embedder | None, given: int | None) -> int | None:
    if given is not None or facts is not None:
        return given
    if embedder is None:
        raise ConfigurationError("embedding_dim is not known: give it, or an embedding_function, to make a new store")
    return embedder.dimension


def _metric(facts: StoreInfo | None, config: StorageConfig) -> Metric:
    """A file keeps its metric; only a setting that says otherwise in so many words is an error."""
    if facts is not None and "metric" not in config.model_fields_set:
        return facts.metric
    return config.metric


def _remember_model(records: Records, embedder: Embedder | None) -> None:
    """Vectors of two models do not mix: the first that is named fills the store."""
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
    """An index type that was asked for in so many words stays with the store until another one is."""
    held = records.get_meta_text(INDEX_TYPE_KEY)
    if "index_type" not in config.model_fields_set:
        return config if held is None else config.replace(index_type=held)
    if not records.read_only and held != config.index_type:
        with records.write() as tx:
            tx.set_meta(INDEX_TYPE_KEY, config.index_type.encode())
    return config


def _device_manager(config: StorageConfig, machine: Machine, table: EngineTable, events: EventLog) -> DeviceManager:
    """The store's access to a GPU. Nobody who asked for one shall believe that it is at work when there is none."""
    most = None if config.max_memory_mb == "auto" else int(float(config.max_memory_mb) * 2**20)
    if config.gpu_graphs:
        record_searches(True)
    device_manager = DeviceManager(machine, events, setting=config.gpu_engine, table=table, most_bytes=most)
    if machine.request.startswith("cuda"):
        device_manager.find()
    return device_manager


def _memory_limit(config: StorageConfig) -> int:
    """Bytes of the host; what lies on a device has a budget of its own."""
    if config.max_memory_mb == "auto":
        return host_budget().limit
    return int(float(config.max_memory_mb) * 2**20)


def _settings(config: StorageConfig, limit: int) -> LiveSettings:
    names: dict[str, Any] = {
        name: getattr(config, name)
        for name in LiveSettings.__dataclass_fields__
        if name not in ("budget_bytes", "seed")
    }
    if "nlist_max" not in config.model_fields_set:
        names["nlist_max"] = None  # the default may grow with the store, a limit that somebody set may not
    return LiveSettings(budget_bytes=limit, **names)


def check_room(session: StoreSession, tx: Transaction, ids: Sequence[str | None]) -> None:
    """Raise CapacityError when the units of these ids (None: a new one each) do not all fit; warn once per crossing.

    Replacing a unit that is there needs no room.
    """
    new = new_units(tx, ids)
    limit = session.config.max_memory_units
    if new and tx.count + new > limit:
        raise CapacityError(
            f"the store holds {tx.count} of at most {limit} units and cannot take {new} more; "
            "delete units or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
        )
    needed = _check_memory(session, tx.count, new)
    _warn_once(session, "units", (tx.count, tx.count + new, limit))
    _warn_once(session, "memory", (*needed, session.max_memory_bytes))


def new_units(tx: Transaction, ids: Sequence[str | None]) -> int:
    """How many of the units of these ids (None: a new one each) are not there yet."""
    named = {unit_id for unit_id in ids if unit_id}
    known = sum(1 for unit_id in named if tx.find(unit_id) is not None)
    return len(named) - known + sum(1 for unit_id in ids if not unit_id)


def _check_memory(session: StoreSession, count: int, new: int) -> tuple[int, int]:
    """Bytes in use, and bytes that will be; raise CapacityError where those are too many."""
    waiting, each = (
        max(0, count - session.live.view.count),
        row_bytes(session.records.dim),
    )  # committed, not applied yet
    used = session.live.nbytes + waiting * each
    needed = used + new * each
    if new and needed > session.max_memory_bytes:
        raise CapacityError(
            f"index and vectors would take {needed / 2**20:.1f} MB of at most {session.max_memory_bytes / 2**20:.1f}; "
            "delete units or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB"
        )
    return used, needed


def _warn_once(session: StoreSession, what: Literal["units", "memory"], figures: tuple[int, int, int]) -> None:
    """Warn when a write crosses the warning threshold. figures: how much there is, how much there will be, the most.

    What has fallen below the threshold since the last warning, by whomever, may cross it again.
    """
    held, wanted, limit = figures
    least = session.config.warning_threshold * limit
    if held < least:
        session.warned.discard(what)
    if wanted < least or what in session.warned:
        return
    session.warned.add(what)
    text = f"{wanted} of {limit} units: prune or consolidate, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"
    if what == "memory":
        text = (
            f"index and vectors take {wanted / 2**20:.1f} of {limit / 2**20:.1f} MB: prune, narrow "
            "MEMEVOLVE_STORAGE_PRECISION, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB"
        )
    session.events.record("near-limit", text, level=logging.WARNING, count=wanted, limit=limit)
