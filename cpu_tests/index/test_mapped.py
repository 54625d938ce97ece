"""Vectors mapped from a file: read in place, lengthened in memory, whole whatever happens to the file's name."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import KINDS, check_answer, clustered, index_of, rows_of
from support import as_child

from memevolve_gpu.index.base import Index
from memevolve_gpu.index.snapshot_file import SnapshotInfo, read_snapshot, write_snapshot
from memevolve_gpu.index.vector_table import grown, in_memory, lengthened, mapped
from memevolve_gpu.types import FloatArray, SearchParams

N, DIM = 1000, 33  # rows that end within a page


def file_of(path: Path, rows: FloatArray, before: int = mmap.PAGESIZE, after: bytes = b"\xff" * 10_000) -> Path:
    path.write_bytes(bytes(before) + rows.tobytes() + after)
    return path


def map_of(path: Path, rows: FloatArray, offset: int = mmap.PAGESIZE) -> FloatArray:
    with path.open("rb") as file:
        return mapped(file.fileno(), offset, rows.shape, np.float32)


@pytest.mark.parametrize("after", [b"", b"\xff" * 10_000], ids=["at the end of the file", "within the file"])
def test_rows_are_those_of_the_file_and_grow_in_memory(tmp_path: Path, rows: FloatArray, after: bytes) -> None:
    path = file_of(tmp_path / "rows", rows, after=after)
    held = map_of(path, rows)
    assert np.array_equal(held, rows)
    assert in_memory(held) == 0
    longer = grown(held, rows[:100])
    assert np.shares_memory(held, longer)
    assert np.array_equal(longer, np.concatenate([rows, rows[:100]]))
    assert in_memory(longer) == rows[:100].nbytes
    assert path.read_bytes() == bytes(mmap.PAGESIZE) + rows.tobytes() + after, "the file is never written to"
    twice = lengthened(longer, 2 * N)  # more than there is room for: mapped again, and the rest copied
    assert not np.shares_memory(twice, longer)
    assert np.array_equal(twice[: N + 100], longer)
    assert in_memory(twice) == twice.nbytes - rows.nbytes, "the rows of the file stay there"


def test_what_is_written_stays_in_this_process(tmp_path: Path, rows: FloatArray) -> None:
    path = file_of(tmp_path / "rows", rows)
    held, other = map_of(path, rows), map_of(path, rows)

    def write() -> None:
        held[:] = 7
        more = grown(held, rows[:9])
        assert (more[:N] == 7).all()
        assert np.array_equal(more[N:], rows[:9])

    assert as_child(write) == 0
    assert np.array_equal(held, rows)
    held[3] = 0
    assert np.array_equal(other, rows)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_is_gone_is_still_mapped(tmp_path: Path, rows: FloatArray, how: str) -> None:
    path = file_of(tmp_path / "rows", rows)
    held = map_of(path, rows)
    if how == "deleted":
        path.unlink()
    else:
        file_of(tmp_path / "new", rows[:1]).replace(path)
    assert np.array_equal(held, rows)


def test_rows_beyond_the_end_of_the_file_are_not_mapped(tmp_path: Path, rows: FloatArray) -> None:
    path = file_of(tmp_path / "rows", rows, after=b"")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match="cannot be mapped"):
        map_of(path, rows)
    with pytest.raises(OSError, match="cannot be mapped"):
        map_of(file_of(tmp_path / "odd", rows, before=8), rows, offset=8)


def test_no_rows(tmp_path: Path) -> None:
    none = np.empty((0, DIM), np.float32)
    held = map_of(file_of(tmp_path / "rows", none), none)
    assert held.shape == (0, DIM)
    assert grown(held, np.ones((3, DIM), np.float32)).tolist() == [[1.0] * DIM] * 3


def saved(path: Path, index: Index) -> Index:
    write_snapshot(path, index, SnapshotInfo("s", 1, 1, index.n, index.plan, index.metric, DIM, 0.0, 7))
    return read_snapshot(path, store_id="s", dim=DIM, metric=index.metric)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_answers_the_same_from_the_file(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    vectors = clustered(rng, N, DIM, "l2")
    index = index_of(kind, vectors[:800], "l2")
    param_sets = (SearchParams(), SearchParams(exact=True))
    before = [index.search(vectors[:20], 5, params) for params in param_sets]
    again = saved(tmp_path / "s", index)
    held = 0 if kind == "hnsw" else vectors[:800].nbytes  # a graph keeps its vectors
    assert (index.mapped_bytes, again.mapped_bytes) == (held, held)
    assert index.nbytes == again.nbytes
    for one in (index, again):
        for params, (distances, positions) in zip(param_sets, before, strict=True):
            found = one.search(vectors[:20], 5, params)
            assert np.array_equal(found[0], distances)
            assert np.array_equal(found[1], positions)
    rest = rows_of(vectors)
    first = int(rest.id_ends[799])
    more = again.extended(
        type(rest)(rest.slots[800:], rest.id_bytes[first:], rest.id_ends[800:] - first, rest.vectors[800:])
    )
    assert more is not None
    assert more.mapped_bytes == held
    check_answer(more, vectors[::50], vectors, more.search(vectors[::50], 5, SearchParams(exact=True)))


def test_a_snapshot_is_replaced_under_a_body_that_reads_from_it(tmp_path: Path, rng: np.random.Generator) -> None:
    vectors, others = clustered(rng, N, DIM, "l2"), clustered(rng, 300, DIM, "l2")
    first = saved(tmp_path / "s", index_of("two_stage", vectors, "l2"))
    saved(tmp_path / "s", index_of("exact", others, "l2"))
    assert np.array_equal(first.vectors, vectors)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_is_read_and_dropped_leaves_no_memory_behind(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    dim, times = 512, 10
    index = index_of(kind, clustered(rng, N, dim, "l2"), "l2")
    write_snapshot(tmp_path / "s", index, SnapshotInfo("s", 1, 1, N, index.plan, index.metric, dim, 0.0, 7))
    for turn in range(times + 2):
        if turn == 2:
            before = resident_bytes()
        read_snapshot(tmp_path / "s", store_id="s", dim=dim, metric="l2")
        gc.collect()
    assert resident_bytes() - before < times * N * dim * 4 / 4, "a quarter of the vectors that were read"


def test_where_nothing_can_be_mapped_rows_are_read(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError("no such thing on this file system")

    monkeypatch.setattr("memevolve_gpu.index.snapshot_file.mapped", refuse)
    vectors = clustered(rng, N, DIM, "l2")
    index = index_of("exact", vectors, "l2")
    again = saved(tmp_path / "s", index)
    assert (index.mapped_bytes, again.mapped_bytes) == (0, 0)
    assert np.array_equal(again.vectors, vectors)
