"""Commands that write: init, add, update, delete, import, copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from .app import InputError, Interrupted, NotFoundError, StoreExistsError
from .files import (
    Exported,
    bulk_into,
    embedded,
    is_legacy,
    json_object,
    nothing_stored,
    read_exported,
    read_old,
    read_text,
    read_units,
)
from .options import (
    AsJson,
    Embedder,
    EmbedderName,
    IndexType,
    IndexTypeName,
    Metric,
    MetricName,
    Prefix,
    StoredModel,
    choose_embedder,
    exists,
    file_argument,
    open_existing,
    open_or_create,
    stored_model,
)
from .output import HeldInterrupt, Output, Report, held_interrupt
from .read_commands import missing

if TYPE_CHECKING:
    from ..components.store.copy import CopyReport
    from ..types import MemoryUnit
    from ..utils.embeddings import EmbeddingFunction


def copy(
    source: Annotated[str, file_argument("FROM", "Path prefix, or milvus://host:port/collection.")],
    target: Annotated[str, file_argument("TO", "The same; created when there is no store.")],
    *,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace units of TO that have an id of FROM's and other content.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a store to another place or backend and verify the copy. After an interruption the same command continues.

    A new store gets the dimension, metric and model of FROM.
    """
    from ..components.store.copy import copy_store

    output = Output(as_json)
    if _canonical(source) == _canonical(target):
        raise InputError(f"TO: it is the same store as FROM, {source!r}; name another")
    with _continuable(), open_existing(source, None) as read:
        model = StoredModel(stored_model(source), read.embedding_dim)
        with (
            held_interrupt() as held,  # until a page is stored, so that a store that was created is not left empty
            open_or_create(target, model, metric=cast("MetricName", read.metric)) as written,
            output.progress("copying") as report,
        ):
            done = copy_store(read, written, replace=replace, progress=_after_a_page(held, report))
        output.show(done.as_dict(), *_copied(done, source, target))


