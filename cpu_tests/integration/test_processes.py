"""Several processes on one store: nothing lost, nothing doubled, nobody blocked by the dead, all up to date."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import writers
from endurance import DIM, Model, contents, embed, verify
from support import FakeEmbedder

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.live import snapshot_writer
from memevolve_gpu.records import Records

SEED = 20_240_607
PATIENCE = 60.0
"""Seconds after which something hangs."""


def open_store(prefix: str | Path, **settings: Any) -> VectorStore:
    config = StorageConfig(**{"index_type": "ivf", "min_training_units": 100, "background": False, **settings})
    return VectorStore(prefix, embed, DIM, storage_config=config)


def unit(number: int, content: str = "") -> dict[str, Any]:
    return {"id": f"id{number}", "content": content or f"w{number % 7} fact {number}", "type": "skill"}


def units(*ends: int) -> list[dict[str, Any]]:
    return [unit(number) for number in range(*ends)]


def model_of(*many: list[dict[str, Any]]) -> Model:
    return {one["id"]: one for some in many for one in some}


class Process:
    """Another process with the store open; ``ask(f, ...)`` runs ``f(store, ...)`` there and returns its result."""

    def __init__(self, prefix: Path, **settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, str(prefix), settings), daemon=True)
        self._process.start()
        other.close()
        self.answer()

    def begin(self, act: Callable[..., Any], *arguments: Any) -> None:
        self._line.send((act, arguments))

    def answer(self) -> Any:
        assert self._line.poll(PATIENCE), "the other process hangs"
        return self._line.recv()

    def ask(self, act: Callable[..., Any], *arguments: Any) -> Any:
        self.begin(act, *arguments)
        return self.answer()

    def kill(self) -> None:
        assert self._process.pid
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(PATIENCE)

    def end(self) -> None:
        if self._process.is_alive():
            self._line.send(None)
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, "the other process hangs"


def serve(line: Connection, prefix: str, settings: dict[str, Any]) -> None:
    """The other process's side."""
    snapshot_writer.LOG_KEPT = settings.pop("log_kept", snapshot_writer.LOG_KEPT)
    with open_store(prefix, **settings) as store:
        line.send("ready")
        while (asked := line.recv()) is not None:
            act, arguments = asked
            line.send(act(store, *arguments))


@contextmanager
def another(prefix: Path, **settings: Any) -> Iterator[Process]:
    process = Process(prefix, **settings)
    try:
        yield process
    finally:
        process.end()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "seconds"), [(2, 1.5), (3, 1.5)])
def test_processes_write_search_and_read_each_other(tmp_path: Path, processes: int, seconds: float) -> None:
    figures = writers.run(processes, seconds, SEED, tmp_path)
    print(figures)
    assert (figures["lost"], figures["doubled"], figures["missed"], figures["lock_errors"]) == (0, 0, [], [])
    assert figures["done"]["units of others read"]
    assert figures["units"] > 0


# What the other process is asked to do


def store_many(store: VectorStore, batch: list[dict[str, Any]]) -> list[str]:
    return store.store_batch(batch)


def store_and_delete(store: VectorStore, start: int, rounds: int) -> None:
    for number in range(start, start + rounds):
        store.store(unit(number))
        assert store.search(writers.text_of(unit(number)), 1)[0][1] == f"id{number}"
        if number % 3 == 0:
            assert store.delete(f"id{number}")


def maintain(store: VectorStore) -> Any:
    return store.run_maintenance()


def maintain_often(store: VectorStore, rounds: int) -> int:
    """Maintenance again and again, with something to do each time; how many indexes were built."""
    for number in range(rounds):
        store.store_batch([unit(10_000 + i, f"w1 round {number} of {i}") for i in range(60)])
        store.run_maintenance()
        store.snapshot()
    return int(store.statistics()["event_totals"]["built"])


def checked(store: VectorStore, expected: Model) -> tuple[str, dict[str, int]]:
    verify(store, [expected])
    return store.index.kind, store.statistics()["event_totals"]


def hold_write_lock(store: VectorStore, line_is_open: str) -> None:
    """Never returns: killed inside of a transaction that has changed something."""
    with store._open.records.write() as tx:
        tx.drop("id1")
        tx.put(unit(999), embed("text").tobytes(), "id999")
        Path(line_is_open).touch()
        time.sleep(PATIENCE)


def hold_maintenance_lock(store: VectorStore, line_is_open: str) -> None:
    """Never returns: killed in the midst of a build."""

    def progress(_stage: str, _share: float) -> None:
        Path(line_is_open).touch()
        time.sleep(PATIENCE)

    store.run_maintenance(progress)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, "the other process hangs"
        time.sleep(0.005)


