"""The GPU benchmarks run: on CPU tensors and small sizes, so that a lease is not spent on their mistakes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memevolve_gpu.planner.engine_table import read_engine_table

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file that one command writes, and what is in it."""
    repository = Path(__file__).resolve().parents[1]
    path = tmp_path_factory.mktemp("gpu") / "figures.json"
    command = [sys.executable, "benchmarks/gpu/run.py", "--device", "cpu", "--quick", "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository / "src")}
    ran = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return path, json.loads(path.read_text())


def test_every_part_was_measured(outcome: tuple[Path, dict[str, Any]]) -> None:
    report = outcome[1]
    assert report["left_out"] == {}
    assert {"bandwidth", "search", "training", "memory", "ingest"} <= set(report)
    assert report["machine"]["date"]
    assert report["machine"]["device_name"] == "CPU tensors"
    assert report["bandwidth"]["bytes_per_s"] > 0


def test_each_contender_has_figures_or_a_reason(outcome: tuple[Path, dict[str, Any]]) -> None:
    report = outcome[1]
    table = report["search"]["table"]
    for row in table:
        assert row.get("skipped") == "faiss-gpu needs a GPU" or row["times"].keys() == {"1", "16", "1024"}, row
    assert {row["engine"] for row in table if "times" in row} == {"cpu", "torch"}
    assert all(row["recall"] > 0.9 for row in table if "times" in row)
    training = report["training"]["training"]
    assert training["torch engine"]["objective"] > 0
    assert "GPU" in training["faiss-gpu"]["skipped"]
    memory = [row for row in report["memory"]["memory"] if row["engine"] == "torch"]
    assert all(row["predicted_bytes"] > 0 for row in memory)
    assert all(row["found_at_once"] for row in report["ingest"]["ingest"] if "skipped" not in row)


def test_the_engine_table_follows_from_the_figures(
    outcome: tuple[Path, dict[str, Any]], repository: Path, tmp_path: Path
) -> None:
    path, report = outcome
    script = repository / "benchmarks" / "gpu" / "engine_table.py"
    first = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, check=True).stdout
    assert first.startswith("# Not for planner/engines.py")
    shown = {"cpu": {1000: 0.1, 100_000: 1.0}, "torch": {1000: 0.3, 100_000: 0.2}, "faiss": {1000: 0.4, 100_000: 0.3}}
    table = [
        {"rows": rows, "dim": 384, "engine": engine, "recall": 1.0, "times": _times(ms)}
        for engine, own in shown.items()
        for rows, ms in own.items()
    ]
    table += [{"rows": 1000, "dim": 384, "engine": "faiss", "recall": 0.5, "times": _times(1e-6)}]
    table += [{"rows": 1000, "dim": 384, "engine": "faiss raw", "recall": 1.0, "times": _times(1e-6)}]
    machine = {**report["machine"], "device": "cuda:0", "device_name": "A card", "quick": False}
    made = tmp_path / "made.json"
    made.write_text(json.dumps({"machine": machine, "search": {"table": table}}))
    second = subprocess.run([sys.executable, str(script), str(made)], capture_output=True, text=True, check=True).stdout
    names: dict[str, Any] = {"Band": lambda rows, engines: (rows, engines)}
    exec(second, names)
    assert names["BANDS"] == ((10_000, ("cpu", "torch", "faiss")), (None, ("torch", "faiss", "cpu")))
    assert names["MEASURED"]
    assert "A card" in names["SOURCE"]
    own = tmp_path / "measured.json"
    subprocess.run([sys.executable, str(script), str(made), "--json", str(own)], check=True)
    read = read_engine_table(str(own))
    assert read.bands == names["BANDS"]
    assert "A card" in read.source
    refused = subprocess.run(
        [sys.executable, str(script), str(path), "--json", str(own)], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "not taken on a GPU" in refused.stderr


def _times(ms: float) -> dict[str, Any]:
    return {"1": {"ms": ms}, "1024": {"qps": 1e3 / ms}}
