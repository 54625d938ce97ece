"""Commands that look after the store: check, maintain, snapshot, backup, restore."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import RenderableType

from ..components.store.vector_store import VectorStore
from ..utils.milvus_config import is_milvus_uri
from .codes import ExitCode, InputError
from .opening import open_existing, open_local, store_at
from .options import AsJson, IndexType, Prefix
from .output import Output, Rows

__all__ = ["backup", "check", "maintain", "restore", "snapshot"]


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
