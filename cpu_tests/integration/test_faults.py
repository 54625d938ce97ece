"""Faults below SQLite and power cuts at every step of a small workload: what was acknowledged stays, and is found."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from endurance import DIM, Model, embed, verify
from fault_vfs import FAULTS, Cut, Disk, Event, FaultVFS, faulty_disk

from memevolve_gpu import StorageConfig, StorageError, VectorStore
from memevolve_gpu.errors import StorageFullError
from memevolve_gpu.index import snapshot_file
from memevolve_gpu.live import snapshot_writer

SEED = 20_240_607
LATE = "stored after the fault"


class Bench:
    """A store on a disk that may fail, and the plain dict that it is held against."""

    def __init__(self, folder: Path, durability: str = "full") -> None:
        self.folder = folder
        self.config = StorageConfig(
            index_type="hnsw", min_training_units=24, background=False, durability=durability, max_memory_units=1000
        )
        self.store: VectorStore | None = None
        self.copies: list[Path] = []

    def open(self, prefix: Path | None = None) -> VectorStore:
        return VectorStore(prefix or self.folder / "store", embed, DIM, storage_config=self.config)

    def reopen(self) -> None:
        store, self.store = self.store, None
        if store is not None:
            store.close()
        self.store = self.open()

    def back_up(self) -> None:
        copy = self.folder / f"copy{len(self.copies)}.db"
        self.it.backup(copy)
        self.copies.append(copy)

    def check_copies(self, model: Model) -> None:
        """The copies that were acknowledged are whole, and of the others nothing is left."""
        assert sorted(self.folder.glob("copy*")) == self.copies
        for copy in self.copies:
            with self.open(copy.with_suffix("")) as store:
                verify(store, [model])

    @property
    def it(self) -> VectorStore:
        assert self.store is not None
        return self.store


class Step(NamedTuple):
    """One operation and what it makes of the dict. syncs: whether everything before is safe after it in any case."""

    name: str
    do: Callable[[Bench], Any]
    after: Callable[[Model], Model] = dict
    syncs: bool = False


def unit(number: int, content: str = "", **more: Any) -> dict[str, Any]:
    return {"id": f"id{number}", "content": content or f"w{number % 5} fact {number}", "type": "skill", **more}


def put(*units: dict[str, Any]) -> Callable[[Model], Model]:
    return lambda model: model | {one["id"]: one for one in units}


def without(*ids: str) -> Callable[[Model], Model]:
    return lambda model: {unit_id: one for unit_id, one in model.items() if unit_id not in ids}


FIVE, THIRTY, FOUR = ([unit(i) for i in range(*ends)] for ends in ((1, 6), (6, 36), (50, 54)))
NEW_TEXT, NOTED = unit(0, "w4 another text"), unit(1, note="in place")
REPLACED, LATER = unit(2, "w3 replaced"), unit(7, "w2 after reopening")

STEPS = (
    Step("create", Bench.reopen),
    Step("store", lambda b: b.it.store(unit(0)), put(unit(0))),
    Step("store_batch", lambda b: b.it.store_batch(FIVE), put(*FIVE)),
    Step("update the text", lambda b: b.it.update("id0", NEW_TEXT), put(NEW_TEXT)),
    Step("update in place", lambda b: b.it.update("id1", NOTED), put(NOTED)),
    Step("delete", lambda b: b.it.delete("id3"), without("id3")),
    Step("store enough to train", lambda b: b.it.store_batch(THIRTY), put(*THIRTY)),
    Step("maintain", lambda b: b.it.run_maintenance()),
    Step("replace", lambda b: b.it.store(REPLACED), put(REPLACED)),
    Step("delete_batch", lambda b: b.it.delete_batch(["id8", "id9", "id10"]), without("id8", "id9", "id10")),
    Step("snapshot", lambda b: b.it.snapshot()),
    Step("back up", Bench.back_up),
    Step("checkpoint", lambda b: b.it._open.records.checkpoint(), syncs=True),
    Step("reopen", Bench.reopen, syncs=True),
    Step("update after reopening", lambda b: b.it.update("id7", LATER), put(LATER)),
    Step("clear", lambda b: b.it.clear(), lambda model: {}),
    Step("store again", lambda b: b.it.store(unit(40)), put(unit(40))),
    Step("store_batch again", lambda b: b.it.store_batch(FOUR), put(*FOUR)),
    Step("purge", lambda b: b.it.run_maintenance()),
    Step("close and open", Bench.reopen, syncs=True),
)


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: nothing here depends on what the real disk does."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder).resolve()


@pytest.fixture(autouse=True)
def _short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let maintenance purge the log of this small workload too."""
    monkeypatch.setattr(snapshot_writer, "LOG_KEPT", 8)


