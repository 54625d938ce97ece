"""Every route of the server: what it answers, and what it refuses."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_kit import require_server, served

require_server()

from fastapi.testclient import TestClient

from memevolve_gpu import ConfigurationError, HashingEmbedder, VectorStore
from memevolve_gpu.server import access, models
from memevolve_gpu.server.app import create_app, serve

UNITS: list[dict[str, Any]] = [
    {
        "id": f"u{i}",
        "type": ["lesson", "skill"][i % 2],
        "content": f"fact number {i} about topic {i % 7}",
        "tags": [f"t{i % 3}"],
        "metadata": {"score": i},
    }
    for i in range(20)
]


@pytest.fixture
def store(empty: VectorStore) -> VectorStore:
    """Twenty units."""
    empty.store_batch(UNITS)
    return empty


def refused(answer: Any, status: int, *words: str) -> dict[str, Any]:
    """The problem of an answer, once it is known to be one of that status that holds these words."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = models.Problem(**answer.json())
    assert problem.status == status
    for word in words:
        assert word in problem.detail
    return dict(answer.json())


class TestUnits:
    def test_one_is_stored_read_changed_and_deleted_under_any_id(self, client: TestClient) -> None:
        for unit_id, path in (
            ("a/b", "a%2Fb"),
            ("..", "%2E%2E"),
            ("日 本?#", "%E6%97%A5%20%E6%9C%AC%3F%23"),
            ("a%2Fb", "a%252Fb"),
        ):
            unit = {"id": unit_id, "content": "Rebase before you push"}
            stored = client.post("/v1/units", json={"units": [unit]})
            assert (stored.status_code, stored.json()) == (201, {"ids": [unit_id]})
            assert client.get(f"/v1/units/{path}").json()["content"] == "Rebase before you push"
            assert client.patch(f"/v1/units/{path}", json={"metadata": {"n": 1}}).json()["metadata"]["n"] == 1
            assert client.put(f"/v1/units/{path}", json={"content": "Rebase"}).json()["content"] == "Rebase"
            changes = [one["change"] for one in client.get(f"/v1/units/{path}/history").json()["versions"]]
            assert changes == ["put", "edit", "put"]
            assert client.delete(f"/v1/units/{path}").json() == {"deleted": True}
            for answer in (
                client.get(f"/v1/units/{path}"),
                client.put(f"/v1/units/{path}", json={"content": "x"}),
                client.patch(f"/v1/units/{path}", json={"content": "x"}),
                client.delete(f"/v1/units/{path}"),
            ):
                refused(answer, 404, "unit_id", "GET /v1/units")
        assert client.get("/v1/units/never/history").json() == {"versions": []}
        refused(client.get("/v1/units/%FF"), 422, "unit_id", "UTF-8")
        refused(client.delete("/v1/units/a%00b"), 404)

    def test_batches_are_whole_or_nothing(self, client: TestClient) -> None:
        bad = client.post("/v1/units", json={"units": [{"content": "fine"}, {"content": ""}]})
        assert refused(bad, 422, "units[1]", "'content'")["error"] == "InvalidUnitError"
        assert client.post("/v1/count", json={}).json() == {"count": 20}
        vectors = [[1.0] * 64, base64.b64encode(np.ones(64, "<f4").tobytes()).decode()]
        given = {"units": [{"id": "x"}, {"id": "y"}], "embeddings": vectors, "ttl": 60}
        assert client.post("/v1/units", json=given).json() == {"ids": ["x", "y"]}
        assert client.get("/v1/units/x/expiry").json()["expires_at"] > time.time()
        held = client.post("/v1/units/get", json={"ids": ["y", "none"], "vectors": True}).json()
        assert list(held["units"]) == ["y"]
        assert np.frombuffer(base64.b64decode(held["vectors"]["y"]), "<f4").tolist() == [1.0] * 64
        refused(client.post("/v1/units", json={"units": [{"id": "x"}], "embeddings": ["?"]}), 422, "embeddings[0]")
        refused(
            client.post("/v1/units", json={"units": [{"id": "x"}], "embeddings": [[1.0]]}), 422, "expected 64, got 1"
        )
        refused(
            client.post("/v1/units", json={"units": [{"id": "x"}], "embeddings": [[1.0], [1, 2]]}), 422, "one length"
        )
        both = {"units": [{"content": "x"}, {"content": "y"}], "replaces": "u0"}
        refused(client.post("/v1/units", json=both), 422, "replaces")
        gone = refused(client.post("/v1/units", json={"units": [{"content": "x"}], "replaces": "none"}), 409)
        assert gone["ids"] == ["none"]

    def test_the_body_is_checked_by_its_model(self, client: TestClient) -> None:
        wrong = refused(client.post("/v1/units", json={"units": "text", "more": 1}), 422, "units", "/openapi.json")
        assert {one["name"] for one in wrong["parameters"]} == {"units", "more"}
        refused(client.post("/v1/units", content=b"{", headers={"Content-Type": "application/json"}), 422, "JSON")
        refused(client.put("/v1/units/u1", json=[1]), 422)
        refused(client.patch("/v1/units/u1", json={"id": "other"}), 422, "changes['id']")

    def test_pages_come_in_order_with_a_cursor(self, client: TestClient) -> None:
        query: dict[str, Any] = {"order_by": "-metadata.score", "limit": 4, "filters": '{"type": "skill"}'}
        found, after = [], None
        while True:
            page = client.get("/v1/units", params={**query, **({} if after is None else {"after": after})}).json()
            found += [unit["id"] for unit in page["units"]]
            after = page["cursor"]
            if after is None:
                break
        assert found == [f"u{i}" for i in range(19, 0, -2)]
        body = {"order_by": "-metadata.score", "limit": 4, "filters": {"type": "skill"}}
        assert [unit["id"] for unit in client.post("/v1/units/list", json=body).json()["units"]] == found[:4]
        refused(client.get("/v1/units", params={"filters": "{"}), 422, "filters must be JSON")
        refused(client.get("/v1/units", params={"filters": "[1]"}), 422, "JSON object")
        refused(client.get("/v1/units", params={"filters": '{"type": {"near": 1}}'}), 422, "near")
        refused(client.get("/v1/units", params={"order_by": "a..b"}), 422, "order_by")
        refused(client.get("/v1/units", params={"after": "[1]"}), 422, "after")
        refused(client.get("/v1/units", params={"limit": 0}), 422, "limit")

    def test_several_are_changed_counted_and_deleted(self, client: TestClient) -> None:
        skills = {"filters": {"type": "skill"}}
        assert client.post("/v1/count", json=skills).json() == {"count": 10}
        changed = client.post("/v1/units/update", json={**skills, "changes": {"metadata": {"seen": True}}})
        assert changed.json() == {"count": 10}
        facets = client.post("/v1/facets", json={"field": "metadata.seen"}).json()["facets"]
        assert facets == [{"value": True, "count": 10}]
        assert client.post("/v1/units/delete", json={"ids": ["u1", "none"]}).json() == {"count": 1}
        assert client.post("/v1/units/delete", json=skills).json() == {"count": 9}
        swap = {"delete_ids": ["u0"], "units": [{"id": "n", "content": "new"}]}
        assert client.post("/v1/units/replace", json=swap).json() == {"ids": ["n"]}
        refused(client.post("/v1/units/replace", json={**swap, "unchanged_since": 0}), 409)
        assert client.post("/v1/units/expiry", json={"ids": ["n", "none"], "expires_at": 1.0}).json() == {"count": 1}
        refused(client.get("/v1/units/n"), 404)
        assert client.post("/v1/units/clear", json={}).json() == {"count": 9}
        refused(client.post("/v1/units/delete", json={}), 422, "ids or filters")
        refused(client.post("/v1/units/delete", json={"filters": {}}), 422, "condition")
        refused(client.post("/v1/units/expiry", json={"ids": ["u2"], "ttl": 1, "expires_at": 2}), 422, "one of them")
        refused(client.post("/v1/units/update", json={"filters": {"a": {}}, "changes": {}}), 422)
        refused(client.post("/v1/count", json={"filters": {"a": {}}}), 422)
        refused(client.post("/v1/facets", json={"field": "a..b"}), 422, "a..b")

    def test_accesses_are_counted(self, client: TestClient) -> None:
        client.get("/v1/units/u3", params={"record": True})
        client.post("/v1/units/get", json={"ids": ["u3", "u4"], "record": True, "units": False})
        assert client.get("/v1/access").json() == {"counts": {"u3": 2, "u4": 1}}
        assert client.get("/v1/access/order", params={"kind": "lfu", "limit": 19}).json()["ids"][-1] == "u4"
        refused(client.get("/v1/access/order", params={"kind": "age"}), 422, "kind")


