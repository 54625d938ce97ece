"""The order in which an index is rebuilt, which candidates are tried, and what becomes of the old index."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_kit import Card, OnCard, machine_with
from support import SEED, FakeBatchEmbedder

from memevolve_gpu import VectorStore
from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index import registry
from memevolve_gpu.index.registry import build
from memevolve_gpu.live import rebuild as module
from memevolve_gpu.live.device_manager import DeviceManager
from memevolve_gpu.live.live_index import LiveIndex
from memevolve_gpu.live.scheduler import RebuildReason
from memevolve_gpu.live.snapshot_writer import Saver
from memevolve_gpu.training.recall import Quality, measure
from memevolve_gpu.types import IndexPlan

DIM, COUNT = 16, 400
Steps = list[str]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    made = Card()
    monkeypatch.setitem(registry.ENGINES, ("torch", "exact"), OnCard)
    monkeypatch.setattr(OnCard, "card", made, raising=False)
    yield made
    made.holders.clear()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The steps of every rebuild from now on."""
    done: Steps = []

    def noted(owner: Any, name: str, step: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            done.append(step(*given))
            return real(*given, **named)

        monkeypatch.setattr(owner, name, call)

    def what(plan: IndexPlan, *_given: Any) -> str:
        return f"build {plan.kind} on {plan.engine}"

    noted(module, "_gather", lambda *_: "gather")
    noted(module, "_gather_delta", lambda *_: "gather the delta")
    noted(module, "build", what)
    noted(module, "calibrate", lambda *_: "calibrate")
    noted(module, "measure", lambda *_: "evaluate")
    noted(module, "self_hits", lambda *_: "check")
    noted(DeviceManager, "admit", lambda *_: "admit")
    noted(DeviceManager, "refused", lambda *_: "refused")
    noted(LiveIndex, "replace", lambda *_: "swap")
    noted(Saver, "save", lambda *_: "save")
    return done


def opened(folder: Path, card: Card | None = None, **settings: Any) -> VectorStore:
    chosen: dict[str, Any] = {"background": False, "min_training_units": 100, "index_type": "ivf"}
    if card is None:
        return VectorStore(
            folder / "memory", FakeBatchEmbedder(DIM), storage_config={**chosen, **settings, "device": "cpu"}
        )
    chosen |= {"index_type": "flat", "device": "cuda"}
    return VectorStore(
        folder / "memory", FakeBatchEmbedder(DIM), storage_config={**chosen, **settings}, machine=machine_with(card)
    )


def fill(store: VectorStore, start: int = 0, end: int = COUNT) -> None:
    vectors = np.random.default_rng(SEED + start).standard_normal((end - start, DIM)).astype(np.float32)
    store.store_batch([{"id": f"u{i}", "content": f"number {i}"} for i in range(start, end)], embeddings=vectors)


def test_an_index_is_gathered_built_calibrated_evaluated_swapped_and_saved(tmp_path: Path, steps: Steps) -> None:
    with opened(tmp_path) as store:
        fill(store)
        assert store.run_maintenance()["actions"][-1] == "built ivf of 400 rows"
        wanted = ["gather", "build ivf on cpu", "calibrate", "evaluate", "swap", "save"]
        assert steps[-len(wanted) :] == wanted


def test_waiting_rows_are_appended_checked_and_swapped(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memevolve_gpu.live.scheduler.DELTA_ROWS", 10)
    with opened(tmp_path) as store:
        fill(store)
        store.run_maintenance()
        steps.clear()
        fill(store, COUNT, COUNT + 20)
        assert store.run_maintenance()["actions"] == ["extended ivf of 420 rows"]
        assert steps == ["gather the delta", "check", "swap"]


def test_reused_quantisers_that_fall_short_are_trained_again(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memevolve_gpu.live.scheduler.DEAD_ROWS", 10)
    with opened(tmp_path, adaptive_nlist=False) as store:
        fill(store)
        store.run_maintenance()
        asked = [0]

        def poor_at_first(*given: Any, **named: Any) -> Quality:
            asked[0] += 1
            return Quality(1.0, 0.1, 64) if asked[0] <= 2 else measure(*given, **named)

        monkeypatch.setattr(module, "measure", poor_at_first)
        store.delete_batch([f"u{i}" for i in range(70)])
        steps.clear()
        assert store.run_maintenance()["actions"] == ["built ivf of 330 rows"]
        assert steps.count("build ivf on cpu") == 2
        assert steps[:2] == ["gather", "build ivf on cpu"]
        assert steps[-4:] == ["build ivf on cpu", "calibrate", "swap", "save"]
        assert store.statistics()["events"][-1]["figures"]["trained"] is True


def test_a_kind_that_falls_short_leaves_an_exact_index_that_says_why(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", lambda *_given, **_named: Quality(1.0, 0.1, 64))
    with opened(tmp_path) as store:
        fill(store)
        store.run_maintenance()
        assert store._open.live.view.index.kind == "exact"
        assert "ivf fell short" in store.statistics()["events"][-2]["cause"]
        steps.clear()
        store.run_maintenance()
        assert steps == [], "the store has not changed: the kind is not tried again"


def test_the_gpu_is_tried_before_the_cpu(tmp_path: Path, card: Card, steps: Steps) -> None:
    card.taken = 0
    with opened(tmp_path, card) as store:
        fill(store)
        store.run_maintenance()
        at = steps.index("admit")
        assert steps[at : at + 5] == ["admit", "gather", "build exact on torch", "evaluate", "swap"]
        assert "refused" not in steps


def test_the_cpu_takes_over_from_a_gpu_that_refuses(
    tmp_path: Path, card: Card, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Card, _holder: OnCard, _size: int) -> None:
        raise DeviceError("out of memory", "out-of-memory")

    monkeypatch.setattr(Card, "allocate", full)
    with opened(tmp_path, card) as store:
        fill(store)
        store.retrain()
        at = steps.index("admit")
        assert steps[at : at + 4] == ["admit", "gather", "build exact on torch", "refused"]
        assert steps[at + 4 : at + 7] == ["gather", "build exact on cpu", "swap"]
        assert steps.count("admit") == 1
        assert store.statistics()["device"]["device"] == "cpu"


def test_a_gpu_index_that_is_not_good_enough_is_not_used(
    tmp_path: Path, card: Card, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", lambda *_given, **_named: Quality(1.0, 0.1, 64))
    with opened(tmp_path, card) as store:
        fill(store)
        store.run_maintenance()
        assert steps[steps.index("admit") :][:4] == ["admit", "gather", "build exact on torch", "refused"]
        assert "exact fell short" in (store.statistics()["device"]["problem"] or "")
        assert store.statistics()["device"]["device"] == "cpu"
        steps.clear()
        store.run_maintenance()
        assert "admit" not in steps, "its engine is not used until restart"


def test_the_old_index_has_left_a_full_device_before_the_new_one_is_built(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, card) as store:
        fill(store)
        store.run_maintenance()
        old = weakref.ref(store._open.live.view.index)
        assert isinstance(old(), OnCard)
        card.taken = card.free - (100 << 20)  # the index in use has to leave before another one fits
        alive: list[bool] = []

        def noted(*given: Any, **named: Any) -> Any:
            alive.append(old() is not None)
            return build(*given, **named)

        monkeypatch.setattr(module, "build", noted)
        gc.disable()
        try:
            store.retrain()
        finally:
            gc.enable()
        assert alive == [False]
        assert store.statistics()["device"]["device"] == "cuda:0"


def test_a_build_that_a_reload_overtakes_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        fill(store)

        def overtaken(*given: Any, **named: Any) -> Any:
            made = build(*given, **named)
            store._open.live.reload("a test wants it")
            return made

        monkeypatch.setattr(module, "build", overtaken)
        before = store._open.live.view.index.kind
        assert "dropped a build that was overtaken by a reload" in store.run_maintenance()["actions"]
        assert store._open.live.view.index.kind == before
        assert store.count() == COUNT


def test_requested_training_is_done_although_no_rule_asks_for_it(tmp_path: Path, steps: Steps) -> None:
    """Such as when the recall of real queries fell."""
    with opened(tmp_path) as store:
        fill(store)
        store.run_maintenance()
        steps.clear()
        assert store._open.maintenance.cause(store._open.live.view) is None
        store._open.maintenance.notify(RebuildReason("train", "recall@10 of real queries fell to 0.500"))
        assert store.run_maintenance()["actions"] == ["built ivf of 400 rows"]
        assert steps.count("swap") == 1
        assert store.run_maintenance()["actions"] == []


def test_low_recall_of_real_queries_leads_to_one_training(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memevolve_gpu.live.maintenance.view_recall", lambda *_: 0.5)
    queries = np.random.default_rng(SEED).standard_normal((64, DIM)).astype(np.float32)
    with opened(tmp_path) as store:
        fill(store)
        store.run_maintenance()
        store.search_vectors(queries, 10)
        steps.clear()
        for _ in range(4):
            store.run_maintenance()
        assert steps.count("swap") == 1, "the same rows trained again would change nothing"
        fill(store, COUNT, 2 * COUNT)
        for _ in range(3):
            store.run_maintenance()
        built = [event["cause"] for event in store.statistics()["events"] if event["kind"] == "built"]
        assert sum("fell to 0.500" in cause for cause in built) == 2
