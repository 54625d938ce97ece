"""``memevolve-store``: the store on the command line.

Every command takes ``--store PREFIX`` and ``--json``, which puts exactly one JSON document on stdout: the result, or
``{"error": "...", "type": "..."}``. Progress, notes and errors for people go to stderr.

Exit codes:

====  ==================================================================================
0     done
1     the operation failed, or check found problems that are not repaired
2     wrong usage or bad input: a flag, a filter, a setting, a file or one of its lines
3     there is no store at the prefix, or no unit with one of the ids
4     a limit is reached (units, memory, disk space); nothing was written
5     the store's file is damaged, read-only, of a newer version or not a store
6     the embedder or the search engine is missing, failed, or does not fit the store
130   interrupted by Ctrl-C; the message says what is in the store
141   whoever read the output stopped reading
====  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from . import asking, changing, copying, embedding, machine, managing, upkeep
from .app import app, main
from .codes import ExitCode

_COMMANDS: dict[str, Callable[..., None]] = {
    "init": changing.init,
    "add": changing.add,
    "search": asking.search,
    "get": asking.get,
    "update": changing.update,
    "delete": changing.delete,
    "list": asking.list_units,
    "stats": asking.stats,
    "health": asking.health,
    "check": upkeep.check,
    "maintain": upkeep.maintain,
    "snapshot": upkeep.snapshot,
    "backup": upkeep.backup,
    "restore": upkeep.restore,
    "copy": copying.copy,
    "export": asking.export,
    "import": changing.import_file,
    "embed": embedding.embed,
    "devices": machine.devices,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(managing.app, name="manage")

__all__ = ["ExitCode", "app", "main"]
