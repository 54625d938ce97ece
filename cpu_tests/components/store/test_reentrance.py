"""A call inside a call of the same thread: signal handlers, finalizers and callbacks that use the store.

The inner call answers from a consistent, up-to-date view or raises ReentrantCallError; the outer one goes on as if
nothing had been. Each test runs in a child with an alarm, so that a deadlock is a failure.
"""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support import SEED, FakeEmbedder, as_child

import memevolve_gpu
from memevolve_gpu import MemorySystem, StorageConfig, VectorStore
from memevolve_gpu.errors import ReentrantCallError
from memevolve_gpu.live.view_builder import ViewBuilder
from memevolve_gpu.memory_system import MemorySystemConfig

DIM = 8
PACKAGE = str(Path(memevolve_gpu.__file__).parent)
FILTER = {"type": "skill"}


def unit(unit_id: str) -> dict[str, Any]:
    return {"id": unit_id, "content": f"word{len(unit_id)} {unit_id}", "type": "skill"}


class Scene:
    """A store, the ids that it must hold, and what an interruption does with both."""

    def __init__(self, folder: Path, *, background: bool = False) -> None:
        config = StorageConfig(
            background=background, min_training_units=24, index_type="hnsw", max_memory_units=100_000
        )
        self.embedder = FakeEmbedder(DIM)
        self.store = VectorStore(folder / "store", self.embedder, DIM, storage_config=config)
        self.held = {f"first{n}" for n in range(40)}
        self.store.store_batch([unit(name) for name in sorted(self.held)])
        self.store.search("word6", 3, FILTER)
        self.unsure: set[str] = set()
        """Ids that the call in progress stores or deletes."""
        self.calls = self.refused = 0
        self._inside = False
        self._mine: list[str] = []

    def interrupt(self) -> None:
        """What a handler does: store, delete, search with a filter and without, and look at the health."""
        if self._inside:
            return
        self._inside = True
        try:
            self.calls += 1
            self._write()
            self.look()
            if self.calls % 7 == 0:
                assert self.store.get_storage_health()["index_lag"] == 0
        finally:
            self._inside = False

    def _write(self) -> None:
        name = f"inner{self.calls}"
        try:
            self.store.store(unit(name))
            self.held.add(name)
            self._mine.append(name)
            if len(self._mine) > 8:
                gone = self._mine.pop(0)
                assert self.store.delete(gone)
                self.held.discard(gone)
        except ReentrantCallError:
            self.refused += 1

    def look(self) -> None:
        """Every unit is found once, and none that is gone; nothing is said of what the outer call is about."""
        for filters in (None, FILTER):
            before = set(self.held)
            found = [unit_id for _, unit_id in self.store.search("word6", 10_000, filters, recall=1.0)]
            after = set(self.held)
            unsure = self.unsure | (before ^ after)  # what an interruption of this very search changed
            assert len(found) == len(set(found)), "a unit is found twice"
            assert set(found) - unsure == after - unsure

    def outer(self, number: int) -> None:
        """One turn of ordinary work."""
        name = f"outer{number}"
        self.unsure = {name}
        self.store.store(unit(name))
        self.held.add(name)
        self.unsure = set()
        self.look()
        self.unsure = {name}
        assert self.store.update(name, {**unit(name), "note": number})
        self.store.retrieve(name)
        assert self.store.delete(name)
        self.held.discard(name)
        self.unsure = set()
        self.look()

    def end(self) -> None:
        self.look()
        assert [finding.code for finding in self.store.check()] == []
        self.store.close()


