"""An index with more rows: made beside the old one, which does not notice, and worth as much as one built again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from oracle import (
    EVERY_KIND,
    KINDS,
    TORCH_KINDS,
    WAYS,
    check_answer,
    clustered,
    contents,
    index_of,
    nearest,
    pairs,
    recall,
    rows_of,
)

from memevolve_gpu.errors import EngineError
from memevolve_gpu.index import ivf
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.registry import build
from memevolve_gpu.index.snapshot_file import SnapshotInfo, read_snapshot, write_snapshot
from memevolve_gpu.index.vector_table import growable, grown, lengthened
from memevolve_gpu.planner.device_plan import plan_bytes
from memevolve_gpu.types import FloatArray, Metric, Precision, Rows, SearchParams

N, M, DIM = 1500, 333, 40
TRY = SearchParams(nprobe=16, rerank=100, ef=64)
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
CASES = [(kind, metric, "float32") for kind, metric in pairs(WAYS)]
CASES += [(kind, metric, p) for turn, p in enumerate(PRECISIONS[1:]) for kind, metric in pairs(TORCH_KINDS, turn)]


def cut(rows: Rows, start: int, end: int) -> Rows:
    """Rows ``start`` to ``end`` (exclusive) as a table of their own."""
    first = int(rows.id_ends[start - 1]) if start else 0
    ends = rows.id_ends[start:end] - first
    text = rows.id_bytes[first : first + (int(ends[-1]) if len(ends) else 0)]
    return Rows(rows.slots[start:end], text, ends, rows.vectors[start:end])


def raw(index: Index) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in contents(index).items()}


def answers(index: Index, queries: FloatArray) -> list[bytes]:
    found = [index.search(queries, 9, params) for params in (TRY, SearchParams(), SearchParams(exact=True))]
    return [array.tobytes() for pair in found for array in pair]


@pytest.mark.parametrize(("kind", "metric", "precision"), CASES)
def test_old_rows_then_new_ones(kind: str, metric: Metric, precision: Precision, rng: np.random.Generator) -> None:
    vectors, queries = clustered(rng, N + M, DIM, metric), clustered(rng, 30, DIM, metric)
    rows = rows_of(vectors)
    old = index_of(kind, vectors[:N], metric, precision)
    before, answered = raw(old), answers(old, queries)
    new = old.extended(cut(rows, N, N + M))
    assert new is not None
    assert (new.n, new.kind, new.nlist) == (N + M, old.kind, old.nlist)
    assert replace(new.plan, device_bytes=0) == replace(old.plan, device_bytes=0)
    assert np.array_equal(new.slots, rows.slots)
    assert new.ids_at(np.array([0, N - 1, N, N + M - 1])) == [f"unit-é-{i}" for i in (0, N - 1, N, N + M - 1)]
    for params, least in ((TRY, 0.95), (SearchParams(exact=True), 1.0)):
        answer = new.search(queries, 10, params)
        check_answer(new, queries, vectors, answer)
        assert recall(answer[0], nearest(queries, vectors, metric, 10)) >= least
    fresh = index_of(kind, vectors, metric, precision)
    assert np.array_equal(new.vectors, fresh.vectors)
    for name in ("vectors", "slots", "id_bytes", "id_ends"):
        assert np.array_equal(contents(new).get(name, 0), contents(fresh).get(name, 0)), name
    assert raw(old) == before
    assert answers(old, queries) == answered


@pytest.mark.parametrize("kind", WAYS)
def test_new_rows_find_themselves(kind: str, rng: np.random.Generator) -> None:
    vectors = clustered(rng, N + M, DIM, "l2")
    new = index_of(kind, vectors[:N], "l2").extended(cut(rows_of(vectors), N, N + M))
    assert new is not None
    assert new.search(vectors[N:], 1, TRY)[1][:, 0].tolist() == list(range(N, N + M))


@pytest.mark.parametrize("kind", ["exact", "two_stage", "ivf", *TORCH_KINDS])
def test_a_chain_shares_one_allocation(kind: str, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 2000, DIM, "l2")
    rows, index = rows_of(vectors), index_of(kind, vectors[:1000], "l2")
    chain = [index]
    for start in range(1000, 2000, 50):
        index = chain[-1].extended(cut(rows, start, start + 50)) or index
        chain.append(index)
    assert index.n == 2000
    held = [one.parts()["vectors"] for one in chain]
    assert sum(not np.shares_memory(a, b) for a, b in pairwise(held)) <= 4
    for one in chain:
        answer = one.search(vectors[: one.n : 97], 5, SearchParams(exact=True))
        check_answer(one, vectors[: one.n : 97], vectors[: one.n], answer)
    assert recall(index.search(vectors[::9], 10, TRY)[0], nearest(vectors[::9], vectors, "l2", 10)) >= 0.97


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_two_extensions_of_one_body(kind: str, rng: np.random.Generator) -> None:
    vectors = clustered(rng, N + 2 * M, DIM, "l2")
    rows, old = rows_of(vectors), index_of(kind, vectors[:N], "l2")
    first, second = old.extended(cut(rows, N, N + M)), old.extended(cut(rows, N + M, N + 2 * M))
    assert first is not None
    assert second is not None
    both = np.concatenate([vectors[:N], vectors[N + M :]])
    assert np.array_equal(first.vectors, vectors[: N + M])
    assert np.array_equal(second.vectors, both)
    for index, truth in ((first, vectors[: N + M]), (second, both)):
        check_answer(index, vectors[::50], truth, index.search(vectors[::50], 5, TRY))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_searched_by_others_meanwhile(kind: str, rng: np.random.Generator) -> None:
    vectors, queries = clustered(rng, N + 8 * 40, DIM, "l2"), clustered(rng, 20, DIM, "l2")
    rows, old = rows_of(vectors), index_of(kind, vectors[:N], "l2")
    expected = answers(old, queries)
    with ThreadPoolExecutor(6) as pool:
        made = [pool.submit(old.extended, cut(rows, N + 40 * i, N + 40 * i + 40)) for i in range(8)]
        searched = [pool.submit(answers, old, queries) for _ in range(12)]
        assert all(one.result() == expected for one in searched)
        for i, one in enumerate(made):
            index = one.result()
            assert index is not None
            assert np.array_equal(index.vectors[N:], vectors[N + 40 * i : N + 40 * i + 40])
            assert np.array_equal(index.vectors[:N], vectors[:N])


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_snapshot_holds_exactly_its_rows(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    vectors = clustered(rng, N + M, DIM, "cosine")
    rows = rows_of(vectors)
    middle = index_of(kind, vectors[:N], "cosine").extended(cut(rows, N, N + 100))
    assert middle is not None
    newest = middle.extended(cut(rows, N + 100, N + M))
    assert newest is not None
    for index in (middle, newest):
        info = SnapshotInfo("s", 1, 1, index.n, index.plan, index.metric, DIM, 0.0, 7)
        write_snapshot(tmp_path / "s", index, info)
        again, _ = read_snapshot(tmp_path / "s", store_id="s", dim=DIM, metric="cosine")
        assert raw(again) == raw(index)
        assert answers(again, vectors[:9]) == answers(index, vectors[:9])
    few = rows_of(vectors[:5])
    more = again.extended(Rows(few.slots + 10**6, few.id_bytes, few.id_ends, few.vectors))
    assert more is not None
    assert more.n == N + M + 5


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_plan(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 9000, 384, "l2")
    rows = rows_of(vectors)
    index = index_of(kind, vectors[:8000], "l2").extended(cut(rows, 8000, 9000))
    assert index is not None
    write_snapshot(tmp_path / "s", index, SnapshotInfo("s", 1, 1, index.n, index.plan, index.metric, 384, 0.0, 7))
    assert index.mapped_bytes == (0 if kind == "hnsw" else vectors.nbytes)
    predicted = plan_bytes(index.plan, index.n, index.dim, id_bytes=len(index.id_bytes) / index.n)
    assert index.nbytes == pytest.approx(predicted, rel=0.1)


def test_nothing_to_add(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 100, 8, "l2")
    index = index_of("two_stage", vectors, "l2")
    assert index.extended(cut(rows_of(vectors), 5, 5)) is index


def test_an_empty_body_grows(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 50, 8, "l2")
    index = index_of("exact", vectors[:0], "l2").extended(rows_of(vectors))
    assert index is not None
    assert index.search(vectors, 1, TRY)[1][:, 0].tolist() == list(range(50))


def test_rows_that_do_not_follow_are_refused(rng: np.random.Generator) -> None:
    vectors = clustered(rng, 100, 8, "l2")
    rows, index = rows_of(vectors), index_of("exact", vectors[:60], "l2")
    with pytest.raises(EngineError, match="ascend"):
        index.extended(cut(rows, 59, 70))
    later = cut(rows, 60, 70)
    with pytest.raises(EngineError, match="ascend"):
        index.extended(Rows(later.slots[::-1].copy(), later.id_bytes, later.id_ends, later.vectors))
    with pytest.raises(EngineError, match="8 dimensions"):
        index.extended(Rows(later.slots, later.id_bytes, later.id_ends, later.vectors[:, :5].copy()))
    assert index.extended(later) is not None


def test_beyond_a_size_the_codes_move_into_the_lists(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(ivf, "WHOLE_ROWS", N + 10)
    vectors = clustered(rng, N + M, DIM, "l2")
    rows, old = rows_of(vectors), index_of("ivf", vectors[:N], "l2")
    assert {"codes", "assigned", "centroids"} <= set(old.parts())
    assert not old.reads_lists
    longest = old.extended(cut(rows, N, N + 10))
    assert longest is not None
    assert "codes" in longest.parts()
    assert sum(longest.list_sizes) == N + 10
    assert old.extended(cut(rows, N, N + 11)) is None, "has to be built again"
    moved = build(old.plan, rows, "l2", seed=7, reuse_from=old)
    assert moved.reads_lists
    assert {"codes", "assigned"}.isdisjoint(moved.parts())
    for index, upto in ((longest, N + 10), (moved, N + M)):
        assert recall(index.search(vectors[:50], 10, TRY)[0], nearest(vectors[:50], vectors[:upto], "l2", 10)) >= 0.97


def test_codes_are_held_once(rng: np.random.Generator) -> None:
    """Half a byte a code, the list of a row and the slot table: at most 0.2 MB for 1,000 rows."""
    vectors = clustered(rng, 4000, 1536, "l2")
    index = index_of("ivf", vectors, "l2")
    fixed = 4 * 1536 * (16 + index.nlist)
    assert index.nbytes - index.table.resident_bytes - fixed <= 200 * index.n


def test_growing_arrays() -> None:
    first = growable((100, 3), np.float32)
    first[:] = 1
    second = grown(first, np.full((20, 3), 2))
    third = grown(first, np.full((20, 3), 3))
    assert np.shares_memory(first, second)
    assert not np.shares_memory(first, third)
    assert (second[100:] == 2).all()
    assert (third[100:] == 3).all()
    assert np.shares_memory(second, grown(second, np.full((5, 3), 4)))
    assert not np.shares_memory(first[1:], grown(first[1:], np.full((1, 3), 5))), "not the first rows of its room"
    assert not np.shares_memory(first[:50], grown(first[:50], np.full((1, 3), 6))), "not the newest"
    plain = np.arange(5)
    assert grown(plain, np.array([5])).tolist() == [0, 1, 2, 3, 4, 5]
    assert not np.shares_memory(plain, grown(plain, np.array([5])))
    filled = grown(growable((0,), np.int64), np.arange(1000))
    assert filled.tolist() == list(range(1000))


def test_rows_written_into_the_room_are_not_copied_again() -> None:
    array = growable((100, 3), np.float32)
    array[:] = 1
    longer = lengthened(array, 10)
    longer[100:] = 2
    assert np.shares_memory(longer, array)
    again = grown(array, longer[100:])
    assert np.shares_memory(again, array)
    assert np.array_equal(again, longer)
    other = grown(array, np.full((5, 3), 3, np.float32))
    assert not np.shares_memory(other, array)
    assert (longer[100:] == 2).all()
    assert np.array_equal(other[:100], array)


def test_room_that_ended_is_left_for_a_copy() -> None:
    array = growable((100, 3), np.float32)
    array[:] = 1
    longer = lengthened(array, 1000)
    longer[100:] = 2
    assert not np.shares_memory(longer, array)
    assert np.array_equal(longer[:100], array)
    again = grown(array, longer[100:])
    assert np.array_equal(again, longer)
    assert np.shares_memory(again, longer), "it was copied once; twice would take the memory of both"
    stranger = growable((100, 3), np.float32)
    stranger[:] = 9
    assert np.array_equal(grown(stranger, longer[100:])[:100], stranger)