class TestSearches:
    def test_by_meaning_by_words_by_both_and_by_vector(self, client: TestClient, store: VectorStore) -> None:
        text = "fact number 7 about topic 0"
        vector = store.vectors_of(["u7"])["u7"]
        for body in (
            {"query": text},
            {"query": text, "mode": "keyword"},
            {"query": text, "mode": "hybrid"},
            {"query": text, "recency": {"half_life": "30d"}},
            {"vector": vector.tolist()},
            {"vector": base64.b64encode(vector.tobytes()).decode(), "recall": 1.0},
        ):
            hits = client.post("/v1/search", json={**body, "top_k": 3}).json()["hits"]
            assert (len(hits), hits[0]["id"], hits[0]["unit"]) == (3, "u7", store.retrieve("u7"))
            assert hits[0]["score"] >= hits[1]["score"]
            models.Hits(hits=hits)
            paged = client.post("/v1/search", json={**body, "top_k": 2, "offset": 1, "units": False}).json()["hits"]
            assert [hit["id"] for hit in paged] == [hit["id"] for hit in hits[1:]]
            assert not any(hit.get("unit") for hit in paged)
            some = client.post("/v1/search", json={**body, "filters": {"type": "lesson"}}).json()["hits"]
            assert {hit["unit"]["type"] for hit in some} == {"lesson"}
            least = hits[1]["score"]
            cut = client.post("/v1/search", json={**body, "top_k": 20, "min_score": least}).json()["hits"]
            assert all(hit["score"] >= least for hit in cut)

    def test_several_at_once(self, client: TestClient, store: VectorStore) -> None:
        texts = [f"{unit['content']} {unit['tags'][0]} {unit['type']}" for unit in UNITS[:5]]
        by_text = client.post("/v1/search/batch", json={"queries": texts, "top_k": 2}).json()["results"]
        vectors = [vector.tolist() for vector in store.vectors_of([f"u{i}" for i in range(5)]).values()]
        by_vector = client.post("/v1/search/batch", json={"vectors": vectors, "top_k": 2}).json()["results"]
        assert (
            [hits[0]["id"] for hits in by_text] == [hits[0]["id"] for hits in by_vector] == [f"u{i}" for i in range(5)]
        )
        models.HitsBatch(results=by_text)
        assert client.post("/v1/search/batch", json={"vectors": []}).json() == {"results": []}
        refused(client.post("/v1/search/batch", json={}), 422, "queries, vectors")
        refused(client.post("/v1/search/batch", json={"vectors": [[1.0]]}), 422, "expected 64, got 1")

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ({}, "query, vector"),
            ({"query": "a", "vector": [1.0]}, "query, vector"),
            ({"vector": [1.0] * 64, "mode": "keyword"}, "mode"),
            ({"vector": [1.0]}, "expected 64, got 1"),
            ({"vector": "?"}, "vector"),
            ({"vector": [1e300] * 64}, "infinity"),
            ({"vector": base64.b64encode(np.full(64, np.nan, "<f4").tobytes()).decode()}, "infinity"),
            ({"query": "a", "top_k": 0}, "top_k"),
            ({"query": "a", "recall": 2}, "recall"),
            ({"query": "a", "filters": {"a": {}}}, "a"),
            ({"query": "a", "more": 1}, "more"),
            ({"query": "a", "mode": "magic"}, "mode"),
            ({"query": "a", "recency": {"half_life": "soon"}}, "half-life"),
            ({"query": "a", "namespace": "a//b"}, "namespace"),
            ("text", "body"),
        ],
    )
    def test_what_is_refused(self, client: TestClient, body: Any, words: str) -> None:
        refused(client.post("/v1/search", json=body), 422, words)

    def test_no_json_is_refused(self, client: TestClient) -> None:
        for text in (b"", b"{", b"\xff", b'{"query": "\\ud800"}'):
            refused(client.post("/v1/search", content=text), 422, "JSON")

    def test_units_are_compared_and_sampled(self, client: TestClient) -> None:
        body = {"query": "fact number 3 about topic 3", "ids": ["u3", "none"]}
        found = client.post("/v1/similarities", json=body).json()["similarities"]
        assert list(found) == ["u3"]
        assert 0.5 < found["u3"] <= 1.0001
        assert len(client.post("/v1/vectors/sample", json={"count": 5}).json()["vectors"]) == 5
        refused(client.post("/v1/vectors/sample", json={"count": -1}), 422, "count")


