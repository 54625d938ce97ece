"""How much disk a build takes: the vectors that wait are not there twice, and a full disk loses nothing."""

from __future__ import annotations

import gc
import os
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import nameless

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.index import spill, vector_table
from memevolve_gpu.live import delta_buffer
from memevolve_gpu.live.snapshot_writer import Saver
from memevolve_gpu.types import FloatArray

N, DIM, CHUNK = 4000, 32, 256


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks in spills."""
    monkeypatch.setattr(vector_table, "SPILLED_BYTES", 10_000)
    monkeypatch.setattr(delta_buffer, "LARGEST_CHUNK", CHUNK)
    monkeypatch.setattr(delta_buffer, "SMALLEST_CHUNK", CHUNK)


@pytest.fixture
def vectors(rng: np.random.Generator) -> FloatArray:
    return rng.standard_normal((N, DIM)).astype(np.float32)


def opened(folder: Path, **settings: Any) -> VectorStore:
    config = StorageConfig(**{"background": False, "min_training_units": 100, "max_memory_units": 2 * N} | settings)
    return VectorStore(str(folder / "m"), None, DIM, storage_config=config)


def store_rows(store: VectorStore, vectors: FloatArray, start: int = 0) -> None:
    units = [{"id": f"u{start + i}", "type": "skill", "content": "x"} for i in range(len(vectors))]
    store.store_batch(units, vectors)


def assert_found(store: VectorStore, vectors: FloatArray, gone: int | None = None) -> None:
    """Each vector finds its own unit, and the one that is gone finds another."""
    _, ids = store.search_vectors(vectors, 1, recall=1.0)
    assert [at for at, found in enumerate(ids) if found != [f"u{at}"]] == ([] if gone is None else [gone])
    assert store.count() == len(vectors) - (gone is not None)


def bytes_without_names(folder: Path) -> int:
    return sum(512 * facts.st_blocks for facts in nameless(folder))


@pytest.mark.parametrize("index_type", ["flat", "ivf", "auto"])
def test_a_first_build_holds_the_vectors_once(
    index_type: str, tmp_path: Path, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it writes the snapshot, there is no second file of them, nor a third afterwards."""
    sizes: list[int] = []
    real = Saver.save

    def save(self: Saver) -> None:
        gc.collect()
        sizes.append(bytes_without_names(tmp_path) - before)
        real(self)
        sizes.append(bytes_without_names(tmp_path) - before)

    before = bytes_without_names(tmp_path)
    monkeypatch.setattr(Saver, "save", save)
    with opened(tmp_path, index_type=index_type) as store:
        store_rows(store, vectors)
        store.run_maintenance()
        assert_found(store, vectors)
    assert sizes[0] <= vectors.nbytes + 2 * CHUNK * DIM * 4
    assert sizes[1] <= CHUNK * DIM * 4


def test_waiting_rows_move_while_they_are_gathered(
    tmp_path: Path, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment of the gathering are there two of more than a chunk of them."""
    peaks: list[int] = []
    real = delta_buffer.DeltaBuffer.share

    def share(self: delta_buffer.DeltaBuffer, *given: Any, **named: Any) -> None:
        peaks.append(bytes_without_names(tmp_path) - before)
        real(self, *given, **named)

    with opened(tmp_path, index_type="flat") as store:
        store_rows(store, vectors)
        before = bytes_without_names(tmp_path)
        monkeypatch.setattr(delta_buffer.DeltaBuffer, "share", share)
        store.run_maintenance()
        assert len(peaks) == -(-N // CHUNK)
        assert max(peaks) <= 2 * CHUNK * DIM * 4
        assert_found(store, vectors)


def test_the_view_before_is_let_go_before_the_snapshot(
    tmp_path: Path, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[bool] = []
    with opened(tmp_path, index_type="ivf") as store:
        store_rows(store, vectors[:2000])
        store.run_maintenance()
        old = weakref.ref(store._open.live.view.index)
        monkeypatch.setattr(Saver, "save", lambda _self: alive.append(old() is not None))
        store_rows(store, vectors[2000:], 2000)
        store.run_maintenance()
        assert alive[0] is False
        assert_found(store, vectors)
        monkeypatch.undo()


@pytest.mark.parametrize("left", [0, 3, 9])
@pytest.mark.parametrize("dead", [None, 5])
@pytest.mark.parametrize("saved", [0, 1500])
def test_a_disk_that_fills_up_while_rows_are_gathered(
    saved: int, dead: int | None, left: int, tmp_path: Path, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the rest of the rows is in memory; every search finds what it found."""
    with opened(tmp_path, index_type="flat") as store:
        if saved:
            store_rows(store, vectors[:saved])
            store.run_maintenance()
        store_rows(store, vectors[saved:], saved)
        if dead is not None:
            store.delete(f"u{saved + dead}")
        real, calls = os.posix_fallocate, iter(range(left))

        def reserve(file: int, start: int, size: int) -> None:
            if next(calls, None) is None:
                raise OSError(28, "no space left on device")
            real(file, start, size)

        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", reserve)
            store.run_maintenance()
            assert_found(store, vectors, None if dead is None else saved + dead)
        store.run_maintenance()
        assert_found(store, vectors, None if dead is None else saved + dead)
    with opened(tmp_path, index_type="flat") as store:
        assert_found(store, vectors, None if dead is None else saved + dead)


def test_room_for_a_copy_of_the_older_snapshot_is_kept(
    tmp_path: Path, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot copies the rows of the one before; those of its own file it has already."""
    room = types.SimpleNamespace(f_frsize=1, f_bavail=10**12)
    monkeypatch.setattr(os, "fstatvfs", lambda _file: room)
    array = vector_table.growable(vectors.shape, np.float32, tmp_path)
    room.f_bavail = spill.KEPT_FREE + 2 * vectors.nbytes
    assert vector_table.in_memory(vector_table.grown(array, vectors[:10])) == 0
    (tmp_path / "rows").write_bytes(vectors.tobytes())
    with (tmp_path / "rows").open("rb") as file:
        array = vector_table.mapped(file.fileno(), 0, vectors.shape, np.float32, tmp_path)
    room.f_bavail = spill.KEPT_FREE + vectors.nbytes
    assert vector_table.in_memory(vector_table.grown(array, vectors[:10])) > 0
