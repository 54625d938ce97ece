"""``VectorStore``: MemEvolve's vector store, with the records as the only source of record.

This module translates the public API to the records and the live index and holds no state of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from ...devices.selection import Machine
from ...errors import ConfigurationError, ConflictError, InvalidUnitError, StoreClosedError
from ...live import Found
from ...live.namespaces import Scope
from ...live.scheduler import RebuildReason
from ...records.check import Finding
from ...records.records import Records
from ...records.transaction import EncodedUnit, Transaction
from ...types import Each, Filters, FloatArray, Hit, JsonObject, MemoryUnit, Moment, Ttl, Vectors
from ...utils.arguments import callback, change, listed, mapping, path_text, shown, switch, whole_number, word
from ...utils.config import StorageConfig, namespace_path
from ...utils.embeddings import EmbeddingFunction
from ...utils.plain import plain_text
from ...utils.report_types import (
    IndexInfo,
    Inventory,
    MaintenanceReport,
    OperationEntry,
    StorageHealth,
    StoreStatistics,
)
from ...utils.vectors import DeviceQueries, cosines, normalize_rows
from .base import Progress
from .capacity import move_waiting_rows, report_pruned, reserve_room
from .copy import copy_store
from .history import HistoryMixin
from .namespaces import Path, expiry_of, moments, subtree_path
from .queries import drop_all, drop_unchanged, ranked_hits, widened
from .ranking import HalfLife, Ranking, Window, score_of
from .reports import health_report, inventory_report, register, statistics_report
from .selecting import NamespacedBackend
from .session import StoreSession, open_session
from .units import (
    UnitMapping,
    check_arguments,
    check_width,
    checked_id,
    encoded,
    is_id,
    looked_up,
    one_id,
    plain_unit,
    text_to_embed,
    unit_to_text,
    with_id,
)

__all__ = ["VectorStore"]

_PAGE = 1000
_LARGEST_PAGE = 10_000
"""Rows that are read at once, however many the caller asks for."""


class VectorStore(HistoryMixin, NamespacedBackend):
    """Stores memory units in a file and finds them by meaning, by words and by vector.

    A write that returned is durable, and the next search finds it. Safe to use from several threads, from several
    processes on one file, and after ``os.fork``. Searches raise InvalidQueryError and InvalidFilterError for arguments
    that cannot be used, every method raises StoreClosedError after :meth:`close`, and StorageError when the disk fails.

    Attributes:
        config: The settings in use, a ``StorageConfig``.
        embedding_function: The function that the store was opened with.
        index_file: The path prefix of the store's files.
        namespace_path: The namespace whose units this store reads and writes; empty for the default one.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> store = VectorStore("memory", HashingEmbedder())
        >>> store.store({"id": "git", "type": "lesson", "content": "Rebase before you push"})
        'git'
        >>> store.store_batch([{"type": "tool", "content": "Use rg to search text"}, {"content": "Write tests first"}])
        ['unit_0', 'unit_1']
        >>> [hit.id for hit in store.search_units("rebase and push", top_k=1)]
        ['git']
        >>> [unit_id for _, unit_id in store.search("search text", filters={"type": "tool"})]
        ['unit_0']
        >>> store.delete("git"), store.count()
        (True, 2)
        >>> store.close()
    """

    def __init__(
        self,
        index_file: str | os.PathLike[str],
        embedding_function: EmbeddingFunction | None,
        embedding_dim: int | None = None,
        index_type: str | None = None,
        storage_config: object = None,
        *,
        machine: Machine | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Open the store at a path prefix, or make a new one there.

        Args:
            index_file: The path prefix; the records are in ``<prefix>.db``.
            embedding_function: Maps a text to a 1-D array; it may offer ``embed_batch(texts)``, ``dimension`` and
                ``model_name``. None for those who only read, or give embeddings.
            embedding_dim: Length of the vectors; None takes it from the file, else from the function.
            index_type: flat, ivf, hnsw or auto; overrides ``storage_config``.
            storage_config: A ``StorageConfig``, a mapping, or MemEvolve's own storage configuration; None reads the
                environment and ``.env``.
            machine: The devices; None detects those of this machine.
            clock: Gives the Unix time by which units expire; None is the system's clock.

        Raises:
            EngineError: There is no usable faiss ("Failed to create ... index").
            DimensionMismatchError: The function's vectors have another length than the file's.
            ModelMismatchError: The file was filled by another embedding model.
            ConfigurationError: Settings do not fit the file, or cannot be used.
            StorageError: The file cannot be used.
        """
        config = StorageConfig.adopt(storage_config)
        if index_type is not None:
            config = config.replace(index_type=index_type)
        self.index_file = path_text("index_file", index_file)
        self.embedding_function = embedding_function
        self._session: StoreSession | None = open_session(
            self.index_file, embedding_function, embedding_dim, config, machine, clock
        )
        self.config = self._session.config
        self.namespace_path: Path = self.config.namespace
        self._is_view = False

    @staticmethod
    def exists_at(index_file: str | os.PathLike[str]) -> bool:
        """Check for a store.

        Args:
            index_file: A path prefix.

        Returns:
            Whether there is a store.
        """
        return Records.peek(index_file) is not None

    @property
    def embedding_dim(self) -> int:
        """Length of every vector."""
        return self._open.records.dim

    @property
    def index_type(self) -> str:
        """The configured index type: flat, ivf, hnsw or auto."""
        return self.config.index_type

    @property
    def metric(self) -> str:
        return self._open.records.metric

    @property
    def data(self) -> UnitMapping:
        """A read-only mapping of id to unit, read from the records at each access."""
        return UnitMapping(self, lambda: self._open.records.ids(ns=self._key))

    @property
    def index(self) -> IndexInfo:
        """What the index holds: ``ntotal`` of this namespace; ``nlist``, ``is_trained``, ``is_building``, ``kind``."""
        session = self._open
        count, index = session.live.count(self._scope), session.live.view.index
        return IndexInfo(count, index.nlist, index.kind, session.maintenance.running)

    @property
    def change_number(self) -> int:
        return self._open.records.head().last_seq

    # Writing

    def store(
        self, unit: MemoryUnit, *, replaces: str | None = None, ttl: Ttl = None, expires_at: Moment = None
    ) -> str:
        """Store a unit. The given dict is not changed; the stored unit has ``metadata.created_at``.

        Args:
            unit: A JSON object. One with an ``id`` replaces the unit of that id, and keeps its ``created_at`` unless it
                brings one.
            replaces: The id of a unit that this one supersedes: it is deleted in the same transaction.
            ttl: Seconds, or a timedelta, after which the unit expires; None for the namespace's default.
            expires_at: Unix time in seconds, or a datetime with its zone, from which the unit is gone; instead of ttl.
                ``math.inf`` for never, whatever the namespace's default.

        Returns:
            The unit's id: its own, or the next ``unit_<n>``.

        Raises:
            ConflictError: There is no unit of the id ``replaces``; nothing was stored.
            InvalidUnitError: The unit cannot be stored as JSON, or is too large.
            EmbeddingError: The embedding function failed, or there is none.
            InvalidVectorError: The embedding holds values that are not finite.
            CapacityError: The store is full.
        """
        session = self._open
        expiry_of(ttl, expires_at, 0.0)  # refused before anything is embedded
        given = plain_unit(unit)
        made = self._stamped(given)
        superseded = None if replaces is None else checked_id(replaces, "replaces")
        vector = session.embedder.embed(text_to_embed(given))
        move_waiting_rows(session, 1)
        with self._write("store", grouped=True) as tx:
            take = tx.find if superseded == given.get("id") else tx.drop
            if superseded is not None and not take(superseded):
                raise ConflictError([superseded], "replaces names no unit, so nothing was stored")
            pruned = reserve_room(session, tx, [given.get("id")])
            unit_id = given.get("id") or tx.next_auto_id()
            until = expiry_of(ttl, expires_at, session.clock(), tx.limits.default_ttl)
            tx.put(made, vector.tobytes(), unit_id, until, lambda: self._keep_times([made], tx)[0])
        session.written(1)
        report_pruned(session, pruned)
        return unit_id

    def store_batch(
        self,
        units: Sequence[MemoryUnit],
        embeddings: Vectors | None = None,
        progress: Progress | None = None,
        *,
        ttl: Each[Ttl] = None,
        expires_at: Each[Moment] = None,
    ) -> list[str]:
        """Store several units in one transaction: all of them or none.

        Args:
            units: The units, as for :meth:`store`. Where an id occurs twice the later unit stays.
            embeddings: float32 (len(units), dim), row i for unit i; None calls the embedding function.
            progress: Called with (stage, share done).
            ttl: As for :meth:`store`, or a list with one for each unit.
            expires_at: Likewise.

        Returns:
            The ids, in order.

        Raises:
            InvalidUnitError: As for :meth:`store`; the message names the position of the unit.
            EmbeddingError: As for :meth:`store`.
            InvalidVectorError: As for :meth:`store`.
            DimensionMismatchError: ``embeddings`` has another width than the store.
            CapacityError: The units do not fit.
        """
        return self._write_batch([], units, embeddings, progress, None, ttl, expires_at)

    def replace_batch(
        self,
        delete_ids: Iterable[str],
        units: Sequence[MemoryUnit],
        embeddings: Vectors | None = None,
        *,
        unchanged_since: int | None = None,
    ) -> list[str]:
        wanted = [checked_id(unit_id, f"delete_ids[{i}]") for i, unit_id in enumerate(listed("delete_ids", delete_ids))]
        if len(set(wanted)) < len(wanted):
            twice = next(one for at, one in enumerate(wanted) if one in wanted[:at])
            raise InvalidUnitError(f"delete_ids names {shown(twice)} twice; name each unit once")
        return self._write_batch(wanted, units, embeddings, None, unchanged_since, operation="replace_batch")

    def update(self, unit_id: str, unit: MemoryUnit, *, ttl: Ttl = None, expires_at: Moment = None) -> bool:
        """Replace a unit, keep its ``metadata.created_at`` and set ``metadata.updated_at``.

        Works at the capacity limit too. A text that stays the same is not embedded again.

        Args:
            unit_id: The id of the unit to replace.
            unit: The new unit.
            ttl: Seconds from now, or a timedelta, after which it expires; None keeps its time.
            expires_at: As for :meth:`store`.

        Returns:
            False when there is no unit of that id.

        Raises:
            InvalidUnitError: As for :meth:`store`.
            EmbeddingError: As for :meth:`store`.
        """
        session = self._open
        expiry_of(ttl, expires_at, 0.0)
        unit_id = checked_id(unit_id)
        given = plain_unit(with_id(unit, unit_id))
        seen = session.records.get_with_json(unit_id, ns=self._key)
        before: MemoryUnit = {} if seen is None else seen[1]
        made = encoded(self._updated_metadata(given, before))
        text = unit_to_text(given)
        vector: FloatArray | None = None
        must_embed = changed = seen is not None and unit_to_text(before) != text
        while True:
            if must_embed:  # outside the lock: it may take seconds, and the unit may change meanwhile
                vector = session.embedder.embed(text_to_embed(given))
            with self._write("update", grouped=True) as tx:
                old = tx.find(unit_id, seen)
                if old is None:
                    return False
                if old.unit is not before:
                    made = encoded(self._updated_metadata(given, old.unit))
                    changed = unit_to_text(old.unit) != text
                kept = ttl is None and expires_at is None
                until = old.expires_at if kept else expiry_of(ttl, expires_at, session.clock())
                if not changed:
                    tx.edit(unit_id, made, until)
                    break
                if vector is not None:
                    tx.put(made, vector.tobytes(), unit_id, until)
                    break
            must_embed = True
        session.written(1)
        return True

    def delete(self, unit_id: str) -> bool:
        session = self._open
        if not one_id(unit_id, "delete_batch"):
            return False
        with self._write("delete", grouped=True) as tx:
            dropped = tx.drop(unit_id)
        if dropped:
            session.written(1)
        return dropped

    def delete_batch(self, ids: Iterable[str], *, unchanged_since: int | None = None) -> int:
        session = self._open
        wanted = [checked_id(unit_id, f"ids[{i}]") for i, unit_id in enumerate(listed("ids", ids))]
        since = change("unchanged_since", unchanged_since)
        with self._write("delete_batch") as tx:
            dropped = drop_unchanged(tx, wanted, since)
        if dropped:
            session.written()
        return dropped

    def clear(self) -> None:
        session = self._open
        with self._write("clear") as tx:
            tx.clear()
        session.written()

    # Reading

    def retrieve(self, unit_id: str, *, ttl: Ttl = None, as_of: Moment = None) -> MemoryUnit | None:
        """Read a unit, and count that as an access.

        Args:
            unit_id: Its id.
            ttl: Seconds from now, or a timedelta, after which the unit expires from here on; None changes nothing.
            as_of: Reads the unit as it was, and counts no access: a datetime with its zone, a Unix time as a float,
                or a :attr:`change_number`.

        Returns:
            The unit; None when there is none.

        Raises:
            HistoryError: ``as_of`` is outside the history, see MEMEVOLVE_STORAGE_HISTORY_DAYS.
        """
        if as_of is not None:
            found = self._past_units(as_of, None, plain_text(unit_id)) if one_id(unit_id, "units") else []
            return found[0] if found else None
        session, key = self._open, self._key
        unit = session.records.get(unit_id, ns=key) if one_id(unit_id, "retrieve_batch") else None
        if unit is not None:
            session.accesses.note((plain_text(unit_id),), key)
            if ttl is not None:
                self.set_expiry([unit_id], ttl=ttl)
        return unit

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        return self._open.records.get_many(looked_up(ids), ns=self._key)

    def retrieve_all(self) -> list[MemoryUnit]:
        return list(self._open.records.units(ns=self._key))

    def exists(self, unit_id: str) -> bool:
        return one_id(unit_id, "retrieve_batch") and self._open.records.exists(unit_id, ns=self._key)

    def count(self, filters: Filters | None = None) -> int:
        """Count the units.

        Args:
            filters: Counts those that match only, see ``docs/reference/filters.md``.

        Returns:
            The number of units.

        Raises:
            InvalidFilterError: ``filters`` is malformed.
        """
        if filters is None:
            return self._open.records.count(ns=self._key)
        return len(self._open.live.matching(self._filter(filters), self._scope)[1])

    def get_metadata(self, unit_id: str) -> JsonObject | None:
        unit = self._open.records.get(unit_id, ns=self._key) if is_id(unit_id) else None
        return None if unit is None else unit.get("metadata")

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        return self._open.rows(min(whole_number("page_size", page_size), _LARGEST_PAGE), self._key)

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        wanted, records, key = looked_up(ids), self._open.records, self._key
        found: dict[str, bytes] = {}
        for start in range(0, len(wanted), _PAGE):
            found.update(records.vectors_of(wanted[start : start + _PAGE], ns=key))
        return {unit_id: np.frombuffer(found[unit_id], dtype="<f4") for unit_id in wanted if unit_id in found}

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        most, records, key = whole_number("count", count, least=0), self._open.records, self._key
        rows = records.spread(min(most, records.count(ns=key)), ns=key)
        return {row.id: np.frombuffer(row.vector, dtype="<f4") for row in rows}

    def inventory(self) -> Inventory:
        return inventory_report(self._open, self._key)

    # Searches

    def search(
        self,
        query: str,
        top_k: int = 5,
        filters: Filters | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
        offset: int = 0,
        min_score: float | None = None,
    ) -> list[tuple[float, str]]:
        window, metric = Window.of(check_arguments(top_k, recall, query), offset, min_score), self.metric
        found = self._find_text(query, window.reach, filters, recall)
        if found is None:
            return []
        pairs = list(zip(found.distances[0].tolist(), found.ids(0), strict=False))
        pairs = window.cut(pairs, lambda pair: score_of(pair[0], metric))
        if switch("record", record):
            self._open.accesses.note([unit_id for _, unit_id in pairs], self._key)
        return pairs

    def search_units(
        self,
        query: str,
        top_k: int = 5,
        filters: Filters | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
        offset: int = 0,
        min_score: float | None = None,
        recency: HalfLife | None = None,
        importance: str | None = None,
        weights: Mapping[str, float] | None = None,
        prefix: Sequence[str] | str | None = None,
    ) -> list[Hit]:
        session, wanted = self._open, check_arguments(top_k, recall, query)
        spaces = {self._key: self.namespace_path} if prefix is None else self._spaces(subtree_path(prefix))
        ranking, window = Ranking.of(recency, importance, weights), Window.of(wanted, offset, min_score)

        def find() -> Found | None:
            return self._find_text(query, window.reach, filters, recall, tuple(spaces))

        if ranking is None:
            found = find()
            hits = [] if found is None else session.hits(found, find, spaces)
        else:
            scope = Scope(tuple(spaces), session.clock())
            hits = ranked_hits(session, ranking, window, query, self._filter(filters), recall, scope, spaces)
        hits = window.cut(hits, lambda hit: hit.score)
        if switch("record", record):
            keys = {path: key for key, path in spaces.items()}
            read: dict[int, list[str]] = {}
            for hit in hits:
                read.setdefault(keys[hit.namespace], []).append(hit.id)
            for key, found_ids in read.items():
                session.accesses.note(found_ids, key)
        return hits

    def search_vectors(
        self, queries: Vectors, top_k: int = 5, filters: Filters | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        session = self._open
        width = check_arguments(top_k, recall)
        vectors = session.queries(queries)
        check_width(len(vectors), width)
        found = self._find(vectors, width, filters, recall)
        ids: list[list[str | None]] = []
        for row in range(len(vectors)):
            names: list[str | None] = list(found.ids(row))
            ids.append(names + [None] * (width - len(names)))
        return widened(found.distances, width), ids

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        return cosines(self._open.embedder.embed_query(query), self.vectors_of(ids))

    # Access statistics

    def record_access(self, ids: Iterable[str]) -> None:
        self._open.accesses.note([plain_text(unit_id) for unit_id in listed("ids", ids) if is_id(unit_id)], self._key)

    def access_order(self, kind: Literal["lru", "lfu"], limit: int) -> list[str]:
        word("kind", kind, ("lru", "lfu"))
        session, most, key = self._open, whole_number("limit", limit, least=0), self._key
        return session.accesses.in_order(kind, min(most, session.records.count(ns=key)), key)

    def access_counts(self) -> dict[str, int]:
        return self._open.accesses.counts(self._key)

    # Maintenance and reports

    def run_maintenance(self, progress: Progress | None = None) -> MaintenanceReport:
        self._open.accesses.flush()
        return self._open.maintenance.run(callback("progress", progress)).report()

    def retrain(self, progress: Progress | None = None, samples: bool = False) -> MaintenanceReport:
        """Train the index again, whether that is due or not.

        Args:
            progress: Called with (stage, share done).
            samples: Below MEMEVOLVE_STORAGE_MIN_TRAINING_UNITS the index stays exact. With True, service samples are
                embedded, kept, and make up for the missing units.

        Returns:
            What was done.
        """
        reason = RebuildReason("train", "asked for", by_request=switch("samples", samples))
        return self._open.maintenance.run(callback("progress", progress), force=reason).report()

    def register_management_operation(self, operation_type: str, details: object) -> OperationEntry:
        return register(self._open, operation_type, details, self.namespace_path)

    def check(self, fix: bool = False) -> list[Finding]:
        """Verify the store: the records, and the index against the records.

        Args:
            fix: Whether to repair what can be repaired.

        Returns:
            The findings, each with ``code``, ``message`` and ``fixed``; empty for a sound store.

        Raises:
            ConfigurationError: This is a view of one namespace.
        """
        return self._whole("check").check(switch("fix", fix))

    def snapshot(self) -> str:
        """Save the index, so that the store opens faster next time.

        Returns:
            The path of the file.

        Raises:
            StorageError: It cannot be written (StorageFullError, ReadOnlyError); the store is unharmed.
        """
        return str(self._whole("snapshot").maintenance.snapshot())

    @staticmethod
    def restore(backup: str | os.PathLike[str], prefix: str | os.PathLike[str]) -> str | None:
        """Put a copy of a backup in the place of the store at ``prefix``.

        Works while no process has the store open. The backup is verified first, the old store is kept, and one complete
        store remains wherever the call is interrupted.

        Args:
            backup: The file that :meth:`backup` wrote, with or without its ending ``.db``.
            prefix: The path prefix of the store; there need not be one.

        Returns:
            The path of the old database file under its new name; None when there was none.

        Raises:
            CorruptStoreError: The backup is damaged; nothing was changed.
            NotAStoreError: It is no backup of a store.
            StorageError: A process has the store open, or there is no such backup; nothing was changed.
        """
        aside = Records.restore(backup, prefix)
        return None if aside is None else str(aside)

    def get_storage_health(self) -> StorageHealth:
        return health_report(self._open, self._info)

    def statistics(self) -> StoreStatistics:
        """Report counts, the index and the plan, file sizes, change numbers and recent events.

        Returns:
            The report.
        """
        return statistics_report(self._open, self._info)

    def save_state(self) -> JsonObject:
        found = {"index_file": self.index_file, "store_id": self._open.records.store_id, "count": self.count()}
        return {**found, "namespace": list(self.namespace_path)} if self.namespace_path else found

    def restore_state(self, state: Mapping[str, object]) -> None:
        held = mapping("state", state)
        source, path = held.get("index_file"), namespace_path(held.get("namespace"))
        if source is None or (held.get("store_id") == self._open.records.store_id and path == self.namespace_path):
            return
        config = self.config.replace(namespace=path)
        with VectorStore(source, None, storage_config=config, clock=self._open.clock) as other:
            copy_store(other, self, replace=True)

    def close(self) -> None:
        """Wait for a running build, and release everything. Further calls raise StoreClosedError.

        A view of a namespace is closed alone: the store stays open.
        """
        session, self._session = self._session, None
        if session is not None and not self._is_view:
            session.close()

    def __repr__(self) -> str:
        where = f", namespace {'/'.join(self.namespace_path)!r}" if self.namespace_path else ""
        if self._session is None or self._session.closed:
            return f"<VectorStore {self.index_file!r}{where}, closed>"
        return f"<VectorStore {self.index_file!r}{where}, {self.count()} units, {self.index.kind}>"

    # Inside

    @property
    def _open(self) -> StoreSession:
        session = self._session
        if session is None or session.closed:
            raise StoreClosedError(f"the store {self.index_file!r} is closed; open a new VectorStore")
        return session

    def _whole(self, what: str) -> StoreSession:
        """The session, for what concerns the file with all namespaces."""
        if self._is_view:
            raise ConfigurationError(f"{what}() concerns the whole file, not one namespace; call it on the store")
        return self._open

    def _write_batch(
        self,
        delete_ids: list[str],
        units: Sequence[MemoryUnit],
        embeddings: Vectors | None,
        progress: Progress | None,
        since: int | None,
        ttl: Each[Ttl] = None,
        expires_at: Each[Moment] = None,
        operation: str = "store_batch",
    ) -> list[str]:
        session, since = self._open, change("unchanged_since", since)
        callback("progress", progress)
        given = listed("units", units, InvalidUnitError)
        moments(ttl, expires_at, 0.0, len(given))
        if not given and not delete_ids:
            return []
        made, texts = self._encoded_batch(given, to_embed=embeddings is None)
        vectors = session.embedder.vectors_for(texts, embeddings, progress) if given else np.empty((0, 0), np.float32)
        ids: list[str] = []
        move_waiting_rows(session, len(made))
        with self._write(operation) as tx:
            drop_all(tx, delete_ids, since)
            own = [one.unit_id or None for one in made]
            pruned = reserve_room(session, tx, own)
            ids.extend(_ids_for(own, tx))
            made = self._keep_times(made, tx)
            until = moments(ttl, expires_at, session.clock(), len(ids), tx.limits.default_ttl)
            tx.put_many(zip(made, texts, (row.tobytes() for row in vectors), ids, until, strict=True))
        session.written()
        report_pruned(session, pruned)
        return ids

    def _encoded_batch(self, units: Sequence[object], *, to_embed: bool) -> tuple[list[EncodedUnit], list[str]]:
        """The units as they are stored where they replace none, and their texts."""
        made, texts = [], []
        for i, unit in enumerate(units):
            where = f"units[{i}]"
            plain = plain_unit(unit, where)
            made.append(self._stamped(plain, where))
            texts.append(text_to_embed(plain, where) if to_embed else unit_to_text(plain))
        return made, texts

    def _find_text(
        self,
        query: str,
        top_k: int,
        filters: Filters | None,
        recall: float | None,
        keys: tuple[int, ...] | None = None,
    ) -> Found | None:
        session = self._open
        wanted = check_arguments(top_k, recall, query)
        if not (session.live.view.count or session.live.catch_up().count):
            return None
        vector = session.embedder.embed_query(query)
        return self._find(vector[None, :], wanted, filters, recall, keys)

    def _find(
        self,
        vectors: FloatArray | DeviceQueries,
        top_k: int,
        filters: Filters | None,
        recall: float | None,
        keys: tuple[int, ...] | None = None,
    ) -> Found:
        session = self._open
        if session.records.metric == "cosine" and not isinstance(vectors, DeviceQueries):
            vectors = normalize_rows(vectors)
        scope = Scope((self._key,) if keys is None else keys, session.clock())
        found = session.live.search(vectors, top_k, self._filter(filters), recall, scope)
        session.searched(vectors)
        return found


def _ids_for(own: list[str | None], tx: Transaction) -> list[str]:
    """The own ids of units, and fresh ones for the rest that none of the others in the batch carries."""
    known, lacking = set(own), own.count(None)
    fresh: list[str] = []
    while len(fresh) < lacking:
        fresh += [unit_id for unit_id in tx.next_auto_ids(lacking - len(fresh)) if unit_id not in known]
    rest = iter(fresh)
    return [next(rest) if unit_id is None else unit_id for unit_id in own]
