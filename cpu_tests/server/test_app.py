"""The routes of the server, through a test client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra server is not installed")

from fastapi.testclient import TestClient

from memevolve_gpu import HashingEmbedder, VectorStore
from memevolve_gpu.server.app import create_app


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with VectorStore(tmp_path / "memory", HashingEmbedder(64), storage_config={"background": False}) as store:
        app = create_app(store, backups=tmp_path / "backups")
        with TestClient(app, base_url="http://127.0.0.1") as made:
            yield made


def test_a_unit_is_stored_found_changed_and_deleted(client: TestClient) -> None:
    unit = {"id": "a/b", "type": "lesson", "content": "Rebase before you push"}
    assert client.post("/v1/units", json={"units": [unit]}).json() == {"ids": ["a/b"]}
    hits = client.post("/v1/search", json={"query": "rebase"}).json()["hits"]
    assert [hit["id"] for hit in hits] == ["a/b"]
    assert client.patch("/v1/units/a%2Fb", json={"metadata": {"score": 1}}).json()["metadata"]["score"] == 1
    versions = client.get("/v1/units/a%2Fb/history").json()["versions"]
    assert [version["change"] for version in versions] == ["put", "edit"]
    assert client.delete("/v1/units/a%2Fb").json() == {"deleted": True}
    missing = client.get("/v1/units/a%2Fb")
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")
