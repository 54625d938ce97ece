"""A world in which everything follows from one seed: the disk, the clock, and what the system gives as random.

``SimulatedDisk`` is the fault VFS with three more things: it also sees what the package does to files without SQLite
(drafts, renames, links, removals, ``fsync``), it counts every change and strikes at the one that it was told, and it
hashes all of them, so that two runs can be compared.

A strike is a kill or a power cut. From then on nothing of its victims reaches the disk: the change and all later ones
fail. After a kill the files are as they are; after a power cut they are what a disk would have kept at that moment.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from unittest.mock import patch

import apsw
from fault_vfs import Disk, Event, FaultVFS

from memevolve_gpu.live.scheduler import MaintenanceScheduler
from memevolve_gpu.utils.backoff import Backoff

__all__ = ["Clock", "SimulatedDisk", "world"]

_REAL_CLOCK = time.monotonic
EVERYONE = -1
_DRAFT = re.compile(r"\.[0-9]+\.[0-9a-f]{8}\.tmp")


class SimulatedDisk(FaultVFS):
    """See the module. ``folder`` may change after a power cut, see :meth:`lay_out`."""

    def __init__(self, name: str, folder: Path, rng: random.Random) -> None:
        self.rng = rng
        self.disk = Disk()
        self.digest = hashlib.blake2b(digest_size=16)
        self.at_sync: Callable[[], None] | None = None
        """Called in the midst of a commit, before the log is synced."""
        self.struck = ""
        self.image: dict[str, bytes] = {}
        self._strike, self._changes_left = "", 0
        self._dead: set[int] = set()
        self._through_sqlite: set[str] = set()
        super().__init__(name, folder)

    # What strikes

    def strike(self, how: str, after: int) -> None:
        """Kill the current actor, or cut the power, at the ``after``-th change from now (from 1)."""
        self._strike, self._changes_left, self.struck = how, after, ""

    def spare(self) -> None:
        """No strike is due any more; a fault that was armed is lifted."""
        self._strike = ""
        self.lift()

    @property
    def is_armed(self) -> bool:
        """Is a fault or a strike due?"""
        return bool(self._strike or self._kind)

    def cut_now(self) -> None:
        """The power goes."""
        self._take_image()
        self.kill_all()

    def kill_all(self) -> None:
        """Everybody dies where they are."""
        self._dead.add(EVERYONE)

    def bury(self) -> None:
        """The dead have released what they held; their numbers may be used again."""
        self._dead.clear()

    def gate(self, what: str, owner: int) -> None:
        """Before every change."""
        self._refuse_the_dead(owner)
        if what == "sync" and self.at_sync is not None:
            look, self.at_sync = self.at_sync, None
            look()
        if self._strike:
            self._changes_left -= 1
            if self._changes_left == 0:
                self.struck, self._strike = self._strike, ""
                self._dead.add(owner if self.struck == "kill" else EVERYONE)
                if self.struck == "cut":
                    self._take_image()
                self._refuse_the_dead(owner)

    def _take_image(self) -> None:
        self.image = self.disk.cut(self.rng if self.rng.random() < 0.7 else None).files

    def _refuse_the_dead(self, owner: int) -> None:
        if owner in self._dead or EVERYONE in self._dead:
            raise apsw.IOError("injected fault: this process is dead")

    # What is noted

    def note(self, event: Event) -> None:
        """Take in a change."""
        self.disk.step(event)
        self.tell(event.what, _DRAFT.sub(".draft", event.name), event.at, event.data)

    def tell(self, *facts: object) -> None:
        """Let the trace hash depend on these facts too."""
        self.digest.update(repr(facts).encode())

    def is_unknown(self, name: str) -> bool:
        return not self.disk.holds(name)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - SQLite's name
        opened = super().xOpen(name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        if path is not None:
            self._through_sqlite.add(Path(path).name)
        return opened

    def xRandomness(self, count: int) -> bytes:  # noqa: N802
        return self.rng.randbytes(count)

    # What happens to files without SQLite

    def host(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit event of Python, before it happens."""
        path = str(arguments[0])
        if not self.watches(path):
            return
        name = Path(path).name
        if event == "open":
            if arguments[2] & os.O_CREAT and not os.path.lexists(path):
                self._change(Event("create", name))
        elif event == "os.remove":
            if self.disk.holds(name):
                self._change(Event("delete", name))
        elif self.disk.holds(name) and (event == "os.rename" or not os.path.lexists(arguments[1])):
            self._change(Event(event.removeprefix("os."), name, data=Path(str(arguments[1])).name.encode()))

    def fsync(self, handle: int) -> None:
        """What ``os.fsync`` does here: the file, or the names of the folder, are safe."""
        held = os.fstat(handle)
        folder = Path(self.folder)
        if not folder.exists():
            return
        if os.path.samestat(held, folder.stat()):
            self._change(Event("names"), "sync")
            return
        for path in folder.iterdir():
            if os.path.samestat(held, path.stat()) and self.disk.holds(path.name):
                if path.name in self._through_sqlite:
                    self._change(Event("sync", path.name), "sync")
                else:
                    self._change(Event("content", path.name, data=path.read_bytes()), "sync")
                return

    def _change(self, event: Event, kind: str = "") -> None:
        try:
            self.gate(kind or event.what, self.current)
        except apsw.IOError as error:
            raise OSError(5, str(error)) from error
        if event.what == "content":
            self.disk.step(event)
            self.tell("content", _DRAFT.sub(".draft", event.name))  # holds measured times
        else:
            self.note(event)

    # Between two lives

    def lay_out(self, target: Path) -> None:
        """Go on in a new folder that holds what a power cut left."""
        shutil.rmtree(self.folder)
        target.mkdir()
        for name, data in self.image.items():
            (target / name).write_bytes(data)
        self.folder, self.disk = str(target), Disk(self.image)
        self.bury()

    def adopt(self) -> None:
        """Take the files as they are now for safe: somebody changed them behind everybody's back."""
        self.disk = Disk({one.name: one.read_bytes() for one in Path(self.folder).iterdir() if _is_kept(one)})


