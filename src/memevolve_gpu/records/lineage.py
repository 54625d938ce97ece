"""Recognise a write-ahead log that does not belong to its database file.

SQLite replays any log that lies beside a database file. If somebody copies a backup over the file while the log of the
old one is still there, the result is a damaged store or a restore that is silently undone. SQLite keeps nothing in the
file that would tell the two apart, so the store does.

Every transaction writes a link into the counters row: a random token, the token of the transaction before it, and the
floor, a token that is known to be in the database file itself. The row is the only one of its table and the link its
last column, so the link is always the last ``LINK_BYTES`` of page ``COUNTERS_PAGE``, in one disk sector. The tokens of
a log's frames, with the predecessor of the first one, are every state that its database file can be in. If the token in
the file is not one of them, or is older than the floor, then the log belongs to another file.

Three cases have no link. A backup is not in WAL mode, as its header says; no file that has a log is. A file of schema
version 1 is identified by its counters, which the migration takes for the token. A log written before the migration
has no predecessor in its first frame; then the counters of the file must not be ahead of it, and no more is known. A
log without any frame of the counters page, which only another program writes, is accepted.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import apsw

from ..errors import CorruptStoreError, ReadOnlyError
from ..utils.drafts import sync_folder
from .file_lock import WriteLock
from .sqlite_errors import SQLITE_ERRORS, translate_error

COUNTERS_PAGE = 3
"""``counters`` is the second table that :func:`.schema.create` makes, so its only page is the third."""

TOKEN_BYTES = 16
NO_TOKEN = bytes(TOKEN_BYTES)
_MAGIC = b"MEVLINK1"
LINK_BYTES = 3 * TOKEN_BYTES + len(_MAGIC)

_APPLICATION_ID = 0x4D456756
_WAL_HEADER = struct.Struct(">8I")
_FRAME_HEADER = struct.Struct(">6I")
_WAL_MAGICS = (0x377F0682, 0x377F0683)
_ONLY_GROWING = (0, 1, 2, 4)
"""Positions of last_seq, horizon, last_slot and next_auto among the counters of version 1."""

_COUNTERS_PAGE = COUNTERS_PAGE.to_bytes(4, "big")

_LOOKS = 5
"""Looks at a file and a log that change meanwhile, before the difference counts."""


class Link(NamedTuple):
    """What one transaction writes into the counters row; every field has 16 bytes."""

    token: bytes
    previous: bytes
    floor: bytes

    def pack(self) -> bytes:
        """The value of the column."""
        return b"".join(self) + _MAGIC

    @classmethod
    def unpack(cls, raw: bytes) -> Link | None:
        """The link in the last bytes of ``raw``; None when there is none."""
        if len(raw) < LINK_BYTES or not raw.endswith(_MAGIC):
            return None
        at = len(raw) - LINK_BYTES
        return cls(raw[at : at + 16], raw[at + 16 : at + 32], raw[at + 32 : at + 48])


def next_link(held: bytes, floor: bytes) -> bytes:
    """The column value of the transaction that follows the one whose column value is ``held``."""
    if len(held) != LINK_BYTES or not held.endswith(_MAGIC):
        return first_link()
    kept = held[2 * TOKEN_BYTES :] if floor == NO_TOKEN else floor + _MAGIC
    return os.urandom(TOKEN_BYTES) + held[:TOKEN_BYTES] + kept


def first_link(counters: tuple[int, ...] | None = None) -> bytes:
    """The column value for a new store, or for one that is migrated and has these seven counters."""
    previous = NO_TOKEN if counters is None else _digest(counters)
    return Link(os.urandom(TOKEN_BYTES), previous, NO_TOKEN).pack()


class _FileSide(NamedTuple):
    ours: bool
    in_wal_mode: bool
    tokens: frozenset[bytes]
    """What may be the token: the link's, else one for each way in which the counters can be read."""
    counters: tuple[int, ...] | None


class _Frame(NamedTuple):
    link: Link | None
    counters: tuple[int, ...] | None

    @property
    def token(self) -> bytes | None:
        if self.link is not None:
            return self.link.token
        return None if self.counters is None else _digest(self.counters)


_OTHER_PAGE = _Frame(None, None)


def beside(path: Path, ending: str) -> Path:
    """The file of SQLite beside the database: ``-wal``, ``-shm`` or ``-journal``."""
    return path.with_name(path.name + ending)


def refuse_foreign_log(path: Path, vfs: str | None, lock: WriteLock) -> None:
    """Let nothing replay a log that is not the database file's own.

    A log that :func:`.backup.restore` was about to remove when it was killed is removed. Any other one is set aside
    when nobody has the store open. Raises CorruptStoreError then, and when it cannot be set aside.
    """
    if why_foreign(path, vfs) is None:
        return
    try:
        lock.acquire()
        why = why_foreign(path, vfs)
        if why is not None:
            _set_aside(path, vfs, why)
    except ReadOnlyError as error:
        message = f"{why_foreign(path, vfs)}; nothing was replayed. Let its owner run memevolve-store check or restore"
        raise CorruptStoreError(message) from error
    except SQLITE_ERRORS as error:
        raise translate_error(error, path) from error
    finally:
        lock.release()


