"""``RemoteStore``: a store behind a server, with the methods of a store in this process."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Literal, TypeVar, cast
from urllib.parse import quote

import httpx
import numpy as np

from .. import errors
from ..components.store.base import Progress
from ..components.store.foreign import with_vectors
from ..components.store.history import Erasure, Operation, UnitChange, UnitVersion, Watch, seconds_to_wait
from ..components.store.listing import EVERY_UNIT, Listing, merged_unit, some_condition, window_of
from ..components.store.namespaces import UNCHANGED, NamespaceInfo, Unchanged, moments, subtree_path
from ..components.store.ranking import HalfLife, Ranking, Window
from ..components.store.reports import plain_details
from ..components.store.units import (
    OpenBackend,
    UnitMapping,
    check_arguments,
    checked_id,
    checked_unit,
    checked_units,
    is_id,
    looked_up,
    one_id,
)
from ..components.store.units import with_id as _with_id
from ..errors import (
    ConfigurationError,
    ConflictError,
    InvalidQueryError,
    InvalidUnitError,
    InvalidVectorError,
    MemEvolveError,
    StorageError,
    StoreClosedError,
    StoreUnavailableError,
)
from ..records.filters import parse
from ..types import Each, Filters, FloatArray, Hit, Json, JsonObject, MemoryUnit, Moment, Ttl, Vectors
from ..utils.arguments import change, listed, mapping, shown, switch, whole_number, word
from ..utils.config import namespace_path
from ..utils.forking import lock, never_free, renew_in_child
from ..utils.plain import as_plain, plain_text
from ..utils.report_types import IndexInfo, Inventory, MaintenanceReport, OperationEntry, StorageHealth, StoreStatistics
from ..utils.vectors import packed, unpacked

_PAGE = 500
_PATIENCE = 30.0
"""Seconds for which a call that the server has no room for is tried again."""

_Remote = TypeVar("_Remote", bound="RemoteStore")


class RemoteStore(OpenBackend):
    """A store behind a server that ``memevolve-store serve`` started.

    Errors are those of the store itself, by class and message. Embedding happens on the server. A call is not repeated
    unless the server says that it did not begin it. Safe to use from several threads; a forked child connects anew.

    Examples:
        >>> from memevolve_gpu.server.client import RemoteStore
        >>> store = RemoteStore("http://127.0.0.1:8321")  # doctest: +SKIP
        >>> store.store({"content": "Rebase before you push"})  # doctest: +SKIP
        'unit_0'
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        namespace: Sequence[str] | str = (),
        timeout: float = 30.0,
        client: httpx.Client | None = None,
    ) -> None:
        """Make a client; the server is called when it is first needed.

        Args:
            url: The address of the server, such as ``http://127.0.0.1:8321``.
            token: The token of a key, where the server has keys.
            namespace: The namespace to work in, below that of the key.
            timeout: Seconds to wait for an answer.
            client: A client of httpx to use, with a certificate or a proxy of its own; it is closed with the store, and
                a forked child refuses to use it.
        """
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._connection = _Connection(url, headers, timeout, client)
        self.url = url
        self.namespace_path = namespace_path(namespace)

    # Writing

    def store(
        self, unit: MemoryUnit, *, replaces: str | None = None, ttl: Ttl = None, expires_at: Moment = None
    ) -> str:
        """Store a unit, as ``VectorStore.store``.

        Args:
            unit: A JSON object, embedded by the server.
            replaces: The id of a unit that this one supersedes: it is deleted in the same transaction.
            ttl: Seconds, or a timedelta, after which the unit expires; None for the namespace's default.
            expires_at: Unix time in seconds, or a datetime with its zone; ``math.inf`` for never.

        Returns:
            The unit's id.

        Raises:
            StoreUnavailableError: The server does not answer; the unit may or may not be stored.
            MemEvolveError: As ``VectorStore.store``.
        """
        checked = checked_unit(unit)
        body = {"units": [checked], **_times(ttl, expires_at, 1)}
        if replaces is not None:
            body["replaces"] = checked_id(replaces, "replaces")
        return str(self._post("units", body)["ids"][0])

    def store_batch(
        self,
        units: Sequence[MemoryUnit],
        embeddings: Vectors | None = None,
        progress: Progress | None = None,
        *,
        ttl: Each[Ttl] = None,
        expires_at: Each[Moment] = None,
    ) -> list[str]:
        """Store several units in one transaction, as ``VectorStore.store_batch``.

        Args:
            units: The units, as for :meth:`store`.
            embeddings: float32 (len(units), dim), row i for unit i; None lets the server embed.
            progress: Ignored.
            ttl: As for :meth:`store`, or a list with one for each unit.
            expires_at: Likewise.

        Returns:
            The ids, in order.

        Raises:
            MemEvolveError: As :meth:`store`.
        """
        del progress
        body = {"units": checked_units(units), "embeddings": _rows(embeddings, "embeddings")}
        body |= _times(ttl, expires_at, len(body["units"]))  # type: ignore[arg-type] # it is a list
        if not body["units"]:
            return []
        return list(self._post("units", {**body, "batch": True})["ids"])

    def replace_batch(
        self,
        delete_ids: Iterable[str],
        units: Sequence[MemoryUnit],
        embeddings: Vectors | None = None,
        *,
        unchanged_since: int | None = None,
    ) -> list[str]:
        body = {
            "delete_ids": _ids(delete_ids, "delete_ids"),
            "units": checked_units(units),
            "embeddings": _rows(embeddings, "embeddings"),
            "unchanged_since": change("unchanged_since", unchanged_since),
        }
        return list(self._post("units/replace", body)["ids"])

    def update(self, unit_id: str, unit: MemoryUnit) -> bool:
        checked = checked_unit(_with_id(unit, checked_id(unit_id)))
        return self._found("PUT", unit_id, checked)

    def patch(self, unit_id: str, changes: Mapping[str, object]) -> bool:
        merged_unit({"id": checked_id(unit_id)}, changes)
        return self._found("PATCH", unit_id, changes)

    def update_where(self, filters: Filters, changes: Mapping[str, object]) -> int:
        some_condition(filters, EVERY_UNIT)
        merged_unit({"id": "a"}, changes)
        return int(self._post("units/update", {"filters": filters, "changes": changes})["count"])

    def delete(self, unit_id: str) -> bool:
        return one_id(unit_id, "delete_batch") and _spoken(unit_id) and bool(self.delete_batch([unit_id]))

    def delete_batch(self, ids: Iterable[str], *, unchanged_since: int | None = None) -> int:
        body = {"ids": _ids(ids, "ids"), "unchanged_since": change("unchanged_since", unchanged_since)}
        return int(self._post("units/delete", body)["count"])

    def delete_where(self, filters: Filters) -> int:
        some_condition(filters, "call clear() to delete all")
        return int(self._post("units/delete", {"filters": filters})["count"])

    def clear(self) -> None:
        self._post("units/clear", {})

    # Reading

    def retrieve(self, unit_id: str) -> MemoryUnit | None:
        return self._read([unit_id], record=True).get(unit_id) if one_id(unit_id, "retrieve_batch") else None

    def retrieve_batch(self, ids: Sequence[str]) -> dict[str, MemoryUnit]:
        return self._read(ids)

    def retrieve_all(self) -> list[MemoryUnit]:
        return list(self.units())

    def exists(self, unit_id: str) -> bool:
        return one_id(unit_id, "retrieve_batch") and bool(self._read([unit_id]))

    def count(self, filters: Filters | None = None) -> int:
        """Count the units.

        Args:
            filters: Counts those that match only, see ``docs/reference/filters.md``.

        Returns:
            The number of units.
        """
        parse(filters)
        return int(self._post("count", {"filters": filters})["count"])

    def get_metadata(self, unit_id: str) -> JsonObject | None:
        return self._read([unit_id]).get(unit_id, {}).get("metadata") if is_id(unit_id) else None

    def units(
        self,
        filters: Filters | None = None,
        *,
        order_by: str | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Listing:
        parse(filters)
        _, most, _ = window_of(order_by, limit, after, (int, str))
        body = {"filters": filters, "order_by": order_by}
        self._opened()
        return Listing(islice(self._pages(body, after, most), most), after)

    def facets(self, field: str, filters: Filters | None = None, limit: int | None = None) -> list[tuple[Json, int]]:
        parse(filters)
        found = self._post("facets", {"field": field, "filters": filters, "limit": limit})["facets"]
        return [(one["value"], one["count"]) for one in found]

    @property
    def data(self) -> UnitMapping:
        """A read-only mapping of id to unit, read from the server at each access."""
        return UnitMapping(self, lambda: (unit["id"] for unit in self.units()))

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
        body = _search(query, top_k, filters, recall, offset, min_score)
        hits = self._post("search", {**body, "record": switch("record", record), "units": False})["hits"]
        return [(hit["distance"], hit["id"]) for hit in hits]

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
        _one_namespace(prefix)
        body = _search(query, top_k, filters, recall, offset, min_score)
        body |= {"record": switch("record", record), **_ranking(recency, importance, weights)}
        hits = self._post("search", body)["hits"]
        space = self.namespace_path
        return [
            Hit(hit["unit"], hit["id"], hit["distance"], hit["score"], (*space, *hit.get("namespace", ())))
            for hit in hits
        ]

    def search_vectors(
        self, queries: Vectors, top_k: int = 5, filters: Filters | None = None, recall: float | None = None
    ) -> tuple[FloatArray, list[list[str | None]]]:
        body = _search("", top_k, filters, recall, 0, None)
        rows = _rows(queries, "queries") or []
        body = {key: body[key] for key in ("top_k", "filters", "recall")}
        results = self._post("search/batch", {**body, "vectors": rows, "units": False})["results"]
        distances = np.full((len(results), body["top_k"]), np.inf, dtype=np.float32)
        ids = list[list[str | None]]()
        for row, hits in enumerate(results):
            distances[row, : len(hits)] = [hit["distance"] for hit in hits]
            ids.append([hit["id"] for hit in hits] + [None] * (body["top_k"] - len(hits)))
        return distances, ids

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
        body = _search(query, top_k, filters, None, offset, min_score) | _ranking(recency, importance, weights)
        body |= {"mode": "keyword", "relative": switch("relative", relative), "units": False}
        hits = self._post("search", body)["hits"]
        return [(hit["score"], hit["id"]) for hit in hits]

    def similarities(self, query: str, ids: Sequence[str]) -> dict[str, float]:
        found: dict[str, float] = self._post("similarities", {"query": query, "ids": _known(ids)})["similarities"]
        return found

    # Vectors

    def vectors_of(self, ids: Sequence[str]) -> dict[str, FloatArray]:
        found = self._post("units/get", {"ids": _known(ids), "units": False, "vectors": True})["vectors"]
        return _vectors(found)

    def sample_vectors(self, count: int) -> dict[str, FloatArray]:
        return _vectors(self._post("vectors/sample", {"count": whole_number("count", count, least=0)})["vectors"])

    def export_rows(self, page_size: int = 1000) -> Iterator[tuple[MemoryUnit, FloatArray]]:
        return with_vectors(self, self.units(), min(whole_number("page_size", page_size), _PAGE))

    # Access statistics

    def record_access(self, ids: Iterable[str]) -> None:
        self._post("units/get", {"ids": _known(listed("ids", ids)), "record": True, "units": False})

    def access_order(self, kind: Literal["lru", "lfu"], limit: int) -> list[str]:
        word("kind", kind, ("lru", "lfu"))
        wanted = {"kind": kind, "limit": min(whole_number("limit", limit, least=0), 10_000)}
        return list(self._get("access/order", wanted)["ids"])

    def access_counts(self) -> dict[str, int]:
        return dict(self._get("access")["counts"])

    # Maintenance and reports

    def inventory(self) -> Inventory:
        return cast("Inventory", self._get("inventory"))

    def register_management_operation(self, operation_type: str, details: object) -> OperationEntry:
        told = json.dumps(plain_details(details), ensure_ascii=False).encode(errors="replace")
        body = {"operation": operation_type, "details": json.loads(told)}
        return cast("OperationEntry", self._post("operations", body))

    def get_storage_health(self) -> StorageHealth:
        return cast("StorageHealth", self._get("health"))

    def statistics(self) -> StoreStatistics:
        """Report counts, the index and the plan, file sizes, change numbers and recent events.

        Returns:
            The report, as of ``VectorStore``.
        """
        found = self._get("stats")
        found["plan"]["notes"] = tuple(found["plan"]["notes"])
        return cast("StoreStatistics", found)

    def run_maintenance(self, progress: Progress | None = None) -> MaintenanceReport:
        del progress
        return cast("MaintenanceReport", self._post("maintain", {}))

    def retrain(self, progress: Progress | None = None, samples: bool = False) -> MaintenanceReport:
        """Train the index again; needs a key with the scope admin.

        Args:
            progress: Ignored.
            samples: As for ``VectorStore.retrain``.

        Returns:
            What was done.
        """
        del progress
        body = {"retrain": True, "samples": switch("samples", samples)}
        return cast("MaintenanceReport", self._post("maintain", body))

    def backup(self, name: str | None = None) -> str:
        """Copy the store to a file in the server's folder of backups.

        Args:
            name: Its name; None for the time of now.

        Returns:
            The name.
        """
        return str(self._post("backup", {"name": name})["name"])

    @property
    def metric(self) -> str:
        return str(self.statistics()["metric"])

    @property
    def embedding_dim(self) -> int:
        """Length of every vector."""
        return int(self.statistics()["dim"])

    @property
    def index(self) -> IndexInfo:
        """What the index holds: ``ntotal`` of this namespace, ``nlist``, ``kind``, ``is_trained``, ``is_building``."""
        found = self.statistics()
        index, building = found["index"], found["maintenance"]["running"]
        return IndexInfo(found["count"], index["nlist"], index["kind"], building)

    @property
    def change_number(self) -> int:
        return int(self.statistics()["log"]["last_seq"])

    # History

    def operations(self, limit: int = 100, *, before: int | None = None) -> list[Operation]:
        found = self._get("operations", {"limit": limit, "before": before})["operations"]
        return [Operation(**one) for one in found]

    def history(self, unit_id: str) -> list[UnitVersion]:
        found = self._get(f"units/{_quoted(checked_id(unit_id))}/history")["versions"]
        return [UnitVersion(**one) for one in found]

    def undo(self, operation: int) -> Operation:
        return Operation(**self._post("undo", {"operation": whole_number("operation", operation)}))

    def changes(
        self, after: int = 0, *, limit: int | None = None, prefix: Sequence[str] | str | None = None
    ) -> Iterator[UnitChange]:
        _one_namespace(prefix)
        seq, left = whole_number("after", after, least=0), 2**62 if limit is None else whole_number("limit", limit)
        while left:
            page = self._get("changes", {"after": seq, "limit": min(_PAGE, left)})
            for one in page["changes"]:
                yield UnitChange(**{**one, "namespace": tuple(one["namespace"])})
            if not page["changes"]:
                return
            seq, left = page["next"], left - len(page["changes"])

    def watch(
        self, after: int | None = None, *, timeout: float | None = None, prefix: Sequence[str] | str | None = None
    ) -> Watch:
        _one_namespace(prefix)
        patience = None if timeout is None else seconds_to_wait(timeout)
        seq = self.change_number if after is None else whole_number("after", after, least=0)
        return Watch(lambda: self.change_number, lambda seq: list(self.changes(seq, limit=_PAGE)), seq, patience)

    def forget_subject(
        self, filters: Filters, *, prefix: Sequence[str] | str | None = None, timeout: float = 30.0
    ) -> Erasure:
        """Delete units for good, see ``VectorStore.forget_subject``; the key needs ``admin``, and no namespace.

        Args:
            filters: Which units; not empty.
            prefix: Refused: take each namespace with :meth:`namespace`.
            timeout: Seconds to wait for readers in other processes, at most 600.

        Returns:
            The certificate, with the names of files and not their folders.

        Raises:
            ConfigurationError: ``prefix`` was given.
            MemEvolveError: As ``VectorStore.forget_subject``.
        """
        _one_namespace(prefix)
        parse(filters)
        seconds = seconds_to_wait(timeout)
        done = self._post("units/erase", {"filters": filters, "timeout": min(seconds, 600.0)})
        return Erasure(**{**done, "files": tuple(done["files"]), "not_erased": tuple(done["not_erased"])})

    # Namespaces and expiry

    def namespace(self: _Remote, *path: str) -> _Remote:
        view = copy.copy(self)
        view.namespace_path = namespace_path([*self.namespace_path, *path])
        return view

    def namespaces(self, prefix: Sequence[str] | str = ()) -> list[NamespaceInfo]:
        wanted = "/".join((*self.namespace_path, *subtree_path(prefix)))
        found = self._get("namespaces", {"prefix": wanted}, scoped=False)["namespaces"]
        return [NamespaceInfo(**{**one, "path": tuple(one["path"])}) for one in found]

    def delete_namespace(self, *path: str) -> int:
        where = "/".join(namespace_path([*self.namespace_path, *path]))
        return int(self._call("DELETE", "namespaces", {"namespace": where})["count"])

    def set_limits(
        self, *, max_units: int | Unchanged | None = UNCHANGED, default_ttl: Ttl | Unchanged = UNCHANGED
    ) -> NamespaceInfo:
        body: JsonObject = {"namespace": list(self.namespace_path)}
        if max_units is not UNCHANGED:
            body["max_units"] = max_units
        if default_ttl is not UNCHANGED:
            body["default_ttl"] = None if default_ttl is None else moments(default_ttl, None, 0.0, 1)[0]
        found = self._call("PUT", "namespaces", body=body)
        return NamespaceInfo(**{**found, "path": tuple(found["path"])})

    def set_expiry(self, ids: Iterable[str], *, ttl: Ttl = None, expires_at: Moment = None) -> int:
        return int(self._post("units/expiry", {"ids": _ids(ids, "ids"), **_time(ttl, expires_at)})["count"])

    def expiry(self, unit_id: str) -> float | None:
        if not one_id(unit_id, "units") or not _spoken(unit_id):
            return None
        found = self._get(f"units/{_quoted(unit_id)}/expiry")["expires_at"]
        return None if found is None else float(found)

    def expiries(self, ids: Sequence[str]) -> dict[str, float]:
        found: dict[str, float] = self._post("units/get", {"ids": _known(ids), "units": False, "expiries": True})[
            "expiries"
        ]
        return found

    # State

    def save_state(self) -> JsonObject:
        return {"url": self.url, "namespace": list(self.namespace_path), "count": self.count()}

    def restore_state(self, state: Mapping[str, object]) -> None:
        source, path = mapping("state", state).get("url"), namespace_path(state.get("namespace"))
        if source is None or (source == self.url and path == self.namespace_path):
            return
        token = self._connection.client().headers.get("Authorization", "").removeprefix("Bearer ") or None
        with RemoteStore(source, token, namespace=path) as other:
            rows = list(other.export_rows())
        self.store_batch([unit for unit, _ in rows], np.array([vector for _, vector in rows]))

    def close(self) -> None:
        """Close the connections. Further calls raise StoreClosedError, also those of views of its namespaces."""
        self._connection.close()

    def __repr__(self) -> str:
        where = f", namespace {'/'.join(self.namespace_path)!r}" if self.namespace_path else ""
        return f"<RemoteStore {self.url!r}{where}{', closed' if self._connection.refusal else ''}>"

    # Inside

    def _read(self, ids: Sequence[str], record: bool = False) -> dict[str, MemoryUnit]:
        found: dict[str, MemoryUnit] = self._post("units/get", {"ids": _known(ids), "record": record})["units"]
        return found

    def _found(self, method: str, unit_id: str, body: object) -> bool:
        try:
            self._call(method, f"units/{_quoted(unit_id)}", self._space(), body)
        except LookupError:
            return False
        return True

    def _pages(self, body: JsonObject, after: str | None, most: int | None) -> Iterator[tuple[str, MemoryUnit]]:
        left = 2**62 if most is None else most
        while left:
            page = self._post("units/list", {**body, "after": after, "limit": min(_PAGE, left)})
            yield from zip(page["cursors"], page["units"], strict=True)
            after, left = page["cursor"], left - len(page["units"])
            if after is None:
                return

    def _space(self) -> JsonObject:
        return {"namespace": "/".join(self.namespace_path)} if self.namespace_path else {}

    def _get(self, path: str, query: Mapping[str, Json] | None = None, *, scoped: bool = True) -> Json:
        given = {key: value for key, value in (query or {}).items() if value is not None}
        return self._call("GET", path, {**given, **(self._space() if scoped else {})})

    def _post(self, path: str, body: Mapping[str, object]) -> Json:
        space = {"namespace": list(self.namespace_path)} if self.namespace_path else {}
        return self._call("POST", path, body={**body, **space})

    def _call(self, method: str, path: str, query: Mapping[str, Json] | None = None, body: object = None) -> Json:
        client = self._opened()
        content = None if body is None else _json(body)
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                answer = client.request(
                    method, f"/v1/{path}", params=query, content=content, headers={"Content-Type": "application/json"}
                )
            except httpx.HTTPError as error:
                raise StoreUnavailableError(
                    f"{self.url} does not answer ({type(error).__name__}: {error}); start the server, or check url"
                ) from error
            if answer.status_code != 429 or time.monotonic() > until:
                break
            time.sleep(float(answer.headers.get("Retry-After", 1)))
        if answer.is_success:
            return answer.json()
        raise _error_of(answer)

    def _opened(self) -> httpx.Client:
        if self._connection.refusal:
            raise StoreClosedError(f"the store {self.url!r} {self._connection.refusal}")
        return self._connection.client()


class _Connection:
    """The client of httpx that a store and its views share.

    A forked child makes another: on the connections of its parent each would read answers to the other.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float, given: httpx.Client | None) -> None:
        self._url, self._headers, self._timeout, self._given = url, headers, timeout, given is not None
        self.refusal = ""
        """Why no more calls are made; empty while they are."""
        self._client = None if given is None else self._set_up(given)
        self._lock = lock()
        self.client()  # an address that cannot be used is refused at once
        renew_in_child(self)

    def client(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                self._client = self._set_up(httpx.Client(timeout=self._timeout))
            return self._client

    def _set_up(self, client: httpx.Client) -> httpx.Client:
        client.base_url = self._url
        client.headers.update(self._headers)
        return client

    def close(self) -> None:
        if not self.refusal:
            self.refusal = "is closed; make a new RemoteStore"
            self.client().close()

    def after_fork(self) -> None:
        never_free(self._client)  # to close it might end the parent's connections
        self._client = None
        if self._given and not self.refusal:
            self.refusal = "has the client of another process; make a RemoteStore with a new client after the fork"


def _json(body: object) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, default=as_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidUnitError(f"the arguments cannot be sent as JSON: {error}; use plain JSON values") from error


def _error_of(answer: httpx.Response) -> Exception:
    """The error that the server met, by class and message."""
    try:
        told = answer.json()
        detail, name = str(told["detail"]), str(told["error"])
    except (ValueError, KeyError, TypeError):
        return StorageError(f"{answer.url} answered {answer.status_code}; url may lead to another server")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MemEvolveError):
        error = kind.__new__(kind)
        Exception.__init__(error, detail)
        if isinstance(error, ConflictError):
            error.ids = list(told.get("ids", ()))
        return error
    if answer.status_code == 404:
        return LookupError(detail)
    if answer.status_code == 422:
        return InvalidQueryError(detail)
    if answer.status_code in (429, 503):
        return StoreUnavailableError(detail)
    return ConfigurationError(detail) if answer.status_code in (401, 403, 413) else StorageError(detail)


def _search(
    query: object, top_k: object, filters: Filters | None, recall: object, offset: object, min_score: object
) -> JsonObject:
    wanted = check_arguments(top_k, recall, query)
    parse(filters)
    Window.of(wanted, offset, min_score)
    body = {"query": query, "top_k": wanted, "filters": filters, "recall": recall}
    return {**body, "offset": offset, "min_score": min_score}


def _ranking(recency: HalfLife | None, importance: str | None, weights: Mapping[str, float] | None) -> JsonObject:
    if Ranking.of(recency, importance, weights) is None:
        return {}
    fading = None
    if recency is not None:
        now = recency.now.timestamp() if isinstance(recency.now, datetime) else recency.now
        fading = {"half_life": recency.seconds, "path": recency.path, "now": now}
    return {"recency": fading, "importance": importance, "weights": weights}


def _times(ttl: Each[Ttl], expires_at: Each[Moment], count: int) -> JsonObject:
    """Times of ``count`` units as numbers or lists of them: seconds from now, or Unix times."""
    if ttl is None and expires_at is None:
        return {}
    found = moments(ttl, expires_at, 0.0, count)
    never = ttl is None and None in found  # a single null would leave the time to the namespace
    one = not never and len(set(found)) == 1
    return {"expires_at" if ttl is None else "ttl": found[0] if one else found}


def _time(ttl: Ttl, expires_at: Moment) -> dict[str, float]:
    """A time as a number: seconds from now, or a Unix time."""
    moment = moments(ttl, expires_at, 0.0, 1)[0] if ttl is not None or expires_at is not None else None
    return {} if moment is None else {"expires_at" if ttl is None else "ttl": moment}


def _rows(vectors: object, name: str) -> list[str] | None:
    if vectors is None:
        return None
    try:
        rows = np.asarray(vectors, dtype="<f4")
    except (TypeError, ValueError) as error:
        raise InvalidVectorError(f"{name} must be rows of numbers, got {shown(vectors)}") from error
    if rows.ndim != 2:
        raise InvalidVectorError(f"{name} must have two dimensions, (n, dim), got {rows.shape}")
    return [packed(row) for row in rows]


def _vectors(found: Mapping[str, str]) -> dict[str, FloatArray]:
    return {name: unpacked(text) for name, text in found.items()}


def _ids(ids: object, name: str) -> list[str]:
    return [checked_id(unit_id, f"{name}[{i}]") for i, unit_id in enumerate(listed(name, ids))]


def _known(ids: Sequence[str]) -> list[str]:
    """The ids that a unit can have."""
    return [unit_id for unit_id in looked_up(ids) if 0 < len(unit_id) <= 1024 and _spoken(unit_id)]


def _spoken(unit_id: str) -> bool:
    """Whether UTF-8 has a form for the id; what has none is in no store."""
    try:
        plain_text(unit_id).encode()
    except UnicodeEncodeError:
        return False
    return True


def _quoted(unit_id: str) -> str:
    """The id as one part of a path; a path of dots would lead elsewhere."""
    return quote(plain_text(unit_id), safe="").replace(".", "%2E")


def _one_namespace(prefix: object) -> None:
    if prefix is not None:
        raise ConfigurationError("prefix: a RemoteStore asks one namespace at a time; take each with namespace()")
