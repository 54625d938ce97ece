"""The whole journey of a memory through public calls, with an embedding service that fails, dawdles and errs."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from memevolve_gpu import HashingEmbedder, VectorStore
from memevolve_gpu.components.retrieve import KeywordRetrievalStrategy
from memevolve_gpu.errors import DimensionMismatchError, EmbeddingError, ModelMismatchError
from memevolve_gpu.memory_system import MemorySystem

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openai") is None, reason="the openai package is not installed: pip install openai"
)

DIM = 48
LIMIT = 120

Items = list[dict[str, Any]]


class Service:
    """An embedding service on this machine. ``trouble`` takes the place of the next answers, one each."""

    def __init__(self) -> None:
        self.trouble: list[Callable[[Items], tuple[int, Any]]] = []
        self.down = False
        self.texts = 0
        self.model = HashingEmbedder(DIM)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                index = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = outer.answer(index["input"])
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                try:
                    self.wfile.write(data)
                except OSError:
                    return  # the client did not want to wait

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, texts: list[str]) -> tuple[int, Any]:
        if self.down:
            return 503, {"error": {"message": "out of order"}}
        self.texts += len(texts)
        vectors = self.model.embed_batch(texts).tolist()
        items = [{"object": "embedding", "index": at, "embedding": row} for at, row in enumerate(vectors)]
        if self.trouble:
            return self.trouble.pop(0)(items)
        return 200, {"object": "list", "model": "stub", "data": items}

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def fails(_items: Items) -> tuple[int, Any]:
    return 500, {"error": {"message": "a hiccup"}}


def dawdles(items: Items) -> tuple[int, Any]:
    time.sleep(3)
    return 200, {"data": items}


def shorter_vectors(items: Items) -> tuple[int, Any]:
    return 200, {"data": [{**item, "embedding": item["embedding"][:-1]} for item in items]}


def fewer_vectors(items: Items) -> tuple[int, Any]:
    return 200, {"data": items[:-1]}


def no_numbers(items: Items) -> tuple[int, Any]:
    return 200, {"data": [{**item, "embedding": [float("nan")] * DIM} for item in items]}


class Encoder:
    """What MemEvolve's encoder does, without a language model."""

    def encode_experience(self, experience: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "type": experience.get("type", "lesson"),
            "content": f"{experience['action']}: {experience['result']}",
            "tags": list(experience.get("tags", ())),
            "metadata": {"task": experience.get("task", "")},
        }

    def encode_trajectory(self, trajectory: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self.encode_experience(step) for step in trajectory]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    running = Service()
    settings = {
        "MEMEVOLVE_EMBEDDING_BASE_URL": running.url,
        "MEMEVOLVE_EMBEDDING_MODEL": "stub",
        "MEMEVOLVE_EMBEDDING_TIMEOUT": "2",
        "MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS": str(LIMIT),
        "MEMEVOLVE_STORAGE_MIN_TRAINING_UNITS": "50",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield running
    running.close()


LESSONS = [
    {"action": "rebase a branch", "result": "force push with lease afterwards", "tags": ["git"], "task": "t1"},
    {"action": "copy a database", "result": "take the write-ahead log along", "tags": ["sqlite"], "task": "t2"},
    {"action": "start the server", "result": "the port was taken by another one", "tags": ["net"], "task": "t2"},
]


@pytest.mark.slow
def test_the_whole_journey(service: Service, tmp_path: Path) -> None:
    prefix = tmp_path / "memory"
    told: list[str] = []
    with MemorySystem.from_env(
        prefix, Encoder(), on_encode_complete=lambda unit_id, _unit: told.append(unit_id)
    ) as system:
        ids = remembered(system)
        assert told == ids
        asked(system, ids)
        troubled(system, service)
        out_of_order(system, service)
        filled(system)
        managed(system)
        count, found = system.storage.count(), system.query_memory("the port was taken", 3)
    reopened(prefix, service, count, found)


def remembered(system: MemorySystem) -> list[str]:
    first = system.add_experience({**LESSONS[0], "type": "skill"})
    assert first is not None
    ids = [first, *system.add_trajectory(LESSONS[1:])]
    assert system.storage.count() == 3
    return ids


def asked(system: MemorySystem, ids: list[str]) -> None:
    found = system.query_memory("force push after a rebase", 2)
    assert found[0]["id"] == ids[0]
    assert found[0]["score"] > found[1]["score"]
    assert [one["id"] for one in system.query_memory("rebase", 5, {"metadata.task": "t2"})] != [ids[0]]
    assert {one["type"] for one in system.query_memory("rebase", 5, {"type": "skill"})} == {"skill"}
    assert [one["content"] for one in system.retrieve_by_ids(ids[1:2])] == [
        "copy a database: take the write-ahead log along"
    ]


def troubled(system: MemorySystem, service: Service) -> None:
    """What passes is waited for, what does not is refused, and nothing is kept by halves."""
    store = system.storage
    assert isinstance(store, VectorStore)
    for trouble in (fails, dawdles):
        service.trouble = [trouble]
        before = store.count()
        system.add_experience({"action": f"after {trouble.__name__}", "result": "it went through"})
        assert store.count() == before + 1
        assert service.trouble == []
    kept = [one["id"] for one in store.units()]
    for trouble in (shorter_vectors, fewer_vectors, no_numbers):
        service.trouble = [trouble]
        with pytest.raises((EmbeddingError, DimensionMismatchError), match=r"stub|expected 48, got 47"):
            system.add_trajectory(LESSONS)
        assert [one["id"] for one in store.units()] == kept
    assert store.check() == []


def out_of_order(system: MemorySystem, service: Service) -> None:
    """Without the service what is known stays within reach by its words."""
    hybrid = system.retrieval_context.strategy
    service.down = True
    with pytest.raises(EmbeddingError, match="out of order"):
        system.query_memory("a question that nobody asked before")
    with pytest.raises(EmbeddingError, match="out of order"):
        system.reconfigure_component("retrieval", type(hybrid)())
    assert system.retrieval_context.strategy is hybrid
    system.reconfigure_component("retrieval", KeywordRetrievalStrategy())
    assert "lease" in system.query_memory("lease", 1)[0]["content"]
    service.down = False
    system.reconfigure_component("retrieval", hybrid)
    assert "lease" in system.query_memory("pushing with a lease", 1)[0]["content"]


def filled(system: MemorySystem) -> None:
    """Far more than fits: room is made in time, for what was read last."""
    for number in range(2 * LIMIT):
        system.add_units([{"id": f"f{number}", "content": f"filler number{number} about topic{number % 40}"}])
        if number % 10 == 0:
            system.query_memory("force push with lease", 1)
        assert system.storage.count() < 0.9 * LIMIT
    operations = {entry["operation"] for entry in system.get_operation_log()}
    assert "auto_prune" in operations
    assert "lease" in system.query_memory("force push with lease", 1)[0]["content"]
    health = system.get_storage_health()
    assert health["current_count"] == system.storage.count() == system.get_health_metrics().total_units


def managed(system: MemorySystem) -> None:
    store = system.storage
    assert isinstance(store, VectorStore)
    system.add_units([{"id": f"twin{n}", "type": "lesson", "content": "said twice over"} for n in range(3)])
    said = system.manage_memory("deduplicate", similarity_threshold=0.999, dry_run=True)
    assert {"twin0", "twin1"} <= set(said[1])
    assert store.exists("twin0")
    assert system.manage_memory("deduplicate", similarity_threshold=0.999) == said
    system.add_units([{"id": "twin3", "type": "lesson", "content": "said twice over"}])
    merged = system.manage_memory("consolidate", units=["twin2", "twin3"])
    assert isinstance(merged, list)
    assert merged[0]["metadata"]["consolidated_from"] == ["twin2", "twin3"]
    assert "said twice over" in [one["content"] for one in system.query_memory("said twice over", 2)]
    count = store.count()
    assert system.manage_memory("forget", strategy="lru", count=5)[0] == 5
    assert system.manage_memory("prune", criteria={"max_count": count - 10})[0] == 5
    assert system.manage_memory("prune", criteria={"max_age": 1}) == (0, [])
    store.run_maintenance()
    assert store.check() == []
    assert store.statistics()["event_totals"]["management"] >= 4


def reopened(prefix: Path, service: Service, count: int, found: Any) -> None:
    texts = service.texts
    with MemorySystem.from_env(prefix) as system:
        assert service.texts == texts  # opening embeds nothing
        assert system.storage.count() == count
        assert system.query_memory("the port was taken", 3) == found
    with pytest.raises(ModelMismatchError, match="stub"):
        VectorStore(prefix, HashingEmbedder(DIM))


@pytest.mark.parametrize("name", ["how-to/management", "explanation/retrieval", "how-to/memevolve"])
def test_the_python_of_the_documents_runs(
    name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it but what needs MemEvolve itself."""
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_PROVIDER", "hashing")
    text = (repository / "docs" / f"{name}.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"(?s)```python\n(.*?)```", text) if "from memevolve." not in block]
    assert blocks
    for block in blocks:
        with VectorStore(tmp_path / "memory", HashingEmbedder(384)) as store:
            store.store_batch([{"type": "skill", "content": f"undo a bad rebase {n}"} for n in range(3)])
        exec(compile(block, f"{name}.md", "exec"), {})
    assert ("rebase" in capsys.readouterr().out) is (name != "how-to/management")
