"""MemEvolve's real API server on our store, started by the drop-in from a data folder that it has never seen."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from memevolve_kit import DIM, Server, Stub, copy_of, digests, environment, python_of

from memevolve_gpu import HashingEmbedder, VectorStore

TOPICS = (
    "rotating the signing keys of the gateway", "draining a node before its kernel upgrade",
    "finding the query that locks the ledger table", "shrinking a container image for arm boards",
    "replaying the dead letter queue after an outage", "tracing a memory leak in the image resizer",
    "backfilling the currency column without downtime", "testing the retry budget of the payment client",
    "moving cron jobs to the scheduler of the cluster", "verifying the nightly backup of the wiki",
    "tuning the autovacuum of the events partition", "splitting the monolith at the invoicing seam",
    "renewing wildcard certificates by automation", "profiling the cold start of the search worker",
    "detecting duplicate webhooks by their digest", "migrating feature flags out of the old console",
)  # fmt: skip
QUESTIONS = [f"Give one rule for {topic}" for topic in TOPICS]


def units_of(prefix: Path) -> dict[str, dict[str, Any]]:
    """What our own store reads from the files, without MemEvolve and without writing."""
    with VectorStore(
        str(prefix), HashingEmbedder(DIM), DIM, storage_config={"read_only": True, "background": False}
    ) as store:
        return {unit["id"]: unit for unit in store.retrieve_all()}


def remembered(units: dict[str, dict[str, Any]]) -> set[int]:
    """Which of the questions the contents of the units tell of."""
    return {at for at, topic in enumerate(TOPICS) if any(topic in unit["content"] for unit in units.values())}


def injected(messages: list[dict[str, Any]]) -> str:
    """What MemEvolve put before the user's message."""
    return " ".join(str(message["content"]) for message in messages[:-1])


def test_from_the_first_request_on(tmp_path: Path, stub: Stub, found: list[tuple[str, str, str]]) -> None:
    tree = copy_of(tmp_path / "fresh")
    prefix = tree / "data/memory/vector"
    with Server(tree, stub, dropped_in=True) as server:
        assert server.get("/memory/stats")["total_experiences"] == 0
        for question in QUESTIONS:
            assert question in server.chat(question)
        stored = server.get("/memory/stats")["total_experiences"]
        server.kill()
    assert Path(f"{prefix}.db").exists(), sorted(path.name for path in prefix.parent.iterdir())
    assert not Path(f"{prefix}.data").exists()
    kept = units_of(prefix)
    found.append(("fresh data: requests, units stored", "", f"{len(QUESTIONS)}, {stored}"))
    found.append(("lost after kill -9", "", str(stored - len(kept))))
    assert (stored, stub.encoded) == (16, 16)
    assert remembered(kept) == set(range(16))

    with Server(tree, stub, dropped_in=True) as server:
        assert server.get("/memory/stats")["total_experiences"] == 16
        hits = []
        for question, topic in zip(QUESTIONS, TOPICS, strict=True):
            server.chat(question)
            hits.append(f"question user: {question}" in injected(stub.prompts[-1]) or topic in injected(stub.prompts[-1]))
    found.append(("16 later requests: prompt holds the memory", "", f"{sum(hits)} of 16"))
    assert all(hits)


@pytest.fixture
def old_data(tmp_path: Path, stub: Stub) -> Path:
    """A copy whose data folder MemEvolve's own store filled with 12 units."""
    tree = copy_of(tmp_path / "old")
    code = """
import os
from memevolve.components.store.vector_store import VectorStore
from memevolve.utils.embeddings import create_embedding_function
os.makedirs("data/memory")
embed = create_embedding_function(provider="openai", base_url=os.environ["MEMEVOLVE_EMBEDDING_BASE_URL"])
store = VectorStore("data/memory/vector", embed, int(os.environ["MEMEVOLVE_EMBEDDING_DIMENSION"]))
for at in range(12):
    words = " ".join(f"word{at * 7 + step}" for step in range(7))
    store.store({"id": f"old_{at}", "type": "lesson", "content": f"An old lesson about {words}", "tags": ["old"]})
print(type(store).__module__, store.count())
"""
    done = subprocess.run(
        python_of(False, "-c", code), cwd=tree, env=environment(tree, stub), capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("memevolve.components.store.vector_store 12\n"), done.stdout + done.stderr
    return tree


def test_an_old_data_folder_is_imported(old_data: Path, stub: Stub, found: list[tuple[str, str, str]]) -> None:
    folder = old_data / "data/memory"
    before = digests(folder)
    assert set(before) == {"vector.data", "vector.index"}
    with Server(old_data, stub, dropped_in=True) as server:
        imported = server.get("/memory/stats")["total_experiences"]
        hits = server.post("/memory/search", {"query": "word14 word15 word16 word17 word18 word19 word20", "limit": 1})
        server.chat("Give one rule for reading old notes")
    after = digests(folder)
    same = all(after[name] == digest for name, digest in before.items())
    found.append(("old data: units imported", "", f"{imported} of 12"))
    found.append(("old files byte-identical", "", "yes" if same else "NO"))
    assert imported == 12
    assert "word14" in hits[0]["content"]
    assert same
    kept = units_of(folder / "vector")
    assert {f"old_{at}" for at in range(12)} < set(kept)
    assert len(kept) == 13


def test_its_start_is_without_false_warnings(tmp_path: Path, stub: Stub) -> None:
    tree = copy_of(tmp_path / "start")
    with Server(tree, stub, dropped_in=True) as server:
        server.chat(QUESTIONS[0])
        printed = server.text()
    ours = [line for line in printed.splitlines() if "memevolve_gpu" in line or "MEMEVOLVE_STORAGE_" in line]
    assert ours == []
