"""``VectorStore``: MemEvolve's vector store, with the records as the only source of record.

This module translates the public API to the records and the live index and holds no state of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar

import numpy as np

from ...devices.selection import Machine
from ...errors import ConflictError, EmbeddingError, InvalidQueryError, InvalidUnitError, StoreClosedError
from ...live import Found, LiveIndex, Maintenance
from ...live.rebuild_rules import RebuildReason
from ...records.check import Finding
from ...records.records import Records
from ...records.transaction import Transaction, changed_since
from ...types import FloatArray, Hit, MemoryUnit
from ...utils.arguments import callback, change, listed, path_text, shown, switch, whole_number, word
from ...utils.config import StorageConfig
from ...utils.embeddings import EmbeddingFunction
from ...utils.plain import plain_text
from ...utils.vectors import DeviceQueries, check_vector, check_vectors, cosines, device_queries, normalize_rows
from .base import MetadataMixin, StorageBackend
from .pruning import make_room, prepare, tell
from .reports import health_report, register, statistics_report
from .session import StoreSession, check_room, open_session
from .units import checked_id, checked_unit, is_id, one_id, text_to_embed, texts_of, unit_to_text

__all__ = ["MAX_RESULTS", "VectorStore", "check_arguments", "check_width"]


class UnitMapping(Mapping[str, MemoryUnit]):
    """id -> unit, read from the records at each access; never a copy of the store in memory."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __getitem__(self, unit_id: str) -> MemoryUnit:
        unit = self._records.get(unit_id) if is_id(unit_id) else None
        if unit is None:
            raise KeyError(unit_id)
        return unit

    def __contains__(self, unit_id: object) -> bool:
        return is_id(unit_id) and self._records.exists(unit_id)

    def __iter__(self) -> Iterator[str]:
        return self._records.ids()

    def __len__(self) -> int:
        return self._records.count()

    def __repr__(self) -> str:
        return f"<{len(self)} memory units>"


class IndexInfo:
    """What the index holds now; every property is up to date with the records."""

    def __init__(self, live: LiveIndex, maintenance: Maintenance) -> None:
        self._live = live
        self._maintenance = maintenance

    @property
    def ntotal(self) -> int:
        """Live vectors."""
        return self._live.catch_up().count

    @property
    def nlist(self) -> int:
        """Inverted lists of the index in use; 0 while none are used."""
        return self._live.view.index.nlist

    @property
    def is_trained(self) -> bool:
        """Does the index in use need no training, or has it been trained? Never False while it answers."""
        return True

    @property
    def is_building(self) -> bool:
        """Is a round of maintenance on in this process? Searches go on meanwhile."""
        return self._maintenance.running

    @property
    def kind(self) -> str:
        """exact, two_stage, ivf or hnsw."""
        return self._live.view.index.kind


def drop_unchanged(tx: Transaction, ids: Sequence[str], since: int | None) -> int:
    """Delete the units that exist and did not change after log entry ``since`` (None: in any case); their number.

    Where the log no longer says what changed, nothing is deleted.
    """
    if since is None:
        return tx.drop_many(ids)
    changed = tx.outside(lambda con: changed_since(con, since))
    return 0 if changed is None else tx.drop_many(unit_id for unit_id in ids if unit_id not in changed)


def drop_all(tx: Transaction, ids: Sequence[str], since: int | None) -> None:
    """Delete the units; with ``since`` raise ConflictError when one of them changed after it or is gone."""
    if since is None:
        tx.drop_many(ids)
        return
    changed = tx.outside(lambda con: changed_since(con, since))
    conflicts = list(ids) if changed is None else [unit_id for unit_id in ids if unit_id in changed]
    conflicts += [unit_id for unit_id in ids if not tx.drop(unit_id)] if not conflicts else []
    if conflicts:
        raise ConflictError(conflicts)


_PAGE = 1000


def _looked_up(ids: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(plain_text(unit_id) for unit_id in listed("ids", ids) if is_id(unit_id)))


