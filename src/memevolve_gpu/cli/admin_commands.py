"""Commands that maintain and manage a store: check, maintain, snapshot, backup, prune, consolidate, ...."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .app import ExitCode, Group, InputError, add_command
from .files import refuse_missing_folder
from .options import (
    AsJson,
    Conditions,
    Embedder,
    FilterJson,
    IndexType,
    Prefix,
    file_argument,
    open_existing,
    open_local,
    parse_filters,
    refuse_milvus,
)
from .output import Output, Rows

if TYPE_CHECKING:
    from ..components.manage import Removal, SimpleManagementStrategy
    from ..types import Json

_SHOWN = 20
"""Most ids that are printed for people; --json has all."""

app = typer.Typer(
    cls=Group,
    help="Prune, consolidate, deduplicate or forget units, each in one transaction.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and change nothing.")]


def prune(
    *,
    store: Prefix,
    max_age: Annotated[
        float | None,
        typer.Option("--max-age", min=0, show_default=False, metavar="DAYS", help="Delete units older than this."),
    ] = None,
    max_count: Annotated[
        int | None, typer.Option("--max-count", min=0, show_default=False, help="Keep this many of the newest units.")
    ] = None,
    condition: Conditions = None,
    filters: FilterJson = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete units: those that are too old, those beyond a number, or all that match a filter.

    With a filter only the units that match are considered. Units without a time stamp are never deleted by age.
    """
    criteria = {"max_age": max_age, "max_count": max_count, "filters": parse_filters(condition, filters)}
    given = {name: value for name, value in criteria.items() if value is not None}
    if not given:
        raise InputError("prune: give --max-age, --max-count, --filter or --filters")
    with open_existing(store, None) as opened:
        removed = _strategy().prune(opened, given, dry_run=dry_run)
    _show_removed(Output(as_json), "prune", removed, dry_run)


def consolidate(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID...", show_default=False, help="Ids of the units to consider; all without."),
    ] = None,
    *,
    store: Prefix,
    by: Annotated[Literal["similarity", "type"], typer.Option("--by", help="Which units are merged.")] = "similarity",
    threshold: Annotated[float, typer.Option("--threshold", help="Cosine from which units are similar.")] = 0.85,
    max_characters: Annotated[int, typer.Option("--max-characters", min=1, help="Longest merged content.")] = 8000,
    embedder: Embedder = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Merge similar units, or units of one type, into one that names its sources."""
    output = Output(as_json)
    with open_existing(store, None if dry_run else embedder) as opened, output.progress("consolidating"):
        merged = _strategy().consolidate(
            opened,
            ids or None,
            by=by,
            similarity_threshold=threshold,
            max_characters=max_characters,
            dry_run=dry_run,
        )
    rows = [[", ".join(one["metadata"]["consolidated_from"]), str(one.get("content", ""))] for one in merged[:_SHOWN]]
    sources = sum(len(one["metadata"]["consolidated_from"]) for one in merged)
    texts: list[str | Rows] = [Rows(("from", "content"), rows)] if rows else []
    texts += [f"{'would merge' if dry_run else 'merged'} {_units(sources)} into {len(merged)}" if rows else _NOTHING]
    output.show({"merged": merged, "count": len(merged), "sources": sources, "dry_run": dry_run}, *texts)


def deduplicate(
    *,
    store: Prefix,
    threshold: Annotated[float, typer.Option("--threshold", help="Cosine from which texts are compared.")] = 0.75,
    keep: Annotated[
        Literal["newest", "oldest", "longest", "accessed"],
        typer.Option("--keep", help="Which of several duplicates stays."),
    ] = "newest",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete near-duplicates of other units."""
    output = Output(as_json)
    with open_existing(store, None) as opened, output.progress("comparing"):
        strategy = _strategy()
        removed = strategy.deduplicate(opened, threshold, keep=keep, dry_run=dry_run)
    _show_removed(output, "deduplicate", removed, dry_run)


