"""A snapshot is read back as it was written, or refused; nothing in a file may crash the reader."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import KINDS, WAYS, clustered, index_of, pairs

from memevolve_gpu.errors import MemEvolveError
from memevolve_gpu.index import vector_table
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.faiss_support import load_faiss
from memevolve_gpu.index.snapshot_file import (
    FORMAT_VERSION,
    SnapshotError,
    SnapshotInfo,
    read_info,
    read_snapshot,
    write_snapshot,
)
from memevolve_gpu.index.vector_table import DamagedVectorsError, VectorTable
from memevolve_gpu.types import Metric, Precision, SearchParams

STORE = "0f8fad5b"
PREFIX = struct.Struct("<8sIII")


def info_of(index: Index, **changes: Any) -> SnapshotInfo:
    info = SnapshotInfo(
        store_id=STORE,
        generation=3,
        watermark=2**40,
        count=index.n,
        plan=index.plan,
        metric=index.metric,
        dim=index.dim,
        created_at=1_750_000_000.25,
        seed=7,
        extra={"lists": [1, 2], "name": "é", "recall": 0.99},
    )
    return replace(info, **changes)


def read(path: Path, index: Index) -> tuple[Index, SnapshotInfo]:
    return read_snapshot(path, store_id=STORE, dim=index.dim, metric=index.metric)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, folder: Path) -> tuple[Index, bytes, Path]:
    """A small index, its snapshot's bytes, and a path to write damaged versions to."""
    index = index_of(request.param, clustered(np.random.default_rng(5), 80, 6, "l2"), "l2")
    path = folder / f"{request.param}.snapshot"
    write_snapshot(path, index, info_of(index))
    return index, path.read_bytes(), folder / f"{request.param}.damaged"


CASES = [(kind, metric, "float32") for kind, metric in pairs(WAYS)]
CASES += [(kind, "l2", precision) for kind in ("torch-exact", "torch-ivf") for precision in ("float16", "int8")]


@pytest.mark.parametrize(("kind", "metric", "precision"), CASES)
def test_round_trip(kind: str, metric: Metric, precision: Precision, folder: Path, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 1500, 40, metric)
    index = index_of(kind, vectors, metric, precision)
    info = info_of(index)
    path = folder / "whole.snapshot"
    write_snapshot(path, index, info)
    again, read_back = read(path, index)
    assert read_back == info == read_info(path)
    assert again.nbytes == index.nbytes
    assert (again.kind, again.plan, again.n, again.nlist) == (index.kind, index.plan, index.n, index.nlist)
    for name, array in index.parts().items():
        assert np.array_equal(array, again.parts()[name]), name
    queries = clustered(rng, 20, 40, metric)
    for mask in (None, RowFilter(rng.random(1500) < 0.5)):
        for params in (SearchParams(nprobe=8, rerank=50, ef=20), SearchParams(exact=True)):
            expected, got = index.search(queries, 7, params, mask), again.search(queries, 7, params, mask)
            assert np.array_equal(expected[1], got[1])
            assert np.array_equal(expected[0], got[0])
    positions = np.array([0, 1499, -1])
    assert again.ids_at(positions) == index.ids_at(positions)


@pytest.mark.parametrize("kind", ["exact", "hnsw", "torch-exact"])
def test_empty_body(kind: str, folder: Path, rng: np.random.Generator) -> None:
    index = index_of(kind, clustered(rng, 1, 6, "l2")[:0], "l2")
    write_snapshot(folder / "empty", index, info_of(index))
    again, _ = read(folder / "empty", index)
    assert again.search(np.zeros((1, 6), np.float32), 2, SearchParams())[1].tolist() == [[-1, -1]]


@given(data=st.data())
@settings(max_examples=150)
def test_any_flipped_bit_is_noticed(written: tuple[Index, bytes, Path], data: st.DataObject) -> None:
    index, whole, path = written
    byte, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(whole)
    damaged[byte] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises((SnapshotError, DamagedVectorsError)):
        read(path, index)[0].table.check()


