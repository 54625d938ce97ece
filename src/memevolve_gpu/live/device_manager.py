"""The GPU state of a store: may it be used, how much memory, what failed, when to retry.

Nothing here loads CUDA, and what is asked while units are written or searched is answered from memory: devices are
looked at in rounds of maintenance and in reports.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..devices.memory import MemoryBudget
from ..devices.selection import Machine
from ..errors import DeviceError
from ..index.base import Index
from ..index.faiss_gpu.resources import use_free_bytes
from ..index.torch_gpu.memory_accounting import account_of
from ..monitoring.events import EventLog
from ..planner.device_plan import DeviceState, scratch_bytes
from ..planner.engine_table import NEVER, TABLE, EngineSetting, EngineTable, gpu_pays_from
from ..types import IndexPlan
from ..utils.forking import renew_in_child

__all__ = ["DeviceManager"]

_FIRST_REST = 30.0
_LONGEST_REST = 1800.0
"""Seconds after which a device that had no room is tried again although it shows no more room; doubled each time."""
_MORE_ROOM = 1.1
"""A device with so many times the room that it had when it refused is tried at once."""
_GROWTH = 4 / 3
"""What an index holds it may hold on to, grown by this much, though other processes have filled the card since."""
_LASTING = ("device-lost", "fork")
_OF_PLANS = ("limit", "engine", "kind")
"""Refusals that the next plan may take back."""
_INSTEAD = "; the CPU instead"
_UNTIL = {"limit": ", until there is room", "engine": ", until restart"}

Clock = Callable[[], float]


class DeviceManager:
    """The device side of one live index. Any thread may ask."""

    def __init__(
        self,
        machine: Machine,
        events: EventLog,
        *,
        setting: EngineSetting = "auto",
        table: EngineTable = TABLE,
        most_bytes: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """
        Args:
            machine: finds devices and reads their memory.
            events: is told what goes wrong.
            setting: GPU_ENGINE.
            table: what is quicker for how many units.
            most_bytes: MAX_MEMORY_MB in bytes; None for no limit but the device's budget.
            clock: seconds.
        """
        self.machine = machine
        self.incidents: Counter[str] = Counter()
        """Cause to the number of times that it was seen."""
        self.last_incident = ""
        self.budget_before: MemoryBudget | None = None
        """As of the last build, before it and after it."""
        self.budget_after: MemoryBudget | None = None
        self._events = events
        self._setting: EngineSetting = setting
        self._table = table
        self._most_bytes = most_bytes
        self._clock = clock
        self._budget: MemoryBudget | None = None
        self._broken: dict[str, str] = {}
        self._disabled_reason = ""
        self._backoff_reason = ""
        self._room_then = 0
        self._rest = _FIRST_REST
        self._look_at = 0.0
        self._wake_at = 0.0
        self._unseen = self._announced = False
        self._waits = False
        """May room come by itself, where there is none? Not where MAX_MEMORY_MB leaves none."""
        self._active_issues: dict[str, str] = {}
        """Why the device is not used at present, by cause: each was told when it came up, and is told again only after
        it had gone."""
        self._lock = threading.RLock()
        renew_in_child(self)

    def after_fork(self) -> None:
        """In a forked child: a lock that nobody holds; and what holds of the device may not hold here."""
        self._lock = threading.RLock()
        self._unseen |= self._budget is not None

    @property
    def due(self) -> bool:
        """Is it time that a round of maintenance looked at the device?"""
        waits = bool(self._backoff_reason) or (self._waits and "limit" in self._active_issues)
        return self._unseen or (waits and not self._disabled_reason and self._clock() >= self._wake_at)

    def take_due(self) -> bool:
        """The same, once: whoever asks sees to it."""
        if not self.due:
            return False
        self._unseen = False
        self._wake_at = self._clock() + _FIRST_REST
        return True

    def find(self) -> bool:
        """Is there a device? May take seconds. One that was asked for or is there, and cannot be used, is told of."""
        choice = self.machine.choice
        if choice.failed:
            self._report_once("no-device", choice.reason, logging.WARNING if choice.requested else logging.INFO)
        return choice.gpu is not None

    def look(self, count: int) -> None:
        """Find the device and read its memory, where ``count`` units may have use for one. May take seconds."""
        self._unseen = False
        if not self._concerned(count) or not self.find():
            return
        if self._backoff_reason or "limit" in self._active_issues:
            self.machine.look_again()
        self._budget = self.machine.budget()
        if self._backoff_reason and self._may_try():
            self._backoff_reason = ""

    def state(self, count: int, index: Index) -> DeviceState | None:
        """What a plan for ``count`` units, of which ``index`` holds the most now, needs to know; None for the CPU."""
        there, held = index.plan.engine != "cpu", index.device_bytes
        if not self._concerned(2 * count if there else count):
            return None
        if self.machine.known is None or self._budget is None:
            self._unseen |= not self._announced
            self._announced = True
            return None
        choice = self.machine.choice
        if choice.gpu is None:
            return None
        missing = {engine: problem for engine, problem in (self.machine.engines() | self._broken).items() if problem}
        return DeviceState(
            device=choice.device,
            name=choice.gpu.name,
            limit_bytes=self._limit(held),
            engines=tuple(engine for engine in self.machine.engines() if engine not in missing),
            missing="; ".join(missing.values()),
            setting=self._setting,
            requested=choice.requested,
            held=there,
            problem=self._disabled_reason or self._backoff_reason,
            table=self._table,
            bound="MAX_MEMORY_MB" if self._bounded(held) else "GPU_MEMORY_FRACTION",
        )

    def absence(self) -> str:
        """Why there is no device where there should be one; empty where there is, or where nobody has looked."""
        choice = self.machine.known
        return choice.reason if choice is not None and choice.failed else ""

    def note(self, plan: IndexPlan, state: DeviceState | None) -> None:
        """Tell of a plan that had to keep off the device that ``state`` describe, once each time that this comes up.

        Nothing is told while a failure lasts that was told when it happened.
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
        """Make sure that ``plan`` can be built on the device now.

        Returns:
            Whether there is room beside ``old``; if not, there is once ``old`` has left the device.

        Raises:
            DeviceError: the engine does not work, there is no room (torch's reserve is room for torch alone), or this
                process may not use CUDA.
        """
        if self.machine.forked:
            raise DeviceError(self.machine.choice.reason, "fork")
        if not self.machine.holdings.active:  # CUDA's context is not for a card that others have filled meanwhile
            self._room_for(plan, old)
        problem = self.machine.refusal(plan.engine)
        if problem:
            raise DeviceError(problem, "out-of-memory" if "another process" in problem else "device-error")
        self.machine.holdings.begin()
        room, budget = self._room_for(plan, old)
        self._set_limits(plan, budget)
        return plan.device_bytes <= room

    def _room_for(self, plan: IndexPlan, old: Index) -> tuple[int, MemoryBudget]:
        """Bytes that may be added on the device beside ``old``; raises DeviceError where ``plan`` needs more."""
        self._budget = self.budget_before = budget = self.machine.budget(fresh=True)
        held = old.device_bytes if old.device == plan.device else 0
        room = budget.room if plan.engine == "torch" else min(budget.room, max(0, budget.free - budget.coming))
        if plan.device_bytes > room + held:
            needed = f"{plan.device_bytes >> 20} MB are needed on {plan.device}"
            raise DeviceError(f"{needed}, its budget has room for {room + held >> 20}", "limit")
        return room, budget

    def built(self, index: Index) -> None:
        """``index`` was built and passed; from now on it counts in the budget of this process."""
        self.machine.holdings.add(index)
        self._budget = self.budget_after = self.machine.budget(fresh=True)
        self._backoff_reason, self._rest = "", _FIRST_REST
        predicted, measured = index.plan.device_bytes, index.device_bytes
        self._events.record(
            "device",
            f"{index.kind} of {index.n} rows on {index.device} by {index.plan.engine}",
            predicted_bytes=predicted,
            measured_bytes=measured,
        )

    def refused(self, error: DeviceError, plan: IndexPlan) -> None:
        """A build on the device failed; the CPU takes its place, for now or until restart."""
        self.incidents[error.cause] += 1
        self.last_incident = str(error)
        then = "until restart"
        if error.cause in _LASTING:
            self._disabled_reason = f"{plan.device} cannot be used until restart: {error}"
        elif error.cause == "device-error":
            self._broken[plan.engine] = self._active_issues["engine"] = str(error)
        else:
            self._active_issues["limit"] = str(error)
            self._start_backoff(f"{plan.device} had no room for this body ({error}); it is tried again later")
            then = "until there is room"
        self._events.record("device-refused", f"{error}; the CPU instead, {then}", level=logging.WARNING)

    def gave_up(self, plan: IndexPlan, why: str) -> None:
        """The device took an index that was not good enough; its engine is not asked again until restart."""
        self.refused(DeviceError(why), plan)

    def poll(self, index: Index) -> None:
        """Note what happened to ``index`` on its device since the last time."""
        for incident in index.incidents():
            self.incidents[incident.cause] += 1
            self.last_incident = f"{incident.device}: {incident.detail}"
            level = logging.INFO if incident.cause == "recovered" else logging.WARNING
            text = f"{incident.device}: {incident.detail} ({incident.cause}, {incident.action})"
            self._events.record("device-incident", text, level=level)
            if incident.action == "cpu-until-restart":
                self._disabled_reason = f"{incident.device} cannot be used until restart: {incident.detail}"
                self._unseen = True

    def report(self, index: Index) -> dict[str, Any]:
        """Plain values for health and statistics; bytes throughout.

        predicted_bytes are those of the plan, scratch_bytes the part of them that searches share; measured_bytes are
        the index's own, to be held against the difference.
        """
        choice = self.machine.known
        budgets = {"before": self.budget_before, "after": self.budget_after, "now": self._budget}
        return {
            "requested": self.machine.request,
            "engine_setting": self._setting,
            "engine_table": self._table.trust,
            "device": index.device,
            "engine": index.plan.engine,
            "reason": choice.reason if choice is not None else self._unlooked(),
            "name": choice.gpu.name if choice is not None and choice.gpu is not None else None,
            "predicted_bytes": index.plan.device_bytes,
            "scratch_bytes": scratch_bytes(index.plan),
            "measured_bytes": index.device_bytes,
            "budget": {when: None if one is None else one.as_dict() for when, one in budgets.items()},
            "disappointed": choice is not None and choice.unmet,
            "incidents": dict(self.incidents),
            "last_incident": self.last_incident or None,
            "problem": self._disabled_reason
            or self._backoff_reason
            or next(iter(list(self._active_issues.values())), None),
        }

    def _unlooked(self) -> str:
        """Why nobody has looked for a device."""
        border = gpu_pays_from(self._table)
        reason = "nothing here calls for a GPU yet"
        if self.machine.request != "auto":
            return reason
        return f"{reason}: " + (
            f"it may pay from {border} units on" if border < NEVER else "by the table it never pays"
        )

    def _report_once(self, cause: str, why: str, level: int) -> None:
        with self._lock:
            news = cause not in self._active_issues
            self._active_issues[cause] = why
        if news:
            self.incidents[cause] += 1
            self.last_incident = why
            self._wake_at = self._clock() + _FIRST_REST
            self._events.record("device-refused", f"{why}{_INSTEAD}{_UNTIL.get(cause, '')}", level=level)

    def _set_limits(self, plan: IndexPlan, budget: MemoryBudget) -> None:
        """Let the engines hold their own requests against the budget, those of searches included."""
        if plan.engine == "torch":
            account_of(plan.device).limit = budget.room + budget.used
        if plan.engine == "faiss":
            use_free_bytes(self.machine.free_now)

    def _concerned(self, count: int) -> bool:
        """Could a store of so many units be better off on a GPU?"""
        request = self.machine.request
        return request != "cpu" and (request != "auto" or count >= gpu_pays_from(self._table))

    def _limit(self, held: int) -> int:
        """What an index may take on the device in place of one that holds so many bytes there."""
        allowed_bytes = self._allowed_bytes(held)
        return allowed_bytes if self._most_bytes is None else min(allowed_bytes, self._most_bytes)

    def _bounded(self, held: int) -> bool:
        return self._most_bytes is not None and self._most_bytes < self._allowed_bytes(held)

    def _allowed_bytes(self, held: int) -> int:
        room = 0 if self._budget is None else self._budget.room
        return max(room + held, int(_GROWTH * held))

    def _start_backoff(self, why: str) -> None:
        self._backoff_reason = why
        self._budget = self.machine.budget(fresh=True)
        self._room_then = self._budget.room
        self._look_at = self._wake_at = self._clock() + self._rest
        self._rest = min(_LONGEST_REST, 2 * self._rest)

    def _may_try(self) -> bool:
        room = 0 if self._budget is None else self._budget.room
        return self._clock() >= self._look_at or room >= _MORE_ROOM * max(1, self._room_then)
