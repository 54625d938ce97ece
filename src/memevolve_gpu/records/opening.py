"""Open a database file at a prefix: check the file system, recognise, migrate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import apsw

from ..errors import ConfigurationError, NotAStoreError, ReadOnlyError, StorageError
from ..types import Metric
from ..utils.arguments import path_text, shown
from .backup import drop_second_name, has_second_name
from .connections import (
    Durability,
    Patience,
    connect,
    first_row,
    keep_log_on_close,
    set_up_writer,
    shut,
    shut_on_failure,
)
from .file_lock import WriteLock, refuse_network_filesystem
from .fulltext_buffer import TextOf, default_text, kept_stemming, rebuild_words, refuse_newer, tokenizer_of
from .lineage import beside, refuse_foreign_log
from .schema import (
    MAX_DIM,
    METRICS,
    VERSION,
    StoreInfo,
    create,
    facts_of,
    migrate,
    refuse_mismatch,
    state_of,
)
from .sqlite_errors import SQLITE_ERRORS, translate_error
from .tokenizer import STEMMING, TOKENIZER, stemmer

SMALLEST_DATABASE = 512


class OpenOptions(NamedTuple):
    """What the caller of ``Records.open`` asked for; None takes what the file says."""

    dim: int | None
    metric: Metric | None
    durability: Durability
    create: bool
    vfs: str | None
    stemming: str | None = None
    text_of: TextOf = default_text
    """The text of a unit for the keyword index."""


class Opened(NamedTuple):
    """The first connection to a store; ``unshared`` when this user may create no files beside it."""

    con: apsw.Connection
    info: StoreInfo
    read_only: bool
    unshared: bool


def database_path(prefix: str | os.PathLike[str]) -> Path:
    """The absolute path of ``<prefix>.db``, symbolic links resolved."""
    name = path_text("prefix", prefix)
    if os.path.basename(name) in {"", ".", ".."}:  # noqa: PTH119 - pathlib drops what is asked for here
        inside = os.path.join(name, "memory")  # noqa: PTH118 - as above
        raise ConfigurationError(f"prefix: {name!r} names a folder; add a name for the store, as in {inside!r}")
    path_text("prefix", name + ".snapshot.0123456789.01234567.tmp")
    return Path(name + ".db").resolve()


def lock_path(path: Path) -> Path:
    """The lock file beside a database file."""
    return path.with_name(path.name.removesuffix(".db") + ".lock")


def peek(path: Path) -> StoreInfo | None:
    """What the store is; None when there is none. Raises as opening it would."""
    if not path.exists():
        return None
    refuse_network_filesystem(path.parent)
    _refuse_fragment(path)
    lock = WriteLock(lock_path(path))
    try:
        _settle(path, None, lock)
    finally:
        lock.close_file()
    con, _ = _existing(path, None)
    try:
        return facts_of(con) if state_of(con, path) else None
    except SQLITE_ERRORS as error:
        raise translate_error(error, path) from error
    finally:
        shut(con)


def open_store(path: Path, lock: WriteLock, options: OpenOptions) -> Opened:
    """Open or create the store at ``path``; see ``Records.open`` for what it raises."""
    _refuse_settings(options.dim, options.metric, options.durability, options.stemming)
    _refuse_folder(path.parent)
    exists = path.exists()
    if exists:
        _refuse_fragment(path)
        _settle(path, options.vfs, lock)
    else:
        _refuse_creation(path, options.dim, options.create)
    con, unshared = _existing(path, options.vfs) if exists else (_new(path, lock, options.vfs), False)
    try:
        with shut_on_failure(con):
            return _ready(con, path, lock, options, unshared=unshared)
    except SQLITE_ERRORS as error:
        raise translate_error(error, path) from error


def _ready(con: apsw.Connection, path: Path, lock: WriteLock, options: OpenOptions, *, unshared: bool) -> Opened:
    read_only = unshared or con.readonly("main")
    version = state_of(con, path)
    if version == 0:
        _refuse_creation(path, options.dim, options.create and not read_only)
    if version < VERSION and read_only:
        raise ReadOnlyError(f"{path} has schema version {version} and is read-only; make it writable to upgrade it")
    if version < VERSION or (_words_are_due(con, path, options) and not read_only):
        _bring_up_to_date(con, path, lock, options)
    info = facts_of(con)
    refuse_mismatch(info, options.dim, options.metric, path)
    if not read_only:
        _use_write_ahead_log(con, path, lock)
        set_up_writer(con, options.durability)
        keep_log_on_close(con, False)
    return Opened(con, info, read_only, unshared)


def _bring_up_to_date(con: apsw.Connection, path: Path, lock: WriteLock, options: OpenOptions) -> None:
    """Create or migrate in one transaction, under the lock, with a second look: another process may have been first.

    A new file gets its tables under SQLite's rollback journal, so that its first page says at once whose it is.
    """
    try:
        lock.acquire()
        con.execute("PRAGMA synchronous = full")
        con.execute("BEGIN IMMEDIATE")
        try:
            version = state_of(con, path)
            if version == 0 and options.dim is not None:
                create(con, options.dim, options.metric or "l2", options.stemming or STEMMING)
            elif 0 < version < VERSION:
                migrate(con, version)
            if _words_are_due(con, path, options):
                rebuild_words(con, options.text_of, options.stemming or kept_stemming(con))
            con.execute("COMMIT")
        finally:
            if con.in_transaction:
                con.execute("ROLLBACK")
    finally:
        lock.release()


def _words_are_due(con: apsw.Connection, path: Path, options: OpenOptions) -> bool:
    """Whether the keyword index was made by an older tokenizer, or with another stemming than is asked for."""
    held = tokenizer_of(con)
    refuse_newer(held, path)
    stemmer(options.stemming or kept_stemming(con))
    return held != f"{TOKENIZER} {options.stemming or kept_stemming(con)}"


def _use_write_ahead_log(con: apsw.Connection, path: Path, lock: WriteLock) -> None:
    if first_row(con, "PRAGMA journal_mode")[0] == "wal":
        return
    try:
        lock.acquire()
        mode = _switched(con)
    finally:
        lock.release()
    if mode != "wal":
        raise StorageError(f"{path}: the file system cannot hold a write-ahead log (got {mode!r}); choose a local disk")


def _switched(con: apsw.Connection) -> str:
    """The journal mode after the switch. SQLite does not wait for the readers of a new file here, so this does."""
    patience, calls = Patience(), 0
    while True:
        try:
            return str(first_row(con, "PRAGMA journal_mode = wal")[0])
        except apsw.BusyError:
            if not patience(calls):
                raise
            calls += 1


def _new(path: Path, lock: WriteLock, vfs: str | None) -> apsw.Connection:
    """A connection to a file that may not be there yet, which takes its mode from the lock file."""
    try:
        con = connect(path, create=True, mode_of=lock.made(), vfs=vfs)
    except SQLITE_ERRORS as error:
        raise translate_error(error, path) from error
    keep_log_on_close(con, True)
    return con


def _existing(path: Path, vfs: str | None) -> tuple[apsw.Connection, bool]:
    """A connection that can read the file, and whether it reads the file alone, without locks.

    Closing it changes no byte of a file that turns out not to be ours.
    """
    try:
        con = connect(path, vfs=vfs)
        keep_log_on_close(con, True)
        try:
            with shut_on_failure(con):
                first_row(con, "SELECT count(*) FROM sqlite_schema")
            return con, not os.access(path.parent, os.W_OK)
        except (apsw.CantOpenError, apsw.ReadOnlyError):
            if os.access(path.parent, os.W_OK):
                raise
            _refuse_unreadable_log(path)
        return connect(path, read_only=True, immutable=True, vfs=vfs), True
    except SQLITE_ERRORS as error:
        raise translate_error(error, path) from error


def _settle(path: Path, vfs: str | None, lock: WriteLock) -> None:
    """Before SQLite reads the file: undo a restore that was killed half-way, let no foreign log be replayed."""
    try:
        if has_second_name(path) and os.access(path.parent, os.W_OK):
            _drop_second_name(path, lock)
        refuse_foreign_log(path, vfs, lock)
    except SQLITE_ERRORS as error:
        raise translate_error(error, path) from error


def _drop_second_name(path: Path, lock: WriteLock) -> None:
    try:
        lock.acquire()
        drop_second_name(path)
    finally:
        lock.release()


def _refuse_unreadable_log(path: Path) -> None:
    """Raise ReadOnlyError when SQLite cannot read the log; called when it cannot open the file as usual."""
    wal, shm = beside(path, "-wal"), beside(path, "-shm")
    if not wal.exists():
        return
    if os.access(wal, os.R_OK) and wal.stat().st_size == 0 and not shm.exists():
        return
    raise ReadOnlyError(
        f"{path}: its newest writes are in {wal.name}, which this user cannot read without {shm.name}; give this user "
        "the right to write to the folder or to read both files, let a user who may write open and close the store, or "
        "copy .db and -wal together to another folder"
    )


def _refuse_settings(dim: object, metric: object, durability: object, stemming: str | None) -> None:
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= MAX_DIM):
        raise ConfigurationError(f"dim must be an integer from 1 to {MAX_DIM}, not {shown(dim)}")
    if metric is not None and metric not in METRICS:
        raise ConfigurationError(f"metric must be one of {', '.join(METRICS)}, not {shown(metric)}")
    if stemming is not None:
        stemmer(stemming)
    if durability not in ("full", "normal"):
        raise ConfigurationError(f"durability must be full or normal, not {shown(durability)}")


def _refuse_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise StorageError(f"the folder {folder} does not exist; create it first")
    refuse_network_filesystem(folder)


def _refuse_fragment(path: Path) -> None:
    """SQLite takes a file of one byte for an empty one, and waits at a FIFO."""
    if not path.is_file():
        raise NotAStoreError(f"{path} is no regular file; choose another prefix")
    for name in (beside(path, "-wal"), beside(path, "-shm")):
        if name.exists() and not name.is_file():
            raise StorageError(f"{name} is no regular file, so {path} cannot be read; move it away")
    if 0 < path.stat().st_size < SMALLEST_DATABASE:
        raise NotAStoreError(f"{path} is too small to be an SQLite file; choose another prefix")


def _refuse_creation(path: Path, dim: int | None, may_create: bool) -> None:
    if not may_create:
        raise StorageError(f"there is no store at {path}; check the prefix, or create one")
    if dim is None:
        raise ConfigurationError(f"dim is needed to create {path}: the length of the vectors that it will hold")
    if not os.access(path.parent, os.W_OK):
        raise ReadOnlyError(f"{path} cannot be created; make the folder {path.parent} writable")
