"""Commands that write: init, add, update, delete, import, copy."""

from __future__ import annotations

import os
from typing import Annotated, Any, Optional

import typer

from ..backends import AnyStore
from ..components.store.copy import CopyReport, copy_store
from ..types import MemoryUnit
from ..utils.config import MilvusConfig, is_milvus_uri
from .app import InputError, NotFoundError, StoreExistsError
from .files import (
    Exported,
    add_batches,
    add_whole,
    bulk_into,
    json_value,
    looks_legacy,
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
    KeptModel,
    Metric,
    MetricName,
    Prefix,
    choose_embedder,
    exists,
    open_existing,
    open_or_make,
    remembered_model,
    store_at,
)
from .output import Output
from .read_commands import missing

__all__ = ["add", "copy", "delete", "import_file", "init", "update"]


def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="Path prefix, or milvus://host:port/collection.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The same; made when there is no store.")],
    *,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace units of TO that have an id of FROM's and other content.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a store to another place or backend and verify the copy. Interrupted, the same command goes on."""
    output = Output(as_json)
    if _canonical(source) == _canonical(target):
        raise InputError(f"TO: it is the same store as FROM, {source!r}; name another")
    with (
        open_existing(source, None) as read,
        _opened_for(target, read, source) as written,
        output.progress("copying") as report,
    ):
        done = copy_store(read, written, replace=replace, progress=report)
    output.show(done.as_dict(), *_told(done, source, target))


def _opened_for(target: str, source: AnyStore, place: str) -> AnyStore:
    """The target: a new one has the source's dimension, metric and model."""
    model = KeptModel(remembered_model(place), source.embedding_dim)
    return open_or_make(target, model, metric=MetricName(source.metric))


def _canonical(place: str) -> str:
    return MilvusConfig.at(place).address if is_milvus_uri(place) else os.path.realpath(place)


def _told(done: CopyReport, source: str, target: str) -> list[str]:
    lines = [
        f"copied {done.copied} units from {source} to {target}, {done.present} were there already",
        f"verified: {done.count} units and ids, {done.vectors_compared} vectors bit by bit, in {done.seconds:.1f} s",
    ]
    if done.replaced or done.removed:
        lines.append(f"replaced {done.replaced} and removed {done.removed} that changed")
    if done.others:
        lines.append(f"{done.others} other units of {target} were left alone")
    if done.recall_before is not None and done.recall_after is not None:
        lines.append(f"recall@10 before {done.recall_before:.3f}, after {done.recall_after:.3f}")
    return lines


def init(
    *,
    store: Prefix = None,
    embedder: Embedder = EmbedderName.AUTO,
    metric: Metric = None,
    index_type: IndexType = None,
    as_json: AsJson = False,
) -> None:
    """Make an empty store. Exits with 1 when there is one already; nothing is changed then."""
    prefix = store_at(store)
    if exists(prefix):
        raise StoreExistsError(f"there is a store at {prefix!r} already; use it, or name another with --store")
    function = choose_embedder(embedder, None)
    with open_or_make(prefix, function, index_type, metric) as opened:
        document = {
            "store": prefix,
            "dim": opened.embedding_dim,
            "metric": opened.metric,
            "index_type": opened.index_type,
            "model": getattr(function, "model_name", None),
            "count": opened.count(),
        }
    texts = [f"made the store {prefix}: {document['dim']} dimensions, metric {document['metric']}"]
    if index_type is not None:
        texts.append(f"for later commands set MEMEVOLVE_STORAGE_INDEX_TYPE={index_type.value}")
    Output(as_json).show(document, *texts)


