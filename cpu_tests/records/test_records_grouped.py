"""Short writes of several threads at once, which share a commit."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import apsw
import pytest
from records_kit import DIM, Fault, facts, put, unit, vector
from support import SEED

from memevolve_gpu.errors import StorageError, StorageFullError
from memevolve_gpu.records import Records, writer

SOURCE = Path(__file__).resolve().parents[2] / "src"
PATIENCE = 60
"""Seconds that what happens at once may take on a busy machine."""


class Interrupted(BaseException):
    """Raised by the timer, wherever the main thread happens to be."""


@pytest.fixture
def store(prefix: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    monkeypatch.setattr(writer, "GROUP_SECONDS", PATIENCE)
    with Records.open(prefix, dim=DIM, vfs="faulty") as opened:
        put(opened, "first")
        yield opened
        fault.failing.clear()


def grouped(records: Records, unit_id: str, failing: BaseException | None = None) -> None:
    with records.write(grouped=True) as tx:
        tx.put(unit(unit_id, content=unit_id), vector(), unit_id)
        if failing is not None:
            raise failing


def all_at_once(store: Records, acts: list[Callable[[], None]]) -> list[BaseException | None]:
    """Let every act wait for a write that is open, end that, and return what each one raised."""
    results: list[BaseException | None] = [None] * len(acts)

    def run(at: int) -> None:
        try:
            acts[at]()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            results[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(acts))]
    until = time.monotonic() + PATIENCE
    with suppress(StorageError), store.write(grouped=True):
        for thread in threads:
            thread.start()
        while len(store._session.waiting) < len(acts):
            assert time.monotonic() < until
            time.sleep(0.001)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    return results


def test_writes_that_wait_for_each_other_are_synced_once(store: Records, fault: Fault) -> None:
    before = fault.calls["sync"]
    names = [f"u{n}" for n in range(8)]
    assert all_at_once(store, [lambda name=name: grouped(store, name) for name in names]) == [None] * 8  # type: ignore[misc]
    assert fault.calls["sync"] == before + 1
    assert set(store.ids()) == {"first", *names}
    assert [change.seq for change in store.read_after(0, 100)] == list(range(1, 10))
    assert store.check() == []


def test_a_write_that_fails_takes_no_other_with_it(store: Records) -> None:
    acts: list[Callable[[], None]] = [
        lambda: grouped(store, "a"),
        lambda: grouped(store, "bad", ValueError("of this thread alone")),
        lambda: grouped(store, "b"),
        lambda: grouped(store, "worse", apsw.FullError("of this thread alone")),
        lambda: grouped(store, "c"),
    ]
    a, bad, b, worse, c = all_at_once(store, acts)
    assert (a, b, c) == (None, None, None)
    assert isinstance(bad, ValueError)
    assert isinstance(worse, (apsw.FullError, StorageFullError))
    assert set(facts(store)) == {"first", "a", "b", "c"}
    assert store.count() == 4
    assert store.check() == []


@pytest.mark.parametrize("call", ["write", "sync"])
def test_when_the_shared_commit_fails_every_thread_is_told(store: Records, fault: Fault, call: str) -> None:
    before = store.head()
    fault.only = "-wal"
    fault.failing[call] = apsw.FullError("disk full")
    results = all_at_once(store, [lambda n=n: grouped(store, f"u{n}") for n in range(5)])  # type: ignore[misc]
    assert [type(error) for error in results] == [StorageFullError] * 5
    assert len(set(map(id, results))) == 5
    assert store.head() == before
    fault.failing.clear()
    grouped(store, "next")
    assert list(store.ids()) == ["first", "next"]
    assert store.check() == []


@pytest.mark.parametrize(
    "act", [lambda store: store.rewrite(1.0), Records.checkpoint, lambda store: store.check(fix=True)]
)
def test_what_needs_the_file_for_itself_commits_what_waits(
    store: Records, monkeypatch: pytest.MonkeyPatch, act: Callable[[Records], object]
) -> None:
    monkeypatch.setattr(writer, "_LOOK_AGAIN", PATIENCE)
    session = store._session
    session.waiting.add(-1)  # a thread that does not come, so that the next one leaves its commit to others
    thread = threading.Thread(target=grouped, args=(store, "a"), daemon=True)
    thread.start()
    until = time.monotonic() + PATIENCE
    while session.group is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    session.waiting.discard(-1)
    act(store)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert set(store.ids()) == {"first", "a"}
    assert store.check() == []


def test_a_long_write_is_committed_alone(store: Records) -> None:
    """Its failure, or its length, is nothing to the short ones that came before it."""
    inside, go_on = threading.Event(), threading.Event()

    def long_write() -> None:
        with suppress(ValueError), store.write() as tx:
            put(tx, "long")
            inside.set()
            assert go_on.wait(PATIENCE)
            raise ValueError

    thread = threading.Thread(target=long_write)
    assert all_at_once(store, [lambda: grouped(store, "a"), lambda: grouped(store, "b")]) == [None, None]
    thread.start()
    assert inside.wait(PATIENCE)
    assert set(store.ids()) == {"first", "a", "b"}
    go_on.set()
    thread.join()
    assert set(store.ids()) == {"first", "a", "b"}


def test_closing_commits_what_waits(prefix: Path) -> None:
    records = Records.open(prefix, dim=DIM)
    told: list[str] = []

    def write() -> None:
        with suppress(StorageError):
            for number in range(1000):
                name = f"{threading.get_ident()}-{number}"
                grouped(records, name)
                told.append(name)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(told) < 50:
        time.sleep(0.001)
    records.close()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    with Records.open(prefix) as again:
        assert set(again.ids()) >= set(told)
        assert again.check() == []


KILLED = """
import sys, threading
from memevolve_gpu.records import Records
r = Records.open(sys.argv[1])
saying = threading.Lock()
def write(name):
    for number in range(10**6):
        uid = f"{name}-{number}"
        with r.write(grouped=True) as tx:
            tx.put({"id": uid}, bytes(4 * r.dim), uid)
        with saying:
            print(uid, flush=True)