def _set_aside(path: Path, vfs: str | None, why: str) -> None:
    wal = beside(path, "-wal")
    with locked_alone(path, vfs, f"{why}; nothing was replayed. Close the store in every process, then restore"):
        if _is_kept_elsewhere(wal):
            wal.unlink()
            return
        aside = wal.with_name(f"{wal.name}.foreign-{time.strftime('%Y%m%d-%H%M%S')}")
        wal.rename(aside)
        sync_folder(path.parent)
    raise CorruptStoreError(
        f"{why}. Nothing was replayed; the log was set aside as {aside}. Open the store again to use {path.name} as it "
        "is, or put a backup in place with memevolve-store restore"
    )


def _is_kept_elsewhere(wal: Path) -> bool:
    """Did a restore give the log its second name, with the store that it replaced?"""
    if wal.stat().st_nlink < 2:
        return False
    stem = wal.name.removesuffix(".db-wal")
    names = (other for other in wal.parent.iterdir() if other.name.startswith(f"{stem}.replaced-"))
    return any(other.name.endswith(".db-wal") and other.samefile(wal) for other in names)


@contextmanager
def locked_alone(path: Path, vfs: str | None, refusal: str) -> Iterator[None]:
    """Keep every program from the database file; raises CorruptStoreError with ``refusal`` while one has it open.

    Uses SQLite's own locks, which connections hold as long as they are open; no byte of the file is changed.
    """
    file = _opened(path, vfs, apsw.SQLITE_OPEN_READWRITE)
    try:
        try:
            for level in (apsw.SQLITE_LOCK_SHARED, apsw.SQLITE_LOCK_RESERVED, apsw.SQLITE_LOCK_EXCLUSIVE):
                file.xLock(level)
        except apsw.BusyError as error:
            raise CorruptStoreError(refusal) from error
        yield
    finally:
        file.xUnlock(apsw.SQLITE_LOCK_NONE)
        file.xClose()


def why_foreign(path: Path, vfs: str | None) -> str | None:
    """Why the log beside ``path`` is not its own; None when it is, when there is none, or when it cannot be told.

    File and log are read without locks while others may write, so a difference must show several times.
    """
    why = None
    for look in range(_LOOKS):
        why = _difference(path, vfs)
        if why is None:
            return None
        time.sleep(0.002 * look)
    return why


def _difference(path: Path, vfs: str | None) -> str | None:
    wal = beside(path, "-wal")
    try:
        file = _file_side(path, vfs)
        why = _contradiction(path, wal, file, list(_frames(wal, vfs)))
        if why is not None:  # unless it is in a frame that a power cut tore, which is not replayed
            why = _contradiction(path, wal, file, list(_frames(wal, vfs, checked=True)))
        return why
    except (FileNotFoundError, PermissionError, apsw.CantOpenError):
        return None  # there is nothing to replay, or opening says by itself what is wrong


def _contradiction(path: Path, wal: Path, file: _FileSide, frames: list[_Frame]) -> str | None:
    if not file.ours or not frames:
        return None
    if not file.in_wal_mode:
        return f"{wal} does not belong to {path}, which is a copy that never had a write-ahead log"
    known = [frame for frame in frames if frame.token is not None]
    if not known or file.tokens & _states(known):
        return None
    first = known[0]
    if first.link is None and _may_precede(file.counters, first.counters):
        return None
    return f"{wal} does not belong to {path}: the file was replaced or changed while this log was there"


def _may_precede(file: tuple[int, ...] | None, log: tuple[int, ...] | None) -> bool:
    """Are none of the counters that only grow larger in the file than in the first frame of the log?"""
    if file is None or log is None:
        return file is None and log is not None  # a page torn by a power failure, which the log makes whole
    return all(file[at] <= log[at] for at in _ONLY_GROWING)


def _states(frames: list[_Frame]) -> set[bytes]:
    """The tokens that the database file of these frames may hold."""
    chain = [frame.token for frame in frames if frame.token is not None]
    if frames[0].link is not None:
        chain.insert(0, frames[0].link.previous)
    last = frames[-1].link
    if last is not None and last.floor in chain:
        chain = chain[chain.index(last.floor) :]
    return set(chain)


def token_bytes(path: Path, vfs: str | None) -> bytes:
    """The end of the counters page in the database file alone: differs after every transaction that reached it."""
    file = _opened(path, vfs, apsw.SQLITE_OPEN_READONLY)
    try:
        return _counters_page(file)
    finally:
        file.xClose()


