"""``os.fork`` with an open store, at good moments and at bad ones: nobody hangs, and both sides see each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endurance import DIM, Model, contents, embed, verify
from support import HANGS, ended, fork

from memevolve_gpu import StorageConfig, StoreClosedError, VectorStore
from memevolve_gpu.index import vector_table
from memevolve_gpu.index.ivf import IVFIndex
from memevolve_gpu.live.view import LiveRows

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    # Python 3.12 warns of what is tested here: forking while threads run.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def open_store(prefix: Path, **settings: Any) -> VectorStore:
    config = StorageConfig(**{"index_type": "ivf", "min_training_units": 100, "background": False, **settings})
    return VectorStore(prefix, embed, DIM, storage_config=config)


def unit(number: int, word: str = "") -> dict[str, Any]:
    return {"id": f"{word}{number}", "content": f"w{number % 7} {word} fact {number}", "type": "skill"}


def units(*ends: int, word: str = "") -> list[dict[str, Any]]:
    return [unit(number, word) for number in range(*ends)]


def model_of(*many: list[dict[str, Any]]) -> Model:
    return {one["id"]: one for some in many for one in some}


def finds(store: VectorStore, one: dict[str, Any]) -> bool:
    return [unit_id for _, unit_id in store.search(f"{one['content']} {one['type']}", 1)] == [one["id"]]


def join(pid: int) -> None:
    status = ended(pid)
    assert status != -signal.SIGALRM, "the child hangs; its stacks are in the captured stderr"
    assert status == 0, f"the child failed with status {status}; its traceback is in the captured stderr"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    with open_store(tmp_path / "store") as store:
        store.store_batch(units(0, 300))
        store.run_maintenance()
        yield store


class TestOneThread:
    def test_the_child_searches_writes_and_maintains(self, store: VectorStore) -> None:
        def act() -> None:
            verify(store, [model_of(units(0, 300))])
            store.store_batch(units(300, 900))
            assert store.update("5", {**unit(5), "content": "w1 by the child"})
            assert store.run_maintenance()["actions"][0].startswith("built")
            store.snapshot()
            verify(store, [model_of(units(0, 900)) | {"5": {**unit(5), "content": "w1 by the child"}}])

        join(fork(act))
        verify(store, [model_of(units(0, 900)) | {"5": {**unit(5), "content": "w1 by the child"}}])

    def test_both_write_at_once_and_see_each_other(self, store: VectorStore) -> None:
        def act() -> None:
            for number in range(40):
                store.store(unit(number, "child"))
                assert finds(store, unit(number, "child"))
            deadline = time.monotonic() + HANGS / 2
            while not store.exists("parent39") and time.monotonic() < deadline:
                time.sleep(0.01)
            assert finds(store, unit(39, "parent"))

        pid = fork(act)
        for number in range(40):
            store.store(unit(number, "parent"))
            assert finds(store, unit(number, "parent"))
        join(pid)
        verify(store, [model_of(units(0, 300), units(40, word="child"), units(40, word="parent"))])

    def test_closing_in_the_child_does_not_hurt_the_parent(self, store: VectorStore) -> None:
        def act() -> None:
            store.store(unit(1, "child"))
            store.close()

        for number in range(3):
            join(fork(act))
            store.store(unit(number, "parent"))
            verify(store, [model_of(units(0, 300), units(1, 2, word="child"), units(number + 1, word="parent"))])

    def test_closing_in_the_parent_does_not_hurt_the_child(self, store: VectorStore, tmp_path: Path) -> None:
        def act() -> None:
            deadline = time.monotonic() + HANGS / 2
            while not (tmp_path / "closed").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            store.store(unit(1, "child"))
            verify(store, [model_of(units(0, 300), units(1, 2, word="child"))])

        pid = fork(act)
        store.close()
        (tmp_path / "closed").touch()
        join(pid)

    def test_a_grandchild_works_too(self, store: VectorStore) -> None:
        def act() -> None:
            store.store(unit(1, "child"))
            join(fork(lambda: store.store(unit(1, "grandchild"))))
            assert finds(store, unit(1, "grandchild"))

        join(fork(act))
        verify(store, [model_of(units(0, 300), units(1, 2, word="child"), units(1, 2, word="grandchild"))])

    def test_inside_a_transaction_the_child_is_refused_and_the_parent_goes_on(self, store: VectorStore) -> None:
        def act() -> None:
            for call in (lambda: store.store(unit(1)), lambda: store.search("w1", 1), store.count):
                with pytest.raises(StoreClosedError, match="fork"):
                    call()

        with store._open.records.write() as tx:
            tx.drop("7")
            join(fork(act))
            tx.drop("8")
        verify(store, [model_of([one for one in units(0, 300) if one["id"] not in ("7", "8")])])


class TestThreads:
    """Another thread of the parent is always in the midst of something when the fork happens."""

    @pytest.mark.parametrize("busy_with", ["searching", "writing", "filtering", "maintaining"])
    def test_no_child_hangs(self, store: VectorStore, busy_with: str) -> None:
        busy, stop, failed = Busy(store), threading.Event(), []

        def loop() -> None:
            number = 0
            while not stop.is_set():
                try:
                    getattr(busy, busy_with)(number)
                except BaseException as error:
                    failed.append(error)
                    raise
                number += 1

        def act() -> None:
            number = os.getpid()
            store.store(unit(number, "child"))
            assert finds(store, unit(number, "child"))
            assert len(store.search("w1", 5, filters={"type": "skill"})) == 5
            store.run_maintenance()

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            for _ in range(12):
                join(fork(act))
        finally:
            stop.set()
            thread.join(HANGS)
        assert not thread.is_alive(), "the parent hangs"
        assert not failed
        assert sum(unit_id.startswith("child") for unit_id in contents(store)) == 12
        verify(store, [contents(store)])


def test_a_mask_half_made_by_another_thread_does_not_hang_the_child() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow:
        def __len__(self) -> int:
            return 3

        def __gt__(self, _watermark: int) -> list[bool]:
            entered.set()
            go_on.wait(HANGS)
            return [True] * 3

    half_made: Any = LiveRows(Slow(), 1, array("q"), 0)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: half_made.rows)
    thread.start()
    entered.wait(HANGS)
    try:
        join(fork(lambda: LiveRows(np.array([5, 0, 5]), 1, array("q", [1]), 1).rows))
    finally:
        go_on.set()
        thread.join()


def test_a_calibration_of_another_thread_does_not_hang_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds, and what it computes once it must not lock: the child would wait for a thread it lacks."""
    entered, go_on, parent = threading.Event(), threading.Event(), os.getpid()
    candidates = IVFIndex.candidates

    def slow(index: IVFIndex, *arguments: Any) -> Any:
        if os.getpid() == parent:
            entered.set()
            go_on.wait(HANGS)
        return candidates(index, *arguments)

    count = 20_000
    with open_store(tmp_path / "store", max_memory_units=count) as store:
        store.store_batch(units(0, count), np.random.default_rng(7).standard_normal((count, DIM)).astype(np.float32))
        monkeypatch.setattr(IVFIndex, "candidates", slow)
        thread = threading.Thread(target=store.run_maintenance)
        thread.start()
        assert entered.wait(HANGS)

        def act() -> None:
            assert not store.index.is_building
            assert store.retrain()["actions"][0].startswith("built ivf")

        pid = fork(act)
        go_on.set()
        thread.join()
        join(pid)


