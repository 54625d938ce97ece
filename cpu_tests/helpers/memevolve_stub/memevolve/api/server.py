"""MemEvolve's server from outside: an ASGI application that takes middleware, and the memory system in use."""

from __future__ import annotations

import json
from typing import Any

memory: Any = None
ANSWERS = {
    "/health": ("application/json", json.dumps({"status": "healthy"}), 200),
    "/dashboard-data": ("application/json", json.dumps(["no object"]), 200),
    "/dashboard": ("text/html", "<html><body><h1>Dashboard</h1></body></html>", 200),
    "/other": ("application/json", json.dumps({"status": "healthy"}), 200),
}


def get_memory_system() -> Any:
    """The memory system in use."""
    return memory


class App:
    """Answers GET requests in two pieces, as a streamed response comes."""

    def __init__(self) -> None:
        self.call: Any = self.answer

    def add_middleware(self, middleware: Any, **options: Any) -> None:
        """Put a middleware before what there is."""
        self.call = middleware(self.call, **options)

    async def answer(self, scope: Any, _receive: Any, send: Any) -> None:
        """The innermost application."""
        kind, body, status = ANSWERS.get(scope["path"], ("application/json", "{}", 404))
        half = len(body) // 2
        headers = [(b"Content-Type", kind.encode()), (b"Content-Length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:half].encode(), "more_body": True})
        await send({"type": "http.response.body", "body": body[half:].encode()})


app = App()
