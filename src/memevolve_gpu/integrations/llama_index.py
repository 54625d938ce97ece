"""LlamaIndex: a vector store with every filter, by meaning, by words and by both. Needs ``llama-index-core``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..types import Json, JsonObject

try:
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
    from llama_index.core.schema import BaseNode, MetadataMode
    from llama_index.core.vector_stores.types import (
        BasePydanticVectorStore,
        FilterCondition,
        FilterOperator,
        MetadataFilters,
        VectorStoreQuery,
        VectorStoreQueryMode,
        VectorStoreQueryResult,
    )
    from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
except ImportError as error:
    raise ImportError(
        f"memevolve_gpu.integrations.llama_index needs llama-index-core ({error}); "
        "pip install 'memevolve-gpu[llama-index]'"
    ) from error

from ..components.retrieve.strategies import RANK_CONSTANT, Ranked, reciprocal_ranks
from ..components.store import VectorStore
from ..components.store.ranking import score_of
from ..errors import ConfigurationError, InvalidFilterError, InvalidQueryError, InvalidUnitError
from ..records.filters import always, parse
from ..types import MemoryUnit
from ..utils.arguments import listed, real_number, shown, whole_number, word
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

__all__ = ["MemEvolveVectorStore"]

MARK = "llama_index"
_REFERENCES = ("doc_id", "document_id", "ref_doc_id")
"""Keys of filters that name the document of a node, as LlamaIndex's other stores take them."""

_SAME = {"==": "eq", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}
_LISTS = {"in": "in", "nin": "nin", "any": "in", "all": "all"}
_TEXTS = {"text_match": "like", "text_match_insensitive": "ilike"}


def _filters(given: Json) -> JsonObject:
    """LlamaIndex's filters as one of this package."""
    if given is None:
        return {}
    if not isinstance(given, MetadataFilters):
        raise InvalidFilterError(f"filters must be MetadataFilters of LlamaIndex, got {shown(given)}")
    if not given.filters:
        return {}
    parts = [_filters(one) if isinstance(one, MetadataFilters) else _condition(one) for one in given.filters]
    joins = {FilterCondition.AND: "and", FilterCondition.OR: "or", FilterCondition.NOT: "nor"}
    return {joins[given.condition or FilterCondition.AND]: parts}


def _condition(given: Json) -> JsonObject:
    where = path(MARK, "ref") if given.key in _REFERENCES else metadata_path(MARK, *given.key.split("."))
    operator, value = FilterOperator(given.operator).value, given.value
    if operator == "is_empty":
        return {"or": [{where: {"is_null": True}}, {where: {"size": 0}}, {where: {"eq": ""}}]}
    if operator == "contains":
        return {where: {"contains": value}}
    if operator in _LISTS:
        if not isinstance(value, list):
            raise InvalidFilterError(f"the filter {given.key!r} {operator} takes a list, got {shown(value)}")
        return {where: {_LISTS[operator]: value}}
    if operator in _TEXTS:
        if not isinstance(value, str):
            raise InvalidFilterError(f"the filter {given.key!r} {operator} takes a text, got {shown(value)}")
        text = value.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        return {where: {_TEXTS[operator]: f"%{text}%"}}
    if value is None:
        return {"==": {where: {"is_null": True}}, "!=": {where: {"is_null": False}}}.get(operator, NOTHING)
    date = moment(value) if operator in (">", ">=", "<", "<=") else None
    return {where: {_SAME[operator]: value if date is None else date}}


def _unit(node: Any, position: int) -> MemoryUnit:
    if not isinstance(node, BaseNode):
        raise InvalidUnitError(f"nodes[{position}] must be a node of LlamaIndex, got {shown(node)}")
    held = json.loads(node_to_metadata_dict(node, remove_text=True)["_node_content"])
    metadata = held.pop("metadata", {})
    note = {"ref": node.ref_doc_id, "type": node.class_name(), "node": held, "own": stamps_in(metadata)}
    note["embedded"] = node.embedding is not None
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    return {"id": node.node_id, "content": text, "metadata": metadata, MARK: note}


