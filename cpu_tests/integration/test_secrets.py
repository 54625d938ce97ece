"""Keys and passwords appear nowhere: no output of a command, no log line, no event, no message, no repr, no file."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from milvus_fake import FakeError, FakeMilvus

from memevolve_gpu import HashingEmbedder, MemorySystem, MemorySystemConfig, MilvusStore, OpenAIEmbedder, VectorStore
from memevolve_gpu.errors import MemEvolveError
from memevolve_gpu.utils.config import EmbeddingConfig, MilvusConfig, StorageConfig
from memevolve_gpu.utils.embeddings import embedder_from_config

pytest.importorskip("openai")

KEY = "s3cr3t-k3y-0f-a-t3st"
SETTINGS = {
    "MEMEVOLVE_EMBEDDING_API_KEY": KEY,
    "MEMEVOLVE_MILVUS_TOKEN": f"root:{KEY}",
    "OPENAI_API_KEY": KEY,
    "MEMEVOLVE_MEMORY_API_KEY": KEY,
}


class Talkative(BaseHTTPRequestHandler):
    """A service that fails and repeats in its answer what it was sent, the key among it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        said = json.dumps({"error": {"message": f"bad key {self.headers['Authorization']}"}}).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST  # noqa: N815 - the name that http.server looks for

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Talkative)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def commands(folder: Path) -> list[list[str]]:
    """Every command once, some of them twice: those that fail say the most."""
    unit = folder / "units.jsonl"
    unit.write_text('{"id": "a", "content": "one"}\n{"id": "b", "content": "two"}\n')
    at = ["--store", str(folder / "m")]
    hashing = ["--embedder", "hashing"]
    return [
        ["init", *at, *hashing],
        ["add", str(unit), *at, *hashing],
        ["add", str(unit), "--store", str(folder / "other"), "--embedder", "openai"],
        ["search", "one", *at, *hashing],
        ["search", "one", *at, "--embedder", "openai"],
        ["get", "a", "absent", *at],
        ["update", "a", "--content", "three", *at, *hashing],
        ["delete", "absent", *at],
        *([verb, *at] for verb in ("list", "stats", "health", "check", "maintain", "snapshot", "devices", "doctor")),
        ["backup", str(folder / "backup.db"), *at],
        ["restore", str(folder / "backup.db"), *at],
        ["export", str(folder / "out.jsonl"), *at],
        ["import", str(folder / "out.jsonl"), *at, *hashing],
        ["copy", str(folder / "m"), str(folder / "copy")],
        ["copy", str(folder / "m"), f"milvus://root:{KEY}@127.0.0.1:9/memory"],
        ["stats", "--store", "milvus://127.0.0.1:9/memory"],
        ["embed", "one", "--embedder", "openai"],
        ["manage", "prune", *at],
    ]


@pytest.mark.slow
def test_no_command_shows_a_key(tmp_path: Path, address: str) -> None:
    known = {name: value for name, value in os.environ.items() if not name.startswith("MEMEVOLVE_")}
    given = {**known, **SETTINGS, "MEMEVOLVE_EMBEDDING_BASE_URL": address, "MEMEVOLVE_EMBEDDING_MODEL": "m"}
    program = (
        "import io, json, logging, sys\n"
        "from memevolve_gpu import cli\n"
        "logging.getLogger().setLevel(logging.DEBUG)\n"
        "for line in json.loads(sys.stdin.read()):\n"
        "    for more in ([], ['--json']):\n"
        "        sys.argv = ['memevolve-store', *line, *more]\n"
        "        try:\n"
        "            cli.main()\n"
        "        except SystemExit as ended:\n"
        "            print('ended', line[0], ended.code)\n"
    )
    given["MEMEVOLVE_MILVUS_TIMEOUT"] = "0.3"
    lines = [[one.replace(KEY, "x") for one in line] for line in commands(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(lines), env=given, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count("ended") == 2 * len(lines), done.stderr[-2000:]
    assert "failed" in done.stderr
    shown = [line for line in (done.stdout + done.stderr).splitlines() if KEY in line]
    assert shown == []
    files = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert files == []


def test_an_address_with_a_password_is_refused_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = [f"milvus://root:{KEY}@127.0.0.1:9/memory", f"http://me:{KEY}@127.0.0.1:9/v1"]
    for act in (
        lambda: VectorStore.exists_at(places[0]),
        lambda: MilvusConfig.at(places[0]),
        lambda: MilvusConfig(uri=places[1]),
        lambda: EmbeddingConfig(base_url=places[1]),
        lambda: OpenAIEmbedder(places[1], model="m", max_retries=0)("text"),
    ):
        try:
            said = str(act())
        except MemEvolveError as error:
            said = f"{error} {error.__cause__!r} {error.args}"
        assert KEY not in said


def test_no_object_message_event_or_log_line_shows_a_key(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {**SETTINGS, "MEMEVOLVE_EMBEDDING_BASE_URL": address}.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)
    said = io.StringIO()
    server = FakeMilvus()
    embedder = embedder_from_config(EmbeddingConfig(model="m"))
    with VectorStore(tmp_path / "m", embedder, 8, storage_config=StorageConfig(background=False)) as store:
        milvus = MilvusStore(HashingEmbedder(8), milvus_config=MilvusConfig(timeout=0.3), client=server.connect)
        for verb in ("query", "upsert", "get_collection_stats"):
            server.fail(verb, *[FakeError(65535, f"bad token root:{KEY}")] * 50)
        system = MemorySystem(MemorySystemConfig(memory_api_key=KEY, storage_backend=store))
        for act in (
            lambda: store.store({"content": "one"}),
            lambda: store.search("one"),
            lambda: system.add_units([{"content": "two"}]),
            lambda: system.query_memory("two"),
            lambda: milvus.retrieve("a"),
            lambda: milvus.store({"content": "one"}),
        ):
            try:
                act()
            except MemEvolveError as error:
                print(error, repr(error), repr(error.__cause__), file=said)
        server.failing.clear()
        for one in (store, milvus, system, embedder, system.config, EmbeddingConfig(), MilvusConfig(), StorageConfig()):
            print(one, repr(one), file=said)
        for one in (store, milvus):
            print(one.statistics(), one.get_storage_health(), one.save_state(), file=said)
        milvus.close()
    assert "failed" in said.getvalue()
    assert KEY not in said.getvalue()
    assert [record.getMessage() for record in caplog.records if KEY in record.getMessage()] == []
