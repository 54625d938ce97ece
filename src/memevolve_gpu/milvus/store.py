"""``MilvusStore``: the same memory on a Milvus server, for data beyond one machine.

This module translates the public API to rows of a collection; see docs/how-to/milvus.md for what Milvus cannot do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from ..components.store.base import MetadataMixin, StorageBackend
from ..components.store.session import score_of
from ..components.store.units import checked_id, checked_unit, is_id, one_id, text_to_embed, texts_of, unit_to_text
from ..components.store.vector_store import VectorStore, check_arguments, check_width
from ..errors import StoreClosedError
from ..records.filters import matches
from ..types import FloatArray, Hit, MemoryUnit, Metric
from ..utils.arguments import whole_number
from ..utils.config import MilvusConfig, StorageConfig
from ..utils.embeddings import EmbeddingFunction
from ..utils.plain import plain_text
from ..utils.vectors import check_vectors, cosines
from .client import Client, MilvusClient
from .collection import describe, unit_of, vector_of
from .filters import filter_expression
from .search import Candidate
from .session import MilvusSession, Progress, health_report, open_session, registered, statistics_report

__all__ = ["MilvusIndexInfo", "MilvusStore"]

_MEASURED = 256
"""Units whose length is taken for that of all."""


class UnitsById(Mapping[str, MemoryUnit]):
    """id -> unit, read from the server at each access."""

    def __init__(self, session: MilvusSession) -> None:
        self._session = session

    def __getitem__(self, unit_id: str) -> MemoryUnit:
        found = self._session.table.units([unit_id]) if is_id(unit_id) else {}
        if unit_id not in found:
            raise KeyError(unit_id)
        return found[unit_id]

    def __contains__(self, unit_id: object) -> bool:
        return is_id(unit_id) and bool(self._session.table.get([unit_id], []))

    def __iter__(self) -> Iterator[str]:
        return (str(row["id"]) for row in self._session.table.in_order([]))

    def __len__(self) -> int:
        return self._session.table.count()

    def __repr__(self) -> str:
        return f"<{len(self)} memory units>"


def _created(row: Mapping[str, Any] | None) -> str | None:
    metadata = unit_of(row["body"]).get("metadata") if row else None
    created = metadata.get("created_at") if isinstance(metadata, dict) else None
    return created if isinstance(created, str) else None


def _looked_up(ids: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(plain_text(unit_id) for unit_id in ids if is_id(unit_id)))


_Store = TypeVar("_Store", bound="MilvusStore")


class MilvusIndexInfo:
    """What the server's index holds now."""

    def __init__(self, session: MilvusSession) -> None:
        self._session = session

    @property
    def ntotal(self) -> int:
        """Vectors that a search compares or has indexed."""
        return self._session.table.count()

    @property
    def nlist(self) -> int:
        """Lists of each full segment; 0 where none are used."""
        return self._session.plan.nlist

    @property
    def is_trained(self) -> bool:
        """Never False: what is not indexed yet is searched without."""
        return True

    @property
    def is_building(self) -> bool:
        """Do rows wait for the server to index them?"""
        return self._session.unsettled() > 0

    @property
    def kind(self) -> str:
        """The server's name for it, such as IVF_FLAT."""
        return self._session.plan.index