def crashed(bench: Bench) -> Iterator[Path]:
    """The files as a crash of the process would leave them now, under another prefix."""
    target = bench.folder.parent / "crashed"
    target.mkdir()
    for path in bench.folder.glob("store.*"):
        if not path.name.endswith("-shm"):
            shutil.copyfile(path, target / path.name)
    yield target / "store"
    shutil.rmtree(target)


def survives(bench: Bench, prefix: Path, candidates: list[Model]) -> Model:
    """What lies at ``prefix`` opens, is one of the candidates in every respect, and takes another unit."""
    with bench.open(prefix) as store:
        model = verify(store, candidates)
        assert store.store({"id": "late", "content": LATE}) == "late"
        assert store.search(LATE, 1)[0][1] == "late"
    return model


def attempt(bench: Bench, step: Step, disk: FaultVFS, kind: str, at: int) -> tuple[bool, bool]:
    """Do the step with a fault armed: (did it go through, did the fault strike)."""
    disk.arm(kind, at)
    try:
        step.do(bench)
        done = True
    except StorageFullError:
        done = False
    except StorageError:
        done = False
        assert kind != "full", "a full disk must be called full"
    assert done or disk.fired, f"{step.name} failed without a fault"
    return done, bool(disk.fired)


def endure_step(bench: Bench, step: Step, model: Model, disk: FaultVFS, kind: str, at: int) -> tuple[Model, bool]:
    """One step with its ``at``-th call failing, looked at as it is and after a crash, and then repeated."""
    done, struck = attempt(bench, step, disk, kind, at)
    candidates = [step.after(model)] if done else [model, step.after(model)]
    disk.lift()
    if not struck:
        return candidates[0], False
    print(f"{kind} {at} in {step.name}: {'' if done else 'not '}done")
    for prefix in crashed(bench):
        survives(bench, prefix, candidates)
    if bench.store is not None:
        model = verify(bench.store, candidates)
    step.do(bench)
    return step.after(model), True


def endure_faults(folder: Path, kind: str, at: int) -> int:
    """The workload with the ``at``-th call of every step failing; how many steps were hit."""
    (folder / "living").mkdir(parents=True)
    bench = Bench(folder / "living")
    model: Model = {}
    hits = 0
    with faulty_disk(bench.folder) as disk:
        for step in STEPS:
            disk.recording = kind == "lost"
            model, struck = endure_step(bench, step, model, disk, kind, at)
            disk.recording = False
            hits += struck
            if step.do is Bench.back_up:
                bench.check_copies(model)
        verify(bench.it, [model])
        if disk.trace:
            survives(bench, lay_out(at_the_end(disk.trace), None, folder / "cut"), [model])
        bench.it.close()
        with bench.open() as store:
            verify(store, [model])
    return hits


def at_the_end(trace: list[Event]) -> Cut:
    disk = Disk()
    for event in trace:
        disk.step(event)
    return disk.cut()


PARTS = {"write": 6, "full": 3, "read": 3, "size": 2}
"""Into how many tests the faults are divided that strike at many calls: a slow machine has minutes for each test."""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind in FAULTS for part in range(PARTS.get(kind, 1))])
def test_every_step_survives_a_fault_at_every_call(quick: Path, kind: str, part: int) -> None:
    hits: list[int] = []
    while not hits or hits[-1]:
        at = 1 + part + len(hits) * PARTS.get(kind, 1)
        hits.append(endure_faults(quick / str(at), kind, at))
    print(f"{kind}: {sum(hits)} faults in {len(hits)} runs")
    assert sum(hits)


