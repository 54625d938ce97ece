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

from . import admin_commands, read_commands, write_commands
from .app import ExitCode, app, main

_COMMANDS: dict[str, Callable[..., None]] = {
    "init": write_commands.init,
    "add": write_commands.add,
    "search": read_commands.search,
    "get": read_commands.get,
    "update": write_commands.update,
    "delete": write_commands.delete,
    "list": read_commands.list_units,
    "stats": read_commands.stats,
    "health": read_commands.health,
    "check": admin_commands.check,
    "maintain": admin_commands.maintain,
    "snapshot": admin_commands.snapshot,
    "backup": admin_commands.backup,
    "restore": admin_commands.restore,
    "copy": write_commands.copy,
    "export": read_commands.export,
    "import": write_commands.import_file,
    "embed": read_commands.embed,
    "devices": read_commands.devices,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(admin_commands.app, name="manage")

__all__ = ["ExitCode", "app", "main"]