def forget(
    *,
    store: Prefix,
    strategy: Annotated[
        Literal["lru", "lfu", "random"],
        typer.Option("--strategy", help="lru: least recently read; lfu: least frequently read; random."),
    ] = "lru",
    count: Annotated[
        int | None,
        typer.Option("--count", min=0, show_default=False, help="Number of units to delete.  \\[default: a tenth]"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", show_default=False, help="Makes random repeatable.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete the units that are needed least; those never read go first, oldest first."""
    with open_existing(store, None) as opened:
        removed = _strategy().apply_forgetting(opened, strategy, count, seed=seed, dry_run=dry_run)
    _show_removed(Output(as_json), "forget", removed, dry_run)


def _strategy() -> SimpleManagementStrategy:
    from ..components.manage import SimpleManagementStrategy

    return SimpleManagementStrategy()


_NOTHING = "nothing to merge"


def _show_removed(output: Output, operation: str, removed: Removal, dry_run: bool) -> None:
    notes: Mapping[str, Json] = {name: value for name, value in removed.notes.items() if name != "dry_run"}
    count, ids = removed
    document = {"operation": operation, "count": count, "ids": ids, "dry_run": dry_run, "notes": dict(notes)}
    shown = ", ".join(ids[:_SHOWN]) + (", ..." if count > _SHOWN else "")
    texts = [f"{'would delete' if dry_run else 'deleted'} {_units(count)}" + (f": {shown}" if shown else "")]
    if notes.get("undated"):
        texts.append(f"kept {_units(notes['undated'])} without a time stamp")
    if notes.get("left"):
        texts.append(f"kept {_units(notes['left'])} that changed meanwhile")
    output.show(document, *texts)


def _units(count: int) -> str:
    return f"{count} unit{'' if count == 1 else 's'}"


for _command in (prune, consolidate, deduplicate, forget):
    add_command(_command.__name__, _command, app)


def check(
    *,
    store: Prefix,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired.")] = False,
    as_json: AsJson = False,
) -> None:
    """Verify the records, and the index against the records. Exits with 1 while there is a problem."""
    with open_local(store) as opened:
        findings = opened.check(fix)
    document = [{"code": one.code, "message": one.message, "fixed": one.fixed} for one in findings]
    problems = sum(not one.fixed for one in findings)
    rows = [["repaired" if one.fixed else "problem", one.code, _ADVICE.sub("", one.message)] for one in findings]
    texts: list[str | Rows] = [Rows(("state", "code", "message"), rows, whole=True)] if rows else ["no problems found"]
    if problems:
        remedy = "restore a backup: memevolve-store restore BACKUP" if fix else "try memevolve-store check --fix"
        texts.append(f"{problems} problem{'' if problems == 1 else 's'}; {remedy} --store {shlex.quote(store)}")
    Output(as_json).show({"ok": not problems, "findings": document}, *texts)
    if problems:
        raise typer.Exit(ExitCode.FAILED)


_ADVICE = re.compile(r"[;,]? (then )?run check\((fix=True)?\)")
"""What messages advise, and check has just done."""


def maintain(*, store: Prefix, index_type: IndexType = None, as_json: AsJson = False) -> None:
    """Do the maintenance that is due: build the planned index, verify and save it, purge the log."""
    output = Output(as_json)
    with open_existing(store, None, index_type) as opened, output.progress("maintaining") as report:
        done = opened.run_maintenance(report)
    actions = [str(action) for action in done["actions"]] or ["nothing was due"]
    reason = [f"because {done['reason']}"] if done.get("reason") else []
    output.show(done, *actions, *reason)


def snapshot(*, store: Prefix, as_json: AsJson = False) -> None:
    """Save the index, so that the store opens faster."""
    output = Output(as_json)
    with open_local(store) as opened, output.progress("saving the index"):
        path = opened.snapshot()
    output.show({"snapshot": path}, f"saved the index to {path}")


def backup(
    path: Annotated[str, file_argument("FILE", "The new database file; .db is appended if it is missing.")],
    *,
    store: Prefix,
    as_json: AsJson = False,
) -> None:
    """Copy the records to a new file, consistent while others use the store."""
    output, written = Output(as_json), path.removesuffix(".db") + ".db"
    with open_local(store) as opened, output.progress("copying"):
        refuse_missing_folder(written)
        if os.path.lexists(written):
            raise InputError(f"{written} exists; name another file")
        opened.backup(written)
    output.show({"backup": written}, f"copied the records to {written}")


def restore(
    path: Annotated[str, file_argument("BACKUP", "The file that backup wrote.")],
    *,
    store: Prefix,
    as_json: AsJson = False,
) -> None:
    """Replace the store by a copy of a backup, and keep the old store. Refuses while the store is open anywhere."""
    from ..components.store.vector_store import VectorStore

    refuse_milvus(store)
    output = Output(as_json)
    if not Path(path).exists():
        raise InputError(f"there is no backup at {path}; check the path")
    with output.progress("restoring"):
        replaced = VectorStore.restore(path, store)
    with open_local(store) as opened:
        count = opened.count()
    kept = "there was no store before" if replaced is None else f"the old store is kept as {replaced}"
    document = {"restored": store, "backup": path, "count": count, "replaced": replaced}
    output.show(document, f"restored {count} units from {path}", kept)