def _is_kept(path: Path) -> bool:
    return path.suffix != ".lock" and not path.name.endswith("-shm")


class Clock:
    """A clock that may jump. Every look at it takes a millisecond."""

    def __init__(self, now: float) -> None:
        self.now = now

    def sleep(self, seconds: float) -> None:
        """Wait without waiting."""
        self.now += seconds

    def __call__(self) -> float:
        self.now += 0.001
        return self.now

    def datetime(self) -> type[datetime]:
        """``datetime`` with this clock."""
        clock = self

        class SimulatedDatetime(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> SimulatedDatetime:
                return cls.fromtimestamp(0, tz) + timedelta(seconds=clock())

        return SimulatedDatetime


def _for_the_package(rng: random.Random) -> Callable[[int], bytes]:
    """``os.urandom`` from a seed for this package; what others are given, as at a first import, changes nothing."""
    real = os.urandom

    def urandom(count: int) -> bytes:
        caller = str(sys._getframe(1).f_globals["__name__"])
        return rng.randbytes(count) if caller.startswith(("memevolve_gpu", "uuid")) else real(count)

    return urandom


_watching: list[SimulatedDisk] = []
_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("os.rename", "os.link", "os.remove", "open"):
        _watching[-1].host(event, arguments)


@contextmanager
def world(seed: str, folder: Path) -> Iterator[tuple[SimulatedDisk, Clock]]:
    """Everything inside of the block follows from ``seed``; ``folder`` is where the disk watches."""
    global _hooked  # noqa: PLW0603 - an audit hook stays for the life of the process
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    rng, clock, steady = random.Random(f"{seed}:system"), Clock(1_782_900_000.5), Clock(1000.0)
    disk = SimulatedDisk(f"simulated-{folder.name}", folder, random.Random(f"{seed}:disk"))
    strftime, disabled = time.strftime, logging.root.manager.disable
    with ExitStack() as patches:
        for target, value in (
            ("os.urandom", _for_the_package(rng)),
            ("os.fsync", disk.fsync),
            ("time.time", clock),
            ("time.monotonic", steady),
            ("time.perf_counter", steady),
            ("time.thread_time", steady),
            ("time.sleep", steady.sleep),
            ("time.strftime", lambda form: strftime(form, time.gmtime(clock()))),
            ("memevolve_gpu.utils.timestamps.datetime", clock.datetime()),
        ):
            patches.enter_context(patch(target, value))
        for function in (MaintenanceScheduler.__init__, Backoff.__init__):  # their default is the clock of the import
            defaults = tuple(steady if one is _REAL_CLOCK else one for one in function.__defaults__ or ())
            patches.enter_context(patch.object(function, "__defaults__", defaults))
        apsw.randomness(0)  # SQLite takes a new seed from the default VFS, which is the simulated disk
        logging.disable()
        _watching.append(disk)
        try:
            yield disk, clock
        finally:
            _watching.pop()
            logging.disable(disabled)
            disk.unregister()