@contextmanager
def _continuable() -> Iterator[None]:
    """Say at Ctrl-C what becomes of a copy."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the pages before are stored, and the same command continues") from None


def _after_a_page(held: HeldInterrupt, report: Report) -> Report:
    def told(stage: str, share: float) -> None:
        held.release()
        report(stage, share)

    return told


def _canonical(place: str) -> str:
    from ..utils.config import MilvusConfig, is_milvus_uri

    return MilvusConfig.at(place).address if is_milvus_uri(place) else os.path.realpath(place)


def _copied(done: CopyReport, source: str, target: str) -> list[str]:
    lines = [
        f"copied {done.copied} units from {source} to {target}, {done.present} were there already",
        f"verified: {done.count} units and ids, {done.vectors_compared} vectors bit by bit, in {done.seconds:.1f} s",
    ]
    if done.replaced or done.removed:
        lines.append(f"replaced {done.replaced} and removed {done.removed} that changed")
    if done.others:
        lines.append(f"{done.others} other units of {target} are unchanged")
    if done.recall_before is not None and done.recall_after is not None:
        lines.append(f"recall@10 before {done.recall_before:.3f}, after {done.recall_after:.3f}")
    return lines


def init(
    *,
    store: Prefix,
    embedder: Embedder = "auto",
    metric: Metric = None,
    index_type: IndexType = None,
    as_json: AsJson = False,
) -> None:
    """Create an empty store, and its folder. Exits with 1 when there is a store already, and changes nothing then."""
    if exists(store):
        raise StoreExistsError(f"there is a store at {store!r} already; use it, or name another with --store")
    function = choose_embedder(embedder, None)
    with open_or_create(store, function, index_type, metric) as opened:
        document = {
            "store": store,
            "dim": opened.embedding_dim,
            "metric": opened.metric,
            "index_type": opened.index_type,
            "model": getattr(function, "model_name", None),
            "count": opened.count(),
        }
    texts = [f"created the store {store}: {document['dim']} dimensions, metric {document['metric']}"]
    if index_type is not None:
        texts.append(f"for later commands set MEMEVOLVE_STORAGE_INDEX_TYPE={index_type}")
    Output(as_json).show(document, *texts)


def add(
    file: Annotated[str, file_argument("FILE.jsonl", "One unit on each line, as JSON; - is stdin.")],
    *,
    store: Prefix,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", show_default=False, min=1, help="Commit after this many units, not all at once."),
    ] = None,
    embedder: Embedder = "auto",
    metric: Metric = None,
    index_type: IndexType = None,
    as_json: AsJson = False,
) -> None:
    """Store the units of a file; the store is created when there is none. A unit whose id exists is replaced.

    The file is read and checked first, and then stored in one transaction, all or nothing. With --batch-size the
    batches before an error stay, and the message says how many units that is.
    """
    output, numbered = Output(as_json), iter(read_units(file))
    function = choose_embedder(embedder, stored_model(store))
    with nothing_stored(file):
        first = list(islice(numbered, batch_size))
        units = [unit for _, unit in first]
        vectors = None if exists(store) else embedded(function, units, output)
    with (
        held_interrupt() if vectors else nullcontext(HeldInterrupt()) as held,  # a created store is not left empty
        open_or_create(store, function, index_type, metric) as opened,
        bulk_into(opened, output, file) as bulk,
    ):
        bulk.put(units, vectors, first[-1][0] if batch_size and first else 0)
        held.release()
        bulk.put_batches(numbered, batch_size or 1)
        bulk.finish("added")


def update(
    unit_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the unit.")],
    file: Annotated[str | None, file_argument("FILE.json", "The new unit as JSON; - is stdin.")] = None,
    *,
    store: Prefix,
    unit: Annotated[
        str | None, typer.Option("--unit", show_default=False, metavar="JSON", help="The new unit.")
    ] = None,
    content: Annotated[
        str | None,
        typer.Option("--content", show_default=False, metavar="TEXT", help="A new content; all else stays."),
    ] = None,
    embedder: Embedder = "auto",
    as_json: AsJson = False,
) -> None:
    """Replace a unit: by a file, by --unit, or only its content by --content."""
    if sum(given is not None for given in (file, unit, content)) != 1:
        raise InputError("update: give exactly one of FILE.json, --unit and --content")
    changes = {"content": content} if content is not None else _whole_unit(unit_id, file, unit)
    with open_existing(store, embedder) as opened:
        old = opened.retrieve(unit_id)
        if old is None or not opened.update(unit_id, changes if content is None else {**old, **changes}):
            raise NotFoundError(f"no unit with the id {unit_id!r}; store it with add")
        new = opened.retrieve(unit_id)
    Output(as_json).show({"id": unit_id, "updated": True, "unit": new}, f"updated {unit_id}")


def _whole_unit(unit_id: str, file: str | None, text: str | None) -> MemoryUnit:
    where = "--unit" if file is None else ("stdin" if file == "-" else file)
    unit = json_object(text if text is not None else read_text(file or "-"), where)
    if unit.get("id", unit_id) != unit_id:
        raise InputError(f"{where}: its id {unit['id']!r} is not {unit_id!r}; remove the id or make them equal")
    return unit


def delete(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of units.")],
    *,
    store: Prefix,
    as_json: AsJson = False,
) -> None:
    """Delete units in one transaction. Exits with 3 when one of the ids is unknown; the others are deleted."""
    with open_existing(store, None) as opened:
        unknown = [unit_id for unit_id in dict.fromkeys(ids) if not opened.exists(unit_id)]
        deleted = opened.delete_batch(dict.fromkeys(ids))
    missing(Output(as_json), {"deleted": deleted}, unknown, f"deleted {deleted} unit{'' if deleted == 1 else 's'}")


def import_file(
    file: Annotated[str, file_argument("FILE", "What export wrote, - for stdin, an old PREFIX.data, or see --from.")],
    *,
    store: Prefix,
    source: Annotated[
        Literal["chroma", "faiss-langchain", "jsonl", "lancedb", "mem0", "parquet", "qdrant"] | None,
        typer.Option("--from", show_default=False, help="FILE is what this wrote: a folder, or a file."),
    ] = None,
    collection: Annotated[
        str | None, typer.Option("--collection", show_default=False, help="With --from: the collection or table.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="With --from: replace units of the same id and other content.")
    ] = False,
    embedder: Embedder = "auto",
    metric: Metric = None,
    index_type: IndexType = None,
    as_json: AsJson = False,
) -> None:
    """Store what export wrote, or the units of an old MemEvolve store (its .data file), all or nothing.

    Ids, time stamps, namespaces and times of expiry are kept, and vectors if the file has them; they must be of the
    store's model. The units of each namespace are one transaction. With --from the
    entries are stored page by page and compared id by id; after an interruption the same command continues.
    """
    output = Output(as_json)
    if source is not None:
        _import_from(source, file, store, collection, replace, embedder, metric, index_type, output)
        return
    if collection is not None or replace:
        raise InputError("--collection and --replace belong to --from; leave them out, or name the format with --from")
    with nothing_stored(file):
        lines, problems = read_old(file) if is_legacy(file) else (read_exported(file), [])
    vectors = [line.vector for line in lines if line.vector is not None]
    function = _embedder_for(lines, embedder, stored_model(store))
    with nothing_stored(file):
        units = [line.unit for line in lines]
        if not vectors and not exists(store):
            vectors = embedded(function, units, output)
    with (
        held_interrupt() if vectors else nullcontext(HeldInterrupt()) as held,
        open_or_create(store, function, index_type, metric) as opened,
        bulk_into(opened, output, file) as bulk,
    ):
        bulk.put_lines(lines, vectors)
        held.release()
        for problem in problems:
            output.note(f"warning: {problem}")
        bulk.finish("imported", problems=problems)


def _import_from(
    kind: str,
    path: str,
    prefix: str,
    collection: str | None,
    replace: bool,
    embedder: EmbedderName,
    metric: MetricName | None,
    index_type: IndexTypeName | None,
    output: Output,
) -> None:
    from ..integrations.importers import import_into, open_source

    source = open_source(kind, path, collection)
    dim, model = source.dimension(), stored_model(prefix)
    function = choose_embedder(embedder, model) if dim is None else StoredModel(model, dim)
    if metric is None and source.metric is not None and not exists(prefix):
        metric = cast("MetricName", source.metric)
    with _continuable():
        with held_interrupt() as held, open_or_create(prefix, function, index_type, metric) as opened:
            with output.progress("importing") as report:
                done = import_into(opened, source, replace=replace, progress=_after_a_page(held, report))
            held.release()
            if opened.get_storage_health()["needs_retraining"]:
                with output.progress("building the index") as report:
                    opened.run_maintenance(report)
            count = opened.count()
        output.show(
            {**done.as_dict(), "count": count},
            f"imported {done.imported} units from {path}, {done.present} were there already, {done.replaced} replaced",
            f"verified: {done.verified} units and ids, {done.vectors_compared} vectors bit by bit, "
            f"in {done.seconds:.1f} s",
        )


def _embedder_for(lines: list[Exported], name: EmbedderName, model: str | None) -> EmbeddingFunction:
    """Return the embedder; where every line has a vector, none is loaded."""
    first = lines[0] if lines else None
    if first is None or first.vector is None:
        return choose_embedder(name, model)
    return StoredModel(first.model, int(first.vector.size))