def add(
    file: Annotated[str, typer.Argument(metavar="FILE.jsonl", help="One unit a line, as JSON; - is stdin.")],
    *,
    store: Prefix = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--batch-size", show_default=False, min=1, help="Commit after this many units, instead of all or nothing."
        ),
    ] = None,
    embedder: Embedder = EmbedderName.AUTO,
    metric: Metric = None,
    index_type: IndexType = None,
    as_json: AsJson = False,
) -> None:
    """Store the units of a file; the store is made when there is none. An id that is there already is replaced.

    The file is read and checked before anything is stored, and stored in one transaction: all of it is in, or nothing.
    With --batch-size the batches before a mistake stay in, and the message says how many units that is.
    """
    output, prefix = Output(as_json), store_at(store)
    units: list[MemoryUnit] = []
    if not batch_size:
        with nothing_stored(file):
            units = [unit for _, unit in read_units(file)]
    function = choose_embedder(embedder, remembered_model(prefix))
    with open_or_make(prefix, function, index_type, metric) as opened, bulk_into(opened, output, file) as bulk:
        if batch_size:
            add_batches(bulk, read_units(file), batch_size)
        else:
            add_whole(bulk, units)
        bulk.finish("added")


def update(
    unit_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the unit.")],
    file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[FILE.json]", help="The new unit as JSON; - is stdin.", show_default=False),
    ] = None,
    *,
    store: Prefix = None,
    unit: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--unit", show_default=False, metavar="JSON", help="The new unit."),
    ] = None,
    content: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--content", show_default=False, metavar="TEXT", help="Only a new content; all else stays."),
    ] = None,
    embedder: Embedder = EmbedderName.AUTO,
    as_json: AsJson = False,
) -> None:
    """Replace a unit: by a file, by --unit, or only its content by --content."""
    if sum(given is not None for given in (file, unit, content)) != 1:
        raise InputError("update: give exactly one of FILE.json, --unit and --content")
    changes = {"content": content} if content is not None else _whole_unit(unit_id, file, unit)
    with open_existing(store_at(store), embedder) as opened:
        old = opened.retrieve(unit_id)
        if old is None or not opened.update(unit_id, changes if content is None else {**old, **changes}):
            raise NotFoundError(f"no unit with the id {unit_id!r}; store it with add")
        new = opened.retrieve(unit_id)
    Output(as_json).show({"id": unit_id, "updated": True, "unit": new}, f"updated {unit_id}")


def delete(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of units.")],
    *,
    store: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Delete units in one transaction. Exits with 3 when one of the ids is unknown; the others are deleted."""
    with open_existing(store_at(store), None) as opened:
        unknown = [unit_id for unit_id in dict.fromkeys(ids) if not opened.exists(unit_id)]
        deleted = opened.delete_batch(dict.fromkeys(ids))
    missing(Output(as_json), {"deleted": deleted}, unknown, f"deleted {deleted} unit{'' if deleted == 1 else 's'}")


def import_file(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What export wrote, - for stdin, or an old PREFIX.data.")],
    *,
    store: Prefix = None,
    embedder: Embedder = EmbedderName.AUTO,
    metric: Metric = None,
    index_type: IndexType = None,
    as_json: AsJson = False,
) -> None:
    """Take over what export wrote, or the units of an old MemEvolve store (its .data file), all or nothing.

    Ids and time stamps stay, and vectors where the file has them; they must come from the model that filled the store.
    """
    output, prefix = Output(as_json), store_at(store)
    with nothing_stored(file):
        lines, problems = read_old(file) if looks_legacy(file) else (read_exported(file), [])
    vectors = [line.vector for line in lines if line.vector is not None]
    function = _embedder_for(lines, embedder, remembered_model(prefix))
    with open_or_make(prefix, function, index_type, metric) as opened, bulk_into(opened, output, file) as bulk:
        add_whole(bulk, [line.unit for line in lines], vectors or None)
        for problem in problems:
            output.note(f"warning: {problem}")
        bulk.finish("imported", problems=problems)


def _embedder_for(lines: list[Exported], name: EmbedderName, held: str | None) -> Any:
    """None of the models is asked when every line brings its vector."""
    first = lines[0] if lines else None
    if first is None or first.vector is None:
        return choose_embedder(name, held)
    return KeptModel(first.model, int(first.vector.size))


def _whole_unit(unit_id: str, file: str | None, text: str | None) -> MemoryUnit:
    where = "--unit" if file is None else ("stdin" if file == "-" else file)
    value = json_value(text if text is not None else read_text(file or "-"), where)
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(value).__name__}")
    if value.get("id", unit_id) != unit_id:
        raise InputError(f"{where}: its id {value['id']!r} is not {unit_id!r}; leave the id out or make them equal")
    return value
