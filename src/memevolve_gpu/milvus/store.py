"""``MilvusStore``: a memory store on a Milvus server, for data beyond one machine.

This module translates the public API to rows of a collection; see docs/how-to/milvus.md for what Milvus cannot do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice

import numpy as np

from ..components.store.base import MetadataMixin, Progress
from ..components.store.listing import Listing, listing_of, with_created_at
from ..components.store.ranking import Window, score_of
from ..components.store.units import (
    OpenBackend,
    UnitMapping,
    check_arguments,
    check_width,
    checked_id,
    checked_unit,
    checked_units,
    looked_up,
    one_id,
    text_to_embed,
    texts_of,
    unit_to_text,
    with_id,
)
from ..components.store.vector_store import VectorStore
from ..errors import ConfigurationError, ConflictError, StoreClosedError
from ..records.filters import matches, parse
from ..types import Each, Filters, FloatArray, Hit, Json, JsonObject, MemoryUnit, Metric, Moment, Ttl, Vectors
from ..utils.arguments import callback, listed, mapping, whole_number
from ..utils.config import MilvusConfig, StorageConfig
from ..utils.embeddings import EmbeddingFunction
from ..utils.report_types import (
    IndexInfo,
    Inventory,
    MaintenanceReport,
    MilvusStatistics,
    OperationEntry,
    StorageHealth,
)
from ..utils.vectors import check_vectors, cosines
from .client import Client, MilvusClient
from .collection import CollectionInfo, describe, unit_of, vector_of
from .filters import filter_expression
from .search import Candidate
from .session import MilvusSession, health_report, open_session, registered, statistics_report

_MEASURED = 256
"""Newest units whose mean length stands for that of all."""


def _created(row: Mapping[str, Json] | None) -> str | None:
    metadata = unit_of(row["body"]).get("metadata") if row else None
    created = metadata.get("created_at") if isinstance(metadata, dict) else None
    return created if isinstance(created, str) else None


def _described_at(milvus_config: object, make: Callable[[float], Client] | None) -> CollectionInfo | None:
    with closing(MilvusClient(MilvusConfig.adopt(milvus_config), make)) as connection:
        return describe(connection)


class MilvusStore(OpenBackend, MetadataMixin):
    """Stores memory units in a collection of a Milvus server.

    The methods are those of ``VectorStore`` without access statistics, keyword search, change numbers and backups.
    Guarantees and differences: ``docs/how-to/milvus.md``. Safe to use from several threads, by several writers on one
    collection, and after ``os.fork``. Every method raises StoreUnavailableError when the server does not answer in
    time, and StoreClosedError after :meth:`close`.

    Attributes:
        config: The settings in use, a ``StorageConfig``.
        embedding_function: The function that the store was opened with.

    Examples:
        The server listens on localhost.

        >>> from memevolve_gpu import HashingEmbedder, MilvusStore
        >>> place = {"uri": "http://localhost:19530", "collection": "memory"}
        >>> store = MilvusStore(HashingEmbedder(), milvus_config=place)
        >>> store.store({"id": "git", "type": "lesson", "content": "Rebase before you push"})
        'git'
        >>> [hit.id for hit in store.search_units("rebase and push", top_k=1)]
        ['git']
        >>> store.close()
    """

    def __init__(
        self,
        embedding_function: EmbeddingFunction | None,
        embedding_dim: int | None = None,
        storage_config: object = None,
        milvus_config: object = None,
        client: Callable[[float], Client] | None = None,
    ) -> None:
        """Open a collection, or make it.

        Args:
            embedding_function: As for ``VectorStore``.
            embedding_dim: As for ``VectorStore``.
            storage_config: As for ``VectorStore``.
            milvus_config: A ``MilvusConfig`` or a mapping; None reads MEMEVOLVE_MILVUS_* of the environment and
                ``.env``.
            client: Called with the seconds that connecting may take, returns the client; None takes pymilvus.

        Raises:
            ConfigurationError: pymilvus is missing, the server is too old, or it refuses the credentials.
            StoreUnavailableError: The server does not answer in time.
            NotAStoreError: The collection is not one of a store.
            DimensionMismatchError: The function's vectors have another length than the collection's.
            ModelMismatchError: The collection was filled by another embedding model.
        """
        self.config = StorageConfig.adopt(storage_config)
        if self.config.namespace:
            raise ConfigurationError(
                f"namespace={'/'.join(self.config.namespace)!r} (variable MEMEVOLVE_STORAGE_NAMESPACE): a MilvusStore "
                "has no namespaces; use a collection for each, or a VectorStore"
            )
        self.embedding_function = embedding_function
        place = MilvusConfig.adopt(milvus_config)
        self._place = place
        self._session: MilvusSession | None = open_session(
            place, embedding_function, embedding_dim, self.config, client
        )

    @staticmethod
    def exists_at(milvus_config: object = None, client: Callable[[float], Client] | None = None) -> bool:
        """Check for a store on a server.

        Args:
            milvus_config: As for ``MilvusStore``.
            client: As for ``MilvusStore``.

        Returns:
            Whether there is a store.

        Raises:
            StoreUnavailableError: The server does not answer.
        """
        return _described_at(milvus_config, client) is not None

    @staticmethod
    def model_at(milvus_config: object = None, client: Callable[[float], Client] | None = None) -> str | None:
        """Read the name of the embedding model that filled a store.

        Args:
            milvus_config: As for ``MilvusStore``.
            client: As for ``MilvusStore``.

        Returns:
            The name; None when there is no store, or the model has no name.

        Raises:
            StoreUnavailableError: The server does not answer.
        """
        info = _described_at(milvus_config, client)
        return None if info is None else info.model

    @property
    def embedding_dim(self) -> int:
        """Length of every vector."""
        return self._open.info.dim

    @property
    def index_type(self) -> str:
        """The configured index type: flat, ivf, hnsw or auto."""
        return self.config.index_type

    @property
    def metric(self) -> Metric:
        return self._open.info.metric

    @property
    def model_name(self) -> str | None:
        """The embedding model that the collection was made with, if it had a name."""
        return self._open.info.model

    @property
    def data(self) -> UnitMapping:
        """A read-only mapping of id to unit, read from the server at each access."""
        table = self._open.table
        return UnitMapping(self, lambda: (str(row["id"]) for row in table.in_order([])))

    @property
    def index(self) -> IndexInfo:
        """What the index holds: ``ntotal``, ``nlist``, ``is_trained``, ``is_building``, ``kind``."""
        session = self._open
        return IndexInfo(session.table.count(), session.plan.nlist, session.plan.index, session.unsettled() > 0)

    # Writing

    def store(
        self, unit: MemoryUnit, *, replaces: str | None = None, ttl: Ttl = None, expires_at: Moment = None
    ) -> str:
        """Store a unit. When this returns the server has it in its log, and the next search of this store finds it.

        Args:
            unit: A JSON object. One with an ``id`` replaces the unit of that id, and keeps its ``created_at`` unless it
                brings one.
            replaces: The id of a unit that this one supersedes; it is deleted afterwards, not in one transaction.
            ttl: Refused: units do not expire here, as "set_expiry" in ``capabilities`` would tell.
            expires_at: Likewise.

        Returns:
            The unit's id: its own, or a fresh ``unit_<n>``.

        Raises:
            ConfigurationError: ``ttl`` or ``expires_at`` was given.
            ConflictError: There is no unit of the id ``replaces``; nothing was stored.
            StoreUnavailableError: The unit may or may not be stored; storing it again under its id is safe.
            InvalidUnitError: As for ``VectorStore.store``, as all other errors.
        """
        self._refuse(ttl=ttl, expires_at=expires_at)
        session, checked = self._open, checked_unit(unit)
        vector = session.embedder.embed(text_to_embed(checked))
        if replaces is not None and not self.exists(checked_id(replaces, "replaces")):
            raise ConflictError([replaces], "replaces names no unit, so nothing was stored")
        session.check_room([checked.get("id") or replaces])
        unit_id = checked.get("id") or session.table.clock.next_id()
        (stamped,) = self._stamped([{**checked, "id": unit_id}])
        session.put([stamped], vector[None, :], session.table.clock.next_timestamps(1))
        if replaces is not None and replaces != unit_id:
            session.drop([replaces])
        return str(unit_id)

    def store_batch(
        self,
        units: Sequence[MemoryUnit],
        embeddings: Vectors | None = None,
        progress: Progress | None = None,
        *,
        ttl: Each[Ttl] = None,
        expires_at: Each[Moment] = None,
    ) -> list[str]:
        """Store several units, not in one transaction: see docs/how-to/milvus.md.

        Everything is checked and embedded before the first row is written; a later error of the server leaves the rows
        before it stored.

        Args:
            units: The units, as for :meth:`store`. Where an id occurs twice the later unit stays.
            embeddings: float32 (len(units), dim), row i for unit i; None calls the embedding function.
            progress: Called with (stage, share done).
            ttl: Refused, as for :meth:`store`.
            expires_at: Likewise.

        Returns:
            The ids, in order.

        Raises:
            StoreUnavailableError: As for :meth:`store`, as all other errors.
        """
        self._refuse(ttl=ttl, expires_at=expires_at)
        session = self._open
        callback("progress", progress)
        checked = checked_units(units)
        if not checked:
            return []
        texts = texts_of(checked, to_embed=embeddings is None)
        vectors = session.embedder.vectors_for(texts, embeddings, progress)
        session.check_room([unit.get("id") for unit in checked])
        ids = [unit.get("id") or session.table.clock.next_id() for unit in checked]
        last = list({unit_id: at for at, unit_id in enumerate(ids)}.values())
        named = self._stamped([{**checked[at], "id": ids[at]} for at in last])
        session.put(named, vectors[last], session.table.clock.next_timestamps(len(last)))
        return ids

    def update(self, unit_id: str, unit: MemoryUnit, *, ttl: Ttl = None, expires_at: Moment = None) -> bool:
        """Replace a unit, keep its ``metadata.created_at`` and set ``metadata.updated_at``.

        A text that stays the same is not embedded again. A change that another writer makes to the same unit meanwhile
        may be lost: Milvus has no transactions.

        Args:
            unit_id: The id of the unit to replace.
            unit: The new unit.
            ttl: Refused, as for :meth:`store`.
            expires_at: Likewise.

        Returns:
            False when there is no unit of that id.

        Raises:
            ConfigurationError: As for :meth:`store`, as all other errors.
        """
        self._refuse(ttl=ttl, expires_at=expires_at)
        session = self._open
        unit_id = checked_id(unit_id)
        checked = checked_unit(with_id(unit, unit_id))
        held = session.table.get([unit_id], ["body", "vector", "born"]).get(unit_id)
        if held is None:
            return False
        old = unit_of(held["body"])
        stamped = self._updated_metadata(checked, old)
        if unit_to_text(checked) == unit_to_text(old):
            vector, born = vector_of(held["vector"]), range(int(held["born"]), int(held["born"]) + 1)
        else:
            vector, born = session.embedder.embed(text_to_embed(checked)), session.table.clock.next_timestamps(1)
        session.put([stamped], vector[None, :], born)
        return True

    def delete(self, unit_id: str) -> bool:
        session = self._open
        return bool(session.drop([unit_id])) if one_id(unit_id, "delete_batch") else False

    def clear(self) -> None:
        self._open.clear()

    # Reading

    def retrieve(self, unit_id: str, *, ttl: Ttl = None, as_of: Moment = None) -> MemoryUnit | None:
        """Read a unit.

        Args:
            unit_id: Its id.
            ttl: Refused, as for :meth:`store`.
            as_of: Refused: there is no history here, as "history" in ``capabilities`` would tell.

        Returns:
            The unit; None when there is none.

        Raises:
            ConfigurationError: ``ttl`` or ``as_of`` was given.
        """
        self._refuse(ttl=ttl, as_of=as_of)
        return self._open.table.units([unit_id]).get(unit_id) if one_id(unit_id, "retrieve_batch") else None

    def retrieve_all(self) -> list[MemoryUnit]:
        return list(self.units())

    def exists(self, unit_id: str) -> bool:
        return one_id(unit_id, "retrieve_batch") and bool(self._open.table.get([unit_id], []))

    def count(self, filters: Filters | None = None) -> int:
        """Count the units.

        Args:
            filters: Counts those that match only, by reading them.

        Returns:
            The number of units.

        Raises:
            InvalidFilterError: ``filters`` is malformed.
        """
        return self._open.table.count() if filters is None else sum(1 for _ in self.units(filters))

    def get_metadata(self, unit_id: str) -> JsonObject | None:
        unit = self.retrieve(unit_id)
        return None if unit is None else unit.get("metadata")

    def refresh(self) -> None:
        self._open.table.clock.wrote()

    # Maintenance and reports

    def run_maintenance(self, progress: Progress | None = None) -> MaintenanceReport:
        """Have the server seal and index what was written, and wait for it, ten minutes at most.

        Args:
            progress: Called with (stage, share done).

        Returns:
            What was done.

        Raises:
            StorageError: The server fails to index, or takes longer.
        """
        waited = self._open.settle(callback("progress", progress))
        return {"actions": ["flushed", f"indexed {waited} rows"] if waited else ["flushed"], "reason": ""}

    def retrain(self, progress: Progress | None = None, samples: bool = False) -> MaintenanceReport:
        """Do as :meth:`run_maintenance` does: the server trains an index for each segment when it seals it.

        Args:
            progress: Called with (stage, share done).
            samples: Ignored; the server trains on the segment's own vectors.

        Returns:
            What was done.
        """
        del samples
        return self.run_maintenance(progress)

    def register_management_operation(self, operation_type: str, details: object) -> OperationEntry:
        """Keep a management operation in the history of this process.

        Args:
            operation_type: prune, consolidate, deduplicate or forget.
            details: What is known of it; values that JSON cannot hold are kept as their repr.

        Returns:
            The entry of the history; its ``decision`` is always nothing.

        Raises:
            InvalidQueryError: The operation is unknown.
        """
        return registered(self._open, operation_type, details)

    def get_storage_health(self) -> StorageHealth:
        """Report fill level, rows that are not indexed yet, and recommendations for the operator.

        Returns:
            The report, as of ``VectorStore``. Memory is the server's and counts as 0 here.
        """
        return health_report(self._open)

    def statistics(self) -> MilvusStatistics:
        """Report counts, the index, the server's version and segments, and recent events.

        Returns:
            The report.
        """
        return statistics_report(self._open)

    def save_state(self) -> JsonObject:
        return {"milvus": self._place.address, "count": self.count()}

    def restore_state(self, state: Mapping[str, object]) -> None:
        source = self._described(mapping("state", state))
        if source is None:
            return
        with source:
            rows = source.export_rows()
            while page := list(islice(rows, 500)):
                self.store_batch([unit for unit, _ in page], [vector for _, vector in page])

    def close(self) -> None:
        """Close the connection. Further calls raise StoreClosedError."""
        session, self._session = self._session, None
        if session is not None:
            session.table.client.close()

    def __repr__(self) -> str:
        closed = ", closed" if self._session is None else ""
        return f"<MilvusStore {self._place.address}{closed}>"

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
        del record
        window = Window.of(check_arguments(top_k, recall, query), offset, min_score)
        found = self._find_text(query, window.reach, filters, recall, with_units=False)
        metric = self._open.info.metric
        return window.cut([(one.distance, one.id) for one in found], lambda pair: score_of(pair[0], metric))

    def _hits(self, query: str, top_k: int, filters: Filters | None, recall: float | None) -> list[Hit]:
        metric = self._open.info.metric
        found = self._find_text(query, top_k, filters, recall, with_units=True)
        return [
            Hit(one.unit, one.id, one.distance, score_of(one.distance, metric)) for one in found if one.unit is not None
        ]

    def search_vectors(
        self, queries: Vectors, top_k: int = 5, filters: Filters | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        session = self._open
        width = check_arguments(top_k, recall)
        vectors = check_vectors(queries, session.info.dim, session.info.metric, name="queries")
        check_width(len(vectors), width)
        found = self._find(vectors, width, filters, recall, with_units=False)
        distances = np.full((len(vectors), width), np.inf, dtype=np.float32)
        ids: list[list[str | None]] = [[None] * width for _ in found]
        for row, candidates in enumerate(found):
            distances[row, : len(candidates)] = [one.distance for one in candidates]
            ids[row][: len(candidates)] = [one.id for one in candidates]
        return distances, ids

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        session = self._open
        return cosines(session.embedder.embed_query(query), session.table.vectors(looked_up(ids)))

    def delete_batch(self, ids: Iterable[str], *, unchanged_since: int | None = None) -> int:
        del unchanged_since
        wanted = [checked_id(unit_id, f"ids[{i}]") for i, unit_id in enumerate(listed("ids", ids))]
        return self._open.drop(list(dict.fromkeys(wanted)))

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        return self._open.table.units(looked_up(ids))

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        return self._open.table.vectors(looked_up(ids))

    def units(
        self,
        filters: Filters | None = None,
        *,
        order_by: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        as_of: Moment = None,
    ) -> Listing:
        """Read units one by one. With ``order_by`` or ``after`` every one that matches is read.

        Args:
            filters: As for ``VectorStore.units``, as the others.
            order_by: See ``filters``.
            limit: See ``filters``.
            after: See ``filters``.
            as_of: Refused, as for :meth:`retrieve`.

        Returns:
            An iterator over the units, with the attribute ``cursor``.

        Raises:
            ConfigurationError: ``as_of`` was given.
            InvalidFilterError: ``filters`` is malformed.
            InvalidQueryError: ``order_by``, ``limit`` or ``after`` cannot be used.
        """
        self._refuse(as_of=as_of)
        parsed, session = parse(filters, self.config.filter_unicode), self._open
        expression = filter_expression(parsed)

        def read() -> Iterator[MemoryUnit]:
            found = (unit_of(row["body"]) for row in session.table.in_order(["body"], expression))
            return (unit for unit in found if matches(parsed, unit)) if parsed.root.parts else found

        return listing_of(read, order_by, limit, after)

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        rows = self._open.table.in_order(["body", "vector"], page=whole_number("page_size", page_size))
        return ((unit_of(row["body"]), vector_of(row["vector"])) for row in rows)

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        most = whole_number("count", count, least=0)
        ids = [str(row["id"]) for row in self._open.table.in_order([])]
        spread = np.linspace(0, len(ids), min(most, len(ids)), endpoint=False).astype(int)
        return self.vectors_of([ids[at] for at in np.unique(spread).tolist()] if ids else [])

    def inventory(self) -> Inventory:
        rows = [(str(row["id"]), str(row["kind"])) for row in self._open.table.in_order(["kind"])]
        types = Counter(kind or "unknown" for _, kind in rows)
        newest = [unit_id for unit_id, _ in rows[-_MEASURED:]]
        bodies = self._open.table.get([*[unit_id for unit_id, _ in rows[:1]], *newest], ["body"])
        sizes = [len(row["body"].encode()) for row in bodies.values()]
        stamps = [_created(bodies.get(unit_id)) for unit_id in (rows[0][0], rows[-1][0])] if rows else [None, None]
        width = 4 * self._open.info.dim + (float(np.mean(sizes)) if sizes else 0.0)
        return {
            "count": len(rows),
            "bytes": int(len(rows) * width),
            "types": dict(types),
            "oldest": stamps[0],
            "newest": stamps[1],
        }

    # Inside

    @property
    def _open(self) -> MilvusSession:
        if self._session is None:
            raise StoreClosedError(f"the store {self._place.address} is closed; open a new MilvusStore")
        return self._session

    def _stamped(self, units: list[MemoryUnit]) -> list[MemoryUnit]:
        """The units with ``metadata.created_at``: their own, else that of the unit which they replace, else now."""
        unstamped = [unit["id"] for unit in units if "created_at" not in (unit.get("metadata") or {})]
        held = {unit_id: _created(row) for unit_id, row in self._open.table.get(unstamped, ["body"]).items()}
        return [self._add_metadata(with_created_at(unit, held.get(unit["id"]))) for unit in units]

    def _described(self, state: Mapping[str, Json]) -> VectorStore | MilvusStore | None:
        """Open the store of ``save_state``; None when it is this one, or none is described."""
        if state.get("milvus") not in (None, self._place.address):
            place = MilvusConfig.at(str(state["milvus"]))
            return MilvusStore(None, storage_config=self.config, milvus_config=place)
        if state.get("index_file") is not None:
            return VectorStore(state["index_file"], None, storage_config=self.config)
        return None

    def _find_text(
        self, query: str, top_k: int, filters: Filters | None, recall: float | None, *, with_units: bool
    ) -> list[Candidate]:
        wanted = check_arguments(top_k, recall, query)
        vector = self._open.embedder.embed_query(query)
        return self._find(vector[None, :], wanted, filters, recall, with_units=with_units)[0]

    def _find(
        self,
        vectors: FloatArray,
        top_k: int,
        filters: Filters | None,
        recall: float | None,
        *,
        with_units: bool,
    ) -> list[list[Candidate]]:
        session, started = self._open, time.perf_counter()
        parsed = parse(filters, self.config.filter_unicode)
        found = session.search.nearest(vectors, top_k, parsed, recall, with_units)
        session.latency.record(time.perf_counter() - started)
        return found
