"""Commands that read: search, get, list, stats, health, export, embed, devices."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DimensionMismatchError, ModelMismatchError
from ..utils.drafts import PRIVATE
from .app import ExitCode, InputError
from .files import export_line, refuse_missing_folder, write_lines
from .options import (
    AsJson,
    Conditions,
    Embedder,
    FilterJson,
    Prefix,
    choose_embedder,
    file_argument,
    open_existing,
    parse_filters,
    stored_model,
)
from .output import Output, Rows, bar, one_line, printable

if TYPE_CHECKING:  # imported where they are used: --help needs none of them
    from ..backends import AnyStore
    from ..components.retrieve import RetrievalStrategy
    from ..components.store.base import StorageBackend
    from ..devices.selection import Machine
    from ..types import FloatArray, Json, JsonObject, MemoryUnit
    from ..utils.embeddings import Embedder as Checked


def embed(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to embed.")],
    *,
    store: Prefix,
    embedder: Embedder = "auto",
    as_json: AsJson = False,
) -> None:
    """Embed texts, to test whether the embedder works and fits the store.

    With --json the vectors are printed; for people the model, the dimension and how similar the texts are. Exits with 6
    when the embedder fails, or when the store has vectors of another model. Stores nothing.
    """
    import numpy as np

    from ..utils.embeddings import Embedder as Checked

    held = stored_model(store)
    checked = Checked(choose_embedder(embedder, held))
    started = time.perf_counter()
    vectors = checked.embed_many(texts)
    seconds = time.perf_counter() - started
    refuse_misfit(store, checked, held)
    document = {
        "model": checked.model_name,
        "dimension": vectors.shape[1],
        "seconds": seconds,
        "vectors": vectors.tolist(),
    }
    lengths = np.linalg.norm(vectors, axis=1)
    scaled = vectors / np.where(lengths > 0, lengths, 1)[:, None]
    figures = zip(lengths.tolist(), (scaled @ scaled[0]).tolist(), texts, strict=True)
    rows = [[f"{length:.4f}", f"{cosine:.4f}", text] for length, cosine, text in figures]
    summary = f"{checked.model_name or 'a model without a name'}: {vectors.shape[1]} numbers, {seconds * 1e3:.1f} ms"
    Output(as_json).show(document, summary, Rows(("length", "cosine to first", "text"), rows))


def refuse_misfit(prefix: str, checked: Checked, held: str | None) -> None:
    """Raise what opening the store with this embedder would raise."""
    from ..components.store.vector_store import VectorStore
    from ..records import Records

    if not VectorStore.exists_at(prefix):
        return
    facts = Records.peek(prefix)
    if facts is not None and facts.dim != checked.dimension:
        raise DimensionMismatchError(facts.dim, checked.dimension, f"the store {prefix} was filled by another model")
    if held and checked.model_name and held != checked.model_name:
        raise ModelMismatchError(
            f"the store {prefix} was filled by the embedding model {held!r}, this is {checked.model_name!r}"
        )


def devices(*, as_json: AsJson = False) -> None:
    """List the GPUs, their free memory, the installed engines, and the device that DEVICE selects."""
    from ..components.store.session import this_machine
    from ..utils.config import StorageConfig

    config = StorageConfig()
    machine = this_machine(config)
    found, choice = machine.gpus(), machine.choice
    document = {
        "gpus": [
            {
                "device": gpu.device,
                "name": gpu.name,
                "compute_capability": ".".join(map(str, gpu.capability)),
                "total_mb": gpu.total_mb,
                "free_mb": gpu.free_mb,
                "problem": gpu.problem or None,
            }
            for gpu in found.gpus
        ],
        "driver": found.driver or None,
        "problem": found.problem or None,
        "engines": {engine: problem or "installed" for engine, problem in machine.engines().items()},
        "requested": machine.request,
        "chosen": choice.device,
        "reason": choice.reason,
        "budget": machine.budget().as_dict(),
    }
    Output(as_json).show(document, *_texts(document, machine))


def _texts(document: JsonObject, machine: Machine) -> list[str | Rows]:
    titles = ("device", "name", "capability", "total MB", "free MB", "problem")
    rows = [[str(value or "-") for value in gpu.values()] for gpu in document["gpus"]]
    budget = machine.budget()
    figures = [
        ["driver", document["driver"] or "-"],
        ["searches run on", document["chosen"]],
    ]
    figures += [[f"engine {name}", state] for name, state in document["engines"].items()]
    figures += [["memory limit", f"{budget.limit >> 20} MB of {budget.total >> 20} MB, {budget.free >> 20} MB free"]]
    listed: str | Rows = Rows(titles, rows) if rows else f"no GPU: {document['problem']}"
    why = f"device: {document['chosen']}: {document['reason']}"
    return [listed, "", Rows(("figure", "value"), figures), "", one_line(why)]


_PROGRESS_EVERY = 100
_PAGE = 1000
_LAST = sys.maxsize
"""The largest stop of ``islice``."""
_IN_FULL = (
    "events",
    "index.reason",
    "plan.reason",
    "plan.notes",
    "device.reason",
    "device.problem",
)
"""Left out of the tables for people: mostly sentences, which stats prints in full below its table."""


def search(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text to search for.")],
    *,
    store: Prefix,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Most units to return.")] = 5,
    condition: Conditions = None,
    filters: FilterJson = None,
    recall: Annotated[
        float | None,
        typer.Option(
            "--recall",
            show_default=False,
            help="Recall to reach, above 0 and at most 1 (exact).  \\[default: MEMEVOLVE_STORAGE_TARGET_RECALL]",
        ),
    ] = None,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Search by meaning and by keywords together.")] = False,
    keyword: Annotated[bool, typer.Option("--keyword", help="Search by keywords; needs no embedder.")] = False,
    embedder: Embedder = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the units nearest in meaning to a text, or those that share its words, or both."""
    from ..components.retrieve import HybridRetrievalStrategy, KeywordRetrievalStrategy

    if hybrid and keyword:
        raise InputError("--hybrid and --keyword: give one of them")
    if recall is not None and (hybrid or keyword):
        raise InputError("--recall applies to the search by meaning only; leave it out")
    selected = parse_filters(condition, filters)
    with open_existing(store, None if keyword else embedder) as opened:
        if hybrid or keyword:
            strategy: RetrievalStrategy = KeywordRetrievalStrategy() if keyword else HybridRetrievalStrategy()
            results = strategy.retrieve(text, opened, top_k, selected)
            hits = [
                {"id": hit.unit_id, "score": hit.score, **(hit.metadata or {}), "unit": hit.unit} for hit in results
            ]
        else:
            found = opened.search_units(text, top_k, selected, recall)
            hits = [{"id": hit.id, "distance": hit.distance, "score": hit.score, "unit": hit.unit} for hit in found]
    numbers = ("score",) if hybrid or keyword else ("distance", "score")
    rows = [[*(f"{hit[name]:.4f}" for name in numbers), *_row(hit["unit"])] for hit in hits]
    shown: str | Rows = Rows((*numbers, "id", "type", "content"), rows) if rows else "nothing found"
    Output(as_json).show({"query": text, "hits": hits}, shown)


