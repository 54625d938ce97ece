"""MemEvolve's real API server on our store, started by the drop-in from a data folder that it has never seen."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

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
    with VectorStore(str(prefix), HashingEmbedder(DIM), DIM, storage_config={"background": False}) as store:
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
            hits.append(topic in injected(stub.prompts[-1]))
    found.append(("16 later requests: prompt holds the memory", "", f"{sum(hits)} of 16"))
    assert all(hits)


def test_an_old_data_folder_is_imported(tmp_path: Path, stub: Stub, found: list[tuple[str, str, str]]) -> None:
    tree = copy_of(tmp_path / "old")
    folder = tree / "data/memory"
    with Server(tree, stub, dropped_in=False) as server:
        for question in QUESTIONS[:12]:
            server.chat(question)
        old = server.get("/memory/stats")["total_experiences"]
    before = digests(folder)
    assert set(before) == {"vector.data", "vector.index"}

    with Server(tree, stub, dropped_in=True) as server:
        imported = server.get("/memory/stats")["total_experiences"]
        server.chat(QUESTIONS[3])
        server.chat(QUESTIONS[12])
    after = digests(folder)
    same = all(after[name] == digest for name, digest in before.items())
    kept = units_of(folder / "vector")
    found.append(("old data: units stored, imported", str(old), str(imported)))
    found.append(("old files byte-identical", "", "yes" if same else "NO"))
    assert imported == old > 0
    assert any(TOPICS[3] in injected(messages) for messages in stub.prompts[-2:-1])
    assert same
    assert remembered(kept) >= {12}
    assert len(kept) == old + 2


def test_its_start_is_without_false_warnings(tmp_path: Path, stub: Stub) -> None:
    tree = copy_of(tmp_path / "start")
    code = """
import logging
told = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("memevolve_gpu").addHandler(handler)
import memevolve_gpu.dropin
from memevolve.memory_system import MemorySystem
from memevolve.utils.config import load_config
memory = MemorySystem(load_config())
memory.add_experience({"id": "e", "type": "lesson", "content": "Measure first, and then change one thing at a time"})
memory.query_memory("what to do first", top_k=3)
memory.storage.close()
print("TOLD", told)
"""
    told = {}
    for name, more in (("as shipped", {}), ("with a slip", {"MEMEVOLVE_STORAGE_NLIST_MAXX": "3"})):
        command = python_of(False, "-c", code)
        done = subprocess.run(
            command, cwd=tree, env=environment(tree, stub, **more), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        told[name] = done.stdout.splitlines()[-1]
    assert told["as shipped"] == "TOLD []"
    assert "MEMEVOLVE_STORAGE_NLIST_MAXX" in told["with a slip"]


def test_its_health_endpoint_and_dashboard_show_the_store(
    tmp_path: Path, stub: Stub, found: list[tuple[str, str, str]]
) -> None:
    tree = copy_of(tmp_path / "health")
    paths = ("/health", "/dashboard-data")
    with Server(tree, stub, dropped_in=False) as server:
        before = {path: set(server.get(path)) for path in paths}
        page = server.get("/dashboard")
    with Server(tree, stub, dropped_in=True) as server:
        server.chat(QUESTIONS[0])
        report = server.get("/memory/storage")
        after = {path: server.get(path) for path in paths}
        shown = server.get("/dashboard")
    assert (report["current_count"], report["max_units"]) == (1, 50_000)
    for path in paths:
        assert set(after[path]) == before[path] | {"storage"}
        assert after[path]["storage"].keys() == report.keys()
    assert after["/health"]["status"] == "healthy"
    assert "current_count" in shown
    assert "current_count" not in page
    found.append(("store's report in /health, dashboard", "no", "yes"))


def test_its_maintenance_scripts_work_beside_the_running_server(
    tmp_path: Path, stub: Stub, found: list[tuple[str, str, str]]
) -> None:
    tree = copy_of(tmp_path / "scripts")
    counts = []
    with Server(tree, stub, dropped_in=True) as server:
        for question in QUESTIONS[:5]:
            server.chat(question)
        for script, *arguments in (
            ("memory_consolidate.py",),
            ("memory_deduplicate.py", "--threshold", "0.9"),
            ("memory_forget.py", "--count", "2"),
            ("memory_prune.py", "--max-count", "2"),
        ):
            command = python_of(True, f"scripts/{script}", *arguments)
            done = subprocess.run(
                command, cwd=tree, env=environment(tree, stub), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            counts.append(server.get("/memory/stats")["total_experiences"])
        server.chat(QUESTIONS[5])
    kept = units_of(tree / "data/memory/vector")
    found.append(("its 4 maintenance scripts, server running", "", "ok"))
    assert counts == [5, 5, 3, 2]
    assert len(kept) == 3
    assert 5 in remembered(kept)
