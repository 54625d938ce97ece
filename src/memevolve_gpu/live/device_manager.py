"""The GPU state of a store: whether it may be used, how much memory it has, what failed, when to retry.

Nothing here loads CUDA. Writes and searches are answered from remembered state; the device itself is queried in rounds
of maintenance and in reports.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np

from ..devices.engine_probe import ENGINES
from ..devices.memory import MemoryBudget
from ..devices.selection import Machine
from ..errors import DeviceError
from ..index.base import Index
from ..index.faiss_gpu.resources import use_free_bytes
from ..index.torch_gpu.memory_accounting import account_of
from ..monitoring.events import EventLog
from ..planner.device_plan import DeviceState, EngineSetting, kept_bytes, scratch_bytes
from ..planner.routing import SideTimings, measured_sides, seconds_of
from ..types import FloatArray, IndexPlan, SearchParams
from ..utils.backoff import Backoff
from ..utils.forking import lock, renew_in_child
from ..utils.report_types import DeviceReport
from .view import View

_FIRST_RETRY = 30.0
_LONGEST_RETRY = 1800.0
"""Seconds after which a device without free memory is tried again although it has no more; doubled each time."""
_MORE_MEMORY = 1.1
"""A device with this many times the free memory that it had when it refused is tried at once."""
_GROWTH = 4 / 3
"""An index may keep this many times the memory that it uses, even if other processes have filled the card since."""
_LASTING = ("device-lost", "fork")
_OF_PLANS = ("limit", "engine", "kind")
"""Refusals that the next plan may withdraw."""
_INSTEAD = "; the CPU instead"
_UNTIL = {"limit": ", until there is room", "engine": ", until restart"}

_SLOWER_UNTIL = 2.0
"""A device that was slower for every batch is tried again when the store has this many times the rows."""
_MOST_TIMED = 256
_LARGEST_CONTEXT = 2 << 30

Clock = Callable[[], float]
Timer = Callable[[Index, FloatArray, SearchParams], float]
"""Seconds that an index takes for queries (nq, dim)."""


def _timed(index: Index, queries: FloatArray, params: SearchParams) -> float:
    return seconds_of(lambda: index.search(queries, 10, params))


class DeviceManager:
    """Decides whether one live index may use a GPU. Thread-safe."""

    def __init__(
        self,
        machine: Machine,
        events: EventLog,
        *,
        setting: EngineSetting = "auto",
        min_units: int = 0,
        most_bytes: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Begin without a look at any device.

        Args:
            machine: finds devices and reads their memory.
            events: where failures are recorded.
            setting: GPU_ENGINE.
            min_units: MIN_TRAINING_UNITS; with fewer no device is looked for under DEVICE=auto.
            most_bytes: GPU_MAX_MEMORY_MB in bytes; None for no limit beside the device's budget.
            clock: returns seconds.
        """
        self.machine = machine
        self.incidents: Counter[str] = Counter()
        """Number of incidents by cause."""
        self.last_incident = ""
        self.budget_before: MemoryBudget | None = None
        """Before and after the last build."""
        self.budget_after: MemoryBudget | None = None
        self._events = events
        self._setting: EngineSetting = setting
        self._min_units = max(1, min_units)
        self._timer: Timer = _timed
        self._slower_below = 0
        """Live units below which a measurement says that the device does not pay."""
        self._most_bytes = most_bytes
        self._clock = clock
        self._budget: MemoryBudget | None = None
        self._broken: dict[str, str] = {}
        self._disabled_reason = ""
        self._backoff_reason = ""
        self._free_then = 0
        self._retry = Backoff(_FIRST_RETRY, _LONGEST_RETRY, clock)
        self._look_at = 0.0
        """When a round should look at a device that had no free memory."""
        self._unseen = self._announced = False
        self._waits = False
        """Whether missing memory may become free by itself; not where GPU_MAX_MEMORY_MB is the limit."""
        self._active_issues: dict[str, str] = {}
        """Why the device is not used at present, by cause. Each is reported when it appears, and again only after it
        has gone."""
        self._lock = lock()
        renew_in_child(self)

    def after_fork(self) -> None:
        """In a forked child: a new look at the device."""
        self._unseen |= self._budget is not None

    @property
    def needs_look(self) -> bool:
        """Whether a round of maintenance should look at the device now."""
        waits = bool(self._backoff_reason) or (self._waits and "limit" in self._active_issues)
        return self._unseen or (waits and not self._disabled_reason and self._clock() >= self._look_at)

    def postpone_look(self) -> None:
        """A round has just looked at the device; the next look is due in 30 seconds."""
        self._look_at = max(self._look_at, self._clock() + _FIRST_RETRY)

    @property
    def routes(self) -> bool:
        """Whether each call goes to the side that measured faster for its size; a GPU requested by name answers all."""
        return self.machine.request == "auto"

    def timed(self, device: tuple[Index, SearchParams], host: tuple[Index, SearchParams], *, seed: int) -> SideTimings:
        """Seconds of two indexes over the same rows, for batches of their own vectors."""
        rng, index = np.random.default_rng(seed), device[0]
        queries = np.ascontiguousarray(index.vectors_at(np.sort(rng.integers(0, max(1, index.n), _MOST_TIMED))))
        sides = (lambda nq, one=one: self._timer(one[0], queries[:nq], one[1]) for one in (device, host))
        return measured_sides(index.n, *sides)

    def slower(self, index: Index, timings: SideTimings) -> None:
        """The device was slower for every batch that was timed: leave it until the store has grown."""
        self._slower_below = int(_SLOWER_UNTIL * index.n)
        text = f"{index.device} is slower than the CPU for every batch of up to {_MOST_TIMED} queries"
        self._events.record("device-slower", f"{text}; the CPU until {self._slower_below} units", **timings.as_dict())

    def find(self) -> bool:
        """Whether there is a usable device; may take seconds. Reports one that cannot be used."""
        choice = self.machine.choice
        if choice.failed:
            self._report_once("no-device", choice.reason, logging.WARNING if choice.requested else logging.INFO)
        return choice.gpu is not None

    def look(self, count: int) -> None:
        """Find the device and read its memory, if it may pay for ``count`` units. May take seconds."""
        self._unseen = False
        if not self._concerned(count) or not self.find():
            return
        if self._backoff_reason or "limit" in self._active_issues:
            self.machine.look_again()
        self._budget = self.machine.budget()
        if not self._retry.remaining or self._budget.room >= _MORE_MEMORY * max(1, self._free_then):
            self._backoff_reason = ""

    def state(self, count: int, index: Index) -> DeviceState | None:
        """What the planner needs to know of the device for ``count`` units, most of them in ``index``; None for the
        CPU."""
        if not self._concerned(count):
            return None
        if self.machine.known is None or self._budget is None:
            self._unseen |= not self._announced
            self._announced = True
            return None
        choice = self.machine.choice
        if choice.gpu is None:
            return None
        missing = {engine: problem for engine, problem in (self.machine.engines() | self._broken).items() if problem}
        usable = tuple(engine for engine in ENGINES if engine not in missing)
        first = next((one for one in usable if self._setting in ("auto", one)), "")
        limit, bound = self._limit(index.device_bytes + self.machine.holdings.kept(choice.device, first))
        return DeviceState(
            device=choice.device,
            name=choice.gpu.name,
            limit_bytes=limit,
            engines=usable,
            missing="; ".join(missing.values()),
            setting=self._setting,
            requested=choice.requested,
            problem=self._disabled_reason or self._backoff_reason or self._slower_reason(count),
            bound=bound,
        )

    def absence(self) -> str:
        """Why a requested device is unavailable; empty where it is available, or was not looked for yet."""
        choice = self.machine.known
        return choice.reason if choice is not None and choice.failed else ""

    def note(self, plan: IndexPlan, state: DeviceState | None) -> None:
        """Report a plan that cannot use the device that ``state`` describes, once each time this comes up.

        Nothing is reported while an earlier failure, which was reported when it happened, lasts.
        """
        if state is not None and state.problem:
            return
        for cause in _OF_PLANS:
            if cause != plan.refusal:
                self._active_issues.pop(cause, None)
        if state is None or not plan.refusal or (plan.refusal == "kind" and not state.requested):
            return
        lasting = plan.refusal != "limit" and not state.requested
        self._waits = state.bound == "GPU_MEMORY_FRACTION"
        why = plan.notes[-1].removesuffix(_INSTEAD)
        self._report_once(plan.refusal, why, logging.INFO if lasting else logging.WARNING)

    def admit(self, plan: IndexPlan, old: Index) -> bool:
        """Check that ``plan`` can be built on the device now.

        Returns:
            Whether it fits beside ``old``; if not, it fits once ``old`` has left the device.

        Raises:
            DeviceError: the engine does not work, memory is missing (torch's reserve serves torch alone), or this
                process may not use CUDA.
        """
        if self.machine.forked:
            raise DeviceError(self.machine.choice.reason, "fork")
        holdings, before = self.machine.holdings, None
        if not holdings.active:  # create no CUDA context on a full card
            _, before = self._check_memory(plan, old)
        problem = self.machine.refusal(plan.engine)
        if problem:
            raise DeviceError(problem, "out-of-memory" if "another process" in problem else "device-error")
        holdings.begin()
        if before is not None:
            self._measure_context(before)
        room, budget = self._check_memory(plan, old)
        if plan.engine == "torch":  # tell the engines their limit for all allocations, those of searches included
            account_of(plan.device).limit = budget.room + budget.used
        if plan.engine == "faiss":
            use_free_bytes(self.machine.free_now)
        return plan.device_bytes <= room + holdings.kept(plan.device, plan.engine)

    def _measure_context(self, before: MemoryBudget) -> None:
        """CUDA's own figures are read in a new context: what is missing since ``before`` is that context."""
        after = self.machine.budget(fresh=True)
        context = before.free - after.free
        if after.source != "driver" and 0 < context <= _LARGEST_CONTEXT:
            self.machine.holdings.contexts[after.device] = context

    def _check_memory(self, plan: IndexPlan, old: Index) -> tuple[int, MemoryBudget]:
        """Bytes that may be added on the device beside ``old``; raises DeviceError where ``plan`` needs more."""
        self._budget = self.budget_before = budget = self.machine.budget(fresh=True)
        held = old.device_bytes if old.plan.device == plan.device else 0
        held += self.machine.holdings.kept(plan.device, plan.engine)
        room = budget.room if plan.engine == "torch" else min(budget.room, max(0, budget.free - budget.coming))
        if plan.device_bytes > room + held:
            needed = f"{plan.device_bytes >> 20} MB are needed on {plan.device}"
            raise DeviceError(f"{needed}, its budget has room for {room + held >> 20}", "limit")
        return room, budget

    def built(self, index: Index) -> None:
        """``index`` was built and is good enough; from now on it counts in this process's budget."""
        self.machine.holdings.add(index, index.plan.device)
        self.machine.holdings.keep(index.plan.device, index.plan.engine, kept_bytes(index.plan))
        self._budget = self.budget_after = self.machine.budget(fresh=True)
        self._backoff_reason = ""
        self._retry.reset()
        predicted, measured = index.plan.device_bytes, index.device_bytes
        self._events.record(
            "device",
            f"{index.kind} of {index.n} rows on {index.device} by {index.plan.engine}",
            predicted_bytes=predicted,
            measured_bytes=measured,
        )

    def refused(self, error: DeviceError, plan: IndexPlan) -> None:
        """A build on the device failed: use the CPU, until there is memory or until restart."""
        self.incidents[error.cause] += 1
        self.last_incident = str(error)
        then = "until restart"
        if error.cause in _LASTING:
            self._disabled_reason = f"{plan.device} cannot be used until restart: {error}"
        elif error.cause == "device-error":
            self._broken[plan.engine] = self._active_issues["engine"] = str(error)
        else:
            self._active_issues["limit"] = str(error)
            self._backoff_reason = f"{plan.device} had no room for this index ({error}); it is tried again later"
            self._budget = self.machine.budget(fresh=True)
            self._free_then = self._budget.room
            self._look_at = self._clock() + self._retry.failed()
            then = "until there is room"
        self._events.record("device-refused", f"{error}; the CPU instead, {then}", level=logging.WARNING)

    def poll(self, index: Index) -> None:
        """Record the incidents of ``index`` on its device since the last call."""
        for incident in index.incidents():
            self.incidents[incident.cause] += 1
            self.last_incident = f"{incident.device}: {incident.detail}"
            level = logging.INFO if incident.cause == "recovered" else logging.WARNING
            text = f"{incident.device}: {incident.detail} ({incident.cause}, {incident.action})"
            self._events.record("device-incident", text, level=level)
            if incident.action == "cpu-until-restart":
                self._disabled_reason = f"{incident.device} cannot be used until restart: {incident.detail}"
                self._unseen = True

    def report(self, view: View) -> DeviceReport:
        """For health and statistics; bytes throughout.

        predicted_bytes are the plan's, and scratch_bytes the part of them that all searches share; measured_bytes are
        the index's own, to be compared with the difference.
        """
        choice, index = self.machine.known, view.index
        timings = None if view.host_side is None else view.host_side.timings
        budgets = {"before": self.budget_before, "after": self.budget_after, "now": self._budget}
        return {
            "requested": self.machine.request,
            "engine_setting": self._setting,
            "crossover": None if timings is None else timings.crossover,
            "timings": None if timings is None else timings.as_dict(),
            "device": index.device,
            "engine": index.plan.engine,
            "reason": choice.reason if choice is not None else self._unlooked(),
            "name": choice.gpu.name if choice is not None and choice.gpu is not None else None,
            "predicted_bytes": index.plan.device_bytes,
            "scratch_bytes": scratch_bytes(index.plan),
            "measured_bytes": index.device_bytes,
            "budget": {when: None if one is None else one.as_dict() for when, one in budgets.items()},
            "unmet": choice is not None and choice.unmet,
            "incidents": dict(self.incidents),
            "last_incident": self.last_incident or None,
            "problem": self._disabled_reason
            or self._backoff_reason
            or next(iter(list(self._active_issues.values())), None),
        }

    def _unlooked(self) -> str:
        """Why no device was looked for."""
        reason = "nothing here calls for a GPU yet"
        return reason if self.machine.request != "auto" else f"{reason}: it is tried from {self._min_units} units on"

    def _slower_reason(self, count: int) -> str:
        if count >= self._slower_below:
            return ""
        return f"measured here: the CPU is faster for every batch, and is used below {self._slower_below} units"

    def _report_once(self, cause: str, why: str, level: int) -> None:
        with self._lock:
            news = cause not in self._active_issues
            self._active_issues[cause] = why
        if news:
            self.incidents[cause] += 1
            self.last_incident = why
            self._look_at = self._clock() + _FIRST_RETRY
            self._events.record("device-refused", f"{why}{_INSTEAD}{_UNTIL.get(cause, '')}", level=level)

    def _concerned(self, count: int) -> bool:
        """Whether a GPU may pay for a store of ``count`` units."""
        request = self.machine.request
        return request != "cpu" and (request != "auto" or count >= self._min_units)

    def _limit(self, used: int) -> tuple[int, Literal["GPU_MEMORY_FRACTION", "GPU_MAX_MEMORY_MB"]]:
        """Bytes that an index may take on the device in place of one that uses ``used``, and the setting that limits
        it."""
        free = 0 if self._budget is None else self._budget.room
        by_budget = max(free + used, int(_GROWTH * used))
        if self._most_bytes is not None and self._most_bytes < by_budget:
            return self._most_bytes, "GPU_MAX_MEMORY_MB"
        return by_budget, "GPU_MEMORY_FRACTION"
