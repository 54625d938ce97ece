"""Searches of the server."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..components.retrieve import HybridRetrievalStrategy
from ..components.store.base import score_of
from ..errors import ConfigurationError, InvalidQueryError
from ..types import FloatArray
from . import models
from .access import Caller, Service

__all__ = ["Searching"]


class Searching:
    """Runs the searches of the server."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def search(self, body: models.Search, caller: Caller) -> list[models.Hit]:
        """Run one search."""
        if (body.query is None) == (body.vector is None):
            raise InvalidQueryError("give query or vector, one of them")
        if body.vector is not None and body.mode != "semantic":
            raise InvalidQueryError(f"vector: a search by vector is semantic; {body.mode} needs query")
        store = caller.store(body.namespace)
        found: list[models.Hit] = await caller.read(lambda: _searched(store, body))
        return found

    async def batch(self, body: models.SearchBatch, caller: Caller) -> list[list[models.Hit]]:
        """Run several searches by meaning."""
        if (body.queries is None) == (body.vectors is None):
            raise InvalidQueryError("give queries or vectors, one of them")
        store = caller.store(body.namespace)

        def run() -> list[list[models.Hit]]:
            if body.queries is not None:
                hits = [store.search_units(one, body.top_k, body.filters, body.recall) for one in body.queries]
                return [[_hit(one, body.units) for one in found] for found in hits]
            if not body.vectors:
                return []
            return _by_vector(store, models.as_matrix(body.vectors), body.top_k, body.filters, body.recall, body.units)

        found: list[list[models.Hit]] = await caller.read(run)
        return found


def _searched(store: Any, body: models.Search) -> list[models.Hit]:
    if body.vector is not None:
        matrix = models.as_vector(body.vector)[None, :]
        width = body.top_k + body.offset
        hits = _by_vector(store, matrix, width, body.filters, body.recall, body.units)[0][body.offset :]
        return [hit for hit in hits if body.min_score is None or hit.score >= body.min_score]
    query = body.query or ""
    window: dict[str, Any] = {"offset": body.offset, "min_score": body.min_score}
    if body.mode == "semantic":
        found = store.search_units(query, body.top_k, body.filters, body.recall, record=body.record, **window)
        return [_hit(one, body.units) for one in found]
    if body.mode == "keyword":
        pairs = store.search_keywords(query, body.top_k, body.filters, **window)
        units = store.retrieve_batch([unit_id for _, unit_id in pairs]) if body.units else {}
        return [models.Hit(id=unit_id, score=score, unit=units.get(unit_id)) for score, unit_id in pairs]
    if not {"search", "search_keywords"} <= store.capabilities:
        raise ConfigurationError(f"mode: a {type(store).__name__} has no hybrid search; use semantic")
    results = HybridRetrievalStrategy().retrieve(query, store, body.top_k + body.offset, body.filters)
    hits = [
        models.Hit(id=one.unit_id, score=one.score, unit=one.unit if body.units else None, why=one.metadata)
        for one in results[body.offset :]
    ]
    return [hit for hit in hits if body.min_score is None or hit.score >= body.min_score]


def _hit(hit: Any, units: bool) -> models.Hit:
    return models.Hit(id=hit.id, score=hit.score, distance=hit.distance, unit=hit.unit if units else None)


def _by_vector(
    store: Any, vectors: FloatArray, top_k: int, filters: Any, recall: float | None, units: bool
) -> list[list[models.Hit]]:
    distances, ids = store.search_vectors(vectors, top_k, filters, recall)
    wanted = {unit_id for row in ids for unit_id in row if unit_id is not None} if units else set()
    read = store.retrieve_batch(sorted(wanted)) if wanted else {}
    metric = store.metric
    return [
        [
            models.Hit(id=unit_id, score=score_of(distance, metric), distance=distance, unit=read.get(unit_id))
            for distance, unit_id in zip(np.asarray(row).tolist(), names, strict=True)
            if unit_id is not None and (not units or unit_id in read)
        ]
        for row, names in zip(distances, ids, strict=True)
    ]
