"""When maintenance acts: the scheduler alone, with a clock that stands still until it is moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from memevolve_gpu.index.registry import build
from memevolve_gpu.live import scheduler as rules
from memevolve_gpu.live.index_stats import IndexStats
from memevolve_gpu.live.scheduler import MaintenanceScheduler, RebuildReason, Spent
from memevolve_gpu.live.view import View
from memevolve_gpu.live.view_builder import view_of
from memevolve_gpu.training.calibration import Calibration
from memevolve_gpu.types import IndexPlan, Rows
from memevolve_gpu.utils.backoff import Backoff

DELTA, QUIET, ROWS = 40, 10, 1000
TRAIN = RebuildReason("train", "a test wants it")
MakeView = Callable[..., View]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A scheduler, and the answers that it gets."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.planned = IndexPlan("two_stage")
        self.log_is_long = self.device_needs_look = False
        self.plans = 0
        self.plan_needs_look = False
        self.scheduler = MaintenanceScheduler(
            self._plan, 24, lambda: self.log_is_long, lambda: self.device_needs_look, self.clock
        )

    def _plan(self, _view: View) -> IndexPlan:
        self.plans += 1
        self.device_needs_look |= self.plan_needs_look
        return self.planned

    def delay(self, view: View) -> float | None:
        """What to do after a write that led to this view."""
        self.scheduler.notify("written", view)
        return self.scheduler.next_action(view).delay


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name, rows in (("DELTA_ROWS", DELTA), ("DELTA_MOST", DELTA), ("QUIET_ROWS", QUIET)):
        monkeypatch.setattr(rules, name, rows)
    return Bench()


@pytest.fixture(scope="module")
def a_view() -> MakeView:
    """A view of 1,000 indexed rows, with waiting rows, at a watermark."""
    rng = np.random.default_rng(7)
    ends = np.arange(1, ROWS + 1)
    rows = Rows(ends - 1, np.zeros(ROWS, np.uint8), ends, rng.standard_normal((ROWS, 8), dtype=np.float32))
    base = view_of(build(IndexPlan("two_stage"), rows, "l2", seed=0), ROWS, IndexStats(trained_rows=ROWS))

    def make(watermark: int, delta_n: int = 0, **changes: object) -> View:
        return replace(base, watermark=watermark, delta_n=delta_n, **changes)  # type: ignore[arg-type]

    return make


def calibrated(view: View) -> View:
    calibration = Calibration("two_stage", ROWS, 0, "queries", 100, 0.1, (), ROWS)
    return replace(view, stats=replace(view.stats, calibration=calibration))


def test_appends_wait_for_quiet_or_for_many_rows(bench: Bench, a_view: MakeView) -> None:
    clock = bench.clock
    assert bench.delay(a_view(1, QUIET)) is None
    assert bench.delay(a_view(2, QUIET + 1)) == pytest.approx(rules.QUIET_SECONDS)
    clock.now += 1.5
    assert bench.delay(a_view(2, QUIET + 1)) == pytest.approx(rules.QUIET_SECONDS - 1.5)
    clock.now += 0.5
    action = bench.scheduler.next_action(a_view(2, QUIET + 1))
    assert (action.delay, action.quiet) == (0.0, True)
    assert bench.delay(a_view(3, DELTA + 1)) == 0.0, "too many rows wait"


def test_appends_take_a_twentieth_of_the_time_of_a_bulk_load(bench: Bench, a_view: MakeView) -> None:
    clock, scheduler = bench.clock, bench.scheduler
    scheduler.notify(Spent("append", 0.5), a_view(3))
    assert bench.delay(a_view(4, DELTA + 1)) == pytest.approx(rules.QUIET_SECONDS)
    for watermark in range(5, 50):
        clock.now += 0.2
        assert bench.delay(a_view(watermark, DELTA + 1)) > 0.0  # type: ignore[operator]
    assert not scheduler.next_action(a_view(49, DELTA + 1)).quiet
    clock.now += 1.1
    assert bench.delay(a_view(50, DELTA + 1)) == 0.0
    scheduler.notify(Spent("append", 0.5), a_view(50))
    assert bench.delay(a_view(51, ROWS // 4 + 1)) == 0.0, "a quarter of the index is always too much"


def test_probes_take_a_hundredth_of_the_time(bench: Bench, a_view: MakeView) -> None:
    assert bench.scheduler.may_probe()
    bench.scheduler.notify(Spent("probe", 0.5), a_view(1))
    bench.clock.now += 49
    assert not bench.scheduler.may_probe()
    bench.clock.now += 1
    assert bench.scheduler.may_probe()


def test_a_decision_changes_nothing(bench: Bench, a_view: MakeView) -> None:
    bench.log_is_long = True
    first = bench.scheduler.next_action(a_view(1))
    assert first == bench.scheduler.next_action(a_view(1))
    assert first.delay == 0.0


def test_the_rules_are_evaluated_once_in_sixteen_entries(bench: Bench, a_view: MakeView) -> None:
    told = [watermark for watermark in range(1, 100) if bench.scheduler.notify("written", a_view(watermark))]
    assert told == list(range(1, 100, 16))
    assert bench.plans == 0, "notify evaluates no rule"


def test_another_plan_a_long_log_and_tombstones_make_a_round_due(bench: Bench, a_view: MakeView) -> None:
    assert bench.delay(a_view(1)) is None
    bench.log_is_long = True
    assert bench.delay(a_view(1)) == 0.0
    bench.log_is_long = False
    bench.planned = IndexPlan("ivf", nlist=10)
    assert bench.delay(a_view(1)) == 0.0
    bench.planned = IndexPlan("two_stage")
    assert bench.delay(a_view(1, index_dead=300)) == 0.0
    assert bench.delay(a_view(1)) is None


def test_a_request_lasts_until_a_rebuild_starts(bench: Bench, a_view: MakeView) -> None:
    view = a_view(1)
    assert bench.scheduler.notify(TRAIN, view)
    assert bench.scheduler.next_action(view).delay == 0.0
    with bench.scheduler.round():
        assert bench.scheduler.reason(view) is TRAIN
    assert bench.scheduler.reason(view) is TRAIN, "the round did not rebuild"
    bench.scheduler.notify("rebuilding", view)
    assert bench.scheduler.reason(view) is None
    assert bench.scheduler.next_action(view).delay is None


def test_a_refused_kind_is_tried_again_only_when_the_store_has_changed(bench: Bench, a_view: MakeView) -> None:
    bench.planned = IndexPlan("ivf", nlist=10)
    refused = IndexStats(refused_rows=ROWS)
    assert bench.scheduler.reason(a_view(1, stats=refused)) is None
    found = bench.scheduler.reason(a_view(1, ROWS // 4 + 1, stats=refused))
    assert found is not None
    assert found.kind == "train"


def test_an_event_is_news_once_and_is_answered_by_a_round(bench: Bench, a_view: MakeView) -> None:
    view, scheduler = calibrated(a_view(1)), bench.scheduler
    assert scheduler.notify("device", view)
    assert not scheduler.notify("device", view), "the background was woken for it"
    scheduler.notify("queries", view)
    with pytest.raises(OSError, match="full"), scheduler.round():
        raise OSError("full")
    assert scheduler.next_action(view).delay == 0.0, "the failed round has not answered it"
    with scheduler.round():
        scheduler.notify("queries", view)
    assert scheduler.next_action(view).delay == 0.0, "it came during the round"
    with scheduler.round():
        pass
    assert scheduler.next_action(view).delay is None
    assert scheduler.notify("device", view)


def test_a_plan_that_would_use_a_device_makes_a_look_at_it_due(bench: Bench, a_view: MakeView) -> None:
    bench.plan_needs_look = True
    assert bench.delay(a_view(1)) == 0.0


def test_queries_matter_to_an_index_that_is_calibrated(bench: Bench, a_view: MakeView) -> None:
    view = a_view(1)
    assert bench.scheduler.notify("queries", view)
    assert bench.scheduler.next_action(view).delay is None
    assert bench.scheduler.next_action(calibrated(view)).delay == 0.0


def test_a_round_of_another_process_is_waited_for(bench: Bench, a_view: MakeView) -> None:
    bench.log_is_long = True
    waits = []
    for _ in range(5):
        bench.scheduler.notify("skipped", a_view(1))
        waits.append(bench.scheduler.next_action(a_view(1)).delay)
        bench.clock.now += 30
    assert waits == [5, 10, 20, 30, 30]
    assert bench.scheduler.next_action(a_view(1)).delay == 0.0
    with bench.scheduler.round():
        pass
    bench.scheduler.notify("skipped", a_view(1))
    assert bench.scheduler.next_action(a_view(1)).delay == 5


def test_the_child_of_a_fork_is_told_again(bench: Bench, a_view: MakeView) -> None:
    view = a_view(1)
    bench.scheduler.notify("device", view)
    bench.scheduler.notify("written", view)
    bench.scheduler.after_fork()
    assert bench.scheduler.notify("written", view)
    assert bench.scheduler.notify("device", view)


def test_backoff_doubles_and_starts_again_after_a_success() -> None:
    clock = Clock()
    backoff = Backoff(1.0, 5.0, clock)
    assert backoff.remaining == 0.0
    assert [backoff.failed() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    clock.now += 4
    assert backoff.remaining == pytest.approx(1.0)
    clock.now += 2
    assert backoff.remaining == 0.0
    backoff.failed()
    backoff.reset()
    assert backoff.remaining == 0.0
    assert backoff.failed() == 1.0
