"""Haystack: a document store, and retrievers by meaning, by words and by both. Needs ``haystack-ai``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..types import Json, JsonObject

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.document_stores.errors import DuplicateDocumentError
    from haystack.document_stores.types import DuplicatePolicy, FilterPolicy
    from haystack.document_stores.types.filter_policy import apply_filter_policy
    from haystack.errors import FilterError
except ImportError as error:
    raise ImportError(
        f"memevolve_gpu.integrations.haystack needs haystack-ai ({error}); pip install 'memevolve-gpu[haystack]'"
    ) from error

from ..components.retrieve.strategies import Ranked, reciprocal_ranks
from ..components.store import VectorStore
from ..components.store.foreign import with_vectors
from ..components.store.ranking import score_of
from ..errors import ConfigurationError, InvalidFilterError, InvalidQueryError, InvalidUnitError
from ..records.filters import always, parse
from ..types import FloatArray, MemoryUnit
from ..utils.arguments import listed, mapping, optional_text, path_text, shown, whole_number
from ..utils.plain import plain_scalar
from .documents import (
    NOTHING,
    LazyStore,
    in_a_thread,
    metadata_path,
    moment,
    nearest,
    own_metadata,
    path,
    placeholder,
    stamps_in,
)

__all__ = [
    "MemEvolveDocumentStore",
    "MemEvolveEmbeddingRetriever",
    "MemEvolveHybridRetriever",
    "MemEvolveKeywordRetriever",
]

MARK = "haystack"
_EMBEDDED = {f"{MARK}.embedded": True}
_REST = ("blob", "score", "sparse_embedding")
"""Fields of a document that are kept as they are."""

_RANGES = {">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}


def _filters(given: Json) -> JsonObject:
    """Haystack's filter as one of this package. Raises FilterError."""
    if given is None or (isinstance(given, Mapping) and not given):
        return {}
    found = _node(given)
    try:
        parse(found)
    except InvalidFilterError as error:
        raise FilterError(str(error)) from error
    return found


def _node(given: Json) -> JsonObject:
    if not isinstance(given, Mapping):
        raise FilterError(f"a filter must be a dict, got {shown(given)}")
    if "field" in given:
        return _comparison(given)
    _require(given, "operator", "conditions")
    if not isinstance(given["conditions"], list):
        raise FilterError(f"'conditions' must be a list of filters, got {shown(given['conditions'])}")
    parts = [_node(one) for one in given["conditions"]]
    joined: dict[Json, JsonObject] = {"AND": {"and": parts}, "OR": {"or": parts}, "NOT": {"not": {"and": parts}}}
    if given["operator"] not in joined:
        raise FilterError(f"unknown operator {shown(given['operator'])}; the logical operators are AND, OR and NOT")
    return joined[given["operator"]]


def _require(given: Mapping[str, object], *keys: str) -> None:
    for key in keys:
        if key not in given:
            raise FilterError(f"{key!r} is missing in the filter {shown(given)}")


def _comparison(given: Mapping[str, object]) -> JsonObject:
    _require(given, "operator", "value")
    field, operator, value = given["field"], given["operator"], given["value"]
    if field == "embedding":
        return _has_embedding(operator, value)
    where = _path(field)
    if operator in ("==", "!="):
        equal = _one_of(where, [value])
        return equal if operator == "==" else {"not": equal}
    if operator in ("in", "not in"):
        if not isinstance(value, list):
            raise FilterError(f"the operator {operator!r} takes a list, got {shown(value)}")
        found = _one_of(where, value)
        return found if operator == "in" else {"not": found}
    return {where: _range(operator, value)} if value is not None or operator not in _RANGES else NOTHING


def _range(operator: Json, value: Json) -> JsonObject:
    if operator not in _RANGES:
        known = ", ".join(["==", "!=", *_RANGES, "in", "not in"])
        raise FilterError(f"unknown operator {shown(operator)}; the comparisons are {known}")
    date = moment(value)
    bound = plain_scalar(value) if date is None else date
    if date is None and (isinstance(bound, bool) or not isinstance(bound, (int, float))):
        raise FilterError(f"the operator {operator!r} takes a number or an ISO 8601 date, got {shown(value)}")
    return {_RANGES[operator]: bound}


