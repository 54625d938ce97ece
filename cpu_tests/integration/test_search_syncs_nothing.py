"""No search waits for a disk: what is synced while threads search is synced by the background or by a writer.

Every sync is attributed to the thread that asks for it: those of SQLite through a virtual file system, those of other
files through ``os``. Access figures, the sample of queries and the snapshot are written meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endurance import DIM, embed
from fault_vfs import FaultVFS, faulty_disk

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.components.store.access_stats import FLUSH_AT
from memevolve_gpu.records.records import Records
from memevolve_gpu.records.transaction import read_counts

SEED = 20_240_607
ROUNDS, SEARCHES, K = 8, 40, 10


class Syncs(Counter[int]):
    """How often each thread synced a file, by its ident."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._monkeypatch = monkeypatch
        for name in ("fsync", "fdatasync"):
            if hasattr(os, name):
                monkeypatch.setattr(os, name, partial(self._counted, getattr(os, name)))

    def watch(self, disk: FaultVFS) -> None:
        """Count what SQLite syncs through this file system."""

        def gate(what: str, _owner: int) -> None:
            self[threading.get_ident()] += what == "sync"

        self._monkeypatch.setattr(disk, "gate", gate)

    def _counted(self, sync: Callable[[Any], None], fd: Any) -> None:
        self[threading.get_ident()] += 1
        sync(fd)


@pytest.fixture
def syncing(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


def searches(store: VectorStore, rng: np.random.Generator) -> None:
    for number in range(SEARCHES):
        store.search(f"word{number}", K)
        store.search_units(f"word{number}", K, {"type": "skill"} if number % 2 else None)
        store.search_vectors(rng.standard_normal((1, DIM)), K)


def test_only_writers_and_the_background_sync(tmp_path: Path, syncing: Syncs) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    config = StorageConfig(index_type="ivf", min_training_units=64, max_memory_units=10_000)
    rng = np.random.default_rng(SEED)
    with faulty_disk(folder) as disk:
        syncing.watch(disk)
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


def test_without_a_background_stores_write_the_access_figures(tmp_path: Path, syncing: Syncs) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    with faulty_disk(folder) as disk:
        syncing.watch(disk)
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


def test_a_search_by_text_sees_what_another_opening_of_the_store_did_before_it(tmp_path: Path) -> None:
    config = StorageConfig(background=False)
    with (
        VectorStore(tmp_path / "store", embed, DIM, storage_config=config) as here,
        VectorStore(tmp_path / "store", embed, DIM, storage_config=config) as there,
    ):
        for turn in range(3):
            assert not here.search("word", K)
            assert not here.search_units("word", K)
            there.store({"id": f"u{turn}", "content": "word"})
            assert [unit_id for _, unit_id in here.search("word", K)] == [f"u{turn}"]
            there.clear()
            assert not here.search("word", K)
            assert not here.search_units("word", K)
            there.store({"id": f"again{turn}", "content": "word"})
            assert [hit.id for hit in here.search_units("word", K)] == [f"again{turn}"]
            there.delete(f"again{turn}")
