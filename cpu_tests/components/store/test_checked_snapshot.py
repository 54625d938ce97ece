"""A store opened from a snapshot that was damaged on disk: no search returns a wrong distance, and it heals itself."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import clustered

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.index import vector_table

ROWS, DIM, BAD = 3000, 32, 2222
VECTORS = clustered(np.random.default_rng(5), ROWS, DIM, "l2")


@pytest.fixture(params=["ivf", "auto", "flat", "ivf in a snapshot of format 3"])
def damaged(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., VectorStore]:
    """Opens a store whose snapshot holds row ``BAD`` with one bit changed."""
    prefix, old = tmp_path / "s", request.param.endswith("format 3")
    settings = {"index_type": request.param.split()[0], "background": False}
    with monkeypatch.context() as patched:
        if old:
            patched.setattr(vector_table, "CHECKED_BYTES", 64 * VECTORS.strides[0])
        filled(prefix, settings)
    if old:
        as_format_3(Path(f"{prefix}.snapshot"))
    flip(Path(f"{prefix}.snapshot"))
    return lambda **more: VectorStore(prefix, None, DIM, storage_config=StorageConfig(**{**settings, **more}))


def filled(prefix: Path, settings: dict[str, Any]) -> None:
    """Make a store of all rows, with a snapshot of its index."""
    with VectorStore(prefix, None, DIM, storage_config=StorageConfig(**settings)) as store:
        store.store_batch([{"id": f"u{i}", "content": f"unit {i}"} for i in range(ROWS)], VECTORS)
        store.run_maintenance()


def as_format_3(snapshot: Path) -> None:
    """Give a snapshot whose checksums are of 64 rows each the header that format 3 had."""
    raw = snapshot.read_bytes()
    magic, _, length, _ = struct.unpack_from("<8sIII", raw)
    document = json.loads(raw[20 : 20 + length])
    assert document.pop("checked_rows") == 64
    header = json.dumps(document, separators=(",", ":")).encode().ljust(length)
    crc = zlib.crc32(header, zlib.crc32(struct.pack("<II", 3, length)))
    snapshot.write_bytes(struct.pack("<8sIII", magic, 3, length, crc) + header + raw[20 + length :])


@pytest.mark.parametrize("index_type", ["ivf", "flat"])
def test_a_snapshot_of_format_3_is_used_until_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index_type: str
) -> None:
    settings = {"index_type": index_type, "background": False}
    with monkeypatch.context() as patched:
        patched.setattr(vector_table, "CHECKED_BYTES", 64 * VECTORS.strides[0])
        filled(tmp_path / "s", settings)
    as_format_3(tmp_path / "s.snapshot")
    for version in (3, 4):
        assert struct.unpack_from("<I", (tmp_path / "s.snapshot").read_bytes(), 8) == (version,)
        with VectorStore(tmp_path / "s", None, DIM, storage_config=StorageConfig(**settings)) as store:
            assert store.search_vectors(VECTORS[BAD : BAD + 1], 1)[1] == [[f"u{BAD}"]]
            store.run_maintenance()
            assert store.check() == []
            assert store.statistics()["event_totals"] == {"snapshot-loaded": 1}
            store.snapshot()


def flip(snapshot: Path) -> None:
    """Change one bit of row ``BAD`` in the file."""
    raw = bytearray(snapshot.read_bytes())
    raw[raw.index(VECTORS[BAD].tobytes()) + 7] ^= 0x40
    snapshot.write_bytes(raw)


def kinds(store: VectorStore) -> list[str]:
    return [event["kind"] for event in store.statistics()["events"]]


@pytest.mark.parametrize("recall", [0.95, 1.0])
def test_a_search_that_needs_the_block_reads_the_records(damaged: Callable[..., VectorStore], recall: float) -> None:
    with damaged() as store:
        truth = np.sort(((VECTORS[BAD] - VECTORS) ** 2).sum(axis=1))[:5]
        distances, ids = store.search_vectors(VECTORS[BAD : BAD + 1], 5, recall=recall)
        assert ids[0][0] == f"u{BAD}"
        assert np.allclose(distances[0], truth, atol=1e-4)
        assert "reload" in kinds(store) or "snapshot-refused" in kinds(store)
        assert store.count() == ROWS


def test_maintenance_finds_what_no_search_touched(damaged: Callable[..., VectorStore]) -> None:
    with damaged() as store:
        store.run_maintenance()
        assert "reload" in kinds(store) or "snapshot-refused" in kinds(store)
        assert store.search_vectors(VECTORS[BAD : BAD + 1], 1)[1] == [[f"u{BAD}"]]
    with damaged() as again:
        again.run_maintenance()
        assert "reload" not in kinds(again), "the snapshot was written anew"
        assert "snapshot-refused" not in kinds(again)


def test_saving_writes_what_the_records_hold(damaged: Callable[..., VectorStore]) -> None:
    with damaged() as store:
        store.store_batch([{"id": "new", "content": "one more"}], VECTORS[:1])
        store.snapshot()
        assert "reload" in kinds(store) or "snapshot-refused" in kinds(store)
    with damaged() as again:
        again.run_maintenance()
        assert not {"reload", "snapshot-refused"} & set(kinds(again))
        assert again.search_vectors(VECTORS[BAD : BAD + 1], 1)[1] == [[f"u{BAD}"]]
        assert again.count() == ROWS + 1


def test_a_damaged_index_of_another_process_is_not_adopted(tmp_path: Path) -> None:
    """What the round samples of it is sound; the damaged row is found before it is used."""
    config = StorageConfig(index_type="ivf", background=False)
    old, prefix = VECTORS[: ROWS // 2], tmp_path / "s"
    names = [{"id": f"u{i}", "content": f"unit {i}"} for i in range(ROWS)]
    with VectorStore(prefix, None, DIM, storage_config=config) as store:
        store.store_batch(names[: len(old)], old)
        store.run_maintenance()
        for query in VECTORS[BAD - 40 : BAD + 40]:
            store.search_vectors(query[None], 1)
        with VectorStore(prefix, None, DIM, storage_config=config) as other:
            other.store_batch(names[len(old) :], VECTORS[len(old) :])
            other.run_maintenance()
        flip(Path(f"{prefix}.snapshot"))
        store.run_maintenance()
        assert store.search_vectors(VECTORS[BAD : BAD + 1], 1)[1] == [[f"u{BAD}"]]
        assert {"reload", "snapshot-refused"} & set(kinds(store))
        store.run_maintenance()
        assert store.check() == []


def test_the_background_checks_by_itself(damaged: Callable[..., VectorStore]) -> None:
    with damaged(background=True) as store:
        until = time.monotonic() + 20
        while not {"reload", "snapshot-refused"} & set(kinds(store)):
            assert time.monotonic() < until, "the damaged block was never found"
            time.sleep(0.01)
