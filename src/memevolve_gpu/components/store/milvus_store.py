"""``MilvusStore``: the same memory on a Milvus server, for those who outgrow one machine.

This module translates the public API to rows of a collection; see docs/how-to/milvus.md for what Milvus cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from ...errors import StoreClosedError
from ...types import MemoryUnit, Metric
from ...utils.config import StorageConfig
from ...utils.embeddings import EmbeddingFunction
from ...utils.milvus_config import MilvusConfig
from .base import MetadataMixin, StorageBackend
from .milvus.core import Core, Progress, open_core
from .milvus.door import Client, Door
from .milvus.doors import Doors, UnitsById
from .milvus.finding import Finding
from .milvus.report import health_report, registered, statistics_report
from .milvus.rows import unit_of, vector_of
from .milvus.schema import describe
from .units import checked_id, checked_unit, is_id, one_id, unit_to_text
from .vector_store import VectorStore

__all__ = ["MilvusIndexFace", "MilvusStore"]

_Store = TypeVar("_Store", bound="MilvusStore")


class MilvusIndexFace:
    """What the server's index holds now."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def ntotal(self) -> int:
        """Vectors that a search compares or has indexed."""
        return self._core.table.count()

    @property
    def nlist(self) -> int:
        """Lists of each full segment; 0 where none are used."""
        return self._core.plan.nlist

    @property
    def is_trained(self) -> bool:
        """Never False: what is not indexed yet is searched without."""
        return True

    @property
    def is_building(self) -> bool:
        """Do rows wait for the server to index them?"""
        return self._core.unsettled() > 0

    @property
    def kind(self) -> str:
        """The server's name for it, such as IVF_FLAT."""
        return self._core.plan.index


class MilvusStore(Finding, Doors, StorageBackend, MetadataMixin):
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
        self._core: Core | None = open_core(place, embedding_function, embedding_dim, self.config, client)

    @staticmethod
    def exists_at(milvus_config: Any = None, client: Callable[[float], Client] | None = None) -> bool:
        """Is there a store of this name on the server?"""
        door = Door(MilvusConfig.adopt(milvus_config), client)
        try:
            return describe(door) is not None
        finally:
            door.close()

    @staticmethod
    def model_at(milvus_config: Any = None, client: Callable[[float], Client] | None = None) -> str | None:
        """The embedding model that filled the store; None when there is no store, or the model has no name."""
        door = Door(MilvusConfig.adopt(milvus_config), client)
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
    def index(self) -> MilvusIndexFace:
        """What the index holds: ``ntotal``, ``nlist``, ``is_trained``, ``kind``."""
        return MilvusIndexFace(self._open)

    # Writing

    def store(self, unit: MemoryUnit) -> str:
        """Keep a unit and return its id: the unit's own, or a fresh ``unit_<n>``. An existing id is replaced.

        When this returns the server has it in its log, and the next search of this store finds it. The given dict is
        not changed; the stored unit has ``metadata.created_at``. Raises as ``VectorStore.store`` does, and
        StoreUnavailableError: then it may or may not be stored, and storing it again under its id is safe.
        """
        core = self._open
        checked = self._add_metadata(checked_unit(unit))
        vector = core.embed(unit_to_text(checked))
        core.check_room([checked.get("id")])
        unit_id = checked.get("id") or core.table.clock.next_id()
        core.put([{**checked, "id": unit_id}], vector[None, :], core.table.clock.births(1))
        return unit_id

    def store_batch(
        self, units: Sequence[MemoryUnit], embeddings: Any = None, progress: Progress | None = None
    ) -> list[str]:
        """Keep several units and return their ids in order. Not one transaction: see docs/how-to/milvus.md.

        Everything is checked and embedded before the first row is written; an error of the server's later than that
        leaves the rows before it stored. Where an id occurs twice the later unit stays. Raises as ``store`` does.
        """
        core = self._open
        checked = [self._add_metadata(checked_unit(unit, f"units[{i}]")) for i, unit in enumerate(units)]
        if not checked:
            return []
        vectors = core.vectors_for([unit_to_text(unit) for unit in checked], embeddings, progress)
        core.check_room([unit.get("id") for unit in checked])
        ids = [unit.get("id") or core.table.clock.next_id() for unit in checked]
        last = list({unit_id: at for at, unit_id in enumerate(ids)}.values())
        named = [{**checked[at], "id": ids[at]} for at in last]
        core.put(named, vectors[last], core.table.clock.births(len(last)))
        return ids

    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        """Replace the unit of that id; False when there is none. ``created_at`` stays, ``updated_at`` is set.

        A text that stays the same is not embedded again. Between reading and writing another writer's change to the
        same unit may be lost: Milvus has no transactions.
        """
        core = self._open
        unit_id = checked_id(unit_id)
        checked = checked_unit(_with_id(unit, unit_id))
        held = core.table.get([unit_id], ["body", "vector", "born"]).get(unit_id)
        if held is None:
            return False
        old = unit_of(held["body"])
        stamped = self._restamped(checked, old)
        if unit_to_text(checked) == unit_to_text(old):
            vector, born = vector_of(held["vector"]), range(int(held["born"]), int(held["born"]) + 1)
        else:
            vector, born = core.embed(unit_to_text(checked)), core.table.clock.births(1)
        core.put([stamped], vector[None, :], born)
        return True

    def delete(self, unit_id: str) -> bool:
        """Delete a unit; False when there is none."""
        core = self._open
        return bool(core.drop([unit_id])) if one_id(unit_id, "delete_batch") else False

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
        core, self._core = self._core, None
        if core is not None:
            core.table.close()

    def __enter__(self: _Store) -> _Store:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self._core is None else ""
        return f"<MilvusStore {self._place.address}{closed}>"

    # Inside

    @property
    def _open(self) -> Core:
        if self._core is None:
            raise StoreClosedError(f"the store {self._place.address} is closed; open a new MilvusStore")
        return self._core

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
        created = (old.get("metadata") or {}).get("created_at")
        metadata.setdefault("created_at", created if created is not None else self._generate_timestamp())
        return {**unit, "metadata": {**metadata, "updated_at": self._generate_timestamp()}}


def _with_id(unit: Any, unit_id: str) -> Any:
    return {**unit, "id": unit_id} if isinstance(unit, dict) else unit
