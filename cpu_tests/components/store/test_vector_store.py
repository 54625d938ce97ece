"""What users of ``VectorStore`` may rely on, for every index type, through its public methods."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SEED, FakeBatchEmbedder, FakeEmbedder

from memevolve_gpu import (
    CapacityError,
    ConfigurationError,
    DimensionMismatchError,
    EmbeddingError,
    InvalidQueryError,
    InvalidUnitError,
    InvalidVectorError,
    ModelMismatchError,
    StorageConfig,
    StorageError,
    VectorStore,
)
from memevolve_gpu.index.faiss_support import load_faiss
from memevolve_gpu.live import Maintenance
from memevolve_gpu.live.worker import SearchYield
from memevolve_gpu.records.schema import STATS_KEY

DIM = 24
INDEX_TYPES = ["flat", "ivf", "hnsw", "auto"]
Make = Callable[..., VectorStore]


def config(**settings: Any) -> StorageConfig:
    return StorageConfig(**{"background": False, "min_training_units": 100, **settings})


@pytest.fixture(params=INDEX_TYPES)
def index_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    opened: list[VectorStore] = []

    def make(name: str = "store", embedder: Any = None, **settings: Any) -> VectorStore:
        store = VectorStore(tmp_path / name, embedder or FakeEmbedder(DIM), storage_config=config(**settings))
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


def units(n: int) -> list[dict[str, Any]]:
    kinds = ["lesson", "skill", "tool", "abstraction"]
    return [
        {
            "id": f"u{i}",
            "type": kinds[i % 4],
            "content": f"fact number {i} about topic {i % 13}",
            "tags": [f"t{i % 5}", "all"],
            "metadata": {"score": i / n},
        }
        for i in range(n)
    ]


def nested(depth: int) -> dict[str, Any]:
    unit: dict[str, Any] = {}
    for _ in range(depth):
        unit = {"deeper": unit}
    return unit


def within_itself() -> dict[str, Any]:
    unit: dict[str, Any] = {}
    unit["self"] = unit
    return unit


class TestTheOldApi:
    def test_automatic_ids_are_never_given_twice(self, make: Make) -> None:
        store = make()
        assert store.store_batch([{"content": "a"}, {"id": "unit_1", "content": "b"}, {"content": "c"}]) == [
            "unit_0",
            "unit_1",
            "unit_2",
        ]
        store.delete("unit_2")
        assert store.store({"content": "d"}) == "unit_3"
        store.clear()
        assert store.store({"content": "e"}) == "unit_4"

    def test_unit_to_text_joins_what_is_embedded(self, make: Make) -> None:
        unit = {"content": "C", "reasoning": "R", "query": "Q", "tags": ["x", "y"], "type": "skill"}
        assert make()._unit_to_text(unit) == "C Reasoning: R Query: Q x y skill"

    def test_dimension_comes_from_the_function_then_from_the_file(self, make: Make, tmp_path: Path) -> None:
        make().store({"content": "a"})
        assert make(embedder=FakeEmbedder(DIM)).embedding_dim == DIM
        with VectorStore(tmp_path / "store", None, storage_config=config()) as reader:
            assert reader.embedding_dim == DIM
        with pytest.raises(ValueError, match="Embedding dimension mismatch"):
            VectorStore(tmp_path / "store", FakeEmbedder(7), 7, storage_config=config())

    def test_files_never_carry_the_old_names(self, make: Make, tmp_path: Path) -> None:
        store = make()
        store.store_batch(units(200))
        store.run_maintenance()
        assert {path.name for path in tmp_path.iterdir()} <= {
            f"store.{end}" for end in ("db", "db-wal", "db-shm", "lock", "snapshot", "maintenance.lock")
        }


class TestFinding:
    def test_every_unit_finds_itself_before_and_after_training(self, make: Make, index_type: str) -> None:
        store, embedder = make(index_type=index_type), FakeEmbedder(DIM)
        store.store_batch(units(400))
        for _ in range(2):
            vectors = np.stack([embedder.vector(store._unit_to_text(unit)) for unit in units(400)])
            distances, ids = store.search_vectors(vectors, 1)
            assert [row[0] for row in ids] == [f"u{i}" for i in range(400)]
            assert np.allclose(distances, 0, atol=1e-6)
            assert store.index.ntotal == 400
            assert store.index.is_trained
            store.run_maintenance()
        assert bool(store.index.nlist) == (index_type == "ivf")

    @pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
    def test_distances_and_order_equal_an_exact_oracle(self, make: Make, index_type: str, metric: str) -> None:
        store = make(index_type=index_type, metric=metric)
        rng = np.random.default_rng(SEED)
        vectors = rng.standard_normal((600, DIM)).astype("float32")
        store.store_batch(units(600)[:500], vectors[:500])
        store.run_maintenance()
        store.store_batch(units(600)[500:], vectors[500:])
        store.delete_batch([f"u{i}" for i in range(0, 600, 7)])
        alive = np.array([i for i in range(600) if i % 7])
        queries = rng.standard_normal((20, DIM))
        exact = oracle(queries, vectors[alive], metric)
        distances, ids = store.search_vectors(queries, 10, recall=1.0)
        order = np.argsort(exact, axis=1)[:, :10]
        assert np.allclose(distances, np.take_along_axis(exact, order, 1), rtol=1e-4, atol=1e-5)
        assert ids == [[f"u{alive[j]}" for j in row] for row in order]


class TestFilters:
    FILTERS: tuple[tuple[dict[str, Any], Callable[[int], bool]], ...] = (
        ({"type": "skill"}, lambda i: i % 4 == 1),
        ({"tags": ["t1", "t2"]}, lambda i: i % 5 in (1, 2)),
        ({"metadata.score": {"gte": 0.5, "lt": 0.75}}, lambda i: 0.5 <= i / 400 < 0.75),
        ({"type": ["tool", "lesson"], "tags": "t0"}, lambda i: i % 4 in (0, 2) and i % 5 == 0),
        ({"metadata.score": {"lt": 0.01}}, lambda i: i < 4),
        ({"type": "unheard of"}, lambda i: False),
    )

    @pytest.mark.parametrize("number", range(len(FILTERS)))
    def test_results_are_exact(self, make: Make, index_type: str, number: int) -> None:
        filters, wanted = self.FILTERS[number]
        store = make(index_type=index_type)
        store.store_batch(units(400))
        for _ in range(2):
            found = store.search("fact number 5", 400, filters=filters)
            assert {unit_id for _, unit_id in found} == {f"u{i}" for i in range(400) if wanted(i)}
            store.run_maintenance()

    def test_follow_every_kind_of_change(self, make: Make, index_type: str) -> None:
        store = make(index_type=index_type)
        store.store_batch(units(300))
        store.run_maintenance()

        def tools() -> set[str]:
            return {unit_id for _, unit_id in store.search("fact", 400, filters={"type": "tool"})}

        expected = {f"u{i}" for i in range(300) if i % 4 == 2}
        assert tools() == expected
        store.store({"id": "new", "type": "tool", "content": "x"})
        store.update("u0", {**units(300)[0], "type": "tool"})
        store.delete("u2")
        store.update("u6", {**units(300)[6], "note": "same text, edited in place"})
        assert tools() == expected - {"u2"} | {"new", "u0"}
        store.run_maintenance()
        assert tools() == expected - {"u2"} | {"new", "u0"}
        store.clear()
        assert tools() == set()


class TestBadInput:
    def test_units_that_cannot_be_kept_are_refused_and_nothing_is_written(self, make: Make) -> None:
        store = make()
        store.store({"id": "before", "content": "kept"})
        bad: list[Any] = [
            *(
                "text",
                {"content": float("nan")},
                {"content": {1: 2}},
                {"content": object()},
                {"id": "", "content": "a"},
            ),
            *({"id": "", "content": "a"}, {"id": 7, "content": "a"}),
            *({"content": "x" * (5 * 2**20)}, {"content": "a", "metadata": "none"}),
            *({"content": "\ud800"}, {"metadata": nested(5000)}, {"metadata": within_itself()}),
        ]
        for unit in bad:
            with pytest.raises(InvalidUnitError):
                store.store(unit)
            with pytest.raises(InvalidUnitError, match=r"units\[1\]"):
                store.store_batch([{"content": "fine"}, unit])
        assert list(store.data) == ["before"]
        assert store.check() == []

    @pytest.mark.parametrize("value", [np.nan, np.inf, "x"])
    def test_vectors_that_are_no_vectors_are_refused(self, make: Make, tmp_path: Path, value: Any) -> None:
        bad = np.array([value] * DIM, dtype=object if value == "x" else float)
        with VectorStore(tmp_path / "bad", lambda _text: bad, DIM, storage_config=config()) as store:
            with pytest.raises(EmbeddingError):
                store.store({"content": "a"})
            with pytest.raises(InvalidVectorError, match=r"embeddings"):
                store.store_batch(units(2), np.stack([bad, bad]))
            with pytest.raises(InvalidVectorError, match="queries"):
                store.search_vectors(bad[None, :])
            assert store.count() == 0

    def test_wrong_dimensions_are_named(self, make: Make) -> None:
        store = make()
        with pytest.raises(ValueError, match="Embedding dimension mismatch"):
            store.store_batch(units(2), np.ones((2, DIM + 1)))
        with pytest.raises(DimensionMismatchError):
            store.search_vectors(np.ones((1, DIM - 1)))
        with pytest.raises(EmbeddingError, match="2 rows for 3 units"):
            store.store_batch(units(3), np.ones((2, DIM)))

    def test_zero_vectors_are_refused_under_cosine_only(self, make: Make) -> None:
        with pytest.raises(InvalidVectorError):
            make("c", metric="cosine").store_batch(units(1), np.zeros((1, DIM)))
        store = make("l")
        store.store_batch(units(1), np.zeros((1, DIM)))
        assert store.search_vectors(np.zeros((1, DIM)), 1)[1] == [["u0"]]

    def test_the_width_and_the_recall_of_a_search_are_checked(self, make: Make) -> None:
        store = make()
        for top_k in (0, -1, 1.5, True, "3"):
            with pytest.raises(InvalidQueryError, match="top_k"):
                store.search("x", top_k)  # type: ignore[arg-type]
        for recall in (0, 1.01, "high"):
            with pytest.raises(InvalidQueryError, match="recall"):
                store.search("x", recall=recall)  # type: ignore[arg-type]

    def test_files_that_are_not_ours_are_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.db"
        path.write_text("shopping list\n" * 100)
        with pytest.raises(StorageError):
            VectorStore(tmp_path / "notes", FakeEmbedder(DIM), storage_config=config())
        assert path.read_text() == "shopping list\n" * 100
        with pytest.raises(StorageError, match="missing"):
            VectorStore(tmp_path / "missing" / "store", FakeEmbedder(DIM), storage_config=config())

    def test_metric_and_model_of_a_file_cannot_be_changed(self, make: Make) -> None:
        class Named(FakeEmbedder):
            model_name = "model-a"

        store = make(embedder=Named(DIM), metric="cosine")
        store.store({"content": "a"})
        with pytest.raises(ConfigurationError, match="cosine"):
            make(embedder=Named(DIM), metric="l2")
        assert make(embedder=Named(DIM)).metric == "cosine"
        other = Named(DIM)
        other.model_name = "model-b"
        with pytest.raises(ModelMismatchError, match=r"model-a.*model-b"):
            make(embedder=other)


class TestLimits:
    def test_the_warning_comes_once_per_crossing(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        store = make(max_memory_units=10, warning_threshold=0.8)
        with caplog.at_level(logging.WARNING, logger="memevolve_gpu"):
            for unit in units(9):
                store.store(unit)
            assert len([r for r in caplog.records if "near-limit" in r.message]) == 1
            store.delete_batch(["u0", "u1", "u2"])
            for unit in units(3):
                store.store(unit)
            assert len([r for r in caplog.records if "near-limit" in r.message]) == 2

    @pytest.mark.parametrize("go", ["delete", "delete_batch", "clear", "another process's"])
    def test_deletes_below_the_warning_re_arm_it(self, make: Make, caplog: pytest.LogCaptureFixture, go: str) -> None:
        """However few are left to write: the next write may cross the threshold in one step."""
        store = make(max_memory_units=10, warning_threshold=0.8)
        with caplog.at_level(logging.WARNING, logger="memevolve_gpu"):
            store.store_batch(units(9))
            store.update("u1", {"content": "not another crossing"})
            store.store({"id": "u1", "content": "nor this"})
            assert len([r for r in caplog.records if "near-limit" in r.message]) == 1
            if go == "delete":
                assert all(store.delete(f"u{number}") for number in range(3))
            elif go == "delete_batch":
                store.delete_batch(["u0", "u1", "u2"])
            elif go == "clear":
                store.clear()
            else:
                make().delete_batch(["u0", "u1", "u2"])
            store.store_batch(units(9))
            assert len([r for r in caplog.records if "near-limit" in r.message]) == 2

    def test_memory_warns_and_counts_as_near_a_limit(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        store = make(max_memory_mb=0.05)
        assert not store.get_storage_health()["near_limit"]
        with caplog.at_level(logging.WARNING, logger="memevolve_gpu"):
            for start in range(0, 2000, 10):
                if store.get_storage_health()["near_limit"]:
                    break
                store.store_batch([{**unit, "id": f"m{start}-{i}"} for i, unit in enumerate(units(10))])
        health = store.get_storage_health()
        assert health["memory_usage_mb"] >= 0.8 * health["max_memory_mb"]
        assert health["usage_percentage"] < 0.1
        assert any("MAX_MEMORY_MB" in one for one in health["recommendations"])
        assert len([r for r in caplog.records if "MAX_MEMORY_MB" in r.message]) == 1

    def test_memory_is_counted_and_limited(self, make: Make) -> None:
        store = make(max_memory_mb=0.05)
        with pytest.raises(CapacityError, match="MAX_MEMORY_MB"):
            store.store_batch(units(2000))
        assert store.count() == 0
        store.store_batch(units(20))
        health = store.get_storage_health()
        assert 0 < health["memory_usage_mb"] <= health["max_memory_mb"] == pytest.approx(0.05, rel=1e-3)
        assert store.delete("u1")

    def test_health_forgets_a_refused_build_once_another_one_serves(self, tmp_path: Path) -> None:
        settings = config(index_type="ivf")
        vectors = np.random.default_rng(SEED).standard_normal((1200, 8)).astype(np.float32)
        with VectorStore(tmp_path / "given", None, embedding_dim=8, storage_config=settings) as store:
            store.store_batch([{"id": f"u{i}"} for i in range(400)], vectors[:400])
            store.run_maintenance()  # nothing embeds the samples that 400 units need to train on
            (said,) = store.get_storage_health()["recommendations"]
            assert "refused" in said
            assert said.count("stay") == 2, "by the cause, and by the advice"
            store.store_batch([{"id": f"u{i}"} for i in range(400, 1200)], vectors[400:])
            store.run_maintenance()
            assert store.index.kind == "ivf"
            assert store.get_storage_health()["recommendations"] == []

    def test_health_has_what_operators_were_promised(self, make: Make) -> None:
        store = make(index_type="ivf")
        store.store_batch(units(400))
        assert store.get_storage_health()["needs_retraining"]
        store.run_maintenance()
        health = store.get_storage_health()
        assert health["current_count"] == 400
        assert health["max_units"] == 50_000
        assert health["performance_status"] == "OPTIMAL"
        assert health["current_nlist"] == 10
        assert health["vectors_per_centroid"] == 40
        assert health["training_quality_score"] >= 0.9
        assert not health["needs_retraining"]
        assert health["recommendations"] == []
        assert "latency" not in health

    def test_health_of_a_large_store_tells_what_other_lists_did(self, make: Make) -> None:
        store = make(index_type="ivf", performance_threshold=300)
        store.store_batch(units(400))
        store.run_maintenance()
        for i in range(8):
            store.search(f"fact number {i}")
        before: Any = store.get_storage_health()
        assert before["latency"]["searches"] == 8
        assert before["nlist_change"]["nlist"] == [0, 10]
        store.store_batch([{**unit, "id": f"more {i}"} for i, unit in enumerate(units(400))])
        store.run_maintenance()
        store.search("fact number 9")
        after: Any = store.get_storage_health()
        assert after["latency"]["searches"] == 1
        change = after["nlist_change"]
        assert change["nlist"] == [10, 20]
        assert change["before"]["p50_ms"] == before["latency"]["p50_ms"]
        assert change["since"]["p50_ms"] == after["latency"]["p50_ms"]
        assert change["before"]["recall"] >= 0.95
        assert change["since"]["recall"] >= 0.95


class TestLivingTogether:
    def test_a_reopened_store_answers_the_same(self, make: Make, index_type: str) -> None:
        store = make(index_type=index_type)
        store.store_batch(units(300))
        store.snapshot()
        store.store({"id": "late", "content": "after the snapshot"})
        store.delete("u5")
        before = store.search("fact number 9", 20)
        store.close()
        again = make(index_type=index_type)
        assert again.search("fact number 9", 20) == before
        assert again.exists("late")
        assert not again.exists("u5")
        assert "snapshot-loaded" in again.statistics()["event_totals"]

    def test_two_open_stores_see_each_others_writes_at_once(self, make: Make) -> None:
        first, second = make(), make()
        first.store({"id": "a", "content": "from the first"})
        assert second.search("from the first", 1)[0][1] == "a"
        second.update("a", {"content": "changed by the second"})
        assert_nearest(first, "changed by the second", "a")
        second.delete("a")
        assert first.search("anything") == []
        second.clear()
        first.store({"id": "b", "content": "after the clearing"})
        assert second.search("after the clearing", 1)[0][1] == "b"

    def test_threads_search_while_one_writes_and_maintains(self, make: Make) -> None:
        store = make(index_type="ivf", min_training_units=50)
        vectors = np.random.default_rng(SEED).standard_normal((800, DIM)).astype("float32")
        store.store_batch(units(800)[:200], vectors[:200])
        stop, problems = threading.Event(), []

        def search() -> None:
            while not stop.is_set():
                distances, ids = store.search_vectors(vectors[:50], 1)
                if [row[0] for row in ids] != [f"u{i}" for i in range(50)] or distances.max() > 1e-5:
                    problems.append(ids)

        searchers = [threading.Thread(target=search) for _ in range(2)]
        for thread in searchers:
            thread.start()
        try:
            for start in range(200, 800, 50):
                store.store_batch(units(800)[start : start + 50], vectors[start : start + 50])
                store.store_batch(units(50)[:10], vectors[:10])  # replaced by themselves: they must never be missing
                store.run_maintenance()
        finally:
            stop.set()
            for thread in searchers:
                thread.join()
        assert not problems

    def test_the_background_builds_without_being_asked(self, make: Make) -> None:
        store = make(background=True, index_type="ivf")
        store.store_batch(units(300))
        deadline = threading.Event()
        for _ in range(200):
            if store.index.nlist:
                break
            deadline.wait(0.05)
        assert store.index.nlist == 10
        assert store.search("fact number 9 about topic 9", 1)[0][1] == "u9"

    def test_an_index_type_asked_for_stays_with_the_store(self, make: Make) -> None:
        make(index_type="hnsw").close()
        assert make().index_type == "hnsw"
        make(index_type="flat").close()
        assert make().index_type == "flat"

    def test_data_without_structure_never_makes_a_build_loop(self, make: Make) -> None:
        store = make(index_type="ivf")
        store.store_batch(units(400), np.tile(np.ones(DIM), (400, 1)))
        assert len(store.run_maintenance()["actions"]) == 1
        assert store.run_maintenance()["actions"] == []
        store.close()
        assert make(index_type="ivf").run_maintenance()["actions"] == []
        distances, ids = make(index_type="ivf").search_vectors(np.ones((1, DIM)), 400)
        assert set(ids[0]) == {f"u{i}" for i in range(400)}
        assert (distances == 0).all()

    def test_a_backup_is_a_store(self, make: Make, tmp_path: Path) -> None:
        store = make()
        store.store_batch(units(30))
        store.backup(tmp_path / "copy.db")
        store.clear()
        copy = make("copy")
        assert copy.count() == 30
        assert copy.search("fact number 9 about topic 9", 1)[0][1] == "u9"

    def test_state_moves_to_another_instance(self, make: Make) -> None:
        store, other = make(), make("other")
        store.store_batch(units(30))
        other.restore_state(store.save_state())
        assert {unit["id"] for unit in other} == {unit["id"] for unit in store}
        assert other.search("fact number 9 about topic 9", 1)[0][1] == "u9"


class TestRecall:
    def test_the_index_is_calibrated_on_what_is_asked(self, make: Make) -> None:
        store = make(index_type="ivf", target_recall=0.95)
        rng = np.random.default_rng(SEED)
        vectors = rng.standard_normal((6000, DIM)).astype("float32")
        store.store_batch(units(6000), vectors)
        store.run_maintenance()
        asked = rng.standard_normal((400, DIM)) + 1
        for query in asked[:200]:
            store.search_vectors(query[None, :], 10)
        assert "calibrated on real queries" in store.run_maintenance()["actions"]
        assert "calibrated on real queries" not in store.run_maintenance()["actions"]
        for target in (0.9, 0.95, 0.99):
            found = store.search_vectors(asked[200:], 10, recall=target)[0]
            truth = store.search_vectors(asked[200:], 10, recall=1.0)[0]
            assert (found <= truth[:, -1:] * (1 + 1e-5)).mean() >= target - 0.01
        assert (store.statistics()["probed_recall"] or 0) >= 0.93

    @pytest.mark.parametrize("damaged", [None, b"{", b"[]", b'{"created_at": 1, "stats": 7}'])
    def test_a_calibration_on_what_is_asked_survives_without_another_snapshot(
        self, make: Make, damaged: bytes | None
    ) -> None:
        store = make(index_type="ivf")
        store.store_batch(units(2500), np.random.default_rng(SEED).standard_normal((2500, DIM)))
        store.run_maintenance()
        store.search_vectors(np.random.default_rng(1).standard_normal((300, DIM)), 5)
        assert "calibrated on real queries" in store.run_maintenance()["actions"]
        calibrated, session = store._open.live.view.stats, store._open
        if damaged is not None:
            with session.records.write() as tx:
                tx.set_meta(STATS_KEY, damaged)
        store.close()
        again = make(index_type="ivf")
        assert again.index.kind == "ivf"
        if damaged is None:
            assert again._open.live.view.stats == replace(calibrated, probed=None)
        assert ("calibrated on real queries" in again.run_maintenance()["actions"]) is (damaged is not None)

    def test_a_calibration_is_not_taken_for_that_of_a_later_snapshot(self, make: Make, tmp_path: Path) -> None:
        """The snapshot is removed, so generations begin again, and other vectors take the place of the first."""
        rng = np.random.default_rng(SEED)
        with make(index_type="ivf") as store:
            store.store_batch(units(2500), rng.standard_normal((2500, DIM)))
            store.run_maintenance()
            store.search_vectors(rng.standard_normal((300, DIM)), 5)
            assert "calibrated on real queries" in store.run_maintenance()["actions"]
        for snapshot in tmp_path.glob("*.snapshot"):
            snapshot.unlink()
        with make(index_type="ivf") as store:
            store.store_batch(units(2500), rng.standard_normal((2500, 3)) @ rng.standard_normal((3, DIM)))
            store.run_maintenance()
            built = store._open.live.view.stats
        with make(index_type="ivf") as store:
            assert store._open.live.view.stats == replace(built, probed=None)

    def test_a_store_that_is_closed_does_not_finish_its_calibration(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make(index_type="ivf")
        store.store_batch(units(2500), np.random.default_rng(SEED).standard_normal((2500, DIM)))
        store.run_maintenance()
        store.search_vectors(np.random.default_rng(1).standard_normal((300, DIM)), 5)
        session, steps = store._open, list[int]()
        pause = SearchYield.__call__

        def step(self: SearchYield) -> None:
            steps.append(1)
            session.maintenance.closing = True
            pause(self)

        monkeypatch.setattr(SearchYield, "__call__", step)
        report = store.run_maintenance()
        assert len(steps) == 1
        assert report["actions"] == []
        monkeypatch.undo()
        session.maintenance.closing = False
        assert "calibrated on real queries" in store.run_maintenance()["actions"]

    def test_the_background_leaves_threads_of_the_engine_to_searches(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faiss, seen, done = load_faiss(), list[int](), threading.Event()
        before = faiss.omp_get_max_threads()
        try:
            faiss.omp_set_num_threads(4)
            monkeypatch.setattr("memevolve_gpu.live.worker._lower_priority", lambda: faiss.omp_set_num_threads(4))
            store, run = make(background=True), Maintenance.run_if_due

            def watched(self: Maintenance) -> float | None:
                seen.append(faiss.omp_get_max_threads())
                done.set()
                return run(self)

            monkeypatch.setattr(Maintenance, "run_if_due", watched)
            store._open.wake()
            assert done.wait(30)
            assert (seen[0], faiss.omp_get_max_threads()) == (2, 4)
        finally:
            faiss.omp_set_num_threads(before)

    def test_the_sample_of_queries_survives_and_can_be_switched_off(self, make: Make) -> None:
        store = make(index_type="ivf")
        store.store_batch(units(2500), np.random.default_rng(SEED).standard_normal((2500, DIM)))
        store.search_vectors(np.random.default_rng(1).standard_normal((300, DIM)), 5)
        store.close()
        again = make(index_type="ivf")
        assert "calibrated" not in again.run_maintenance()["actions"]
        assert again.statistics()["queries_sampled"] == 300
        again.close()
        off = make(index_type="ivf", sample_queries=False)
        off.search_vectors(np.ones((300, DIM)), 5)
        assert off.statistics()["queries_sampled"] == 0

    def test_service_samples_train_an_index_that_is_wanted_early_and_are_paid_for_once(self, make: Make) -> None:
        embedder = FakeBatchEmbedder(DIM)
        store = make(embedder=embedder, index_type="ivf", min_training_units=0)
        store.store_batch(units(3))
        assert store.run_maintenance()["actions"] == ["built ivf of 3 rows"]
        assert store.index.nlist == 10
        assert store.search("fact number 1 about topic 1", 1)[0][1] == "u1"
        paid = len(embedder.texts)
        assert paid >= 2000
        store.retrain()
        store.close()
        again = make(embedder=embedder, index_type="ivf", min_training_units=0)
        again.retrain()
        assert len(embedder.texts) <= paid + 3
        assert again.count() == 3, "a sample became a unit"
        assert len(again.search("Regular testing prevents surprises", 10)) == 3

    def test_retrain_with_samples_goes_before_the_least_number_of_units(self, make: Make) -> None:
        store = make(index_type="ivf", min_training_units=1000)
        store.store_batch(units(200))
        assert store.retrain()["actions"] == ["built exact of 200 rows"]
        assert store.retrain(samples=True)["actions"] == ["built ivf of 200 rows"]
        assert store.run_maintenance()["actions"] == []
        assert store.search("fact number 9 about topic 9", 1)[0][1] == "u9"

    def test_a_service_that_fails_leaves_the_store_exact_and_says_so(self, make: Make) -> None:
        class Failing(FakeEmbedder):
            dimension = DIM

            def __call__(self, text: str) -> Any:
                if "fact" not in text:
                    raise OSError("no more credit")
                return super().__call__(text)

        store = make(embedder=Failing(DIM), index_type="ivf", min_training_units=0)
        store.store_batch(units(5))
        store.run_maintenance()
        assert store.index.kind == "exact"
        assert any("exact" in sentence for sentence in store.get_storage_health()["recommendations"])
        assert store.search("fact number 1 about topic 1", 1)[0][1] == "u1"

    def test_management_that_removed_much_makes_the_index_train_anew(self, make: Make) -> None:
        store = make(index_type="ivf")
        store.store_batch(units(2000), np.random.default_rng(SEED).standard_normal((2000, DIM)))
        store.run_maintenance()
        small = store.delete_batch([f"u{i}" for i in range(20)])
        assert store.register_management_operation("forget", {"removed": small})["decision"] == "nothing"
        large = store.delete_batch([f"u{i}" for i in range(20, 620)])
        entry = store.register_management_operation("prune", {"removed": large})
        assert (entry["decision"], entry["count_before"], entry["count_after"]) == ("retrain", 1980, 1380)
        report = store.run_maintenance()
        assert report["actions"] == ["built ivf of 1380 rows"]
        assert "management removed 620" in report["reason"]
        with pytest.raises(InvalidQueryError, match="operation_type"):
            store.register_management_operation("shuffle", {})


def assert_nearest(store: VectorStore, text: str, unit_id: str) -> None:
    distance, found = store.search(text, 1)[0]
    assert found == unit_id
    assert distance == pytest.approx(0, abs=1e-6)


def oracle(queries: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    """Distances by the definition, in float64."""
    q, v = queries.astype("float64"), vectors.astype("float64")
    if metric == "l2":
        return np.asarray(((q[:, None, :] - v[None, :, :]) ** 2).sum(axis=2))
    if metric == "cosine":
        q, v = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (q, v))
        return np.asarray(1 - q @ v.T)
    return np.asarray(-q @ v.T)
