"""Commands that read: search, get, list, stats, health, export."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Annotated, Any, Optional

import typer
from rich.console import RenderableType

from ..components.store.opening import AnyStore
from ..records import canonical, matches
from ..types import MemoryUnit
from .codes import ExitCode
from .filters import parse_filters
from .finding import find, strategy_for
from .opening import EmbedderName, open_existing, remembered_model, store_at
from .options import AsJson, Conditions, Embedder, FilterJson, Prefix
from .output import Output, Rows, one_line, printable
from .writing import export_line, write_lines

__all__ = ["export", "get", "health", "list_units", "missing", "search", "stats"]

_PROGRESS_EVERY = 100
_LAST = sys.maxsize
"""The largest position that an iterator can be cut at."""
_IN_FULL = (
    "events",
    "index.reason",
    "plan.reason",
    "plan.notes",
    "device.reason",
    "device.engine_table",
    "device.problem",
)
"""Figures that tables for people leave out: most of them are sentences, and stand below that of stats in full."""


def search(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for, in words.")],
    *,
    store: Prefix = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many units to return at most.")] = 5,
    condition: Conditions = None,
    filters: FilterJson = None,
    recall: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--recall",
            show_default=False,
            help="Recall to reach, above 0 and at most 1 (exact).  \\[default: the setting's]",
        ),
    ] = None,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Search by meaning and by words together.")] = False,
    keyword: Annotated[bool, typer.Option("--keyword", help="Search by words; needs no embedder.")] = False,
    embedder: Embedder = EmbedderName.AUTO,
    as_json: AsJson = False,
) -> None:
    """Find the units nearest in meaning to a text, or with its words, or both."""
    asked = parse_filters(condition, filters)
    strategy = strategy_for(hybrid=hybrid, keyword=keyword, recall=recall)
    if strategy is not None:
        find(Output(as_json), store_at(store), embedder, strategy, text, top_k, asked)
        return
    with open_existing(store_at(store), embedder) as opened:
        hits = opened.search_units(text, top_k, asked, recall)
    document = [{"id": hit.id, "distance": hit.distance, "score": hit.score, "unit": hit.unit} for hit in hits]
    rows = [[f"{hit.distance:.4f}", f"{hit.score:.4f}", *_row(hit.unit)] for hit in hits]
    found: RenderableType = Rows(("distance", "score", "id", "type", "content"), rows) if rows else "nothing found"
    Output(as_json).show({"query": text, "hits": document}, found)


def get(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of units.")],
    *,
    store: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Print units as they are stored. Exits with 3 when one of the ids is unknown; the others are printed."""
    with open_existing(store_at(store), None) as opened:
        found = {unit_id: opened.retrieve(unit_id) for unit_id in dict.fromkeys(ids)}
    units = [unit for unit in found.values() if unit is not None]
    texts = [printable(json.dumps(unit, ensure_ascii=False, indent=2)) for unit in units]
    missing(Output(as_json), {"units": units}, [name for name, unit in found.items() if unit is None], *texts)


def list_units(
    *,
    store: Prefix = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many units to print at most.")] = 20,
    offset: Annotated[int, typer.Option("--offset", min=0, help="How many units to pass over first.")] = 0,
    condition: Conditions = None,
    filters: FilterJson = None,
    as_json: AsJson = False,
) -> None:
    """List units, oldest first."""
    asked = parse_filters(condition, filters)
    with open_existing(store_at(store), None) as opened:
        units = list(islice(opened.units(asked), min(offset, _LAST), min(offset + limit + 1, _LAST)))
        count = opened.count()
    more, units = len(units) > limit, units[:limit]
    document = {"units": units, "offset": offset, "limit": limit, "more": more, "count": count}
    texts: list[RenderableType] = [Rows(("id", "type", "content"), [_row(unit) for unit in units])] if units else []
    texts.append(_page_line(offset, len(units), count, more=more, filtered=asked is not None))
    Output(as_json).show(document, *texts)


def stats(*, store: Prefix = None, as_json: AsJson = False) -> None:
    """Show counts, the index and the plan for it with its reason, files and recent events."""
    with open_existing(store_at(store), None, as_served=True) as opened:
        document = opened.statistics()
    rows = [[name, _cell(value)] for name, value in _flat(document) if name not in _IN_FULL]
    Output(as_json).show(document, Rows(("figure", "value"), rows), "", *map(one_line, _whys(document)))


