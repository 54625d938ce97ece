"""What the store says and does when the disk fails under it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from records_kit import DIM, Fault, facts, put, unit, vector

from memevolve_gpu import VectorStore
from memevolve_gpu.errors import ReadOnlyError, StorageError, StorageFullError
from memevolve_gpu.records import Records


@pytest.fixture
def store(prefix: Path, fault: Fault) -> Iterator[Records]:
    with Records.open(prefix, dim=DIM, vfs="faulty") as opened:
        put(opened, "a")
        yield opened
        fault.failing.clear()


def test_everything_goes_through_the_vfs(store: Records, fault: Fault) -> None:
    before = dict(fault.calls)
    put(store, "b")
    assert fault.calls["write"] > before["write"]
    assert fault.calls["sync"] == before["sync"] + 1
    assert list(store.ids()) == ["a", "b"]
    assert store.backup(store.path.with_name("copy")).exists()


def test_normal_durability_leaves_syncing_to_checkpoints(prefix: Path, fault: Fault) -> None:
    with Records.open(prefix, dim=DIM, durability="normal", vfs="faulty") as opened:
        put(opened, "a")
        before = fault.calls["sync"]
        put(opened, "b")
        assert fault.calls["sync"] == before
        opened.checkpoint()
        assert fault.calls["sync"] > before


@pytest.mark.parametrize(
    ("call", "error", "kind"),
    [
        ("write", apsw.FullError("disk full"), StorageFullError),
        ("write", OSError(errno.ENOSPC, "no space left"), StorageFullError),
        ("write", OSError(errno.EDQUOT, "quota exceeded"), StorageFullError),
        ("write", OSError(errno.EROFS, "read-only file system"), ReadOnlyError),
        ("write", apsw.IOError("broken"), StorageError),
        ("sync", apsw.IOError("broken"), StorageError),
        ("sync", OSError(errno.EIO, "input/output error"), StorageError),
    ],
)
def test_a_commit_that_fails_changes_nothing_and_the_next_succeeds(
    store: Records, fault: Fault, call: str, error: BaseException, kind: type[StorageError]
) -> None:
    before, units = store.head(), facts(store)
    fault.only = "-wal"
    fault.failing[call] = error
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            put(store, "b")
        assert type(caught.value) is kind
        assert str(store.path) in str(caught.value)
        assert store.head() == before
        assert facts(store) == units
    fault.failing.clear()
    put(store, "c")
    assert list(store.ids()) == ["a", "c"]
    assert store.check() == []


def test_a_bulk_write_that_overflows_the_disk_changes_nothing(store: Records, fault: Fault) -> None:
    fault.only = "-wal"
    fault.failing["write"] = apsw.FullError("disk full")
    with pytest.raises(StorageFullError, match="free disk space"), store.write() as tx:
        tx.put_many((unit(f"u{n}", content="x" * 3000), "x", vector(), f"u{n}") for n in range(9000))
    fault.failing.clear()
    assert list(store.ids()) == ["a"]
    put(store, "b")
    assert store.check() == []


def test_a_checkpoint_that_fails_loses_nothing(store: Records, fault: Fault, prefix: Path) -> None:
    fault.only = ".db"
    fault.failing["write"] = apsw.IOError("broken")
    put(store, "b")
    with pytest.raises(StorageError):
        store.checkpoint()
    assert list(store.ids()) == ["a", "b"]
    fault.failing.clear()
    put(store, "c")
    store.checkpoint()
    assert store.file_bytes()["wal"] == 0
    assert list(store.ids()) == ["a", "b", "c"]
    assert store.check() == []


def test_a_read_that_fails_is_told_and_the_next_succeeds(store: Records, fault: Fault, prefix: Path) -> None:
    store.checkpoint()
    store.close()
    with Records.open(prefix, vfs="faulty") as opened:
        fault.failing["read"] = apsw.IOError("broken")
        with pytest.raises(StorageError, match="system log"):
            opened.get("a")
        with pytest.raises(StorageError):
            opened.matching({"content": "x"})
        fault.failing.clear()
        assert opened.get("a") == unit("a")
        assert opened.matching({"type": "lesson"}).tolist() == [1]


def test_opening_on_a_failing_disk_is_told(prefix: Path, fault: Fault) -> None:
    fault.failing["write"] = apsw.FullError("disk full")
    with pytest.raises(StorageFullError):
        Records.open(prefix, dim=DIM, vfs="faulty")
    fault.failing.clear()
    with Records.open(prefix, dim=DIM, vfs="faulty") as opened:
        put(opened, "a")
        assert opened.check() == []


def test_a_full_disk_that_takes_no_name_of_a_holder_keeps_nobody_from_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deletes and maintenance make room; a new lock file has no block for the process id yet."""
    with VectorStore(tmp_path / "m", None, 2, storage_config={"background": False}) as store:
        store.store_batch([{"id": "a", "content": "x"}, {"id": "b", "content": "y"}], [[1.0, 0.0], [0.0, 1.0]])
    for name in ("m.lock", "m.maintenance.lock"):
        (tmp_path / name).unlink(missing_ok=True)

    def full(*_given: object) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    with VectorStore(tmp_path / "m", None, 2, storage_config={"background": False}) as store:
        monkeypatch.setattr(os, "pwrite", full)
        assert store.delete("a")
        assert store.run_maintenance()["actions"] is not None
        assert store.count() == 1