def test_a_handler_that_raises_while_a_fork_waits_leaves_both_sides_in_order(store: VectorStore) -> None:
    """Ctrl-C during the wait for another thread's write: the child is refused, and the parent goes on."""
    inside, go_on, told = threading.Event(), threading.Event(), []

    def write() -> None:
        with store._open.records.write() as tx:
            tx.drop("7")
            inside.set()
            go_on.wait(HANGS)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def act() -> None:
        with pytest.raises(StoreClosedError, match="fork"):
            store.count()

    thread = threading.Thread(target=write)
    thread.start()
    assert inside.wait(HANGS)
    before = signal.signal(signal.SIGALRM, interrupt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda one: told.append(one.exc_type))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            join(fork(act))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            go_on.set()
            thread.join()
    assert told == [KeyboardInterrupt]
    later: list[Any] = []

    def other() -> None:
        later.append(store.store(unit(1, "later")))
        join(fork(lambda: store.store(unit(2, "later"))))

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    thread.join(HANGS / 2)
    assert later == ["later1"], "the other threads of the parent hang"
    assert not thread.is_alive()
    verify(store, [model_of([one for one in units(0, 300) if one["id"] != "7"], units(1, 3, word="later"))])


class Busy:
    """What the parent's other thread does over and over."""

    def __init__(self, store: VectorStore) -> None:
        self.store = store

    def searching(self, number: int) -> None:
        self.store.search_vectors(np.ones((64, DIM)), 10, recall=1.0)

    def writing(self, number: int) -> None:
        self.store.store(unit(number % 20, "busy"))

    def filtering(self, number: int) -> None:
        self.store.delete(f"busy{number % 20}")
        self.store.store(unit(number % 20, "busy"))
        self.store.search("w1", 5, filters={"type": "skill"})

    def maintaining(self, number: int) -> None:
        self.store.store_batch(units(0, 120, word="busy"))
        self.store.run_maintenance()


