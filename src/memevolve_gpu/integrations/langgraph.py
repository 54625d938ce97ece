"""LangGraph integration: ``MemEvolveStore``, a ``BaseStore`` on a ``VectorStore``. Needs ``langgraph-checkpoint``.

An item is one unit for each text by which it can be found, or one unit without such a text. All of them hold the
value, so that filters are evaluated during the search; unit 0 is the one that is read. Namespaces are kept in the units
as JSON texts, one for the item's own and one for each namespace above it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import operator
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import islice
from os import PathLike
from typing import Any, TypeVar

from ..types import Filters, Json, JsonObject, Vectors

try:
    from langgraph.store.base import (
        BaseStore,
        GetOp,
        IndexConfig,
        Item,
        ListNamespacesOp,
        MatchCondition,
        Op,
        PutOp,
        Result,
        SearchItem,
        SearchOp,
        TTLConfig,
        ensure_embeddings,
        get_text_at_path,
    )
except ImportError as error:
    raise ImportError(
        f"memevolve_gpu.integrations.langgraph needs langgraph ({error}); pip install 'memevolve-gpu[langgraph]'"
    ) from error

from ..components.store import VectorStore
from ..errors import ConfigurationError, EmbeddingError, InvalidFilterError, InvalidQueryError, InvalidUnitError
from ..records.filters import kind_of
from ..types import MemoryUnit
from ..utils.arguments import listed, mapping, optional_text, real_number, shown, switch, whole_number
from .documents import placeholder
from .langchain.embeddings import EmbeddingsFunction, as_embeddings

__all__ = ["MemEvolveStore"]

MARK = "langgraph"
"""The key of a unit below which everything of an item is."""

_Store = TypeVar("_Store", bound="MemEvolveStore")
_Texts = dict[int, list[str]]
_Vectors = dict[str, Sequence[float]]
_Found = tuple[MemoryUnit, float | None]


class MemEvolveStore(BaseStore):
    """A durable LangGraph store: items by namespace and key, with filters, TTL and search by meaning.

    A write is on disk when the call returns. Several processes and threads may use one store. A batch reads first, and
    then applies its writes in one transaction; of several writes of one key the last counts.

    Without ``index`` a query is ignored, as in LangGraph's own stores. With it, items that have no vector
    (``index=False``, or none of the fields) follow the found ones, without a score, where ``limit`` leaves room.

    Examples:
        >>> from memevolve_gpu.integrations.langgraph import MemEvolveStore  # doctest: +SKIP
        >>> with MemEvolveStore("memory") as store:  # doctest: +SKIP
        ...     store.put(("users", "alice"), "prefs", {"theme": "dark"})
        ...     store.get(("users", "alice"), "prefs").value
        {'theme': 'dark'}
    """

    supports_ttl = True

    def __init__(
        self,
        store: VectorStore | str | PathLike[str],
        *,
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
        storage_config: object = None,
    ) -> None:
        """Use an open store, or open one.

        Args:
            store: A ``VectorStore``, which stays open; or a path prefix, whose store is opened with the metric cosine
                and closed by ``close``.
            index: ``dims``, ``embed`` and ``fields``, as LangGraph's stores take them; None for no search by meaning.
                ``embed`` and ``dims`` may be left out for a ``VectorStore`` with an embedding function.
            ttl: ``default_ttl`` and ``sweep_interval_minutes`` in minutes, and ``refresh_on_read``. Expired items are
                never returned, whatever ``omit_expired`` says.
            storage_config: As for ``VectorStore``; only with a path.

        Raises:
            ConfigurationError: The arguments contradict each other. What ``VectorStore`` raises passes through.
        """
        for name, given in (("index", index), ("ttl", ttl)):
            if given is not None:
                mapping(name, given, ConfigurationError)
        self.index_config, self.ttl_config = index, ttl
        self._fields = list((index or {}).get("fields") or ["$"])
        self._owned = not isinstance(store, VectorStore)
        self.embeddings = None if index is None or index.get("embed") is None else ensure_embeddings(index["embed"])
        if isinstance(store, VectorStore):
            if storage_config is not None:
                raise ConfigurationError("storage_config is for a path; an open store has its own")
            if index is not None and self.embeddings is None:
                self.embeddings = as_embeddings(store.embedding_function)
            self._check_index(store.embedding_dim)
            self.store = store
        else:
            self._check_index(None)
            dims = 1 if index is None else index["dims"]
            function = None if self.embeddings is None else EmbeddingsFunction(self.embeddings, dims)
            config = {"metric": "cosine"} if storage_config is None else storage_config
            self.store = VectorStore(store, function, dims, storage_config=config)
        self._stopped = threading.Event()
        self._sweeper: threading.Thread | None = None

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Run operations: the reads first, then all writes in one transaction.

        Args:
            ops: ``GetOp``, ``SearchOp``, ``ListNamespacesOp`` and ``PutOp``.

        Returns:
            One result for each, in order.

        Raises:
            InvalidQueryError: An operation is of another kind, or its limit or offset cannot be used.
            InvalidFilterError: A filter is malformed.
            InvalidUnitError: A value cannot be stored as JSON. What the embedding model raises passes through.
        """
        ops, texts, documents, queries = self._prepared(ops)
        model = self.embeddings
        rows = model.embed_documents(documents) if model is not None and documents else []
        asked = {query: model.embed_query(query) for query in queries} if model is not None else {}
        return self._run(ops, texts, _paired(documents, rows), asked)

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """As ``batch``; embeds with the model's asynchronous calls, and works on the store in a thread."""
        ops, texts, documents, queries = self._prepared(ops)
        model = self.embeddings
        rows = await model.aembed_documents(documents) if model is not None and documents else []
        asked = {query: await model.aembed_query(query) for query in queries} if model is not None else {}
        return await asyncio.to_thread(self._run, ops, texts, _paired(documents, rows), asked)

    def sweep_ttl(self) -> int:
        """Delete the items that have expired. Returns their number."""
        expired = {f"{MARK}.expires_at": {"lte": time.time()}}
        swept = self.store.count({**expired, f"{MARK}.part": 0})
        self.store.delete_where(expired)
        return swept

    def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> None:
        """Sweep in a thread until ``stop_ttl_sweeper`` or ``close``.

        Args:
            sweep_interval_minutes: Minutes between two sweeps; None takes ``ttl["sweep_interval_minutes"]``, or 5.

        Raises:
            ConfigurationError: The interval is not above 0.
        """
        minutes = sweep_interval_minutes or (self.ttl_config or {}).get("sweep_interval_minutes") or 5
        real_number("sweep_interval_minutes", minutes, "above 0", 0, math.inf, ConfigurationError)
        if self._sweeper is None:
            self._stopped.clear()
            self._sweeper = threading.Thread(target=self._sweep_on, args=(minutes * 60,), name="ttl", daemon=True)
            self._sweeper.start()

    def stop_ttl_sweeper(self) -> None:
        """End the thread of ``start_ttl_sweeper``, if there is one."""
        sweeper, self._sweeper = self._sweeper, None
        self._stopped.set()
        if sweeper is not None:
            sweeper.join()

    def close(self) -> None:
        """Stop sweeping, and close the store if it was opened here."""
        self.stop_ttl_sweeper()
        if self._owned:
            self.store.close()

    def __enter__(self: _Store) -> _Store:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # Inside

    def _check_index(self, dim: int | None) -> None:
        """``dim`` is that of an open store."""
        index = self.index_config
        if index is None:
            return
        if self.embeddings is None:
            raise ConfigurationError("index['embed'] is missing, and the store has no embedding function; give one")
        dims = index.get("dims", dim)
        if dims is None or (dim is not None and dims != dim):
            raise ConfigurationError(f"index['dims'] must be the length of the vectors, {dim or 'an int'}; got {dims}")

    def _sweep_on(self, seconds: float) -> None:
        while not self._stopped.wait(seconds):
            self.sweep_ttl()

    def _prepared(self, ops: Iterable[Op]) -> tuple[list[Op], _Texts, list[str], list[str]]:
        """The operations, the texts of each write that counts by its position, and the distinct texts and queries."""
        given = listed("ops", ops)
        for at, op in enumerate(given):
            _check(f"ops[{at}]", op)
        last = {(op.namespace, op.key): at for at, op in enumerate(given) if isinstance(op, PutOp)}
        texts = {at: self._texts_of(given[at]) for at in last.values()}
        searches = [op for op in given if isinstance(op, SearchOp)]
        queries = [] if self.embeddings is None else list({op.query: None for op in searches if op.query})
        return given, texts, list(dict.fromkeys(text for each in texts.values() for text in each)), queries

    def _texts_of(self, op: Any) -> list[str]:
        if self.embeddings is None or op.value is None or op.index is False:
            return []
        paths = self._fields if op.index is None else op.index
        return [text for path in paths for text in get_text_at_path(op.value, path) if text.strip()]

    def _run(self, ops: list[Op], texts: _Texts, vectors: _Vectors, queries: _Vectors) -> Any:
        results: list[Any] = [None] * len(ops)
        gets = {at: _item_id(op.namespace, op.key) for at, op in enumerate(ops) if isinstance(op, GetOp)}
        found = self.store.retrieve_batch(list(gets.values()))
        for at, op in enumerate(ops):
            if at in gets:
                results[at] = [
                    (unit, None) for unit in [found.get(gets[at])] if unit is not None and not _expired(unit)
                ]
            elif isinstance(op, SearchOp):
                results[at] = self._search(op, queries.get(op.query or ""))
            elif isinstance(op, ListNamespacesOp):
                results[at] = self._namespaces(op)
        self._refresh(ops, results)
        self._write({at: ops[at] for at in texts}, texts, vectors)
        return [_shaped(op, result) for op, result in zip(ops, results, strict=True)]

    def _write(self, puts: Mapping[int, Any], texts: _Texts, vectors: _Vectors) -> None:
        old = self.store.retrieve_batch([_item_id(op.namespace, op.key) for op in puts.values()])
        units, rows, gone = [], [], []
        for at, op in puts.items():
            item = _item_id(op.namespace, op.key)
            before = old.get(item, {}).get(MARK, {})
            found_by = [(text, vectors[text]) for text in texts[at] if any(vectors[text])]
            made = [] if op.value is None else _units(op, item, [text for text, _ in found_by], before)
            units += made
            rows += [row for _, row in found_by] or [placeholder(self.store.embedding_dim)] * len(made)
            gone += [_part_id(item, part) for part in range(len(made), before.get("parts", 0))]
        if units or gone:
            self.store.replace_batch(gone, units, rows)

    def _refresh(self, ops: list[Op], results: list[Any]) -> None:
        """Let the items that were read expire later: one transaction for each length of life."""
        lives: dict[float, dict[str, None]] = {}
        for op, result in zip(ops, results, strict=True):
            if isinstance(op, (GetOp, SearchOp)) and op.refresh_ttl:
                for unit, _ in result:
                    if unit[MARK]["ttl"] is not None:
                        lives.setdefault(unit[MARK]["ttl"], {})[unit[MARK]["item"]] = None
        for minutes, items in lives.items():
            later = {MARK: {"expires_at": time.time() + minutes * 60}}
            self.store.update_where({f"{MARK}.item": {"in": list(items)}}, later)

    def _namespaces(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        offset, limit = _page_of(op)
        counted = self.store.facets(f"{MARK}.namespace", {**_living(), f"{MARK}.part": 0})
        paths = (tuple(json.loads(path)) for path, _ in counted)
        conditions = () if op.match_conditions is None else op.match_conditions
        kept = {path[: op.max_depth] for path in paths if all(_matches(one, path) for one in conditions)}
        return sorted(kept)[offset : offset + limit]

    def _search(self, op: SearchOp, vector: Sequence[float] | None) -> list[_Found]:
        offset, limit = _page_of(op)
        filters = _filters(op)
        if vector is None or not any(vector):
            listed = self._listed({**filters, f"{MARK}.part": 0}, op)
            return list(islice(listed, offset, offset + limit))
        found = self._nearest(op, vector, filters, offset + limit)
        rest = self._listed({**filters, f"{MARK}.indexed": False}, op)
        return [*found, *islice(rest, max(0, offset + limit - len(found)))][offset:]

    def _listed(self, filters: Filters, op: SearchOp) -> Iterator[_Found]:
        return ((unit, None) for unit in self.store.units(filters) if _fits(unit, op.filter))

    def _nearest(self, op: SearchOp, vector: Vectors, filters: Filters, wanted: int) -> list[_Found]:
        """Find the items of the nearest units. Asks for more until enough items match, or there are no more units."""
        filters, limit, most = {**filters, f"{MARK}.indexed": True}, wanted + 1, self.store.count()
        best = 1.0 if self.store.metric == "cosine" else 0.0
        while True:
            limit = max(1, min(limit, most))
            distances, ids = self.store.search_vectors([vector], limit, filters)
            near: dict[str, float] = {}
            for unit_id, distance in zip(ids[0], distances[0].tolist(), strict=True):
                if unit_id is not None:
                    near.setdefault(unit_id.partition("#")[0], distance)
            units = self.store.retrieve_batch(list(near))
            found: list[_Found] = [
                (units[item], best - distance)
                for item, distance in near.items()
                if item in units and _fits(units[item], op.filter)
            ]
            if len(found) >= wanted or None in ids[0] or limit == most:
                return found[:wanted]
            limit *= 4


def _paired(texts: list[str], rows: Sequence[Sequence[float]]) -> _Vectors:
    if len(rows) != len(texts):
        raise EmbeddingError(
            f"index['embed'] gave {len(rows)} vectors for {len(texts)} texts; it must give one for each"
        )
    return dict(zip(texts, rows, strict=True))


def _page_of(op: SearchOp | ListNamespacesOp) -> tuple[int, int]:
    offset, limit = whole_number("offset", op.offset, least=0), whole_number("limit", op.limit, least=0)
    return min(offset, 2**60), min(limit, 2**60)


def _check(name: str, op: Any) -> None:
    """Raise InvalidQueryError, or another error of this package, unless an operation has fields of its types."""
    if isinstance(op, SearchOp):
        _check_labels(f"{name}.namespace_prefix", op.namespace_prefix)
        optional_text(f"{name}.query", op.query)
        switch(f"{name}.refresh_ttl", op.refresh_ttl)
        mapping(f"{name}.filter", {} if op.filter is None else op.filter, InvalidFilterError)
    elif isinstance(op, ListNamespacesOp):
        _check_listing(name, op)
    elif isinstance(op, (GetOp, PutOp)):
        _check_labels(f"{name}.namespace", op.namespace, (tuple,))
        if not isinstance(op.key, str):
            raise InvalidQueryError(f"{name}.key must be a text, got {shown(op.key)}")
        if isinstance(op, PutOp):
            _check_put(name, op)
        else:
            switch(f"{name}.refresh_ttl", op.refresh_ttl)
    else:
        raise InvalidQueryError(f"{name} must be a GetOp, SearchOp, ListNamespacesOp or PutOp, got {shown(op)}")


def _check_put(name: str, op: PutOp) -> None:
    mapping(f"{name}.value", {} if op.value is None else op.value, InvalidUnitError)
    if op.ttl is not None:
        real_number(f"{name}.ttl", op.ttl, "a number of minutes", -1e9, 1e9, InvalidUnitError)
    if op.index is not None and op.index is not False:
        _check_labels(f"{name}.index", op.index)


def _check_listing(name: str, op: ListNamespacesOp) -> None:
    conditions = () if op.match_conditions is None else listed(f"{name}.match_conditions", op.match_conditions)
    if not all(isinstance(one, MatchCondition) for one in conditions):
        raise InvalidQueryError(f"{name}.match_conditions must be MatchConditions, got {shown(conditions)}")
    if op.max_depth is not None:
        whole_number(f"{name}.max_depth", op.max_depth, least=0)


def _check_labels(name: str, labels: Json, kinds: Any = (list, tuple)) -> None:
    if not isinstance(labels, kinds) or not all(isinstance(one, str) for one in labels):
        raise InvalidQueryError(f"{name} must be a tuple of texts, got {shown(labels)}")


def _path_text(path: Sequence[str]) -> str:
    return json.dumps(list(path))


def _item_id(namespace: Sequence[str], key: str) -> str:
    return hashlib.sha256(json.dumps([list(namespace), key]).encode()).hexdigest()


def _part_id(item: str, part: int) -> str:
    return f"{item}#{part}" if part else item


def _units(op: PutOp, item: str, texts: list[str], before: Mapping[str, object]) -> list[MemoryUnit]:
    """Make the units of an item: one for each text, or one without."""
    now = time.time()
    value = dict(op.value or {})
    try:
        whole = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidUnitError(f"value of {op.key!r} must be a mapping of JSON values: {error}") from error
    about = {
        "item": item,
        "namespace": _path_text(op.namespace),
        "within": [_path_text(op.namespace[:depth]) for depth in range(1, len(op.namespace) + 1)],
        "key": op.key,
        "value": value,
        "indexed": bool(texts),
        "parts": max(1, len(texts)),
        "created_at": before.get("created_at", now),
        "updated_at": now,
        "ttl": op.ttl,
        **({} if op.ttl is None else {"expires_at": now + op.ttl * 60}),
    }
    return [
        {"id": _part_id(item, part), "content": text, MARK: {**about, "part": part}}
        for part, text in enumerate(texts or [whole])
    ]


def _shaped(op: Op, result: Any) -> Result:
    """Make LangGraph's items of units that were found, and leave other results as they are."""
    if isinstance(op, SearchOp):
        return [SearchItem(**_about(unit), score=score) for unit, score in result]
    return next((Item(**_about(unit)) for unit, _ in result), None) if isinstance(op, GetOp) else result


def _about(unit: MemoryUnit) -> JsonObject:
    about = unit[MARK]
    return {
        "namespace": tuple(json.loads(about["namespace"])),
        "key": about["key"],
        "value": about["value"],
        "created_at": datetime.fromtimestamp(about["created_at"], timezone.utc),
        "updated_at": datetime.fromtimestamp(about["updated_at"], timezone.utc),
    }


def _expired(unit: MemoryUnit) -> bool:
    return bool(unit[MARK].get("expires_at", math.inf) <= time.time())


def _matches(condition: MatchCondition, path: tuple[str, ...]) -> bool:
    wanted = tuple(condition.path)
    if len(path) < len(wanted):
        return False
    part = path[: len(wanted)] if condition.match_type == "prefix" else path[len(path) - len(wanted) :]
    return all(name in ("*", own) for name, own in zip(wanted, part, strict=True))


# Filters. The store's filter finds at least what matches; ``_fits`` decides.

_RANGES = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
_LARGEST = 2.0**53
"""Numbers up to this are exact as floating-point numbers."""


def _living() -> JsonObject:
    expiry = f"{MARK}.expires_at"
    return {"or": [{expiry: {"exists": False}}, {expiry: {"gt": time.time()}}]}


def _filters(op: SearchOp) -> JsonObject:
    """Return the filter of a search on units. Raises InvalidFilterError."""
    within = {f"{MARK}.within": _path_text(op.namespace_prefix)} if op.namespace_prefix else {}
    conditions = [_either(key, wanted) for key, wanted in (op.filter or {}).items()]
    return {**_living(), **within, "and": conditions}


def _either(key: Json, wanted: Json) -> JsonObject:
    """Return the condition for a key, or for the path that it may be."""
    if not isinstance(key, str) or not all(key.split(".")):
        raise InvalidFilterError(f"Invalid filter key {key!r}; give a name, or names joined by dots")
    paths = {(key,): None, tuple(key.split(".")): None}
    return {"or": [{"and": list(_conditions((MARK, "value", *path), wanted))} for path in paths]}


def _conditions(path: tuple[str, ...], wanted: Json) -> Iterator[JsonObject]:
    name = ".".join(json.dumps(part, ensure_ascii=False) for part in path)
    if isinstance(wanted, Mapping):
        for key, value in wanted.items():
            if not str(key).startswith("$"):
                yield from _conditions((*path, key), value)
            elif key == "$eq":
                yield from _conditions(path, value)
            elif key in _RANGES:
                if kind_of(value) == "number" and abs(value) <= _LARGEST:
                    yield {name: {key: value}}
            elif key != "$ne":
                known = ", ".join(["$eq", "$ne", *_RANGES])
                raise InvalidFilterError(f"Invalid filter operator {key!r} for {path[-1]!r}; use one of {known}")
    elif wanted is None:
        yield {name: {"is_null": True}}
    elif isinstance(wanted, (str, bool)) or (isinstance(wanted, (int, float)) and abs(wanted) <= _LARGEST):
        yield {name: {"eq": wanted}}


def _fits(unit: MemoryUnit, wanted: Mapping[str, object] | None) -> bool:
    value = unit[MARK]["value"]
    return all(_meets(_at(value, key), condition) for key, condition in (wanted or {}).items())


def _at(value: Json, key: str) -> Json:
    if key in value:
        return value[key]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _meets(value: Json, wanted: Json) -> bool:
    if isinstance(wanted, Mapping):
        operators = [key for key in wanted if str(key).startswith("$")]
        fields = [key for key in wanted if key not in operators]
        return all(_holds(value, key, wanted[key]) for key in operators) and (
            not fields or (isinstance(value, dict) and all(_meets(value.get(key), wanted[key]) for key in fields))
        )
    if isinstance(wanted, (list, tuple)):
        same = isinstance(value, list) and len(value) == len(wanted)
        return same and all(_meets(one, other) for one, other in zip(value, wanted, strict=True))
    return kind_of(value) == kind_of(wanted) and bool(value == wanted)


def _holds(value: Json, name: str, wanted: Json) -> bool:
    if name in _RANGES:
        return kind_of(value) == kind_of(wanted) in ("number", "text") and bool(_RANGES[name](value, wanted))
    return _meets(value, wanted) == (name == "$eq")