def _has_embedding(operator: Json, value: Json) -> JsonObject:
    if value is not None or operator not in ("==", "!="):
        raise FilterError("documents can be filtered by 'embedding' == None or != None only")
    return {"not": _EMBEDDED} if operator == "==" else dict(_EMBEDDED)


def _path(field: Json) -> str:
    if not isinstance(field, str) or not field:
        raise FilterError(f"'field' must be a text such as 'meta.name', got {shown(field)}")
    keys = field.split(".")
    if keys[0] in ("id", "content"):
        return path(*keys)
    if keys[0] in _REST:
        return path(MARK, *keys)
    return metadata_path(MARK, *(keys[1:] if keys[0] == "meta" and len(keys) > 1 else keys))


def _one_of(where: str, values: Sequence[Json]) -> JsonObject:
    """The field is one of the values; None is a field that is missing, and dates compare as moments."""
    kept = [value for value in values if value is not None]
    dates = [date for date in map(moment, kept) if date is not None]
    some: list[JsonObject] = [{where: {"in": [*kept, *dates]}}] if kept else []
    return {"or": [*some, *([{where: {"is_null": True}}] if len(kept) < len(values) else [])]}


def _unit(document: Any, position: int) -> MemoryUnit:
    if not isinstance(document, Document):
        raise InvalidUnitError(f"documents[{position}] must be a Haystack Document, got {shown(document)}")
    held = document.to_dict(flatten=False)
    note = {key: held[key] for key in _REST if held.get(key) is not None}
    note |= {"embedded": document.embedding is not None, "own": stamps_in(document.meta)}
    content = {} if document.content is None else {"content": document.content}
    return {"id": document.id, **content, "metadata": document.meta, MARK: note}


def _document(unit: MemoryUnit, vector: FloatArray | None, score: float | None = None) -> Document:
    held = unit.get(MARK)
    note = held if isinstance(held, dict) else {"embedded": True}
    fields = {key: note.get(key) for key in _REST}
    return Document.from_dict(
        {
            **fields,
            "id": unit["id"],
            "content": unit.get("content"),
            "meta": own_metadata(unit, MARK),
            "score": fields["score"] if score is None else score,
            "embedding": vector.tolist() if vector is not None and note.get("embedded") else None,
        }
    )


