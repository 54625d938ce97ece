"""No search waits for a disk: what is synced while threads search is synced by the background or by a writer.

Every sync is attributed to the thread that asks for it: those of SQLite through a virtual file system, those of other
files through ``os``. Access figures, the sample of queries and the snapshot are written meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endurance import DIM, embed
from fault_vfs import faulty_disk

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.components.store.access_stats import FLUSH_AT
from memevolve_gpu.records.records import Records
from memevolve_gpu.records.transaction import read_counts

SEED = 20_240_607
ROUNDS, SEARCHES, K = 8, 40, 10


@pytest.fixture
def syncing(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each thread synced a file through ``os``, by its ident."""
    counts: Counter[int] = Counter()
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name, None)
        if real is not None:

            def counted(fd: Any, real: Any = real) -> Any:
                counts[threading.get_ident()] += 1
                return real(fd)

            monkeypatch.setattr(os, name, counted)
    return counts


def searches(store: VectorStore, rng: np.random.Generator) -> None:
    for number in range(SEARCHES):
        store.search(f"word{number}", K)
        store.search_units(f"word{number}", K, {"type": "skill"} if number % 2 else None)
        store.search_vectors(rng.standard_normal((1, DIM)), K)


def test_only_writers_and_the_background_sync(tmp_path: Path, syncing: Counter[int]) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    config = StorageConfig(index_type="ivf", min_training_units=64, max_memory_units=10_000)
    rng = np.random.default_rng(SEED)
    with faulty_disk(folder) as disk:

        def gate(what: str, _owner: int) -> None:
            if what == "sync":
                syncing[threading.get_ident()] += 1

        disk.gate = gate  # type: ignore[method-assign]
        store = VectorStore(folder / "store", embed, DIM, storage_config=config)

        def write() -> int:
            for number in range(ROUNDS * 100):
                store.store({"id": f"u{number}", "content": f"word{number}", "type": "skill"})
            return threading.get_ident()

        store.store_batch([{"content": f"first{n}", "type": "skill"} for n in range(200)])
        mine = threading.get_ident()
        before = syncing[mine]
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(write)
            for _ in range(ROUNDS):
                searches(store, rng)
            writer = written.result()
            searches(store, rng)
        assert ROUNDS * SEARCHES * 2 * K > 3 * FLUSH_AT  # so many ids that access figures were written meanwhile
        assert syncing[mine] == before
        assert syncing[writer] >= ROUNDS * 100  # what is counted does happen
        store.close()
        assert sum(count for ident, count in syncing.items() if ident not in (mine, writer)) > 0


def test_without_a_background_stores_write_the_access_figures(tmp_path: Path, syncing: Counter[int]) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    with faulty_disk(folder) as disk:

        def gate(what: str, _owner: int) -> None:
            syncing[threading.get_ident()] += what == "sync"

        disk.gate = gate  # type: ignore[method-assign]
        config = StorageConfig(background=False, max_memory_units=10_000)
        with VectorStore(folder / "store", embed, DIM, storage_config=config) as store:
            store.store_batch([{"id": f"u{n}", "content": f"word{n}"} for n in range(50)])
            mine = threading.get_ident()
            before = syncing[mine]
            for number in range(2 * FLUSH_AT // K):
                store.search(f"word{number}", K)
            assert syncing[mine] == before
            store.store({"id": "last", "content": "word"})
            assert syncing[mine] > before
            copy = Records.open(folder / "store")
            with copy.write() as tx:
                assert sum(tx.read(lambda con: read_counts(con, 0)).values()) == 2 * FLUSH_AT
            copy.close()
