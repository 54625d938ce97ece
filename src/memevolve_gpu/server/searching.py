"""Searches of the server: ``POST /v1/search`` is answered here, without the framework's work around a route."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.types import Receive

from ..components.retrieve import HybridRetrievalStrategy
from ..components.store.ranking import HalfLife, score_of
from ..errors import ConfigurationError, InvalidQueryError
from ..types import FloatArray, JsonObject
from ..types import Hit as StoreHit
from ..utils.vectors import read_vector
from . import models
from .access import Caller

Hit = JsonObject


async def search_answer(body: models.Search, caller: Caller) -> bytes:
    """The JSON text of :class:`models.Hits`."""
    if (body.query is None) == (body.vector is None):
        raise InvalidQueryError("query, vector: give one of them")
    if body.vector is not None and body.mode != "semantic":
        raise InvalidQueryError(f"mode: a search by vector is semantic; {body.mode} needs query")
    store = caller.store(body.namespace)
    text: bytes = await caller.read(lambda: to_json({"hits": _searched(store, body)}))
    return text


async def search_batch(body: models.SearchBatch, caller: Caller) -> bytes:
    """The JSON text of :class:`models.HitsBatch`."""
    if (body.queries is None) == (body.vectors is None):
        raise InvalidQueryError("queries, vectors: give one of them")
    store = caller.store(body.namespace)

    def run() -> list[list[Hit]]:
        if body.queries is not None:
            found = [store.search_units(one, body.top_k, body.filters, body.recall) for one in body.queries]
            return [[_hit(one, body.units, len(one.namespace)) for one in hits] for hits in found]
        if not body.vectors:
            return []
        return _by_vector(store, models.as_matrix(body.vectors), body.top_k, body.filters, body.recall, body.units)

    text: bytes = await caller.read(lambda: to_json({"results": run()}))
    return text


def _searched(store: Any, body: models.Search) -> list[Hit]:
    if body.vector is not None:
        matrix, width = read_vector(body.vector, "vector")[None, :], body.top_k + body.offset
        return _window(_by_vector(store, matrix, width, body.filters, body.recall, body.units)[0], body)
    if body.mode == "hybrid":
        return _hybrid(store, body)
    query, window = body.query or "", _window_and_ranking(body)
    if body.mode == "keyword":
        pairs = store.search_keywords(query, body.top_k, body.filters, relative=body.relative, **window)
        units = store.retrieve_batch([unit_id for _, unit_id in pairs]) if body.units else {}
        return [{"id": unit_id, "score": score, "unit": units.get(unit_id)} for score, unit_id in pairs]
    if body.units or body.below or len(window) > 2:
        below = {"prefix": ()} if body.below else {}
        found = store.search_units(query, body.top_k, body.filters, body.recall, record=body.record, **window, **below)
        depth = len(getattr(store, "namespace_path", ()))
        return [_hit(one, body.units, depth) for one in found]
    pairs = store.search(query, body.top_k, body.filters, body.recall, record=body.record, **window)
    metric = store.metric
    return [{"id": name, "score": score_of(distance, metric), "distance": distance} for distance, name in pairs]


def _window_and_ranking(body: models.Search) -> JsonObject:
    window: JsonObject = {"offset": body.offset, "min_score": body.min_score}
    if body.recency is not None:
        window["recency"] = HalfLife(body.recency.half_life, body.recency.path, body.recency.now)
    ranking = {"importance": body.importance, "weights": body.weights}
    return {**window, **{name: value for name, value in ranking.items() if value is not None}}


def _hybrid(store: Any, body: models.Search) -> list[Hit]:
    if not {"search", "search_keywords"} <= store.capabilities:
        raise ConfigurationError(f"mode: a {type(store).__name__} has no hybrid search; use semantic")
    results = HybridRetrievalStrategy().retrieve(body.query or "", store, body.top_k + body.offset, body.filters)
    found = [{"id": one.unit_id, "score": one.score, "why": one.metadata, "unit": one.unit} for one in results]
    return _window([hit if body.units else {**hit, "unit": None} for hit in found], body)


def _window(hits: Iterable[Hit], body: models.Search) -> list[Hit]:
    least = body.min_score
    return [hit for hit in list(hits)[body.offset :] if least is None or hit["score"] >= least]


def _hit(hit: StoreHit, units: bool, depth: int) -> Hit:
    found = {"id": hit.id, "score": hit.score, "distance": hit.distance, "unit": hit.unit if units else None}
    return {**found, "namespace": hit.namespace[depth:]} if len(hit.namespace) > depth else found


def _by_vector(
    store: Any, vectors: FloatArray, top_k: int, filters: JsonObject | None, recall: float | None, units: bool
) -> list[list[Hit]]:
    distances, ids = store.search_vectors(vectors, top_k, filters, recall)
    wanted = [unit_id for row in ids for unit_id in row if unit_id is not None] if units else []
    read, metric = store.retrieve_batch(wanted) if wanted else {}, store.metric
    return [
        [
            {"id": unit_id, "score": score_of(distance, metric), "distance": distance, "unit": read.get(unit_id)}
            for distance, unit_id in zip(np.asarray(row).tolist(), names, strict=True)
            if unit_id is not None and (not units or unit_id in read)
        ]
        for row, names in zip(distances, ids, strict=True)
    ]


async def read_body(receive: Receive) -> bytes:
    """The whole body of a request."""
    parts = list[bytes]()
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def answer_search(receive: Receive, caller: Caller) -> bytes:
    """Answer the body of ``POST /v1/search``. Raises what the route raises."""
    try:
        body = models.Search.model_validate_json(await read_body(receive))
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error
    return await search_answer(body, caller)
