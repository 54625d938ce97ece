"""Restoring a backup, and a write-ahead log that lies beside a file that it does not belong to."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import apsw
import pytest
from records_kit import DIM, foreign_connection, put, vector
from support import as_child, ended, fork

from memevolve_gpu.errors import CorruptStoreError, NotAStoreError, StorageError
from memevolve_gpu.records import Records
from memevolve_gpu.records.lineage import LINK_BYTES, TOKEN_BYTES

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "schema-1-snapshot-1.zip"
OLD = [f"old{i}" for i in range(20)]
NEW = [f"new{i}" for i in range(20)]
_COPIES = ("backup", "closed file", "copy by SQLite", "VACUUM INTO")


def killed(act: Callable[[], object]) -> None:
    """Run ``act`` in a child process that ends by SIGKILL after it, or within it."""

    def kill() -> None:
        kept = act()
        os.kill(os.getpid(), signal.SIGKILL)
        assert kept is not act

    assert as_child(kill) == -signal.SIGKILL


def write(prefix: Path, names: list[str]) -> Records:
    """Store units one by one and leave the store open."""
    records = Records.open(prefix, dim=DIM)
    for name in names:
        put(records, name)
    return records


def copied(how: str, prefix: Path, target: Path) -> None:
    """A copy of a store that nobody has open, made in one of the usual ways."""
    source = prefix.with_name(prefix.name + ".db")
    if how == "backup":
        with Records.open(prefix) as records:
            records.backup(target)
    elif how == "closed file":
        shutil.copyfile(source, target)
    else:
        con = foreign_connection(source)
        if how == "VACUUM INTO":
            con.execute("VACUUM INTO ?", (str(target),))
        else:
            with apsw.Connection(str(target)) as copy, copy.backup("main", con, "main") as steps:
                steps.step()
        con.close()


def stale(tmp_path: Path, prefix: Path, how: str) -> Path:
    """A backup with OLD, and at ``prefix`` the leftovers of a writer of NEW that was killed."""
    with Records.open(prefix, dim=DIM) as records:
        for name in OLD:
            put(records, name)
    target = tmp_path / "backup.db"
    copied(how, prefix, target)
    killed(lambda: write(prefix, NEW))
    assert prefix.with_name("memory.db-wal").stat().st_size > 4096 * len(NEW)
    return target


def ids_at(prefix: Path) -> list[str]:
    with Records.open(prefix) as records:
        assert records.check() == []
        return list(records.ids())


@pytest.mark.parametrize("how", _COPIES)
@pytest.mark.parametrize("entry", ["open", "peek"])
def test_a_log_beside_a_copied_backup_is_set_aside(tmp_path: Path, prefix: Path, how: str, entry: str) -> None:
    backup, file = stale(tmp_path, prefix, how), prefix.with_name("memory.db")
    log = prefix.with_name("memory.db-wal").read_bytes()
    shutil.copyfile(backup, file)
    with pytest.raises(CorruptStoreError, match=r"does not belong.*Nothing was replayed.*set aside as .*foreign-"):
        Records.open(prefix) if entry == "open" else Records.peek(prefix)
    assert file.read_bytes() == backup.read_bytes()
    (aside,) = tmp_path.glob("memory.db-wal.foreign-*")
    assert aside.read_bytes() == log
    assert ids_at(prefix) == OLD
    with Records.open(prefix) as records:
        put(records, "later")
    assert ids_at(prefix) == [*OLD, "later"]


def test_a_log_that_is_its_files_own_is_replayed(prefix: Path) -> None:
    write_all = [*OLD, *NEW]
    for first, last in ((0, 1), (1, 17), (17, 40)):
        killed(partial(write, prefix, write_all[first:last]))
        killed(lambda: Records.open(prefix))
    assert ids_at(prefix) == write_all


@pytest.mark.parametrize("reader", [False, True])
def test_a_file_into_which_a_part_of_its_log_was_copied_is_its_own(prefix: Path, reader: bool) -> None:
    def act() -> object:
        records = Records.open(prefix, dim=DIM)
        for name in OLD:
            put(records, name)
        con = foreign_connection(records.path)
        if reader:
            con.execute("BEGIN; SELECT * FROM store")
        for name in NEW:
            put(records, name)
        other = foreign_connection(records.path)
        other.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        put(records, "last")
        return records, con, other

    killed(act)
    assert ids_at(prefix) == [*OLD, *NEW, "last"]


def test_a_log_whose_first_frame_a_power_cut_tore_is_not_foreign(prefix: Path) -> None:
    """Its link is half old, half new, and fits nothing; SQLite does not replay such a frame either."""
    killed(partial(write, prefix, OLD))
    with Records.open(prefix) as records:
        records.checkpoint()
    killed(partial(write, prefix, NEW))
    wal = Path(f"{prefix}.db-wal")
    frame = 32 + 24 + 4096
    with wal.open("r+b") as file:
        file.truncate(frame)
        file.seek(frame - LINK_BYTES)
        file.write(b"\xff" * 2 * TOKEN_BYTES)
    assert ids_at(prefix) == OLD


def test_a_copy_that_is_older_than_the_log_by_one_write_is_noticed(tmp_path: Path, prefix: Path) -> None:
    with Records.open(prefix, dim=DIM) as records:
        put(records, "a")
    shutil.copyfile(prefix.with_name("memory.db"), tmp_path / "copy")
    with Records.open(prefix) as records:
        put(records, "b")
    killed(lambda: write(prefix, ["c"]))
    shutil.copyfile(tmp_path / "copy", prefix.with_name("memory.db"))
    with pytest.raises(CorruptStoreError, match="does not belong"):
        Records.open(prefix)
    assert ids_at(prefix) == ["a"]


# Stores of schema version 1, which have no links


@pytest.fixture
def first_version(tmp_path: Path, prefix: Path) -> Path:
    """The database file of a store of schema version 1 whose last writer was killed."""
    with zipfile.ZipFile(GOLDEN) as archive:
        prefix.with_name("memory.db").write_bytes(archive.read("exact.db"))

    def act() -> object:
        con = foreign_connection(prefix.with_name("memory.db"))
        con.wal_autocheckpoint(0)
        for seq in range(5):
            con.execute("UPDATE counters SET last_seq = last_seq + 1, last_slot = last_slot + 1, count = count + 1")
            con.execute(
                "INSERT INTO units SELECT last_slot, 'w' || last_slot, json_object('id', 'w' || last_slot) "
                "FROM counters"
            )
            con.execute("INSERT INTO vectors SELECT last_slot, ? FROM counters", (vector() * 2,))
            con.execute("INSERT INTO log SELECT last_seq, 1, last_slot FROM counters")
            if seq == 2:
                con.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        return con

    killed(act)
    assert prefix.with_name("memory.db-wal").stat().st_size
    return prefix.with_name("memory.db")


def test_an_older_store_is_lifted_with_its_log(first_version: Path, prefix: Path) -> None:
    with Records.open(prefix, metric=None) as records:
        assert len([name for name in records.ids() if name.startswith("w")]) == 5


def test_an_older_store_killed_after_its_migration_opens(first_version: Path, prefix: Path) -> None:
    killed(lambda: Records.open(prefix, metric=None))
    with Records.open(prefix, metric=None) as records:
        assert len([name for name in records.ids() if name.startswith("w")]) == 5


def test_a_backup_over_an_older_store_is_noticed(first_version: Path, tmp_path: Path, prefix: Path) -> None:
    shutil.copytree(tmp_path, tmp_path / "twin")
    with Records.open(tmp_path / "twin" / "memory", metric=None) as records:
        records.backup(tmp_path / "backup.db")
    shutil.copyfile(tmp_path / "backup.db", first_version)
    with pytest.raises(CorruptStoreError, match="never had a write-ahead log"):
        Records.open(prefix, metric=None)


# Beside a process that has the store open


@contextmanager
def another_process(act: Callable[[], object]) -> Iterator[None]:
    """``act`` has been done in a child, which lives, and keeps what is open, until the block ends."""
    told, tell = os.pipe()

    def live() -> None:
        keep = act()
        os.write(tell, b"x")
        signal.pause()
        assert keep is not None

    pid = fork(live)
    os.close(tell)
    assert os.read(told, 1) == b"x", "the child failed"
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        os.close(told)


def held_open(prefix: Path) -> Records:
    return write(prefix, ["held"])


def test_a_file_that_is_copied_over_beside_a_live_process_is_refused(tmp_path: Path, prefix: Path) -> None:
    with Records.open(prefix, dim=DIM) as records:
        put(records, "a")
        records.backup(tmp_path / "backup.db")
    with another_process(lambda: held_open(prefix)):
        shutil.copyfile(tmp_path / "backup.db", prefix.with_name("memory.db"))
        with pytest.raises(CorruptStoreError, match="Close the store in every process"):
            Records.open(prefix)
        assert list(tmp_path.glob("*foreign*")) == []
    with pytest.raises(CorruptStoreError, match="set aside"):
        Records.open(prefix)
    assert ids_at(prefix) == ["a"]


@pytest.mark.parametrize("entry", ["read", "write", "close"])
@pytest.mark.parametrize("what", ["backup", "older copy", "other store"])
@pytest.mark.parametrize("log", ["with a log", "log emptied"])
def test_a_live_process_notices_that_its_file_was_copied_over(
    records: Records, tmp_path: Path, entry: str, what: str, log: str
) -> None:
    copies = {"backup": tmp_path / "backup.db", "older copy": tmp_path / "copy", "other store": tmp_path / "other.db"}
    for name in OLD:
        put(records, name)
    records.checkpoint()
    records.backup(copies["backup"])
    shutil.copyfile(records.path, copies["older copy"])
    write(tmp_path / "other", ["x"]).close()
    for name in NEW:
        put(records, name)
    if log == "log emptied":
        records.checkpoint()
    assert records.head().count == len(OLD) + len(NEW)
    shutil.copyfile(copies[what], records.path)
    act = partial(records.get, OLD[0]) if entry == "read" else partial(put, records, "later")
    for _ in range(0 if entry == "close" else 2):
        with pytest.raises(CorruptStoreError, match="close the store in every process, then restore"):
            act()
    assert entry == "close" or records.damage is not None
    records.close()
    assert records.path.read_bytes() == copies[what].read_bytes(), "closing copied the log into another file"


def test_a_reader_follows_a_file_into_which_others_copy_their_log(records: Records, prefix: Path) -> None:
    names = [f"n{number}" for number in range(30)]
    with Records.open(prefix, dim=DIM, durability="normal") as other:
        for number, name in enumerate(names):
            put(other, name)
            if number % 3 == 0:
                other.checkpoint()
            elif number % 3 == 1:
                foreign_connection(records.path).wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            assert records.get(name) is not None
            assert records.head().count == number + 1
    put(records, "last")
    assert list(records.ids()) == [*names, "last"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_live_process_notices_that_its_file_was_replaced(records: Records, tmp_path: Path, gone: bool) -> None:
    put(records, "a")
    records.backup(tmp_path / "backup.db")
    records.path.unlink() if gone else (tmp_path / "backup.db").rename(records.path)
    for act in (lambda: put(records, "b"), lambda: records.get("a"), records.check):
        with pytest.raises(StorageError, match=r"(deleted|replaced).* open it again"):
            act()


# Restore


@pytest.mark.parametrize("how", _COPIES)
def test_restore_after_a_killed_writer(tmp_path: Path, prefix: Path, how: str) -> None:
    backup = stale(tmp_path, prefix, how)
    prefix.with_name("memory.db").chmod(0o640)
    prefix.with_name("memory.snapshot").write_bytes(b"of the old store")
    aside = Records.restore(backup, prefix)
    assert aside is not None
    assert ids_at(prefix) == OLD
    assert ids_at(aside.with_suffix("")) == [*OLD, *NEW]
    assert prefix.with_name("memory.db").stat().st_mode & 0o777 == 0o640
    assert not prefix.with_name("memory.snapshot").exists()
    assert not list(tmp_path.glob("*.tmp*"))
    with Records.open(prefix) as restored, Records.open(aside.with_suffix("")) as old:
        assert restored.store_id != old.store_id


def test_restore_where_a_copy_already_went_wrong(tmp_path: Path, prefix: Path) -> None:
    backup = stale(tmp_path, prefix, "closed file")
    shutil.copyfile(backup, prefix.with_name("memory.db"))
    assert Records.restore(backup, prefix) is not None
    assert ids_at(prefix) == OLD
    assert list(tmp_path.glob("memory.replaced-*.db-wal"))


def test_restore_to_a_place_where_nothing_is(records: Records, tmp_path: Path) -> None:
    put(records, "a")
    records.backup(tmp_path / "backup.db")
    for number, name in enumerate(("backup.db", "backup")):
        assert Records.restore(tmp_path / name, tmp_path / f"new{number}") is None
        assert ids_at(tmp_path / f"new{number}") == ["a"]


def test_a_backup_of_the_first_version_is_restored(tmp_path: Path, prefix: Path) -> None:
    with zipfile.ZipFile(GOLDEN) as archive:
        (tmp_path / "backup.db").write_bytes(archive.read("exact.db"))
    assert Records.restore(tmp_path / "backup.db", prefix) is None
    assert len(ids_at(prefix)) > 50


def test_restore_refuses_while_others_have_the_store_open(tmp_path: Path, prefix: Path) -> None:
    with Records.open(prefix, dim=DIM) as records:
        put(records, "a")
        records.backup(tmp_path / "backup.db")
        with pytest.raises(StorageError, match="is open in another process, or in this one"):
            Records.restore(tmp_path / "backup.db", prefix)
    with another_process(lambda: held_open(prefix)):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(StorageError, match="is open in another process"):
            Records.restore(tmp_path / "backup.db", prefix)
        assert sorted(tmp_path.iterdir()) == before
    assert ids_at(prefix) == ["a", "held"]


@pytest.mark.parametrize("damage", ["torn", "row", "other program", "missing", "itself"])
def test_a_backup_that_cannot_be_trusted_is_refused(
    records: Records, tmp_path: Path, prefix: Path, damage: str
) -> None:
    for name in OLD:
        put(records, name)
    backup = records.backup(tmp_path / "backup.db")
    records.close()
    if damage == "torn":
        backup.write_bytes(backup.read_bytes()[:-8192])
    elif damage == "missing":
        backup.unlink()
    elif damage == "itself":
        backup = records.path
    else:
        backup.unlink() if damage == "other program" else None
        with foreign_connection(backup) as con:
            con.execute("CREATE TABLE x (y)" if damage == "other program" else "DELETE FROM vectors WHERE slot = 3")
    kind = {"torn": CorruptStoreError, "row": CorruptStoreError, "other program": NotAStoreError}
    with pytest.raises(kind.get(damage, StorageError)):
        Records.restore(backup, prefix)
    assert ids_at(prefix) == OLD
    assert not [one for one in tmp_path.iterdir() if "replaced" in one.name or "tmp" in one.name]


_CHANGES = ("os.link", "os.rename", "os.remove", "os.chmod")


@pytest.mark.slow
def test_restore_killed_at_any_step_leaves_one_whole_store(tmp_path: Path) -> None:
    """The child is killed before its n-th change of a name, for every n until it is not killed any more."""
    seen: set[str] = set()
    for step in range(1, 100):
        folder = tmp_path / str(step)
        folder.mkdir()
        prefix = folder / "memory"
        backup = stale(folder, prefix, "backup")

        def act(step: int = step, folder: Path = folder) -> None:
            left = step

            def count(event: str, _arguments: object) -> None:
                nonlocal left
                if event in _CHANGES:
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            Records.restore(folder / "backup.db", folder / "memory")
            (folder / "finished").touch()

        killed(act)
        found = ids_at(prefix)
        assert found in (OLD, [*OLD, *NEW])
        seen.add(found[-1])
        if found == OLD:
            (aside,) = folder.glob("memory.replaced-*.db")
            assert ids_at(aside.with_suffix("")) == [*OLD, *NEW]
        else:
            assert not list(folder.glob("memory.replaced-*"))
        assert Records.restore(backup, prefix) is not None
        assert ids_at(prefix) == OLD
        if (folder / "finished").exists():
            break
    assert step > 5
    assert seen == {OLD[-1], NEW[-1]}
