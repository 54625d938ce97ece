"""The one handler for forks: what it does in parent and child, and in which order."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support import HANGS, as_child

import memevolve_gpu
from memevolve_gpu.utils import forking

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Recorder:
    """Notes in a file what is called on it."""

    def __init__(self, log: Path, closes: bool = True) -> None:
        self.log = log
        self.closes = closes

    def note(self, what: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{what} ")

    def before_fork(self) -> bool:
        self.note("before")
        return self.closes

    def after_fork(self) -> None:
        self.note("after")

    def disable_in_child(self) -> None:
        self.note("disabled")


def noted_in_child(log: Path) -> str:
    before = log.read_text() if log.exists() else ""

    def check() -> None:
        log.with_suffix(".child").write_text(log.read_text().removeprefix(before))

    assert as_child(check) == 0
    return log.with_suffix(".child").read_text().strip()


def test_what_closes_is_opened_again_on_both_sides(tmp_path: Path) -> None:
    one = Recorder(tmp_path / "log")
    forking.close_for_fork(one)
    noted_in_child(one.log)
    assert one.log.read_text().split() == ["before", "after", "after"]


def test_what_cannot_close_is_disabled_in_the_child_alone(tmp_path: Path) -> None:
    one = Recorder(tmp_path / "log", closes=False)
    forking.close_for_fork(one)
    noted_in_child(one.log)
    assert one.log.read_text().split() == ["before", "disabled"]


def test_what_is_renewed_hears_of_it_in_the_child_alone_and_not_after_its_end(tmp_path: Path) -> None:
    one = Recorder(tmp_path / "log")
    forking.renew_in_child(one)
    noted_in_child(one.log)
    assert one.log.read_text().split() == ["after"]
    log = one.log
    del one
    assert noted_in_child(log) == ""


def test_stores_are_open_again_before_anything_is_renewed(tmp_path: Path) -> None:
    log = tmp_path / "log"

    class Renewed(Recorder):
        def after_fork(self) -> None:
            self.note("renewed")

    first, second = Renewed(log), Recorder(log)
    forking.renew_in_child(first)
    forking.close_for_fork(second)
    parent = os.getpid()
    noted_in_child(log)
    assert os.getpid() == parent
    assert "after renewed" in log.read_text()


def test_there_is_no_other_handler_in_the_package() -> None:
    folder = Path(memevolve_gpu.__file__).parent
    found = [path for path in folder.rglob("*.py") if "register_at_fork(" in path.read_text(encoding="utf-8")]
    assert found == [folder / "utils" / "forking.py"]


def test_locks_are_taken_from_here() -> None:
    """One that is not would stay locked in a child, where a thread of the parent held it."""
    folder = Path(memevolve_gpu.__file__).parent
    own = re.compile(r"threading\.(R?Lock|Condition|Semaphore|BoundedSemaphore|Barrier)\(")
    found = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if own.search(path.read_text("utf-8"))
    }
    assert found == {
        "index/torch_gpu/index.py",  # of an index on a device, which a child does not use
        "index/torch_gpu/runtime.py",  # a condition, made anew in a child
        "records/file_lock.py",  # these three are taken before a fork, and given back in the child
        "records/pool.py",
        "records/writer.py",
        "utils/forking.py",
    }


@contextmanager
def another_thread(act: Callable[[threading.Event], object]) -> Iterator[None]:
    """``act`` runs in a thread; it sets the event when it is where a fork shall find it."""
    there, failed = threading.Event(), []

    def run() -> None:
        try:
            act(there)
        except BaseException as error:
            failed.append(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert there.wait(HANGS)
        yield
    finally:
        thread.join(HANGS)
    assert not thread.is_alive()
    assert not failed


def test_a_lock_that_another_thread_holds_is_free_in_the_child_alone() -> None:
    lock, leave = forking.lock(), threading.Event()

    def hold(there: threading.Event) -> None:
        with lock:
            there.set()
            leave.wait(HANGS)

    def act() -> None:
        assert lock.acquire(blocking=False)

    with another_thread(hold):
        assert as_child(act) == 0
        assert not lock.acquire(blocking=False)
        leave.set()


def test_a_lock_of_the_thread_that_forks_stays_its_own() -> None:
    lock, taken = forking.lock(), []

    def act() -> None:
        thread = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()
        assert taken == [False]
        lock.release()

    with lock:
        assert as_child(act) == 0


def test_a_fork_waits_for_what_must_not_be_interrupted_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, leave, done = forking.lock(awaited=True), threading.Event(), []

    def hold(there: threading.Event) -> None:
        with lock:
            there.set()
            leave.wait(HANGS)
            done.append(True)

    def seen(expected: list[bool]) -> None:
        with lock:
            assert done == expected

    with another_thread(hold):
        monkeypatch.setattr(forking, "PATIENCE", 0.01)
        assert as_child(lambda: seen([])) == 0
        monkeypatch.setattr(forking, "PATIENCE", HANGS)
        threading.Timer(0.2, leave.set).start()
        assert as_child(lambda: seen([True])) == 0
    assert lock.acquire(blocking=False), "the parent gave it back"


def test_a_record_that_another_thread_logs_does_not_hang_the_child() -> None:
    """The buffer of its file has a lock inside, which nobody gives back in a child."""
    ends, logger, go_on = os.pipe(), logging.getLogger("test_forking"), threading.Event()
    os.set_blocking(ends[1], False)
    with suppress(BlockingIOError):  # it is full
        while True:
            os.write(ends[1], b" ")
    os.set_blocking(ends[1], True)
    handler = logging.StreamHandler(os.fdopen(ends[1], "w"))
    logger.addHandler(handler)

    def log(there: threading.Event) -> None:
        there.set()
        logger.error("by another thread")

    def drain() -> None:
        go_on.wait(HANGS)
        while os.read(ends[0], 100_000):
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    with another_thread(log):
        time.sleep(0.05)  # until it writes
        threading.Timer(0.2, go_on.set).start()
        assert as_child(lambda: logger.error("by the child")) == 0
    logger.removeHandler(handler)
    handler.stream.close()
    reader.join(HANGS)
    os.close(ends[0])
    assert not reader.is_alive()


NEEDY = """
import logging, sys, time
from concurrent.futures import ThreadPoolExecutor
from memevolve_gpu import VectorStore
sys.there.set()
time.sleep(0.2)
logging.getLogger("needy").error("while it is imported")
with ThreadPoolExecutor(1) as pool:
    pool.submit(time.sleep, 0)
