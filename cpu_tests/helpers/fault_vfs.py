"""A virtual file system below SQLite that fails on demand and remembers what a disk would have kept.

``FaultVFS`` is a pass-through to SQLite's "unix" VFS for the files of one folder: locks, shared memory and the living
files are the real ones. Two things are added.

*Faults.* ``arm(kind, at)`` makes the at-th matching call fail, as listed in ``FAULTS``; ``lift()`` repairs the disk.

*Power loss.* Every change is recorded in ``trace``, in order, with the marks that the test sets. ``Disk`` replays a
trace up to any point and says what would be found after a power cut there: of what was written since the last sync of
its file any subset of sectors may be there (POSIX promises no order), one of them half written; of creations and
removals of names any beginning (directories are journalled). Syncs cost nothing here: the operating system survives.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import apsw

__all__ = ["FAULTS", "Cut", "Disk", "Event", "FaultVFS", "faulty_disk"]

SECTOR = 512
SHARES = (0.5, 0.9, 0.99, 1.0)
"""How much of what was not synced is on the disk all the same."""

FAULTS = ("write", "full", "sync", "lost", "truncate", "open", "delete", "read", "lock", "size")
"""write: an error after nothing, a third or two thirds were written, by turns. full: from here on no file grows (half
of the write that hits the limit is there). sync: the sync fails. lost: likewise, and what it should have synced never
reaches the disk, although the system goes on showing it (what Linux does after a failed fsync). The others: that call
fails."""

_ERRORS: dict[str, type[apsw.Error]] = {"full": apsw.FullError, "open": apsw.CantOpenError}
_DIRSYNC = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_SUPER_JOURNAL | apsw.SQLITE_OPEN_WAL


class Event(NamedTuple):
    """One change. what: create, write, truncate, sync, lost, names (the folder was synced), delete or mark.

    Of a file that is written without SQLite: content (all of it is safe now), rename and link (``data``: the new name).
    """

    what: str
    name: str = ""
    at: int = 0
    data: bytes = b""


class FaultVFS(apsw.VFS):
    """The file system; make it with :func:`faulty_disk`. Only files inside ``folder`` are counted, failed or traced."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = str(folder)
        self.trace: list[Event] = []
        self.recording = False
        self.fired = 0
        """How many calls failed since :meth:`arm`."""
        self.at = 0
        """Which call fails."""
        self.current = 0
        """Who opens files now; a file remembers it as its owner."""
        self._kind = ""
        self._left = 0
        super().__init__(name, "unix", makedefault=True)

    def arm(self, kind: str, at: int) -> None:
        """Let the ``at``-th call (from 1) of that kind fail."""
        self._kind, self._left, self.at, self.fired = kind, at, at, 0

    def lift(self) -> None:
        """No more faults."""
        self._kind = ""

    def mark(self, label: int) -> None:
        """Note in the trace how far the workload is."""
        self.note(Event("mark", at=label))

    def note(self, event: Event) -> None:
        if self.recording:
            self.trace.append(event)

    def is_unknown(self, name: str) -> bool:
        """Does the trace not have the file of this name? The package makes some, still empty, by itself."""
        last = (
            event.what for event in reversed(self.trace) if event.name == name and event.what in ("create", "delete")
        )
        return next(last, "delete") == "delete"

    def hits(self, *kinds: str) -> str:
        """The armed fault, when it is one of ``kinds`` and its turn has come."""
        if self._kind not in kinds:
            return ""
        self._left -= 1
        if self._left == 0 or (self._kind == "full" and self._left < 0):
            self.fired += 1
            return self._kind
        return ""

    def gate(self, what: str, owner: int) -> None:
        """Called before each change by the file that ``owner`` opened; a subclass may raise."""

    def fail(self, *kinds: str) -> None:
        """Raise when the armed fault strikes here."""
        kind = self.hits(*kinds)
        if kind:
            raise self.error(kind)

    def error(self, kind: str) -> apsw.Error:
        return _ERRORS.get(kind, apsw.IOError)(f"injected fault: {kind}")

    def watches(self, path: str) -> bool:
        return path.startswith(self.folder + "/")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - SQLite's name
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        if path is None or not self.watches(path):
            return apsw.VFSFile("unix", name, flags)
        self.gate("open", self.current)
        self.fail("open")
        return FaultFile(self, path, name, flags)

    def xDelete(self, path: str, syncdir: bool) -> None:  # noqa: N802
        if self.watches(path):
            self.gate("delete", self.current)
            self.fail("delete")
        super().xDelete(path, False)
        if self.watches(path):
            self.note(Event("delete", Path(path).name))
            if syncdir:
                self.note(Event("names"))


