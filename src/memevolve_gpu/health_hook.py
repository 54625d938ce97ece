"""Adds the store's health report to MemEvolve's health endpoint and dashboard.

``memevolve_gpu.dropin`` does this when MemEvolve is imported. A program that passes the store to MemEvolve itself does
it before the server starts::

    from memevolve.api import server
    from memevolve_gpu.health_hook import add_to_app, add_to_memory_system

    add_to_memory_system(server.MemorySystem)
    add_to_app(server.app, server.get_memory_system)

Then ``MemorySystem.get_storage_health()`` exists, ``GET /memory/storage`` returns the report, the JSON of ``/health``
and ``/dashboard-data`` has it under ``storage``, and ``/dashboard`` shows it at its end.
"""

from __future__ import annotations

import asyncio
import html
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from .errors import MemEvolveError

if TYPE_CHECKING:
    from .types import JsonObject

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

REPORT_PATH = "/memory/storage"
JSON_PATHS = frozenset({"/health", "/dashboard-data"})
PAGE_PATH = "/dashboard"


def add_to_memory_system(memory_system: type) -> None:
    """Add the method ``get_storage_health`` to MemEvolve's ``MemorySystem``, unless it has one.

    The method returns the report of the storage backend; ``current_count`` alone if the backend has none.

    Args:
        memory_system: The class.

    Examples:
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> from memevolve_gpu.health_hook import add_to_memory_system
        >>> class MemorySystem:
        ...     storage = ScratchStore([{"id": "a", "content": "one"}])
        >>> add_to_memory_system(MemorySystem)
        >>> MemorySystem().get_storage_health()
        {'current_count': 1}
    """
    if not hasattr(memory_system, "get_storage_health"):
        memory_system.get_storage_health = _get_storage_health  # type: ignore[attr-defined]


def add_to_app(app: Any, get_memory_system: Callable[[], Any]) -> None:
    """Add the report to the responses of MemEvolve's server. Call it before the server starts.

    Args:
        app: Its FastAPI application, or any with ``add_middleware``.
        get_memory_system: Returns the memory system in use, or None while there is none.
    """
    app.add_middleware(_StorageHealth, get_memory_system=get_memory_system)


def _get_storage_health(memory_system: Any) -> JsonObject:
    """Return the storage backend's report; ``current_count`` alone if it has none."""
    storage = getattr(memory_system, "storage", None)
    if storage is None:
        return {"error": "the memory system has no storage"}
    report = getattr(storage, "get_storage_health", None)
    found: JsonObject = {"current_count": storage.count()} if report is None else report()
    return found


class _StorageHealth:
    """ASGI middleware: serves REPORT_PATH, and adds the report to the responses of JSON_PATHS and PAGE_PATH."""

    def __init__(self, app: App, get_memory_system: Callable[[], Any]) -> None:
        self.app = app
        self.get_memory_system = get_memory_system

    async def __call__(self, scope: MutableMapping[str, object], receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if scope["type"] != "http" or scope["method"] != "GET" or path not in {REPORT_PATH, PAGE_PATH, *JSON_PATHS}:
            await self.app(scope, receive, send)
            return
        report = await asyncio.to_thread(self._report)
        if path == REPORT_PATH:
            await _send_json(send, *((200, report) if report is not None else (503, {"detail": "no memory system"})))
        elif report is None:
            await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, _Rewriter(send, _in_page if path == PAGE_PATH else _in_json, report).send)

    def _report(self) -> JsonObject | None:
        memory_system = self.get_memory_system()
        if memory_system is None:
            return None
        try:
            return _get_storage_health(memory_system)
        except MemEvolveError as error:  # a closed store must not fail the health endpoint
            return {"error": f"{type(error).__name__}: {error}"}


class _Rewriter:
    """Collects the whole response body, and sends it on with the report added."""

    def __init__(self, send: Send, rewrite: Callable[[bytes, JsonObject], bytes | None], report: JsonObject) -> None:
        self._send = send
        self._rewrite = rewrite
        self._report = report
        self._start: Message = {}
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        """Handle one ASGI message of the response."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        body = bytes(self._body)
        if self._start["status"] == 200:
            body = self._rewrite(body, self._report) or body
        kept = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        headers = [*kept, (b"content-length", str(len(body)).encode())]
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _in_json(body: bytes, report: JsonObject) -> bytes | None:
    """Add ``storage`` to a JSON object; None for what is no object or has that key already."""
    try:
        found = json.loads(body)
    except ValueError:
        return None
    if not isinstance(found, dict) or "storage" in found:
        return None
    return json.dumps({**found, "storage": report}, default=str).encode()


def _in_page(body: bytes, report: JsonObject) -> bytes | None:
    """Add a section at the end of a page; None for what is no HTML page."""
    before, end, after = body.rpartition(b"</body>")
    if not end:
        return None
    text = html.escape(json.dumps(report, indent=2, default=str))
    section = f'<section id="storage" style="padding: 1rem"><h2>Storage</h2><pre>{text}</pre></section>\n'
    return before + section.encode() + end + after


async def _send_json(send: Send, status: int, found: JsonObject) -> None:
    body = json.dumps(found, default=str).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