def get(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of units.")],
    *,
    store: Prefix,
    as_json: AsJson = False,
) -> None:
    """Print units as they are stored. Exits with 3 when one of the ids is unknown; the others are printed."""
    with open_existing(store, None) as opened:
        found = {unit_id: opened.retrieve(unit_id) for unit_id in dict.fromkeys(ids)}
    units = [unit for unit in found.values() if unit is not None]
    texts = [printable(json.dumps(unit, ensure_ascii=False, indent=2)) for unit in units]
    missing(Output(as_json), {"units": units}, [name for name, unit in found.items() if unit is None], *texts)


def list_units(
    *,
    store: Prefix,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most units to print.")] = 20,
    offset: Annotated[int, typer.Option("--offset", min=0, help="Units to skip first.")] = 0,
    condition: Conditions = None,
    filters: FilterJson = None,
    as_json: AsJson = False,
) -> None:
    """List units, oldest first."""
    selected = parse_filters(condition, filters)
    with open_existing(store, None) as opened:
        units = list(islice(opened.units(selected), min(offset, _LAST), min(offset + limit + 1, _LAST)))
        count = opened.count()
    more, units = len(units) > limit, units[:limit]
    document = {"units": units, "offset": offset, "limit": limit, "more": more, "count": count}
    texts: list[str | Rows] = [Rows(("id", "type", "content"), [_row(unit) for unit in units])] if units else []
    texts.append(_page_line(offset, len(units), count, more=more, filtered=selected is not None))
    Output(as_json).show(document, *texts)


