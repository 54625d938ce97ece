"""Commands that maintain and manage a store: check, maintain, snapshot, backup, prune, consolidate, ...."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Optional

import typer
from rich.console import RenderableType

from ..components.manage import Removal, SimpleManagementStrategy
from ..components.store.vector_store import VectorStore
from ..utils.config import is_milvus_uri
from .app import ExitCode, InputError
from .options import (
    AsJson,
    Conditions,
    Embedder,
    EmbedderName,
    FilterJson,
    IndexType,
    Prefix,
    open_existing,
    open_local,
    parse_filters,
    store_at,
)
from .output import Output, Rows

__all__ = ["app", "backup", "check", "maintain", "restore", "snapshot"]

_SHOWN = 20
"""Ids that are listed for people; --json names all."""

app = typer.Typer(
    help="Prune, consolidate, deduplicate or forget units, each in one transaction.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


class Grouping(str, Enum):
    """What makes units one."""

    SIMILARITY = "similarity"
    TYPE = "type"


class Keep(str, Enum):
    """Which of several duplicates stays."""

    OLDEST = "oldest"
    ACCESSED = "accessed"


class Forgetting(str, Enum):
    """Who goes first."""

    LRU = "lru"
    LFU = "lfu"
    RANDOM = "random"


@app.command()
def prune(
    *,
    store: Prefix = None,
    max_age: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--max-age", min=0, show_default=False, metavar="DAYS", help="Units older than this go."),
    ] = None,
    max_count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-count", min=0, show_default=False, help="Only the newest so many stay."),
    ] = None,
    condition: Conditions = None,
    filters: FilterJson = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete units: those that are too old, those that are too many, or all that match a filter.

    With a filter only the units that match are looked at. Units without a time stamp never go by age.
    """
    asked = parse_filters(condition, filters)
    criteria = {"max_age": max_age, "max_count": max_count, "filters": asked}
    given = {name: value for name, value in criteria.items() if value is not None}
    if not given:
        raise InputError("prune: say what is to go with --max-age, --max-count, --filter or --filters")
    with open_existing(store_at(store), None) as opened:
        removed = SimpleManagementStrategy().prune(opened, given, dry_run=dry_run)
    _show_removed(Output(as_json), "prune", removed, dry_run)


@app.command()
def consolidate(
    ids: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[ID...]", show_default=False, help="Ids of the units to look at; all without."),
    ] = None,
    *,
    store: Prefix = None,
    by: Annotated[Grouping, typer.Option("--by", help="What makes units one.")] = Grouping.SIMILARITY,
    threshold: Annotated[float, typer.Option("--threshold", help="Cosine from which units are similar.")] = 0.85,
    max_characters: Annotated[int, typer.Option("--max-characters", min=1, help="Longest merged content.")] = 8000,
    embedder: Embedder = EmbedderName.AUTO,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Merge similar units, or units of one type, into one each that says where it comes from."""
    output = Output(as_json)
    with open_existing(store_at(store), None if dry_run else embedder) as opened, output.progress("consolidating"):
        merged = SimpleManagementStrategy().consolidate(
            opened,
            ids or None,
            by=by.value,
            similarity_threshold=threshold,
            max_characters=max_characters,
            dry_run=dry_run,
        )
    rows = [[", ".join(one["metadata"]["consolidated_from"]), str(one.get("content", ""))] for one in merged[:_SHOWN]]
    sources = sum(len(one["metadata"]["consolidated_from"]) for one in merged)
    text = f"{'would make' if dry_run else 'made'} {_units(len(merged))} of {sources}"
    table: list[RenderableType] = [Rows(("from", "content"), rows)] if rows else []
    output.show({"merged": merged, "count": len(merged), "sources": sources, "dry_run": dry_run}, *table, text)


@app.command()
def deduplicate(
    *,
    store: Prefix = None,
    threshold: Annotated[float, typer.Option("--threshold", help="Cosine from which units are the same.")] = 0.9,
    keep: Annotated[Keep, typer.Option("--keep", help="Which of them stays.")] = Keep.OLDEST,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete units that say nearly what another one says."""
    output = Output(as_json)
    with open_existing(store_at(store), None) as opened, output.progress("comparing"):
        strategy = SimpleManagementStrategy()
        removed = strategy.deduplicate(opened, threshold, keep=keep.value, dry_run=dry_run)
    _show_removed(output, "deduplicate", removed, dry_run)


