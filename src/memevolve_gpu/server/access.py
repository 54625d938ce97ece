"""What stands before the routes: who calls, how much they may send and how many calls run; and errors as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..components.store.base import StorageBackend
from ..errors import (
    CapacityError,
    ConfigurationError,
    ConflictError,
    EmbeddingError,
    EngineError,
    HistoryError,
    LockTimeoutError,
    MemEvolveError,
    ReadOnlyError,
    StorageError,
    StorageFullError,
    StoreClosedError,
    StoreUnavailableError,
    first_line,
)
from ..types import JsonObject
from ..utils.arguments import is_loopback
from ..utils.config import namespace_path
from .keys import SCOPES, Key, Keys
from .models import Problem

_T = TypeVar("_T")

_OPEN = Key("", "", SCOPES)
"""What a caller may do where there are no keys."""

_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:]*))(?::\d*)?")
"""The header Host: a name or an address, and a port."""

_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (ConflictError, 409),
    (HistoryError, 404),
    (CapacityError, 507),
    (StorageFullError, 507),
    (LockTimeoutError, 503),
    (StoreClosedError, 503),
    (StoreUnavailableError, 503),
    (ReadOnlyError, 503),
    (EmbeddingError, 502),
    (EngineError, 500),
    (StorageError, 500),
)


def status_of(error: MemEvolveError) -> int:
    """The HTTP status of an error: that of the first class in the table; 422 for arguments that cannot be used."""
    if isinstance(error, EmbeddingError) and error.__cause__ is None:  # embeddings were given, and are at fault
        return 422
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 422)


class Service:
    """A store, and the threads that its calls run in: those of reads apart from those of writes."""

    def __init__(self, store: StorageBackend, keys: Keys | None, readers: int, writers: int) -> None:
        self.store, self.keys = store, keys
        self.readers, self._write = Pool(readers), anyio.CapacityLimiter(writers)

    async def read(self, function: Callable[[], _T]) -> _T:
        """Run a call that only reads."""
        return await self.readers.run(function)

    async def write(self, function: Callable[[], _T]) -> _T:
        """Run a call that writes; it is finished even where the caller leaves."""
        return await anyio.to_thread.run_sync(function, limiter=self._write)


class Pool:
    """Threads for short calls. One takes several waiting calls at a time, and wakes the event loop once for them."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._started: list[threading.Thread] = []

    async def run(self, function: Callable[[], _T]) -> _T:
        """The result of the function, which runs in one of the threads."""
        if not self._started:
            self._started = [threading.Thread(target=self._work, daemon=True) for _ in range(self._threads)]
            for thread in self._started:
                thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        self._calls.put((function, future, loop))
        return await future

    def close(self) -> None:
        """End the threads once they have done what waits."""
        for _ in self._started:
            self._calls.put(None)
        self._started = []

    def _work(self) -> None:
        while self._turn(self._calls.get()):  # nothing of a call is held while the thread waits for the next
            pass

    def _turn(self, call: _Call | None) -> bool:
        if call is None:
            return False
        loop, done = call[2], [_called(call)]
        for _ in range(min(_AT_ONCE, self._calls.qsize() // self._threads)):
            with contextlib.suppress(queue.Empty):
                call = self._calls.get_nowait()
                if call is None or call[2] is not loop:
                    self._calls.put(call)
                    break
                done.append(_called(call))
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(_give, done)
        return True


_AT_ONCE = 8
_Call = tuple[Callable[[], Any], "asyncio.Future[Any]", asyncio.AbstractEventLoop]


def _called(call: _Call) -> tuple[asyncio.Future[object], object, BaseException | None]:
    try:
        return call[1], call[0](), None
    except BaseException as error:  # noqa: BLE001 - given to the caller, whatever it is
        return call[1], None, error


def _give(done: list[tuple[asyncio.Future[object], object, BaseException | None]]) -> None:
    for future, result, error in done:
        if future.done():  # its caller has left
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


_Run = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what they see."""

    service: Service
    key: Key

    @property
    def read(self) -> _Run:
        """Runs a call that only reads."""
        return self.service.read

    @property
    def write(self) -> _Run:
        """Runs a call that writes."""
        return self.service.write

    def store(self, namespace: Sequence[str] | str = ()) -> Any:
        """The store at a namespace below that of the key."""
        path = (*self.key.namespace, *namespace_path(namespace))
        return self.service.store.namespace(*path) if path else self.service.store

    def whole(self, what: str) -> Any:
        """The store, for what concerns the whole file. Raises 403 for a key that is bound to a namespace."""
        if self.key.namespace:
            raise HTTPException(
                403, f"{what} concerns the whole file, and this key is bound to a namespace; use another"
            )
        return self.service.store

    def relative(self, path: Sequence[str]) -> tuple[str, ...]:
        """A path of the store as the caller has it."""
        return tuple(path[len(self.key.namespace) :])


def ability(store: Any, name: str) -> Any:
    """A method that not every store has. Raises ConfigurationError."""
    found = getattr(store, name, None)
    if found is None:
        raise ConfigurationError(f"a {type(store).__name__} has no {name}; serve a VectorStore")
    return found


def caller_of(service: Service, key: Key | None, scope: str) -> Caller:
    """The caller, once it is known to have that scope. Raises 401 and 403."""
    if key is None:
        raise _unknown_caller()
    if scope not in key.scopes:
        raise HTTPException(403, f"the key {key.name!r} has no scope {scope!r}; use one that has it")
    return Caller(service, key)


def _unknown_caller() -> HTTPException:
    told = "Authorization: send 'Bearer TOKEN' with the token of a key that is in use (memevolve-store keys add)"
    return HTTPException(401, told, {"WWW-Authenticate": "Bearer"})


def allow(scope: str) -> Callable[[Request], Awaitable[Caller]]:
    """A dependency: the caller, once it is known to have that scope. Raises 401 and 403."""

    async def caller(request: Request) -> Caller:  # one that is not asynchronous waits for a thread
        return caller_of(request.app.state.service, request.scope["memevolve.key"], scope)

    return caller


def store_of(request: Request) -> StorageBackend:
    """The store as the caller of a request sees it; ``read`` is needed for GET and HEAD, ``write`` for the rest."""
    scope = "read" if request.method in ("GET", "HEAD") else "write"
    caller = caller_of(request.app.state.service, request.scope["memevolve.key"], scope)
    found: StorageBackend = caller.store()
    return found


_Search = Callable[[Receive, Caller], Awaitable[bytes]]


class Gate:
    """ASGI middleware: finds the key, and refuses what is too large, too much at once, or sent by a foreign page.

    ``POST /v1/search`` is answered by ``search``, without the framework's work around a route.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        max_body_bytes: int,
        max_in_flight: int,
        search: _Search,
        registry: CollectorRegistry,
    ) -> None:
        self.app, self.service, self._search = app, service, search
        self._most_bytes, self._most = max_body_bytes, max_in_flight
        self.in_flight = 0
        Gauge("memevolve_http_requests_in_progress", "Requests in progress.", registry=registry).set_function(
            lambda: self.in_flight
        )
        self._seconds = Histogram(
            "memevolve_http_request_duration_seconds",
            "Time of requests until the last byte of the answer.",
            ["method", "route", "status"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        exempt = scope["path"] in _ALWAYS
        refusal = self._refusal(scope)
        self.in_flight += not exempt
        try:
            if refusal is not None:
                await refusal(scope, receive, sending)
            elif scope["path"] == "/v1/search" and scope["method"] == "POST":
                await self._searched(scope, self._bounded(receive), sending)
            else:
                await self.app(scope, self._bounded(receive), sending)
        finally:
            self.in_flight -= not exempt
            route = getattr(scope.get("route"), "path", "/v1/search" if scope["path"] == "/v1/search" else "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._seconds.labels(method, route, status).observe(time.perf_counter() - started)

    async def _searched(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            caller = caller_of(self.service, scope["memevolve.key"], "read")
            text = await self._search(receive, caller)
        except (MemEvolveError, HTTPException, RequestValidationError) as error:
            await answer_of(error)(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    def _key(self, headers: Mapping[bytes, bytes]) -> Key | None:
        if self.service.keys is None:
            return _OPEN
        kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        return self.service.keys.find(token.strip()) if kind.lower() == "bearer" else None

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = {name: value for name, value in scope["headers"] if name in _READ_HEADERS}
        try:
            scope["memevolve.key"] = self._key(headers)
        except (ConfigurationError, OSError):
            told = "the file of keys cannot be read; restore it, the server reads it again within a second"
            return problem(503, told, headers={"Retry-After": "1"})
        if scope["path"].startswith("/v1/units/"):  # an id may hold a slash, so it is decoded by the route
            scope["path"] = scope["raw_path"].decode(errors="replace")
        foreign = self._foreign(headers) if self.service.keys is None else ""
        if foreign:
            return problem(403, foreign)
        if scope["memevolve.key"] is None and not _is_open(scope["path"]):  # before its body is read
            return answer_of(_unknown_caller())
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most_bytes:
            return problem(413, self._limit_text())
        if scope["path"] in _ALWAYS or self.in_flight < self._most:
            return None
        told = f"{self._most} requests are in progress; try again in a second"
        return problem(429, told, headers={"Retry-After": "1"})

    @staticmethod
    def _foreign(headers: Mapping[bytes, bytes]) -> str:
        """Why a request may come from a page of another site, which a browser sends here; empty where it does not."""
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        name = _HOST.fullmatch(host)
        if name is None or not is_loopback(name[1] or name[2] or ""):
            return f"Host: {host!r} is not loopback; without keys only http://127.0.0.1 and localhost are served"
        if origin and origin.partition("://")[2].lower() != host.lower():
            return f"Origin: pages of {origin} may not call this server; add keys to allow them"
        return ""

    def _bounded(self, receive: Receive) -> Receive:
        taken, whole = 0, False

        async def bounded() -> Message:
            nonlocal taken, whole
            if whole:  # what comes now says that the caller has left
                return await receive()
            try:
                with anyio.fail_after(_BODY_SECONDS):
                    message = await receive()
            except TimeoutError:
                told = f"no part of the body came for {_BODY_SECONDS} seconds; send it again"
                raise HTTPException(408, told, {"Connection": "close"}) from None
            whole = not message.get("more_body")
            taken += len(message.get("body", b""))
            if taken > self._most_bytes:
                raise HTTPException(413, self._limit_text())
            return message

        return bounded

    def _limit_text(self) -> str:
        return f"the body is larger than {self._most_bytes} bytes; send less at once, or raise --max-body-mb"


_ALWAYS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Answered however many requests are in progress."""

_READ_HEADERS = frozenset({b"authorization", b"host", b"origin", b"content-length"})

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""Counted by name; others are one, so that a caller cannot make the figures grow without end."""

_BODY_SECONDS = 30
"""Time for the next part of a body to come."""


def _is_open(path: str) -> bool:
    """Whether a path is answered without a key: health, the description of the routes, the files of the page."""
    page = path == "/ui" or (path.startswith("/ui/") and not path.startswith("/ui/api/"))
    return page or path in ("/", "/healthz", "/readyz", "/openapi.json")


def problem(
    status: int,
    detail: str,
    error: str = "",
    headers: Mapping[str, str] | None = None,
    **more: object,
) -> JSONResponse:
    """An error as ``application/problem+json``."""
    title = _RENAMED.get(status) or HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    body |= {"error": error or title.replace(" ", ""), **more}
    return JSONResponse(body, status, dict(headers or {}), "application/problem+json")


_RENAMED = {413: "Content Too Large", 422: "Unprocessable Content"}
"""Titles that only newer versions of Python know."""


def answer_of(error: Exception) -> JSONResponse:
    """An error as JSON that names the parameter and the remedy."""
    if isinstance(error, MemEvolveError):
        status = status_of(error)
        headers = {"Retry-After": "1"} if status == 503 else {}
        more = {"ids": error.ids} if isinstance(error, ConflictError) else {}
        return problem(status, first_line(error), type(error).__name__, headers, **more)
    if isinstance(error, RequestValidationError):
        named = ((".".join(map(str, one["loc"][1:])) or str(one["loc"][0]), one) for one in error.errors())
        parameters = [{"name": name, "message": str(one["msg"])} for name, one in named]
        told = "; ".join(f"{one['name']}: {one['message']}" for one in parameters[:5])
        return problem(422, f"{told}; see /openapi.json", "InvalidRequest", parameters=parameters)
    if isinstance(error, HTTPException):
        return problem(error.status_code, str(error.detail), headers=error.headers)
    return problem(500, "the server failed on this request; its log says why", type(error).__name__)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error with :func:`answer_of`."""

    async def answer(_request: Request, error: Exception) -> JSONResponse:
        return answer_of(error)

    for kind in (MemEvolveError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


def describe_errors(app: FastAPI) -> None:
    """Name in ``/openapi.json`` what :func:`answer_of` answers, in place of the framework's own errors."""
    generated = app.openapi

    def described() -> JsonObject:
        if app.openapi_schema is None:
            schema = generated()
            held = schema["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                held.pop(name, None)
            held["Problem"] = Problem.model_json_schema()
            content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
            for operation in (one for methods in schema["paths"].values() for one in methods.values()):
                operation["responses"].pop("422", None)
                for status in ("4XX", "5XX"):
                    operation["responses"][status] = {"description": "Error", "content": content}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign] # that is how the framework has it
