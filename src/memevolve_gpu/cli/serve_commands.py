"""``memevolve-store mcp``: serve a store to agents."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .app import InputError, chosen
from .options import Embedder, EmbedderName, Prefix, choose_embedder, stored_model

__all__ = ["mcp"]


class Transport(str, Enum):
    """How clients reach the server."""

    STDIO = "stdio"
    HTTP = "http"


def mcp(
    *,
    store: Prefix,
    embedder: Embedder = EmbedderName.AUTO,
    transport: Annotated[
        Transport, typer.Option(help="stdio for a client that starts the server, http for clients that connect.")
    ] = Transport.STDIO,
    host: Annotated[str, typer.Option(help="Loopback address to listen on, with --transport http.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on, with --transport http.")] = 8765,
) -> None:
    """Serve the store to agents over the Model Context Protocol; the store is created when there is none.

    Several servers may use one store. With http the address is http://HOST:PORT/mcp; there is no login, so only
    loopback addresses are allowed.
    """
    from ..backends import open_store
    from ..integrations.mcp import memory_server
    from ..utils.config import StorageConfig, is_milvus_uri

    if transport is Transport.HTTP and not _is_loopback(host):
        raise InputError(f"--host {host}: anyone who reaches it could read and delete; use 127.0.0.1 behind a proxy")
    function = choose_embedder(embedder, stored_model(store))
    if not is_milvus_uri(store):
        Path(store).parent.mkdir(parents=True, exist_ok=True)
    with open_store(store, function, storage_config=StorageConfig().replace(backend_type="vector", **chosen)) as opened:
        server = memory_server(opened)
        if transport is Transport.STDIO:
            server.run("stdio")
        else:
            server.run("streamable-http", host=host, port=port)


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
