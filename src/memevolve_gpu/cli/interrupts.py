"""Ctrl-C at a place of our choosing, so that the message about what was written is true."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["HeldInterrupt", "held_interrupt"]


class HeldInterrupt:
    """Whether Ctrl-C was pressed while it was held back, and whether it was pressed again."""

    def __init__(self) -> None:
        self.pressed = False
        self.twice = False

    def check(self) -> None:
        """Raise KeyboardInterrupt when Ctrl-C was pressed."""
        if self.pressed:
            raise KeyboardInterrupt

    def press(self, _signal: int, _frame: FrameType | None) -> None:
        """Handle the signal."""
        self.twice = self.pressed
        self.pressed = True
        if self.twice:
            raise KeyboardInterrupt


@contextmanager
def held_interrupt() -> Iterator[HeldInterrupt]:
    """Hold back the first Ctrl-C until ``check`` is called; a second one acts at once.

    Outside the main thread, where Python delivers no signals, and where Ctrl-C is ignored, nothing changes.
    """
    held = HeldInterrupt()
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) not in (
        signal.SIG_IGN,
        None,
    )
    if not ours:
        yield held
        return
    before = signal.signal(signal.SIGINT, held.press)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
