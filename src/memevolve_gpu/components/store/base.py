"""The contract of a storage backend, and the adapter for backends that know MemEvolve's methods only.

A backend must implement the ten abstract methods of :class:`StorageBackend`. Everything else has a default, built on
these ten. ``capabilities`` names the optional methods that a backend implements itself, so that callers can tell what
is fast, or possible at all.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from ...errors import InvalidUnitError
from ...records.filters import lookup, matches, parse, path_of
from ...types import Filters, FloatArray, Hit, Json, JsonObject, MemoryUnit, Vectors
from ...utils.arguments import listed, shown, switch, whole_number, word
from ...utils.plain import plain_scalar
from ...utils.report_types import Inventory, MaintenanceReport, OperationEntry, StorageHealth
from ...utils.timestamps import age_stamp
from .listing import EVERY_UNIT, Listing, MetadataMixin, counted, listing_of, merged_unit, some_condition
from .ranking import HalfLife, Ranking, Window, best, score_of, similarity_of
from .unsupported import Unsupported

__all__ = [
    "OPTIONAL",
    "MetadataMixin",
    "Progress",
    "StorageBackend",
]

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the share of it that is done, 0..1."""


_ADD = "store(unit) or store_batch(units), with units such as {'id': 'a', 'content': 'a text'}"
_QUERY = "search_units(text, top_k=5, filters=None), or search_vectors(vectors, top_k=5)"
_GET = "retrieve(unit_id), retrieve_batch(unit_ids), or units(filters)"
_SAVED = "not needed: a write that returned is on disk"
_NAMES_ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("add", "add_documents", "add_items", "add_texts", "insert", "put", "upsert"), _ADD),
    **dict.fromkeys(("find", "get_nearest", "knn", "query", "query_points", "similarity_search"), _QUERY),
    **dict.fromkeys(("fetch", "get", "get_by_ids", "items", "list", "peek", "scroll"), _GET),
    **dict.fromkeys(("commit", "dump", "flush", "persist", "save"), _SAVED),
    **dict.fromkeys(("delete_all", "drop", "reset", "truncate"), "clear()"),
    **dict.fromkeys(("ntotal", "num_entities", "size"), "count() or len(store)"),
    **dict.fromkeys(("delete_many", "remove"), "delete(unit_id) or delete_batch(unit_ids)"),
    **dict.fromkeys(("build_index", "create_index", "optimize", "train"), "run_maintenance(), or retrain() at once"),
    **dict.fromkeys(("health", "info", "stats"), "get_storage_health() or statistics()"),
}
"""Methods of other vector stores, and what does the same here."""


