"""Codes in pieces that indexes share: the candidates of one piece, no copy, and the same after a snapshot."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from oracle import clustered, contents, index_of, rows_of

from memevolve_gpu.errors import EngineError
from memevolve_gpu.index import codes, faiss_helpers, snapshot_file
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.codes import MOST_PIECES, Codes, with_room
from memevolve_gpu.index.faiss_helpers import in_one_piece, searched
from memevolve_gpu.index.sample import padded_columns
from memevolve_gpu.index.snapshot_file import SnapshotInfo, read_snapshot, write_snapshot
from memevolve_gpu.index.vector_table import in_memory
from memevolve_gpu.training.calibration import calibrate
from memevolve_gpu.types import FloatArray, Metric, Rows, SearchParams

DIM = 40
SIZES = ([700, 1], [700, 31, 33], [700, 300, 150, 70, 30, 10], [90, 700], [64, 64, 64, 64], [700, *[13] * 20])
"""Rows of the first index, and those that are added one after another."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "SMALL_ROWS", 0)


def trained(vectors: FloatArray, metric: Metric = "l2") -> Codes:
    return index_of("two_stage", vectors, metric)._codes.codes  # type: ignore[attr-defined,no-any-return]


def chain(vectors: FloatArray, sizes: list[int], metric: Metric = "l2") -> list[Codes]:
    """Codes of the first rows, then of more and more, each made of those before."""
    made, n = [trained(vectors[: sizes[0]], metric)], sizes[0]
    for size in sizes[1:]:
        n += size
        made.append(made[-1].extended(vectors[:n]))
    return made


def assert_like_one_piece(held: Codes, vectors: FloatArray, queries: FloatArray) -> None:
    whole = with_room(in_one_piece(held.trained), len(vectors))
    whole.add(padded_columns(vectors, held.columns))
    wide = padded_columns(queries, held.columns)
    far, found = searched(whole, wide, len(vectors), "a test")
    by_row = np.take_along_axis(far, np.argsort(found, axis=1), axis=1)
    for width in (1, 10, 77, len(vectors), len(vectors) + 5):
        nearest = held.nearest(queries, width)
        assert nearest.shape == (len(queries), width)
        assert (nearest[:, len(vectors) :] == -1).all()
        nearest = nearest[:, : len(vectors)]
        assert all(len(set(row)) == len(row) and min(row) >= 0 for row in nearest.tolist()), "each row once"
        assert np.array_equal(np.take_along_axis(by_row, nearest, axis=1), far[:, : nearest.shape[1]])


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_pieces_find_what_one_piece_finds(sizes: list[int], metric: Metric, rng: np.random.Generator) -> None:
    vectors, queries = clustered(rng, sum(sizes), DIM, metric), clustered(rng, 8, DIM, metric)
    for held in chain(vectors, sizes, metric):
        assert len(held._pieces) <= MOST_PIECES
        assert_like_one_piece(held, vectors[: held.n], queries)
        assert_like_one_piece(held, vectors[: held.n], queries[:1])


def test_longer_codes_share_the_memory_of_those_before(rng: np.random.Generator) -> None:
    first, second, third = chain(clustered(rng, 1000, DIM, "l2"), [700, 200, 100])
    assert [len(one._pieces) for one in (first, second, third)] == [1, 2, 3]
    assert third._pieces[0].engine is second._pieces[0].engine is first._pieces[0].engine
    assert third._pieces[1].engine is second._pieces[1].engine
    assert third.nbytes == pytest.approx(trained(clustered(rng, 1000, DIM, "l2")).nbytes, rel=0.1)


