"""A snapshot takes over the file in which its vectors lie: no copy of them, and whole or absent whatever happens."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import KINDS, clustered, index_of, rows_of
from support import as_child, nameless

from memevolve_gpu.index import snapshot_file, vector_table
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.registry import build
from memevolve_gpu.index.snapshot_file import SnapshotError, SnapshotInfo, read_snapshot, write_snapshot
from memevolve_gpu.index.vector_table import growable, grown, in_memory, lengthened
from memevolve_gpu.types import FloatArray, IndexPlan, Rows, SearchParams
from memevolve_gpu.utils.drafts import remove_abandoned_drafts

pytestmark = pytest.mark.usefixtures("spilling")
N, DIM = 3000, 33
FLAT = IndexPlan("exact", reason="a test")


def info_of(index: Index, generation: int) -> SnapshotInfo:
    return SnapshotInfo("s", generation, generation, index.n, index.plan, index.metric, DIM, 0.0, 7)


def spilled(folder: Path, rows: FloatArray) -> FloatArray:
    vectors = growable(rows.shape, np.float32, folder)
    vectors[:] = rows
    assert in_memory(vectors) == 0
    return vectors


def flat(vectors: FloatArray) -> Index:
    return build(FLAT, rows_of(vectors), "l2", seed=7)


def read(path: Path) -> tuple[Index, SnapshotInfo]:
    index, info = read_snapshot(path, store_id="s", dim=DIM, metric="l2")
    index.table.check()
    return index, info


@pytest.fixture(params=["all", "later"])
def index(request: pytest.FixtureRequest, tmp_path: Path, rows: FloatArray) -> Index:
    """An index whose rows lie in a spill; "later": those after the rows of an older snapshot, which is there."""
    if request.param == "all":
        return flat(spilled(tmp_path, rows))
    write_snapshot(tmp_path / "m", flat(rows[:1000]), info_of(flat(rows[:1000]), 1))
    opened, _ = read(tmp_path / "m")
    more = rows_of(rows[1000:])
    longer = opened.extended(Rows(more.slots + 10**6, more.id_bytes, more.id_ends, more.vectors))
    assert longer is not None
    assert in_memory(longer.vectors) == 0
    return longer


def test_the_file_of_the_rows_becomes_the_snapshot(index: Index, tmp_path: Path, rows: FloatArray) -> None:
    spill = vector_table._growable_of(index.vectors)
    assert spill is not None
    assert spill.spill is not None
    inode, before = os.fstat(spill.spill.file).st_ino, index.vectors
    write_snapshot(tmp_path / "m", index, info_of(index, 2), mode=0o640)
    facts = (tmp_path / "m").stat()
    assert (facts.st_ino, stat.S_IMODE(facts.st_mode)) == (inode, 0o640)
    assert facts.st_blocks * 512 <= facts.st_size + (1 << 16)
    again, info = read(tmp_path / "m")
    assert info.generation == 2
    assert [one.tolist() for one in (again.vectors, index.vectors, before)] == [rows.tolist()] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_rows_that_follow_do_not_touch_the_snapshot(index: Index, tmp_path: Path, rows: FloatArray) -> None:
    before = index.vectors
    write_snapshot(tmp_path / "m", index, info_of(index, 2))
    content = (tmp_path / "m").read_bytes()
    for array in (before, index.vectors):
        assert np.array_equal(grown(array, rows[:300]), np.concatenate([rows, rows[:300]]))
    assert (tmp_path / "m").read_bytes() == content


def test_an_index_with_rows_behind_it_is_copied(index: Index, tmp_path: Path, rows: FloatArray) -> None:
    longer = grown(index.vectors, rows[:30])
    assert np.shares_memory(longer, index.vectors)
    write_snapshot(tmp_path / "m", index, info_of(index, 2))
    assert np.array_equal(read(tmp_path / "m")[0].vectors, rows)
    assert np.array_equal(longer, np.concatenate([rows, rows[:30]]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_back(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    index = index_of(kind, spilled(tmp_path, clustered(rng, 1000, DIM, "l2")), "l2")
    before = index.search(index.vectors[:20].copy(), 5, SearchParams())
    write_snapshot(tmp_path / "m", index, info_of(index, 1))
    again, _ = read(tmp_path / "m")
    for one in (index, again):
        found = one.search(index.vectors[:20].copy(), 5, SearchParams())
        assert [part.tolist() for part in found] == [part.tolist() for part in before]


STEPS: list[tuple[Any, str]] = [
    (os, "posix_fallocate"),
    (snapshot_file, "_write"),
    (os, "fsync"),
    (os, "fchmod"),
    (os, "link"),
    (Path, "replace"),
    (snapshot_file, "sync_folder"),
    (snapshot_file, "_map"),
]


def at_step(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], object], *, after: bool) -> None:
    real = getattr(owner, name)

    def call(*given: Any, **named: Any) -> Any:
        done = real(*given, **named) if after else None
        act()
        return done if after else real(*given, **named)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_killed_at_any_step_the_old_or_the_new_one_is_there(
    owner: Any, name: str, after: bool, tmp_path: Path, rows: FloatArray
) -> None:
    write_snapshot(tmp_path / "m", flat(rows[:500]), info_of(flat(rows[:500]), 1))

    def act() -> None:
        index = flat(spilled(tmp_path, rows))
        with pytest.MonkeyPatch.context() as patched:
            at_step(patched, owner, name, lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)
            write_snapshot(tmp_path / "m", index, info_of(index, 2))

    assert as_child(act) not in (0, 1), "the child was killed"
    index, info = read(tmp_path / "m")
    assert np.array_equal(index.vectors, rows if info.generation == 2 else rows[:500])
    visible = name in ("sync_folder", "_map") or (name == "replace" and after)
    assert info.generation == (2 if visible else 1)
    remove_abandoned_drafts([tmp_path / "m"])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("owner", "name"), STEPS[:3], ids=[name for _, name in STEPS[:3]])
def test_a_full_disk_keeps_the_old_one_and_gives_back_the_room(
    owner: Any, name: str, code: int, index: Index, tmp_path: Path, rows: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (tmp_path / "m").read_bytes() if (tmp_path / "m").exists() else None
    blocks = sum(facts.st_blocks for facts in nameless(tmp_path))

    def full() -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        at_step(patched, owner, name, full, after=True)
        with pytest.raises(SnapshotError, match="free space or check permissions"):
            write_snapshot(tmp_path / "m", index, info_of(index, 2))
    assert ((tmp_path / "m").read_bytes() if (tmp_path / "m").exists() else None) == old
    assert len(list(tmp_path.iterdir())) == (old is not None)
    assert sum(facts.st_blocks for facts in nameless(tmp_path)) <= blocks + 32
    assert np.array_equal(index.vectors, rows)
    longer = lengthened(index.vectors, 10)
    longer[N:] = rows[:10]
    assert np.shares_memory(longer, index.vectors)
    assert np.array_equal(longer, np.concatenate([rows, rows[:10]]))


def test_after_a_full_disk_the_next_one_takes_over(
    index: Index, tmp_path: Path, rows: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patched:
        at_step(patched, snapshot_file, "_write", full, after=True)
        with pytest.raises(SnapshotError):
            write_snapshot(tmp_path / "m", index, info_of(index, 2))
    inodes = {facts.st_ino for facts in nameless(tmp_path)}
    write_snapshot(tmp_path / "m", index, info_of(index, 3))
    assert (tmp_path / "m").stat().st_ino in inodes
    assert np.array_equal(read(tmp_path / "m")[0].vectors, rows)


def test_a_forked_child_copies_and_reads_on(index: Index, tmp_path: Path, rows: FloatArray) -> None:
    inodes = {facts.st_ino for facts in nameless(tmp_path)}
    ready, go = os.pipe(), os.pipe()

    def act() -> None:
        write_snapshot(tmp_path / "child", index, info_of(index, 5))
        assert (tmp_path / "child").stat().st_ino not in inodes
        assert np.array_equal(read(tmp_path / "child")[0].vectors, rows)

    vectors = index.vectors

    def read_on() -> None:
        os.write(ready[1], b"x")
        assert os.read(go[0], 1) == b"x"
        assert np.array_equal(vectors, rows)

    assert as_child(act) == 0
    assert np.array_equal(vectors, rows)
    pid = os.fork()
    if not pid:
        try:
            read_on()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.read(ready[0], 1) == b"x"
    write_snapshot(tmp_path / "m", index, info_of(index, 2))
    assert (tmp_path / "m").stat().st_ino in inodes
    os.write(go[1], b"x")
    assert os.waitpid(pid, 0)[1] == 0
    for end in (*ready, *go):
        os.close(end)


@pytest.fixture(params=["no file without a name", "no second name", "no /proc"])
def lacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that lacks what a snapshot needs to take over a file."""
    real = os.open

    def opened(path: Any, flags: int, *given: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(path, flags, *given, **named)

    def refused(*_given: Any, **_named: Any) -> None:
        code = errno.EPERM if request.param == "no second name" else errno.ENOENT
        raise OSError(code, os.strerror(code))

    if request.param == "no file without a name":
        monkeypatch.setattr(os, "open", opened)
    else:
        monkeypatch.setattr(os, "link", refused)


@pytest.mark.usefixtures("lacking")
def test_without_the_feature_the_rows_are_copied(index: Index, tmp_path: Path, rows: FloatArray) -> None:
    inodes = {facts.st_ino for facts in nameless(tmp_path)}
    write_snapshot(tmp_path / "m", index, info_of(index, 2))
    assert (tmp_path / "m").stat().st_ino not in inodes
    again, info = read(tmp_path / "m")
    assert info.generation == 2
    assert np.array_equal(again.vectors, rows)
    assert np.array_equal(index.vectors, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
