"""After the commit a write has happened: what fails from then on is an event and a state, never an error."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_vfs import faulty_disk
from support import HANGS, FakeBatchEmbedder

from memevolve_gpu import MemorySystem, StorageConfig, VectorStore
from memevolve_gpu.errors import CorruptStoreError, DeviceError, EngineError, StorageError
from memevolve_gpu.memory_system import MemorySystemConfig
from memevolve_gpu.records.records import Records
from memevolve_gpu.records.writer import WriteContext

DIM = 8
ERRORS: tuple[Exception, ...] = (
    StorageError("the disk fails"),
    CorruptStoreError("a damaged row"),
    EngineError("faiss fails"),
    DeviceError("the card is lost"),
    MemoryError(),
    OSError(errno.EMFILE, "too many open files"),
    RuntimeError("can't start new thread"),
    ValueError("a vector of another length"),
)


def units(start: int, end: int) -> list[dict[str, Any]]:
    return [
        {"id": f"id{n}", "content": f"word{n} word{n % 3}", "type": ("skill", "tool")[n % 2]} for n in range(start, end)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    config = StorageConfig(background=False, max_memory_units=10_000)
    with VectorStore(tmp_path / "store", FakeBatchEmbedder(DIM), DIM, storage_config=config) as opened:
        opened.store_batch(units(0, 80))
        opened.search("word1", 1)
        yield opened


class FailingAfterCommit:
    """Reading the log fails with ``error`` from the next commit on, until ``lift``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.struck = 0
        self._committed = False
        leave, read = WriteContext.__exit__, Records.read_after

        def left(writing: WriteContext, kind: type[BaseException] | None, *details: object) -> None:
            leave(writing, kind, *details)
            self._committed = self._committed or kind is None

        def read_after(records: Records, seq: int, limit: int) -> Any:
            if self.error is not None and self._committed:
                self.struck += 1
                raise self.error
            return read(records, seq, limit)

        monkeypatch.setattr(WriteContext, "__exit__", left)
        monkeypatch.setattr(Records, "read_after", read_after)

    def arm(self, error: Exception) -> None:
        self.error, self.struck, self._committed = error, 0, False

    def lift(self) -> None:
        self.error = None


def single(act: Callable[[int], object]) -> None:
    """Enough single writes for the index to be brought up to date among them."""
    for number in range(33):
        act(number)


WRITES: dict[str, Callable[[VectorStore], object]] = {
    "store": lambda store: single(lambda n: store.store({"content": f"new word{n}"})),
    "update": lambda store: single(lambda n: store.update(f"id{n}", {"content": f"changed word{n}"})),
    "update in place": lambda store: single(lambda n: store.update(f"id{n}", {**units(n, n + 1)[0], "note": n})),
    "delete": lambda store: single(lambda n: store.delete(f"id{n}")),
    "store_batch": lambda store: store.store_batch(units(200, 300)),
    "replace_batch": lambda store: store.replace_batch(["id1", "id2"], units(200, 203)),
    "delete_batch": lambda store: store.delete_batch(["id3", "id4"]),
    "clear": VectorStore.clear,
    "register": lambda store: store.register_management_operation("prune", {"removed": 3}),
}


