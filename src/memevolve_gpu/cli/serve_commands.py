"""``memevolve-store mcp``, ``serve`` and ``keys``: serve a store to agents, over HTTP, and to whom."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .app import Group, InputError, NotFoundError, add_command, chosen
from .options import (
    AsJson,
    Embedder,
    Prefix,
    choose_embedder,
    open_or_create,
    stored_model,
)
from .output import Output

if TYPE_CHECKING:
    from ..server.keys import Keys


def mcp(
    *,
    store: Prefix,
    embedder: Embedder = "auto",
    transport: Annotated[
        Literal["stdio", "http"],
        typer.Option(help="stdio for a client that starts the server, http for clients that connect."),
    ] = "stdio",
    host: Annotated[str, typer.Option(help="Loopback address to listen on, with --transport http.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on, with --transport http.")] = 8765,
) -> None:
    """Serve the store to agents over the Model Context Protocol; the store is created when there is none.

    Several servers may use one store. With http the address is http://HOST:PORT/mcp; there is no login, so only
    loopback addresses are allowed.
    """
    from ..integrations.mcp import memory_server, require_mcp
    from ..utils.arguments import is_loopback

    require_mcp()  # before a store is created
    if transport == "http" and not is_loopback(host):
        raise InputError(f"--host {host}: anyone who reaches it could read and delete; use 127.0.0.1 behind a proxy")
    function = choose_embedder(embedder, stored_model(store))
    with open_or_create(store, function, as_served=True, background=True) as opened:
        server = memory_server(opened)
        if transport == "stdio":
            server.run("stdio")
        else:
            server.run("streamable-http", host=host, port=port)


KeysFile = Annotated[
    str | None,
    typer.Option("--keys", metavar="FILE", show_default=False, help="File of the keys.  \\[default: PREFIX.keys.json]"),
]


def serve(
    *,
    store: Prefix,
    embedder: Embedder = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; one that is not loopback needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8321,
    keys: KeysFile = None,
    backups: Annotated[
        str | None,
        typer.Option(metavar="DIR", show_default=False, help="Folder of backups.  \\[default: PREFIX.backups]"),
    ] = None,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest body of a request, in MiB.")] = 64,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Most requests at once; more are answered 429.")] = 256,
    mcp: Annotated[bool, typer.Option("--mcp/--no-mcp", help="Serve /mcp, where the package mcp is installed.")] = True,
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="Serve the page /ui.")] = True,
    traces: Annotated[bool, typer.Option("--traces", help="Make an OpenTelemetry span of each call.")] = False,
) -> None:
    """Serve the store over HTTP until Ctrl-C or SIGTERM; the store is created when there is none.

    /openapi.json describes the routes; metrics are at /metrics, MCP at /mcp, the page at /ui. Without keys only
    requests to loopback names are answered; see the command keys. Several servers may use one store.
    """
    from ..server.app import create_app
    from ..server.app import serve as run
    from ..utils.arguments import is_loopback

    held = _keys(store, keys)
    if not held and not is_loopback(host):
        raise InputError(
            f"--host {host}: anyone who reaches it could read and delete; make a key first with memevolve-store keys "
            "add, or listen on 127.0.0.1"
        )
    function = choose_embedder(embedder, stored_model(store))
    with open_or_create(store, function, as_served=True, background=True) as opened:
        app = create_app(
            opened,
            held or None,
            backups=backups or f"{store}.backups",
            max_body_mb=max_body_mb,
            max_in_flight=max_in_flight,
            mcp=mcp,
            ui=ui,
            traces=traces,
        )
        shown = f"[{host}]" if ":" in host else host
        Output(as_json=False).note(f"serving {store} at http://{shown}:{port}, {'with' if held else 'without'} keys")
        run(app, host, port)


def keys_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name, to list and remove it by.", show_default=False)],
    *,
    store: Prefix,
    scope: Annotated[
        list[str], typer.Option("--scope", metavar="SCOPE", help="read, write or admin; may be repeated.")
    ] = ["read"],  # noqa: B006 - typer reads it, and nothing writes to it
    keys: KeysFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print its token, this once: the file keeps a hash.

    With --namespace the key sees that namespace and those below it as if they were the whole store.
    """
    token = _keys(store, keys).add(name, scope, chosen.get("namespace", ""))
    Output(as_json).show({"name": name, "token": token}, token)


def keys_list(*, store: Prefix, keys: KeysFile = None, as_json: AsJson = False) -> None:
    """List the keys: name, scopes, namespace, and the time of creation."""
    held = list(_keys(store, keys))
    rows = [{name: value for name, value in asdict(key).items() if name != "digest"} for key in held]
    told = [f"{key.name}  {','.join(key.scopes)}  {'/'.join(key.namespace)}".rstrip() for key in held]
    Output(as_json).show({"keys": rows}, "\n".join(told) or "no keys")


def keys_remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.", show_default=False)],
    *,
    store: Prefix,
    keys: KeysFile = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key; a running server refuses it within a second."""
    if not _keys(store, keys).remove(name):
        raise NotFoundError(f"there is no key {name!r}; see memevolve-store keys list")
    Output(as_json).show({"removed": name}, f"removed {name}")


keys_app = typer.Typer(cls=Group, no_args_is_help=False, help="API keys of the server.")
add_command("add", keys_add, keys_app)
add_command("list", keys_list, keys_app)
add_command("remove", keys_remove, keys_app)


def _keys(store: str, path: str | None) -> Keys:
    from ..server.keys import Keys

    return Keys(path or f"{store}.keys.json")
