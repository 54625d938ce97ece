"""Every benchmark starts and comes to its end with tiny sizes, so that none stops working unnoticed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from forks import Forks
from support import each

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
    "threads": "--data EMPTY --units 600 --rounds 1 --seconds 0.02",
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
    "single_writes",
)
"""Those that only say their arguments: they need data, a server or minutes."""
ELSEWHERE = ("harness", "results_page", "size", "soak_plot", "verdicts")
"""Shared parts, and what draws, counts or judges results; other tests read what they wrote."""
NEEDED = {"imports": ("chromadb", "lancedb"), "server_load": ("fastapi", "uvicorn"), "milvus": ("pymilvus",)}


def test_each_benchmark_is_run_here(repository: Path) -> None:
    scripts = {path.stem for path in (repository / "benchmarks").glob("*.py")}
    assert scripts == {*TINY, *STARTED, *ELSEWHERE}, "say here how a new benchmark runs with tiny sizes"


def lacking(name: str) -> list[str]:
    """Packages that it needs and that are not installed."""
    return [module for module in NEEDED.get(name, ()) if importlib.util.find_spec(module) is None]


RUN = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs_with_tiny_sizes(name: str, repository: Path, tmp_path: Path, commands: Forks) -> None:
    if lacking(name):
        pytest.skip(f"{' and '.join(lacking(name))} is not installed")
    run(name, TINY[name].replace("EMPTY", str(tmp_path)), repository, commands)


@pytest.mark.slow
@each("name", [name for name in STARTED if not lacking(name)])
def test_a_benchmark_says_its_arguments(name: str, repository: Path, commands: Forks) -> None:
    run(name, "--help", repository, commands)


def run(name: str, options: str, repository: Path, commands: Forks) -> None:
    folders = [repository / "benchmarks", repository / "src", repository / "cpu_tests" / "helpers"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    ran = commands(
        RUN, f"benchmarks/{name}.py", *options.split(), environment=environment, path=folders, folder=repository
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    assert ran.stdout.strip(), "it printed no figures"