def test_a_commit_whose_sync_failed_takes_nothing_with_it_that_was_acknowledged_later(quick: Path) -> None:
    """Its frames lie complete in the log and are shown, but are not on the disk. A reader is open, so closing leaves
    the log; the next opening must not take them for committed and go on behind them."""
    (quick / "living").mkdir()
    bench = Bench(quick / "living")
    with faulty_disk(bench.folder) as disk:
        disk.recording = True
        bench.reopen()
        bench.it.store(unit(0))
        assert bench.it.count() == 1
        disk.arm("lost", 1)
        with pytest.raises(StorageError):
            bench.it.store(unit(1))
        disk.lift()
        bench.reopen()
        verify(bench.it, [put(unit(0))({})])
        bench.it.store(unit(2))
        cut = at_the_end(disk.trace)
        disk.recording = False
        bench.it.close()
    survives(bench, lay_out(cut, None, quick / "cut"), [put(unit(0), unit(2))({})])


NO_ROOM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
from memevolve_gpu import VectorStore
from memevolve_gpu.errors import StorageFullError
try:
    VectorStore(sys.argv[1], None)
except StorageFullError as error:
    print("full:", error)
"""


def test_no_room_for_the_shared_memory_file_is_a_full_disk_too(quick: Path) -> None:
    """SQLite makes this file outside of the VFS's reach, so the limit is the operating system's."""
    bench = Bench(quick)
    bench.reopen()
    bench.it.store_batch(THIRTY)
    bench.it.close()
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(quick / "store")], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("full:"), done.stderr[-2000:]
    bench.reopen()
    verify(bench.it, [{one["id"]: one for one in THIRTY}])
    bench.it.close()


class Recording(NamedTuple):
    """What happened to the files, the dict after each step, and the snapshot file after each step."""

    trace: list[Event]
    models: list[Model]
    snapshots: list[bytes | None]


def record(folder: Path, durability: str) -> Recording:
    """Run the workload on a healthy disk."""
    (folder / "recorded").mkdir()
    bench = Bench(folder / "recorded", durability)
    saved = bench.folder / "store.snapshot"
    models: list[Model] = []
    snapshots: list[bytes | None] = []
    with faulty_disk(bench.folder) as disk:
        disk.recording = True
        for number, step in enumerate(STEPS):
            step.do(bench)
            disk.mark(number)
            models.append(step.after(models[-1] if models else {}))
            snapshots.append(saved.read_bytes() if saved.exists() else None)
        disk.recording = False
        verify(bench.it, [models[-1]])
        bench.it.close()
    return Recording(disk.trace, models, snapshots)


def candidates_after(models: list[Model], mark: int, durability: str) -> list[Model]:
    """What may be there when the power went after step ``mark``, in the midst of the next one."""
    if mark < 0:
        return [{}]
    oldest = mark
    if durability == "normal":
        oldest = max((n for n in range(mark + 1) if STEPS[n].syncs), default=0)
    return models[oldest : mark + 2]


def cuts(trace: list[Event], seed: int) -> Iterator[tuple[int, Cut]]:
    """Every different outcome of a power cut after each event: nothing unsynced is there, or a random part of it."""
    disk, last = Disk(), None
    for number, event in enumerate(trace):
        disk.step(event)
        bare = disk.cut()
        if bare != last:
            yield number, bare
            last = bare
        if event.what not in ("mark", "sync", "names"):
            yield number, disk.cut(random.Random(f"{seed}:{number}"))


def lay_out(cut: Cut, snapshot: bytes | None, target: Path) -> Path:
    target.mkdir()
    for name, data in cut.files.items():
        (target / name).write_bytes(data)
    if snapshot is not None:
        (target / "store.snapshot").write_bytes(snapshot)
    return target / "store"


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_a_power_cut_at_any_moment_loses_nothing_that_was_promised(quick: Path, durability: str) -> None:
    """full: every acknowledged unit; normal: consistent, and whole up to some moment after the last checkpoint."""
    print(f"seed {SEED}")
    recording = record(quick, durability)
    bench = Bench(quick / "unused", durability)
    lost = 0
    with faulty_disk(quick / "nothing is watched"):
        for number, (at, cut) in enumerate(cuts(recording.trace, SEED)):
            candidates = candidates_after(recording.models, cut.mark, durability)
            snapshots = recording.snapshots[max(0, cut.mark) : cut.mark + 2]
            prefix = lay_out(cut, snapshots[at % len(snapshots)], quick / f"cut{number}")
            model = survives(bench, prefix, candidates)
            lost += model != recording.models[max(0, cut.mark)] and model not in recording.models[cut.mark + 1 :]
            shutil.rmtree(prefix.parent)
    print(f"{durability}: {number + 1} cuts among {len(recording.trace)} events, {lost} lost acknowledged units")
    assert (lost > 0) == (durability == "normal"), "the simulated power cut does not do what it says"


class TestDerivedFiles:
    """Snapshots that cannot be written, or that speak of a future that did not happen, cost time and nothing else."""

    @pytest.fixture
    def bench(self, quick: Path) -> Iterator[Bench]:
        bench = Bench(quick)
        bench.store = bench.open()
        bench.it.store_batch(THIRTY)
        yield bench
        if bench.store is not None:
            bench.store.close()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
    def test_a_snapshot_that_cannot_be_written_loses_nothing(
        self, bench: Bench, number: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench.it.snapshot()
        before = (bench.folder / "store.snapshot").read_bytes()
        bench.it.store_batch([unit(i) for i in range(100, 220)])
        model = {one["id"]: one for one in (*THIRTY, *(unit(i) for i in range(100, 220)))}
        monkeypatch.setattr(snapshot_file, "_write", failing_half_way(number))
        report = bench.it.run_maintenance()
        assert any(action.startswith("built") for action in report["actions"])
        assert bench.it.statistics()["event_totals"]["snapshot-failed"] == 1
        verify(bench.it, [model])
        assert (bench.folder / "store.snapshot").read_bytes() == before
        assert not list(bench.folder.glob("*.tmp"))
        bench.reopen()
        verify(bench.it, [model])
        monkeypatch.undo()
        bench.it.run_maintenance()
        assert (bench.folder / "store.snapshot").read_bytes() != before

    def test_asking_for_a_snapshot_that_cannot_be_written_is_an_error(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(snapshot_file, "_write", failing_half_way(errno.ENOSPC))
        with pytest.raises(StorageFullError, match="snapshot"):
            bench.it.snapshot()
        assert bench.it.statistics()["event_totals"]["snapshot-failed"] == 1
        verify(bench.it, [{one["id"]: one for one in THIRTY}])

    def test_a_snapshot_newer_than_the_records_is_never_taken_up_later(self, bench: Bench) -> None:
        """The database goes back in time (a power cut under durability normal, a copy put back); its snapshot does not.

        Writing goes on until the log is as long as before: from then on the numbers alone would fit.
        """
        bench.it.store_batch([unit(i) for i in range(100, 400)])
        bench.it.close()
        earlier = (bench.folder / "store.db").read_bytes()
        bench.store = bench.open()
        bench.it.delete("id150")
        bench.it.snapshot()
        bench.it.close()
        (bench.folder / "store.db").write_bytes(earlier)
        bench.store = bench.open()
        bench.it.delete("id260")
        model = {one["id"]: one for one in (*THIRTY, *(unit(i) for i in range(100, 400))) if one["id"] != "id260"}
        verify(bench.it, [model])
        bench.reopen()
        verify(bench.it, [model])

    def test_check_finds_an_index_that_holds_the_right_number_of_wrong_units(self, bench: Bench) -> None:
        bench.it.run_maintenance()
        bench.it._open.live.view.index_died[3] = 0  # this row is hidden; no counter knows
        assert [(one.code, one.fixed) for one in bench.it.check()] == [("index-rows", False)]
        assert [(one.code, one.fixed) for one in bench.it.check(fix=True)] == [("index-rows", True)]
        verify(bench.it, [{one["id"]: one for one in THIRTY}])


def failing_half_way(number: int) -> Callable[..., None]:
    def write(file: Any, *_rest: object) -> None:
        file.write(b"half of it")
        raise OSError(number, os.strerror(number))

    return write
