"""mem0: a provider for its vector store, chosen by mem0's configuration. Needs ``mem0ai``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..types import Filters, Json, JsonObject

try:
    from mem0.utils.factory import VectorStoreFactory
    from mem0.vector_stores.base import VectorStoreBase
    from mem0.vector_stores.configs import VectorStoreConfig
except ImportError as error:
    raise ImportError(
        f"memevolve_gpu.integrations.mem0 needs mem0ai ({error}); pip install 'memevolve-gpu[mem0]'"
    ) from error

from ..components.store import VectorStore
from ..components.store.ranking import score_of
from ..errors import ConfigurationError, InvalidFilterError, InvalidUnitError, InvalidVectorError
from ..types import MemoryUnit
from ..utils.arguments import listed, mapping, path_text, shown, whole_number
from .documents import LazyStore, metadata_path, moment, nearest, own_metadata, stamps_in

__all__ = ["Found", "MemEvolveConfig", "MemEvolveVectorStore", "register"]

MARK = "mem0"
PROVIDER = "memevolve"

_RANGES = ("gt", "gte", "lt", "lte")
_AS_THEY_ARE = ("eq", "ne", "in", "nin", "contains")


class MemEvolveConfig(BaseModel):
    """The ``config`` of the provider ``memevolve``."""

    model_config = ConfigDict(extra="forbid")

    folder: str
    """Where the files of the collections are."""
    collection_name: str = "mem0"
    embedding_model_dims: int = 1536
    metric: str = "cosine"
    storage_config: JsonObject | None = None
    """Settings, as for ``VectorStore``."""


def register() -> None:
    """Make the provider ``memevolve`` known to mem0. Call it before ``Memory.from_config``; again does nothing.

    Raises:
        ConfigurationError: This version of mem0 keeps its providers elsewhere.

    Examples:
        >>> from memevolve_gpu.integrations.mem0 import register  # doctest: +SKIP
        >>> register()  # doctest: +SKIP
    """
    known = getattr(VectorStoreConfig, "__private_attributes__", {}).get("_provider_configs")
    if known is None or not hasattr(VectorStoreFactory, "provider_to_class"):
        raise ConfigurationError("this version of mem0 has no table of providers; install mem0ai 2.2")
    known.default[PROVIDER] = MemEvolveConfig.__name__
    sys.modules[f"mem0.configs.vector_stores.{PROVIDER}"] = sys.modules[__name__]  # where mem0 looks for it
    VectorStoreFactory.provider_to_class[PROVIDER] = f"{__name__}.{MemEvolveVectorStore.__name__}"


@dataclass(frozen=True, slots=True)
class Found:
    """One memory as mem0 reads it."""

    id: str
    score: float | None
    payload: JsonObject


def _filters(given: Mapping[str, object] | None) -> JsonObject:
    """mem0's filter on payloads as one of this package."""
    parts: list[JsonObject] = []
    joins: dict[str, Callable[[list[JsonObject]], JsonObject]] = {
        "AND": lambda inner: {"and": inner},
        "OR": lambda inner: {"or": inner},
        "NOT": lambda inner: {"nor": inner},
    }
    for key, value in ({} if given is None else mapping("filters", given, InvalidFilterError)).items():
        if not isinstance(key, str):
            raise InvalidFilterError(f"filters: a key must be a text, got {shown(key)}")
        name = key.removeprefix("$").upper() if key.startswith("$") else key
        if name not in joins:
            parts += _conditions(key, value)
            continue
        inner = value if isinstance(value, list) else [value]
        if not all(isinstance(one, Mapping) for one in inner):
            raise InvalidFilterError(f"filters[{key!r}] must be a list of filters, got {shown(value)}")
        parts.append(joins[name]([_filters(one) for one in inner]))
    return {"and": parts}


def _conditions(key: str, value: Json) -> list[JsonObject]:
    where = "content" if key == "data" else metadata_path(MARK, key)
    if isinstance(value, str) and value == "*":
        return [{where: {"is_null": False}}]
    if not isinstance(value, Mapping):
        return [{where: {"in": value} if isinstance(value, list) else {"eq": value}}]
    return [{where: _operator(key, operator, operand)} for operator, operand in value.items()]


def _operator(key: str, operator: str, operand: Json) -> JsonObject:
    if operator in _RANGES:
        date = moment(operand)
        return {operator: operand if date is None else date}
    if operator == "icontains":
        text = str(operand).replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        return {"ilike": f"%{text}%"}
    if operator not in _AS_THEY_ARE:
        known = ", ".join([*_AS_THEY_ARE, "icontains", *_RANGES])
        raise InvalidFilterError(f"filters[{key!r}]: unknown operator {operator!r}; mem0 has {known}")
    return {operator: operand}


def _id(given: Json) -> Json:
    """The id as a text where it is a UUID or a number; the store checks it."""
    return str(given) if isinstance(given, UUID) or (type(given) is int and abs(given) < 2**63) else given


def _unit(unit_id: str, payload: Mapping[str, object]) -> MemoryUnit:
    mapping("payload", payload, InvalidUnitError)
    rest = {key: value for key, value in payload.items() if key != "data"}
    text = {"content": payload["data"]} if payload.get("data") is not None else {}
    return {"id": unit_id, **text, "metadata": rest, MARK: {"own": stamps_in(rest)}}