class MemEvolveDocumentStore:
    """A Haystack document store in a :class:`~memevolve_gpu.VectorStore`.

    Filters follow Haystack's grammar; a field that is a list matches when one of its elements does, and dates without
    an offset are UTC. Embeddings are kept as float32. A document without an embedding is found by words and by filters.
    Every method has a form that ends in ``_async``. The files are opened on first use.

    Examples:
        >>> from haystack import Document  # doctest: +SKIP
        >>> store = MemEvolveDocumentStore("memory", embedding_dim=3)  # doctest: +SKIP
        >>> store.write_documents([Document(content="a", embedding=[1.0, 0.0, 0.0])])  # doctest: +SKIP
        1
    """

    def __init__(
        self,
        index_file: str | os.PathLike[str],
        embedding_dim: int = 768,
        metric: str = "cosine",
        storage_config: Mapping[str, object] | None = None,
    ) -> None:
        """Describe the store; nothing is opened yet.

        Args:
            index_file: The path prefix of the store's files.
            embedding_dim: Length of the embeddings.
            metric: cosine, l2 or ip; of a new store.
            storage_config: Settings, as for ``VectorStore``.
        """
        self.index_file, self.metric = path_text("index_file", index_file), metric
        self.embedding_dim = whole_number("embedding_dim", embedding_dim)
        self.storage_config = (
            None if storage_config is None else dict(mapping("storage_config", storage_config, ConfigurationError))
        )
        self._files = LazyStore(self.index_file, self.embedding_dim, metric, self.storage_config)

    @property
    def store(self) -> VectorStore:
        """The open store."""
        return self._files.get()

    def close(self) -> None:
        """Close the files; the next call opens them again."""
        self._files.close()

    def to_dict(self) -> JsonObject:
        """Return the store's description, for a pipeline in YAML."""
        given = {name: getattr(self, name) for name in ("index_file", "embedding_dim", "metric", "storage_config")}
        described: JsonObject = default_to_dict(self, **given)
        return described

    @classmethod
    def from_dict(cls, data: JsonObject) -> MemEvolveDocumentStore:
        """Return the store of a description."""
        made: MemEvolveDocumentStore = default_from_dict(cls, _described(data))
        return made

    def count_documents(self) -> int:
        """Return the number of documents."""
        return self.store.count()

    def count_documents_by_filter(self, filters: JsonObject) -> int:
        """Return the number of documents that match."""
        return self.store.count(_filters(filters))

    def filter_documents(self, filters: JsonObject | None = None) -> list[Document]:
        """Return the documents that match, oldest first. Raises FilterError."""
        return [_document(*row) for row in with_vectors(self.store, self.store.units(_filters(filters)))]

    def write_documents(self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE) -> int:
        """Write documents in one transaction.

        Args:
            documents: The documents.
            policy: What to do where the id exists: FAIL (and NONE) raise, SKIP keeps the old one, OVERWRITE replaces.

        Returns:
            The number of documents that were written.

        Raises:
            DuplicateDocumentError: An id exists, under FAIL; nothing was written.
            ValueError: ``documents`` is no list of documents, or an embedding cannot be used.
        """
        if not isinstance(documents, list):
            raise InvalidUnitError(f"documents must be a list of Documents, got {shown(documents)}")
        if not isinstance(policy, DuplicatePolicy):
            raise ConfigurationError(f"policy must be a DuplicatePolicy of Haystack, got {shown(policy)}")
        rows = [(_unit(one, position), one.embedding) for position, one in enumerate(documents)]
        with self._files.lock:
            if policy != DuplicatePolicy.OVERWRITE:
                rows = self._fresh(rows, skip=policy == DuplicatePolicy.SKIP)
            blank = placeholder(self.store.embedding_dim)
            vectors = [blank if vector is None else vector for _, vector in rows]
            return len(self.store.store_batch([unit for unit, _ in rows], vectors)) if rows else 0

    def _fresh(self, rows: list[tuple[MemoryUnit, Any]], *, skip: bool) -> list[tuple[MemoryUnit, Any]]:
        """The rows whose id is new. Raises DuplicateDocumentError unless the others are to be skipped."""
        first: dict[str, tuple[MemoryUnit, Json]] = {}
        for row in rows:
            if row[0]["id"] in first or self.store.exists(row[0]["id"]):
                if not skip:
                    raise DuplicateDocumentError(f"the id {row[0]['id']!r} exists; use DuplicatePolicy.OVERWRITE")
                continue
            first[row[0]["id"]] = row
        return list(first.values())

    def delete_documents(self, document_ids: list[str]) -> None:
        """Delete the documents that exist."""
        self.store.delete_batch(document_ids)

    def delete_all_documents(self) -> None:
        """Delete every document."""
        self.store.clear()

    def delete_by_filter(self, filters: JsonObject) -> int:
        """Delete the documents that match, and return their number. Raises FilterError for a filter of everything."""
        return self.store.delete_where(self._condition(filters, "delete_all_documents() deletes everything"))

    def update_by_filter(self, filters: JsonObject, meta: JsonObject) -> int:
        """Merge ``meta`` into the metadata of the documents that match, and return their number.

        None removes a key, and objects are merged (RFC 7396). Raises FilterError.
        """
        mapping("meta", meta, InvalidUnitError)
        changes = {"metadata": meta, MARK: {"own": stamps_in(meta)}}
        return self.store.update_where(_filters(filters), changes)

    def _condition(self, given: Json, remedy: str) -> JsonObject:
        found = _filters(given)
        if always(parse(found).root):
            raise FilterError(f"filters has no condition; {remedy}")
        return found

    # Metadata

    def get_metadata_fields_info(self) -> dict[str, dict[str, str]]:
        """Return the fields of the metadata and the type of their first value."""
        found: dict[str, dict[str, str]] = {}
        for unit in self.store.units():
            for key, value in own_metadata(unit, MARK).items():
                found.setdefault(key, {"type": type(value).__name__})
        return found

    def get_metadata_field_min_max(self, metadata_field: str) -> JsonObject:
        """Return the smallest and largest number, or text where there are no numbers, of a field; None for none."""
        values = [value for value, _ in self._values(metadata_field, None) if not isinstance(value, bool)]
        numbers = [value for value in values if isinstance(value, (int, float))]
        among: list[Json] = numbers or [value for value in values if isinstance(value, str)]
        return {"min": min(among, default=None), "max": max(among, default=None)}

    def get_metadata_field_unique_values(
        self,
        metadata_field: str,
        search_term: str | None = None,
        from_: int = 0,
        size: int = 10,
        filters: JsonObject | None = None,
    ) -> tuple[list[Json], int]:
        """Return one page of a field's distinct values, sorted, that contain ``search_term``, and their number."""
        term = (optional_text("search_term", search_term) or "").casefold()
        first, most = whole_number("from_", from_, least=0), whole_number("size", size, least=0)
        values = sorted(self._values(metadata_field, filters), key=lambda one: (type(one[0]).__name__, one[1]))
        found = [value for value, _ in values if term in str(value).casefold()]
        return found[first : first + most], len(found)

    def count_unique_metadata_by_filter(self, filters: JsonObject, metadata_fields: list[str]) -> dict[str, int]:
        """Return the number of distinct values of each field, among the documents that match."""
        return {name: len(self._values(name, filters)) for name in listed("metadata_fields", metadata_fields)}

    def _values(self, field: str, filters: Json) -> list[tuple[Any, Any]]:
        """(value, value as a key) of each distinct value; elements of lists count as values."""
        if not isinstance(field, str):
            raise InvalidQueryError(f"metadata_field must be a text, got {shown(field)}")
        keys = field.removeprefix("meta.").split(".")
        found: dict[tuple[type, Json], Json] = {}
        for unit in self.store.units(_filters(filters)):
            value: Json = own_metadata(unit, MARK)
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, (str, int, float)):
                    found.setdefault((type(one), one), one)
        return [(value, key) for (_, key), value in found.items()]

    # Retrieval

    def embedding_retrieval(
        self, query_embedding: Sequence[float], filters: JsonObject | None = None, top_k: int = 10
    ) -> list[Document]:
        """Return the documents with the nearest embeddings; the score grows with the similarity."""
        return self._documents(self._by_meaning(query_embedding, filters, top_k))

    def keyword_retrieval(self, query: str, filters: JsonObject | None = None, top_k: int = 10) -> list[Document]:
        """Return the documents that share words with the query, by BM25."""
        return self._documents(self._by_words(query, filters, top_k))

    def hybrid_retrieval(
        self, query: str, query_embedding: Sequence[float], filters: JsonObject | None = None, top_k: int = 10
    ) -> list[Document]:
        """Return the best documents of both, fused by reciprocal ranks."""
        wide = max(whole_number("top_k", top_k) * 4, 50)
        semantic, words = self._by_meaning(query_embedding, filters, wide), self._by_words(query, filters, wide)
        ranks = [[Ranked(unit_id, score) for unit_id, score in found.items()] for found in (semantic, words)]
        return self._documents({one.id: one.score for one in reciprocal_ranks(*ranks)[:top_k]})

    def _by_meaning(self, vector: Sequence[float], filters: Json, top_k: int) -> dict[str, float]:
        both = {"and": [_filters(filters), {"not": {f"{MARK}.embedded": False}}]}
        found = nearest(self.store, vector, whole_number("top_k", top_k), both)
        return {unit["id"]: score_of(distance, self.store.metric) for unit, distance in found}

    def _by_words(self, query: str, filters: Json, top_k: int) -> dict[str, float]:
        return {unit_id: score for score, unit_id in self.store.search_keywords(query, top_k, _filters(filters))}

    def _documents(self, scores: Mapping[str, float]) -> list[Document]:
        units = self.store.retrieve_batch(list(scores))
        rows = with_vectors(self.store, units.values())
        return [_document(unit, vector, scores[unit["id"]]) for unit, vector in rows]


