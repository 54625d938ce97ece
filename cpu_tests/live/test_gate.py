"""The gate of searches: right answers whoever searches beside, and no wait without an end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from memevolve_gpu import VectorStore
from memevolve_gpu.errors import EngineError
from memevolve_gpu.live import gate
from memevolve_gpu.live.gate import SearchGate
from memevolve_gpu.live.view import Found

DIM, COUNT = 16, 1500
QUIET = {"background": False, "index_type": "ivf"}


@pytest.fixture(autouse=True)
def few_are_a_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CROWD", 0)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((COUNT, DIM)).astype(np.float32)


def filled(path: Path, rows: np.ndarray, embed: Callable[[str], np.ndarray] | None = None) -> VectorStore:
    store = VectorStore(path / "gate", embed, DIM, storage_config=QUIET)
    store.store_batch([{"id": f"u{i}", "content": f"unit {i}", "part": i % 3} for i in range(COUNT)], rows)
    store.run_maintenance()
    store.delete_batch([f"u{i}" for i in range(0, 40, 2)])
    store.store_batch([{"id": f"n{i}", "content": "new", "part": 0} for i in range(30)], rows[:30] + 0.01)
    return store


def search(store: VectorStore, rows: np.ndarray, number: int) -> tuple[list[float], list[str | None]]:
    filters = [None, {"part": 1}, {"part": {"lt": 2}}][number % 3]
    distances, ids = store.search_vectors(rows[number : number + 1], 3 + number % 4, filters)
    return distances[0].tolist(), ids[0]


def test_many_threads_find_what_one_finds(tmp_path: Path, rows: np.ndarray) -> None:
    with filled(tmp_path, rows) as store, ThreadPoolExecutor(16) as pool:
        numbers = list(range(300))
        alone = [search(store, rows, number) for number in numbers]
        for _ in range(4):
            together = list(pool.map(lambda number: search(store, rows, number), numbers))
            assert [ids for _, ids in together] == [ids for _, ids in alone]
            np.testing.assert_allclose(
                np.concatenate([found for found, _ in together]),
                np.concatenate([found for found, _ in alone]),
                rtol=1e-5,
                atol=1e-5,
            )


def test_a_search_finds_what_its_thread_stored_before(tmp_path: Path, rows: np.ndarray) -> None:
    def write_and_find(number: int) -> bool:
        vector = rows[number] * 3 + number
        store.store_batch([{"id": f"own{number}", "content": "own"}], vector[None])
        return store.search_vectors(vector[None], 1)[1][0] == [f"own{number}"]

    with filled(tmp_path, rows) as store, ThreadPoolExecutor(12) as pool:
        assert all(pool.map(write_and_find, range(120)))


def test_an_embedding_function_may_search(tmp_path: Path, rows: np.ndarray) -> None:
    def embed(text: str) -> np.ndarray:
        if text.startswith("outer"):
            store.search("inner", 3)
        row: np.ndarray = rows[len(text) % 7]
        return row

    with filled(tmp_path, rows, embed) as store, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: len(store.search(f"outer {number % 10}", 5)), range(80)))
    assert found == [5] * 80


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
def test_a_signal_handler_may_search_inside_a_search(tmp_path: Path, rows: np.ndarray) -> None:
    inner: list[list[str | None]] = []
    stop = threading.Event()

    def others(number: int) -> None:
        while not stop.is_set():
            search(store, rows, number)

    with filled(tmp_path, rows) as store, ThreadPoolExecutor(6) as pool:
        expected = search(store, rows, 7)[1]
        before = signal.signal(signal.SIGALRM, lambda *_: inner.append(search(store, rows, 7)[1]))
        try:
            working = [pool.submit(others, number) for number in range(6)]
            outer = []
            for number in range(200):
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + number))
                outer.append(search(store, rows, 7)[1])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            stop.set()
        for one in working:
            one.result()
    assert inner
    assert all(ids == expected for ids in outer + inner)


def test_a_child_forked_while_threads_wait_searches(tmp_path: Path, rows: np.ndarray) -> None:
    stop = threading.Event()

    def others(number: int) -> None:
        while not stop.is_set():
            search(store, rows, number)

    with filled(tmp_path, rows) as store, ThreadPoolExecutor(6) as pool:
        expected = search(store, rows, 4)
        working = [pool.submit(others, number) for number in range(6)]
        for _ in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                os._exit(0 if search(store, rows, 4)[1] == expected[1] else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        for one in working:
            one.result()


class Searching:
    """A search of one place that ends when it is let, and what it was asked; an empty view stands for the store's."""

    def __init__(self) -> None:
        self.gate, self.free = SearchGate(places=1), threading.Event()
        self.asked: list[list[float]] = []

    def __call__(self, number: float) -> float:
        found = self.gate.answer("kind", np.full((1, 1), number, np.float32), None, self._search)
        return float(found.distances[0, 0])

    def _search(self, queries: np.ndarray, _now: float | None) -> Found:
        self.asked.append(queries[:, 0].tolist())
        assert self.free.wait(30)
        if 13.0 in queries:
            raise EngineError("13 cannot be searched for")
        return Found(None, queries * 2, np.zeros(queries.shape, np.int64))  # type: ignore[arg-type]  # no view

    def wait_for(self, waiting: int) -> None:
        while len(vars(self.gate)["_waiting"]) < waiting:
            time.sleep(0.001)


def test_queries_that_wait_are_answered_together() -> None:
    searching = Searching()
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(searching, 0.0)
        while not searching.asked:
            time.sleep(0.001)
        rest = [pool.submit(searching, float(number)) for number in range(1, 6)]
        searching.wait_for(5)
        searching.free.set()
        assert [one.result(30) for one in [first, *rest]] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert [len(asked) for asked in searching.asked] == [1, 5]


def test_an_error_reaches_only_the_thread_that_made_it() -> None:
    searching = Searching()
    with ThreadPoolExecutor(4) as pool:
        pool.submit(searching, 0.0)
        while not searching.asked:
            time.sleep(0.001)
        others = [pool.submit(searching, number) for number in (1.0, 13.0, 2.0)]
        searching.wait_for(3)
        searching.free.set()
        assert (others[0].result(30), others[2].result(30)) == (2.0, 4.0)
        assert isinstance(others[1].exception(30), EngineError)
        assert pool.submit(searching, 5.0).result(30) == 10.0


def test_an_interrupt_ends_the_wait_and_leaves_the_gate_as_it_was() -> None:
    searching = Searching()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        inside = pool.submit(searching, 1.0)
        while not searching.asked:
            time.sleep(0.001)
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(KeyboardInterrupt):
                searching(2.0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        searching.free.set()
        assert inside.result(30) == 2.0
    assert searching(3.0) == 6.0
    assert searching.asked == [[1.0], [3.0]]
