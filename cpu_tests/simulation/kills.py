"""Real processes, forked from one that has imported everything, that are killed with SIGKILL at random moments.

A child says "do" before and "did" after each operation, in a file, so that the parent knows what was acknowledged; the
one operation in flight may have happened or not. In a round one to four children write at once, each to ids of its own,
or one child whose four threads do, so that they share commits. The parent kills them one by one, sometimes stops one
for a while first, hurts the snapshot, opens the store and holds it against the dicts. The seed decides what everybody
does; the moment of a kill is the system's.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from endurance import DIM, MIXED, Model, Operation, contents, damage, embed, model_after, operations, perform, verify

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.index import vector_table

__all__ = ["STYLES", "Chain", "forked", "kill_migrations"]

IDS = 60
SPILLED = (vector_table.SPILLED_BYTES, 1)
"""Bytes from which vectors lie in files without names: so few that these small stores have none, or that all do."""
ROUNDS = 40
"""Rounds on one store, before the next one with other settings begins."""

STYLES: dict[str, dict[str, float]] = {
    "everything": MIXED,
    "opening": {"reopen": 1},
    "commits": {"store": 3, "batch": 2, "update": 2, "delete": 1},
    "checkpoints": {"store": 2, "batch": 1, "checkpoint": 3},
    "snapshots": {"batch": 2, "delete_batch": 1, "snapshot": 3, "maintain": 1},
    "threads": {"store": 4, "update": 2, "delete": 1},
}
LONGEST = {"opening": 0.03, "commits": 0.04}
"""Seconds that a child lives at most; others 0.06."""


def forked(act: Callable[[], object], errors: Path) -> int:
    """Run ``act`` in a child and return its process id; what it raises is written to ``errors``."""
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - shown by the parent
        errors.write_text(traceback.format_exc())
        os._exit(1)


@dataclass
class Writer:
    """One child as its parent knows it. ``model``: what it has stored for certain; ``said``: what it says."""

    pid: int
    said: Path
    stream: list[Operation]
    model: Model
    pending: Operation | None = None
    done: int = 0

    def learn(self) -> None:
        """Read what was acknowledged before it died. Raises RuntimeError when it did not die by the signal."""
        errors = self.said.with_suffix(".error")
        if errors.exists():
            raise RuntimeError(f"a process ended by itself: {errors.read_text()}")
        lines = self.said.read_text().splitlines() if self.said.exists() else []
        self.done = sum(line == "did" for line in lines)
        for operation in self.stream[: self.done]:
            self.model = model_after(self.model, operation)
        self.pending = self.stream[self.done] if lines and lines[-1] == "do" else None

    def settled(self, held: Model) -> Model:
        """Its dict with the operation in flight, if the store has it."""
        after = self.model if self.pending is None else model_after(self.model, self.pending)
        return after if {one: held[one] for one in held if one in after or one in self.model} == after else self.model


Task = tuple[Path, list[Operation]]
"""Where a writer says what it does, and what it does."""


def write_until_killed(open_store: Callable[[], VectorStore], tasks: list[Task], parent: int) -> NoReturn:
    """What a child does: one task by itself, several in threads that share a store."""
    if len(tasks) == 1:
        write(open_store(), tasks[0], parent, open_store)
    else:
        store = open_store()
        with ThreadPoolExecutor(len(tasks)) as pool:
            for ended in as_completed([pool.submit(write, store, task, parent) for task in tasks]):
                ended.result()
    signal.pause()
    raise AssertionError("only a kill ends this process")


def write(store: VectorStore, task: Task, parent: int, open_store: Callable[[], VectorStore] | None = None) -> None:
    said, stream = task
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for operation in stream:
        os.write(handle, b"do\n")
        if operation["kind"] == "reopen" and open_store is not None:
            store.close()
            store = open_store()
        perform(store, operation)
        os.write(handle, b"did\n")
        if os.getppid() != parent:
            os._exit(0)


class Chain:
    """Rounds of kills on one store after the other, below ``folder``."""

    def __init__(self, seed: int, folder: Path, tally: Counter[str]) -> None:
        self.seed, self.folder, self.tally = seed, folder, tally
        self.rng = random.Random(f"kills:{seed}")
        self.rounds = 0
        self.models: dict[int, Model] = {}
        self.config = StorageConfig()
        self.prefix = folder
        self.backup: Model | None = None
        self.what = ""

    def round(self) -> None:
        """One round. Raises AssertionError or an error of the store when a promise is broken."""
        if self.rounds % ROUNDS == 0:
            self.begin_anew()
        self.rounds += 1
        if self.backup is not None and self.rng.random() < 0.15:
            self.what = "restore"
            self.kill_restore()
        else:
            self.kill_writers()
        if self.rng.random() < 0.1:
            self.back_up()

    def begin_anew(self) -> None:
        """An empty store, with settings drawn for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.prefix = self.folder / "store"
        self.models, self.backup = {}, None
        vector_table.SPILLED_BYTES = self.rng.choice(SPILLED)
        self.config = StorageConfig(
            index_type=self.rng.choice(["flat", "ivf", "hnsw", "auto"]),
            durability=self.rng.choice(["full", "full", "normal"]),
            background=self.rng.random() < 0.3,
            min_training_units=64,
        )

    def open(self) -> VectorStore:
        return VectorStore(self.prefix, embed, DIM, storage_config=self.config)

    def kill_writers(self) -> None:
        style = self.what = self.rng.choice(list(STYLES))
        if style == "threads":
            writers = self.start(range(4), STYLES[style])
        else:
            writers = [one for me in range(self.rng.choice([1, 1, 2, 3, 4])) for one in self.start([me], STYLES[style])]
        pids = list(dict.fromkeys(writer.pid for writer in writers))
        self.rng.shuffle(pids)
        lives = sorted(self.rng.random() * LONGEST.get(style, 0.06) for _ in pids)
        began = time.monotonic()
        for pid, life in zip(pids, lives, strict=True):
            if self.rng.random() < 0.1:
                os.kill(pid, signal.SIGSTOP)
                self.tally["stopped"] += 1
            time.sleep(max(0.0, began + life - time.monotonic()))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self.tally["kills"] += 1
            self.tally[f"kills, {style}"] += 1
        for writer in writers:
            writer.learn()
            self.tally["operations"] += writer.done
            self.tally["in flight"] += writer.pending is not None
        if self.rng.random() < 0.3:
            self.tally[f"snapshot: {damage(str(self.prefix), self.rng)}"] += 1
        self.look(writers)

    def start(self, writers: Iterable[int], weights: dict[str, float]) -> list[Writer]:
        """One child that does what these writers do."""
        alone = {kind: weight for kind, weight in weights.items() if kind != "clear"}
        tasks: dict[int, Task] = {}
        for me in writers:
            said = self.folder / f"said{me}"
            said.unlink(missing_ok=True)
            drawn = operations(f"{self.seed}:{self.rounds}:{me}", [f"p{me}-{number}" for number in range(IDS)], alone)
            tasks[me] = said, [next(drawn) for _ in range(100)]
        parent, errors = os.getpid(), next(iter(tasks.values()))[0].with_suffix(".error")
        pid = forked(lambda: write_until_killed(self.open, list(tasks.values()), parent), errors)
        return [Writer(pid, said, stream, self.models.get(me, {})) for me, (said, stream) in tasks.items()]

    def look(self, writers: list[Writer]) -> None:
        """Open the store and hold it against the dicts of all."""
        with self.open() as store:
            held = contents(store)
            for writer in writers:
                self.models[int(writer.said.name.removeprefix("said"))] = writer.settled(held)
            verify(store, [self.everything])
            self.refuse_leftovers()

    @property
    def everything(self) -> Model:
        return {unit_id: unit for model in self.models.values() for unit_id, unit in model.items()}

    def refuse_leftovers(self) -> None:
        mine = f".{os.getpid()}."  # the background of this process may be saving
        left = [path.name for path in self.folder.glob("store.*.tmp*") if mine not in path.name]
        assert not left, f"abandoned drafts were left: {left}"

    def back_up(self) -> None:
        (self.folder / "copy.db").unlink(missing_ok=True)
        with self.open() as store:
            store.backup(self.folder / "copy")
        self.backup = self.everything

    def kill_restore(self) -> None:
        """A restore is killed: the store is the old one or the backup."""
        assert self.backup is not None
        before, told = self.everything, self.folder / "restored"
        told.unlink(missing_ok=True)

        def restore() -> None:
            VectorStore.restore(self.folder / "copy", self.prefix)
            told.touch()
            signal.pause()

        errors = self.folder / "restore.error"
        pid = forked(restore, errors)
        time.sleep(self.rng.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not errors.exists(), errors.read_text()
        self.tally["kills"] += 1
        self.tally["kills, restore"] += 1
        self.tally["restored"] += told.exists()
        with self.open() as store:
            now = verify(store, [self.backup] if told.exists() else [before, self.backup])
            self.refuse_leftovers()
        self.models = {me: {i: u for i, u in now.items() if i.startswith(f"p{me}-")} for me in range(4)}
        for old in self.folder.glob("store.replaced-*"):
            old.unlink()


def kill_migrations(count: int, seed: int, folder: Path, tally: Counter[str]) -> None:
    """Processes are killed while they open a store of the first schema, which is migrated then."""
    golden = Path(__file__).resolve().parents[1] / "golden" / "schema-1-snapshot-1.zip"
    rng, prefix = random.Random(f"migrations:{seed}"), folder / "ivf"

    def migrate() -> None:
        VectorStore(prefix, None)
        signal.pause()

    expected: list[tuple[dict[str, Any], Any]] = []
    for number in range(count + 1):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with zipfile.ZipFile(golden) as archive:
            archive.extractall(folder, ["ivf.db", "ivf.snapshot"])
        if number:
            pid = forked(migrate, folder / "migration.error")
            time.sleep(rng.random() * 0.025)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            assert not (folder / "migration.error").exists(), (folder / "migration.error").read_text()
            tally["kills"] += 1
            tally["kills, migration"] += 1
        with VectorStore(prefix, None) as store:
            rows = list(store.export_rows())
            expected = expected or rows
            assert not store.check()
            assert [unit for unit, _ in rows] == [unit for unit, _ in expected], "lost or changed by a migration"
            assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(rows, expected, strict=True)), "wrong mapping"
