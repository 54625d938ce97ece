"""The application: REST over a store, health, metrics, MCP and the page, on one port."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from importlib import import_module
from importlib import metadata as packages
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

from fastapi import Depends, FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..components.store.base import StorageBackend
from ..errors import ConfigurationError, MemEvolveError, first_line
from ..utils.arguments import is_loopback, shown, whole_number
from . import metrics, models
from .access import (
    Caller,
    Gate,
    Service,
    add_error_handlers,
    allow,
    answer_of,
    caller_of,
    describe_errors,
    problem,
    store_of,
)
from .keys import Keys
from .routes import router
from .searching import answer_search

MIB = 2**20


def create_app(
    store: StorageBackend,
    keys: Keys | str | os.PathLike[str] | None = None,
    *,
    backups: str | os.PathLike[str] = "backups",
    max_body_mb: int = 64,
    max_in_flight: int = 256,
    readers: int = 8,
    writers: int = 8,
    mcp: bool = True,
    ui: bool = True,
    traces: bool = False,
) -> FastAPI:
    """Make the application of a store.

    Without keys it answers requests to loopback names only. ``/openapi.json`` describes the routes.

    Args:
        store: The store. It stays open when the application ends.
        keys: The keys, or the path of their file; None for an application without keys.
        backups: The folder that ``POST /v1/backup`` writes to.
        max_body_mb: Largest body of a request, in MiB.
        max_in_flight: Most requests at once; more are answered 429 with ``Retry-After``.
        readers: Threads for reads.
        writers: Threads for writes, so that they never hold those of reads.
        mcp: Whether to serve ``/mcp``, where the package mcp is installed.
        ui: Whether to serve the page ``/ui``.
        traces: Whether to make an OpenTelemetry span of each call of the store, see ``metrics.trace_calls``.

    Returns:
        The ASGI application.

    Raises:
        ConfigurationError: An argument cannot be used.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> from memevolve_gpu.server.app import create_app
        >>> app = create_app(VectorStore("memory", HashingEmbedder()))
        >>> app.title
        'memevolve-gpu'
    """
    if not isinstance(store, StorageBackend):
        raise ConfigurationError(f"store must be a StorageBackend, got {shown(store)}; see open_store")
    limits = {"max_body_mb": max_body_mb, "max_in_flight": max_in_flight, "readers": readers, "writers": writers}
    for name, value in limits.items():
        whole_number(name, value, error=ConfigurationError)
    held = keys if keys is None or isinstance(keys, Keys) else Keys(keys)
    service, registry = Service(store, held, readers, writers), CollectorRegistry()
    metrics.register(store, registry)
    if traces:
        metrics.trace_calls(store)
    # The framework's pages of documentation load scripts from another host, and no request may leave this one.
    app = FastAPI(
        title="memevolve-gpu",
        version=packages.version("memevolve-gpu"),
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.backups = Backups(Path(backups))
    app.state.running = []
    app.add_middleware(
        Gate,
        service=service,
        max_body_bytes=max_body_mb * MIB,
        max_in_flight=max_in_flight,
        search=answer_search,
        registry=registry,
    )
    add_error_handlers(app)
    describe_errors(app)
    app.include_router(router)
    _add_health(app, service, registry)
    if mcp and find_spec("mcp") is not None:
        _add_mcp(app, service)
    if ui and find_spec("memevolve_gpu.server.ui") is not None:
        app.include_router(import_module("memevolve_gpu.server.ui").router(store_of))
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for enter in app.state.running:
            await stack.enter_async_context(enter())
        try:
            yield
        finally:
            app.state.service.readers.close()


def _add_health(app: FastAPI, service: Service, registry: CollectorRegistry) -> None:
    @app.get("/healthz", response_model=models.Alive)
    async def healthz() -> models.Alive:
        """Say that the process answers."""
        return models.Alive()

    @app.get("/readyz", response_model=models.Alive)
    async def readyz() -> models.Alive | Response:
        """Say whether the store answers: 503 while it does not."""
        try:
            await service.read(service.store.count)
        except MemEvolveError as error:
            return problem(503, first_line(error), type(error).__name__, {"Retry-After": "5"})
        return models.Alive()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_text(caller: Annotated[Caller, Depends(allow("read"))]) -> Response:
        """Give the figures of the store and of the server to Prometheus."""
        caller.whole("the list of figures")
        text = await caller.read(lambda: generate_latest(registry))
        return Response(text, media_type=CONTENT_TYPE_LATEST)


_bound: ContextVar[StorageBackend] = ContextVar("bound")
"""The store as the caller of the present MCP request sees it."""


class _BoundStore:
    """The store of the present MCP request."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_bound.get(), name)


def _add_mcp(app: FastAPI, service: Service) -> None:
    """Serve MCP at ``/mcp``, without sessions, so that each request has the key that it brings."""
    from mcp.server.transport_security import TransportSecuritySettings

    from ..integrations.mcp import memory_server

    token = _bound.set(service.store)  # memory_server looks at what it is given; every request then has its own
    try:
        server = memory_server(cast("StorageBackend", _BoundStore()))
    finally:
        _bound.reset(token)
    hosts = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # the gate looks at them
    inner = server.streamable_http_app(stateless_http=True, json_response=True, transport_security=hosts)

    class Mcp:
        """ASGI: a request of a key that may read and write."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                caller_of(service, scope["memevolve.key"], "read")
                _bound.set(caller_of(service, scope["memevolve.key"], "write").store())
            except HTTPException as error:
                await answer_of(error)(scope, receive, send)
                return
            await inner(scope, receive, send)

    app.router.routes.append(Route("/mcp", Mcp(), include_in_schema=False))
    app.state.running.append(server.session_manager.run)


class Backups:
    """The folder of backups."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, backup: Callable[[Path], object], name: str | None) -> models.BackupFile:
        """Write a backup. Raises ConfigurationError where there is one of that name."""
        chosen = name or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        path = self.folder / f"{chosen}.db"
        if path.exists():
            raise ConfigurationError(f"name: there is a backup {chosen!r}; choose another name")
        self.folder.mkdir(parents=True, exist_ok=True)
        backup(path)
        return self._described(path)

    def listed(self) -> list[models.BackupFile]:
        """The backups, newest first."""
        found = [self._described(path) for path in self.folder.glob("*.db")]
        return sorted(found, key=lambda one: one.at, reverse=True)

    @staticmethod
    def _described(path: Path) -> models.BackupFile:
        facts = path.stat()
        return models.BackupFile(name=path.stem, bytes=facts.st_size, at=facts.st_mtime)


def serve(app: FastAPI, host: str = "127.0.0.1", port: int = 8321, *, grace_s: int = 30) -> None:
    """Serve an application until the process is told to end (SIGTERM, SIGINT); requests in progress are finished.

    Args:
        app: What :func:`create_app` made.
        host: The address to listen on; one that is not loopback needs keys.
        port: The port.
        grace_s: Seconds that requests in progress have to finish.

    Raises:
        ConfigurationError: ``host`` is not loopback, and there are no keys.
    """
    import uvicorn

    if not is_loopback(host) and not app.state.service.keys:
        raise ConfigurationError(
            f"host {host!r}: anyone who reaches it could read and delete; make a key first (memevolve-store keys add), "
            "or listen on 127.0.0.1"
        )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host,
            port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=grace_s,
        )
    )
    with _calm_signals():
        server.run()


@contextlib.contextmanager
def _calm_signals() -> Iterator[None]:
    """Uvicorn raises the signal that ended it once more; it must not end the process before the store is closed."""
    kinds = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    old = {kind: signal.signal(kind, lambda *_: None) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)
