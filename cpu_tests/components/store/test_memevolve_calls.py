"""What MemEvolve's code does with a store, in our own words: bool(store), absent faiss, settings, limits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_kit import DIM, Given, store_at
from milvus_fake import FakeMilvus

from memevolve_gpu import EngineError, MemorySystem, MemorySystemConfig, StorageBackend, VectorStore
from memevolve_gpu.components.validation import ScratchStore
from memevolve_gpu.integrations.langchain import MemEvolveVectorStore
from memevolve_gpu.milvus.store import MilvusStore


def everything_that_may_be_asked_for_its_truth(path: Path) -> dict[str, Any]:
    """An empty one of each of our backends and of what wraps them."""
    store = store_at(path)
    milvus = MilvusStore(
        Given(), storage_config={"background": False}, milvus_config={"timeout": 20}, client=FakeMilvus().connect
    )
    return {
        "VectorStore": store,
        "VectorStore.index": store.index,
        "MilvusStore": milvus,
        "ScratchStore": ScratchStore(),
        "LangChain": MemEvolveVectorStore(store, embedding=None),
        "LangChain on Milvus": MemEvolveVectorStore(milvus, embedding=None),
        "MemorySystem": MemorySystem(MemorySystemConfig(storage_backend=store)),
        "a user's own": type("Own", (ScratchStore,), {"__len__": lambda self: 0})(),
    }


def test_a_backend_is_true_with_units_and_without(tmp_path: Path) -> None:
    """MemEvolve asks ``if not self.storage``: an empty backend that counts as absent never gets its first unit."""
    asked = everything_that_may_be_asked_for_its_truth(tmp_path)
    assert {name: bool(one) for name, one in asked.items()} == dict.fromkeys(asked, True)
    for name in ("VectorStore", "MilvusStore", "ScratchStore"):
        asked[name].store({"id": "a", "content": "one"})
        assert bool(asked[name]), name
        asked[name].clear()
        assert bool(asked[name]), name
        assert asked[name].count() == 0
    for name in ("VectorStore", "MilvusStore"):
        asked[name].close()
        assert bool(asked[name]), f"{name}, closed: truth must not raise"


def test_no_backend_of_ours_takes_its_truth_from_its_length() -> None:
    ours: list[type] = [StorageBackend]
    for cls in ours:  # grows while it is read
        children: list[type] = cls.__subclasses__()
        ours += [child for child in children if child.__module__.startswith("memevolve_gpu")]
    assert {VectorStore, MilvusStore, ScratchStore} <= set(ours)
    assert [cls for cls in ours if "__bool__" not in dir(cls)] == []


def test_a_blocked_faiss_is_said_by_the_constructor_also_after_it_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_at(tmp_path) as running:
        running.store({"id": "a", "content": "one"})
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "faiss", None)
            for kind in ("flat", "ivf"):
                with pytest.raises(RuntimeError, match=f"Failed to create {kind} index") as raised:
                    VectorStore(tmp_path / "new", Given(), index_type=kind)
                assert isinstance(raised.value, EngineError)
            assert running.search("one", 1)[0][1] == "a", "a store that is open keeps what it has"
        assert list(tmp_path.glob("new*")) == []
    with store_at(tmp_path) as again:
        assert again.count() == 1, "a block that is lifted is forgotten"


def test_each_call_that_memevolve_makes_on_a_store(tmp_path: Path) -> None:
    """Its calls by keyword and position, with what it does with the results."""
    embed = Given()
    store = VectorStore(
        index_file=str(tmp_path / "vector"),
        embedding_function=embed,
        embedding_dim=16,
        index_type="flat",
        storage_config=None,
    )
    assert store.count() == 0
    assert store.store_batch([]) == []
    assert store.store_batch([{"id": "a", "content": "one", "tags": []}, {"id": "b", "content": "two"}]) == ["a", "b"]
    assert store.store({"id": "c", "content": "three", "metadata": {"encoding_method": "llm"}}) == "c"
    everything = store.retrieve_all()
    assert isinstance(everything, list)
    assert [unit["id"] for unit in everything[:5]] == ["a", "b", "c"]
    assert all(unit["metadata"].get("created_at", "") > "" for unit in everything)
    assert store.exists("a")
    assert not store.exists("z")
    assert store.retrieve("z") is None
    assert [store.delete(unit_id) for unit_id in ("c", "z", "")] == [True, False, False]
    assert store.update("a", {"content": "other"}) is True
    assert store.update("z", {"content": "other"}) is False
    assert "one" not in store.retrieve("a")["content"]  # type: ignore[index]
    assert sorted(store.data.keys()) == ["a", "b"]
    assert store.index.ntotal == 2
    found = store.search("two", top_k=5)
    assert [type(part) for part in found[0]] == [float, str]
    store.restore_state(store.save_state())
    assert store.count() == 2
    store.clear()
    assert store.retrieve_all() == []
    store.close()


class TestLists:
    """Too many or too few vectors in each list are said, whatever bounds the number of lists."""

    def held(self, path: Path, count: int, step: int = 1500, **settings: Any) -> dict[str, Any]:
        rng = np.random.default_rng(7)
        with store_at(path, index_type="ivf", **settings) as store:
            for start in range(0, count, step):
                rows = range(start, min(count, start + step))
                given = rng.standard_normal((len(rows), DIM)).astype(np.float32)
                store.store_batch([{"id": f"u{row}", "content": "x"} for row in rows], given)
                store.run_maintenance()
            return dict(store.get_storage_health())

    def test_a_maximum_of_lists_is_named(self, tmp_path: Path) -> None:
        health = self.held(tmp_path, 3000, nlist_max=20)
        assert (health["current_nlist"], health["performance_status"]) == (20, "DEGRADED")
        assert any("MEMEVOLVE_STORAGE_NLIST_MAX=20" in one for one in health["recommendations"])

    def test_lists_that_do_not_follow_are_named(self, tmp_path: Path) -> None:
        health = self.held(tmp_path, 4500, adaptive_nlist=False)
        assert (health["current_nlist"], health["performance_status"]) == (38, "DEGRADED")
        assert any("MEMEVOLVE_STORAGE_ADAPTIVE_NLIST=false" in one for one in health["recommendations"])

    def test_too_many_lists_are_named(self, tmp_path: Path) -> None:
        health = self.held(tmp_path, 1500, nlist_min=200)
        assert health["performance_status"] == "INEFFICIENT"
        assert any("MEMEVOLVE_STORAGE_NLIST_MIN=200" in one for one in health["recommendations"])

    @pytest.mark.parametrize("count", [1500, 30_000])  # of the larger, 256 lists of 117 vectors are what is planned
    def test_lists_by_the_rule_need_no_word(self, tmp_path: Path, count: int) -> None:
        health = self.held(tmp_path, count, step=count)
        assert (health["performance_status"], health["recommendations"]) == ("OPTIMAL", [])


class TestQualityOfNow:
    """``training_quality_score`` is about the searches of now, not about the last build."""

    def built(self, path: Path, vectors: Any, **settings: Any) -> VectorStore:
        store = store_at(path, index_type="ivf", **settings)
        store.store_batch([{"id": f"u{row}", "content": "x"} for row in range(len(vectors))], vectors)
        store.run_maintenance()
        return store

    def test_it_follows_the_recall_of_what_is_asked(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(5)
        vectors = (rng.standard_normal((20_000, 32)) * 0.85 ** np.arange(32)).astype(np.float32)
        settings = {"background": False, "target_recall": 0.3, "vectors_per_centroid": 50, "nlist_max": 400}
        with VectorStore(tmp_path / "m", lambda _text: vectors[0], 32, "ivf", settings) as store:
            store.store_batch([{"id": f"u{row}", "content": "x"} for row in range(len(vectors))], vectors)
            store.run_maintenance()
            at_first = store.get_storage_health()["training_quality_score"]
            asked = (rng.standard_normal((60, 32)) * 6).astype(np.float32)  # unlike the units
            found, _ = store.search_vectors(asked, 10)
            exact, _ = store.search_vectors(asked, 10, recall=1.0)
            recall = float((found <= exact[:, -1:] * (1 + 1e-5)).mean())
            assert recall < at_first - 0.02, "this test asks for what the index finds less well"
            assert store.get_storage_health()["training_quality_score"] == pytest.approx(recall, abs=0.015)

    @pytest.mark.parametrize("metric", ["l2", "cosine"])
    def test_rows_far_from_all_others_count(self, tmp_path: Path, metric: str) -> None:
        rng = np.random.default_rng(6)
        with self.built(tmp_path, rng.standard_normal((1500, DIM)).astype(np.float32), metric=metric) as store:
            far = (50 + rng.standard_normal((700, DIM))).astype(np.float32)
            store.store_batch([{"id": f"far{row}", "content": "x"} for row in range(700)], far)
            _, ids = store.search_vectors(far, 1)
            alone = float(np.mean([found == [f"far{row}"] for row, found in enumerate(ids)]))
            assert store.get_storage_health()["training_quality_score"] == pytest.approx(alone, abs=0.1)


class TestTrainingSection:
    """Health says what the index was trained on, or why it was not and which setting changes that."""

    def of(self, store: VectorStore) -> dict[str, Any]:
        return dict(store.get_storage_health()["training"])

    def test_below_the_threshold_it_names_the_setting(self, tmp_path: Path) -> None:
        with store_at(tmp_path) as store:
            store.store_batch([{"id": f"u{row}", "content": f"w{row}"} for row in range(30)])
            store.run_maintenance()
            found = self.of(store)
            assert (found["trained"], found["source"], found["samples"]) == (False, None, 0)
            assert (found["next_source"], found["next_samples"], found["min_training_units"]) == ("service", 2000, 1000)
            assert "30 units are fewer than the 1000" in found["reason"]
            assert found["setting"] == "MEMEVOLVE_STORAGE_MIN_TRAINING_UNITS"

    @pytest.mark.parametrize(("count", "source", "samples"), [(40, "service", 2000), (120, "hybrid", 1380)])
    def test_a_lowered_threshold_trains_on_samples_and_says_so(
        self, tmp_path: Path, count: int, source: str, samples: int
    ) -> None:
        with store_at(tmp_path, index_type="ivf", min_training_units=20) as store:
            store.store_batch([{"id": f"u{row}", "content": f"w{row}"} for row in range(count)])
            before = self.of(store)
            assert not before["trained"]
            assert "run_maintenance()" in before["reason"]
            assert before["setting"] == "MEMEVOLVE_STORAGE_BACKGROUND"
            store.run_maintenance()
            found = self.of(store)
            assert (found["source"], found["units"], found["samples"]) == (source, count, samples)
            assert (found["trained"], found["reason"], found["setting"]) == (True, "", "")
            assert found["samples_kept"] == samples
            assert found["last_samples"]["service"] == samples

    def test_from_a_thousand_on_its_own_vectors_are_enough(self, tmp_path: Path) -> None:
        vectors = np.random.default_rng(3).standard_normal((1200, DIM)).astype(np.float32)
        with store_at(tmp_path, index_type="ivf") as store:
            store.store_batch([{"id": f"u{row}", "content": "x"} for row in range(1200)], vectors)
            store.run_maintenance()
            found = self.of(store)
            assert (found["trained"], found["source"], found["units"]) == (True, "existing", 1200)
            assert (found["samples"], found["samples_kept"], found["last_samples"]) == (0, 0, None)
        with store_at(tmp_path, index_type="flat") as store:
            store.run_maintenance()
            found = self.of(store)
            assert (found["trained"], found["setting"]) == (False, "MEMEVOLVE_STORAGE_INDEX_TYPE")