All = Annotated[bool, typer.Option("--all", help="Print every figure.")]


def stats(*, store: Prefix, every: All = False, as_json: AsJson = False) -> None:
    """Show counts, the index and the plan for it with its reason, files and recent events."""
    with open_existing(store, None, as_served=True) as opened:
        document = opened.statistics()
    whys = [one_line(why) for why in _whys(document, every=every)]
    if every:
        shown: list[str | Rows] = [_all_figures(document), "", *whys]
    else:
        shown = [Rows(("figure", "value"), _summary(document), whole=True), "", *whys]
    Output(as_json).show(document, *shown)


def health(*, store: Prefix, every: All = False, as_json: AsJson = False) -> None:
    """Show how full the store is, the quality of its index and what to do next.

    Exits with 1 when the store's file is damaged, and with 4 when the store is full.
    """
    with open_existing(store, None) as opened:
        document = opened.get_storage_health()
    advice = [one_line(sentence.replace(*_FOR_PEOPLE)) for sentence in document["recommendations"]]
    texts = [f"- {sentence}" for sentence in advice] or ["Nothing needs to be done."]
    table = _all_figures(document) if every else Rows(("figure", "value"), _condition(document), whole=True)
    Output(as_json).show(document, table, "", *map(one_line, _problem(document)), *texts)
    if document.get("damage"):
        raise typer.Exit(ExitCode.FAILED)
    if document.get("at_limit"):
        raise typer.Exit(ExitCode.CAPACITY)


_FOR_PEOPLE = ("call run_maintenance()", "run memevolve-store maintain")
"""What a recommendation says in Python, and on the command line."""


def _condition(found: Mapping[str, Json]) -> list[list[str]]:
    count, most = found["current_count"], found["max_units"]
    used, limit = found["memory_usage_mb"], found["max_memory_mb"]
    full = "full: new units are refused" if found["at_limit"] else "close to a limit"
    state = "damaged" if found.get("damage") else full if found["at_limit"] or found["near_limit"] else "good"
    rows = [
        ["state", state],
        ["units", f"{bar(found['usage_percentage'])}  {count:,} of {most:,}"],
        ["memory", f"{bar(used / limit)}  {used:,.1f} of {limit:,.0f} MB"],
        ["files", f"{found['disk_mb']:,.1f} MB on disk, {found['mapped_mb']:,.1f} MB of them mapped"],
        ["quality", f"{bar(found['training_quality_score'])}  of what exact search finds"],
        ["index", _lists(found)],
    ]
    if found["index_lag"]:
        rows.append(["waiting", f"{found['index_lag']:,} changes are stored and not in the index yet"])
    latency = found.get("latency")
    if latency:
        rows.append(["searches", f"median {latency['p50_ms']:.2f} ms, 99th percentile {latency['p99_ms']:.2f} ms"])
    return rows + _gpu(found)


def _lists(found: Mapping[str, Json]) -> str:
    status, lists = found["performance_status"], found["current_nlist"]
    if not lists:
        return f"{status}: no lists are in use"
    return f"{status}: {lists} lists, {found['vectors_per_centroid']:.0f} vectors in each"


def _gpu(found: Mapping[str, Json]) -> list[list[str]]:
    """Return the row about the GPU, if there is one or it was requested."""
    device = found.get("device") or {}
    if device.get("device", "cpu") == "cpu" and not device.get("problem") and not device.get("unmet"):
        return []
    place = f"{device['device']} {device['name'] or ''}".strip()
    return [["device", f"{place} by {device['engine']}, {device['measured_bytes'] >> 20} MB"]]


