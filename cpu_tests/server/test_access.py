"""Who may call the server: keys, scopes, namespaces, pages of other sites, and MCP."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_kit import require_server

require_server()

from fastapi import APIRouter
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from memevolve_gpu import ConfigurationError, VectorStore
from memevolve_gpu.server import keys as keys_module
from memevolve_gpu.server.app import create_app
from memevolve_gpu.server.keys import Keys

OPEN = {"/healthz", "/readyz", "/openapi.json"}
ALICE = ("org", "alice")


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setattr(keys_module, "_CHECKED_EVERY", 0.0)
    return Keys(tmp_path / "keys.json")


@pytest.fixture
def client(store: VectorStore, keys: Keys, tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(
        create_app(store, keys, backups=tmp_path / "backups", ui=False), base_url="http://memory.test"
    ) as made:
        yield made


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def routes(app: Any) -> list[tuple[str, str]]:
    """(method, path) of every route, also of routers that are included lazily."""
    paths = app.openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


class TestKeys:
    def test_the_file_holds_hashes_and_is_the_owners(self, keys: Keys) -> None:
        token = keys.add("agent", ["read", "write"], "org/alice")
        text = keys.path.read_text()
        assert token not in text
        assert token.removeprefix("mev_") not in text
        assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
        found = Keys(keys.path).find(token)
        assert found is not None
        assert (found.name, found.scopes, found.namespace) == ("agent", ("read", "write"), ALICE)
        assert [key.name for key in keys] == ["agent"]

    @pytest.mark.parametrize(
        ("name", "scopes", "namespace", "words"),
        [
            ("", ["read"], "", "name"),
            ("a b", ["read"], "", "name"),
            ("a" * 65, ["read"], "", "name"),
            ("a", [], "", "scopes"),
            ("a", ["root"], "", "scopes"),
            ("a", ["read"], "x//y", "namespace"),
            ("taken", ["read"], "", "taken"),
        ],
    )
    def test_what_is_refused(self, keys: Keys, name: str, scopes: list[str], namespace: str, words: str) -> None:
        keys.add("taken", ["read"])
        with pytest.raises(ConfigurationError, match=words):
            keys.add(name, scopes, namespace)
        assert [key.name for key in keys] == ["taken"]

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"keys": [{"name": "a"}]}', '{"keys": 3}'])
    def test_another_file_is_refused_and_kept(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "keys.json"
        path.write_text(text)
        with pytest.raises(ConfigurationError, match="holds no keys"):
            Keys(path)
        assert path.read_text() == text

    def test_processes_that_add_keys_at_once_lose_none(self, keys: Keys) -> None:
        code = (
            "import sys; from memevolve_gpu.server.keys import Keys\n"
            "for n in range(10): Keys(sys.argv[1]).add(f'{sys.argv[2]}{n}', ['read'])"
        )
        running = [subprocess.Popen([sys.executable, "-c", code, str(keys.path), name]) for name in "abc"]
        assert [one.wait() for one in running] == [0, 0, 0]
        assert {key.name for key in keys} == {f"{name}{n}" for name in "abc" for n in range(10)}

    def test_a_key_that_is_removed_elsewhere_is_refused_at_once(self, client: TestClient, keys: Keys) -> None:
        token = Keys(keys.path).add("agent", ["read"])
        assert client.get("/v1/health", headers=bearer(token)).status_code == 200
        assert Keys(keys.path).remove("agent")
        assert not Keys(keys.path).remove("agent")
        assert client.get("/v1/health", headers=bearer(token)).status_code == 401


class TestScopes:
    def test_every_route_asks_for_a_key(self, client: TestClient, keys: Keys) -> None:
        keys.add("agent", ["read", "write", "admin"])
        closed = [(method, path) for method, path in routes(client.app) if path not in OPEN]
        assert len(closed) > 35
        for headers in ({}, bearer("mev_guessed"), {"Authorization": "Basic abc"}, bearer("")):
            for method, path in [*closed, ("POST", "/mcp")]:
                answer = client.request(method, path.format(unit_id="a"), headers=headers, json={})
                assert (answer.status_code, answer.json()["status"]) == (401, 401), path
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "keys add" in answer.json()["detail"]
        assert client.get("/healthz").status_code == 200

    def test_a_scope_allows_what_it_names_and_no_more(self, client: TestClient, keys: Keys) -> None:
        tokens = {scope: keys.add(scope, [scope]) for scope in ("read", "write", "admin")}
        unit = {"units": [{"id": "a", "content": "text"}]}
        for method, path, body, scope in (
            ("POST", "/v1/units", unit, "write"),
            ("PUT", "/v1/units/a", {"content": "x"}, "write"),
            ("POST", "/v1/search", {"query": "text"}, "read"),
            ("POST", "/v1/search/batch", {"queries": ["text"]}, "read"),
            ("GET", "/v1/units", None, "read"),
            ("GET", "/v1/export", None, "read"),
            ("GET", "/metrics", None, "read"),
            ("POST", "/v1/manage/prune", {"criteria": {}, "dry_run": True}, "write"),
            ("POST", "/v1/maintain", {}, "admin"),
            ("POST", "/v1/backup", {"name": "x"}, "admin"),
            ("GET", "/v1/events", None, "admin"),
            ("POST", "/v1/units/clear", {}, "admin"),
            ("DELETE", "/v1/namespaces?namespace=x", None, "admin"),
        ):
            for held, token in tokens.items():
                answer = client.request(method, path, json=body, headers=bearer(token))
                if held == scope:
                    assert answer.is_success, (path, answer.text)
                else:
                    assert (answer.status_code, scope in answer.json()["detail"]) == (403, True), path

    def test_a_bound_key_sees_its_namespace_as_the_whole(
        self, client: TestClient, keys: Keys, store: VectorStore
    ) -> None:
        store.store({"id": "outside", "content": "a secret of others"})
        store.namespace("org", "bob").store({"id": "bob", "content": "a secret of bob"})
        headers = bearer(keys.add("alice", ["read", "write", "admin"], "org/alice"))
        client.post("/v1/units", json={"units": [{"id": "a", "content": "mine"}]}, headers=headers)
        note = {"units": [{"id": "n", "content": "a note"}], "namespace": "notes"}
        client.post("/v1/units", json=note, headers=headers)
        assert store.namespace(*ALICE).exists("a")
        assert store.namespace(*ALICE, "notes").exists("n")
        found = client.get("/v1/namespaces", headers=headers).json()["namespaces"]
        assert [one["path"] for one in found] == [[], ["notes"]]
        below = client.get("/v1/changes", params={"below": True}, headers=headers).json()["changes"]
        assert [(one["id"], one["namespace"]) for one in below] == [("a", []), ("n", ["notes"])]
        hits = client.post("/v1/search", json={"query": "a secret", "top_k": 50, "below": True}, headers=headers).json()
        assert {(hit["id"], tuple(hit.get("namespace", ()))) for hit in hits["hits"]} == {("a", ()), ("n", ("notes",))}
        for method, path, body in (
            ("GET", "/v1/events", None),
            ("POST", "/v1/backup", {}),
            ("GET", "/v1/backups", None),
            ("GET", "/metrics", None),
            ("POST", "/v1/maintain", {}),
        ):
            answer = client.request(method, path, json=body, headers=headers)
            assert (answer.status_code, "bound to a namespace" in answer.json()["detail"]) == (403, True)
        for outside in ("../bob", "/org/bob", ".."):
            asked = {"ids": ["bob", "outside"], "namespace": outside}
            answer = client.post("/v1/units/get", json=asked, headers=headers)
            assert answer.status_code == 422 or answer.json()["units"] == {}
        text = client.get("/v1/export", headers=headers).text + client.get("/v1/stats", headers=headers).text
        assert "secret" not in text


class TestStrangers:
    def test_a_stranger_is_refused_before_a_body_is_read(self, client: TestClient, keys: Keys) -> None:
        keys.add("agent", ["read"])

        async def post(path: str) -> list[Any]:
            """The answer where the body never comes."""
            sent: list[Any] = []

            async def receive() -> Any:
                raise AssertionError("the body was asked for")

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": []}
            await client.app({**scope, "query_string": b"", "app": client.app}, receive, send)  # type: ignore[operator]
            return sent

        for path in ("/v1/units", "/v1/search", "/v1/import", "/mcp", "/ui/api/map", "/metrics", "/nothing"):
            assert asyncio.run(post(path))[0]["status"] == 401, path

    def test_a_file_of_keys_that_breaks_closes_the_server_until_it_is_whole(
        self, client: TestClient, keys: Keys
    ) -> None:
        token = keys.add("agent", ["read"])
        text = keys.path.read_text()
        keys.path.write_text("{")
        for _ in range(2):
            answer = client.get("/v1/health", headers=bearer(token))
            assert (answer.status_code, str(keys.path.parent) in answer.text) == (503, False)
        keys.path.write_text(text)
        assert client.get("/v1/health", headers=bearer(token)).status_code == 200
        keys.path.unlink()
        assert client.get("/v1/health", headers=bearer(token)).status_code == 401

    def test_methods_without_a_name_are_counted_as_one(self, client: TestClient, keys: Keys) -> None:
        headers = bearer(keys.add("agent", ["read"]))
        for i in range(5):
            client.request(f"ODD{i}", "/v1/units", headers=headers)
        text = client.get("/metrics", headers=headers).text
        assert 'method="other"' in text
        assert "ODD" not in text

    def test_no_page_asks_another_host(self, client: TestClient, keys: Keys) -> None:
        headers = bearer(keys.add("agent", ["read"]))
        for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
            assert client.get(path, headers=headers).status_code == 404


class TestBrowsers:
    @pytest.fixture
    def client(self, store: VectorStore) -> Iterator[TestClient]:
        with TestClient(create_app(store, ui=False), base_url="http://127.0.0.1:8321") as made:
            yield made

    @pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "127.0.0.1:8321", "127.0.0.2", "[::1]:8321", "[::1]"])
    def test_without_keys_loopback_names_are_served(self, client: TestClient, host: str) -> None:
        assert client.get("/v1/health", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"Host": "evil.test"},
            {"Host": "127.0.0.1.evil.test"},
            {"Host": ""},
            {"Host": "127.0.0.1:80.evil.test"},
            {"Host": "[::1].evil.test"},
            {"Host": "127.0.0.1@evil.test"},
            {"Host": "localhost.evil.test:8321"},
            {"Host": "127.0.0.1:8321", "Origin": "http://evil.test"},
            {"Host": "127.0.0.1:8321", "Origin": "null"},
        ],
    )
    def test_without_keys_pages_of_other_sites_are_refused(self, client: TestClient, headers: dict[str, str]) -> None:
        for method, path in (("GET", "/v1/units"), ("POST", "/v1/search"), ("POST", "/mcp"), ("GET", "/metrics")):
            answer = client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["error"]) == (403, "Forbidden")


class TestMcp:
    @staticmethod
    def call(client: TestClient, tool: str, headers: dict[str, str], **arguments: Any) -> Any:
        accepted = {"Accept": "application/json, text/event-stream", **headers}
        request = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
        answer = client.post("/mcp", json=request, headers=accepted)
        assert answer.status_code == 200, answer.text
        result = answer.json()["result"]
        assert not result.get("isError"), result
        return json.loads(result["content"][0]["text"])

    def test_each_call_sees_what_its_key_sees(self, client: TestClient, keys: Keys, store: VectorStore) -> None:
        pytest.importorskip("mcp")
        alice = bearer(keys.add("alice", ["read", "write"], "org/alice"))
        whole = bearer(keys.add("whole", ["read", "write"]))
        stored = self.call(client, "remember", alice, content="Rebase before you push")
        assert store.namespace(*ALICE).exists(stored["id"])
        assert len(self.call(client, "recall", alice, query="rebase")["memories"]) == 1
        assert self.call(client, "recall", whole, query="rebase")["memories"] == []
        reader = bearer(keys.add("reader", ["read"]))
        refused = client.post("/mcp", json={}, headers=reader)
        assert (refused.status_code, "write" in refused.json()["detail"]) == (403, True)


def test_a_router_of_the_page_gets_the_store_of_the_caller(client: TestClient, keys: Keys, store: VectorStore) -> None:
    """The agreement with the page: ``router(store_of)``."""
    from fastapi import Depends

    from memevolve_gpu.server.access import store_of

    page = APIRouter()

    def count(found: Any = Depends(store_of)) -> int:  # noqa: B008 - that is how the framework has it
        return int(found.count())

    page.routes.append(APIRoute("/ui/count", count, methods=["GET", "POST"]))
    client.app.include_router(page)  # type: ignore[attr-defined]
    store.store({"content": "outside"})
    alice = bearer(keys.add("alice", ["read"], "org/alice"))
    assert client.get("/ui/count", headers=alice).json() == 0
    assert client.post("/ui/count", headers=alice).status_code == 403
    assert client.get("/ui/count").status_code == 401


def test_keys_on_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "memevolve_gpu", "keys", *arguments, "--store", str(tmp_path / "memory")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = run("add", "agent", "--scope", "read", "--scope", "write", "--namespace", "org/alice")
    found = Keys(tmp_path / "memory.keys.json").find(text.strip())
    assert code == 0
    assert found is not None
    assert (found.name, found.scopes, found.namespace) == ("agent", ("read", "write"), ALICE)
    assert run("add", "agent") == (2, "error: name: there is a key 'agent'; remove it first, or choose another name\n")
    code, listed = run("list")
    assert (code, listed.split()) == (0, ["agent", "read,write", "org/alice"])
    assert run("remove", "agent") == (0, "removed agent\n")
    assert run("remove", "agent")[0] == 3
