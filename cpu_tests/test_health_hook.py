"""The store's report in the answers of MemEvolve's server; the stand-in's server takes its place."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memevolve_gpu import HashingEmbedder, VectorStore
from memevolve_gpu.health_hook import add_to_app, add_to_memory_system

SERVER = Path(__file__).parent / "helpers/memevolve_stub/memevolve/api/server.py"


@pytest.fixture
def server() -> Any:
    """A fresh stand-in of MemEvolve's server, with the hook."""
    spec = importlib.util.spec_from_file_location("stand_in_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    add_to_app(module.app, module.get_memory_system)
    return module


def get(server: Any, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and body of one answer; its content-length is right."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    asyncio.run(server.app.call({"type": "http", "method": method, "path": path}, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    lengths = [value for name, value in sent[0]["headers"] if name.lower() == b"content-length"]
    assert lengths == [str(len(body)).encode()]
    return sent[0]["status"], body.decode()


def test_the_report_is_where_operators_look(server: Any, tmp_path: Path) -> None:
    with VectorStore(tmp_path / "memory", HashingEmbedder(16), 16) as store:
        store.store({"id": "a", "content": "a <b> & c"})
        server.memory = SimpleNamespace(storage=store)
        expected = json.loads(json.dumps(store.get_storage_health()))
        assert get(server, "/memory/storage") == (200, json.dumps(expected))
        assert json.loads(get(server, "/health")[1]) == {"status": "healthy", "storage": expected}
        page = get(server, "/dashboard")[1]
        assert page.startswith("<html><body><h1>Dashboard</h1><section")
        assert page.endswith("</section>\n</body></html>")
        assert "&quot;current_count&quot;: 1" in page


def test_other_answers_stay_as_they_are(server: Any, tmp_path: Path) -> None:
    with VectorStore(tmp_path / "memory", HashingEmbedder(16), 16) as store:
        server.memory = SimpleNamespace(storage=store)
        assert get(server, "/other")[1] == '{"status": "healthy"}'
        assert get(server, "/health", "POST")[1] == '{"status": "healthy"}'
        assert get(server, "/dashboard-data")[1] == '["no object"]'
        server.ANSWERS["/health"] = ("application/json", '{"storage": "theirs"}', 200)
        assert get(server, "/health")[1] == '{"storage": "theirs"}'
        for body, status in (('{"detail": "failed"}', 500), ("not json", 200), ("", 200)):
            server.ANSWERS["/health"] = ("application/json", body, status)
            assert get(server, "/health") == (status, body)


def test_without_a_memory_system_nothing_is_added(server: Any) -> None:
    assert get(server, "/health") == (200, '{"status": "healthy"}')
    assert get(server, "/memory/storage")[0] == 503


def test_a_closed_store_does_not_fail_the_health_endpoint(server: Any, tmp_path: Path) -> None:
    store = VectorStore(tmp_path / "memory", HashingEmbedder(16), 16)
    store.close()
    server.memory = SimpleNamespace(storage=store)
    status, body = get(server, "/health")
    assert status == 200
    assert "closed" in json.loads(body)["storage"]["error"]


def test_a_memory_system_gets_the_method_and_keeps_one_that_it_has() -> None:
    class Plain:
        storage = SimpleNamespace(count=lambda: 3)

    class Own:
        def get_storage_health(self) -> str:
            return "own"

    add_to_memory_system(Plain)
    add_to_memory_system(Own)
    assert Plain().get_storage_health() == {"current_count": 3}  # type: ignore[attr-defined]
    assert Own().get_storage_health() == "own"
