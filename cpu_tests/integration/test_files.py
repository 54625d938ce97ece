"""The files of a store: who may read them, and what killed processes leave."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks
from support import HANGS, FakeBatchEmbedder
from typer.testing import CliRunner

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.cli import app
from memevolve_gpu.errors import NotAStoreError, StorageError
from memevolve_gpu.utils.drafts import draft_of, remove_abandoned_drafts

DIM = 8


def opened(prefix: Path, **settings: object) -> VectorStore:
    config = StorageConfig(background=False, **settings)
    return VectorStore(prefix, FakeBatchEmbedder(DIM), DIM, storage_config=config)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def modes(folder: Path) -> dict[str, int]:
    return {one.name: one.stat().st_mode & 0o777 for one in folder.iterdir()}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o644])
def test_every_file_of_a_store_has_the_mode_of_its_database(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with opened(tmp_path / "store", file_mode=mode) as store:
            store.store_batch([{"id": str(n), "content": f"text {n}"} for n in range(20)])
            store.run_maintenance()
            store.snapshot()
            store.backup(tmp_path / "copy.db")
            while_open = modes(tmp_path)
        assert {"store.db", "store.db-wal", "store.db-shm", "store.lock", "store.snapshot", "copy.db"} <= set(
            while_open
        )
        assert set(while_open.values()) == {mode}
        arguments = ["export", str(tmp_path / "units.jsonl"), "--store", str(tmp_path / "store")]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        VectorStore.restore(tmp_path / "copy.db", tmp_path / "store")
        VectorStore.restore(tmp_path / "copy.db", tmp_path / "new")
        assert set(modes(tmp_path).values()) == {mode}
    finally:
        os.umask(before)


def test_a_store_that_exists_keeps_its_mode_and_its_locks_follow_it(tmp_path: Path) -> None:
    opened(tmp_path / "store").close()
    assert set(modes(tmp_path).values()) == {0o600}
    (tmp_path / "store.db").chmod(0o640)
    with opened(tmp_path / "store", file_mode="0600") as store:
        store.store({"content": "text"})
        store.run_maintenance()
    assert set(modes(tmp_path).values()) == {0o640}


def killed_in(commands: Forks, folder: Path, act: str) -> list[str]:
    """What a process leaves in ``folder`` that is killed while it writes a draft."""
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from memevolve_gpu.index import snapshot_file
from memevolve_gpu.records import backup
from memevolve_gpu.cli import files
from support import FakeBatchEmbedder
from memevolve_gpu import StorageConfig, VectorStore
def killed(*_args, **_named):
    os.kill(os.getpid(), signal.SIGKILL)
folder = Path({str(folder)!r})
{act}
"""
    before = set(names(folder))
    done = commands(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return sorted(name for name in set(names(folder)) - before if ".tmp" in name)


STORE = 'store = VectorStore(folder / "store", FakeBatchEmbedder(8), 8, storage_config=StorageConfig(background=False))'


def test_what_killed_writers_left_is_removed_at_the_next_opening(tmp_path: Path, commands: Forks) -> None:
    with opened(tmp_path / "store") as store:
        store.store_batch([{"id": str(n), "content": f"text {n}"} for n in range(20)])
        store.backup(tmp_path / "copy.db")
    restore = 'VectorStore.restore(folder / "copy.db", folder / "store")'
    left = [
        *killed_in(commands, tmp_path, f"snapshot_file._write = killed\n{STORE}\nstore.snapshot()"),
        *killed_in(commands, tmp_path, f"backup._rename = killed\n{restore}"),
        *killed_in(commands, tmp_path, f"backup.sync_folder = killed\n{restore}"),
    ]
    assert len([name for name in left if name.endswith(".tmp")]) == 3
    foreign = ["store.tmp", "store.db.1.tmp", "other.db.12.0123abcd.tmp", "store.db.old.0123abcd.tmp"]
    for name in foreign:
        (tmp_path / name).touch()
    with opened(tmp_path / "store") as store:
        assert store.count() == 20
        assert not store.check()
        assert [name for name in names(tmp_path) if ".tmp" in name] == sorted(foreign)


def test_what_killed_backups_and_exports_left_goes_when_they_are_made_again(tmp_path: Path, commands: Forks) -> None:
    with opened(tmp_path / "store") as store:
        store.store({"content": "text"})
        target = tmp_path / "away"
        target.mkdir()
        make = f'{STORE}\nfolder = folder / "away"\n'
        backup = f'import os; os.link = killed\n{make}store.backup(folder / "copy.db")'
        export = f'files._write_to = killed\n{make}files.write_lines(str(folder / "e.jsonl"), ["{{}}"], print)'
        for act in (backup, export):
            killed_in(commands, tmp_path, act)
        assert len([name for name in names(target) if name.endswith(".tmp")]) == 2
        store.backup(target / "copy.db")
    arguments = ["export", str(target / "e.jsonl"), "--store", str(tmp_path / "store")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert names(target) == ["copy.db", "e.jsonl"]


def test_a_draft_that_cannot_be_removed_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock goes with it, so that the next opening finds it abandoned, also in the same process."""
    target = tmp_path / "copy.db"

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OSError, match="input/output"), draft_of(target) as draft:
        pass
    monkeypatch.undo()
    assert draft.path.exists()
    assert remove_abandoned_drafts([target]) == 1
    assert not draft.path.exists()


def test_the_draft_of_a_live_process_is_never_removed(tmp_path: Path) -> None:
    target = tmp_path / "store.snapshot"
    code = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from memevolve_gpu.utils.drafts import draft_of
with draft_of(Path({str(target)!r})) as draft:
    print(draft.path.name, flush=True)
    time.sleep(600)
"""
    with (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other,
        draft_of(target) as own,
    ):
        assert other.stdout is not None
        held = other.stdout.readline().strip()
        os.utime(tmp_path / held, (1, 1))
        opened(tmp_path / "store").close()
        assert {held, own.path.name} <= set(names(tmp_path))
        other.kill()
        other.wait()
        deadline = time.monotonic() + HANGS
        while (tmp_path / held).exists() and time.monotonic() < deadline:
            remove_abandoned_drafts([target])
        assert own.path.name in names(tmp_path)
        assert held not in names(tmp_path)
    assert own.path.name not in names(tmp_path)


def test_special_files_in_place_of_ours_neither_hang_nor_break_anything(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        store.store({"id": "a", "content": "text"})
    for ending in ("snapshot", "damage", "data", "maintenance.lock"):
        (tmp_path / f"store.{ending}").unlink(missing_ok=True)
        os.mkfifo(tmp_path / f"store.{ending}")
    with opened(tmp_path / "store") as store:
        assert store.count() == 1
        assert [unit_id for _, unit_id in store.search("text")] == ["a"]
        store.store({"id": "b", "content": "more"})
        assert store.get_storage_health()
        assert store.count() == 2
        assert store.check() is not None
    os.mkfifo(tmp_path / "pipe.db")
    with pytest.raises(NotAStoreError, match="no regular file"):
        opened(tmp_path / "pipe")
    os.mkfifo(tmp_path / "held.lock")
    with pytest.raises(StorageError):
        opened(tmp_path / "held")


@pytest.mark.parametrize("ending", ["db-wal", "db-shm", "lock"])
def test_a_special_file_that_the_store_cannot_do_without_is_named(tmp_path: Path, ending: str) -> None:
    with opened(tmp_path / "store") as store:
        store.store({"id": "a", "content": "text"})
    pipe = tmp_path / f"store.{ending}"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match=f"{pipe.name} is no regular file.*move it away"):
        opened(tmp_path / "store").store({"id": "b", "content": "more"})
    pipe.unlink()
    with opened(tmp_path / "store") as store:
        assert store.check() == []
        assert store.count() == 1


@pytest.mark.parametrize("in_its_place", [os.mkfifo, os.mkdir])
def test_maintenance_without_its_lock_file_is_refused_by_name(
    tmp_path: Path, in_its_place: Callable[[Path], None]
) -> None:
    """It never goes on without the lock, or two processes would maintain at once."""
    with opened(tmp_path / "store") as store:
        store.store({"id": "a", "content": "text"})
        in_its_place(tmp_path / "store.maintenance.lock")
        for call in (store.run_maintenance, store.snapshot):
            with pytest.raises(StorageError, match=r"maintenance\.lock"):
                call()
        assert store.store({"id": "b", "content": "more"}) == "b"
    (tmp_path / "store.maintenance.lock").rename(tmp_path / "aside")
    with opened(tmp_path / "store") as store:
        store.snapshot()
        assert store.check() == []