MAX_RESULTS = 10_000_000
"""Most results of one call of ``search_vectors``, queries times ``top_k``: 120 MB of distances and places, and ids."""


def _queries(session: StoreSession, given: Any) -> FloatArray | DeviceQueries:
    """Checked queries, on the device where they lie if the index takes them there, else on the host."""
    index, dim, metric = session.live.view.index, session.records.dim, session.records.metric
    if index.accepts_device_queries and index.device != "cpu":
        found = device_queries(given, dim, metric)
        if found is not None:
            return found
    return check_vectors(given, dim, metric, name="queries")


def check_arguments(top_k: Any, recall: Any, query: Any = "") -> int:
    """``top_k`` as an int; InvalidQueryError for what no search can answer."""
    if not isinstance(query, str):
        raise InvalidQueryError(f"query must be a string, got {type(query).__name__}; see search_vectors")
    wanted = whole_number("top_k", top_k)
    if recall is not None and (isinstance(recall, bool) or not isinstance(recall, (int, float)) or not 0 < recall <= 1):
        raise InvalidQueryError(f"recall must be a number above 0 and at most 1, got {shown(recall)}")
    return wanted


def check_width(queries: int, top_k: int) -> None:
    """Raise InvalidQueryError where so many queries with so many results each are more than one call may return."""
    if queries * top_k > MAX_RESULTS:
        raise InvalidQueryError(
            f"top_k={shown(top_k)} for {queries} queries are more than {MAX_RESULTS:,} results; ask for fewer, or "
            "for fewer queries at once"
        )


def _widened(distances: FloatArray, width: int) -> FloatArray:
    """As many columns as were asked for, +inf where nothing exists."""
    if distances.shape[1] == width:
        return distances
    wide = np.full((len(distances), width), np.inf, dtype=np.float32)
    wide[:, : distances.shape[1]] = distances
    return wide


Progress = Callable[[str, float], None]
_Store = TypeVar("_Store", bound="VectorStore")

_LARGEST_PAGE = 10_000
"""Rows that are read at once, however many the caller asks for."""


