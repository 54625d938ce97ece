"""What the sections of a run share: its peers in turn, its plan, and where figures go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .calibrate import Choice
from .data import Work
from .protocol import Facts
from .registry import peer
from .remote import PeerFailedError, Remote

__all__ = ["FULL", "QUICK", "TARGETS", "K", "Plan", "Session"]

K = 10
TARGETS = (0.95, 0.99)


@dataclass(frozen=True)
class Plan:
    """How often and how long.

    passes: over the judged queries; cap: seconds of one measurement of one peer, after which it makes no further turns
    (one pass over the queries is always made whole); block: calls in a turn; repeat_below: seconds of a build above
    which it is not repeated. limit: seconds after which a call is given up and its peer left out.
    """

    builds: int = 2
    repeat_below: float = 8.0
    passes: int = 2
    cap: float = 5.0
    block: int = 25
    reopens: int = 3
    writes: int = 200
    write_cap: float = 3.0
    mixed: int = 2000
    mixed_cap: float = 10.0
    queries: int = 500
    new_filters: int = 20
    threads_s: float = 1.0
    limit: float = 150.0


FULL = Plan()
QUICK = Plan(
    builds=1,
    passes=2,
    cap=1.0,
    block=20,
    reopens=1,
    writes=20,
    write_cap=0.5,
    mixed=100,
    mixed_cap=1.0,
    queries=60,
    new_filters=3,
    threads_s=0.2,
    limit=60.0,
)


@dataclass
class Session:
    """names: the peers still in the run; chosen: knobs by peer and target; rows: id to row where it is not the same.

    record: takes one record (section, peer and figures); tick: told when a turn is over.
    """

    names: list[str]
    work: Work
    plan: Plan
    folder: Path
    core: int
    record: Callable[[dict[str, Any]], None]
    tick: Callable[[str], None]
    remotes: dict[str, Remote] = field(default_factory=dict)
    chosen: dict[str, dict[float, Choice]] = field(default_factory=dict)
    rows: dict[str, dict[int, int]] = field(default_factory=dict)
    gone: dict[str, set[int]] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)

    def facts(self, name: str) -> Facts:
        return peer(name).facts

    def start(self, name: str, folder: str = "store") -> Remote:
        """A fresh process for the peer, on the folder of that name."""
        home = self.folder / name.replace(" ", "-")
        home.mkdir(parents=True, exist_ok=True)
        return Remote(name, self.work, home / folder, self.core, self.plan.limit)

    def turns(self, number: int, names: Sequence[str] | None = None) -> Iterator[str]:
        """The peers, beginning with another one each round."""
        every = [name for name in self.names if names is None or name in names]
        shift = number % len(every) if every else 0
        yield from every[shift:] + every[:shift]

    def each(self, section: str, number: int, call: Callable[[str], None], names: Sequence[str] | None = None) -> None:
        """One turn for every peer; one that fails is recorded and leaves the run."""
        for name in self.turns(number, names):
            try:
                call(name)
            except PeerFailedError as error:
                self.record({"section": section, "peer": name, "error": str(error)})
                self.leave(name)
            self.tick(name)

    def leave(self, name: str) -> None:
        self.names.remove(name)
        remote = self.remotes.pop(name, None)
        if remote is not None:
            remote.end()

    def interleaved(
        self, section: str, blocks: int, call: Callable[[str, int], float], names: Sequence[str], least: int, cap: float
    ) -> None:
        """Blocks of calls by turns; ``call(name, block)`` returns the seconds taken.

        A peer that has used up ``cap`` seconds stops when it has made ``least`` blocks.
        """
        used = dict.fromkeys(names, 0.0)
        for block in range(blocks):
            going = [name for name in names if block < least or used[name] < cap]

            def turn(name: str, block: int = block) -> None:
                used[name] += call(name, block)

            self.each(section, block, turn, going)

    def finish(self) -> None:
        for remote in self.remotes.values():
            remote.end()
        self.remotes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self.started