class FaultFile(apsw.VFSFile):
    """One open file of the watched folder."""

    def __init__(self, vfs: FaultVFS, path: str, name: Any, flags: list[int]) -> None:
        self.vfs = vfs
        self.owner = vfs.current
        self.name = Path(path).name
        self._names_pending = bool(flags[0] & _DIRSYNC)  # SQLite syncs the folder with a journal's first sync
        there = Path(path).exists() and not (Path(path).stat().st_size == 0 and vfs.is_unknown(self.name))
        super().__init__("unix", name, flags)
        if not there:
            vfs.note(Event("create", self.name))

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self.vfs.fail("read")
        return super().xRead(amount, offset)

    def xWrite(self, data: Any, offset: int) -> None:  # noqa: N802
        self.vfs.gate("write", self.owner)
        whole = bytes(data)
        if self.vfs.hits("write"):
            self._put(whole[: len(whole) * (self.vfs.at % 3) // 3], offset)
            raise self.vfs.error("write")
        if offset + len(whole) > self._end() and self.vfs.hits("full"):
            self._put(whole[: len(whole) // 2], offset)
            raise self.vfs.error("full")
        self._put(whole, offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self.vfs.gate("truncate", self.owner)
        self.vfs.fail("truncate")
        super().xTruncate(newsize)
        self.vfs.note(Event("truncate", self.name, newsize))

    def xSync(self, flags: int) -> None:  # noqa: N802
        self.vfs.gate("sync", self.owner)
        kind = self.vfs.hits("sync", "lost")
        if kind == "lost":
            self.vfs.note(Event("lost", self.name))
        if kind:
            raise self.vfs.error(kind)
        self.vfs.note(Event("sync", self.name))
        if self._names_pending:
            self._names_pending = False
            self.vfs.note(Event("names"))

    def excepthook(self, kind: Any, error: Any, trace: Any) -> bool:
        """SQLite passed over an error, and APSW has nobody to tell: right for ours, worth a warning for any other."""
        return "injected fault" in str(error) or super().excepthook(kind, error, trace)

    def xFileSize(self) -> int:  # noqa: N802
        self.vfs.fail("size")
        return super().xFileSize()

    def xLock(self, level: int) -> None:  # noqa: N802
        self.vfs.fail("lock")
        super().xLock(level)

    def _end(self) -> int:
        return super().xFileSize()

    def _put(self, data: bytes, offset: int) -> None:
        if data:
            super().xWrite(data, offset)
            self.vfs.note(Event("write", self.name, offset, data))


@contextmanager
def faulty_disk(folder: Path) -> Iterator[FaultVFS]:
    """The default VFS for as long as the block lasts. Close every connection inside of it."""
    vfs = FaultVFS(f"faulty-{folder.name}", folder)
    try:
        yield vfs
    finally:
        vfs.unregister()


@dataclass
class _File:
    """Bytes that are safe, and changes that are not, oldest first."""

    safe: bytearray = field(default_factory=bytearray)
    loose: list[Event] = field(default_factory=list)


class Cut(NamedTuple):
    """What is found after a power cut: files by name, and the last mark that was set before."""

    files: dict[str, bytes]
    mark: int


class Disk:
    """Replays a trace event by event, from a disk that holds ``files``."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.mark = -1
        self._shown = {name: _File(bytearray(data)) for name, data in (files or {}).items()}
        self._safe_names = dict(self._shown)
        self._loose_names: list[dict[str, _File | None]] = []
        """Changes of names that are not safe yet, oldest first; each is there as a whole or not at all."""

    def step(self, event: Event) -> None:
        """Take in the next event."""
        if event.what == "mark":
            self.mark = event.at
        elif event.what == "names":
            self._safe_names, self._loose_names = dict(self._shown), []
        elif event.what in ("create", "delete", "rename", "link"):
            self._change_names(event)
        elif event.what == "sync":
            file = self._shown[event.name]
            for change in file.loose:
                _apply(file.safe, change)
            file.loose = []
        elif event.what == "content":
            self._shown[event.name].safe[:] = event.data
            self._shown[event.name].loose = []
        elif event.what == "lost":
            self._shown[event.name].loose = []
        else:
            self._shown[event.name].loose.append(event)

    def holds(self, name: str) -> bool:
        """Is there a file of this name, as the running system shows it?"""
        return name in self._shown

    def _change_names(self, event: Event) -> None:
        changes: dict[str, _File | None]
        if event.what == "create":
            changes = {event.name: _File()}
        elif event.what == "delete":
            changes = {event.name: None}
        else:
            changes = {event.data.decode(): self._shown[event.name]}
            if event.what == "rename":
                changes[event.name] = None
        _rename(self._shown, changes)
        self._loose_names.append(changes)

    def cut(self, rng: random.Random | None = None) -> Cut:
        """The files after a power cut now: without ``rng`` nothing that was not synced is there, else a random part."""
        names = dict(self._safe_names)
        survived = rng.randint(0, len(self._loose_names)) if rng else 0
        for changes in self._loose_names[:survived]:
            _rename(names, changes)
        return Cut({name: _survivors(file, rng) for name, file in names.items()}, self.mark)


def _rename(names: dict[str, _File], changes: Mapping[str, _File | None]) -> None:
    for name, file in changes.items():
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file


def _survivors(file: _File, rng: random.Random | None) -> bytes:
    image = bytearray(file.safe)
    if rng:
        share = rng.choice(SHARES)
        torn = rng.randrange(len(file.loose)) if file.loose else -1
        for number, change in enumerate(file.loose):
            if change.what == "truncate":
                if rng.random() < share:
                    _apply(image, change)
                continue
            for piece in _sectors(change):
                if rng.random() < share:
                    _apply(image, piece)
                elif number == torn:
                    _apply(image, piece._replace(data=piece.data[: rng.randint(0, len(piece.data))]))
                    torn = -1
    return bytes(image)


def _sectors(change: Event) -> Iterator[Event]:
    start, end = change.at, change.at + len(change.data)
    while start < end:
        upto = min(end, (start // SECTOR + 1) * SECTOR)
        yield Event("write", change.name, start, change.data[start - change.at : upto - change.at])
        start = upto


def _apply(image: bytearray, change: Event) -> None:
    if change.what == "truncate":
        del image[change.at :]
        image.extend(bytes(change.at - len(image)))
    elif change.data:
        image.extend(bytes(max(0, change.at - len(image))))
        image[change.at : change.at + len(change.data)] = change.data