class AtLine:
    """Calls ``act`` once, when this thread is about to run the ``at``-th line of the package, or of one module."""

    def __init__(self, act: Callable[[], None], at: int, module: str = "") -> None:
        self._act = act
        self._left = at
        self._start = f"{PACKAGE}/{module}"
        self.fired = False

    def __enter__(self) -> AtLine:
        self._before = sys.gettrace()  # that of a tool that measures coverage
        sys.settrace(self._entered)
        return self

    def __exit__(self, *_exc: object) -> None:
        sys.settrace(self._before)

    def _entered(self, frame: FrameType, _event: str, _argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self._start) else None

    def _line(self, _frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line" and not self.fired:
            self._left -= 1
            if self._left <= 0:
                self.fired = True
                sys.settrace(self._before)  # the rest of the turn need not be watched
                self._act()
        return self._line


def in_child(act: Callable[[], None]) -> None:
    assert as_child(act) == 0


@pytest.mark.slow
def test_an_interruption_at_any_line_of_a_call_is_harmless(tmp_path: Path) -> None:
    """Every tenth of the lines that a turn of work runs, drawn, as a handler could strike there."""

    def act() -> None:
        scene, at, quiet = Scene(tmp_path), 0, 0
        random_step = random.Random(SEED)
        while quiet < 2:
            at += random_step.randrange(1, 20)
            with AtLine(scene.interrupt, at) as trap:
                scene.outer(at)
            quiet += not trap.fired
        assert scene.calls > 150
        assert scene.refused < scene.calls
        scene.end()

    in_child(act)


def test_an_interruption_while_the_log_is_applied_sees_everything(tmp_path: Path) -> None:
    """The narrowest place of all: half a page of changes is in the delta buffer already."""

    def act() -> None:
        scene = Scene(tmp_path)
        other = VectorStore(tmp_path / "store", FakeEmbedder(DIM), storage_config=scene.store.config)
        put, drop, left = ViewBuilder._put, ViewBuilder._drop, [0]

        def interrupt() -> None:
            if left[0] > 0:  # each writes two entries more: without a bound there would be no end
                left[0] -= 1
                scene.interrupt()

        def interrupted_put(builder: ViewBuilder, changes: Any) -> None:
            put(builder, changes)
            interrupt()

        def interrupted_drop(builder: ViewBuilder, slot: int, seq: int) -> None:
            drop(builder, slot, seq)
            interrupt()

        patched: Any = ViewBuilder
        patched._put, patched._drop = interrupted_put, interrupted_drop
        for number in range(30):
            names = [f"other{number}-{one}" for one in range(5)]
            scene._inside = True  # the other store's own catching up is not what is interrupted here
            other.store_batch([unit(name) for name in names])
            gone = sorted(scene.held)[::7]
            other.delete_batch(gone)
            scene._inside = False
            left[0] = 4
            scene.held = (scene.held | set(names)) - set(gone)
            scene._mine = [name for name in scene._mine if name in scene.held]
            scene.look()
        assert scene.calls >= 30
        assert scene.refused == 0
        other.close()
        scene.end()

    in_child(act)


MODULES = ("live/delta_buffer", "live/view_builder", "live/filter_cache", "records/records", "records/pool")


@pytest.mark.parametrize("module", MODULES)
def test_a_search_that_ctrl_c_ends_at_any_line_leaves_the_index_as_the_records(tmp_path: Path, module: str) -> None:
    """Half of the new rows may be in the delta buffer then. The next search sees each unit once, under its own id."""

    def stop() -> None:
        raise KeyboardInterrupt

    def act() -> None:
        scene = Scene(tmp_path)
        with VectorStore(tmp_path / "store", FakeEmbedder(DIM), storage_config=scene.store.config) as other:
            at, fired = 0, True
            while fired:
                at += 1
                names = [f"other{at}-{one}" for one in range(4)]
                other.store_batch([unit(name) for name in names])
                scene.held |= set(names)
                trap = AtLine(stop, at, f"{module}.py")
                with contextlib.suppress(KeyboardInterrupt), trap:
                    scene.store.search("word6", 3, FILTER, record=False)
                fired = trap.fired
                names += [f"later{at}-{one}" for one in range(4)]
                other.store_batch([unit(name) for name in names[4:]])
                scene.held |= set(names)
                own = scene.store.vectors_of(names)
                found = scene.store.search_vectors(np.stack([own[name] for name in names]), 1)[1]
                assert found == [[name] for name in names], "a vector has the id of another unit"
                scene.look()
            assert at > 10
        scene.end()

    in_child(act)


@pytest.mark.parametrize("background", [False, True])
def test_a_signal_handler_that_uses_the_store(tmp_path: Path, background: bool) -> None:
    def act() -> None:
        scene = Scene(tmp_path, background=background)
        signal.signal(signal.SIGVTALRM, lambda *_: scene.interrupt())
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0007, 0.0007)
        for number in range(20_000):
            scene.outer(number)
            if scene.calls >= 100:
                break
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        assert scene.calls >= 100
        scene.end()

    in_child(act)