class VectorStore(StorageBackend, MetadataMixin):
    """Keeps memory units and finds them by meaning. See ``docs/`` for files, settings and guarantees.

    Safe to use from several threads, from several processes on one file, and after ``os.fork``.
    """

    def __init__(
        self,
        index_file: str | os.PathLike[str],
        embedding_function: EmbeddingFunction | None,
        embedding_dim: int | None = None,
        index_type: str | None = None,
        storage_config: Any = None,
        *,
        machine: Machine | None = None,
    ) -> None:
        """Open the store at the path prefix ``index_file``, or make a new one there.

        embedding_function maps a text to a 1-D array; it may offer ``embed_batch(texts)``, ``dimension`` and
        ``model_name``. None serves those who embed nothing (reading, given embeddings). embedding_dim: taken from the
        file, else from the function. index_type: flat, ivf, hnsw or auto; overrides storage_config, which may be a
        StorageConfig, a mapping, or MemEvolve's own storage configuration (None: environment and ``.env``). machine:
        the devices, for those who find and account for them by themselves; None looks at this machine.

        Raises: EngineError (a RuntimeError, "Failed to create ... index") without a usable faiss;
        DimensionMismatchError, ModelMismatchError or ConfigurationError when function or settings do not fit the
        file; a StorageError for a file that cannot be used.
        """
        config = StorageConfig.adopt(storage_config)
        if index_type is not None:
            config = config.replace(index_type=index_type)
        self.index_file = path_text("index_file", index_file)
        self.embedding_function = embedding_function
        self._session: StoreSession | None = open_session(
            self.index_file, embedding_function, embedding_dim, config, machine
        )
        self.config = self._session.config

    @staticmethod
    def exists_at(index_file: str | os.PathLike[str]) -> bool:
        """Is there a store at this path prefix?"""
        return Records.peek(index_file) is not None

    # The shape of the store

    @property
    def embedding_dim(self) -> int:
        """Length of every vector."""
        return self._open.records.dim

    @property
    def index_type(self) -> str:
        return self.config.index_type

    @property
    def metric(self) -> str:
        """l2, cosine or ip."""
        return self._open.records.metric

    @property
    def data(self) -> UnitMapping:
        """A read-only mapping of id to unit, read from the records at each access."""
        return UnitMapping(self._open.records)

    @property
    def index(self) -> IndexInfo:
        """What the index holds: ``ntotal``, ``nlist``, ``is_trained``, ``kind``."""
        return IndexInfo(self._open.live, self._open.maintenance)

    # Writing

    def store(self, unit: MemoryUnit) -> str:
        """Keep a unit and return its id: the unit's own, or the next ``unit_<n>``. An existing id is replaced.

        When this returns the unit is durable and the next search finds it. The given dict is not changed; the stored
        unit has ``metadata.created_at``. Raises InvalidUnitError, EmbeddingError, InvalidVectorError,
        DimensionMismatchError, CapacityError, StorageError; nothing is written then.
        """
        session = self._open
        checked = self._add_metadata(checked_unit(unit))
        text = text_to_embed(checked)
        vector = session.embed(text)
        prepare(session, 1)
        with session.records.write() as tx:
            pruned = make_room(session, tx, [checked.get("id")])
            check_room(session, tx, [checked.get("id")])
            unit_id = checked.get("id") or tx.next_auto_id()
            tx.put({**checked, "id": unit_id}, text, vector.tobytes(), unit_id)
        session.written(1)
        tell(session, pruned)
        return unit_id

    def store_batch(
        self, units: Sequence[MemoryUnit], embeddings: Any = None, progress: Progress | None = None
    ) -> list[str]:
        """Keep several units in one transaction and return their ids in order: all of them or none.

        embeddings (n, dim) spares the embedding function; row i belongs to unit i. Where an id occurs twice in the
        batch the later one stays. progress is told (stage, share done). Raises as ``store`` does, naming the position
        of the unit at fault. (The forerunner kept what went well and logged the rest; that is gone.)
        """
        return self._write_batch([], units, embeddings, progress, None)

    def replace_batch(
        self,
        delete_ids: Iterable[str],
        units: Sequence[MemoryUnit],
        embeddings: Any = None,
        *,
        unchanged_since: int | None = None,
    ) -> list[str]:
        """Delete some units and keep others in one transaction: all of it or nothing. The ids of ``units``, in order.

        Ids that do not exist are passed over. With unchanged_since, a ``change_number``, ConflictError is raised when a
        unit to delete was stored or updated after it, or is gone. Raises as ``store_batch`` does.
        """
        wanted = [checked_id(unit_id, f"delete_ids[{i}]") for i, unit_id in enumerate(listed("delete_ids", delete_ids))]
        if len(set(wanted)) < len(wanted):
            twice = next(one for at, one in enumerate(wanted) if one in wanted[:at])
            raise InvalidUnitError(f"delete_ids names {shown(twice)} twice; name each unit once")
        return self._write_batch(wanted, units, embeddings, None, unchanged_since)

    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        """Replace the unit of that id and set ``metadata.updated_at``; False when there is none.

        ``created_at`` is kept. The vector is made anew only when the embedded text has changed. Raises as ``store``
        does; works at the capacity limit too.
        """
        session = self._open
        unit_id = checked_id(unit_id)
        checked = checked_unit(_with_id(unit, unit_id))
        text = unit_to_text(checked)
        vector: FloatArray | None = None
        while True:
            with session.records.write() as tx:
                old = tx.find(unit_id)
                if old is None:
                    return False
                stamped = self._restamped(checked, old.unit)
                if text == unit_to_text(old.unit):
                    tx.edit(unit_id, stamped)
                    break
                if vector is not None:
                    tx.put(stamped, text, vector.tobytes(), unit_id)
                    break
            vector = session.embed(
                text_to_embed(checked)
            )  # outside the lock: it may take seconds, and the unit may change meanwhile
        session.written(1)
        return True

    def delete(self, unit_id: str) -> bool:
        """Delete a unit; False when there is none."""
        session = self._open
        if not one_id(unit_id, "delete_batch"):
            return False
        with session.records.write() as tx:
            dropped = tx.drop(unit_id)
        if dropped:
            session.written(1)
        return dropped

    def clear(self) -> None:
        """Delete every unit, in one transaction."""
        session = self._open
        with session.records.write() as tx:
            tx.clear()
        session.written()

    # Reading

    def retrieve(self, unit_id: str) -> MemoryUnit | None:
        session = self._open
        unit = session.records.get(unit_id) if one_id(unit_id, "retrieve_batch") else None
        if unit is not None:
            session.accesses.note((plain_text(unit_id),))
        return unit

    def retrieve_all(self) -> list[MemoryUnit]:
        return list(self._open.records.units())

    def units(self, filters: Mapping[str, Any] | None = None) -> Iterator[MemoryUnit]:
        """Units one by one, oldest first, read in pages: for stores that do not fit in a list."""
        return self._open.records.units(filters=filters)

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        """(unit, vector as it was given, float32 (dim,)) one by one, oldest first.

        page_size: rows read at once, at most 10,000 of them. Raises InvalidQueryError.
        """
        return _exported(self._open.records, min(whole_number("page_size", page_size), _LARGEST_PAGE))

    def exists(self, unit_id: str) -> bool:
        return one_id(unit_id, "retrieve_batch") and self._open.records.exists(unit_id)

    def count(self) -> int:
        return self._open.records.count()

    def get_metadata(self, unit_id: str) -> dict[str, Any] | None:
        unit = self._open.records.get(unit_id) if is_id(unit_id) else None
        return None if unit is None else unit.get("metadata")

    def __len__(self) -> int:
        return self.count()

    def __iter__(self) -> Iterator[MemoryUnit]:
        return self.units()

    def __contains__(self, unit_id: object) -> bool:
        return is_id(unit_id) and self._open.records.exists(unit_id)

    # Upkeep

    def run_maintenance(self, progress: Progress | None = None) -> dict[str, Any]:
        """Do now what the background would do: build the planned index, verify and save it, purge the log."""
        self._open.accesses.flush()
        return self._open.maintenance.run(callback("progress", progress)).as_dict()

    def retrain(self, progress: Progress | None = None, samples: bool = False) -> dict[str, Any]:
        """Train the index anew, whether it is due or not.

        Below MIN_TRAINING_UNITS it stays exact, unless ``samples`` is set: then service samples, which are embedded
        through the store's function and kept, make up for the units that lack.
        """
        return self._open.maintenance.run(
            callback("progress", progress),
            force=RebuildReason("train", "asked for", by_request=switch("samples", samples)),
        ).as_dict()

    def register_management_operation(self, operation_type: str, details: Any) -> dict[str, Any]:
        """Tell the store what management did, so that the index follows.

        operation_type: prune, consolidate, deduplicate or forget. details: whatever there is to say, what is not JSON
        is kept as its repr; ``removed`` (or ``count``, or ``ids``) says how many units went. Returns the history's
        entry with the store's ``decision``: retrain, compact, append or nothing. Raises InvalidQueryError.
        """
        return register(self._open, operation_type, details)

    def check(self, fix: bool = False) -> list[Finding]:
        """Hold the records against themselves and the index against the records; ``fix`` repairs what can be."""
        return self._open.check(switch("fix", fix))

    def snapshot(self) -> str:
        """Save the index for a quick next opening; the path of the file.

        Raises StorageError (StorageFullError, ReadOnlyError) when it cannot be written; nothing else suffers.
        """
        return str(self._open.maintenance.snapshot())

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the records to a new database file, consistent while the store is in use."""
        self._open.records.backup(path)

    @staticmethod
    def restore(backup: str | os.PathLike[str], prefix: str | os.PathLike[str]) -> str | None:
        """Put a copy of a backup in the place of the store at ``prefix``.

        Works while nobody has the store open, and leaves one whole store wherever it is killed. The backup is verified
        first. The old store is kept.

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

    def get_storage_health(self) -> dict[str, Any]:
        """Fill level, memory, index quality, and sentences that an operator can act on."""
        return health_report(self._open)

    def statistics(self) -> dict[str, Any]:
        """Counts, the plan and why, file sizes, watermarks and recent events."""
        return statistics_report(self._open)

    def save_state(self) -> dict[str, Any]:
        """Where the units are; another instance takes over from there with ``restore_state``."""
        return {"index_file": self.index_file, "store_id": self._open.records.store_id, "count": self.count()}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Copy the units of the store that ``save_state`` described into this one, unless it is that very store."""
        if not isinstance(state, Mapping):
            raise InvalidQueryError(f"state must be what save_state() returned, got {shown(state)}")
        source = state.get("index_file")
        if source is None or state.get("store_id") == self._open.records.store_id:
            return
        with VectorStore(source, None, storage_config=self.config) as other:
            rows = list(other.export_rows())
        self.store_batch([unit for unit, _ in rows], np.array([vector for _, vector in rows]))

    def close(self) -> None:
        """Let a running build finish and give everything back. Further calls raise StoreClosedError."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self: _Store) -> _Store:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._session is None:
            return f"<VectorStore {self.index_file!r}, closed>"
        return f"<VectorStore {self.index_file!r}, {self.count()} units, {self.index.kind}>"

    def search(
        self,
        query: str,
        top_k: int = 5,
        filters: Mapping[str, Any] | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
    ) -> list[tuple[float, str]]:
        """[(distance, id), ...] of the units nearest to the text, nearest first; never more than are stored.

        Distances: squared L2, 1 - cosine, or -dot by the store's metric. filters: see ``docs/reference/filters.md``.
        recall overrides TARGET_RECALL for this call (1.0: exact). record=False leaves the access figures alone,
        for those who pass only some of the results on. Raises InvalidQueryError, InvalidFilterError, EmbeddingError.
        """
        found = self._find_text(query, top_k, filters, recall)
        if found is None:
            return []
        ids = found.ids(0)
        if switch("record", record):
            self._open.accesses.note(ids)
        return list(zip(found.distances[0].tolist(), ids, strict=False))

    def search_units(
        self,
        query: str,
        top_k: int = 5,
        filters: Mapping[str, Any] | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
    ) -> list[Hit]:
        """As ``search``, with each unit and a score that grows with similarity."""
        found = self._find_text(query, top_k, filters, recall)
        if found is None:
            return []
        hits = self._open.hits(found, lambda: self._find_text(query, top_k, filters, recall))
        if switch("record", record):
            self._open.accesses.note([hit.id for hit in hits])
        return hits

    def search_vectors(
        self, queries: Any, top_k: int = 5, filters: Mapping[str, Any] | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        """queries (n, dim) -> distances float32 (n, top_k) and n lists of top_k ids; +inf and None where fewer exist.

        n times top_k may be 10,000,000 at most. queries may lie on a GPU, as a torch tensor, a cupy array or anything
        that speaks DLPack; they stay there where the index does too.

        Raises InvalidVectorError, DimensionMismatchError, InvalidQueryError, InvalidFilterError.
        """
        session = self._open
        width = check_arguments(top_k, recall)
        vectors = _queries(session, queries)
        check_width(len(vectors), width)
        found = self._find(vectors, width, filters, recall)
        ids: list[list[str | None]] = []
        for row in range(len(vectors)):
            names: list[str | None] = list(found.ids(row))
            ids.append(names + [None] * (width - len(names)))
        return _widened(found.distances, width), ids

    def search_keywords(
        self, query: str, top_k: int = 5, filters: Mapping[str, Any] | None = None
    ) -> list[tuple[float, str]]:
        """[(score, id), ...] of the units whose embedded text has words of the query, best BM25 score first.

        Words in more than a twentieth of the units score but find nothing by themselves, unless there is no other.
        Raises InvalidQueryError, InvalidFilterError.
        """
        records = self._open.records
        limit = min(check_arguments(top_k, None, query), max(1, records.count()))
        return records.keyword(query, limit, filters, text_of=unit_to_text)

    @property
    def change_number(self) -> int:
        """The number of the newest change by anyone; for ``unchanged_since``."""
        return self._open.records.head().last_seq

    def delete_batch(self, ids: Iterable[str], *, unchanged_since: int | None = None) -> int:
        """Delete several units in one transaction; how many went.

        unchanged_since: a ``change_number``; units that were stored or updated after it stay.
        """
        session = self._open
        wanted = [checked_id(unit_id, f"ids[{i}]") for i, unit_id in enumerate(listed("ids", ids))]
        since = change("unchanged_since", unchanged_since)
        with session.records.write() as tx:
            dropped = drop_unchanged(tx, wanted, since)
        if dropped:
            session.written()
        return dropped

    def record_access(self, ids: Iterable[str]) -> None:
        """The units of these ids were given to somebody. Costs about a microsecond.

        ``retrieve``, ``search`` and ``search_units`` do this themselves. What was read is written down a thousand ids
        at a time, at maintenance and when the store is closed; a crash loses what was not yet.
        """
        self._open.accesses.note([plain_text(unit_id) for unit_id in listed("ids", ids) if is_id(unit_id)])

    def access_order(self, kind: Literal["lru", "lfu"], limit: int) -> list[str]:
        """Ids of at most ``limit`` units: read longest ago (lru) or least often (lfu) first, before them those never
        read, by age. Counts every read of this process, and those that others have written down.

        Raises InvalidQueryError.
        """
        word("kind", kind, ("lru", "lfu"))
        session, most = self._open, whole_number("limit", limit, least=0)
        return session.accesses.in_order(kind, min(most, session.records.count()))

    def access_counts(self) -> dict[str, int]:
        """How often each unit was read, by id, of those that ever were; counted as for ``access_order``."""
        return self._open.accesses.counts()

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``; leaves the access figures alone."""
        return self._open.records.get_many(_looked_up(ids))

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """The vectors, as they were given, of the units that exist: float32 (dim,) by id, in the order of ``ids``."""
        wanted, records = _looked_up(ids), self._open.records
        found: dict[str, bytes] = {}
        for start in range(0, len(wanted), _PAGE):
            found.update(records.vectors_of(wanted[start : start + _PAGE]))
        return {unit_id: np.frombuffer(found[unit_id], dtype="<f4") for unit_id in wanted if unit_id in found}

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        """The vectors of at most ``count`` units, spread evenly over their age: float32 (dim,) by id."""
        head_count = self._open.records.head().count
        rows = self._open.records.spread(min(whole_number("count", count, least=0), head_count))
        return {row.id: np.frombuffer(row.vector, dtype="<f4") for row in rows}

    def inventory(self) -> dict[str, Any]:
        """What units there are, without reading them: ``count``; ``bytes`` of the database and its log on the disk;
        ``types``, type to number, those without one under ``unknown``; ``oldest`` and ``newest``, ``created_at`` of the
        first and the last unit in the order of writing.
        """
        records = self._open.records
        found = records.inventory()
        unknown = found.count - sum(found.types.values())
        types = {**found.types, "unknown": unknown} if unknown > 0 else found.types
        size = sum(records.file_bytes().values())
        return {**asdict(found), "types": types, "bytes": size}

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        """The cosine between the text and each of the units that exist, by id, whatever the store's metric.

        Raises EmbeddingError.
        """
        session = self._open
        vector = check_vector(session.embed_query(query), session.records.dim, session.records.metric, name="query")
        return cosines(vector, self.vectors_of(ids))

    # Inside

    @property
    def _open(self) -> StoreSession:
        if self._session is None:
            raise StoreClosedError(f"the store {self.index_file!r} is closed; open a new VectorStore")
        return self._session

    def _unit_to_text(self, unit: Mapping[str, Any]) -> str:
        """The text that is embedded: content, then reasoning, query, tags and type."""
        return unit_to_text(unit)

    def _restamped(self, unit: MemoryUnit, old: MemoryUnit) -> MemoryUnit:
        metadata = dict(unit.get("metadata") or {})
        held = old.get("metadata")
        created = held.get("created_at") if isinstance(held, dict) else None
        metadata.setdefault("created_at", created if created is not None else self._generate_timestamp())
        return {**unit, "metadata": {**metadata, "updated_at": self._generate_timestamp()}}

    def _write_batch(
        self,
        delete_ids: list[str],
        units: Sequence[MemoryUnit],
        embeddings: Any,
        progress: Progress | None,
        since: int | None,
    ) -> list[str]:
        session, since = self._open, change("unchanged_since", since)
        callback("progress", progress)
        given = listed("units", units, InvalidUnitError)
        checked = [self._add_metadata(checked_unit(unit, f"units[{i}]")) for i, unit in enumerate(given)]
        if not checked and not delete_ids:
            return []
        texts = texts_of(checked, to_embed=embeddings is None)
        vectors = self._vectors_for(texts, embeddings, progress) if checked else np.empty((0, 0), np.float32)
        ids: list[str] = []
        prepare(session, len(checked))
        with session.records.write() as tx:
            drop_all(tx, delete_ids, since)
            pruned = make_room(session, tx, [unit.get("id") for unit in checked])
            check_room(session, tx, [unit.get("id") for unit in checked])
            ids.extend(_ids_for(checked, tx))
            named = ({**unit, "id": unit_id} for unit, unit_id in zip(checked, ids, strict=True))
            tx.put_many(zip(named, texts, (row.tobytes() for row in vectors), ids, strict=True))
        session.written()
        tell(session, pruned)
        return ids

    def _vectors_for(self, texts: list[str], embeddings: Any, progress: Progress | None) -> FloatArray:
        session = self._open
        if embeddings is None:
            return session.embed_many(texts, progress)
        vectors = check_vectors(embeddings, session.records.dim, session.records.metric)
        if len(vectors) != len(texts):
            raise EmbeddingError(f"embeddings has {len(vectors)} rows for {len(texts)} units; pass one row per unit")
        return vectors

    def _find_text(
        self, query: str, top_k: int, filters: Mapping[str, Any] | None, recall: float | None
    ) -> Found | None:
        session = self._open
        wanted = check_arguments(top_k, recall, query)
        if not session.live.catch_up().count:
            return None
        vector = check_vector(session.embed_query(query), session.records.dim, session.records.metric, name="query")
        return self._find(vector[None, :], wanted, filters, recall)

    def _find(
        self,
        vectors: FloatArray | DeviceQueries,
        top_k: int,
        filters: Mapping[str, Any] | None,
        recall: float | None,
    ) -> Found:
        session = self._open
        if session.records.metric == "cosine" and not isinstance(vectors, DeviceQueries):
            vectors = normalize_rows(vectors)
        found = session.live.search(vectors, top_k, filters, recall)
        if session.live.look_due or session.worker.start_failure:
            session.consider_maintenance()
        return found


def _ids_for(units: list[MemoryUnit], tx: Transaction) -> Iterator[str]:
    """The units' own ids, and fresh ones for the rest that none of the others in the batch carries."""
    own = {unit["id"] for unit in units if unit.get("id")}
    for unit in units:
        unit_id = unit.get("id") or tx.next_auto_id()
        while unit_id in own and not unit.get("id"):
            unit_id = tx.next_auto_id()
        yield unit_id


def _exported(records: Records, page_size: int) -> Iterator[tuple[MemoryUnit, FloatArray]]:
    after, last = 0, records.head().last_slot
    while rows := records.scan(after, last, page_size):
        units = records.units_at([row.slot for row in rows])
        for row in rows:
            if row.slot in units:
                yield units[row.slot], np.frombuffer(row.vector, dtype="<f4")
        after = rows[-1].slot


def _with_id(unit: Any, unit_id: str) -> Any:
    return {**unit, "id": unit_id} if isinstance(unit, dict) else unit