@pytest.mark.parametrize("name", WRITES)
def test_no_write_raises_after_its_commit(store: VectorStore, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FailingAfterCommit(monkeypatch)
    struck = 0
    for error in ERRORS:
        fault.arm(error)
        WRITES[name](store)
        struck += fault.struck
        fault.lift()
        expected = {unit["id"] for unit in store.retrieve_all()}
        assert {unit_id for _, unit_id in store.search("word1", 1000, recall=1.0)} == expected
        store.store_batch(units(0, 80))
    assert struck or name == "register"


@pytest.mark.parametrize("operation", ["prune", "consolidate", "deduplicate", "forget"])
def test_no_management_raises_after_its_commit(
    store: VectorStore, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices: dict[str, dict[str, Any]] = {
        "prune": {"criteria": {"max_count": 40}},
        "consolidate": {"by": "type"},
        "deduplicate": {"similarity_threshold": 0.5},
        "forget": {"strategy": "lru", "count": 5},
    }
    options = choices[operation]
    fault = FailingAfterCommit(monkeypatch)
    with MemorySystem(MemorySystemConfig(storage_backend=store)) as system:
        for error in ERRORS:
            store.clear()
            store.store_batch(units(0, 40) + [{**unit, "id": f"again{unit['id']}"} for unit in units(0, 40)])
            store.search("word1", 1)
            fault.arm(error)
            system.manage_memory(operation, **options)
            assert fault.struck
            fault.lift()
            expected = {unit["id"] for unit in store.retrieve_all()}
            assert len(expected) < 80
            assert {unit_id for _, unit_id in store.search("word1", 1000, recall=1.0)} == expected


def test_a_lagging_index_is_an_event_and_a_state(store: VectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FailingAfterCommit(monkeypatch)
    fault.arm(StorageError("the disk fails"))
    assert len(store.store_batch(units(200, 240))) == 40
    health = store.get_storage_health()
    assert health["index_lag"] == 40
    assert health["current_count"] == 120
    assert [one for one in health["recommendations"] if "the disk fails" in one and "40 changes" in one]
    assert store.statistics()["event_totals"]["apply-failed"] >= 1
    fault.lift()
    health = store.get_storage_health()
    assert health["index_lag"] == 0
    assert not [one for one in health["recommendations"] if "disk" in one]
    assert "id201" in {unit_id for _, unit_id in store.search("word201", 200, recall=1.0)}


def test_a_disk_that_cannot_be_read_after_the_commit_does_not_fail_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "faulty"
    folder.mkdir()
    with faulty_disk(folder) as disk:
        config = StorageConfig(background=False)
        store = VectorStore(folder / "store", FakeBatchEmbedder(DIM), DIM, storage_config=config)
        store.store_batch(units(0, 10))
        read = Records.read_after

        def read_after(records: Records, seq: int, limit: int) -> Any:
            disk.arm("read", 1)
            return read(records, seq, limit)

        with monkeypatch.context() as patch:
            patch.setattr(Records, "read_after", read_after)
            assert len(store.store_batch(units(10, 60))) == 50
            assert disk.fired
        disk.lift()
        assert {unit_id for _, unit_id in store.search("word1", 100)} == {f"id{n}" for n in range(60)}
        store.close()


class TestThreadThatCannotStart:
    """The system has no thread to give, for a while."""

    @pytest.fixture
    def refusing(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        refuse, start = [True], threading.Thread.start

        def started(thread: threading.Thread) -> None:
            if refuse[0] and thread.name == "memevolve-maintenance":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", started)
        return refuse

    @pytest.fixture
    def config(self) -> StorageConfig:
        return StorageConfig(min_training_units=24, index_type="hnsw", max_memory_units=10_000)

    def test_the_store_works_and_closes(self, tmp_path: Path, refusing: list[bool], config: StorageConfig) -> None:
        assert refusing[0]
        store = VectorStore(tmp_path / "store", FakeBatchEmbedder(DIM), DIM, storage_config=config)
        for unit in units(0, 100):
            store.store(unit)
        store.store_batch(units(100, 300))
        assert len(store.search("word7", 1000)) == 300
        health = store.get_storage_health()
        assert [one for one in health["recommendations"] if "can't start new thread" in one]
        assert store.statistics()["event_totals"]["background-failed"] == 1
        store.close()
        with VectorStore(tmp_path / "store", FakeBatchEmbedder(DIM), storage_config=config) as again:
            assert again.count() == 300

    def test_the_background_runs_once_threads_are_to_be_had(
        self, tmp_path: Path, refusing: list[bool], config: StorageConfig
    ) -> None:
        with VectorStore(tmp_path / "store", FakeBatchEmbedder(DIM), DIM, storage_config=config) as store:
            store.store_batch(units(0, 300))
            assert not store.statistics()["maintenance"]["rounds"]
            refusing[0] = False
            store.search("word7", 1)  # nothing is written any more: a search starts it
            done = threading.Event()
            for _ in range(20 * HANGS):
                if store.statistics()["maintenance"]["rounds"]:
                    break
                done.wait(0.05)
            assert store.statistics()["maintenance"]["rounds"]
            assert not [one for one in store.get_storage_health()["recommendations"] if "thread" in one]

    def test_a_round_that_raises_the_unforeseen_leaves_no_dead_thread(
        self, tmp_path: Path, config: StorageConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rounds, seen = [0], threading.Event()
        monkeypatch.setattr(threading, "excepthook", lambda *_: seen.set())
        with VectorStore(tmp_path / "store", FakeBatchEmbedder(DIM), DIM, storage_config=config) as store:
            run_if_due = store._open.maintenance.run_if_due

            def failing_once() -> float | None:
                rounds[0] += 1
                if rounds[0] == 1:
                    raise ZeroDivisionError
                return run_if_due()

            monkeypatch.setattr(store._open.maintenance, "run_if_due", failing_once)
            store.store_batch(units(0, 100))
            assert seen.wait(HANGS)
            for start in range(100, 700, 100):
                store.store_batch(units(start, start + 100))
            for _ in range(20 * HANGS):
                if rounds[0] > 1:
                    break
                seen.clear()
                seen.wait(0.05)
            assert rounds[0] > 1
