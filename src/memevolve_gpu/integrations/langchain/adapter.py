"""Convert between LangChain's arguments and documents and a backend's units and searches.

A document is stored as ``{"id", "content", "metadata", "langchain"}``. The store adds time stamps to the metadata;
``langchain`` lists those that the document had itself, so that reading returns the document as it was given. The text
that a store embeds is the content alone, so that a change of the metadata costs no embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

from langchain_core.documents import Document

from ...components.store.base import StorageBackend
from ...components.store.foreign import as_backend
from ...components.store.units import checked_unit, unit_to_text
from ...errors import ConfigurationError, InvalidQueryError, InvalidUnitError
from ...types import FloatArray, Json, JsonObject, MemoryUnit, Vectors
from ...utils.arguments import listed, mapping, shown, whole_number
from ..documents import STAMPS
from .filters import on_units


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """The options of one search, checked. ``fetch_k`` is at least ``k``."""

    k: int
    fetch_k: int
    filters: JsonObject
    recall: float | None

    @classmethod
    def of(cls, k: int, options: JsonObject, fetch_k: int | None = None) -> SearchOptions:
        """Check the arguments of a search. Raises InvalidQueryError, InvalidFilterError."""
        rest = dict(options)
        filters = on_units(rest.pop("filter", None), rest.pop("filters", None))
        recall = rest.pop("recall", None)
        no_more(rest)
        wanted = whole_number("k", k)
        return cls(
            wanted, wanted if fetch_k is None else max(wanted, whole_number("fetch_k", fetch_k)), filters, recall
        )


def documents_of(texts: Iterable[str], metadatas: Sequence[JsonObject] | None) -> list[Document]:
    """Return one document per text. Raises InvalidUnitError when the lengths differ."""
    given = listed("texts", texts, InvalidUnitError)
    notes = _notes(metadatas) or [{}] * len(given)
    if len(notes) != len(given):
        raise InvalidUnitError(f"metadatas has {len(notes)} entries for {len(given)} texts; pass one for each")
    for text in given:
        if not isinstance(text, str):
            raise InvalidUnitError(f"a text must be a string, got {shown(text)}")
    return [Document(page_content=text, metadata=one) for text, one in zip(given, notes, strict=True)]


def _notes(metadatas: Json) -> list[JsonObject]:
    """One dict for each text, or none at all. Raises InvalidUnitError."""
    given = [] if metadatas is None else listed("metadatas", metadatas, InvalidUnitError)
    notes = [
        dict(mapping(f"metadatas[{i}]", {} if one is None else one, InvalidUnitError)) for i, one in enumerate(given)
    ]
    for i, one in enumerate(notes):
        if not all(isinstance(key, str) for key in one):
            raise InvalidUnitError(f"metadatas[{i}] must have keys that are texts, got {shown(one)}")
    return notes


def pairs_of(
    text_embeddings: Iterable[tuple[str, Sequence[float]]] | None,
    embeddings: Iterable[Sequence[float]] | None,
    metadatas: Sequence[JsonObject] | None,
) -> list[tuple[str, Sequence[float]]]:
    """Return (text, vector) pairs; for vectors alone the texts are ``data`` of the metadata, or empty."""
    if embeddings is None:
        pairs = [] if text_embeddings is None else listed("text_embeddings", text_embeddings, InvalidUnitError)
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise InvalidUnitError(f"text_embeddings must be pairs of text and vector, got {shown(pair)}")
        return [(text, vector) for text, vector in pairs]
    if text_embeddings is not None:
        raise InvalidUnitError("text_embeddings and embeddings exclude each other; give one of them")
    vectors = listed("embeddings", embeddings, InvalidUnitError)
    texts = [str(one.get("data") or "") for one in _notes(metadatas) or [{}] * len(vectors)]
    if len(texts) != len(vectors):
        raise InvalidUnitError(f"metadatas has {len(texts)} entries for {len(vectors)} vectors; pass one for each")
    return list(zip(texts, vectors, strict=True))


def batches(texts: list[str], batch_size: int | None) -> list[list[str]]:
    """Split the texts into lists of at most ``batch_size``; into one list if it is None."""
    size = len(texts) if batch_size is None else whole_number("batch_size", batch_size)
    return [texts[start : start + size] for start in range(0, len(texts), size or 1)]


def query_text(query: str) -> str:
    """Return the query if it is a string."""
    if not isinstance(query, str):
        raise InvalidQueryError(f"query must be a string, got {type(query).__name__}; see similarity_search_by_vector")
    return query


def no_more(options: Mapping[str, object]) -> None:
    """Refuse unknown options."""
    if options:
        unknown = ", ".join(map(repr, options))
        raise InvalidQueryError(
            f"unknown option {unknown}; leave it out, or see "
            "https://memevolve-gpu.example/docs/how-to/langchain/ for the options"
        )


MARK = "langchain"
_OF_A_DOCUMENT = {"id", "content", "metadata", MARK}


def to_units(documents: Sequence[Document], ids: Sequence[str | None] | None = None) -> list[MemoryUnit]:
    """Return one valid unit per document; its id is that of ``ids``, else the document's, else a new UUID.

    The documents are not changed. Raises InvalidUnitError, naming the invalid document.
    """
    documents = listed("documents", documents, InvalidUnitError)
    given = [None] * len(documents) if ids is None else listed("ids", ids, InvalidUnitError)
    if len(given) != len(documents):
        raise InvalidUnitError(
            f"ids has {len(given)} entries for {len(documents)} documents; pass one, or None, for each"
        )
    return [
        _checked(_unit(document, own), f"documents[{position}]")
        for position, (document, own) in enumerate(zip(documents, given, strict=True))
    ]


def to_document(unit: MemoryUnit) -> Document:
    """Return the document that a unit was made from.

    For a unit that was not made from a document, the metadata also has its time stamps and its other fields (``type``,
    ``tags``, ...), except those whose name the metadata has already.
    """
    content = unit.get("content")
    text = content if isinstance(content, str) else unit_to_text(unit)
    return Document(id=unit["id"], page_content=text, metadata=_metadata(unit))


def to_documents(units: Sequence[MemoryUnit]) -> list[Document]:
    """Return one document per unit, in order."""
    return [to_document(unit) for unit in units]


def _unit(document: Document, own_id: str | None) -> MemoryUnit:
    if not isinstance(document, Document):
        raise InvalidUnitError(f"documents must be LangChain's Documents, got {shown(document)}; see add_texts")
    metadata = document.metadata
    unit_id = own_id if own_id is not None else document.id
    return {
        "id": str(uuid4()) if unit_id is None else unit_id,
        "content": document.page_content,
        "metadata": metadata,
        MARK: [stamp for stamp in STAMPS if stamp in metadata],
    }


def _checked(unit: MemoryUnit, where: str) -> MemoryUnit:
    try:
        return checked_unit(unit, where)
    except RecursionError:
        raise InvalidUnitError(f"{where} is nested too deeply or contains itself; flatten its metadata") from None


def _metadata(unit: MemoryUnit) -> JsonObject:
    metadata: JsonObject = unit.get("metadata") or {}
    own = unit.get(MARK)
    if isinstance(own, list):
        return {key: value for key, value in metadata.items() if key not in STAMPS or key in own}
    rest = {key: value for key, value in unit.items() if key not in _OF_A_DOCUMENT}
    return {**rest, **metadata}


ATTEMPTS = 3
"""Most searches when the store changes between finding documents and reading them."""

_Read = TypeVar("_Read")


def searchable(backend: Any) -> StorageBackend:
    """The backend, once it is known to search by vector. Raises ConfigurationError."""
    adapted = as_backend(backend) if hasattr(backend, "retrieve") else None
    if adapted is None or "search_vectors" not in adapted.capabilities:
        raise ConfigurationError(
            f"backend must be able to search by vector, which {type(backend).__name__} is not; "
            "give a VectorStore, or call open(path prefix, embedding)"
        )
    return adapted


def keep(backend: StorageBackend, units: Sequence[MemoryUnit], vectors: Vectors) -> list[str]:
    """Store units with their vectors (n, dim), and return their ids."""
    return list(backend.store_batch(list(units), vectors)) if units else []  # type: ignore[call-arg]


def nearest(backend: StorageBackend, vector: Vectors, options: SearchOptions) -> list[tuple[MemoryUnit, float]]:
    """At most ``options.k`` units that match, with their distances, nearest first."""

    def read() -> tuple[list[tuple[MemoryUnit, float]], bool]:
        near = _near(backend, vector, options.k, options)
        units = backend.retrieve_batch([unit_id for unit_id, _ in near])
        found = [(units[unit_id], distance) for unit_id, distance in near if unit_id in units]
        return found, len(found) == len(near)

    return _undisturbed(backend, read)


def nearest_vectors(
    backend: StorageBackend, vector: Vectors, options: SearchOptions
) -> list[tuple[MemoryUnit, FloatArray]]:
    """At most ``options.fetch_k`` units that match, with their vectors, nearest first."""

    def read() -> tuple[list[tuple[MemoryUnit, FloatArray]], bool]:
        ids = [unit_id for unit_id, _ in _near(backend, vector, options.fetch_k, options)]
        units, vectors = backend.retrieve_batch(ids), backend.vectors_of(ids)
        found = [(units[unit_id], vectors[unit_id]) for unit_id in ids if unit_id in units and unit_id in vectors]
        return found, len(found) == len(ids)

    return _undisturbed(backend, read)


def _near(backend: StorageBackend, vector: Vectors, k: int, options: SearchOptions) -> list[tuple[str, float]]:
    """Return (id, distance) of the k nearest that match."""
    k = min(k, max(1, backend.count()))
    distances, ids = backend.search_vectors([vector], k, options.filters, options.recall)
    pairs = zip(ids[0], distances[0].tolist(), strict=True)
    return [(unit_id, distance) for unit_id, distance in pairs if unit_id is not None]


def _undisturbed(backend: StorageBackend, read: Callable[[], tuple[list[_Read], bool]]) -> list[_Read]:
    """Read again if the store changes meanwhile, so that documents and distances belong together.

    Returns the result of the last attempt, without the units that it could not find.
    """
    found: list[_Read] = []
    for _ in range(ATTEMPTS):
        before = backend.change_number
        found, complete = read()
        if complete and backend.change_number == before:
            break
    return found