@pytest.mark.parametrize("kind", ["two_stage", "ivf"])
def test_a_snapshot_keeps_the_pieces(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 1003, DIM, "l2")
    index = in_pieces(kind, vectors)
    again = written(tmp_path / "m", index)
    names = {name for name in index.parts() if name.startswith(("faiss", "codes"))}
    assert len(names) == 3
    for name, array in contents(index).items():
        assert np.array_equal(array, contents(again)[name]), name
    for params in (SearchParams(rerank=40), SearchParams()):
        expected, found = (one.search(vectors[:20], 5, params) for one in (index, again))
        assert np.array_equal(expected[1], found[1])
    longer = again.extended(more_rows(index, vectors[:500]))
    assert longer is not None
    assert longer.search(vectors[:20], 2, SearchParams(rerank=40))[0].max() <= 1e-3, "each vector twice"


def test_pieces_that_contradict_the_rows_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    index = in_pieces("two_stage", clustered(rng, 1003, DIM, "l2"))
    parts = contents(index)
    del parts["faiss_2"]
    with pytest.raises(EngineError, match="rebuild"):
        Codes.from_parts(parts, "faiss", index.n, DIM, "l2")


def test_an_engine_is_written_and_read_piece_by_piece(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole it would take the memory of all codes once more, while an index of a large store is saved."""
    monkeypatch.setattr(faiss_helpers, "_PIECE", 1 << 14)
    monkeypatch.setattr(snapshot_file, "_LEAST_MAPPED", 1)
    index = index_of("two_stage", clustered(rng, 40_000, 8, "l2"), "l2")
    held = index._engine_bytes()
    assert held > 150_000
    tracemalloc.start()
    try:
        write_snapshot(tmp_path / "m", index, info_of(index))
        index.table.check()
        read_snapshot(tmp_path / "m", store_id="s", dim=8, metric="l2")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < held


def test_slots_and_ids_are_read_from_the_snapshot(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_file, "_LEAST_MAPPED", 1)
    vectors = clustered(rng, 1003, DIM, "l2")
    index = in_pieces("ivf", vectors)
    before, names = index.nbytes, index.ids_at(np.arange(index.n))
    again = written(tmp_path / "m", index)
    for one in (index, again):
        assert [in_memory(array) for array in (one.slots, one.id_bytes, one.id_ends, one.vectors)] == [0, 0, 0, 0]
        assert one.nbytes < before - 16 * one.n
        assert one.nbytes + one.mapped_bytes >= vectors.nbytes + 16 * one.n
        assert one.ids_at(np.arange(one.n)) == names
        assert np.array_equal(one.position_of(one.slots), np.arange(one.n))
    longer = again.extended(more_rows(index, vectors[:100]))
    assert longer is not None
    assert longer.ids_at(np.array([0, index.n - 1, index.n])) == [names[0], names[-1], names[0]]
    assert in_memory(longer.slots) == 8 * 100


def test_calibration_takes_little_memory(rng: np.random.Generator) -> None:
    """It kept the hits among every number of candidates, and put them together by a copy: 39 MB at any size."""
    index = index_of("two_stage", clustered(rng, 9_000, DIM, "l2"), "l2")
    tracemalloc.start()
    try:
        calibrate(index, seed=7)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20


def in_pieces(kind: str, vectors: FloatArray) -> Index:
    """An index whose codes lie in three pieces."""
    index = index_of(kind, vectors[:700], "l2")
    for start, end in ((700, 903), (903, len(vectors))):
        longer = index.extended(more_rows(index, vectors[start:end]))
        assert longer is not None
        index = longer
    return index


def more_rows(index: Index, vectors: FloatArray) -> Rows:
    rows = rows_of(vectors)
    return Rows(rows.slots + int(index.slots[-1]) + 1, rows.id_bytes, rows.id_ends, rows.vectors)


def info_of(index: Index) -> SnapshotInfo:
    return SnapshotInfo("s", 1, 1, index.n, index.plan, index.metric, index.dim, 0.0, 7)


def written(path: Path, index: Index) -> Index:
    write_snapshot(path, index, info_of(index))
    return read_snapshot(path, store_id="s", dim=index.dim, metric="l2")[0]
