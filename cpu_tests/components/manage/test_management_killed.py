"""kill -9 in the middle of an operation: all of it or nothing."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_kit import store_at, unit
from support import as_child

from memevolve_gpu import VectorStore
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.records.transaction import Transaction

UNITS = 600
LEFT = {"prune": 100, "deduplicate": 300, "forget": 200, "consolidate": 300}

OPERATIONS: dict[str, Callable[[SimpleManagementStrategy, VectorStore], object]] = {
    "prune": lambda strategy, store: strategy.prune(store, {"max_count": 100}),
    "deduplicate": lambda strategy, store: strategy.deduplicate(store),
    "forget": lambda strategy, store: strategy.apply_forgetting(store, "random", 400, seed=1),
    "consolidate": lambda strategy, store: strategy.consolidate(store),
}


def dying_at(moment: str, number: int) -> Callable[..., Any]:
    """The call of that name of a transaction, the ``number``-th of which kills this process."""
    original, calls = getattr(Transaction, moment), itertools.count(1)

    def call(*arguments: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    return call


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

    def act() -> None:
        store = store_at(tmp_path)
        if moment != "after":
            setattr(Transaction, moment, dying_at(moment, number))
        OPERATIONS[operation](SimpleManagementStrategy(), store)
        os.kill(os.getpid(), signal.SIGKILL)

    assert as_child(act) == -signal.SIGKILL
    with store_at(tmp_path) as store:
        assert store.count() == (LEFT[operation] if moment == "after" else UNITS)
        assert store.check() == []
        first = next(store.units())
        assert store.search(first["content"], 1)[0][0] == pytest.approx(0, abs=1e-6)
