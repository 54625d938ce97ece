"""Output: one JSON document or text on stdout, progress and errors on stderr, and Ctrl-C handling."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


class HeldInterrupt:
    """Whether Ctrl-C was pressed while it was delayed, and whether it was pressed again."""

    def __init__(self) -> None:
        self.pressed = False
        self.twice = False
        self.before: Any = None

    def check(self) -> None:
        """Raise KeyboardInterrupt when Ctrl-C was pressed."""
        if self.pressed:
            raise KeyboardInterrupt

    def release(self) -> None:
        """Let Ctrl-C take effect at once from here on; one that was delayed does so now."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None
            self.check()

    def press(self, _signal: int, _frame: FrameType | None) -> None:
        self.twice = self.pressed
        self.pressed = True
        if self.twice:
            raise KeyboardInterrupt


@contextmanager
def held_interrupt() -> Iterator[HeldInterrupt]:
    """Delay the first Ctrl-C until ``check`` or ``release`` is called; a second one takes effect at once.

    Nothing changes outside the main thread, where Python delivers no signals, and where Ctrl-C is ignored.
    """
    held = HeldInterrupt()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield held
        return
    held.before = signal.signal(signal.SIGINT, held.press)
    try:
        yield held
    finally:
        if held.before is not None:
            signal.signal(signal.SIGINT, held.before)


Report = Callable[[str, float], None]
"""Called with the stage of a long operation and the share of it that is done, 0..1."""

_GAP = 2
_LEAST = 10
"""Blanks between the columns of a table, and the least width to which a column of texts shrinks."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_NUMBER = re.compile(r"[-+]?\d[\d.,e+-]*( ?%| [kMGT]?B)?")


class Output:
    """The output of one command. With ``as_json`` stdout gets exactly one JSON document."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def show(self, document: Mapping[str, object], *texts: str | Rows) -> None:
        """Print the document, or for people the texts; a pipe gets tables as tab-separated values."""
        if self.as_json:
            lines: Iterable[str] = [json.dumps(_plain(document), allow_nan=False)]
        else:
            width = _width(sys.stdout)
            lines = (line for text in texts for line in ([text] if isinstance(text, str) else text.lines(width)))
        for line in lines:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def fail(self, error: str, kind: str) -> None:
        """Print why the command failed: as JSON on stdout, or as one line on stderr."""
        if self.as_json:
            sys.stdout.write(json.dumps({"error": error, "type": kind}) + "\n")
            sys.stdout.flush()
        else:
            self.note(f"error: {error}")

    def note(self, text: str) -> None:
        """Print a line for people on stderr."""
        sys.stderr.write(one_line(text) + "\n")
        sys.stderr.flush()

    @contextmanager
    def progress(self, what: str) -> Iterator[Report]:
        """Show a progress bar on stderr, if that is a terminal; it pulses where no share is known."""
        if not _is_terminal(sys.stderr):
            yield lambda _stage, _share: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        bar = Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr), transient=True)
        with bar:
            task = bar.add_task(what, total=None)

            def report(stage: str, share: float) -> None:
                known = 0 < share < 1  # the end of one stage is the start of another that may not be counted
                bar.tasks[0].total = 1.0 if known else None  # update() takes None for no change
                bar.update(task, description=printable(stage) or what, completed=share)

            yield report


@dataclass(frozen=True, slots=True)
class Rows:
    """A table of plain texts, one line per row.

    On a terminal columns of texts shrink to its width, from the right; ids and numbers are never cut. ``whole`` cuts
    nothing.
    """

    titles: tuple[str, ...]
    rows: list[list[str]]
    whole: bool = False

    def lines(self, width: int | None) -> Iterator[str]:
        """Yield the lines for a terminal of this width; None is a pipe, which gets tab-separated values, uncut."""
        cells = [[one_line(cell) for cell in row] for row in self.rows]
        if width is None:
            yield from ("\t".join(row) for row in [self.titles, *cells])
            return
        from rich.cells import set_cell_size

        widths = self._widths(cells, width)
        for row in [self.titles, *cells]:
            parts = []
            for cell, room in zip(row, widths, strict=True):
                shown = cell if cell_len(cell) <= room else set_cell_size(cell, room - 1).rstrip() + "\u2026"
                parts.append(set_cell_size(shown, room))
            yield (" " * _GAP).join(parts).rstrip()

    def _widths(self, cells: list[list[str]], width: int) -> list[int]:
        columns = list(zip(*[self.titles, *cells], strict=True))
        widths = [max(map(cell_len, column)) for column in columns]
        excess = sum(widths) + _GAP * (len(widths) - 1) - width
        for place in reversed(range(len(widths) if not self.whole else 0)):
            numbers = [cell_len(cell) for cell in columns[place] if _NUMBER.fullmatch(cell)]
            least = widths[place] if self.titles[place] == "id" else max(_LEAST, *numbers, 0)
            cut = min(max(excess, 0), max(widths[place] - least, 0))
            widths[place] -= cut
            excess -= cut
        return widths


def bar(share: float, width: int = 20) -> str:
    """Return a bar of ASCII characters and the percentage of a share, 0..1."""
    filled = min(max(round(share * width), 1 if share > 0 else 0), width)
    return f"[{'#' * filled}{'-' * (width - filled)}] {share * 100:.{0 if share >= 0.1 or not share else 1}f} %"


def cell_len(text: str) -> int:
    """Return the number of columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len as measured

    return measured(text)


def printable(text: str) -> str:
    """Escape control characters, so that a stored unit cannot control the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode-escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """As ``printable``, with any white space as one blank."""
    return printable(" ".join(text.split()))


def _is_terminal(stream: object) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _width(stream: object) -> int | None:
    """Return the columns of a terminal, COLUMNS first; None for any other stream."""
    if not _is_terminal(stream):
        return None
    return shutil.get_terminal_size().columns


def _plain(value: object) -> object:
    """Convert to JSON values: numpy scalars and paths become numbers and texts, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return _plain(value.item()) if hasattr(value, "item") else str(value)
