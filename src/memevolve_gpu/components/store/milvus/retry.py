"""How long a call to the server is tried, and which failures are worth another try."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

__all__ = ["GaveUp", "Retrying"]

_Result = TypeVar("_Result")

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
ATTEMPT_SHARE = 1 / 3
"""Share of the whole time that one attempt may take, so that a node that hangs leaves time to ask another."""


class GaveUp(Exception):  # noqa: N818 - it never leaves this folder: the door makes an error of ours of it
    """The time is over; ``last`` is what the last attempt raised."""

    def __init__(self, last: BaseException, attempts: int) -> None:
        super().__init__(str(last))
        self.last = last
        self.attempts = attempts


@dataclass
class Retrying:
    """Repeats a call until it succeeds, fails for good, or ``seconds`` have passed.

    Only what may be done twice is given to it: reads, and writes that name every row by its id. ``clock`` and
    ``sleep`` are there for tests.
    """

    seconds: float
    clock: Callable[[], float] = field(default=time.monotonic)
    sleep: Callable[[float], None] = field(default=time.sleep)

    def run(
        self,
        call: Callable[[float], _Result],
        foreign: tuple[type[BaseException], ...],
        is_final: Callable[[BaseException], bool],
        seconds: float | None = None,
    ) -> _Result:
        """What ``call(seconds that this attempt may take)`` returns.

        Raises GaveUp when the time is over, and the foreign error itself when ``is_final`` says that another try
        would end the same.
        """
        allowed = self.seconds if seconds is None else seconds
        until, pause, attempts = self.clock() + allowed, FIRST_PAUSE, 0
        while True:
            attempts += 1
            left = max(0.001, until - self.clock())
            try:
                return call(min(left, max(1.0, allowed * ATTEMPT_SHARE)))
            except foreign as error:
                if is_final(error):
                    raise
                if self.clock() + pause >= until:
                    raise GaveUp(error, attempts) from error
            self.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