class TestNamespaces:
    def test_units_of_one_are_seen_in_it_alone(self, client: TestClient) -> None:
        client.post("/v1/units", json={"units": [{"id": "a", "content": "mine"}], "namespace": "org/alice"})
        assert client.get("/v1/units/a", params={"namespace": "org/alice"}).status_code == 200
        refused(client.get("/v1/units/a"), 404)
        listed = client.get("/v1/namespaces", params={"prefix": "org"}).json()["namespaces"]
        assert [(one["path"], one["count"]) for one in listed] == [(["org", "alice"], 1)]
        limits = client.put("/v1/namespaces", json={"namespace": ["org", "alice"], "max_units": 1}).json()
        assert (limits["path"], limits["max_units"]) == (["org", "alice"], 1)
        full = client.post("/v1/units", json={"units": [{"content": "more"}], "namespace": "org/alice"})
        assert refused(full, 507)["error"] == "CapacityError"
        below = client.post("/v1/search", json={"query": "mine", "below": True, "namespace": "org"}).json()["hits"]
        assert [(hit["id"], hit["namespace"]) for hit in below] == [("a", ["alice"])]
        assert client.delete("/v1/namespaces", params={"namespace": "org/alice"}).json() == {"count": 1}
        refused(client.delete("/v1/namespaces"), 422, "namespace")
        refused(client.put("/v1/namespaces", json={"max_units": 0}), 422, "max_units")
        refused(client.get("/v1/units", params={"namespace": "a//b"}), 422, "namespace")