def _node(unit: MemoryUnit) -> BaseNode:
    held = unit.get(MARK)
    note: JsonObject = held if isinstance(held, dict) else {"type": "TextNode", "node": {"id_": unit["id"]}}
    whole = {**note["node"], "metadata": own_metadata(unit, MARK)}
    return metadata_dict_to_node({"_node_content": json.dumps(whole), "_node_type": note["type"]}, unit.get("content"))


class MemEvolveVectorStore(BasePydanticVectorStore):
    """A LlamaIndex vector store in a :class:`~memevolve_gpu.VectorStore`, which keeps the nodes' texts too.

    Queries by ``default`` (embedding), ``text_search`` and ``sparse`` (BM25), ``hybrid`` and ``semantic_hybrid``
    (reciprocal ranks, weighted by ``alpha``) and ``mmr``. A field that is a list matches when one of its elements does.
    The files are opened on first use.

    Examples:
        >>> from llama_index.core.schema import TextNode  # doctest: +SKIP
        >>> store = MemEvolveVectorStore(index_file="memory", embedding_dim=2)  # doctest: +SKIP
        >>> store.add([TextNode(id_="a", text="Rebase first", embedding=[1.0, 0.0])])  # doctest: +SKIP
        ['a']
    """

    stores_text: bool = True
    flat_metadata: bool = False
    index_file: str
    """The path prefix of the store's files."""
    embedding_dim: int
    """Length of the embeddings."""
    metric: str = "cosine"
    storage_config: JsonObject | None = None
    """Settings, as for ``VectorStore``."""

    _files: LazyStore = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Describe the store; nothing is opened yet."""
        super().model_post_init(context)
        self._files = LazyStore(self.index_file, self.embedding_dim, self.metric, self.storage_config)

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serializes the store."""
        return "MemEvolveVectorStore"

    @property
    def client(self) -> VectorStore:
        """The open store."""
        return self._files.get()

    def close(self) -> None:
        """Close the files; the next call opens them again."""
        self._files.close()

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes in one transaction, and return their ids; a node whose id exists is replaced.

        A node without an embedding is found by words and filters. ``kwargs`` are LlamaIndex's and have no effect.
        """
        del kwargs
        nodes = listed("nodes", nodes, InvalidUnitError)
        units = [_unit(node, position) for position, node in enumerate(nodes)]
        blank = placeholder(self.embedding_dim)
        vectors = [blank if node.embedding is None else node.embedding for node in nodes]
        return self.client.store_batch(units, vectors) if units else []

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete the nodes of a document."""
        del delete_kwargs
        self.client.delete_where({path(MARK, "ref"): {"eq": ref_doc_id}})

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete the nodes with these ids that match. Raises InvalidFilterError when neither is given."""
        del delete_kwargs
        wanted = self._wanted(filters, node_ids)
        if always(parse(wanted).root):
            raise InvalidFilterError("give node_ids or filters; clear() deletes everything")
        self.client.delete_where(wanted)

    def clear(self) -> None:
        """Delete every node."""
        self.client.clear()

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Return the nodes with these ids that match, in the order of the ids, else oldest first."""
        found = {unit["id"]: _node(unit) for unit in self.client.units(self._wanted(filters, node_ids))}
        ids = found if node_ids is None else [one for one in dict.fromkeys(node_ids) if one in found]
        return [found[one] for one in ids]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Find nodes, best first. Similarities grow with the likeness.

        Raises:
            InvalidQueryError: The mode needs a text or an embedding that the query has not.
            ConfigurationError: The mode is one of those that learn a classifier.
        """
        del kwargs
        if not isinstance(query, VectorStoreQuery):
            raise InvalidQueryError(f"query must be a VectorStoreQuery of LlamaIndex, got {shown(query)}")
        word("mode", query.mode, [mode.value for mode in VectorStoreQueryMode])
        mode = VectorStoreQueryMode(query.mode)
        ids = [None if isinstance(one, list) and not one else one for one in (query.node_ids, query.doc_ids)]
        wanted = self._wanted(query.filters, *ids)  # an index passes []
        top_k = whole_number("similarity_top_k", query.similarity_top_k)
        if mode in (VectorStoreQueryMode.TEXT_SEARCH, VectorStoreQueryMode.SPARSE):
            scores = self._by_words(query, wanted, query.sparse_top_k or top_k)
        elif mode in (VectorStoreQueryMode.HYBRID, VectorStoreQueryMode.SEMANTIC_HYBRID):
            scores = self._by_both(query, wanted, query.hybrid_top_k or top_k)
        elif mode == VectorStoreQueryMode.MMR:
            scores = self._varied(query, wanted, top_k)
        elif mode == VectorStoreQueryMode.DEFAULT:
            scores = self._by_meaning(query, wanted, top_k)
        else:
            raise ConfigurationError(
                f"the query mode {mode.value} is not supported; use default, text_search or hybrid"
            )
        units = self.client.retrieve_batch(list(scores))
        similarities = [scores[unit_id] for unit_id in units]
        return VectorStoreQueryResult([_node(unit) for unit in units.values()], similarities, list(units))

    async_add = in_a_thread(add)  # type: ignore[arg-type]  # its self could be an option
    adelete = in_a_thread(delete)  # type: ignore[arg-type]  # its self could be an option
    adelete_nodes = in_a_thread(delete_nodes)  # type: ignore[arg-type]  # its self could be an option
    aclear = in_a_thread(clear)
    aget_nodes = in_a_thread(get_nodes)
    aquery = in_a_thread(query)  # type: ignore[arg-type]  # its self could be an option

    # Inside

    def _wanted(self, filters: Json, node_ids: Any, doc_ids: Any = None) -> JsonObject:
        """The filters, and one of these ids, and a node of one of these documents; None is no limit."""
        parts = [_filters(filters)]
        for where, ids in (("id", node_ids), (path(MARK, "ref"), doc_ids)):
            parts += [{where: {"in": listed("ids", ids)}}] if ids is not None else []
        return {"and": parts}

    def _by_meaning(self, query: Any, wanted: Mapping[str, object], top_k: int) -> dict[str, float]:
        if query.query_embedding is None:
            raise InvalidQueryError("query_embedding is None; give one, or use the mode text_search")
        both = {"and": [wanted, {"not": {path(MARK, "embedded"): False}}]}
        found = nearest(self.client, query.query_embedding, top_k, both)
        return {unit["id"]: score_of(distance, self.client.metric) for unit, distance in found}

    def _by_words(self, query: Any, wanted: Mapping[str, object], top_k: int) -> dict[str, float]:
        if query.query_str is None:
            raise InvalidQueryError("query_str is None; give the text to search for")
        return {unit_id: score for score, unit_id in self.client.search_keywords(query.query_str, top_k, wanted)}

    def _by_both(self, query: Any, wanted: Mapping[str, object], top_k: int) -> dict[str, float]:
        alpha = real_number("alpha", 0.5 if query.alpha is None else query.alpha, "0 to 1", 0, 1, InvalidQueryError)
        wide = max(4 * top_k, 50)
        found = self._by_meaning(query, wanted, wide), self._by_words(query, wanted, wide)
        fused = reciprocal_ranks(*([Ranked(unit_id, score) for unit_id, score in one.items()] for one in found))
        weights = ((alpha, "semantic_rank"), (1 - alpha, "keyword_rank"))
        scores = {
            one.id: sum(
                weight * (RANK_CONSTANT + 1) / (RANK_CONSTANT + 1 + getattr(one, rank))
                for weight, rank in weights
                if getattr(one, rank) is not None
            )
            for one in fused
        }
        return dict(sorted(scores.items(), key=lambda pair: -pair[1])[:top_k])

    def _varied(self, query: Any, wanted: Mapping[str, object], top_k: int) -> dict[str, float]:
        vectors = self.client.vectors_of(list(self._by_meaning(query, wanted, 4 * top_k)))
        rows = [vector.tolist() for vector in vectors.values()]
        scores, ids = get_top_k_mmr_embeddings(
            query.query_embedding, rows, None, top_k, list(vectors), mmr_threshold=query.mmr_threshold
        )
        return dict(zip(ids, scores, strict=True))