def _found(unit: MemoryUnit, score: float | None = None) -> Found:
    text = {"data": unit["content"]} if "content" in unit else {}
    return Found(unit["id"], score, {**text, **own_metadata(unit, MARK)})


class MemEvolveVectorStore(VectorStoreBase):
    """mem0's memories in :class:`~memevolve_gpu.VectorStore` files, one store for each collection.

    The text of a memory is the unit's ``content``, the rest of its payload the metadata, so that the command line, the
    MCP server and the other integrations read the same memories.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        collection_name: str = "mem0",
        embedding_model_dims: int = 1536,
        metric: str = "cosine",
        storage_config: Mapping[str, object] | None = None,
    ) -> None:
        """Open or create the collection. mem0 calls this with what :class:`MemEvolveConfig` holds."""
        self.folder = Path(path_text("folder", folder)).absolute()
        config = dict(mapping("storage_config", {} if storage_config is None else storage_config, ConfigurationError))
        self.storage_config, self._files = config, LazyStore(self.folder, embedding_model_dims, metric, config)
        self.create_col(collection_name, embedding_model_dims, metric)

    @property
    def store(self) -> VectorStore:
        """The open store."""
        return self._files.get()

    def close(self) -> None:
        """Close the files; the next call opens them again."""
        self._files.close()

    def create_col(self, name: str, vector_size: int, distance: str = "cosine") -> None:
        """Open a collection, or create it, and use it from here on."""
        if Path(path_text("collection_name", name)).name != name:
            raise ConfigurationError(f"collection_name must be the name of a file, got {shown(name)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files.switch(self.folder / name, vector_size, distance)
        self.collection_name = name

    def insert(
        self,
        vectors: Sequence[Sequence[float]],
        payloads: Sequence[Mapping[str, object]] | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Store vectors with their payloads, in one transaction; an id that exists is replaced."""
        vectors = listed("vectors", vectors, InvalidVectorError)
        names = [str(uuid4()) for _ in vectors] if ids is None else [_id(one) for one in listed("ids", ids)]
        held = [{} for _ in vectors] if payloads is None else listed("payloads", payloads, InvalidUnitError)
        if not len(names) == len(held) == len(vectors):
            raise InvalidUnitError(f"{len(vectors)} vectors, {len(held)} payloads and {len(names)} ids do not fit")
        if names:
            self.store.store_batch([_unit(*pair) for pair in zip(names, held, strict=True)], vectors)

    def search(self, query: str, vectors: Sequence[Any], top_k: int = 5, filters: Filters | None = None) -> list[Found]:
        """Return the nearest memories; scores grow with the similarity, within 0..1 under cosine and l2."""
        del query
        rows = listed("vectors", vectors, InvalidVectorError)
        vector = rows[0] if rows and not np.isscalar(rows[0]) else rows
        hits = nearest(self.store, vector, whole_number("top_k", top_k), _filters(filters))
        scored = [(unit, score_of(distance, self.store.metric)) for unit, distance in hits]
        return [_found(unit, score if self.store.metric == "ip" else max(0.0, score)) for unit, score in scored]

    def keyword_search(self, query: str, top_k: int = 5, filters: Filters | None = None) -> list[Found]:
        """Return the memories that share words with the query, by BM25."""
        scores = {unit_id: score for score, unit_id in self.store.search_keywords(query, top_k, _filters(filters))}
        units = self.store.retrieve_batch(list(scores))
        return [_found(unit, scores[unit_id]) for unit_id, unit in units.items()]

    def delete(self, vector_id: str) -> None:
        """Delete a memory if it exists."""
        self.store.delete(_id(vector_id))

    def update(
        self, vector_id: str, vector: Sequence[float] | None = None, payload: Mapping[str, object] | None = None
    ) -> None:
        """Replace the vector, the payload, or both. Raises InvalidUnitError for an unknown id."""
        name = _id(vector_id)
        held = self.store.retrieve(name)
        if held is None:
            raise InvalidUnitError(f"there is no memory with the id {shown(name)}; insert it")
        unit = held if payload is None else _unit(name, payload)
        self.store.store_batch([unit], [self.store.vectors_of([name])[name] if vector is None else vector])

    def get(self, vector_id: str) -> Found | None:
        """Return a memory, or None."""
        unit = self.store.retrieve(_id(vector_id))
        return None if unit is None else _found(unit)

    def list(self, filters: Filters | None = None, top_k: int | None = None) -> Any:
        """Return the memories that match, oldest first, in a list in a list, as mem0 reads it."""
        return [[_found(unit) for unit in self.store.units(_filters(filters), limit=top_k)]]

    def list_cols(self) -> Any:
        """Return the names of the collections."""
        return sorted(file.stem for file in self.folder.glob("*.db"))

    def delete_col(self) -> None:
        """Delete every memory of the collection. Its files stay, for others may have them open."""
        self.store.clear()

    def col_info(self) -> JsonObject:
        """Return the collection's name, count, dimension and metric."""
        store = self.store
        facts = {"count": store.count(), "dimension": store.embedding_dim, "metric": store.metric}
        return {"name": self.collection_name, **facts}

    def reset(self) -> None:
        """As :meth:`delete_col`; the collection can be filled again."""
        self.store.clear()