class StorageBackend(Unsupported, ABC):
    """The contract of a store of memory units, which are JSON objects with an ``id``.

    A subclass implements the ten abstract methods. The other methods have defaults, which read every unit where they
    must, do nothing where nothing is needed, or raise ConfigurationError where a backend cannot do it at all (search by
    meaning, vectors).

    Examples:
        >>> from memevolve_gpu import StorageBackend
        >>> class ListStore(StorageBackend):
        ...     def __init__(self):
        ...         self.held = {}
        ...     def store(self, unit):
        ...         self.held[unit["id"]] = unit
        ...         return unit["id"]
        ...     def store_batch(self, units):
        ...         return [self.store(unit) for unit in units]
        ...     def retrieve(self, unit_id):
        ...         return self.held.get(unit_id)
        ...     def retrieve_all(self):
        ...         return list(self.held.values())
        ...     def update(self, unit_id, unit):
        ...         return unit_id in self.held and bool(self.store({**unit, "id": unit_id}))
        ...     def delete(self, unit_id):
        ...         return self.held.pop(unit_id, None) is not None
        ...     def exists(self, unit_id):
        ...         return unit_id in self.held
        ...     def count(self):
        ...         return len(self.held)
        ...     def clear(self):
        ...         self.held.clear()
        ...     def get_metadata(self, unit_id):
        ...         return self.held.get(unit_id, {}).get("metadata")
        >>> backend = ListStore()
        >>> backend.store_batch([{"id": "a", "type": "tool"}, {"id": "b", "type": "lesson"}])
        ['a', 'b']
        >>> [unit["id"] for unit in backend.units({"type": "tool"})]
        ['a']
        >>> backend.inventory()["types"]
        {'tool': 1, 'lesson': 1}
        >>> sorted(backend.capabilities)
        []
    """

    if not TYPE_CHECKING:  # else every misspelt name would be Any

        def __getattr__(self, name: str) -> Any:
            """Raise AttributeError; for the methods of other vector stores it names ours."""
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            ours = _NAMES_ELSEWHERE.get(name)
            raise AttributeError(f"{text}; here it is {ours}" if ours else text, name=name, obj=self)

    @abstractmethod
    def store(self, unit: MemoryUnit) -> str:
        """Store a unit.

        Args:
            unit: The unit. An existing unit of the same id is replaced.

        Returns:
            The unit's id.
        """

    @abstractmethod
    def store_batch(self, units: Sequence[MemoryUnit]) -> list[str]:
        """Store several units.

        Args:
            units: The units, as for :meth:`store`.

        Returns:
            Their ids, in order.
        """

    @abstractmethod
    def retrieve(self, unit_id: str) -> MemoryUnit | None:
        """Read a unit.

        Args:
            unit_id: Its id.

        Returns:
            The unit; None when there is none.
        """

    @abstractmethod
    def retrieve_all(self) -> list[MemoryUnit]:
        """Read every unit.

        Returns:
            The units, oldest first.
        """

    @abstractmethod
    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        """Replace a unit.

        Args:
            unit_id: The id of the unit to replace.
            unit: The new unit.

        Returns:
            False when there is no unit of that id.
        """

    @abstractmethod
    def delete(self, unit_id: str) -> bool:
        """Delete a unit.

        Args:
            unit_id: Its id.

        Returns:
            False when there is no unit of that id.
        """

    @abstractmethod
    def exists(self, unit_id: str) -> bool:
        """Check for a unit.

        Args:
            unit_id: Its id.

        Returns:
            Whether there is a unit of that id.
        """

    @abstractmethod
    def count(self) -> int:
        """Count the units. The stores of this package also take ``filters``, and count the units that match.

        Returns:
            The number of units.
        """

    @abstractmethod
    def clear(self) -> None:
        """Delete every unit."""

    @abstractmethod
    def get_metadata(self, unit_id: str) -> JsonObject | None:
        """Read the metadata of a unit without counting an access.

        Args:
            unit_id: The unit's id.

        Returns:
            The unit's ``metadata``; None when there is no unit or it has none.
        """

    @property
    def capabilities(self) -> frozenset[str]:
        """Names of the optional methods that this backend implements itself."""
        return frozenset(name for name in OPTIONAL if getattr(type(self), name) is not getattr(StorageBackend, name))

    @property
    def metric(self) -> str:
        """The distance of searches: l2 (squared), cosine (1 - cosine) or ip (-dot)."""
        return "l2"

    @property
    def change_number(self) -> int | None:
        """The number of the newest change by anyone, for ``unchanged_since``; None where changes are not numbered."""
        return None

    # Many units

    def units(
        self,
        filters: Filters | None = None,
        *,
        order_by: str | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Listing:
        """Read units one by one.

        Args:
            filters: Limits the units to those that match, see ``docs/reference/filters.md``; None for all.
            order_by: The path of the field to sort by, ``-`` before it for the largest first; None for oldest first.
                Missing values and null come first, then false, true, numbers, texts, and last lists and objects; the
                older of equal ones first.
            limit: Most units; None for all.
            after: The ``cursor`` of an earlier listing of the same filters and order, to go on behind its last unit.

        Returns:
            An iterator over the units, with the attribute ``cursor``.

        Raises:
            InvalidFilterError: The filter is malformed. Raised by the call itself.
            InvalidQueryError: ``order_by``, ``limit`` or ``after`` cannot be used.
        """
        parsed = parse(filters)
        return listing_of(
            lambda: (unit for unit in self.retrieve_all() if matches(parsed, unit)), order_by, limit, after
        )

    def facets(self, field: str, filters: Filters | None = None, limit: int | None = None) -> list[tuple[Json, int]]:
        """Count the units by the value of a field.

        Args:
            field: The path of the field. Each element of a list counts as a value; objects do not count.
            filters: Counts only units that match.
            limit: Most values; None for all.

        Returns:
            (value, number of units) pairs, most units first.

        Raises:
            InvalidFilterError: ``field`` or ``filters`` is malformed.
            InvalidQueryError: ``limit`` cannot be used.

        Examples:
            >>> from memevolve_gpu import HashingEmbedder, VectorStore
            >>> store = VectorStore("facets", HashingEmbedder())
            >>> ids = store.store_batch([{"content": tag, "tags": [tag, "all"]} for tag in ("git", "git", "tar")])
            >>> store.facets("tags")
            [('all', 3), ('git', 2), ('tar', 1)]
            >>> store.close()
        """
        path, found = path_of(field), self.units(filters)
        held = (plain_scalar(lookup(unit, path)) for unit in found)
        return counted(([*one] if isinstance(one, (list, tuple)) else [one] for one in held), limit)

    def patch(self, unit_id: str, changes: Mapping[str, object]) -> bool:
        """Change parts of a unit, as :meth:`update` does.

        Args:
            unit_id: Its id.
            changes: A JSON merge patch (RFC 7396): objects such as ``metadata`` are merged, None removes a key, any
                other value replaces. The unit is embedded again only when its text changes.

        Returns:
            False when there is no unit of that id.

        Raises:
            InvalidUnitError: ``changes`` is no dict or names another id, or the unit cannot be stored with them.
            EmbeddingError: The changed text cannot be embedded.

        Examples:
            >>> from memevolve_gpu import HashingEmbedder, VectorStore
            >>> store = VectorStore("patched", HashingEmbedder())
            >>> unit_id = store.store({"content": "Rebase before you push", "metadata": {"score": 0.2, "draft": True}})
            >>> store.patch(unit_id, {"metadata": {"score": 0.9, "draft": None}})
            True
            >>> unit = store.retrieve(unit_id)
            >>> unit["content"], unit["metadata"]["score"], "draft" in unit["metadata"]
            ('Rebase before you push', 0.9, False)
            >>> store.close()
        """
        if not isinstance(unit_id, str):
            raise InvalidUnitError(f"unit_id must be a text, got {shown(unit_id)}")
        old = self.retrieve_batch([unit_id]).get(unit_id)
        return old is not None and self.update(unit_id, merged_unit(old, changes))

    def update_where(self, filters: Filters, changes: Mapping[str, object]) -> int:
        """Change parts of every unit that matches, in one transaction where the backend has transactions.

        Args:
            filters: Which units, see ``docs/reference/filters.md``; a filter that holds of every unit is refused.
            changes: As for :meth:`patch`.

        Returns:
            The number of units that were changed.

        Raises:
            InvalidFilterError: The filter is malformed, or has no condition.
            InvalidUnitError: As for :meth:`patch`; nothing was changed.

        Examples:
            >>> from memevolve_gpu import F, HashingEmbedder, VectorStore
            >>> store = VectorStore("updated", HashingEmbedder())
            >>> ids = store.store_batch([{"content": str(n), "metadata": {"score": n / 10}} for n in range(5)])
            >>> store.update_where(F("metadata.score") >= 0.3, {"metadata": {"good": True}})
            2
            >>> store.delete_where({"metadata.good": {"exists": False}}), store.count()
            (3, 2)
            >>> store.close()
        """
        some_condition(filters, EVERY_UNIT)
        units = list(self.units(filters))
        for unit in units:
            merged_unit(unit, changes)
        return sum(self.patch(unit["id"], changes) for unit in units)

    def delete_where(self, filters: Filters) -> int:
        """Delete every unit that matches, in one transaction where the backend has transactions.

        Args:
            filters: Which units, see ``docs/reference/filters.md``; a filter that holds of every unit is refused.

        Returns:
            The number of deleted units.

        Raises:
            InvalidFilterError: The filter is malformed, or has no condition.
        """
        some_condition(filters, "call clear() to delete all")
        number = self.change_number
        return self.delete_batch([unit["id"] for unit in self.units(filters)], unchanged_since=number)

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        """Read several units without counting an access.

        Args:
            ids: Ids; those of no unit are skipped.

        Returns:
            The units by id, in the order of ``ids``.
        """
        found = ((unit_id, self.retrieve(unit_id)) for unit_id in dict.fromkeys(ids))
        return {unit_id: unit for unit_id, unit in found if unit is not None}

    def delete_batch(self, ids: Iterable[str], *, unchanged_since: int | None = None) -> int:
        """Delete several units, in one transaction where the backend has transactions.

        Args:
            ids: Ids; those of no unit are skipped.
            unchanged_since: A :attr:`change_number`. Units that changed after it stay. Ignored where changes are not
                numbered.

        Returns:
            The number of deleted units.

        Raises:
            InvalidUnitError: An id is none; nothing is deleted.
        """
        del unchanged_since
        return sum(self.delete(unit_id) for unit_id in ids)

    def replace_batch(
        self,
        delete_ids: Iterable[str],
        units: Sequence[MemoryUnit],
        embeddings: Vectors | None = None,
        *,
        unchanged_since: int | None = None,
    ) -> list[str]:
        """Delete some units and store others, in one transaction where the backend has transactions.

        The default stores first and deletes afterwards: an interruption leaves units twice rather than not at all.

        Args:
            delete_ids: Ids of the units to delete; those of no unit are skipped, unless ``unchanged_since`` is given.
            units: The units to store, as for :meth:`store_batch`.
            embeddings: float32 (len(units), dim), one row per unit; None to embed their text.
            unchanged_since: A :attr:`change_number`; None deletes whatever changed. Ignored where changes are not
                numbered.

        Returns:
            The ids of ``units``, in order.

        Raises:
            ConflictError: A unit to delete changed after ``unchanged_since``, or is gone; nothing was done.
            InvalidUnitError: ``delete_ids`` names a unit twice, or as for :meth:`store_batch`, as all other errors.
        """
        del unchanged_since
        given = () if embeddings is None else (embeddings,)
        gone = listed("delete_ids", delete_ids)
        for at, unit_id in enumerate(gone):
            if not isinstance(unit_id, str):
                raise InvalidUnitError(f"delete_ids[{at}] must be a string, got {type(unit_id).__name__}")
        ids = list(self.store_batch(listed("units", units), *given))
        kept = set(ids)
        for unit_id in gone:
            if unit_id not in kept:
                self.delete(unit_id)
        return ids

    # Searches

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
        """Find the units nearest to a text.

        Args:
            query: The text.
            top_k: Most results.
            filters: Limits the search to units that match, see ``docs/reference/filters.md``.
            recall: Share of the true neighbours to find, above 0 and at most 1 (exact); None for
                MEMEVOLVE_STORAGE_TARGET_RECALL.
            record: Whether the results count as accesses; False for those who pass only some of them on.
            offset: Results to skip: those of the pages before.
            min_score: Leaves out units with a smaller score, see :attr:`Hit.score`.

        Returns:
            (distance, id) pairs by :attr:`metric`, nearest first; never more than there are units.

        Raises:
            ConfigurationError: The backend has no search by meaning.
            EmbeddingError: The embedding function failed, or there is none.
        """
        raise self._missing("search by meaning")

    def search_units(
        self,
        query: str,
        top_k: int = 5,
        filters: Filters | None = None,
        recall: float | None = None,
        *,
        record: bool = True,
        offset: int = 0,
        min_score: float | None = None,
        recency: HalfLife | None = None,
        importance: str | None = None,
        weights: Mapping[str, float] | None = None,
        prefix: Sequence[str] | str | None = None,
    ) -> list[Hit]:
        """Find the units nearest to a text, and read them; ranked by age and importance too when asked.

        The score is then similarity * (1 - w + w * decay) * (1 - v + v * importance) with the weights w and v, in 0..1,
        and the results are those that a comparison of every unit gives. docs/how-to/reading.md has the details.

        Args:
            query: The text.
            top_k: Most results.
            filters: As for :meth:`search`.
            recall: As for :meth:`search`.
            record: Whether the results count as accesses.
            offset: As for :meth:`search`.
            min_score: Leaves out hits with a smaller score.
            recency: How fast units fade, such as ``HalfLife("30d")``; None for not at all.
            importance: The path of a number from 0 to 1, such as ``"metadata.importance"``; None for none.
            weights: How much ``"recency"`` and ``"importance"`` count, 0..1; 1 each when they are not given.
            prefix: Searches the namespace of this path, which counts from that of this store, and all below it; ()
                for all below this one. None searches this one alone.

        Returns:
            Hits with unit, id, namespace, distance and a score that grows with similarity, best first.

        Raises:
            ConfigurationError: The backend has no search by meaning, or no namespaces.
            EmbeddingError: As for :meth:`search`.
            InvalidQueryError: An argument cannot be used.

        Examples:
            >>> from memevolve_gpu import HalfLife, HashingEmbedder, VectorStore
            >>> store = VectorStore("ranked", HashingEmbedder())
            >>> new, old = "2026-03-01T00:00:00Z", "2026-01-01T00:00:00Z"
            >>> units = [{"id": at, "content": "Push to main", "metadata": {"created_at": at}} for at in (old, new)]
            >>> ids = store.store_batch(units)
            >>> hits = store.search_units("Push to main", recency=HalfLife("59d", now=1772323200.0))
            >>> [(hit.id, round(hit.score, 2)) for hit in hits]
            [('2026-03-01T00:00:00Z', 1.0), ('2026-01-01T00:00:00Z', 0.5)]
            >>> store.close()
        """
        self._refuse(prefix=prefix)
        ranking, window = Ranking.of(recency, importance, weights), Window.of(top_k, offset, min_score)
        if ranking is None:
            hits = self._hits(query, window.reach, filters, recall)
        else:
            hits = self._ranked_hits(ranking, window, query, filters, recall)
        found = window.cut(hits, lambda hit: hit.score)
        if switch("record", record):
            self.record_access([hit.id for hit in found])
        return found

    def _hits(self, query: str, top_k: int, filters: Filters | None, recall: float | None) -> list[Hit]:
        """The nearest units, without a note of the access."""
        found = self.search(query, top_k, filters, recall, record=False)
        units = self.retrieve_batch([unit_id for _, unit_id in found])
        return [
            Hit(units[unit_id], unit_id, distance, score_of(distance, self.metric))
            for distance, unit_id in found
            if unit_id in units
        ]

    def _ranked_hits(
        self,
        ranking: Ranking,
        window: Window,
        query: str,
        filters: Filters | None,
        recall: float | None,
    ) -> list[Hit]:
        """The best units by similarity, age and importance."""
        now, metric = ranking.now(), self.metric

        def fetch(wanted: int) -> list[tuple[float, float, Hit]]:
            hits = self._hits(query, wanted, filters, recall)
            return [(float(similarity_of(hit.distance, metric)), ranking.factor(hit.unit, now), hit) for hit in hits]

        return [replace(hit, score=score) for score, hit in best(fetch, window.reach)]

    def search_vectors(
        self, queries: Vectors, top_k: int = 5, filters: Filters | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        """Find the units nearest to each of several vectors.

        Args:
            queries: float32 (n, dim): an array, or rows on a GPU as a torch tensor, a cupy array or anything that
                speaks DLPack, which stay there where the index does too.
            top_k: Results for each query; n times top_k may be 10,000,000 at most.
            filters: As for :meth:`search`.
            recall: As for :meth:`search`.

        Returns:
            Distances, float32 (n, top_k), and n lists of top_k ids; +inf and None where there are fewer units.

        Raises:
            ConfigurationError: The backend has no vectors.
            InvalidVectorError: A query holds values that are not finite, or is no vector.
            DimensionMismatchError: The queries have another width than the store.
        """
        raise self._missing("search by vector")

    def search_keywords(
        self,
        query: str,
        top_k: int = 5,
        filters: Filters | None = None,
        *,
        offset: int = 0,
        min_score: float | None = None,
        recency: HalfLife | None = None,
        importance: str | None = None,
        weights: Mapping[str, float] | None = None,
        relative: bool = False,
    ) -> list[tuple[float, str]]:
        """Find the units whose embedded text shares words with a text.

        Words in more than a twentieth of the units count for the score but only find units if there is no other word.

        Args:
            query: Any text. ``"exact words"``, ``begin*`` and ``-without``: see docs/reference/keyword-queries.md.
            top_k: Most results.
            filters: As for :meth:`search`.
            offset: As for :meth:`search`.
            min_score: Leaves out units with a smaller score.
            recency: As for :meth:`search_units`, like ``importance`` and ``weights``; they multiply the BM25 score.
            importance: See ``recency``.
            weights: See ``recency``.
            relative: Scores in 0..1, comparable between queries: shares of a text with all words of the query.

        Returns:
            (BM25 score, id) pairs, best first; words are counted among the units that match ``filters``.

        Raises:
            ConfigurationError: The backend has no keyword index.
        """
        raise self._missing("search by keywords")

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        """Compare given units with a text.

        Args:
            query: The text.
            ids: Ids; those of no unit are skipped.

        Returns:
            The cosine of each unit by id, whatever the metric.

        Raises:
            ConfigurationError: The backend has no vectors.
            EmbeddingError: As for :meth:`search`.
        """
        raise self._missing("compare units with a text")

    # Vectors

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        """Read the vectors of units.

        Args:
            ids: Ids; those of no unit are skipped.

        Returns:
            The vectors as they were given, float32 (dim,) by id, in the order of ``ids``.

        Raises:
            ConfigurationError: The backend has no vectors.
        """
        raise self._missing("give vectors")

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        """Read the vectors of some units, spread evenly over their age.

        Args:
            count: Most vectors.

        Returns:
            Vectors, float32 (dim,) by id.

        Raises:
            ConfigurationError: The backend has no vectors.
        """
        raise self._missing("give vectors")

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        """Read every unit with its vector, one by one.

        Args:
            page_size: Units that are read at once, at most 10,000 of them.

        Returns:
            An iterator over (unit, vector as it was given, float32 (dim,)), oldest first.

        Raises:
            ConfigurationError: The backend has no vectors.
        """
        raise self._missing("give vectors")

    # Access statistics

    def record_access(self, ids: Iterable[str]) -> None:
        """Count an access to each of these units. The default keeps no access statistics.

        A ``VectorStore`` counts what ``retrieve``, ``search`` and ``search_units`` return itself. It writes accesses a
        thousand at a time, at maintenance and when it is closed; a crash loses those that were not written yet.

        Args:
            ids: Ids; those of no unit are skipped.
        """
        del ids

    def access_order(self, kind: Literal["lru", "lfu"], limit: int) -> list[str]:
        """List units by their accesses in this process, and those that other processes have written; else by age.

        Args:
            kind: lru for those read longest ago first, lfu for those read least often; units that were never read come
                before both, by age.
            limit: Most ids.

        Returns:
            Ids, the first to forget first.

        Raises:
            InvalidQueryError: ``kind`` is unknown, or ``limit`` is negative.
        """
        word("kind", kind, ("lru", "lfu"))
        return [unit["id"] for unit in islice(self.units(), min(whole_number("limit", limit, least=0), sys.maxsize))]

    def access_counts(self) -> dict[str, int]:
        """Read how often units were accessed.

        Returns:
            Counts by id, of the units that were accessed at all.
        """
        return {}

    # Maintenance and reports

    def inventory(self) -> Inventory:
        """Describe the units. The default reads each of them.

        Returns:
            Count, types, and the time stamps of the oldest and newest unit. Bytes are those of the units as JSON; of a
            ``VectorStore`` those of its files, of a ``MilvusStore`` an estimate with the vectors.
        """
        size, types = 0, Counter[str]()
        stamps: list[tuple[float, str]] = []
        for unit in self.units():
            size += len(json.dumps(unit, ensure_ascii=False, default=str).encode())
            types[str(unit.get("type") or "unknown")] += 1
            moment = age_stamp(unit)
            if moment is not None:
                stamps.append((moment, unit["metadata"]["created_at"]))
        oldest, newest = (min(stamps)[1], max(stamps)[1]) if stamps else (None, None)
        return {"count": types.total(), "bytes": size, "types": dict(types), "oldest": oldest, "newest": newest}

    def register_management_operation(self, operation_type: str, details: object) -> OperationEntry:
        """Report a management operation that is done, so that the index follows. The default keeps no history.

        Args:
            operation_type: prune, consolidate, deduplicate or forget.
            details: What is known of it. ``removed`` (or ``count``, or ``ids``) is the number of deleted units; values
                that JSON cannot hold are kept as their repr.

        Returns:
            The entry of the history, with the ``decision`` on the index: retrain, compact, append or nothing.

        Raises:
            InvalidQueryError: The operation is unknown.
        """
        kept = dict(details) if isinstance(details, Mapping) else {"details": details}
        return {"operation": operation_type, "at": time.time(), "details": kept, "decision": "nothing"}

    def get_storage_health(self) -> StorageHealth:
        """Report the health of the backend.

        Returns:
            ``current_count`` by default. A store reports fill level, memory, index quality, and recommendations for
            the operator; see ``docs/how-to/operations.md``.
        """
        return {"current_count": self.count()}

    def run_maintenance(self, progress: Progress | None = None) -> MaintenanceReport:
        """Do now what the background would do. The default has nothing to do.

        A ``VectorStore`` builds the planned index, verifies and saves it, and purges the log.

        Args:
            progress: Called with (stage, share done).

        Returns:
            What was done.
        """
        del progress
        return {"actions": [], "reason": ""}

    def refresh(self) -> None:
        """See from here on all writes that were acknowledged to anyone before. The default always sees them."""

    # State

    def save_state(self) -> JsonObject:
        """Describe the state for another instance to take over: of a store, where the units are, without secrets.

        Returns:
            JSON values for :meth:`restore_state`; empty for a backend without state.
        """
        return {}

    def restore_state(self, state: Mapping[str, object]) -> None:
        """Take over the state of another instance. The default ignores it.

        A store copies the units of the other into itself; nothing when it is this very store.

        Args:
            state: What :meth:`save_state` of that instance returned.

        Raises:
            InvalidQueryError: ``state`` is not a mapping.
        """
        del state

    def __bool__(self) -> bool:
        """Return True, with units or without: MemEvolve checks ``if not self.storage`` for a missing backend."""
        return True

    def __len__(self) -> int:
        """Return the number of units."""
        return self.count()

    def __iter__(self) -> Iterator[MemoryUnit]:
        """Iterate over the units, oldest first."""
        return self.units()

    def __contains__(self, unit_id: object) -> bool:
        """Return whether there is a unit of that id."""
        return isinstance(unit_id, str) and self.exists(unit_id)


OPTIONAL = (
    frozenset(name for kind in (Unsupported, StorageBackend) for name in vars(kind) if not name.startswith("_"))
    - StorageBackend.__abstractmethods__
    - {"capabilities", "metric", "save_state", "restore_state"}
)
"""The public methods of ``StorageBackend`` that have a default, and ``change_number``."""