class TestManaging:
    def test_dry_runs_change_nothing_and_an_undo_takes_back(self, client: TestClient) -> None:
        client.post(
            "/v1/units",
            json={"units": [{"id": "twin", "content": "fact number 1 about topic 1", "type": "skill", "tags": ["t1"]}]},
        )
        for name, body, count in (
            ("prune", {"criteria": {"max_count": 15}}, 6),
            ("deduplicate", {"similarity_threshold": 0.999}, 1),
            ("forget", {"strategy": "lru", "count": 2}, 2),
            ("consolidate", {"ids": ["u1", "twin"], "similarity_threshold": 0.99}, 1),
        ):
            tried = client.post(f"/v1/manage/{name}", json={**body, "dry_run": True}).json()
            assert (tried["dry_run"], tried["count"]) == (True, count), name
            assert client.post("/v1/count", json={}).json() == {"count": 21}
            done = client.post(f"/v1/manage/{name}", json=body).json()
            assert (done["dry_run"], done["count"]) == (False, count)
            newest = client.get("/v1/operations", params={"limit": 1}).json()["operations"][0]
            assert newest["kind"] == name
            undone = client.post("/v1/undo", json={"operation": newest["id"]}).json()
            assert undone["kind"] == "undo"
            assert client.post("/v1/count", json={}).json() == {"count": 21}
        refused(client.post("/v1/undo", json={"operation": 10_000}), 404)
        refused(client.post("/v1/manage/prune", json={"criteria": {"colour": 1}}), 422, "colour")
        refused(client.post("/v1/manage/deduplicate", json={"similarity_threshold": 2}), 422, "similarity_threshold")
        refused(client.post("/v1/manage/forget", json={"strategy": "age"}), 422, "strategy")
        refused(client.post("/v1/manage/consolidate", json={"by": "age"}), 422, "by")
        refused(client.get("/v1/operations", params={"limit": 0}), 422, "limit")

    def test_changes_are_followed(self, client: TestClient) -> None:
        first = client.get("/v1/changes", params={"limit": 15}).json()
        rest = client.get("/v1/changes", params={"after": first["next"]}).json()
        ids = [change["id"] for change in first["changes"] + rest["changes"]]
        assert ids == [f"u{i}" for i in range(20)]
        assert client.get("/v1/changes", params={"after": rest["next"]}).json() == {"changes": [], "next": rest["next"]}
        refused(client.get("/v1/changes", params={"after": 10**9}), 404)

    def test_an_operation_of_a_client_is_reported(self, client: TestClient) -> None:
        done = client.post("/v1/operations", json={"operation": "prune", "details": {"removed": 3}})
        assert (done.status_code, done.json()["details"]) == (201, {"removed": 3})
        refused(client.post("/v1/operations", json={"operation": "paint"}), 422, "paint")


