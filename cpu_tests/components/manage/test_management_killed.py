"""kill -9 in the middle of an operation: all of it or nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from memory_kit import store_at, unit

UNITS = 600
LEFT = {"prune": 100, "deduplicate": 300, "forget": 200, "consolidate": 300}

PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from memory_kit import store_at
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.records.transaction import Transaction

folder, operation, moment, number = Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
calls = 0

def die_at(name):
    original = getattr(Transaction, name)
    def call(self, *arguments):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)
    setattr(Transaction, name, call)

store, strategy = store_at(folder), SimpleManagementStrategy()
if moment != "after":
    die_at(moment)
{
    "prune": lambda: strategy.prune(store, {"max_count": 100}),
    "deduplicate": lambda: strategy.deduplicate(store),
    "forget": lambda: strategy.apply_forgetting(store, "random", 400, seed=1),
    "consolidate": lambda: strategy.consolidate(store),
}[operation]()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    with store_at(folder) as store:
        store.store_batch([unit(f"n{n}", f"word{n // 2} twice") for n in range(UNITS)])
    return folder


@pytest.mark.parametrize(
    ("operation", "moment", "number"),
    [
        ("prune", "drop", 1),
        ("prune", "drop", 250),
        ("deduplicate", "drop", 300),
        ("forget", "drop", 399),
        ("forget", "finish", 2),
        ("consolidate", "drop", 600),
        ("consolidate", "put_many", 1),
        ("prune", "after", 0),
        ("consolidate", "after", 0),
    ],
)
def test_all_or_nothing(filled: Path, tmp_path: Path, operation: str, moment: str, number: int) -> None:
    for file in filled.iterdir():
        shutil.copy(file, tmp_path)
    tests = Path(__file__).resolve().parents[2] / "helpers"
    command = [sys.executable, "-c", PROGRAM, str(tests), str(tmp_path), operation, moment, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with store_at(tmp_path) as store:
        assert store.count() == (LEFT[operation] if moment == "after" else UNITS)
        assert store.check() == []
        first = next(store.units())
        assert store.search(first["content"], 1)[0][0] == pytest.approx(0, abs=1e-6)
