"""Search: the server proposes rows, the client checks filters and completes short results exactly.

An index may return too few rows: a filter that leaves little in the lists that are probed, a range that the server
knows only roughly, or more results than it gives at once. Whenever a search comes back short, the rows that match are
counted; few are compared one by one, for many the search is made again with full effort, and at the end all of them are
compared. So fewer than ``top_k`` results mean that there are no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..records.filters import Filter, matches
from ..types import FloatArray, Json, JsonObject, MemoryUnit, Metric
from ..utils.vectors import normalize_rows
from .collection import WINDOW, Table, unit_of, vector_of
from .filters import filter_expression
from .plan import METRICS, ServerPlan, search_params

_FEW = 2_000
"""Up to this many matching rows are fetched and compared instead of searched."""

_QUERIES = 500
"""Most queries of one request."""

_INTERIM_ROWS = 128 * 39
"""From so many rows on the server gives a segment that is not indexed yet lists of its own
(``queryNode.segcore.interimIndex``), whose effort no request can raise."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that was found; ``unit`` is None where it is not needed."""

    distance: float
    id: str
    unit: MemoryUnit | None


class Search:
    """Searches one collection."""

    def __init__(self, table: Table, plan: ServerPlan, metric: Metric, target: float) -> None:
        self.table = table
        self.plan = plan
        self.metric = metric
        self.target = target
        self.sealed_until = 0
        """Rows that were written before this moment are in sealed segments; see ``collection.record_of``."""

    def nearest(
        self,
        queries: FloatArray,
        top_k: int,
        filters: Filter,
        recall: float | None,
        with_units: bool,
    ) -> list[list[Candidate]]:
        """Return for each query (n, dim) the nearest matching rows, nearest first; all where there are fewer."""
        expression = filter_expression(filters)
        request = _Request(self, expression, filters, top_k, with_units)
        wanted = self.target if recall is None else recall
        if top_k > WINDOW or (wanted >= 1.0 and not self.compares_all()):
            return request.scan(queries)
        found = request.server(queries, wanted, top_k)
        short = [row for row, one in enumerate(found) if len(one) < top_k]
        for row, one in zip(short, self._completed(request, queries[short], found, short), strict=True):
            found[row] = one
        return found

    def _completed(
        self, request: _Request, queries: FloatArray, found: list[list[Candidate]], short: list[int]
    ) -> list[list[Candidate]]:
        if not short:
            return []
        there = self.table.count(request.expression)
        if all(len(found[row]) >= there for row in short):
            return [found[row] for row in short]
        if there <= _FEW:
            return request.scan(queries)
        again = request.server(queries, 1.0, min(WINDOW, 8 * request.top_k))
        return again if all(len(one) >= request.top_k for one in again) else request.scan(queries)

    def compares_all(self) -> bool:
        """Whether the server compares a query with every vector at full effort."""
        if self.plan.index not in ("IVF_FLAT", "GPU_IVF_FLAT", "FLAT", "GPU_BRUTE_FORCE"):
            return False
        if self.plan.index == "FLAT":  # measured: no interim lists, whatever the segment's state
            return True
        segments = self.table.segments()
        if segments is None or not all(one.loaded and (one.indexed or one.rows < _INTERIM_ROWS) for one in segments):
            return False
        return self.table.count(f"wrote >= {self.sealed_until:d}") < _INTERIM_ROWS


@dataclass(frozen=True, slots=True)
class _Request:
    search: Search
    expression: str
    filters: Filter
    top_k: int
    with_units: bool

    def server(self, queries: FloatArray, recall: float, limit: int) -> list[list[Candidate]]:
        """Search the index, and drop the rows that do not match the filter."""
        plan, table = self.search.plan, self.search.table
        params = {
            "metric_type": METRICS[self.search.metric],
            "params": search_params(plan.index, plan.nlist, recall, limit),
        }
        found: list[list[Candidate]] = []
        for start in range(0, len(queries), _QUERIES):
            answers = table.client.call(
                "search",
                table.name,
                data=list(queries[start : start + _QUERIES]),
                anns_field="vector",
                filter=self.expression,
                limit=limit,
                output_fields=["body"] if self._needs_units else [],
                search_params=params,
                **table.clock.reading(),
            )
            found += [self._matching(answer) for answer in answers]
        return found

    def scan(self, queries: FloatArray) -> list[list[Candidate]]:
        """Compare every matching row, oldest first: exact, and as slow as reading them all."""
        best: list[list[Candidate]] = [[] for _ in queries]
        columns = ["vector", *(["body"] if self._needs_units else [])]
        page: list[JsonObject] = []
        for row in self.search.table.in_order(columns, self.expression):
            page.append(row)
            if len(page) == _FEW:
                best, page = self._merged(best, queries, page), []
        return self._merged(best, queries, page)

    @property
    def _needs_units(self) -> bool:
        return self.with_units or bool(self.filters.root.parts)

    def _matching(self, answer: Iterable[Json]) -> list[Candidate]:
        kept = []
        for hit in answer:
            unit = unit_of(hit["entity"]["body"]) if self._needs_units else None
            if unit is None or matches(self.filters, unit):
                kept.append(Candidate(_distance_of(float(hit["distance"]), self.search.metric), str(hit["id"]), unit))
        return kept[: self.top_k]

    def _merged(
        self, best: list[list[Candidate]], queries: FloatArray, page: list[JsonObject]
    ) -> list[list[Candidate]]:
        units = [unit_of(row["body"]) if self._needs_units else None for row in page]
        keep = [at for at, unit in enumerate(units) if unit is None or matches(self.filters, unit)]
        if not keep:
            return best
        distances = _compared(queries, np.array([vector_of(page[at]["vector"]) for at in keep]), self.search.metric)
        merged = []
        for row, held in enumerate(best):
            order = np.argsort(distances[row], kind="stable")[: self.top_k].tolist()
            fresh = [Candidate(float(distances[row][i]), str(page[keep[i]]["id"]), units[keep[i]]) for i in order]
            merged.append(sorted([*held, *fresh], key=lambda one: one.distance)[: self.top_k])
        return merged


def _distance_of(distance: float, metric: Metric) -> float:
    """Convert the server's squared l2, cosine or dot product to a distance; rounding must not make it negative."""
    if metric == "l2":
        return max(0.0, distance)
    return max(0.0, 1.0 - distance) if metric == "cosine" else -distance


def _compared(queries: FloatArray, rows: FloatArray, metric: Metric) -> FloatArray:
    """Return distances (queries, rows), computed in float64."""
    if metric == "cosine":
        queries, rows = normalize_rows(queries), normalize_rows(rows)
    dots = queries.astype(np.float64) @ rows.astype(np.float64).T
    if metric != "l2":
        return np.asarray(1.0 - dots if metric == "cosine" else -dots, dtype=np.float32)
    squares = np.square(queries, dtype=np.float64).sum(axis=1)[:, None] + np.square(rows, dtype=np.float64).sum(axis=1)
    return np.asarray(np.maximum(0.0, squares - 2.0 * dots), dtype=np.float32)