class TestTheWhole:
    def test_reports(self, client: TestClient) -> None:
        assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}
        assert client.get("/v1/health").json()["current_count"] == 20
        assert client.get("/v1/stats").json()["count"] == 20
        assert client.get("/v1/inventory").json()["types"] == {"lesson": 10, "skill": 10}
        assert isinstance(client.get("/v1/events").json()["events"], list)
        assert "actions" in client.post("/v1/maintain", json={"retrain": True}).json()
        assert "actions" in client.post("/v1/maintain").json()
        refused(client.post("/v1/maintain", json={"now": 1}), 422, "now")
        refused(client.get("/v1/nothing"), 404)
        refused(client.delete("/v1/health"), 405)

    def test_a_closed_store_is_not_ready(self, client: TestClient, store: VectorStore) -> None:
        store.close()
        assert client.get("/healthz").status_code == 200
        assert refused(client.get("/readyz"), 503, "closed")["error"] == "StoreClosedError"
        assert "memevolve_up 0.0" in client.get("/metrics").text
        answer = client.get("/v1/units")
        refused(answer, 503)
        assert answer.headers["retry-after"] == "1"

    def test_backups_are_stores(self, client: TestClient, tmp_path: Path) -> None:
        made = client.post("/v1/backup", json={"name": "first"})
        assert (made.status_code, made.json()["name"]) == (201, "first")
        client.post("/v1/backup", json={})
        assert {one["name"] for one in client.get("/v1/backups").json()["backups"]} > {"first"}
        assert VectorStore.restore(tmp_path / "backups" / "first", tmp_path / "again") is None
        with VectorStore(tmp_path / "again", HashingEmbedder(64)) as again:
            assert again.count() == 20
        refused(client.post("/v1/backup", json={"name": "first"}), 422, "name")
        for name in ("../x", "/etc/x", ".x", "a/b", ""):
            refused(client.post("/v1/backup", json={"name": name}), 422, "name")

    @pytest.mark.parametrize("vectors", [False, True])
    def test_what_is_exported_is_imported(self, client: TestClient, store: VectorStore, vectors: bool) -> None:
        answer = client.get("/v1/export", params={"vectors": vectors, "filters": '{"type": "skill"}'})
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        assert len(answer.text.splitlines()) == 10
        held = store.vectors_of(["u1"])["u1"]
        client.post("/v1/units/clear", json={})
        assert client.post("/v1/import", content=answer.content).json() == {"count": 10}
        assert [unit["id"] for unit in store.units()] == [f"u{i}" for i in range(1, 20, 2)]
        assert np.allclose(store.vectors_of(["u1"])["u1"], held)
        refused(client.get("/v1/export", params={"filters": '{"a": {}}'}), 422)

    def test_a_bad_line_imports_nothing(self, client: TestClient) -> None:
        good = json.dumps({"content": "new"})
        for bad, words in (
            ("{", "line 2 is no JSON"),
            ("[1]", "line 2 is no JSON object"),
            ('{"unit": {"content": "x"}, "vector": [1]}', "1 of 2 lines"),
            ('{"content": ""}', "units[1]"),
        ):
            refused(client.post("/v1/import", content=f"{good}\n{bad}\n"), 422, words)
        assert client.post("/v1/count", json={}).json() == {"count": 20}

    def test_the_description_names_every_route(self, client: TestClient) -> None:
        described = client.get("/openapi.json").json()["paths"]
        assert {"/v1/search", "/v1/units/{unit_id}", "/metrics", "/healthz"} <= set(described)
        for path, methods in described.items():
            for method, one in methods.items():
                assert one.get("description"), (path, method)


