"""``memevolve-store``: the store on the command line.

Every command takes ``--store PREFIX`` and ``--json``, which prints exactly one JSON document on stdout: the result, or
``{"error": "...", "type": "..."}``. Progress, notes and errors for people go to stderr. ``ExitCode`` and ``MEANING`` in
``app`` define the exit codes.
"""

from __future__ import annotations

from collections.abc import Callable

from . import admin_commands, demo, doctor, read_commands, serve_commands, write_commands
from .app import ExitCode, add_command, app, main

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
    "mcp": serve_commands.mcp,
    "serve": serve_commands.serve,
    "doctor": doctor.doctor,
    "demo": demo.demo,
}
for _name, _command in _COMMANDS.items():
    add_command(_name, _command)
app.add_typer(admin_commands.app, name="manage")
app.add_typer(serve_commands.keys_app, name="keys")

__all__ = ["ExitCode", "app", "main"]
