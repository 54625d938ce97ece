"""The routes below /v1."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from ..components.manage import SimpleManagementStrategy
from ..components.store.history import Erasure, Operation
from ..components.store.namespaces import NamespaceInfo
from ..errors import InvalidFilterError, InvalidQueryError, InvalidUnitError
from ..types import Json, JsonObject, MemoryUnit
from ..utils.plain import json_text
from ..utils.vectors import packed
from . import models
from .access import Caller, ability, allow
from .searching import search_answer, search_batch

router = APIRouter(prefix="/v1")

Reader = Annotated[Caller, Depends(allow("read"))]
Writer = Annotated[Caller, Depends(allow("write"))]
Admin = Annotated[Caller, Depends(allow("admin"))]
Space = Annotated[str, Query(alias="namespace", description="A path such as org/alice, below that of the key.")]
FilterText = Annotated[str | None, Query(alias="filters", description='A filter as JSON: {"type": "skill"}.')]

_EXPORTED_AT_ONCE = 200
_DUE = models.Maintain()


# Reading and writing units


@router.post("/units", status_code=201)
async def store_units(body: models.StoreUnits, caller: Writer) -> models.Stored:
    """Store units, all of them or none. They are durable when the answer comes."""
    store = caller.store(body.namespace)
    times = _times(body)
    if body.replaces is not None and (len(body.units) != 1 or body.embeddings is not None):
        raise InvalidUnitError("replaces: give one unit, without embeddings, that supersedes that of this id")
    each = any(isinstance(value, list) for value in times.values())
    if len(body.units) == 1 and body.embeddings is None and not body.batch and not each:
        more = times if body.replaces is None else {**times, "replaces": body.replaces}
        return models.Stored(ids=[await caller.write(lambda: store.store(body.units[0], **more))])
    given = [] if body.embeddings is None else [models.as_matrix(body.embeddings, "embeddings")]
    return models.Stored(ids=await caller.write(lambda: store.store_batch(body.units, *given, **times)))


def _times(body: models.StoreUnits) -> JsonObject:
    """The times as the store takes them, in which infinity is never."""
    moments: Json = body.expires_at
    if isinstance(moments, list):
        moments = [math.inf if one is None else one for one in moments]
    return {name: value for name, value in (("ttl", body.ttl), ("expires_at", moments)) if value is not None}


@router.get("/units")
async def list_units(
    caller: Reader,
    namespace: Space = "",
    filters: FilterText = None,
    order_by: str | None = None,
    limit: Annotated[int, Query(ge=1, le=models.MOST_UNITS)] = 100,
    after: Annotated[str | None, Query(description="The cursor of the page before.")] = None,
) -> models.Page:
    """List units page by page, oldest first or in the order of a field."""
    body = models.ListUnits(namespace=namespace, filters=_filters(filters), order_by=order_by, limit=limit, after=after)
    return await list_units_by_body(body, caller)


@router.post("/units/list")
async def list_units_by_body(body: models.ListUnits, caller: Reader) -> models.Page:
    """List units as GET /v1/units does, for filters that are too long for an address."""
    store = caller.store(body.namespace)

    def page() -> models.Page:
        listing = store.units(body.filters, order_by=body.order_by, limit=body.limit + 1, after=body.after)
        rows = [(unit, str(listing.cursor)) for unit in listing]
        more, rows = len(rows) > body.limit, rows[: body.limit]
        cursors = [cursor for _, cursor in rows]
        return models.Page(units=[unit for unit, _ in rows], cursor=cursors[-1] if more else None, cursors=cursors)

    return await caller.read(page)


async def _id(unit_id: str) -> str:
    try:
        return unquote(unit_id, errors="strict")
    except UnicodeDecodeError:
        raise InvalidUnitError("unit_id must be UTF-8 with percent signs for what a path cannot hold") from None


UnitId = Annotated[str, Depends(_id)]


@router.get("/units/{unit_id}")
async def get_unit(unit_id: UnitId, caller: Reader, namespace: Space = "", record: bool = False) -> models.Unit:
    """Read a unit."""
    store = caller.store(namespace)
    read = store.retrieve if record else lambda one: store.retrieve_batch([one]).get(one)
    return _there(await caller.read(lambda: read(unit_id)), unit_id)


@router.put("/units/{unit_id}")
async def put_unit(unit_id: UnitId, unit: models.Unit, caller: Writer, namespace: Space = "") -> models.Unit:
    """Replace a unit; it keeps its ``metadata.created_at``."""
    store = caller.store(namespace)
    return await _changed(caller, store, unit_id, lambda: store.update(unit_id, unit))


@router.patch("/units/{unit_id}")
async def patch_unit(unit_id: UnitId, changes: models.Unit, caller: Writer, namespace: Space = "") -> models.Unit:
    """Change parts of a unit: a JSON merge patch (RFC 7396)."""
    store = caller.store(namespace)
    return await _changed(caller, store, unit_id, lambda: store.patch(unit_id, changes))


@router.delete("/units/{unit_id}")
async def delete_unit(unit_id: UnitId, caller: Writer, namespace: Space = "") -> models.Deleted:
    """Delete a unit."""
    store = caller.store(namespace)
    _there(await caller.write(lambda: store.delete(unit_id)) or None, unit_id)
    return models.Deleted(deleted=True)


@router.get("/units/{unit_id}/history")
async def unit_history(unit_id: UnitId, caller: Reader, namespace: Space = "") -> models.Versions:
    """Read every version of a unit that is kept."""
    found = await caller.read(lambda: ability(caller.store(namespace), "history")(unit_id))
    return models.Versions(versions=found)


@router.post("/units/get")
async def get_units(body: models.GetUnits, caller: Reader) -> models.Found:
    """Read units by their ids; those of no unit are left out."""
    store = caller.store(body.namespace)

    def read() -> models.Found:
        units = store.retrieve_batch(body.ids) if body.units else {}
        if body.record:
            store.record_access(body.ids)
        held = store.vectors_of(body.ids) if body.vectors else None
        vectors = None if held is None else {name: packed(one) for name, one in held.items()}
        expiries = store.expiries(body.ids) if body.expiries else None
        return models.Found(units=units, vectors=vectors, expiries=expiries)

    return await caller.read(read)


@router.get("/units/{unit_id}/expiry")
async def unit_expiry(unit_id: UnitId, caller: Reader, namespace: Space = "") -> models.Moment:
    """Read when a unit expires; null also where there is no unit of that id."""
    store = caller.store(namespace)
    return models.Moment(expires_at=await caller.read(lambda: store.expiry(unit_id)))


@router.post("/units/update")
async def update_where(body: models.UpdateWhere, caller: Writer) -> models.Number:
    """Change parts of every unit that matches, in one transaction."""
    store = caller.store(body.namespace)
    return models.Number(count=await caller.write(lambda: store.update_where(body.filters, body.changes)))


@router.post("/units/delete")
async def delete_units(body: models.DeleteUnits, caller: Writer) -> models.Number:
    """Delete units by ids, or by filters with a condition, in one transaction."""
    store = caller.store(body.namespace)
    if (body.ids is None) == (body.filters is None):
        raise InvalidFilterError("give ids or filters, one of them")
    if body.filters is not None:
        return models.Number(count=await caller.write(lambda: store.delete_where(body.filters)))
    count = await caller.write(lambda: store.delete_batch(body.ids, unchanged_since=body.unchanged_since))
    return models.Number(count=count)


@router.post("/units/clear")
async def clear_units(body: models.Scoped, caller: Admin) -> models.Number:
    """Delete every unit of a namespace, in one transaction."""
    store = caller.store(body.namespace)

    def cleared() -> models.Number:
        count = store.count()
        store.clear()
        return models.Number(count=count)

    return await caller.write(cleared)


@router.post("/units/erase")
async def erase_units(body: models.Erase, caller: Admin) -> Erasure:
    """Delete units for good, from the history and the files of the store too; takes as long as copying the store."""
    caller.whole("an erasure")
    erase = ability(caller.store(body.namespace), "forget_subject")
    done: Erasure = await caller.write(lambda: erase(body.filters, timeout=body.timeout))
    names, left = (tuple(Path(one).name for one in files) for files in (done.files, done.not_erased))
    return replace(done, files=names, not_erased=left)


@router.post("/units/replace")
async def replace_units(body: models.ReplaceUnits, caller: Writer) -> models.Stored:
    """Delete some units and store others, in one transaction."""
    store = caller.store(body.namespace)
    given = None if body.embeddings is None else models.as_matrix(body.embeddings, "embeddings")
    ids = await caller.write(
        lambda: store.replace_batch(body.delete_ids, body.units, given, unchanged_since=body.unchanged_since)
    )
    return models.Stored(ids=ids)


@router.post("/units/expiry")
async def set_expiry(body: models.Expiry, caller: Writer) -> models.Number:
    """Set when units expire."""
    store = caller.store(body.namespace)
    count = await caller.write(lambda: store.set_expiry(body.ids, ttl=body.ttl, expires_at=body.expires_at))
    return models.Number(count=count)


@router.post("/count")
async def count_units(body: models.CountUnits, caller: Reader) -> models.Number:
    """Count units."""
    store = caller.store(body.namespace)
    given = () if body.filters is None else (body.filters,)
    return models.Number(count=await caller.read(lambda: store.count(*given)))


@router.post("/facets")
async def facets(body: models.Facets, caller: Reader) -> models.FacetCounts:
    """Count units by the value of a field."""
    store = caller.store(body.namespace)
    found = await caller.read(lambda: store.facets(body.field, body.filters, body.limit))
    return models.FacetCounts(facets=[models.FacetCount(value=value, count=count) for value, count in found])


# Searching


@router.post("/search", response_model=models.Hits)
async def search(body: models.Search, caller: Reader) -> Response:
    """Find units by meaning, by words, or by both; or those nearest to a vector."""
    return Response(await search_answer(body, caller), media_type="application/json")


@router.post("/search/batch", response_model=models.HitsBatch)
async def search_many(body: models.SearchBatch, caller: Reader) -> Response:
    """Run several searches by meaning at once."""
    return Response(await search_batch(body, caller), media_type="application/json")


@router.post("/similarities")
async def similarities(body: models.Similarities, caller: Reader) -> models.Cosines:
    """Compare units with a text."""
    store = caller.store(body.namespace)
    return models.Cosines(similarities=await caller.read(lambda: store.similarities(body.query, body.ids)))


@router.post("/vectors/sample")
async def sample_vectors(body: models.Sample, caller: Reader) -> models.Vectors:
    """Read the vectors of some units, spread evenly over their age."""
    store = caller.store(body.namespace)
    found = await caller.read(lambda: store.sample_vectors(body.count))
    return models.Vectors(vectors={name: packed(vector) for name, vector in found.items()})


@router.get("/access")
async def access_counts(caller: Reader, namespace: Space = "") -> models.AccessCounts:
    """Read how often units were accessed."""
    return models.AccessCounts(counts=await caller.read(caller.store(namespace).access_counts))


@router.get("/access/order")
async def access_order(
    caller: Reader,
    namespace: Space = "",
    kind: Literal["lru", "lfu"] = "lru",
    limit: Annotated[int, Query(ge=0, le=models.MOST_UNITS)] = 100,
) -> models.Stored:
    """List ids by their accesses, the first to forget first."""
    store = caller.store(namespace)
    return models.Stored(ids=await caller.read(lambda: store.access_order(kind, limit)))


# Namespaces


@router.get("/namespaces")
async def namespaces(caller: Reader, prefix: str = "") -> models.Namespaces:
    """List the namespaces that hold units or have limits."""
    found = await caller.read(lambda: caller.store().namespaces(prefix))
    return models.Namespaces(namespaces=[replace(one, path=caller.relative(one.path)) for one in found])


@router.put("/namespaces")
async def set_limits(body: models.Limits, caller: Admin) -> NamespaceInfo:
    """Set the limits of a namespace."""
    store = caller.store(body.namespace)
    named = body.model_dump(include=body.model_fields_set & {"max_units", "default_ttl"})
    info: NamespaceInfo = await caller.write(lambda: store.set_limits(**named))
    return replace(info, path=caller.relative(info.path))


@router.delete("/namespaces")
async def delete_namespace(
    caller: Admin, namespace: Annotated[str, Query(min_length=1, description="The path; those below it stay.")]
) -> models.Number:
    """Delete a namespace with its units and limits."""
    store = caller.store(namespace)
    return models.Number(count=await caller.write(store.delete_namespace))


# Managing


@router.post("/manage/prune")
async def prune(body: models.Prune, caller: Writer) -> models.Managed:
    """Delete the units that match criteria."""
    return await _manage(caller, body, SimpleManagementStrategy().prune)


@router.post("/manage/deduplicate")
async def deduplicate(body: models.Deduplicate, caller: Writer) -> models.Managed:
    """Delete near-duplicates."""
    return await _manage(caller, body, SimpleManagementStrategy().deduplicate)


@router.post("/manage/forget")
async def forget(body: models.Forget, caller: Writer) -> models.Managed:
    """Delete the units that are needed least."""
    return await _manage(caller, body, SimpleManagementStrategy().apply_forgetting)


@router.post("/manage/consolidate")
async def consolidate(body: models.Consolidate, caller: Writer) -> models.Managed:
    """Merge similar units."""
    return await _manage(caller, body, SimpleManagementStrategy().consolidate)


@router.get("/operations")
async def operations(
    caller: Reader,
    namespace: Space = "",
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    before: Annotated[int | None, Query(ge=0)] = None,
) -> models.Operations:
    """List what changed units, newest first; their ids are what undo takes."""
    found = await caller.read(lambda: ability(caller.store(namespace), "operations")(limit, before=before))
    return models.Operations(operations=found)


@router.post("/operations", status_code=201, response_model=dict[str, Any])
async def report_operation(body: models.Report, caller: Writer) -> Response:
    """Report a management operation that a client did itself, so that the index follows."""
    store = caller.store(body.namespace)
    done = await caller.write(lambda: store.register_management_operation(body.operation, body.details))
    return Response(json.dumps(done), 201, media_type="application/json")  # in ASCII: details may hold lone surrogates


@router.post("/undo")
async def undo(body: models.Undo, caller: Writer) -> Operation:
    """Take an operation back."""
    done: Operation = await caller.write(lambda: ability(caller.store(body.namespace), "undo")(body.operation))
    return done


@router.get("/changes")
async def changes(
    caller: Reader,
    namespace: Space = "",
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=models.MOST_UNITS)] = 100,
    below: Annotated[bool, Query(description="True reads the namespaces below this one too.")] = False,
) -> models.Changes:
    """Read what changed after a change number, in order."""
    read = ability(caller.store(namespace), "changes")

    def listed() -> models.Changes:
        found = list(read(after, limit=limit, prefix=() if below else None))
        entries = [models.Change(**{**one._asdict(), "namespace": caller.relative(one.namespace)}) for one in found]
        return models.Changes(changes=entries, next=found[-1].seq if found else after)

    return await caller.read(listed)


# The whole store


@router.get("/health")
async def health(caller: Reader, namespace: Space = "") -> JsonObject:
    """Report fill level, memory, index quality, and recommendations."""
    report: JsonObject = await caller.read(caller.store(namespace).get_storage_health)
    return report


@router.get("/inventory")
async def inventory(caller: Reader, namespace: Space = "") -> JsonObject:
    """Count units, bytes and types, and date the oldest and newest unit."""
    report: JsonObject = await caller.read(caller.store(namespace).inventory)
    return report


@router.get("/stats")
async def stats(caller: Reader, namespace: Space = "") -> JsonObject:
    """Report counts, the index and the plan, file sizes and change numbers."""
    report: JsonObject = await caller.read(ability(caller.store(namespace), "statistics"))
    return report


@router.get("/events")
async def events(caller: Admin) -> models.Events:
    """List the newest events of the store."""
    report = await caller.read(ability(caller.whole("the list of events"), "statistics"))
    return models.Events(events=report["events"])


@router.post("/maintain")
async def maintain(caller: Admin, body: models.Maintain = _DUE) -> JsonObject:
    """Do the maintenance that is due, or train again."""
    store = caller.whole("maintenance")
    again = (
        functools.partial(ability(store, "retrain"), samples=body.samples) if body.retrain else store.run_maintenance
    )
    report: JsonObject = await caller.write(again)
    return report


@router.post("/backup", status_code=201)
async def backup(body: models.Backup, request: Request, caller: Admin) -> models.BackupFile:
    """Copy the store to a file in the server's folder of backups."""
    take = ability(caller.whole("a backup"), "backup")
    found: models.BackupFile = await caller.write(lambda: request.app.state.backups.take(take, body.name))
    return found


