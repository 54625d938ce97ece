"""Every benchmark starts and comes to its end with tiny sizes, so that none stops working unnoticed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = {
    "async_heartbeat": "--units 1500 --dim 16 --rounds 1 --seconds 0.05",
    "calibration": "--data EMPTY --quick --rows 1200 --seeds 1 --kinds ivf",
    "filters": "--units 400",
    "history_cost": "--units 200 --dim 16",
    "imports": "--units 200",
    "million": "--data EMPTY --units 2000",
    "months_of_use": "--data EMPTY --units 1000 --queries 1",
    "namespaces": "--namespaces 3 --units 50 --dim 16 --rounds 20 --attempts 200",
    "sizing": "",
    "two_processes": "--seconds 1",
    "unsure": "--data EMPTY --rows 5000 --queries 5",
}
STARTED = (
    "codes",
    "foundation",
    "index_bodies",
    "keyword_words",
    "memory_system",
    "milvus",
    "promise",
    "record_sizes",
    "server_load",
)
"""Those that only say their arguments: they need data, a server or minutes."""
ELSEWHERE = ("harness", "results_page", "size", "soak_plot", "verdicts")
"""Shared parts, and what draws, counts or judges results; other tests read what they wrote."""
NEEDED = {"imports": ("chromadb", "lancedb"), "server_load": ("fastapi", "uvicorn"), "milvus": ("pymilvus",)}


def test_each_benchmark_is_run_here(repository: Path) -> None:
    scripts = {path.stem for path in (repository / "benchmarks").glob("*.py")}
    assert scripts == {*TINY, *STARTED, *ELSEWHERE}, "say here how a new benchmark runs with tiny sizes"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TINY, *STARTED])
def test_a_benchmark_runs_with_tiny_sizes(name: str, repository: Path, tmp_path: Path) -> None:
    lacking = [module for module in NEEDED.get(name, ()) if importlib.util.find_spec(module) is None]
    if lacking:
        pytest.skip(f"{' and '.join(lacking)} is not installed")
    options = TINY.get(name, "--help").replace("EMPTY", str(tmp_path)).split()
    command = [sys.executable, f"benchmarks/{name}.py", *options]
    paths = [str(repository / "src"), str(repository / "cpu_tests" / "helpers")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    assert ran.stdout.strip(), "it printed no figures"