def _counters_page(file: apsw.VFSFile) -> bytes:
    """The usable part of the page, empty when the file is too short."""
    head = file.xRead(100, 0) if file.xFileSize() >= 512 else bytes(100)
    size = _page_size(int.from_bytes(head[16:18], "big"))
    if not size or file.xFileSize() < COUNTERS_PAGE * size:
        return b""
    return file.xRead(size, (COUNTERS_PAGE - 1) * size)[: size - head[20]]


def _opened(path: Path, vfs: str | None, access: int) -> apsw.VFSFile:
    """The database file, through SQLite: closing a descriptor of our own would drop the locks of this process."""
    return apsw.VFSFile(vfs or "", str(path), [access | apsw.SQLITE_OPEN_MAIN_DB, 0])


def _file_side(path: Path, vfs: str | None) -> _FileSide:
    file = _opened(path, vfs, apsw.SQLITE_OPEN_READONLY)
    try:
        head = file.xRead(100, 0) if file.xFileSize() >= 512 else b""
        if len(head) < 100 or int.from_bytes(head[68:72], "big") != _APPLICATION_ID:
            return _FileSide(False, False, frozenset(), None)
        page = _counters_page(file)
    finally:
        file.xClose()
    link = Link.unpack(page)
    readings = list(_counters_in(page)) if link is None else []
    tokens = {link.token} if link is not None else set(map(_digest, readings))
    return _FileSide(True, head[18:20] == b"\x02\x02", frozenset(tokens), readings[0] if readings else None)


def _frames(wal: Path, vfs: str | None, *, checked: bool = False) -> Iterator[_Frame]:
    """What every frame that SQLite would replay says; one without link and counters for other pages than theirs.

    Checksums, 0.1 ms for each frame, are compared when ``checked``.
    """
    file = apsw.VFSFile(vfs or "", str(wal), [apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_WAL, 0])
    try:
        head = file.xRead(_WAL_HEADER.size, 0)
        if len(head) < _WAL_HEADER.size or not _is_valid(head):
            return
        magic, _, stored_size, *_, sum0, sum1 = _WAL_HEADER.unpack(head)
        size, sums = _page_size(stored_size), (sum0, sum1)
        salts, at, end = head[16:24], _WAL_HEADER.size, file.xFileSize()
        while at + _FRAME_HEADER.size + size <= end:
            frame = file.xRead(_FRAME_HEADER.size, at)
            if frame[8:16] != salts:
                return
            if checked:
                sums = _checksum(magic, frame[:8] + file.xRead(size, at + _FRAME_HEADER.size), sums)
                if frame[16:24] != struct.pack(">2I", *sums):
                    return
            if frame.startswith(_COUNTERS_PAGE):
                page = file.xRead(size, at + _FRAME_HEADER.size)
                link = Link.unpack(page)
                yield _Frame(link, next(_counters_in(page), None) if link is None else None)
            else:
                yield _OTHER_PAGE
            at += _FRAME_HEADER.size + size
    finally:
        file.xClose()


def _is_valid(head: bytes) -> bool:
    """Does SQLite take this for the header of a log? It ignores any other one."""
    magic, *_, sum0, sum1 = _WAL_HEADER.unpack(head)
    return magic in _WAL_MAGICS and _checksum(magic, head[:24], (0, 0)) == (sum0, sum1)


def _checksum(magic: int, data: bytes, before: tuple[int, int]) -> tuple[int, int]:
    """SQLite's checksum of a log, which goes on from that of the frame before."""
    words = struct.unpack(f"{'>' if magic & 1 else '<'}{len(data) // 4}I", data)
    s0, s1 = before
    for x0, x1 in zip(words[::2], words[1::2], strict=True):
        s0 = (s0 + x0 + s1) & 0xFFFFFFFF
        s1 = (s1 + x1 + s0) & 0xFFFFFFFF
    return s0, s1


def _page_size(stored: int) -> int:
    return 65536 if stored == 1 else stored


def _counters_in(page: bytes) -> Iterator[tuple[int, ...]]:
    """The counters of a schema 1 page. Their cell ends with the page; where it begins is found by trying."""
    for start in range(max(8, len(page) - 90), len(page) - 10):
        length, rowid, header = page[start : start + 3]
        if start + 2 + length == len(page) and rowid == 1 and header == 9:
            values = _integers(page[start + 3 : start + 11], page[start + 11 :])
            if values is not None:
                yield values


def _integers(kinds: bytes, content: bytes) -> tuple[int, ...] | None:
    """The seven counters of SQLite's record, which follow ``one``, kept as NULL in favour of the row id."""
    widths = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 8: 0, 9: 0}
    values, at = [], 0
    if any(kind not in widths for kind in kinds) or sum(widths[kind] for kind in kinds) != len(content):
        return None
    for kind in kinds:
        part = content[at : at + widths[kind]]
        values.append({0: 1, 8: 0, 9: 1}.get(kind, int.from_bytes(part, "big", signed=True)))
        at += len(part)
    return tuple(values[1:])


def _digest(counters: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(repr(tuple(counters)).encode(), digest_size=TOKEN_BYTES).digest()