class TestUpkeep:
    def test_maintenance_there_while_this_process_searches_and_writes(self, tmp_path: Path) -> None:
        prefix = tmp_path / "store"
        with open_store(prefix) as store, another(prefix, log_kept=50) as other:
            store.store_batch(units(0, 300))
            other.begin(maintain_often, 8)
            store_and_delete(store, 300, 200)
            assert other.answer() >= 1
            rest = [unit(number) for number in range(300, 500) if number % 3]
            theirs = [unit(10_000 + i, f"w1 round 7 of {i}") for i in range(60)]
            verify(store, [model_of(units(0, 300), rest, theirs)])
            other.ask(checked, model_of(units(0, 300), rest, theirs))

    def test_a_body_that_another_process_trained_is_adopted(self, tmp_path: Path) -> None:
        prefix = tmp_path / "store"
        with another(prefix) as other, open_store(prefix) as store:
            store.store_batch(units(0, 400))
            assert store.run_maintenance()["actions"][0].startswith("built ivf")
            assert other.ask(maintain)["actions"] == ["adopted a newer snapshot"]
            kind, events = other.ask(checked, model_of(units(0, 400)))
            assert (kind, events.get("built", 0)) == ("ivf", 0)

    def test_it_is_adopted_although_units_came_and_went_since(self, tmp_path: Path) -> None:
        prefix = tmp_path / "store"
        with another(prefix) as other, open_store(prefix) as store:
            store.store_batch(units(0, 400))
            store.run_maintenance()
            store.delete_batch(["id399", "id3"])
            store.store(unit(5, "w2 another text"))
            store.store_batch(units(400, 410))
            assert other.ask(maintain)["actions"] == ["adopted a newer snapshot"]
            expected = model_of(units(0, 410)) | {"id5": unit(5, "w2 another text")}
            del expected["id399"], expected["id3"]
            assert other.ask(checked, expected)[0] == "ivf"

    def test_a_process_that_slept_past_the_horizon_reads_everything_again(self, tmp_path: Path) -> None:
        prefix = tmp_path / "store"
        with open_store(prefix) as store, another(prefix, log_kept=20) as other:
            store.store_batch(units(0, 50))
            other.ask(store_many, [unit(7, "w3 changed while the first process slept"), *units(50, 200)])
            actions = other.ask(maintain)["actions"]
            assert any(action.startswith("purged") for action in actions), actions
            asleep_at = store._open.live.view.watermark
            assert asleep_at < store._open.records.head().horizon
            expected = model_of(units(0, 200)) | {"id7": unit(7, "w3 changed while the first process slept")}
            verify(store, [expected])
            assert store.statistics()["event_totals"]["reload"] == 1


class TestDeadProcesses:
    def test_one_killed_inside_a_transaction_blocks_nobody_and_changes_nothing(self, tmp_path: Path) -> None:
        prefix, signal_file = tmp_path / "store", tmp_path / "holds"
        with open_store(prefix) as store, another(prefix) as other:
            store.store_batch(units(0, 5))
            other.begin(hold_write_lock, str(signal_file))
            wait_for(signal_file)
            verify(store, [model_of(units(0, 5))])
            other.kill()
            assert store.store(unit(5)) == "id5"
            verify(store, [model_of(units(0, 6))])

    def test_one_killed_during_maintenance_blocks_nobody(self, tmp_path: Path) -> None:
        prefix, signal_file = tmp_path / "store", tmp_path / "holds"
        with open_store(prefix) as store, another(prefix) as other:
            store.store_batch(units(0, 300))
            other.begin(hold_maintenance_lock, str(signal_file))
            wait_for(signal_file)
            assert store._open.maintenance.run(wait=False).skipped
            other.kill()
            assert store.run_maintenance()["actions"][0].startswith("built ivf")
            verify(store, [model_of(units(0, 300))])
            assert contents(store) == model_of(units(0, 300))


def test_counting_what_was_read_waits_for_no_writer(tmp_path: Path) -> None:
    config = {"background": False, "lock_timeout": 30}
    with (
        VectorStore(tmp_path / "m", FakeEmbedder(8), storage_config=config) as store,
        Records.open(tmp_path / "m") as other,
    ):
        store.store({"id": "a", "content": "a"})
        with other.write() as tx:
            for _ in range(2500):
                store.retrieve("a")
            tx.set_meta("x", b"y")
        assert store.access_counts() == {"a": 2500}
