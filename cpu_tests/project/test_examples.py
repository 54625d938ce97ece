"""The sample and the quick start: what a newcomer runs first has to work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def units(repository: Path) -> list[dict[str, Any]]:
    text = (repository / "examples" / "memory_units.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def run_quickstart(repository: Path, *arguments: str, name: str = "quickstart.py") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    return subprocess.run(
        [sys.executable, str(repository / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def test_the_quick_start_for_asyncio_runs(repository: Path, tmp_path: Path) -> None:
    done = run_quickstart(repository, str(tmp_path / "kept"), name="async_quickstart.py")
    assert done.stderr == ""
    assert "Stored 300 units; the other task saw 300 changes." in done.stdout
    assert "exit code 137: oom-killed-137" in done.stdout
    assert list(tmp_path.glob("kept*"))


def test_the_sample_is_varied(units: list[dict[str, Any]]) -> None:
    assert len(units) == 300
    assert {unit["type"] for unit in units} == {"lesson", "skill", "tool", "abstraction"}
    contents = [unit["content"] for unit in units]
    assert len(set(contents)) == 300
    assert len({content[:24] for content in contents}) > 290
    assert len({tag for unit in units for tag in unit["tags"]}) > 100


def test_every_sample_unit_has_the_fields_that_the_readme_names(units: list[dict[str, Any]]) -> None:
    for unit in units:
        assert unit.keys() <= {"id", "type", "content", "reasoning", "query", "tags", "metadata"}
        assert 60 < len(unit["content"]) < 700
        assert unit["tags"]
        assert 0 <= unit["metadata"]["score"] <= 1
        assert unit["metadata"]["source"]
        assert unit["metadata"]["domain"]
    ids = [unit["id"] for unit in units if "id" in unit]
    assert len(ids) == len(set(ids)) == 288
    assert sum("query" in unit for unit in units) >= 20
    assert sum("reasoning" in unit for unit in units) >= 5


def test_the_quick_start_runs_and_keeps_the_store_where_asked(repository: Path, tmp_path: Path) -> None:
    done = run_quickstart(repository, str(tmp_path / "kept"))
    assert done.stderr == ""
    assert done.returncode == 0
    assert "Stored 300 units" in done.stdout
    assert "sqlite-busy" in done.stdout.split("Only tools and skills")[0]
    assert "rebuilt every Saturday" in done.stdout
    assert "Problems found by check: 0" in done.stdout
    assert "Opened again: 300 units" in done.stdout
    assert "oom-killed-137" in done.stdout.split("Opened again")[1]
    assert list(tmp_path.glob("kept*"))