for _name in [name for name, one in vars(MemEvolveDocumentStore).items() if callable(one) and name[0] != "_"]:
    if _name not in ("close", "to_dict"):
        setattr(MemEvolveDocumentStore, f"{_name}_async", in_a_thread(getattr(MemEvolveDocumentStore, _name)))


def _described(data: Json) -> Json:
    if not isinstance(mapping("data", data, ConfigurationError).get("type"), str):
        raise ConfigurationError(f"data: its type must be a text, as to_dict gives it; got {shown(data)}")
    return data


class _Retriever:
    """What the retrievers share: options, and their description."""

    def __init__(
        self,
        document_store: MemEvolveDocumentStore,
        filters: JsonObject | None = None,
        top_k: int = 10,
        filter_policy: str | FilterPolicy = FilterPolicy.REPLACE,
    ) -> None:
        if not isinstance(document_store, MemEvolveDocumentStore):
            raise TypeError(f"document_store must be a MemEvolveDocumentStore, got {shown(document_store)}")
        self.document_store, self.filters = document_store, filters
        self.top_k = whole_number("top_k", top_k)
        named = isinstance(filter_policy, str)
        self.filter_policy = FilterPolicy.from_str(filter_policy) if named else filter_policy

    def to_dict(self) -> JsonObject:
        """Return the component's description, for a pipeline in YAML."""
        described: JsonObject = default_to_dict(
            self,
            document_store=self.document_store.to_dict(),
            filters=self.filters,
            top_k=self.top_k,
            filter_policy=str(self.filter_policy),
        )
        return described

    @classmethod
    def from_dict(cls, data: JsonObject) -> Any:
        """Return the component of a description."""
        held = _described(data).get("init_parameters")
        given = dict(mapping("init_parameters", held, ConfigurationError))
        given["document_store"] = MemEvolveDocumentStore.from_dict(given.get("document_store"))  # type: ignore[arg-type]
        return default_from_dict(cls, {**data, "init_parameters": given})

    def _options(self, filters: JsonObject | None, top_k: int | None) -> JsonObject:
        _filters(filters)  # Haystack looks whether it is true
        chosen = apply_filter_policy(self.filter_policy, self.filters, filters)
        return {"filters": chosen, "top_k": self.top_k if top_k is None else top_k}