@app.command()
def forget(
    *,
    store: Prefix = None,
    strategy: Annotated[
        Forgetting, typer.Option("--strategy", help="lru: read longest ago; lfu: least often; random.")
    ] = Forgetting.LRU,
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--count", min=0, show_default=False, help="How many units go.  \\[default: a tenth]"),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--seed", show_default=False, help="Makes random repeatable."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete the units that are needed least; those that nobody ever read go first, the oldest of them before."""
    with open_existing(store_at(store), None) as opened:
        forgetting = SimpleManagementStrategy().apply_forgetting
        removed = forgetting(opened, strategy.value, count, seed=seed, dry_run=dry_run)
    _show_removed(Output(as_json), "forget", removed, dry_run)


def _show_removed(output: Output, operation: str, removed: Removal, dry_run: bool) -> None:
    notes: Mapping[str, Any] = {name: value for name, value in removed.notes.items() if name != "dry_run"}
    count, ids = removed
    document = {"operation": operation, "count": count, "ids": ids, "dry_run": dry_run, "notes": dict(notes)}
    shown = ", ".join(ids[:_SHOWN]) + (", ..." if count > _SHOWN else "")
    texts = [f"{'would delete' if dry_run else 'deleted'} {_units(count)}" + (f": {shown}" if shown else "")]
    if notes.get("undated"):
        texts.append(f"left {_units(notes['undated'])} without a time stamp alone")
    if notes.get("left"):
        texts.append(f"left {_units(notes['left'])} alone that changed meanwhile")
    output.show(document, *texts)


def _units(count: int) -> str:
    return f"{count} unit{'' if count == 1 else 's'}"


def check(
    *,
    store: Prefix = None,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold the records against themselves and the index against the records. Exits with 1 while a problem stands."""
    with open_local(store_at(store)) as opened:
        findings = opened.check(fix)
    document = [{"code": one.code, "message": one.message, "fixed": one.fixed} for one in findings]
    standing = sum(not one.fixed for one in findings)
    rows = [["repaired" if one.fixed else "problem", one.code, one.message] for one in findings]
    text: RenderableType = Rows(("state", "code", "message"), rows) if rows else "no problems found"
    Output(as_json).show({"ok": not standing, "findings": document}, text)
    if standing:
        raise typer.Exit(ExitCode.FAILED)


def maintain(*, store: Prefix = None, index_type: IndexType = None, as_json: AsJson = False) -> None:
    """Do the due upkeep now: build the planned index, verify and save it, purge the log."""
    output = Output(as_json)
    with open_existing(store_at(store), None, index_type) as opened, output.progress("maintaining") as report:
        done = opened.run_maintenance(report)
    actions = [str(action) for action in done["actions"]] or ["nothing was due"]
    reason = [f"because {done['reason']}"] if done.get("reason") else []
    output.show(done, *actions, *reason)


def snapshot(*, store: Prefix = None, as_json: AsJson = False) -> None:
    """Save the index, so that the store opens quickly next time."""
    output = Output(as_json)
    with open_local(store_at(store)) as opened, output.progress("saving the index"):
        path = opened.snapshot()
    output.show({"snapshot": path}, f"saved the index to {path}")


def backup(
    path: Annotated[str, typer.Argument(metavar="FILE", help="The new database file.")],
    *,
    store: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Copy the records to a new file, consistent while others use the store."""
    output = Output(as_json)
    with open_local(store_at(store)) as opened, output.progress("copying"):
        opened.backup(path)
    output.show({"backup": path}, f"copied the records to {path}")


def restore(
    path: Annotated[str, typer.Argument(metavar="BACKUP", help="The file that backup wrote.")],
    *,
    store: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Put a copy of a backup in the store's place and keep the old store. Refuses while anybody has it open."""
    prefix = store_at(store)
    if is_milvus_uri(prefix):
        raise InputError(
            f"--store: {prefix} is on a Milvus server, which has this command's work done by its own tools"
        )
    output = Output(as_json)
    with output.progress("restoring"):
        replaced = VectorStore.restore(path, prefix)
    with open_local(prefix) as opened:
        count = opened.count()
    kept = "there was no store before" if replaced is None else f"the old store is kept as {replaced}"
    document = {"restored": prefix, "backup": path, "count": count, "replaced": replaced}
    output.show(document, f"restored {count} units from {path}", kept)
