"""The planner is a set of pure functions: tables where the design gives values, properties everywhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import clustered, rows_of
from support import each

from memevolve_gpu.errors import CapacityError
from memevolve_gpu.index.costs import WHOLE_ROWS
from memevolve_gpu.index.registry import build
from memevolve_gpu.index.snapshot_file import SnapshotInfo, write_snapshot
from memevolve_gpu.planner.device_plan import plan_bytes
from memevolve_gpu.planner.nlist import ListsRule, adaptive_nlist, lists_status, should_recreate
from memevolve_gpu.planner.plan import IndexType, PrecisionSetting, plan_index, search_cost, search_params_for
from memevolve_gpu.types import IndexPlan

PLENTY = 1 << 40


def plan(
    count: int = 10_000,
    index_type: IndexType = "auto",
    *,
    dim: int = 384,
    target: float = 0.95,
    budget: int = PLENTY,
    least: int = 1000,
    precision: PrecisionSetting = "auto",
    adaptive: bool = True,
    current: int | None = None,
) -> IndexPlan:
    return plan_index(
        count=count,
        dim=dim,
        index_type=index_type,
        target_recall=target,
        budget_bytes=budget,
        min_training_units=least,
        precision=precision,
        lists=ListsRule(adaptive=adaptive),
        current_nlist=current,
    )


# ------------------------------------------------------------------------------------------------------------ lists


@each(
    ("n", "lists"),
    [
        (0, 10),
        (1, 10),
        (389, 10),
        (390, 10),
        (429, 11),
        (500, 12),
        (1000, 25),
        (2000, 51),
        (5000, 128),
        (9983, 255),
        (9984, 256),
        (10_000, 256),
        (50_000, 256),
        (200_000, 512),
        (1_000_000, 1144),
    ],
)
def test_lists_by_the_rule(n: int, lists: int) -> None:
    assert adaptive_nlist(n) == lists


def test_settings_bound_the_rule() -> None:
    assert ListsRule(vectors_per_centroid=100).lists_for(1000) == 10
    assert ListsRule(vectors_per_centroid=10, nlist_max=64).lists_for(1000) == 64
    assert ListsRule(nlist_min=30).lists_for(100) == 30
    assert ListsRule(nlist_max=512).lists_for(10**6) == 512, "a maximum that a user set does not grow"


@given(n=st.integers(0, 10**8), more=st.integers(0, 10**6))
def test_lists_never_fall_as_the_store_grows(n: int, more: int) -> None:
    assert 10 <= adaptive_nlist(n) <= adaptive_nlist(n + more)


@pytest.mark.parametrize(
    ("current", "planned", "due"),
    [
        (100, 100, False),
        (100, 124, False),
        (75, 100, True),
        (76, 100, False),
        (125, 100, True),
        (124, 100, False),
        (3, 0, False),
    ],
)
def test_recreated_at_a_quarter(current: int, planned: int, due: bool) -> None:
    assert should_recreate(current, planned) is due


@each(
    ("n", "nlist", "status"),
    [
        (5000, 0, "GOOD"),
        (5000, 128, "OPTIMAL"),
        (5000, 50, "OPTIMAL"),  # 100 vectors per centroid
        (5000, 49, "DEGRADED"),
        (5000, 500, "OPTIMAL"),  # 10
        (5000, 501, "INEFFICIENT"),
        (40_000, 256, "OPTIMAL"),  # 156 per centroid under the default maximum: the planned number
        (40_000, 192, "DEGRADED"),  # a quarter fewer than planned
        (40_000, 193, "OPTIMAL"),
        (1_000_000, 1144, "OPTIMAL"),
        (40_000, 400, "OPTIMAL"),
        (6_000, 20, "DEGRADED"),
        (200, 10, "OPTIMAL"),  # the minimum is in play: 20 per centroid are planned
        (100, 10, "OPTIMAL"),
        (99, 10, "INEFFICIENT"),
    ],
)
def test_status_of_lists(n: int, nlist: int, status: str) -> None:
    assert lists_status(n, nlist) == status


@given(n=st.integers(100, 10**7), per=st.integers(10, 100))
def test_what_the_rule_plans_is_optimal_unless_a_setting_holds_it(n: int, per: int) -> None:
    rule = ListsRule(vectors_per_centroid=per)
    nlist = rule.lists_for(n)
    held = rule.held_by(n, nlist)
    assert (lists_status(n, nlist) == "OPTIMAL") == (not held)
    assert all(name.startswith(("NLIST_M", f"VECTORS_PER_CENTROID={per}")) for name in held)


@each(
    ("n", "nlist", "rule", "held"),
    [
        (5000, 128, ListsRule(), []),
        (5000, 49, ListsRule(), []),  # the rule would have 128: a rebuild helps
        (5000, 0, ListsRule(nlist_max=1), []),
        (40_000, 256, ListsRule(), []),
        (40_000, 128, ListsRule(nlist_max=128), ["NLIST_MAX=128"]),
        (6000, 20, ListsRule(nlist_max=20), ["NLIST_MAX=20"]),
        (50, 10, ListsRule(), ["NLIST_MIN=10"]),
        (5000, 600, ListsRule(nlist_min=600, nlist_max=600), ["NLIST_MIN=600"]),
        (5000, 1000, ListsRule(vectors_per_centroid=5, nlist_max=5000), ["VECTORS_PER_CENTROID=5"]),
        (2000, 256, ListsRule(vectors_per_centroid=5), ["VECTORS_PER_CENTROID=5"]),
        (50_000, 166, ListsRule(vectors_per_centroid=300), ["VECTORS_PER_CENTROID=300"]),
        (6000, 50, ListsRule(adaptive=False), ["ADAPTIVE_NLIST=false"]),
        (6000, 20, ListsRule(nlist_max=20, adaptive=False), ["ADAPTIVE_NLIST=false", "NLIST_MAX=20"]),
    ],
)
def test_the_setting_that_holds_the_lists_is_known(n: int, nlist: int, rule: ListsRule, held: list[str]) -> None:
    assert rule.held_by(n, nlist) == held


# ------------------------------------------------------------------------------------------------------------- kind


@each("index_type", ["flat", "ivf", "hnsw", "auto"])
@each("count", [0, 1, 15, 999])
def test_nothing_is_trained_on_a_small_store(index_type: IndexType, count: int) -> None:
    found = plan(count, index_type)
    assert (found.kind, found.nlist, found.codes) == ("exact", 0, 0)


@pytest.mark.parametrize("least", [0, 1, 10, 16])
def test_a_lowered_setting_has_lists_from_there_on_because_samples_make_up_for_units(least: int) -> None:
    needed = max(1, least)
    assert plan(needed - 1, "ivf", least=least).kind == "exact"
    found = plan(needed, "ivf", least=least)
    assert (found.kind, found.nlist) == ("ivf", 10)


@pytest.mark.parametrize(("index_type", "kind"), [("flat", "exact"), ("ivf", "ivf"), ("hnsw", "hnsw")])
@pytest.mark.parametrize("count", [1000, 10_000, 1_000_000])
def test_what_the_user_names_is_built(index_type: IndexType, kind: str, count: int) -> None:
    found = plan(count, index_type)
    assert found.kind == kind
    assert found.nlist == (adaptive_nlist(count) if kind == "ivf" else 0)
    assert index_type in found.reason


@pytest.mark.parametrize(
    ("count", "target", "kind"),
    [
        (1000, 0.95, "exact"),
        (5000, 0.95, "two_stage"),
        (39_320, 0.95, "two_stage"),
        (39_320, 0.99, "two_stage"),
        (90_000, 0.99, "two_stage"),
        (500_000, 0.95, "two_stage"),
        (2_000_000, 0.95, "ivf"),
        (500_000, 0.99, "two_stage"),
        (500_000, 1.0, "exact"),
    ],
)
def test_auto_takes_the_cheapest(count: int, target: float, kind: str) -> None:
    assert plan(count, "auto", target=target).kind == kind


@given(count=st.integers(1000, 10**6), target=st.floats(0.5, 0.999), dim=st.integers(1, 2048))
def test_auto_is_never_dearer_than_a_scan(count: int, target: float, dim: int) -> None:
    found = plan(count, "auto", target=target, dim=dim)
    assert search_cost(found, count, dim, target) <= search_cost(IndexPlan("exact"), count, dim, target)


def test_lists_are_kept_until_they_differ_by_a_quarter() -> None:
    assert plan(5000, "ivf", current=100).nlist == 100
    assert plan(5000, "ivf", current=96).nlist == 128
    assert plan(5000, "ivf", current=96, adaptive=False).nlist == 96
    assert plan(5000, "ivf", adaptive=False).nlist == 128, "the first body has to start somewhere"


# ------------------------------------------------------------------------------------------------------------ bytes


@each("dim", [3, 384, 1536, 4096])
@each("index_type", ["flat", "ivf", "auto"])
@each("precision", ["auto", "float16", "int8"])
def test_vectors_stay_whole_and_take_no_memory(dim: int, index_type: IndexType, precision: PrecisionSetting) -> None:
    found = plan(20_000, index_type, dim=dim, precision=precision)
    assert found.precision == "float32"
    assert found.bytes < 20_000 * (64 + dim)  # two 4-bit codes for every two components, slots and ids


@pytest.mark.parametrize("index_type", ["flat", "ivf", "hnsw", "auto"])
def test_what_fits_no_budget_is_refused(index_type: IndexType) -> None:
    size = plan(20_000, index_type).bytes
    if index_type == "hnsw":
        size = plan(20_000, index_type, budget=size - 1).bytes
    assert plan(20_000, index_type, budget=size).bytes == size
    with pytest.raises(CapacityError, match="max_memory_mb"):
        plan(20_000, index_type, budget=size - 1)


def test_graph_gives_way_to_codes_when_memory_is_short() -> None:
    graph = plan(20_000, "hnsw")
    found = plan(20_000, "hnsw", budget=graph.bytes - 1)
    assert found.kind == "two_stage"
    assert "does not fit" in found.reason
    assert "hnsw" in found.notes[0]


@given(
    count=st.integers(0, 10**7),
    dim=st.integers(1, 4096),
    index_type=st.sampled_from(["flat", "ivf", "hnsw", "auto"]),
    budget=st.integers(0, 1 << 36),
    target=st.floats(0.5, 1.0),
)
@settings(max_examples=300)
def test_a_plan_fits_its_budget_and_explains_itself(
    count: int, dim: int, index_type: IndexType, budget: int, target: float
) -> None:
    try:
        found = plan(count, index_type, dim=dim, budget=budget, target=target)
    except CapacityError as error:
        assert str(budget) in str(error)  # noqa: PT017 - either outcome is right, each has its own promise
        return
    assert 0 <= found.bytes <= budget
    assert found.bytes == plan_bytes(found, count, dim)
    assert found.reason
    assert found == plan(count, index_type, dim=dim, budget=budget, target=target)
    assert (found.nlist > 0) == (found.kind == "ivf")
    assert found.nlist <= max(1, count)


SIZES = [(1000, 384), (1000, 8), (3000, 33), (2500, 128)]


@pytest.mark.parametrize(("n", "dim"), SIZES)
@pytest.mark.parametrize("kind", ["exact", "two_stage", "ivf", "hnsw"])
def test_predicted_bytes_are_those_of_the_body(n: int, dim: int, kind: str, tmp_path: Path) -> None:
    rows = rows_of(clustered(np.random.default_rng(3), n, dim, "l2"))
    nlist = adaptive_nlist(n) if kind == "ivf" else 0
    wanted = IndexPlan(kind=kind, nlist=nlist)  # type: ignore[arg-type]
    index = build(wanted, rows, "l2", seed=1)
    write_snapshot(tmp_path / "s", index, SnapshotInfo("s", 1, 1, n, wanted, "l2", dim, 0.0, 1))
    predicted = plan_bytes(wanted, n, dim, rows.id_bytes.nbytes / n)
    assert predicted == pytest.approx(index.nbytes, rel=0.1)


# ----------------------------------------------------------------------------------------------------------- effort


def test_many_results_spread_over_more_lists() -> None:
    lists, n = IndexPlan("ivf", nlist=200), 2_000_000
    assert [search_params_for(lists, n, k, 0.99).nprobe for k in (10, 100)] == [150, 200]
    assert [search_params_for(lists, n, k, 0.95).nprobe for k in (10, 100)] == [100, 135]
    assert search_params_for(lists, WHOLE_ROWS, 10, 0.95).nprobe == 0, "codes in one piece are all read"
    on_device = replace(lists, engine="torch")
    assert search_params_for(on_device, 9_999, 10, 0.95).nprobe == 135, "few rows make short lists"


PLANS = [IndexPlan("two_stage", codes=192), IndexPlan("ivf", nlist=256, codes=192), IndexPlan("hnsw")]


@pytest.mark.parametrize("found", [*PLANS, IndexPlan("exact")], ids=lambda found: found.kind)
def test_full_recall_is_an_exact_scan(found: IndexPlan) -> None:
    assert search_params_for(found, 10_000, 10, 1.0).exact
    assert search_params_for(found, 10_000, 10, 0.99).exact == (found.kind == "exact")


@given(
    found=st.sampled_from(PLANS),
    n=st.integers(16, 10**7),
    k=st.integers(1, 1000),
    target=st.floats(0.01, 0.999),
    more=st.floats(0, 0.99),
)
def test_effort_grows_with_target_and_results(found: IndexPlan, n: int, k: int, target: float, more: float) -> None:
    higher = target + more * (0.999 - target)
    least = search_params_for(found, n, k, target)
    for other in (search_params_for(found, n, k, higher), search_params_for(found, n, 2 * k, target)):
        assert (other.nprobe, other.rerank, other.ef) >= (least.nprobe, least.rerank, least.ef)
        assert other.rerank >= least.rerank
    if found.kind == "hnsw":
        assert least.ef >= k
    else:
        assert least.rerank >= k
    if found.kind == "ivf":
        assert (1 if n > WHOLE_ROWS else 0) <= least.nprobe <= found.nlist