def _summary(found: Mapping[str, Json]) -> list[list[str]]:
    index, files = found["index"], found.get("files") or {}
    model = found.get("embedding_model") or "of a model without a name"
    rows = [
        ["units", f"{found['count']:,}"],
        ["vectors", f"{found['dim']} numbers, {model}, distance {found['metric']}"],
    ]
    if "kind" in index:
        rows.append(["index", f"{_place(index)}, {index['rows']:,} rows, {found['tail_rows']:,} newer ones"])
        used, limit = found["memory_bytes"], found["max_memory_bytes"]
        rows.append(["memory", f"{bar(used / limit)}  {used / 2**20:,.1f} of {limit >> 20:,} MB"])
    if files:
        parts = (f"{name} {size / 2**20:,.1f} MB" for name, size in files.items())
        rows.append(["files", ", ".join(parts)])
    if "probed_recall" in found:
        recall = found["probed_recall"]
        seen = f"{found['queries_sampled']:,} kept to measure recall"
        rows.append(["queries", seen if recall is None else f"{seen}, recall {recall:.3f} when last measured"])
    events = found.get("events") or []
    if events:
        rows.append(["last event", f"{events[-1]['kind']}: {events[-1]['cause']}"])
    return rows + _gpu(found)


def _all_figures(document: Mapping[str, Json]) -> Rows:
    left_out = ("recommendations", *_IN_FULL)
    rows = [[name, _cell(value)] for name, value in _flat(document) if name not in left_out]
    for row in rows:
        if row[0] == "usage_percentage":  # MemEvolve's name of a share
            row[1] = f"{document['usage_percentage']:.1%}"
    return Rows(("figure", "value"), rows, whole=True)


def export(
    file: Annotated[str, file_argument("FILE", "File to write: JSON lines, - is stdout, or FILE.parquet.")],
    *,
    store: Prefix,
    vectors: Annotated[bool, typer.Option("--vectors", help="Write each unit's vector too; import reads it.")] = False,
    subtree: Annotated[
        bool, typer.Option("--subtree", help="Write the units of the namespaces below this one too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file without asking.")] = False,
    condition: Conditions = None,
    filters: FilterJson = None,
    as_json: AsJson = False,
) -> None:
    """Write units to a file, oldest first: JSON lines, or Parquet with vectors when its name ends in .parquet.

    The file appears complete or not at all. JSON lines keep the time at which a unit expires.
    Before it replaces a file it asks; without a terminal to ask on it refuses, unless --force is given.
    """
    from ..records.file_lock import file_mode
    from ..records.opening import database_path
    from ..utils.config import is_milvus_uri

    output, prefix = Output(as_json), store
    asked = parse_filters(condition, filters)
    refuse_missing_folder(file)
    if not force:
        _may_replace(file)
    if subtree and file.endswith(".parquet"):
        raise InputError("--subtree writes JSON lines; a Parquet file holds one namespace")
    with open_existing(prefix, None) as opened, output.progress("exporting") as report:
        below = _namespaces_below(opened)
        stores: dict[tuple[str, ...], StorageBackend] = {(): opened, **(below if subtree else {})}
        total = max(1, sum(one.count() for one in stores.values()))

        def told(count: int) -> None:
            if count % _PROGRESS_EVERY == 0:
                report(f"exporting {count} units", count / total)

        if file.endswith(".parquet"):
            count = _export_parquet(file, opened, asked, prefix)
            output.show({"exported": count, "file": file, "vectors": True}, f"exported {count} units to {file}")
            return
        mode = PRIVATE if is_milvus_uri(prefix) else file_mode(database_path(prefix))
        count = write_lines(file, _export_lines(stores, asked, prefix if vectors else None), told, mode)
    if below and not subtree:
        output.note(f"{len(below)} namespaces below this one are not in it; --subtree adds them")
    if file == "-":
        output.note(f"exported {count} units")
    else:
        output.show({"exported": count, "file": file, "vectors": vectors}, f"exported {count} units to {file}")


def _export_parquet(file: str, store: AnyStore, filters: JsonObject | None, prefix: str) -> int:
    from ..integrations.importers import write_parquet
    from ..records import canonical, matches

    canonical(filters)
    rows = ((unit, vector) for unit, vector in store.export_rows() if matches(filters, unit))
    return write_parquet(file, rows, stored_model(prefix), store.expiries)


