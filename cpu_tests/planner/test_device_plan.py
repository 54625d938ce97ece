"""Plans for a GPU: which kind, how narrow, by which engine, and the reason that they give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from memevolve_gpu.errors import CapacityError
from memevolve_gpu.planner.device_plan import EXACT_BYTES, DeviceState, device_bytes, scratch_bytes, sized
from memevolve_gpu.planner.plan import plan_index, search_params_for
from memevolve_gpu.types import IndexPlan, SearchParams

GB = 1 << 30
CARD = DeviceState("cuda:0", "Test GPU", 60 * GB, ("torch", "faiss"))
LARGE = 1_000_000


def planned(count: int = LARGE, state: DeviceState | None = CARD, **other: Any) -> IndexPlan:
    settings: dict[str, Any] = {
        "dim": 384,
        "index_type": "auto",
        "target_recall": 0.95,
        "budget_bytes": 200 * GB,
    }
    return plan_index(count=count, device=state, **(settings | other))


def test_a_large_store_goes_to_the_device_and_says_why() -> None:
    plan = planned()
    assert (plan.kind, plan.engine, plan.device, plan.precision) == ("exact", "torch", "cuda:0", "float32")
    assert 0 < plan.device_bytes <= CARD.limit_bytes
    assert 0 < plan.bytes < LARGE * 100, "vectors are mapped from a file"
    for said in ("exact scan of 1000000 units on Test GPU (cuda:0)", "engine torch", "allowed on the device"):
        assert said in plan.reason


def test_exact_up_to_what_is_read_quickly_and_lists_beyond() -> None:
    small, large = planned(LARGE), planned(10 * LARGE)
    assert device_bytes(small, LARGE, 384) <= EXACT_BYTES < device_bytes(replace(large, kind="exact"), 10 * LARGE, 384)
    assert (small.kind, large.kind) == ("exact", "ivf")
    assert large.nlist > 0
    assert planned(10 * LARGE, target_recall=0.999).kind == "exact"
    assert planned(10 * LARGE, index_type="flat").kind == "exact"
    assert planned(LARGE, index_type="ivf").kind == "ivf"


@pytest.mark.parametrize(
    ("changes", "said", "refusal"),
    [
        ({"index_type": "hnsw"}, "no GPU engine has graphs", "kind"),
        ({"state": replace(CARD, problem="the card is gone")}, "the card is gone", ""),
        ({"state": replace(CARD, engines=(), missing="torch is not installed")}, "torch is not installed", "engine"),
        ({"state": replace(CARD, limit_bytes=GB // 4)}, "do not fit the 256 MB allowed there", "limit"),
        ({"state": replace(CARD, engines=("torch",), setting="faiss")}, "GPU_ENGINE=faiss cannot be used", "engine"),
    ],
)
def test_the_cpu_says_why_it_is_not_the_gpu(changes: dict[str, Any], said: str, refusal: str) -> None:
    plan = planned(**changes)
    host = planned(**{**changes, "state": None})
    assert said in plan.reason
    assert said in plan.notes[-1]
    assert plan.refusal == refusal
    assert replace(plan, reason=host.reason, notes=host.notes, refusal="") == host


def test_below_the_training_limit_nothing_goes_to_a_device() -> None:
    assert planned(500, replace(CARD, requested=True)).engine == "cpu"
    assert planned(500, replace(CARD, requested=True, engines=())).refusal == "", "nothing was asked of it"
    assert planned(999, replace(CARD, requested=True)).engine == "cpu"
    assert planned(1000, replace(CARD, requested=True)).engine == "torch"


def test_a_tighter_limit_narrows_the_vectors_before_it_leads_to_the_cpu() -> None:
    """float32 on the device too, float16 there with float32 on the host, int8, the CPU."""
    seen: list[tuple[str, str]] = []
    for limit in range(4000, 0, -50):
        plan = planned(state=replace(CARD, limit_bytes=limit << 20), index_type="flat")
        if not seen or seen[-1] != (plan.engine, plan.precision):
            seen.append((plan.engine, plan.precision))
        assert plan.device_bytes <= limit << 20
    assert seen == [("torch", "float32"), ("torch", "int8"), ("cpu", "float32")]
    wide, narrow = sized(replace(planned(), device_bytes=0), LARGE, 384, 60 * GB)
    assert wide.device_bytes > 2 * narrow.device_bytes
    assert planned(precision="float16").precision == "float16"


def test_the_hosts_memory_counts_too() -> None:
    """But not that of the vectors, which are mapped from a file."""
    least = planned(state=None).bytes
    assert least < LARGE * 384
    assert planned(budget_bytes=least).engine == "torch"
    with pytest.raises(CapacityError):
        planned(budget_bytes=least - 1)


def test_faiss_is_asked_for_its_own_sizes() -> None:
    state = replace(CARD, setting="faiss")
    plan = planned(state=state)
    assert plan.engine == "faiss"
    assert (
        plan.device_bytes == device_bytes(plan, LARGE, 384) != device_bytes(replace(plan, engine="torch"), LARGE, 384)
    )
    assert planned(state=replace(CARD, engines=("faiss",))).engine == "faiss"
    assert device_bytes(IndexPlan("exact"), LARGE, 384) == 0


@pytest.mark.parametrize("engine", ["torch", "faiss"])
@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_the_scratch_is_what_remains_without_rows(engine: Any, kind: Any) -> None:
    plan = IndexPlan(kind, nlist=16, engine=engine, device="cuda:0")
    per_row = (device_bytes(plan, 2 * LARGE, 384) - device_bytes(plan, LARGE, 384)) / LARGE
    assert device_bytes(plan, LARGE, 384) - scratch_bytes(plan) == pytest.approx(per_row * LARGE, rel=0.02)
    assert scratch_bytes(IndexPlan(kind)) == 0


@pytest.mark.parametrize("engine", ["torch", "faiss"])
@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_sizes_grow_with_rows_and_shrink_with_precision(engine: Any, kind: Any) -> None:
    plan = IndexPlan(kind, nlist=256, engine=engine, device="cuda:0")
    sizes = [device_bytes(plan, n, 384) for n in (10_000, 100_000, LARGE)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= LARGE * 384 * 2
    narrow = device_bytes(replace(plan, precision="int8"), LARGE, 384)
    assert LARGE * 384 <= narrow <= sizes[-1]


@pytest.mark.parametrize(
    ("setting", "usable", "engine"),
    [
        ("auto", ("torch", "faiss"), "torch"),
        ("auto", ("faiss", "torch"), "faiss"),
        ("auto", ("faiss",), "faiss"),
        ("faiss", ("torch", "faiss"), "faiss"),
        ("torch", ("faiss",), "cpu"),
        ("auto", (), "cpu"),
    ],
)
def test_the_best_usable_engine_is_taken_from_the_training_limit_on(setting: Any, usable: Any, engine: str) -> None:
    """There is no border of 50,001 units any more: what a device saves is measured after the build."""
    state = replace(CARD, setting=setting, engines=usable)
    assert planned(1000, state).engine == planned(LARGE, state).engine == engine
    assert planned(999, state).engine == "cpu"


def test_scans_and_lists_on_a_device_get_their_efforts() -> None:
    scan, lists = planned(), planned(index_type="ivf")
    assert search_params_for(scan, LARGE, 10, 0.95) == SearchParams()
    assert search_params_for(scan, LARGE, 10, 1.0) == SearchParams(exact=True)
    effort = search_params_for(lists, LARGE, 10, 0.95)
    assert 0 < effort.nprobe <= lists.nlist
    assert effort.rerank == 0, "torch knows how far float16 errs"
    assert search_params_for(replace(lists, engine="faiss"), LARGE, 10, 0.95).rerank > 0