class MilvusStore(StorageBackend, MetadataMixin):
    """Keeps memory units in a collection of a Milvus server. ``docs/how-to/milvus.md``: guarantees and differences.

    Safe to use from several threads, by several writers on one collection, and after ``os.fork``.
    """

    def __init__(
        self,
        embedding_function: EmbeddingFunction | None,
        embedding_dim: int | None = None,
        storage_config: Any = None,
        milvus_config: Any = None,
        client: Callable[[float], Client] | None = None,
    ) -> None:
        """Open the collection that ``milvus_config`` names, or make it.

        embedding_function, embedding_dim and storage_config as for ``VectorStore``; milvus_config: a MilvusConfig or
        a mapping (None: MEMEVOLVE_MILVUS_* of environment and ``.env``). client: makes the connection when it is
        called with the seconds that it may take; None takes pymilvus.

        Raises: ConfigurationError without pymilvus, or when the server is too old or does not let us in;
        StoreUnavailableError when it does not answer in time; NotAStoreError for a collection of another kind;
        DimensionMismatchError or ModelMismatchError when the function does not fit the collection.
        """
        self.config = StorageConfig.adopt(storage_config)
        self.embedding_function = embedding_function
        place = MilvusConfig.adopt(milvus_config)
        self._place = place
        self._session: MilvusSession | None = open_session(
            place, embedding_function, embedding_dim, self.config, client
        )

    @staticmethod
    def exists_at(milvus_config: Any = None, client: Callable[[float], Client] | None = None) -> bool:
        """Is there a store of this name on the server?"""
        door = MilvusClient(MilvusConfig.adopt(milvus_config), client)
        try:
            return describe(door) is not None
        finally:
            door.close()

    @staticmethod
    def model_at(milvus_config: Any = None, client: Callable[[float], Client] | None = None) -> str | None:
        """The embedding model that filled the store; None when there is no store, or the model has no name."""
        door = MilvusClient(MilvusConfig.adopt(milvus_config), client)
        try:
            facts = describe(door)
        finally:
            door.close()
        return None if facts is None else facts.model

    # The shape of the store

    @property
    def embedding_dim(self) -> int:
        """Length of every vector."""
        return self._open.facts.dim

    @property
    def index_type(self) -> str:
        return self.config.index_type

    @property
    def metric(self) -> Metric:
        """l2, cosine or ip."""
        return self._open.facts.metric

    @property
    def model_name(self) -> str | None:
        """The embedding model that the collection was made with, if it had a name."""
        return self._open.facts.model

    @property
    def data(self) -> UnitsById:
        """A read-only mapping of id to unit, read from the server at each access."""
        return UnitsById(self._open)

    @property
    def index(self) -> MilvusIndexInfo:
        """What the index holds: ``ntotal``, ``nlist``, ``is_trained``, ``kind``."""
        return MilvusIndexInfo(self._open)

    # Writing

    def store(self, unit: MemoryUnit) -> str:
        """Keep a unit and return its id: the unit's own, or a fresh ``unit_<n>``. An existing id is replaced.

        When this returns the server has it in its log, and the next search of this store finds it. The given dict is
        not changed; the stored unit has ``metadata.created_at``. Raises as ``VectorStore.store`` does, and
        StoreUnavailableError: then it may or may not be stored, and storing it again under its id is safe.
        """
        session = self._open
        checked = self._add_metadata(checked_unit(unit))
        vector = session.embed(text_to_embed(checked))
        session.check_room([checked.get("id")])
        unit_id = checked.get("id") or session.table.clock.next_id()
        session.put([{**checked, "id": unit_id}], vector[None, :], session.table.clock.next_timestamps(1))
        return unit_id

    def store_batch(
        self, units: Sequence[MemoryUnit], embeddings: Any = None, progress: Progress | None = None
    ) -> list[str]:
        """Keep several units and return their ids in order. Not one transaction: see docs/how-to/milvus.md.

        Everything is checked and embedded before the first row is written; an error of the server's later than that
        leaves the rows before it stored. Where an id occurs twice the later unit stays. Raises as ``store`` does.
        """
        session = self._open
        checked = [self._add_metadata(checked_unit(unit, f"units[{i}]")) for i, unit in enumerate(units)]
        if not checked:
            return []
        vectors = session.vectors_for(texts_of(checked, to_embed=embeddings is None), embeddings, progress)
        session.check_room([unit.get("id") for unit in checked])
        ids = [unit.get("id") or session.table.clock.next_id() for unit in checked]
        last = list({unit_id: at for at, unit_id in enumerate(ids)}.values())
        named = [{**checked[at], "id": ids[at]} for at in last]
        session.put(named, vectors[last], session.table.clock.next_timestamps(len(last)))
        return ids

    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        """Replace the unit of that id; False when there is none. ``created_at`` stays, ``updated_at`` is set.

        A text that stays the same is not embedded again. Between reading and writing another writer's change to the
        same unit may be lost: Milvus has no transactions.
        """
        session = self._open
        unit_id = checked_id(unit_id)
        checked = checked_unit(_with_id(unit, unit_id))
        held = session.table.get([unit_id], ["body", "vector", "born"]).get(unit_id)
        if held is None:
            return False
        old = unit_of(held["body"])
        stamped = self._restamped(checked, old)
        if unit_to_text(checked) == unit_to_text(old):
            vector, born = vector_of(held["vector"]), range(int(held["born"]), int(held["born"]) + 1)
        else:
            vector, born = session.embed(text_to_embed(checked)), session.table.clock.next_timestamps(1)
        session.put([stamped], vector[None, :], born)
        return True

    def delete(self, unit_id: str) -> bool:
        """Delete a unit; False when there is none."""
        session = self._open
        return bool(session.drop([unit_id])) if one_id(unit_id, "delete_batch") else False

    def clear(self) -> None:
        """Delete every unit."""
        self._open.clear()

    # Reading

    def retrieve(self, unit_id: str) -> MemoryUnit | None:
        return self._open.table.units([unit_id]).get(unit_id) if one_id(unit_id, "retrieve_batch") else None

    def retrieve_all(self) -> list[MemoryUnit]:
        return list(self.units())

    def exists(self, unit_id: str) -> bool:
        return one_id(unit_id, "retrieve_batch") and bool(self._open.table.get([unit_id], []))

    def count(self) -> int:
        return self._open.table.count()

    def get_metadata(self, unit_id: str) -> dict[str, Any] | None:
        unit = self.retrieve(unit_id)
        return None if unit is None else unit.get("metadata")

    def refresh(self) -> None:
        """See, from here on, all that any writer had acknowledged before this call."""
        self._open.table.clock.wrote()

    def __len__(self) -> int:
        return self.count()

    def __iter__(self) -> Iterator[MemoryUnit]:
        return self.units()

    def __contains__(self, unit_id: object) -> bool:
        return is_id(unit_id) and self.exists(unit_id)

    # Upkeep

    def run_maintenance(self, progress: Progress | None = None) -> dict[str, Any]:
        """Have the server seal and index what was written, and wait for it (ten minutes at most)."""
        waited = self._open.settle(progress)
        return {"actions": ["flushed", f"indexed {waited} rows"] if waited else ["flushed"], "reason": ""}

    def retrain(self, progress: Progress | None = None, samples: bool = False) -> dict[str, Any]:
        """As ``run_maintenance``: the server trains an index for each segment when it seals it, on its own vectors."""
        del samples
        return self.run_maintenance(progress)

    def register_management_operation(self, operation_type: str, details: Any) -> dict[str, Any]:
        """Note what management did; details that are not JSON are kept as their repr. Raises InvalidQueryError."""
        return registered(self._open, operation_type, details)

    def get_storage_health(self) -> dict[str, Any]:
        """Fill level, what waits to be indexed, and sentences that an operator can act on."""
        return health_report(self._open)

    def statistics(self) -> dict[str, Any]:
        """Counts, the index and why, what the server says of itself, and recent events."""
        return statistics_report(self._open)

    def save_state(self) -> dict[str, Any]:
        """Where the units are; another instance takes over from there with ``restore_state``. Holds no token."""
        return {"milvus": self._place.address, "count": self.count()}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Copy the units of the store that ``save_state`` described into this one, unless it is that very store."""
        source = self._described(state)
        if source is None:
            return
        with source:
            rows = source.export_rows()
            while page := list(islice(rows, 500)):
                self.store_batch([unit for unit, _ in page], [vector for _, vector in page])

    def close(self) -> None:
        """Give the connection back. Further calls raise StoreClosedError."""
        session, self._session = self._session, None
        if session is not None:
            session.table.close()

    def __enter__(self: _Store) -> _Store:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self._session is None else ""
        return f"<MilvusStore {self._place.address}{closed}>"

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

        Distances, filters and recall as in ``VectorStore.search``. record: this store keeps no access figures. Raises
        InvalidQueryError, InvalidFilterError, EmbeddingError, StoreUnavailableError.
        """
        del record
        found = self._find_text(query, top_k, filters, recall, with_units=False)
        return [(one.distance, one.id) for one in found]

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
        del record
        metric = self._open.facts.metric
        found = self._find_text(query, top_k, filters, recall, with_units=True)
        return [
            Hit(one.unit, one.id, one.distance, score_of(one.distance, metric)) for one in found if one.unit is not None
        ]

    def search_vectors(
        self, queries: Any, top_k: int = 5, filters: Mapping[str, Any] | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        """queries (n, dim) -> distances float32 (n, top_k) and n lists of top_k ids; +inf and None where fewer exist.

        Raises InvalidVectorError, DimensionMismatchError, InvalidQueryError, InvalidFilterError,
        StoreUnavailableError.
        """
        session = self._open
        width = check_arguments(top_k, recall)
        vectors = check_vectors(queries, session.facts.dim, session.facts.metric, name="queries")
        check_width(len(vectors), width)
        found = self._find(vectors, width, filters, recall, with_units=False)
        distances = np.full((len(vectors), width), np.inf, dtype=np.float32)
        ids: list[list[str | None]] = [[None] * width for _ in found]
        for row, candidates in enumerate(found):
            distances[row, : len(candidates)] = [one.distance for one in candidates]
            ids[row][: len(candidates)] = [one.id for one in candidates]
        return distances, ids

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        """The cosine between the text and each of the units that exist, by id, whatever the store's metric.

        Raises EmbeddingError, StoreUnavailableError.
        """
        session = self._open
        return cosines(session.embed_query(query), session.table.vectors(list(dict.fromkeys(ids))))

    def delete_batch(self, ids: Iterable[str]) -> int:
        """Delete several units; how many went. Not one transaction: an error leaves some of them deleted."""
        wanted = [checked_id(unit_id, f"ids[{i}]") for i, unit_id in enumerate(ids)]
        return self._open.drop(list(dict.fromkeys(wanted)))

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """The units that exist, by id, in the order of ``ids``."""
        return self._open.table.units(_looked_up(ids))

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """The vectors, as they were given, of the units that exist: float32 (dim,) by id, in the order of ``ids``."""
        return self._open.table.vectors(_looked_up(ids))

    def units(self, filters: Mapping[str, Any] | None = None) -> Iterator[MemoryUnit]:
        """Units one by one, oldest first, read in pages. Raises InvalidFilterError at once."""
        expression = filter_expression(filters)
        rows = self._open.table.in_order(["body"], expression)
        found = (unit_of(row["body"]) for row in rows)
        return (unit for unit in found if matches(filters, unit)) if expression else found

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        """(unit, vector as it was given, float32 (dim,)) one by one, oldest first."""
        rows = self._open.table.in_order(["body", "vector"], page=whole_number("page_size", page_size))
        return ((unit_of(row["body"]), vector_of(row["vector"])) for row in rows)

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        """The vectors of at most ``count`` units, spread evenly over their age: float32 (dim,) by id."""
        most = whole_number("count", count, least=0)
        ids = [str(row["id"]) for row in self._open.table.in_order([])]
        spread = np.linspace(0, len(ids), min(most, len(ids)), endpoint=False).astype(int)
        return self.vectors_of([ids[at] for at in np.unique(spread).tolist()] if ids else [])

    def inventory(self) -> dict[str, Any]:
        """What units there are: ``count``; ``bytes``, estimated from the newest units and the vectors; ``types``, type
        to number, those without one under ``unknown``; ``oldest`` and ``newest``, ``created_at`` of the first and the
        last unit in the order of writing.
        """
        rows = [(str(row["id"]), str(row["kind"])) for row in self._open.table.in_order(["kind"])]
        types = Counter(kind or "unknown" for _, kind in rows)
        newest = [unit_id for unit_id, _ in rows[-_MEASURED:]]
        bodies = self._open.table.get([*[unit_id for unit_id, _ in rows[:1]], *newest], ["body"])
        sizes = [len(row["body"].encode()) for row in bodies.values()]
        stamps = [_created(bodies.get(unit_id)) for unit_id in (rows[0][0], rows[-1][0])] if rows else [None, None]
        width = 4 * self._open.facts.dim + (float(np.mean(sizes)) if sizes else 0.0)
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

    def _unit_to_text(self, unit: Mapping[str, Any]) -> str:
        """The text that is embedded: content, then reasoning, query, tags and type."""
        return unit_to_text(unit)

    def _described(self, state: Mapping[str, Any]) -> VectorStore | MilvusStore | None:
        """The store of ``save_state``, opened; None when it is this one, or none is described."""
        if state.get("milvus") not in (None, self._place.address):
            place = MilvusConfig.at(str(state["milvus"]))
            return MilvusStore(None, storage_config=self.config, milvus_config=place)
        if state.get("index_file") is not None:
            return VectorStore(state["index_file"], None, storage_config=self.config)
        return None

    def _restamped(self, unit: MemoryUnit, old: MemoryUnit) -> MemoryUnit:
        metadata = dict(unit.get("metadata") or {})
        held = old.get("metadata")
        created = held.get("created_at") if isinstance(held, dict) else None
        metadata.setdefault("created_at", created if created is not None else self._generate_timestamp())
        return {**unit, "metadata": {**metadata, "updated_at": self._generate_timestamp()}}

    def _find_text(
        self, query: str, top_k: int, filters: Mapping[str, Any] | None, recall: float | None, *, with_units: bool
    ) -> list[Candidate]:
        wanted = check_arguments(top_k, recall, query)
        vector = self._open.embed_query(query)
        return self._find(vector[None, :], wanted, filters, recall, with_units=with_units)[0]

    def _find(
        self,
        vectors: FloatArray,
        top_k: int,
        filters: Mapping[str, Any] | None,
        recall: float | None,
        *,
        with_units: bool,
    ) -> list[list[Candidate]]:
        session, started = self._open, time.perf_counter()
        found = session.search.nearest(vectors, top_k, filters, recall, with_units)
        session.latency.record(time.perf_counter() - started)
        return found


def _with_id(unit: Any, unit_id: str) -> Any:
    return {**unit, "id": unit_id} if isinstance(unit, dict) else unit