def _may_replace(file: str) -> None:
    if file == "-" or not os.path.isfile(file):  # noqa: PTH113 - another kind of file is refused when it is written
        return
    if sys.stdin.isatty():
        sys.stderr.write(f"{one_line(file)} exists. Replace it? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise InputError(f"{file} exists; name another file, or add --force to replace it")


def missing(output: Output, document: Mapping[str, Json], ids: list[str], *texts: str | Rows) -> None:
    """Show the result, and exit with 3 when some ids are unknown."""
    if not ids:
        output.show({**document, "missing": []}, *texts)
        return
    error = f"no unit with the id{'s' if len(ids) > 1 else ''} {', '.join(map(repr, ids))}"
    output.show({**document, "missing": ids, "error": error, "type": "NotFoundError"}, *texts)
    if not output.as_json:
        output.fail(error, "NotFoundError")
    raise typer.Exit(ExitCode.NOT_FOUND)


def _namespaces_below(store: StorageBackend) -> dict[tuple[str, ...], StorageBackend]:
    """The namespaces with units below that of the store, by relative path."""
    from ..components.store.copy import namespaces_below

    return {path: store.namespace(*path) for path, info in namespaces_below(store).items() if path and info.count}


def _export_lines(
    stores: Mapping[tuple[str, ...], StorageBackend], filters: JsonObject | None, vectors_of: str | None
) -> Iterator[str]:
    """Return the lines of an export of these namespaces, with vectors when the prefix of the store is given."""
    from ..records import canonical, matches

    canonical(filters)
    model = None if vectors_of is None else stored_model(vectors_of)
    for path, store in stores.items():
        rows: Iterator[tuple[MemoryUnit, FloatArray | None]]
        if vectors_of is None:
            rows = ((unit, None) for unit in store.units(filters))
        else:
            rows = (row for row in store.export_rows() if matches(filters, row[0]))
        while page := list(islice(rows, _PAGE)):
            times = store.expiries([unit["id"] for unit, _ in page])
            for unit, vector in page:
                yield export_line(unit, vector, model, times.get(unit["id"]), path)


def _row(unit: MemoryUnit) -> list[str]:
    return [str(unit.get("id", "")), str(unit.get("type", "")), str(unit.get("content", ""))]


def _page_line(offset: int, shown: int, count: int, *, more: bool, filtered: bool) -> str:
    if not shown:
        return f"no units here; the store holds {count}"
    of = "" if filtered else f" of {count}"
    return f"{offset + 1} to {offset + shown}{of}" + (f"; continue with --offset {offset + shown}" if more else "")


def _whys(document: Mapping[str, Json], *, every: bool) -> Iterator[str]:
    """Yield the plan and its reasons, untruncated: the end of a sentence often has the reason for the CPU."""
    index, plan, device = document["index"], document.get("plan"), document.get("device")
    if plan is None or device is None:  # on a server, which plans for itself
        yield f"index: {index.get('reason', '-')}"
        return
    yield f"plan: {_place(plan)}: {plan['reason']}"
    if (index["kind"], index["engine"], index["device"]) != (plan["kind"], plan["engine"], plan["device"]):
        yield f"in use until the next build: {_place(index)}: {index['reason']}"
    if every or _gpu(document):
        yield f"device: {device['reason']}"
        yield f"engines: GPU_ENGINE={device['engine_setting']}"
    if device["crossover"] is not None:
        yield f"the GPU answers calls of {device['crossover']} queries or more, the CPU smaller ones (measured)"
    yield from _problem(document)


def _problem(document: Mapping[str, Json]) -> Iterator[str]:
    problem = (document.get("device") or {}).get("problem")
    if problem:
        yield f"the GPU is not used: {problem}"


def _place(index: Mapping[str, Json]) -> str:
    return f"{index['kind']} on {index['device']}" + ("" if index["device"] == "cpu" else f" by {index['engine']}")


def _flat(document: Mapping[str, Json], prefix: str = "") -> Iterator[tuple[str, Json]]:
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        value = "; ".join(map(str, value))
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
