"""Eight processes on one store, as people run them: hooks, servers and command lines write, one process maintains.

A *hook* opens the store for each operation and closes it again, as a hook of an agent does. A *server* keeps it open
and has background maintenance. A *command line* runs ``memevolve-store import`` and ``delete``. Meanwhile one process
maintains, one after the other is stopped by SIGSTOP and continued, a server stops itself while it holds the writer
lock, and some are killed. Each writes to ids of its own and says what was acknowledged, as in ``kills``.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from endurance import DIM, Operation, contents, embed, operations, perform, unit_of, verify

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.cli import app as command_line
from memevolve_gpu.cli.files import export_line
from memevolve_gpu.components.store.units import unit_to_text
from memevolve_gpu.errors import LockTimeoutError

from .kills import Writer, forked

__all__ = ["ROLES", "eight"]

ROLES = ("hook", "hook", "hook", "server", "server", "command line", "command line", "maintainer")
WEIGHTS: dict[str, dict[str, float]] = {
    "hook": {"store": 4, "update": 2, "delete": 1, "batch": 1},
    "server": {"store": 10, "batch": 2, "update": 5, "delete": 4, "delete_batch": 1, "hold": 0.3},
    "command line": {"batch": 2, "delete": 1},
    "maintainer": {"maintain": 3, "snapshot": 1, "checkpoint": 2, "store": 1},
}
STOPPED = 0.25
"""Seconds that a process stays stopped."""


def open_store(prefix: Path, role: str) -> VectorStore:
    config = StorageConfig(index_type="ivf", min_training_units=200, background=role == "server")
    return VectorStore(prefix, embed, DIM, storage_config=config)


def act_as(role: str, prefix: Path, said: Path, stream: list[Operation], stop: Path) -> None:
    """What a child does until ``stop`` exists: one operation after the other, each announced and acknowledged."""
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    kept = None if role in ("hook", "command line") else open_store(prefix, role)
    for operation in stream:
        if stop.exists():
            break
        os.write(handle, b"do\n")
        began = time.monotonic()
        if operation["kind"] == "hold":
            hold_and_stop(kept)
        elif role == "command line":
            run_command(prefix, operation)
        elif kept is None:
            with open_store(prefix, role) as store:
                perform(store, operation)
        else:
            perform(kept, operation)
        os.write(handle, f"did\ntook {time.monotonic() - began:.6f}\n".encode())
    while not stop.exists():  # it has done all that it was given
        time.sleep(0.01)
    if kept is not None:
        kept.close()


def hold_and_stop(store: VectorStore | None) -> None:
    """Stop inside of a write transaction; the parent sends SIGCONT."""
    assert store is not None
    with store._open.records.write():
        os.kill(os.getpid(), signal.SIGSTOP)


def run_command(prefix: Path, operation: Operation) -> None:
    """The operation by ``memevolve-store``, as a shell would run it."""
    if operation["kind"] == "delete":
        ran(["delete", operation["ids"][0], "--store", str(prefix)], {0, 3})
        return
    file = prefix.with_name(f"import-{os.getpid()}.jsonl")
    units = {one["id"]: one for one in (unit_of(operation, i) for i in range(len(operation["ids"])))}
    file.write_text("".join(export_line(unit, embed(unit_to_text(unit))) + "\n" for unit in units.values()))
    ran(["import", str(file), "--store", str(prefix)], {0})


def ran(arguments: list[str], codes: set[int]) -> None:
    """Run a command line and compare its exit code."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = 0
        try:
            command_line(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    if code not in codes:
        raise RuntimeError(f"memevolve-store {' '.join(arguments)} ended with {code}: {said.getvalue()[-1500:]}")


class _Crowd:
    """The eight, as their parent sees them."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(f"eight:{seed}")
        self.prefix, self.folder, self.stop = folder / "store", folder, folder / "stop"
        self.tally: Counter[str] = Counter()
        self.writers: list[Writer] = []
        self.asleep: dict[int, float] = {}
        """Process ids of the stopped ones, and when they are to go on."""
        for me, role in enumerate(ROLES):
            drawn = operations(f"{seed}:{me}", [f"p{me}-{number}" for number in range(80)], WEIGHTS[role])
            stream = [next(drawn) for _ in range(5000)]
            said = folder / f"said{me}"
            act = partial(act_as, role, self.prefix, said, stream, self.stop)
            self.writers.append(Writer(forked(act, said.with_suffix(".error")), said, stream, {}))
        self.alive = {writer.pid: role for writer, role in zip(self.writers, ROLES, strict=True)}

    def disturb(self, seconds: float, kills: int) -> None:
        """Stop, continue and kill them for so long."""
        end = time.monotonic() + seconds
        moments = sorted(time.monotonic() + self.rng.random() * seconds for _ in range(kills))
        while (now := time.monotonic()) < end:
            self.look_for_holders()
            self.wake([pid for pid, until in self.asleep.items() if until <= now])
            if moments and now >= moments[0]:
                moments.pop(0)
                self.kill(self.rng.choice(sorted(self.alive)))
            elif self.rng.random() < 0.1 and not self.asleep:
                pid = self.rng.choice(sorted(self.alive))
                os.kill(pid, signal.SIGSTOP)
                self.asleep[pid] = now + STOPPED
                self.tally["stopped"] += 1
            time.sleep(0.02)

    def look_for_holders(self) -> None:
        """Find the ones that stopped themselves while they hold the lock: a write by others must name them."""
        for pid in [pid for pid in self.alive if pid not in self.asleep]:
            ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if ended and os.WIFSTOPPED(status):
                self.tally["stopped while holding the lock"] += 1
                self.asleep[pid] = time.monotonic() + STOPPED
                with VectorStore(self.prefix, embed, DIM, storage_config={"lock_timeout": 0.05}) as store:
                    self.expect_named(store, pid)
            elif ended:
                raise RuntimeError(f"a {self.alive.pop(pid)} ended by itself, status {status}: {self.error_of(pid)}")

    def expect_named(self, store: VectorStore, pid: int) -> None:
        try:
            store.delete("nobody")
        except LockTimeoutError as error:
            if str(pid) not in str(error):
                raise RuntimeError(f"{error} does not name {pid}") from error
            self.tally["lock errors that name the holder"] += 1

    def error_of(self, pid: int) -> str:
        said = next(writer.said for writer in self.writers if writer.pid == pid)
        errors = said.with_suffix(".error")
        return errors.read_text() if errors.exists() else "without an error"

    def wake(self, pids: list[int]) -> None:
        for pid in pids:
            del self.asleep[pid]
            os.kill(pid, signal.SIGCONT)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.asleep.pop(pid, None)
        self.tally["kills"] += 1
        self.tally[f"killed: {self.alive.pop(pid)}"] += 1

    def end(self) -> None:
        """Let the living finish what they do; nobody may hang."""
        self.stop.touch()
        deadline = time.monotonic() + 60
        while self.alive and time.monotonic() < deadline:
            for pid in list(self.alive):
                os.kill(pid, signal.SIGCONT)
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del self.alive[pid]
            time.sleep(0.01)
        hanging = dict(self.alive)
        for pid in hanging:
            self.kill(pid)
        assert not hanging, f"these hang: {hanging}"

    def judge(self) -> dict[str, Any]:
        """Hold the store against what everybody was told; returns the figures."""
        for writer in self.writers:
            writer.learn()
        with open_store(self.prefix, "hook") as store:
            held = contents(store)
            everything = {i: unit for writer in self.writers for i, unit in writer.settled(held).items()}
            verify(store, [everything])
        waits = [float(line.split()[1]) for writer in self.writers for line in took(writer)]
        return {
            **self.tally,
            "operations": sum(writer.done for writer in self.writers),
            "units": len(everything),
            "seconds an operation took, p99": round(sorted(waits)[int(0.99 * len(waits))], 4),
            "seconds an operation took, most": round(max(waits), 4),
        }


def took(writer: Writer) -> list[str]:
    return [line for line in writer.said.read_text().splitlines() if line.startswith("took ")]


def eight(seconds: float, seed: int, folder: Path, kills: int = 3) -> dict[str, Any]:
    """Let them work and disturb them. Returns the figures; raises AssertionError when a promise is broken."""
    folder.mkdir(parents=True)
    crowd = _Crowd(seed, folder)
    try:
        crowd.disturb(seconds, kills)
    finally:
        crowd.end()
    return crowd.judge()
