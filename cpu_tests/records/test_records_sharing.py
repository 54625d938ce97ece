"""Threads, processes, forks and the lock between them."""

from __future__ import annotations

import gc
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from records_kit import DIM, facts, foreign_connection, put, unit, vector
from support import SEED, as_child, ended, fork, inside_in_another_thread

from memevolve_gpu.errors import (
    LockTimeoutError,
    StorageError,
    StorageFullError,
    StoreClosedError,
    TooManyFilesError,
)
from memevolve_gpu.records import Records, connections, pool, writer
from memevolve_gpu.records.fulltext_buffer import FOLD_AT
from memevolve_gpu.utils import forking

SOURCE = Path(__file__).resolve().parents[2] / "src"
PATIENCE = 60
"""Seconds that what happens at once may take on a busy machine."""


def in_threads(*acts: Callable[[], object]) -> None:
    """Run all at once; the first exception of any is raised here."""
    errors: list[BaseException] = []

    def run(act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_may_read_while_others_write(records: Records) -> None:
    rounds, writers = 60, 2
    done = threading.Event()
    finished = []

    def write(name: str) -> None:
        try:
            for number in range(rounds):
                with records.write() as tx:
                    put(tx, f"{name}{number}", text=f"word{number}", tags=[name])
                    put(tx, f"{name}-current", n=number)
        finally:
            finished.append(name)
            if len(finished) == writers:
                done.set()

    def read() -> None:
        last = 0
        while not done.is_set():
            head = records.head()
            changes = records.read_after(last, 1000)
            assert [change.seq for change in changes] == list(range(last + 1, last + 1 + len(changes)))
            last += len(changes)
            slots = records.matching({"tags": "a"})
            assert len(records.units_at(slots)) == len(slots)
            assert len(records.keyword("word1 word2", 10)) <= 2 * writers
            assert records.head().last_seq >= head.last_seq

    in_threads(lambda: write("a"), lambda: write("b"), read, read)
    assert records.count() == writers * (rounds + 1)
    assert records.check() == []


def test_many_threads_at_once_keep_few_connections(records: Records) -> None:
    put(records, "a")
    gate = threading.Barrier(20)

    def read() -> None:
        gate.wait()
        for _ in range(5):
            assert records.get("a") == unit("a")

    in_threads(*[read] * 20)
    assert len(records._pool._idle) <= pool.IDLE_READERS


def test_closing_while_threads_read(records: Records) -> None:
    put(records, "a")
    reading = [threading.Event(), threading.Event()]

    def read_for_ever(several: threading.Event) -> None:
        for rounds in itertools.count():
            records.head()
            assert len(list(records.ids())) == 1
            if rounds == 20:
                several.set()

    def read(several: threading.Event) -> None:
        with pytest.raises(StoreClosedError):
            read_for_ever(several)

    def close() -> None:
        for several in reading:
            assert several.wait(PATIENCE)
        records.close()

    in_threads(lambda: read(reading[0]), lambda: read(reading[1]), close)
    assert not records._pool._all


def test_closing_waits_for_a_running_write(records: Records, prefix: Path) -> None:
    inside, closing = threading.Event(), threading.Event()

    def write() -> None:
        with records.write() as tx:
            inside.set()
            closing.wait()
            time.sleep(0.02)
            put(tx, "a")

    def close() -> None:
        inside.wait()
        closing.set()
        records.close()

    in_threads(write, close)
    with Records.open(prefix) as again:
        assert list(again.ids()) == ["a"]


def test_two_stores_on_one_file_see_each_other(records: Records, prefix: Path) -> None:
    with Records.open(prefix) as other:
        put(records, "a", "alpha")
        assert other.head() == records.head()
        put(other, "b", "beta")
        with other.write() as tx:
            tx.merge_pending()
            tx.drop("a")
        assert facts(records) == {"b": unit("b", content="beta")}
        assert records.keyword("alpha", 5) == []
        assert [found for _, found in records.keyword("beta", 5)] == ["b"]
        assert records.check() == other.check() == []


WRITER = """
import sys
from memevolve_gpu.records import Records
prefix, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
r = Records.open(prefix)
print("ready", flush=True)
sys.stdin.readline()
for number in range(rounds):
    with r.write() as tx:
        uid = tx.next_auto_id()
        tx.put({"id": uid, "by": name, "n": number}, bytes(4 * r.dim), uid)
r.close()
"""


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """``start(script, *arguments)`` runs a process until it says that it is ready; it is ended with the test."""
    workers = []

    def start(script: str, *arguments: str) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        workers.append(worker)
        assert worker.stdout is not None
        said = worker.stdout.readline()
        assert said == "ready\n", f"it ended with status {worker.wait()}; its traceback is in the captured stderr"
        return worker

    yield start
    for worker in workers:
        worker.kill()
        worker.communicate()


def test_processes_write_side_by_side(records: Records, prefix: Path, start: Start) -> None:
    rounds = 150
    workers = [start(WRITER, str(prefix), name, str(rounds)) for name in ("a", "b")]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    last, mine = 0, 0
    while any(worker.poll() is None for worker in workers):
        put(records, f"mine{mine}")
        mine += 1
        for change in records.read_after(last, 10_000):
            assert change.seq == last + 1
            last = change.seq
    for worker in workers:
        worker.communicate()
    assert [worker.returncode for worker in workers] == [0, 0]
    units = facts(records)
    assert len(units) == records.count() == 2 * rounds + mine
    for name in ("a", "b"):
        assert [one["n"] for one in units.values() if one.get("by") == name] == list(range(rounds))
    assert records.check() == []


HOLDER = """
import sys
from memevolve_gpu.records import Records
r = Records.open(sys.argv[1])
with r.write() as tx:
    tx.put({"id": "held"}, bytes(4 * r.dim), "held")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_process_killed_inside_a_transaction_leaves_no_lock_and_no_row(
    records: Records, prefix: Path, start: Start
) -> None:
    holder = start(HOLDER, str(prefix))
    assert records.count() == 0
    holder.kill()
    holder.communicate()
    put(records, "a")
    assert list(records.ids()) == ["a"]
    assert records.check() == []


def interrupted(act: Callable[[], object]) -> None:
    """Run ``act``, with a Ctrl-C a moment later, which comes inside this function however slow the machine is."""
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        act()
    finally:
        timer.join()


def test_ctrl_c_ends_the_wait_for_another_process(records: Records, prefix: Path, start: Start) -> None:
    holder = start(HOLDER, str(prefix))
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: put(records, "a"))
    holder.communicate("\n")
    put(records, "b")
    assert sorted(records.ids()) == ["b", "held"]


def test_ctrl_c_ends_the_wait_for_another_thread(records: Records) -> None:
    with inside_in_another_thread(records.write()), pytest.raises(KeyboardInterrupt):
        interrupted(lambda: put(records, "a"))
    put(records, "b")
    assert list(records.ids()) == ["b"]


class Interrupted(BaseException):
    """Raised by the timer, wherever the main thread happens to be."""


def test_an_interrupt_at_any_point_leaves_the_store_usable(records: Records) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    chance = random.Random(SEED)
    before = signal.signal(signal.SIGALRM, interrupt)
    acknowledged = []
    gc.disable()  # an interrupt inside a callback of the collector is swallowed, whoever registered it
    try:
        for turn in range(300):
            with suppress(Interrupted):
                try:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(5e-6, chance.choice([1e-4, 5e-4, 2e-3])))
                    for number in range(20):
                        put(records, f"{turn}-{number}")
                        acknowledged.append(f"{turn}-{number}")
                        records.head()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    in_threads(lambda: put(records, "from another thread"))
    stored = set(records.ids())
    assert stored >= {*acknowledged, "from another thread"}
    assert len(stored) <= len(acknowledged) + 1 + 300
    assert len(records._pool._all) == 1
    assert records.check() == []


def test_ctrl_c_ends_the_wait_for_a_foreign_program(records: Records) -> None:
    foreign = foreign_connection(records.path)
    foreign.execute("BEGIN IMMEDIATE")
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: put(records, "a"))
    foreign.execute("COMMIT")
    foreign.close()
    put(records, "b")
    assert list(records.ids()) == ["b"]


def test_a_foreign_program_that_does_not_let_go_is_named(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BUSY_SECONDS", 0.05)
    foreign = foreign_connection(records.path)
    foreign.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="another program"):
        put(records, "a")
    foreign.execute("COMMIT")
    foreign.close()
    put(records, "b")
    assert list(records.ids()) == ["b"]


def test_a_forked_child_works_on_its_own_connections(records: Records) -> None:
    put(records, "before", "early")
    records.head()

    def child() -> None:
        assert records.get("before") == unit("before", content="early")
        for number in range(FOLD_AT + 5):
            put(records, f"child{number}")
        assert [found for _, found in records.keyword("early", 5)] == ["before"]
        records.close()

    status = as_child(child)
    put(records, "after")
    assert status == 0
    assert records.count() == FOLD_AT + 7
    assert records.check() == []


def test_parent_and_child_write_at_once(records: Records, prefix: Path) -> None:
    def child() -> None:
        for number in range(100):
            put(records, f"child{number}")

    pid = fork(child)
    for number in range(100):
        put(records, f"parent{number}")
    assert ended(pid) == 0
    assert records.count() == 200
    assert records.check() == []


def test_a_child_survives_its_parent_closing(records: Records, prefix: Path) -> None:
    """Were connections inherited, the parent would delete the log that the child writes to."""
    put(records, "a")
    gate_read, gate_write = os.pipe()
    told_read, told_write = os.pipe()

    def child() -> None:
        put(records, "b")
        os.write(told_write, b"x")
        os.read(gate_read, 1)
        put(records, "c")
        assert records.check() == []
        records.close()

    pid = fork(child)
    os.close(told_write)
    assert os.read(told_read, 1) == b"x", "the child failed before"
    assert records.exists("b")
    records.close()
    os.write(gate_write, b"x")
    assert ended(pid) == 0
    for end in (gate_read, gate_write, told_read):
        os.close(end)
    with Records.open(prefix) as again:
        assert list(again.ids()) == ["a", "b", "c"]
        assert again.check() == []


def test_no_connection_is_open_while_the_process_forks(records: Records) -> None:
    records.head()
    open_in_child: list[str] = []

    def child() -> None:
        folder = Path("/proc/self/fd")
        open_in_child.extend(str(fd.readlink()) for fd in folder.iterdir() if fd.exists())
        assert not [target for target in open_in_child if target.startswith(str(records.path.with_suffix("")))]

    assert as_child(child) == 0


def test_a_child_forked_inside_a_transaction_may_not_touch_the_store(records: Records, prefix: Path) -> None:
    def child() -> None:
        for act in (
            records.head,
            lambda: put(records, "x"),
            lambda: Records.open(prefix),
            lambda: Records.peek(prefix),
        ):
            with pytest.raises(StoreClosedError, match="spawn"):
                act()

    with records.write() as tx:
        put(tx, "a")
        status = as_child(child)
        put(tx, "b")
    assert status == 0
    assert list(records.ids()) == ["a", "b"]
    assert records.check() == []


def test_a_fork_does_not_wait_for_ever_for_another_thread(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FORK_PATIENCE", 0.05)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with records.write() as tx:
            inside.set()
            leave.wait()
            put(tx, "a")

    def child() -> None:
        with pytest.raises(StoreClosedError, match="spawn"):
            records.head()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    status = as_child(child)
    leave.set()
    thread.join()
    assert status == 0
    put(records, "b")
    assert list(records.ids()) == ["a", "b"]


def test_threads_wait_while_another_forks(records: Records) -> None:
    put(records, "a")
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            assert records.get("a") == unit("a")

    def forks() -> None:
        try:
            for _ in range(5):
                assert as_child(lambda: records.get("a")) == 0
        finally:
            done.set()

    in_threads(read, read, forks)


def test_a_store_that_nobody_holds_is_forgotten(prefix: Path) -> None:
    before = len(forking._to_close)
    for number in range(3):
        Records.open(prefix.with_name(f"s{number}"), dim=DIM).close()
    import gc

    gc.collect()
    assert len(forking._to_close) <= before


def test_vectors_survive_byte_for_byte(records: Records) -> None:
    with records.write() as tx:
        tx.put(unit("a"), b"\x00\xff" * 8, "a")
    assert records.vectors_of(["a"]) == {"a": b"\x00\xff" * 8}
    assert records.scan(0, 9, 9)[0].vector == b"\x00\xff" * 8
    assert vector() != b"\x00\xff" * 8


def test_a_wait_for_another_process_ends_with_an_error_that_names_it(prefix: Path) -> None:
    ready, tell = os.pipe()
    with Records.open(prefix, dim=DIM) as records:
        put(records, "a")

    def hold() -> None:
        with Records.open(prefix) as held, held.write():
            os.write(tell, b"x")
            signal.pause()

    pid = fork(hold)
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"x", "the child failed"
        with Records.open(prefix, lock_timeout=0.2) as records:
            with pytest.raises(LockTimeoutError, match=rf"process {pid} has held the writer lock"):
                put(records, "b")
            assert list(records.ids()) == ["a"]
    finally:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        os.close(ready)
    with Records.open(prefix, lock_timeout=0.2) as records:
        put(records, "b")


def test_out_of_descriptors_says_so(records: Records) -> None:
    put(records, "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(TooManyFilesError, match="too many files open"):
            Records.open(records.path.with_suffix(""))

    assert as_child(act) == 0
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


def test_many_stores_in_a_process_need_the_files_that_the_error_says(tmp_path: Path) -> None:
    """Stores are opened until the descriptors are used up, at each file of a store once; all of them stay in use."""
    limit, each = 128, 7

    def act(others: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for _ in range(others):
            os.open(os.devnull, os.O_RDONLY)
        free = limit - len(list(Path("/dev/fd").iterdir()))
        kept: list[Records] = []

        def open_and_use() -> None:
            while len(kept) < limit:
                kept.append(Records.open(tmp_path / f"r{others}-{len(kept)}", dim=DIM))
                put(kept[-1], "a")
                assert kept[-1].get("a") is not None

        with pytest.raises(TooManyFilesError, match=f"too many files open: a store takes {each}, and 2 more"):
            open_and_use()
        assert free // each <= len(kept) <= free // (each - 2)

    for others in range(each):
        assert as_child(partial(act, others)) == 0


def test_a_file_size_limit_is_a_full_disk(records: Records) -> None:
    put(records, "a")

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        def fill() -> None:
            with records.write() as tx:
                for number in range(2000):
                    put(tx, f"b{number}", "word " * 100)

        with pytest.raises(StorageFullError, match="quota"):
            fill()
        assert list(records.ids()) == ["a"]

    assert as_child(act) == 0
