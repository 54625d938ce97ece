"""What ``RemoteStore`` does beyond the contract of backends, over a real server; and ``serve``, ended under load."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from server_kit import require_server

require_server()

from server_kit import served
from support import as_child, ended, fork

from memevolve_gpu import (
    ConfigurationError,
    ConflictError,
    HashingEmbedder,
    HistoryError,
    InvalidQueryError,
    InvalidVectorError,
    StorageError,
    StoreClosedError,
    StoreUnavailableError,
    VectorStore,
)
from memevolve_gpu.server.client import RemoteStore
from memevolve_gpu.server.keys import Keys


@pytest.fixture
def remote(store: VectorStore, tmp_path: Path) -> Iterator[RemoteStore]:
    with served(store, backups=tmp_path / "backups", ui=False) as url, RemoteStore(url) as made:
        yield made


def test_history_is_read_and_undone(remote: RemoteStore) -> None:
    remote.store({"id": "a", "content": "one"})
    remote.update("a", {"content": "two"})
    assert [(version.change, version.unit and version.unit["content"]) for version in remote.history("a")] == [
        ("put", "one"),
        ("put", "two"),
    ]
    newest = remote.operations(1)[0]
    assert remote.undo(newest.id).kind == "undo"
    assert remote.data["a"]["content"] == "one"
    assert [change.id for change in remote.changes()] == ["a"] * 3
    assert [change.seq for change in remote.changes(limit=2)] == [change.seq for change in remote.changes()][:2]
    assert list(remote.changes(remote.change_number)) == []
    with pytest.raises(HistoryError):
        remote.undo(10_000)


def test_namespaces_and_expiry(remote: RemoteStore) -> None:
    alice = remote.namespace("org", "alice")
    alice.store_batch([{"id": "a", "content": "one"}, {"id": "b", "content": "two"}], ttl=3600)
    assert (alice.count(), remote.count()) == (2, 0)
    assert alice.expiry("a") is not None
    assert remote.expiry("a") is None
    assert alice.set_expiry(["a"], expires_at=1.0) == 1
    assert not alice.exists("a")
    info = alice.set_limits(max_units=3, default_ttl=60)
    assert (info.path, info.max_units, info.default_ttl) == (("org", "alice"), 3, 60.0)
    assert [found.path for found in remote.namespaces("org")] == [("org", "alice")]
    hits = alice.search_units("two")
    assert [(hit.id, hit.namespace) for hit in hits] == [("b", ("org", "alice"))]
    assert remote.namespace("org").delete_namespace("alice") >= 1
    assert remote.namespaces("org") == []
    assert repr(alice).endswith("namespace 'org/alice'>")


def test_the_times_of_many_units_are_read_in_one_request(store: VectorStore, tmp_path: Path) -> None:
    sent: list[httpx.Request] = []
    client = httpx.Client(event_hooks={"request": [sent.append]})
    with served(store, ui=False) as url, RemoteStore(url, client=client) as remote:
        remote.store_batch([{"id": one, "content": one} for one in "abc"], expires_at=[4e9, None, 5e9])
        sent.clear()
        assert remote.expiries(["a", "b", "c", "absent"]) == {"a": 4e9, "c": 5e9}
        assert len(sent) == 1


def test_a_bound_key_is_the_whole_store(store: VectorStore, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    token = keys.add("alice", ["read", "write"], "org/alice")
    with served(store, keys, ui=False, mcp=False) as url, RemoteStore(url, token) as alice:
        alice.store({"id": "a", "content": "one"})
        assert alice.namespaces()[0].path == ()
        assert store.namespace("org", "alice").exists("a")
        for call in (alice.clear, alice.run_maintenance, alice.backup):
            with pytest.raises(ConfigurationError, match="admin"):
                call()
        with RemoteStore(url, "mev_guessed") as other, pytest.raises(ConfigurationError, match="keys add"):
            other.count()


def test_a_forked_child_has_connections_of_its_own(remote: RemoteStore) -> None:
    """On the connection of its parent each would read answers to the other."""
    remote.store_batch([{"id": name, "content": name} for name in "ab"])

    def read(name: str) -> None:
        for _ in range(100):
            assert remote.data[name]["content"] == name

    child = fork(lambda: read("a"))
    read("b")
    assert ended(child) == 0


def test_a_forked_child_refuses_a_client_that_it_cannot_make_anew(store: VectorStore) -> None:
    with served(store) as url, RemoteStore(url, client=httpx.Client()) as remote:
        remote.store({"id": "a", "content": "a"})

        def act() -> None:
            with pytest.raises(StoreClosedError, match="after the fork"):
                remote.retrieve("a")

        assert as_child(act) == 0
        assert remote.data["a"]["content"] == "a"


def test_a_backup_is_named(remote: RemoteStore, tmp_path: Path) -> None:
    assert remote.backup("first") == "first"
    assert (tmp_path / "backups" / "first.db").is_file()
    with pytest.raises(ConfigurationError, match="name"):
        remote.backup("first")


def test_units_replace_each_other_in_one_transaction(remote: RemoteStore) -> None:
    remote.store_batch([{"id": "a", "content": "one"}, {"id": "b", "content": "two"}])
    number = remote.change_number
    assert remote.replace_batch(["a"], [{"id": "c", "content": "three"}], unchanged_since=number) == ["c"]
    with pytest.raises(ConflictError) as caught:
        remote.replace_batch(["c"], [], unchanged_since=number)
    assert caught.value.ids == ["c"]
    assert remote.access_order("lru", 1) == ["b"]
    remote.record_access(["b", "none"])
    assert remote.access_counts() == {"b": 1}


def test_arguments_are_checked_before_anything_is_sent() -> None:
    store = RemoteStore("http://127.0.0.1:1")
    for call in (
        lambda: store.search_vectors(np.ones(3)),
        lambda: store.search_vectors([["a"]]),
        lambda: store.store_batch([{"id": "a"}], np.ones(3)),
    ):
        with pytest.raises(InvalidVectorError, match=r"queries|embeddings"):
            call()
    with pytest.raises(InvalidQueryError):
        store.units(order_by="a..b")
    store.close()


def test_a_server_that_does_not_answer_is_named() -> None:
    with RemoteStore("http://127.0.0.1:1") as store, pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1:1"):
        store.count()
    answers = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200 + 300, text="<html>")))
    with RemoteStore("http://other.test", client=answers) as store, pytest.raises(StorageError, match="url may lead"):
        store.count()


def test_a_call_is_sent_again_only_where_the_server_did_not_begin_it() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        if len(seen) == 1:
            return httpx.Response(429, headers={"Retry-After": "0"})
        if len(seen) == 2:
            return httpx.Response(200, json={"count": 7})
        return httpx.Response(503, json={"detail": "busy", "error": "LockTimeoutError", "title": "", "status": 503})

    with RemoteStore("http://busy.test", client=httpx.Client(transport=httpx.MockTransport(answer))) as store:
        assert store.count() == 7
        with pytest.raises(StorageError, match="busy"):
            store.store({"content": "x"})
    assert len(seen) == 3


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


class Server:
    """``memevolve-store serve`` in a process of its own."""

    def __init__(self, prefix: Path, *options: str) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [
            sys.executable,
            "-m",
            "memevolve_gpu",
            "serve",
            "-s",
            str(prefix),
            "-e",
            "hashing",
            "--port",
            str(port),
        ]
        environment = {**os.environ, "MEMEVOLVE_STORAGE_BACKGROUND": "false", "OMP_NUM_THREADS": "1"}
        log = prefix.with_suffix(".log")
        with log.open("w") as said:
            self.process = subprocess.Popen([*command, *options], stderr=said, env=environment)
        for _ in range(1200):
            try:
                httpx.get(f"{self.url}/readyz").raise_for_status()
                return
            except httpx.HTTPError:
                if self.process.poll() is not None:
                    raise AssertionError(log.read_text()) from None
                time.sleep(0.05)
        raise AssertionError("the server does not answer")


def write_until(store: RemoteStore, stop: threading.Event, name: str, acknowledged: list[str]) -> None:
    number = 0
    while not stop.is_set():
        unit_id = f"{name}-{number}"
        try:
            acknowledged.append(store.store({"id": unit_id, "content": f"written under load {unit_id}"}))
        except StoreUnavailableError:
            return
        number += 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_is_ended_under_load_loses_no_write(tmp_path: Path, kind: signal.Signals) -> None:
    server = Server(tmp_path / "memory")
    acknowledged: list[str] = []
    stop = threading.Event()
    with RemoteStore(server.url) as store:
        threads = [threading.Thread(target=write_until, args=(store, stop, f"w{n}", acknowledged)) for n in range(4)]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 100:
            time.sleep(0.01)
        server.process.send_signal(kind)
        code = server.process.wait(60)
        stop.set()
        for thread in threads:
            thread.join()
    assert code == (-signal.SIGKILL if kind is signal.SIGKILL else 0)
    with VectorStore(tmp_path / "memory", HashingEmbedder(384)) as opened:
        assert [unit_id for unit_id in acknowledged if not opened.exists(unit_id)] == []
        assert opened.check() == []
        assert opened.search("written under load w0-0", 1)[0][1] == "w0-0"


@pytest.mark.slow
def test_serve_refuses_other_addresses_without_keys_and_listens_with_them(tmp_path: Path) -> None:
    prefix = tmp_path / "memory"
    command = [sys.executable, "-m", "memevolve_gpu"]
    refused: Any = subprocess.run(
        [*command, "serve", "-s", str(prefix), "--host", "0.0.0.0"], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, "memevolve-store keys add" in refused.stderr) == (2, True)
    added = subprocess.run(
        [*command, "keys", "add", "agent", "-s", str(prefix)], capture_output=True, text=True, check=True
    )
    server = Server(prefix, "--host", "0.0.0.0", "--no-mcp", "--no-ui")
    try:
        assert httpx.get(f"{server.url}/v1/health").status_code == 401
        with RemoteStore(server.url, added.stdout.strip()) as store:
            assert store.count() == 0
    finally:
        server.process.terminate()
        assert server.process.wait(60) == 0
