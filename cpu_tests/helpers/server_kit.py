"""A real server on a port of its own, for tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

__all__ = ["has_server", "require_server", "served"]


def has_server() -> bool:
    """Whether the extra ``server`` is installed."""
    return all(find_spec(name) is not None for name in ("fastapi", "uvicorn", "prometheus_client", "opentelemetry"))


def require_server() -> None:
    """Skip the module that calls this where the extra ``server`` is not installed."""
    if not has_server():
        pytest.skip("the extra server is not installed; see scripts/test-server", allow_module_level=True)


@contextmanager
def served(store: Any, keys: Any = None, **options: Any) -> Iterator[str]:
    """The address of a server over the store, which runs in a thread until the block ends."""
    import uvicorn

    from memevolve_gpu.server.app import create_app

    listening = socket.create_server(("127.0.0.1", 0))
    app = create_app(store, keys, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