@component
class MemEvolveEmbeddingRetriever(_Retriever):
    """Finds the documents whose embeddings are nearest to that of a query."""

    @component.output_types(documents=list[Document])
    def run(
        self, query_embedding: list[float], filters: JsonObject | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Return ``documents``, best first; ``filters`` and ``top_k`` override those of the component."""
        options = self._options(filters, top_k)
        return {"documents": self.document_store.embedding_retrieval(query_embedding, **options)}

    run_async = in_a_thread(run)


@component
class MemEvolveKeywordRetriever(_Retriever):
    """Finds the documents that share words with a query, by BM25."""

    @component.output_types(documents=list[Document])
    def run(self, query: str, filters: JsonObject | None = None, top_k: int | None = None) -> dict[str, list[Document]]:
        """Return ``documents``, best first; ``filters`` and ``top_k`` override those of the component."""
        return {"documents": self.document_store.keyword_retrieval(query, **self._options(filters, top_k))}

    run_async = in_a_thread(run)


@component
class MemEvolveHybridRetriever(_Retriever):
    """Finds documents by embedding and by words, fused by reciprocal ranks."""

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        query_embedding: list[float],
        filters: JsonObject | None = None,
        top_k: int | None = None,
    ) -> dict[str, list[Document]]:
        """Return ``documents``, best first; ``filters`` and ``top_k`` override those of the component."""
        options = self._options(filters, top_k)
        return {"documents": self.document_store.hybrid_retrieval(query, query_embedding, **options)}

    run_async = in_a_thread(run)
