"""Wide vectors with a few large components: float32 decides, and what is in memory is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SEED, as_child

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.live import scheduler, snapshot_writer
from memevolve_gpu.types import FloatArray

DIM, COUNT = 256, 600


def heavy_tailed(count: int = COUNT, dim: int = DIM) -> FloatArray:
    """Unit vectors with three large components; what tells them apart is small, and 8 bits would round it away."""
    rng = np.random.default_rng(SEED)
    rows = 0.03 * rng.standard_normal((count, dim))
    rows[:, :3] += (6.0, -2.0, 2.0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows, dtype=np.float32)


def opened(path: Path, vectors: FloatArray, **settings: Any) -> VectorStore:
    chosen = {"background": False, "sample_queries": False, "min_training_units": 100, **settings}
    return VectorStore(
        path / "wide", lambda _text: vectors[0], vectors.shape[1], storage_config=StorageConfig(**chosen)
    )


def units(start: int, end: int) -> list[dict[str, Any]]:
    return [{"id": f"id{row}", "content": f"fact {row}", "type": "skill"} for row in range(start, end)]


def filled(path: Path, vectors: FloatArray, **settings: Any) -> VectorStore:
    store = opened(path, vectors, **settings)
    store.store_batch(units(0, len(vectors)), embeddings=vectors)
    return store


def questions(vectors: FloatArray, count: int = 50) -> FloatArray:
    return np.ascontiguousarray(vectors[:count] + np.float32(0.01) * vectors[count : 2 * count])


def finds(
    store: VectorStore, vectors: FloatArray, recall: float | None = None, asked: FloatArray | None = None
) -> float:
    """Recall@10 against distances computed in float64."""
    queries = questions(vectors) if asked is None else asked
    distances, _ = store.search_vectors(queries, 10, recall=recall)
    truth = [np.square(query.astype(np.float64) - vectors).sum(axis=1) for query in queries]
    last = np.sort(truth, axis=1)[:, 9:10]
    return float((distances <= last * (1 + 1e-4)).mean())


def is_at_rest(store: VectorStore, path: Path, vectors: FloatArray, **settings: Any) -> None:
    """Two rounds more do nothing, and an opening believes the snapshot."""
    store.snapshot()
    index = store._open.live.view.index
    assert [store.run_maintenance()["actions"] for _ in range(2)] == [[], []]
    assert store._open.live.view.index is index
    assert store.check() == []
    store.close()
    with opened(path, vectors, **settings) as again:
        totals = again.statistics()["event_totals"]
        assert (totals.get("snapshot-loaded"), totals.get("snapshot-refused", 0)) == (1, 0)
        assert again._open.live.view.index.kind == index.kind
        assert finds(again, vectors, 1.0) == 1.0


@pytest.mark.parametrize("precision", ["auto", "int8"])
@pytest.mark.parametrize("index_type", ["flat", "ivf", "hnsw", "auto"])
def test_an_index_is_built_once_and_exact_is_exact(tmp_path: Path, index_type: str, precision: str) -> None:
    vectors = heavy_tailed()
    assert np.abs(vectors).max() > 8.8 / np.sqrt(DIM)
    settings = {"index_type": index_type, "precision": precision}
    store = filled(tmp_path, vectors, **settings)
    store.run_maintenance()
    assert finds(store, vectors, 1.0) == 1.0
    assert finds(store, vectors) >= 0.95
    is_at_rest(store, tmp_path, vectors, **settings)


@pytest.mark.slow
def test_real_wide_text_is_found(shared_data: Path, tmp_path: Path) -> None:
    vectors = np.load(shared_data / "wide1536_units_f16.npy")[:2000].astype(np.float32)
    queries = np.load(shared_data / "wide1536_queries_f16.npy")[::5].astype(np.float32)
    store = filled(tmp_path, vectors, min_training_units=1000)
    assert store.run_maintenance()["actions"] == ["built ivf of 2000 rows"]
    for kind in (queries[:100], queries[100:]):  # like the data, and of another kind
        assert finds(store, vectors, 0.95, kind) >= 0.945
        assert finds(store, vectors, 0.99, kind) >= 0.985
        assert finds(store, vectors, 1.0, kind) == 1.0
    is_at_rest(store, tmp_path, vectors, min_training_units=1000)


def test_another_vector_is_a_contradiction(tmp_path: Path) -> None:
    store = filled(tmp_path, heavy_tailed())
    store.run_maintenance()
    rows = store._open.live.view.index.vectors
    rows[:] = np.roll(rows, 1, axis=0)  # in this process alone
    assert store.run_maintenance()["actions"][0] == "healed the index"
    store.close()


@pytest.mark.parametrize("index_type", ["flat", "ivf", "auto"])
def test_memory_holds_no_vectors_once_they_are_saved(tmp_path: Path, index_type: str) -> None:
    vectors = heavy_tailed()
    store = filled(tmp_path, vectors, index_type=index_type)
    store.snapshot()
    statistics, health = store.statistics(), store.get_storage_health()
    assert statistics["mapped_bytes"] == vectors.nbytes
    assert statistics["memory_bytes"] < vectors.nbytes / 2
    assert health["memory_usage_mb"] == statistics["memory_bytes"] / 2**20
    assert health["mapped_mb"] == vectors.nbytes / 2**20
    assert health["disk_mb"] == sum(statistics["files"].values()) / 2**20 > 2 * health["mapped_mb"]
    store.close()
    with opened(tmp_path, vectors, index_type=index_type) as again:
        assert again.statistics()["mapped_bytes"] == vectors.nbytes
        assert again.statistics()["memory_bytes"] < vectors.nbytes / 2


def test_a_graph_holds_its_vectors_and_says_so(tmp_path: Path) -> None:
    vectors = heavy_tailed()
    with filled(tmp_path, vectors, index_type="hnsw") as store:
        store.snapshot()
        assert store.statistics()["mapped_bytes"] == 0
        assert store.statistics()["memory_bytes"] > vectors.nbytes


def test_a_limit_that_float32_passes_is_kept(tmp_path: Path) -> None:
    """Rows that wait count; those that the index holds do not."""
    vectors, limit = heavy_tailed(1000, 768), 2.0
    assert vectors.nbytes > 1.4 * limit * 2**20
    with opened(tmp_path, vectors, max_memory_mb=limit) as store:
        for start in range(0, 1000, 500):
            store.store_batch(units(start, start + 500), embeddings=vectors[start : start + 500])
            store.retrain()
        assert store._open.live.view.index.kind == "ivf"
        assert store.get_storage_health()["memory_usage_mb"] < limit
        assert finds(store, vectors, 1.0) == 1.0


def test_new_rows_lie_in_memory_until_enough_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "DELTA_ROWS", 40)
    monkeypatch.setattr(scheduler, "DELTA_MOST", 40)
    vectors = heavy_tailed()
    with filled(tmp_path, vectors[:500], index_type="ivf") as store:
        store.snapshot()
        for end, mapped in ((550, 500), (600, 600)):
            store.store_batch(units(end - 50, end), embeddings=vectors[end - 50 : end])
            assert store.run_maintenance()["actions"] == [f"extended ivf of {end} rows"]
            assert store._open.live.view.index.mapped_bytes == vectors[:mapped].nbytes
            assert finds(store, vectors[:end], 1.0) == 1.0


def test_few_new_rows_are_saved_where_they_take_much_of_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "DELTA_ROWS", 40)
    monkeypatch.setattr(scheduler, "DELTA_MOST", 40)
    vectors = heavy_tailed()
    with filled(tmp_path, vectors[:500], index_type="flat") as store:
        store.snapshot()
    with opened(tmp_path, vectors, index_type="flat", max_memory_mb=0.15) as store:
        store.store_batch(units(500, 550), embeddings=vectors[500:550])
        actions = store.run_maintenance()["actions"]
        assert actions == ["extended exact of 550 rows", "saved the vectors, to map them"]
        assert store.statistics()["mapped_bytes"] == vectors[:550].nbytes
        assert store.run_maintenance()["actions"] == []


def test_vectors_are_saved_although_nothing_else_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_writer, "MOVED_BYTES", 1000)
    vectors = heavy_tailed()
    with filled(tmp_path, vectors, index_type="flat") as store:
        store.snapshot()
    (tmp_path / "wide.snapshot").unlink()
    with opened(tmp_path, vectors, index_type="flat") as store:
        assert store.statistics()["mapped_bytes"] == 0
        assert store.run_maintenance()["actions"] == ["saved the vectors, to map them"]
        assert store.statistics()["mapped_bytes"] == vectors.nbytes
        assert store.run_maintenance()["actions"] == []


@pytest.mark.parametrize("what", ["deleted", "cut", "of the records alone"])
def test_whatever_becomes_of_the_snapshot(tmp_path: Path, what: str) -> None:
    vectors, path = heavy_tailed(), tmp_path / "wide.snapshot"
    with filled(tmp_path, vectors) as store:
        store.snapshot()
        store._open.records.checkpoint()
    if what == "cut":  # by renaming, as backups are put back
        part = tmp_path / "part"
        part.write_bytes(path.read_bytes()[:-1000])
        part.replace(path)
    elif what == "deleted":
        path.unlink()
    else:
        whole = bytearray(path.read_bytes())
        whole[-vectors.nbytes // 2] ^= 1
        path.unlink()
        path.write_bytes(whole)
    with opened(tmp_path, vectors) as store:
        if what != "of the records alone":  # that is seen when the row is compared
            assert store._open.live.view.index.kind == "exact"
        assert finds(store, vectors, 1.0) == 1.0
        assert store._open.live.view.index.kind == "exact"
        assert store.run_maintenance()["actions"] == ["built ivf of 600 rows"]
        assert store.statistics()["mapped_bytes"] == vectors.nbytes


def test_another_process_replaces_the_file_that_is_mapped(tmp_path: Path) -> None:
    vectors = heavy_tailed()
    with filled(tmp_path, vectors[:500]) as store:
        store.snapshot()
        before = (tmp_path / "wide.snapshot").stat().st_ino

        def rebuild() -> None:
            with opened(tmp_path, vectors) as other:
                other.store_batch(units(500, 600), embeddings=vectors[500:])
                other.retrain()
                other.snapshot()

        assert as_child(rebuild) == 0
        assert (tmp_path / "wide.snapshot").stat().st_ino != before
        assert finds(store, vectors, 1.0) == 1.0


def test_a_child_reads_the_mapped_vectors_of_its_parent(tmp_path: Path) -> None:
    vectors = heavy_tailed()
    with filled(tmp_path, vectors) as store:
        store.snapshot()

        def search_and_write() -> None:
            assert finds(store, vectors, 1.0) == 1.0
            store.store({"id": "of the child", "content": "new"})
            store.snapshot()

        assert as_child(search_and_write) == 0
        assert store.count() == COUNT + 1
        assert store.check() == []


def test_a_folder_that_cannot_be_written_leaves_vectors_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = heavy_tailed()

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with filled(tmp_path, vectors) as store:
        monkeypatch.setattr("memevolve_gpu.index.snapshot_file._write", full)
        store.run_maintenance()
        assert store.statistics()["event_totals"]["snapshot-failed"] == 1
        assert store.statistics()["mapped_bytes"] == 0
        assert finds(store, vectors, 1.0) == 1.0
        monkeypatch.undo()
        store.snapshot()
        assert store.statistics()["mapped_bytes"] == vectors.nbytes