@router.get("/backups")
async def backups(request: Request, caller: Admin) -> models.Backups:
    """List the backups in the server's folder."""
    caller.whole("the list of backups")
    return models.Backups(backups=await caller.read(request.app.state.backups.listed))


@router.get("/export", response_class=StreamingResponse)
async def export(
    caller: Reader, namespace: Space = "", filters: FilterText = None, vectors: bool = False
) -> StreamingResponse:
    """Read every unit, oldest first, as JSON lines; with its vector where asked, which import reads again."""
    store, wanted = caller.store(namespace), _filters(filters)
    listing = store.units(wanted)  # a filter that cannot be used is refused before the answer begins

    def lines() -> Iterator[bytes]:
        while page := list(islice(listing, _EXPORTED_AT_ONCE)):
            held = store.vectors_of([unit["id"] for unit in page]) if vectors else {}
            rows = [
                {"unit": unit, "vector": held[unit["id"]].tolist()} if unit["id"] in held else unit for unit in page
            ]
            yield "".join(json_text(row) + "\n" for row in rows).encode()

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@router.post(
    "/import",
    status_code=201,
    openapi_extra={"requestBody": {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
)
async def import_units(request: Request, caller: Writer, namespace: Space = "") -> models.Number:
    """Store units from JSON lines, as export writes them: all of them or none."""
    store, text = caller.store(namespace), await request.body()

    def stored() -> models.Number:
        units, vectors = _parsed_lines(text)
        given = [models.as_matrix(vectors)] if vectors else []
        return models.Number(count=len(store.store_batch(units, *given)))

    return await caller.write(stored)


def _parsed_lines(text: bytes) -> tuple[list[MemoryUnit], list[Json]]:
    units, vectors = list[Any](), list[Any]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidUnitError(f"line {number} is no JSON: {error}; nothing was stored") from None
        if isinstance(row, dict) and set(row) == {"unit", "vector"}:
            vectors.append(row["vector"])
            row = row["unit"]
        if not isinstance(row, dict):
            raise InvalidUnitError(f"line {number} is no JSON object; nothing was stored")
        units.append(row)
    if vectors and len(vectors) != len(units):
        raise InvalidUnitError(f"{len(vectors)} of {len(units)} lines have a vector; give one in each line, or in none")
    return units, vectors


# Shared


async def _changed(caller: Caller, store: Any, unit_id: str, change: Callable[[], bool]) -> Any:
    def done() -> Any:
        return store.retrieve_batch([unit_id]).get(unit_id) if change() else None

    return _there(await caller.write(done), unit_id)


async def _manage(caller: Caller, body: models.Manage, manage: Callable[..., Any]) -> models.Managed:
    store, options = caller.store(body.namespace), body.model_dump(exclude={"namespace"})
    result = await caller.write(lambda: manage(store, **options))
    if isinstance(result, list):
        return models.Managed(dry_run=body.dry_run, count=len(result), units=result)
    notes = dict(getattr(result, "notes", {}))
    return models.Managed(dry_run=body.dry_run, count=result[0], ids=list(result[1]), notes=notes)


def _there(found: Any, unit_id: str) -> Any:
    if found is None:
        raise HTTPException(404, f"unit_id: there is no unit {unit_id!r} here; list them with GET /v1/units")
    return found


def _filters(text: str | None) -> JsonObject | None:
    if text is None or not text.strip():
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidFilterError(f'filters must be JSON such as {{"type": "skill"}}: {error}') from None
    if not isinstance(found, dict):
        raise InvalidQueryError('filters must be a JSON object such as {"type": "skill"}')
    return found
