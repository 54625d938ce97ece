"""What docs/how-to/memevolve.md tells its readers to type, typed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from memevolve_kit import Stub, copy_of, environment, python_of


def recipe(repository: Path, heading: str) -> str:
    """The first Python block below a heading of the guide."""
    text = (repository / "docs/how-to/memevolve.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", text[text.index(heading) :], re.DOTALL)
    assert found is not None, heading
    return found[1]


def run(tree: Path, stub: Stub, code: str) -> str:
    done = subprocess.run(
        python_of(False, "-c", code), cwd=tree, env=environment(tree, stub), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_way_2_stores_and_finds(tmp_path: Path, repository: Path, stub: Stub) -> None:
    tree = copy_of(tmp_path / "way2")
    use = """
memory.add_experience({"id": "e", "type": "lesson", "content": "Push with force-with-lease after a rebase of a branch"})
(unit,) = memory.query_memory("how to push after a rebase", top_k=3)
assert "force-with-lease" in unit["content"]
assert memory.get_health_metrics().total_units == store.count() == 1
assert type(memory.memory_manager.storage_backend) is VectorStore
store.close()
print("stored and found")
"""
    assert run(tree, stub, recipe(repository, "## Way 2") + use).endswith("stored and found\n")
    assert (tree / "data/memory/vector.db").exists()
    assert not (tree / "data/memory/vector.data").exists()


def test_the_hook_works_without_the_drop_in(tmp_path: Path, repository: Path, stub: Stub) -> None:
    tree = copy_of(tmp_path / "hook")
    use = """
from fastapi.testclient import TestClient
with TestClient(server.app) as client:
    report = client.get("/memory/storage").json()
    assert report == server.get_memory_system().get_storage_health() == {"current_count": 0}, report
    assert client.get("/health").json()["storage"] == report
print("shown")
"""
    assert "shown" in run(tree, stub, recipe(repository, "### What its health endpoint") + use)