for name in "abcd":
    threading.Thread(target=write, args=(name,)).start()
"""


def test_what_was_acknowledged_survives_a_kill(prefix: Path) -> None:
    chance = random.Random(SEED)
    Records.open(prefix, dim=DIM).close()
    told: set[str] = set()
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, str(prefix)]
        with subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            told.update(process.stdout.readline().strip() for _ in range(chance.randrange(20, 200)))
            process.kill()
            told.update(line.strip() for line in process.stdout if line.endswith("\n"))
        with Records.open(prefix) as records:
            assert set(records.ids()) >= told
            assert records.count() == len(set(records.ids()))
            assert records.check() == []


def test_an_interrupt_at_any_point_harms_no_other_thread(records: Records) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    chance, over = random.Random(SEED), threading.Event()
    told: list[str] = []
    failures: list[BaseException] = []

    def write(name: str) -> None:
        number = 0
        while not over.is_set():
            number += 1
            try:
                grouped(records, f"{name}-{number}")
            except StorageError as error:
                failures.append(error)
            else:
                told.append(f"{name}-{number}")

    threads = [threading.Thread(target=write, args=(name,), daemon=True) for name in ("x", "y")]
    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # an interrupt inside a callback of the collector is swallowed, whoever registered it
    try:
        for thread in threads:
            thread.start()
        for turn in range(200):
            with suppress(Interrupted):
                try:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(5e-6, chance.choice([1e-4, 5e-4, 5e-3])))
                    for number in range(20):
                        grouped(records, f"{turn}-{number}")
                        told.append(f"{turn}-{number}")
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
        gc.enable()
        over.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert all("interrupted" in str(error) or "same commit" in str(error) for error in failures), failures[:3]
    assert set(records.ids()) >= set(told)
    grouped(records, "after")
    assert records.exists("after")
    assert records.check() == []