def health(*, store: Prefix = None, as_json: AsJson = False) -> None:
    """Judge the store: how full, how good, and what should be done. Exits with 5 when damage was met in its file."""
    with open_existing(store_at(store), None) as opened:
        document = opened.get_storage_health()
    advice = list(document["recommendations"])
    rows = [[name, _cell(value)] for name, value in _flat(document) if name not in ("recommendations", *_IN_FULL)]
    texts = [f"- {one_line(sentence)}" for sentence in advice] or ["Nothing needs to be done."]
    Output(as_json).show(document, Rows(("figure", "value"), rows), "", *map(one_line, _problem(document)), *texts)
    if document.get("damage"):
        raise typer.Exit(ExitCode.STORAGE)


def export(
    file: Annotated[str, typer.Argument(metavar="FILE.jsonl", help="Where to write; - is stdout.")],
    *,
    store: Prefix = None,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Write each unit's vector too; import takes it back.")
    ] = False,
    condition: Conditions = None,
    filters: FilterJson = None,
    as_json: AsJson = False,
) -> None:
    """Write units to a file of JSON lines, oldest first. The file appears complete or not at all."""
    output, prefix = Output(as_json), store_at(store)
    asked = parse_filters(condition, filters)
    with open_existing(prefix, None) as opened, output.progress("exporting") as report:
        total = max(1, opened.count())

        def told(count: int) -> None:
            if count % _PROGRESS_EVERY == 0:
                report(f"exporting {count} units", count / total)

        count = write_lines(file, _export_lines(opened, asked, prefix if vectors else None), told)
    if file == "-":
        output.note(f"exported {count} units")
    else:
        output.show({"exported": count, "file": file, "vectors": vectors}, f"exported {count} units to {file}")


def missing(output: Output, document: Mapping[str, Any], ids: list[str], *texts: RenderableType) -> None:
    """Show what was done, and end with 3 when some ids are unknown."""
    if not ids:
        output.show({**document, "missing": []}, *texts)
        return
    error = f"no unit with the id{'s' if len(ids) > 1 else ''} {', '.join(map(repr, ids))}"
    output.show({**document, "missing": ids, "error": error, "type": "NotFoundError"}, *texts)
    if not output.as_json:
        output.fail(error, "NotFoundError")
    raise typer.Exit(ExitCode.NOT_FOUND)


def _export_lines(store: AnyStore, filters: dict[str, Any] | None, vectors_of: str | None) -> Iterator[str]:
    """The lines of an export, with vectors when the prefix of the store is given."""
    if vectors_of is None:
        return (export_line(unit) for unit in store.units(filters))
    canonical(filters)  # a mistake is worth an error even where there is no unit to hold it against
    model = remembered_model(vectors_of)
    rows = store.export_rows()
    return (export_line(unit, vector, model) for unit, vector in rows if matches(filters, unit))


def _row(unit: MemoryUnit) -> list[str]:
    return [str(unit.get("id", "")), str(unit.get("type", "")), str(unit.get("content", ""))]


def _page_line(offset: int, shown: int, count: int, *, more: bool, filtered: bool) -> str:
    if not shown:
        return f"no units here; the store holds {count}"
    of = "" if filtered else f" of {count}"
    return f"{offset + 1} to {offset + shown}{of}" + (f"; go on with --offset {offset + shown}" if more else "")


def _whys(document: Mapping[str, Any]) -> Iterator[str]:
    """The plan and why, in full: what cut a sentence short would most often cut the reason for the CPU."""
    index, plan, device = document["index"], document.get("plan"), document.get("device")
    if plan is None or device is None:  # on a server, which plans for itself
        yield f"index: {index.get('reason', '-')}"
        return
    yield f"plan: {_place(plan)}: {plan['reason']}"
    if (index["kind"], index["engine"], index["device"]) != (plan["kind"], plan["engine"], plan["device"]):
        yield f"in use until the next build: {_place(index)}: {index['reason']}"
    yield f"device: {device['reason']}"
    yield f"engines: GPU_ENGINE={device['engine_setting']}, table {device['engine_table']}"
    yield from _problem(document)


def _problem(document: Mapping[str, Any]) -> Iterator[str]:
    problem = (document.get("device") or {}).get("problem")
    if problem:
        yield f"the GPU is not used: {problem}"


def _place(index: Mapping[str, Any]) -> str:
    return f"{index['kind']} on {index['device']}" + ("" if index["device"] == "cpu" else f" by {index['engine']}")


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        value = "; ".join(map(str, value))
    if value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