@pytest.mark.parametrize(("version", "low", "high"), [(3, 640, 704), (FORMAT_VERSION, 640, 768)])
def test_no_call_returns_damaged_vectors(
    folder: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, version: int, low: int, high: int
) -> None:
    """The block is found by whoever needs it first; what needs other blocks only is served."""
    vectors = clustered(rng, 1000, 16, "l2")
    index, path = index_of("two_stage", vectors, "l2"), folder / "block"
    if version == 3:
        monkeypatch.setattr(vector_table, "CHECKED_BYTES", 64 * vectors.strides[0])
    write_snapshot(path, index, info_of(index))
    whole = path.read_bytes()
    if version == 3:
        whole = forged(whole, lambda document: document.pop("checked_rows"), version)
    at = whole.index(vectors[700].tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    few = RowFilter(np.arange(1000) < 64)
    calls: list[Callable[[Index], object]] = [
        lambda one: one.search(vectors[700:701], 3, SearchParams(rerank=20)),
        lambda one: one.search(vectors[:1], 3, SearchParams(exact=True)),
        lambda one: one.vectors_at(np.array([703])),
        lambda one: one.vectors,
        lambda one: one.parts(),
        lambda one: one.table.extended(vectors[:5]).scan(vectors[:1], 1),
    ]
    for call in calls:
        opened = read(path, index)[0]
        assert not opened.table.is_checked
        assert opened.search(vectors[:1], 3, SearchParams(exact=True), few)[1][0, 0] == 0
        assert np.array_equal(opened.vectors_at(np.array([5, 999])), vectors[[5, 999]])
        with pytest.raises(DamagedVectorsError, match=f"vectors {low} to {high}"):
            call(opened)


def test_a_call_goes_on_when_another_thread_compares_the_last_block(folder: Path, rng: np.random.Generator) -> None:
    """Each time that a call has seen that blocks are unchecked, all of them are found to be sound meanwhile."""
    vectors = clustered(rng, 1000, 16, "l2")
    index, path = index_of("two_stage", vectors, "l2"), folder / "meanwhile"
    write_snapshot(path, index, info_of(index))
    few, rows = RowFilter(np.arange(1000) < 64), np.array([[700, 5]])

    class Hurried(VectorTable):
        looks: list[object]

        @property  # type: ignore[override]
        def _unchecked(self) -> object:
            return self.looks.pop() if self.looks else None

        @_unchecked.setter
        def _unchecked(self, value: object) -> None:
            self.looks = []

    calls: list[Callable[[VectorTable], object]] = [
        lambda one: one.check(),
        lambda one: one.gather(np.array([703])),
        lambda one: one.scan(vectors[:1], 3),
        lambda one: one.scan(vectors[:1], 3, few),
        lambda one: one.rerank(vectors[:1], rows, 1),
        lambda one: one.distances(vectors[:1], rows),
    ]
    for call in calls:
        table = read(path, index)[0].table
        unchecked = table._unchecked
        table.__class__ = Hurried
        table.looks = [unchecked]  # type: ignore[attr-defined]
        call(table)


def test_every_part_of_the_header_is_covered(written: tuple[Index, bytes, Path]) -> None:
    _, whole, path = written
    end = PREFIX.size + PREFIX.unpack_from(whole)[2]
    for at in [*range(PREFIX.size), *range(PREFIX.size, end, 7)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError):
            read_info(path)


@given(data=st.data())
@settings(max_examples=60)
def test_any_truncation_is_noticed(written: tuple[Index, bytes, Path], data: st.DataObject) -> None:
    index, whole, path = written
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(SnapshotError) as caught:
        read(path, index)
    assert caught.value.reason in {"torn", "damaged"}


@given(junk=st.binary(max_size=300), prefix=st.sampled_from([0, 4, 8, 12, 20, 40, 4096]))
@settings(max_examples=80)
def test_garbage_is_refused(written: tuple[Index, bytes, Path], junk: bytes, prefix: int) -> None:
    index, whole, path = written
    path.write_bytes(whole[:prefix] + junk)
    with pytest.raises(SnapshotError):
        read(path, index)


def test_appended_bytes_are_refused(written: tuple[Index, bytes, Path]) -> None:
    index, whole, path = written
    path.write_bytes(whole + b"\0")
    with pytest.raises(SnapshotError, match="were written") as caught:
        read(path, index)
    assert caught.value.reason == "torn"


def test_snapshot_of_another_store_is_refused(written: tuple[Index, bytes, Path]) -> None:
    _, whole, path = written
    path.write_bytes(whole)
    others: list[tuple[str, int, Metric]] = [("another", 6, "l2"), (STORE, 7, "l2"), (STORE, 6, "cosine")]
    for store_id, dim, metric in others:
        with pytest.raises(SnapshotError, match="ignored") as caught:
            read_snapshot(path, store_id=store_id, dim=dim, metric=metric)
        assert caught.value.reason == "foreign"


def test_what_is_no_readable_file(folder: Path, written: tuple[Index, bytes, Path]) -> None:
    index = written[0]
    reasons = {}
    (folder / "nothing").write_bytes(b"")
    (folder / "folder").mkdir(exist_ok=True)
    for name in ("absent", "nothing", "folder"):
        with pytest.raises(SnapshotError) as caught:
            read(folder / name, index)
        reasons[name] = caught.value.reason
        assert isinstance(caught.value, MemEvolveError)
    assert reasons == {"absent": "missing", "nothing": "torn", "folder": "unreadable"}


def forged(whole: bytes, change: Callable[[dict[str, Any]], object], version: int = FORMAT_VERSION) -> bytes:
    """A snapshot whose header was rewritten and carries a checksum that holds, its sections moved along."""
    _, _, length, _ = PREFIX.unpack_from(whole)
    document = json.loads(whole[PREFIX.size : PREFIX.size + length])
    change(document)
    header = json.dumps(document).encode()
    crc = zlib.crc32(header, zlib.crc32(struct.pack("<II", version, len(header))))
    head = PREFIX.pack(whole[:8], version, len(header), crc) + header
    index = whole[-(-(PREFIX.size + length) // 4096) * 4096 :]
    return head + bytes(-len(head) % 4096) + index


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no info": lambda d: d.pop("info"),
    "no sections": lambda d: d.pop("sections"),
    "sections no list": lambda d: d.update(sections=3),
    "huge shape": lambda d: d["sections"][0].update(shape=[2**62]),
    "enormous shape": lambda d: d["sections"][0].update(shape=[10**40, 10**40]),
    "negative shape": lambda d: d["sections"][0].update(shape=[-8]),
    "three axes": lambda d: d["sections"][0].update(shape=[1, 1, 80]),
    "fractional shape": lambda d: d["sections"][0].update(shape=[80.0]),
    "boolean shape": lambda d: d["sections"][0].update(shape=[True]),
    "object dtype": lambda d: d["sections"][0].update(dtype="object"),
    "unknown dtype": lambda d: d["sections"][0].update(dtype=["int64"]),
    "other dtype, same bytes": lambda d: d["sections"][0].update(dtype="float32", shape=[160]),
    "section renamed": lambda d: d["sections"][0].update(name="slot"),
    "name no text": lambda d: d["sections"][0].update(name=[1]),
    "vectors reshaped": lambda d: next(s for s in d["sections"] if s["name"] == "vectors").update(shape=[40, 12]),
    "vectors flat": lambda d: next(s for s in d["sections"] if s["name"] == "vectors").update(shape=[480]),
    "unknown kind": lambda d: d["info"]["plan"].update(kind="pickle"),
    "unknown precision": lambda d: d["info"]["plan"].update(precision="float64"),
    "other precision": lambda d: d["info"]["plan"].update(precision="int8"),
    "unknown plan field": lambda d: d["info"]["plan"].update(evil=1),
    "notes no texts": lambda d: d["info"]["plan"].update(notes=[1]),
    "count": lambda d: d["info"].update(count=81),
    "watermark text": lambda d: d["info"].update(watermark="9"),
    "store id list": lambda d: d["info"].update(store_id=[STORE]),
    "created_at text": lambda d: d["info"].update(created_at="now"),
    "extra list": lambda d: d["info"].update(extra=[1]),
    "seed negative": lambda d: d["info"].update(seed=-1),
    "no rows in a block": lambda d: d.update(checked_rows=0),
    "fewer rows in a block": lambda d: d.update(checked_rows=1),
    "rows of a block no number": lambda d: d.update(checked_rows="64"),
}


def test_header_that_lies_is_refused(written: tuple[Index, bytes, Path]) -> None:
    index, whole, path = written
    for forgery, change in FORGERIES.items():
        path.write_bytes(forged(whole, change))
        with pytest.raises(SnapshotError) as caught:
            read(path, index)
        assert caught.value.reason in {"damaged", "torn", "foreign"}, forgery


def test_forging_alone_changes_nothing(written: tuple[Index, bytes, Path]) -> None:
    index, whole, path = written
    path.write_bytes(forged(whole, lambda document: None))
    assert read(path, index)[0].n == index.n


def test_header_nested_too_deeply(written: tuple[Index, bytes, Path]) -> None:
    index, whole, path = written
    header = b"[" * 200_000
    crc = zlib.crc32(header, zlib.crc32(struct.pack("<II", FORMAT_VERSION, len(header))))
    path.write_bytes(PREFIX.pack(whole[:8], FORMAT_VERSION, len(header), crc) + header)
    with pytest.raises(SnapshotError, match="makes no sense"):
        read(path, index)


def test_newer_format_is_named(written: tuple[Index, bytes, Path]) -> None:
    index, whole, path = written
    path.write_bytes(forged(whole, lambda document: None, version=FORMAT_VERSION + 1))
    with pytest.raises(SnapshotError, match=f"format {FORMAT_VERSION + 1}") as caught:
        read(path, index)
    assert caught.value.reason == "version"


def swapped(whole: bytes, name: str, array: np.ndarray[Any, Any]) -> bytes:
    """The snapshot with one section replaced by another of the same size, all checksums right."""
    _, _, length, _ = PREFIX.unpack_from(whole)
    document = json.loads(whole[PREFIX.size : PREFIX.size + length])
    position = PREFIX.size + length
    for section in document["sections"]:
        start = position + -position % (65536 if section["name"] == "vectors" else 4096)
        position = start + int(np.prod(section["shape"])) * np.dtype(section["dtype"]).itemsize
        if section["name"] == name:
            assert position - start == array.nbytes
            whole = whole[:start] + array.tobytes() + whole[position:]
    crc = zlib.crc32(array.tobytes())
    return forged(whole, lambda d: next(s for s in d["sections"] if s["name"] == name).update(crc32=crc))


def test_slot_table_that_contradicts_itself(written: tuple[Index, bytes, Path]) -> None:
    index, whole, path = written
    for name, array in (
        ("slots", index.slots[::-1].copy()),
        ("slots", np.zeros_like(index.slots)),
        ("id_ends", index.id_ends[::-1].copy()),
        ("id_ends", index.id_ends + 1),
    ):
        path.write_bytes(swapped(whole, name, array))
        with pytest.raises(SnapshotError, match="contradicts itself"):
            read(path, index)


@pytest.mark.parametrize("kind", ["two_stage", "ivf", "hnsw"])
def test_engine_of_another_body_is_refused(kind: str, folder: Path, rng: np.random.Generator) -> None:
    vectors = clustered(rng, 80, 6, "l2")
    index = index_of(kind, vectors, "l2")
    others = [index_of(kind, vectors, "ip"), index_of(kind, clustered(rng, 80, 12, "l2"), "l2")]
    others += [
        index_of(kind, clustered(rng, 79, 6, "l2"), "l2"),
        index_of("ivf" if kind == "hnsw" else "hnsw", vectors, "l2"),
    ]
    others += [index_of("ivf", clustered(rng, 80, 6, "l2")[:60], "l2")]
    for other in others:
        engine = next(name for name in ("faiss", "codes") if name in other.parts())
        parts = {name: array for name, array in index.parts().items() if name not in ("faiss", "codes")}
        parts["codes" if kind == "ivf" else "faiss"] = other.parts()[engine]
        path = folder / "mixed"
        write_snapshot(path, _Parts(index, parts), info_of(index))  # type: ignore[arg-type]
        with pytest.raises(SnapshotError, match="rebuild"):
            read(path, index)


class _Parts:
    """Something to write whose parts come from several indexes."""

    def __init__(self, index: Index, parts: dict[str, Any]) -> None:
        self.plan, self.moved_to, self._parts = index.plan, index.moved_to, parts

    def parts(self) -> dict[str, Any]:
        return self._parts


def test_graph_whose_links_leave_it(folder: Path, rng: np.random.Generator) -> None:
    faiss = load_faiss()
    for link in (80, 10**6, -2):
        index = index_of("hnsw", clustered(rng, 80, 6, "l2"), "l2")
        links = index._engine.hnsw.neighbors  # type: ignore[attr-defined]
        faiss.rev_swig_ptr(links.data(), links.size())[5] = link
        write_snapshot(folder / "links", index, info_of(index))
        with pytest.raises(SnapshotError, match="cannot be restored"):
            read(folder / "links", index)


def test_engine_bytes_that_faiss_cannot_read(folder: Path, rng: np.random.Generator) -> None:
    index = index_of("two_stage", clustered(rng, 80, 6, "l2"), "l2")
    for junk in (np.zeros(0, np.uint8), np.arange(200, dtype=np.uint8), index.parts()["faiss"][:-9]):
        path = folder / "junk"
        write_snapshot(path, _Parts(index, index.parts() | {"faiss": junk}), info_of(index))  # type: ignore[arg-type]
        with pytest.raises(SnapshotError) as caught:
            read(path, index)
        assert caught.value.reason == "damaged"


# ---------------------------------------------------------------------------------------------------------- writing


def files(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def small(rng: np.random.Generator) -> Index:
    return index_of("exact", clustered(rng, 10, 4, "l2"), "l2")


@pytest.mark.parametrize(("call", "code"), [("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES)])
def test_failed_write_leaves_the_old_snapshot(
    call: str, code: int, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, path = small(rng), tmp_path / "s"
    write_snapshot(path, index, info_of(index, generation=1))

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    target = os if call == "fsync" else Path
    monkeypatch.setattr(target, call, fail)
    with pytest.raises(SnapshotError, match=os.strerror(code)) as caught:
        write_snapshot(path, index, info_of(index, generation=2))
    assert caught.value.reason == "unwritable"
    monkeypatch.undo()
    assert files(tmp_path) == ["s"]
    assert read_info(path).generation == 1


def test_missing_folder_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    index = small(rng)
    with pytest.raises(SnapshotError, match="No such file"):
        write_snapshot(tmp_path / "absent" / "s", index, info_of(index))


def test_oversized_extra_is_refused_before_anything_is_replaced(tmp_path: Path, rng: np.random.Generator) -> None:
    index, path = small(rng), tmp_path / "s"
    with pytest.raises(SnapshotError, match="extra"):
        write_snapshot(path, index, info_of(index, extra={"note": "x" * (1 << 20)}))
    assert files(tmp_path) == []