class Cycle:
    """Garbage that only the collector finds, and that uses the store when it does."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.itself = self
        self.act = act

    def __del__(self) -> None:
        self.act()


def test_a_finalizer_that_uses_the_store(tmp_path: Path) -> None:
    def act() -> None:
        scene = Scene(tmp_path)
        failures: list[object] = []
        sys.unraisablehook = failures.append
        gc.collect()
        gc.set_threshold(37, 3, 3)
        for number in range(20_000):
            Cycle(scene.interrupt)
            scene.outer(number)
            if scene.calls >= 150:
                break
        gc.set_threshold(0)
        assert scene.calls >= 150
        assert failures == []
        scene.end()

    in_child(act)


def test_an_embedding_function_that_uses_the_store(tmp_path: Path) -> None:
    def act() -> None:
        scene = Scene(tmp_path)
        embed = scene.embedder.vector

        def embedding(text: str) -> Any:
            scene.interrupt()
            return embed(text)

        scene.store._open.embedder.embedder._function = embedding  # type: ignore[union-attr]
        for number in range(30):
            scene.outer(number)
            scene.unsure = {f"batch{number}"}
            scene.store.store_batch([unit(f"batch{number}")])
            scene.held.add(f"batch{number}")
        assert scene.calls >= 60
        assert scene.refused == 0, "nothing is locked while a text is embedded"
        scene.end()

    in_child(act)


def test_progress_that_uses_the_store_and_asks_for_more_maintenance(tmp_path: Path) -> None:
    def act() -> None:
        scene = Scene(tmp_path)
        actions: list[str] = []

        def told(_stage: str, _share: float) -> None:
            scene.interrupt()
            actions.extend(scene.store.run_maintenance()["actions"])
            with pytest.raises(ReentrantCallError):
                scene.store.snapshot()

        scene.store.store_batch([unit(f"more{n}") for n in range(60)], progress=lambda *_: scene.interrupt())
        scene.held |= {f"more{n}" for n in range(60)}
        scene.store.retrain(told)
        assert actions
        assert set(actions) == {"skipped: another round is running"}
        scene.end()

    in_child(act)


def test_a_memory_system_whose_callback_adds_units(tmp_path: Path) -> None:
    """Room is made inside a call, and the handler that runs there adds units itself."""

    def act() -> None:
        config = StorageConfig(background=False, max_memory_units=50)
        embedder = FakeEmbedder(DIM)
        store = VectorStore(tmp_path / "store", embedder, DIM, storage_config=config)
        system = MemorySystem(MemorySystemConfig(storage_backend=store))
        delete_batch = VectorStore.delete_batch
        added: list[str] = []

        def interrupted(backend: VectorStore, *arguments: Any, **options: Any) -> int:
            gone = delete_batch(backend, *arguments, **options)
            added.extend(system.add_units([{"content": f"from inside {len(added)}"}]))
            return gone

        patched: Any = VectorStore
        patched.delete_batch = interrupted
        for number in range(120):
            system.add_units([{"content": f"unit {number}"}])
        assert added
        assert store.count() <= 50
        store.close()

    in_child(act)


def test_a_write_inside_a_write_is_refused_by_name(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    with scene.store._open.records.write(), pytest.raises(ReentrantCallError, match="later"):
        scene.store.store(unit("inside"))
    assert np.isfinite(scene.store.search("word6", 3)[0][0])
    scene.end()