def test_the_maintenance_lock_does_not_outlive_the_round_in_a_child(store: VectorStore, tmp_path: Path) -> None:
    """A child forked in the midst of the parent's round must not keep everyone from the next one."""
    children: list[int] = []
    idle = tmp_path / "idle"

    def act() -> None:
        deadline = time.monotonic() + HANGS / 2
        while not idle.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def progress(_stage: str, _share: float) -> None:
        if not children:
            children.append(fork(act))

    store.store_batch(units(300, 900))
    assert store.run_maintenance(progress)["actions"][0].startswith("built")
    assert children
    skipped = store._open.maintenance.run(wait=False).skipped
    idle.touch()
    join(children[0])
    assert not skipped


def test_parent_and_child_do_not_write_into_one_spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that wait lie in a file that both have mapped. The parent never sees the rows that the child skips."""
    monkeypatch.setattr(vector_table, "SPILLED_BYTES", 4096)
    with open_store(tmp_path / "store", index_type="flat") as store:
        store.store_batch(units(0, 500))
        assert store._open.live.view.delta.spilled
        first, second = os.pipe(), os.pipe()

        def act() -> None:
            store.store_batch(units(0, 40, word="child"))  # the child applies these
            os.write(first[1], b"x")
            assert os.read(second[0], 1) == b"x"
            verify(store, [model_of(units(0, 500), units(20, 40, word="child"), units(0, 30, word="parent"))])

        pid = fork(act)
        os.close(first[1])
        assert os.read(first[0], 1) == b"x", "the child failed"
        store.delete_batch([f"child{number}" for number in range(20)])  # the parent skips the deleted ones
        store.store_batch(units(0, 30, word="parent"))
        expected = model_of(units(0, 500), units(20, 40, word="child"), units(0, 30, word="parent"))
        verify(store, [expected])
        os.write(second[1], b"x")
        join(pid)
        verify(store, [expected])


def test_the_background_thread_is_started_anew_in_the_child(tmp_path: Path) -> None:
    with open_store(tmp_path / "store", background=True) as store:
        store.store_batch(units(0, 150))
        until(lambda: store.index.kind == "ivf")

        def act() -> None:
            store.store_batch(units(150, 900))
            until(lambda: store.index.ntotal == 900 and store.statistics()["tail_rows"] < 500)

        join(fork(act))


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANGS / 2
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


_pool_store: VectorStore | None = None


def store_in_pool(number: int) -> bool:
    assert _pool_store is not None
    signal.alarm(HANGS)
    _pool_store.store(unit(number, "pool"))
    return finds(_pool_store, unit(number, "pool"))


def test_a_pool_of_forked_workers(store: VectorStore) -> None:
    global _pool_store  # noqa: PLW0603 - what a pool's workers inherit, they inherit as a global
    _pool_store = store
    with multiprocessing.get_context("fork").Pool(2) as pool:
        waiting = pool.map_async(store_in_pool, range(60))
        for number in range(20):
            store.store(unit(number, "parent"))
        assert all(waiting.get(HANGS))
        pool.close()
        pool.join()
    _pool_store = None
    verify(store, [model_of(units(0, 300), units(60, word="pool"), units(20, word="parent"))])


def many_threads(prefix: Path) -> None:
    """With a pool of OpenMP threads in the parent, which the child does not have."""
    import faiss

    assert faiss.omp_get_max_threads() > 1
    with open_store(prefix, min_training_units=1000) as store:
        store.store_batch(units(0, 3000))
        store.run_maintenance()
        store.search_vectors(np.ones((500, DIM)), 10)

        def act() -> None:
            store.store_batch(units(3000, 6000))
            store.run_maintenance()
            store.search_vectors(np.ones((500, DIM)), 10)
            store.search_vectors(np.ones((500, DIM)), 10, recall=1.0)

        join(fork(act))
        store.search_vectors(np.ones((500, DIM)), 10, recall=1.0)
        assert store.count() == 6000


def test_openmp_threads_of_the_parent_do_not_hang_the_child(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "store")],
        env={**os.environ, "OMP_NUM_THREADS": "4", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=4 * HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    many_threads(Path(sys.argv[1]))