with VectorStore("m", None, 2):
    pass
done = True
"""
FORKS = """
import memevolve_gpu.utils.forking, os, signal, sys, threading
sys.there = threading.Event()
sys.path.insert(0, "")
threading.Thread(target=lambda: __import__("needy")).start()
sys.there.wait()
if child := os.fork():
    sys.exit(os.waitpid(child, 0)[1] != 0)
signal.alarm(int(sys.argv[1]))
import needy
os._exit(not needy.done)
"""


def test_a_fork_holds_nothing_that_an_import_of_another_thread_needs(tmp_path: Path) -> None:
    """Loggers, the lock that thread pools take before a fork, and stores."""
    (tmp_path / "needy.py").write_text(NEEDY)
    command = [sys.executable, "-c", FORKS, str(HANGS)]
    ended = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


SLOW = """
import os, sys
there, go_on, ran = sys.slowly_imported
there.set()
go_on.wait(100)
os.register_at_fork(
    before=lambda: ran.append("before"),
    after_in_parent=lambda: ran.append("after"),
    after_in_child=lambda: ran.append("after"),
)
"""


def test_a_module_that_another_thread_imports_is_there_in_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child would wait for ever for the import. What the module registers for forks begins with the next one."""
    (tmp_path / "slowly_imported.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    ran: list[str] = []
    go_on = threading.Event()

    def load(there: threading.Event) -> None:
        monkeypatch.setattr(sys, "slowly_imported", (there, go_on, ran), raising=False)
        importlib.import_module("slowly_imported")

    def act() -> None:
        assert importlib.import_module("slowly_imported").ran == []
        assert ran == []

    with another_thread(load):
        threading.Timer(0.2, go_on.set).start()
        assert as_child(act) == 0
    assert ran == []
    assert as_child(lambda: None) == 0
    assert ran == ["before", "after"]
    assert os.register_at_fork.__module__ == "posix"


ENDLESS = """
import itertools, sys
there, stop = sys.endless_import
there.set()
for number in itertools.count():
    if stop.wait(0.0005):
        break
    sys.modules[f"endless_import_{number}"] = sys
for one in range(number):
    del sys.modules[f"endless_import_{one}"]
"""


def test_a_fork_does_not_wait_for_ever_for_imports_that_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless_import.py").write_text(ENDLESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(forking, "PATIENCE", 0.02)
    stop = threading.Event()
    timer = threading.Timer(HANGS / 5, stop.set)

    def load(there: threading.Event) -> None:
        monkeypatch.setattr(sys, "endless_import", (there, stop), raising=False)
        importlib.import_module("endless_import")

    with another_thread(load):
        timer.start()
        assert as_child(lambda: None) == 0
        was_first = not stop.is_set()
        timer.cancel()
        stop.set()
    assert was_first


NESTED = """
import os, signal, sys
from memevolve_gpu.utils import forking

def fork():
    if not (child := os.fork()):
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

class Forks:
    def before_fork(self):
        forking._to_close.discard(self)
        fork()
        os.register_at_fork(before=lambda: ran.append("before"), after_in_parent=lambda: ran.append("after"))
        return False

    def disable_in_child(self):
        pass

signal.alarm(int(sys.argv[1]))
ran = []
forks = Forks()
forking.close_for_fork(forks)
fork()
assert ran == []
fork()
assert ran == ["before", "after"]
assert os.register_at_fork.__module__ == "posix"
"""


def test_what_is_registered_waits_for_the_end_of_every_fork() -> None:
    """Of two forks at once the first to end leaves the other in the midst. Alone: handlers of others may lock twice."""
    command = [sys.executable, "-c", NESTED, str(HANGS)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_one_that_fails_keeps_none_of_the_others_from_its_turn(tmp_path: Path) -> None:
    failing = [True]

    class Failing(Recorder):
        def after_fork(self) -> None:
            if failing:
                raise RuntimeError("cannot be renewed")

    log = tmp_path / "log"
    held = [Failing(log), Recorder(log), Failing(log), Recorder(log)]
    for one in held:
        forking.renew_in_child(one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda _told: None)
        assert noted_in_child(log).split() == ["after", "after"]
    failing.clear()  # a traceback may keep them until later tests fork


def test_one_that_cannot_close_or_open_keeps_none_of_the_others_from_its_turn(tmp_path: Path) -> None:
    parent, failing = os.getpid(), [True]

    class Either(Recorder):
        def note(self, what: str) -> None:
            super().note(what if os.getpid() == parent else f"{what}-in-child")

    class Failing(Either):
        def before_fork(self) -> bool:
            super().before_fork()
            if failing:
                raise KeyboardInterrupt  # as a signal handler does that runs here
            return True

    class FailingLater(Either):
        def after_fork(self) -> None:
            super().after_fork()
            if failing:
                raise RuntimeError("cannot be opened again")

    log = tmp_path / "log"
    held = [Either(log), Failing(log), FailingLater(log), Either(log), Failing(log)]
    for one in held:
        forking.close_for_fork(one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda _told: None)
        for turn in (1, 2):  # nothing is left of the first fork
            assert as_child(lambda: None) == 0
            counts = Counter(log.read_text().split())
            assert counts == {
                "before": 5 * turn,
                "after": 3 * turn,
                "after-in-child": 3 * turn,
                "disabled-in-child": 2 * turn,
            }
    failing.clear()  # a traceback may keep them until later tests fork
    free: list[bool] = []

    def enter() -> None:
        with forking.no_fork():
            free.append(True)

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    thread.join(5)
    assert free == [True], "no other thread can open a store or fork"


def test_garbage_of_the_parent_is_renewed_before_it_is_collected(tmp_path: Path) -> None:
    """A model that nobody holds any more waits, when it is freed, for threads that the child lacks."""

    class Model(Recorder):
        def __init__(self, log: Path) -> None:
            super().__init__(log)
            self.itself = self
            forking.renew_in_child(self)

        def __del__(self) -> None:
            if os.getpid() != parent:  # which frees it, too, at a time of its own
                self.note("freed")

    class Drops(Recorder):
        def before_fork(self) -> bool:
            held.clear()
            gc.set_threshold(1, 1, 1)
            return True

        def after_fork(self) -> None:
            pass

    parent, log, thresholds = os.getpid(), tmp_path / "log", gc.get_threshold()
    held, drops = [Model(log)], Drops(log)
    forking.close_for_fork(drops)
    gc.enable()
    try:
        assert noted_in_child(log).split()[0] == "after"
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)


def test_what_is_never_freed_stays_when_nobody_holds_it() -> None:
    class One:
        pass

    freed: list[str] = []
    for keep, expected in ((True, []), (False, ["freed"])):
        one = One()
        weakref.finalize(one, freed.append, "freed").atexit = False
        if keep:
            forking.never_free(one)
        del one
        gc.collect()
        assert freed == expected


def test_a_child_of_a_process_with_closed_stores_renews_all(tmp_path: Path) -> None:
    failed: list[object] = []
    closed = memevolve_gpu.VectorStore(tmp_path / "closed", memevolve_gpu.HashingEmbedder(8))
    closed.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", failed.append)

        def check() -> None:
            assert failed == []

        assert as_child(check) == 0
    del closed