class TestLimits:
    def test_a_body_beyond_the_limit(self, store: VectorStore) -> None:
        app = create_app(store, max_body_mb=1, ui=False, mcp=False)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            big = b'{"query": "' + b"x" * 2**20 + b'"}'
            refused(client.post("/v1/search", content=big), 413, "--max-body-mb")
            refused(client.post("/v1/search", content=iter([big])), 413, "--max-body-mb")  # without Content-Length
            refused(client.post("/v1/import", content=iter([big])), 413, "--max-body-mb")
            refused(client.post("/v1/units", content=iter([big])), 413, "--max-body-mb")
            assert client.get("/healthz").status_code == 200

    def test_too_many_at_once_are_told_to_wait_and_searches_go_on_while_writes_wait(self, store: VectorStore) -> None:
        entered, go = threading.Event(), threading.Event()
        embed = store.embedding_function

        class Slow(VectorStore):
            def store(self, *arguments: Any, **named: Any) -> str:
                entered.set()
                go.wait(20)
                return super().store(*arguments, **named)

        store.__class__ = Slow
        assert embed is not None
        app = create_app(store, max_in_flight=3, writers=2, ui=False, mcp=False)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            body = {"units": [{"content": "slow"}]}

            def write() -> None:
                while client.post("/v1/units", json=body).status_code == 429:  # a search may hold the third place
                    time.sleep(0.01)

            threads = [threading.Thread(target=write) for _ in range(3)]
            for thread in threads[:2]:
                thread.start()
            assert entered.wait(20)
            assert client.post("/v1/search", json={"query": "fact"}).status_code == 200
            threads[2].start()
            until = time.monotonic() + 20
            while (answer := client.post("/v1/search", json={"query": "fact"})).status_code == 200:
                assert time.monotonic() < until
                time.sleep(0.01)
            refused(answer, 429, "3 requests")
            assert answer.headers["retry-after"] == "1"
            assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
            go.set()
            for thread in threads:
                thread.join()
            assert client.post("/v1/count", json={}).json() == {"count": 23}

    def test_a_body_that_stops_coming_is_given_up(self, store: VectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(access, "_BODY_SECONDS", 0.2)
        head = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        with served(store, ui=False, mcp=False) as url:
            for path in (b"/v1/search", b"/v1/units", b"/v1/import"):
                with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as sending:
                    sending.sendall(head % path)
                    assert sending.recv(4096).startswith(b"HTTP/1.1 408 "), path

    def test_units_that_no_answer_could_hold_are_refused(self, client: TestClient) -> None:
        def deep(levels: int) -> dict[str, Any]:
            value: dict[str, Any] = {}
            for _ in range(levels):
                value = {"a": value}
            return {"id": f"deep{levels}", "content": "text", "metadata": value}

        assert client.post("/v1/units", json={"units": [deep(90)]}).status_code == 201
        for levels in (110, 240, 400):
            refused(client.post("/v1/units", json={"units": [deep(levels)]}), 422, "nested more than 100 levels")
            refused(client.post("/v1/import", content=json.dumps(deep(levels))), 422, "nested more than 100 levels")
        assert client.get("/v1/units", params={"limit": 1000}).json()["units"][-1]["id"] == "deep90"
        for body in ({"query": "text"}, {"query": "text", "mode": "keyword"}, {"query": "text", "mode": "hybrid"}):
            hits = client.post("/v1/search", json={**body, "top_k": 1000}).json()["hits"]
            assert "deep90" in [hit["id"] for hit in hits]
        assert client.get("/v1/export").text.count("\n") == 21

    def test_details_of_operations_may_be_odd(self, client: TestClient) -> None:
        for text in (b'"\\ud800"', b"NaN", b"1e999", b"9" * 400, b"[" * 50 + b"]" * 50):
            body = b'{"operation": "prune", "details": {"a": %s}}' % text
            answer = client.post("/v1/operations", content=body, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["operation"]) == (201, "prune"), text

    def test_times_may_differ_from_unit_to_unit(self, client: TestClient) -> None:
        later = time.time() + 900
        body = {"units": [{"id": "never"}, {"id": "later"}], "embeddings": [[1.0] * 64] * 2}
        client.put("/v1/namespaces", json={"namespace": "short", "default_ttl": 5})
        given = {**body, "namespace": "short", "expires_at": [None, later]}
        assert client.post("/v1/units", json=given).status_code == 201
        moments = [
            client.get(f"/v1/units/{name}/expiry", params={"namespace": "short"}).json()["expires_at"]
            for name in ("never", "later")
        ]
        assert moments == [None, pytest.approx(later, abs=0.001)]
        refused(client.post("/v1/units", json={**body, "ttl": [1]}), 422, "ttl", "list of 2")

    def test_units_are_erased_for_good(self, client: TestClient) -> None:
        done = client.post("/v1/units/erase", json={"filters": {"type": "skill"}}).json()
        assert (done["units"], client.get("/v1/units/u1/history").json()) == (10, {"versions": []})
        assert not any("/" in name for name in done["files"])
        refused(client.post("/v1/units/erase", json={"filters": {}}), 422, "filters")

    @pytest.mark.parametrize("bad", [{"max_body_mb": 0}, {"max_in_flight": -1}, {"readers": 0}, {"writers": 1.5}])
    def test_limits_are_checked(self, store: VectorStore, bad: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(bad))):
            create_app(store, **bad)

    def test_a_failure_of_the_server_is_json_too(self, store: VectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        app = create_app(store, ui=False, mcp=False)
        monkeypatch.setattr(type(store), "inventory", broken)
        monkeypatch.setattr(type(store), "search_units", broken)
        with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
            refused(client.get("/v1/inventory"), 500, "its log")
            refused(client.post("/v1/search", json={"query": "a"}), 500, "its log")

    def test_what_is_no_store_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="store must be"):
            create_app("memory")  # type: ignore[arg-type]

    def test_other_addresses_need_keys(self, store: VectorStore, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"host '0\.0\.0\.0'.*keys add"):
            serve(create_app(store, ui=False, mcp=False), "0.0.0.0")
        with pytest.raises(ConfigurationError, match="keys add"):
            serve(create_app(store, tmp_path / "no-keys.json", ui=False, mcp=False), "0.0.0.0")
