"""Rows of large arrays lie in files without names: the same rows, no memory of the process, and no trace left."""

from __future__ import annotations

import errno
import os
import types
from pathlib import Path

import numpy as np
import pytest
from support import as_child

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.index import spill, vector_table
from memevolve_gpu.index.vector_table import growable, grown, in_memory, lengthened, mapped
from memevolve_gpu.types import FloatArray

pytestmark = pytest.mark.usefixtures("spilling")
N, DIM = 1000, 33


def start(kind: str, folder: Path, rows: FloatArray) -> FloatArray:
    """An array of ``rows`` whose later rows are spilled to ``folder``."""
    if kind == "growable":
        array = growable(rows.shape, np.float32, folder)
        array[:] = rows
        return array
    (folder / "file").write_bytes(rows.tobytes())
    with (folder / "file").open("rb") as file:
        array = mapped(file.fileno(), 0, rows.shape, np.float32, folder)
    (folder / "file").unlink()
    return array


KINDS = pytest.mark.parametrize("kind", ["growable", "mapped"])


@KINDS
def test_rows_take_no_memory_and_leave_no_name(kind: str, tmp_path: Path, rows: FloatArray) -> None:
    array = start(kind, tmp_path, rows)
    longer = grown(array, rows[:100])
    assert np.shares_memory(array, longer)
    copy = lengthened(longer, 2 * N)
    assert not np.shares_memory(copy, longer)
    assert np.array_equal(array, rows)
    assert np.array_equal(longer, np.concatenate([rows, rows[:100]]))
    assert np.array_equal(copy[: len(longer)], longer)
    assert [in_memory(one) for one in (array, longer, copy)] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


@KINDS
def test_a_small_array_that_grows_large_is_spilled_too(kind: str, tmp_path: Path, rows: FloatArray) -> None:
    """As in a store that was opened from a small snapshot and then loaded in bulk."""
    array = start(kind, tmp_path, rows[:70])
    assert array.nbytes < vector_table.SPILLED_BYTES
    longer = grown(array, rows[70:])
    assert np.array_equal(longer, rows)
    assert in_memory(longer) == 0


@KINDS
@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_full_disk_keeps_the_rows_in_memory(
    kind: str, when: str, tmp_path: Path, rows: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    if when == "at once":
        monkeypatch.setattr(os, "posix_fallocate", full)
        array = start(kind, tmp_path, rows)
    else:
        array = start(kind, tmp_path, rows)
        monkeypatch.setattr(os, "posix_fallocate", full)
    longer = grown(array, rows[:100])
    assert np.array_equal(longer, np.concatenate([rows, rows[:100]]))
    assert in_memory(longer) == (longer.nbytes if kind == "growable" else rows[:100].nbytes)
    assert np.array_equal(array, rows)


@KINDS
def test_a_disk_with_little_room_is_left_to_the_records(
    kind: str, tmp_path: Path, rows: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spill is derived: it must not take the last room of the store, nor of the snapshot that takes its place."""
    room = types.SimpleNamespace(f_frsize=1, f_bavail=0)
    monkeypatch.setattr(os, "fstatvfs", lambda _file: room)
    copied = rows.nbytes if kind == "mapped" else 0
    needed = spill.KEPT_FREE + copied + (rows.nbytes + rows[:100].nbytes) // 4 + rows[:100].nbytes
    for free, expected in ((needed, True), (needed - 20_000, False)):  # its first page may be of the file
        room.f_bavail = 10**12
        array = start(kind, tmp_path, rows)
        room.f_bavail = free
        longer = grown(array, rows[:100])
        assert np.array_equal(longer, np.concatenate([rows, rows[:100]]))
        assert (in_memory(longer) == 0) is expected


@KINDS
def test_a_folder_that_takes_no_file_keeps_the_rows_in_memory(kind: str, tmp_path: Path, rows: FloatArray) -> None:
    array = start(kind, tmp_path, rows)
    (tmp_path / "gone").mkdir()
    elsewhere = growable(rows.shape, np.float32, tmp_path / "gone" / "missing")
    elsewhere[:] = array
    assert np.array_equal(elsewhere, rows)
    assert in_memory(elsewhere) == rows.nbytes


@KINDS
def test_a_forked_child_does_not_write_where_its_parent_will(kind: str, tmp_path: Path, rows: FloatArray) -> None:
    array = start(kind, tmp_path, rows)
    read, write = os.pipe()

    def extend() -> None:
        mine = grown(array, np.full((50, DIM), 7, np.float32))
        os.write(write, b"x")
        assert (mine[N:] == 7).all()
        assert np.array_equal(mine[:N], rows)

    longer = grown(array, rows[:20])
    assert as_child(extend) == 0
    assert os.read(read, 1) == b"x"
    assert np.array_equal(longer[N:], rows[:20])
    other = start(kind, tmp_path, rows)

    def extend_other() -> None:
        assert (grown(other, np.full((50, DIM), 7, np.float32))[N:] == 7).all()

    assert as_child(extend_other) == 0
    assert np.array_equal(grown(other, rows[:20])[N:], rows[:20])
    os.close(read)
    os.close(write)


def test_a_store_read_from_its_records_holds_its_vectors_in_no_memory(tmp_path: Path, rng: np.random.Generator) -> None:
    n, dim = 3000, 64
    vectors = rng.standard_normal((n, dim)).astype(np.float32)
    config = StorageConfig(index_type="flat", min_training_units=10**6)
    prefix = tmp_path / "m"
    with VectorStore(str(prefix), None, dim, storage_config=config) as store:
        store.store_batch([{"id": f"u{i}", "type": "skill", "content": "x"} for i in range(n)], vectors)
    for path in tmp_path.glob("m.snapshot*"):
        path.unlink()
    with VectorStore(str(prefix), None, dim, storage_config=config) as store:
        health = store.get_storage_health()
        assert health["memory_usage_mb"] * 2**20 < vectors.nbytes / 2
        distances, ids = store.search_vectors(vectors[::300], 1)
        assert [one[0] for one in ids] == [f"u{i}" for i in range(0, n, 300)]
        assert distances.max() < 1e-4
