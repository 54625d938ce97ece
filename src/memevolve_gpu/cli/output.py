"""Output: one JSON document or text on stdout, progress and errors on stderr, and Ctrl-C handling."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["Output", "Report", "Rows", "console_for", "held_interrupt", "one_line", "printable"]


class HeldInterrupt:
    """Whether Ctrl-C was pressed while it was delayed, and whether it was pressed again."""

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
    """Delay the first Ctrl-C until ``check`` is called; a second one takes effect at once.

    Nothing changes outside the main thread, where Python delivers no signals, and where Ctrl-C is ignored.
    """
    held = HeldInterrupt()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield held
        return
    before = signal.signal(signal.SIGINT, held.press)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)


Report = Callable[[str, float], None]
"""Called with the stage of a long operation and the share of it that is done, 0..1."""

_PIPED_WIDTH = 160
"""Width of output that does not go to a terminal."""

_MAX_COLUMN = 40
_MIN_LAST_COLUMN = 20
_GAP = 2
"""Widths of the columns of a table: most of all but the last, least of the last, blanks between two."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class Output:
    """The output of one command. With ``as_json`` stdout gets exactly one JSON document."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def show(self, document: Mapping[str, Any], *texts: RenderableType) -> None:
        """Print the document, or for people the texts."""
        if self.as_json:
            sys.stdout.write(json.dumps(_plain(document), allow_nan=False) + "\n")
        else:
            console = console_for(sys.stdout)
            for text in texts:
                console.print(text, soft_wrap=not isinstance(text, Rows), markup=False, highlight=False)
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
        """Show a progress bar on stderr, if that is a terminal."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        console = console_for(sys.stderr)
        bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True)
        with bar:
            task = bar.add_task(what, total=1.0)

            def report(stage: str, share: float) -> None:
                bar.update(task, description=printable(stage) or what, completed=min(max(share, 0.0), 1.0))

            yield report


@dataclass(frozen=True, slots=True)
class Rows:
    """A table of plain texts, one line per row; the last column is truncated at the width of the output."""

    titles: tuple[str, ...]
    rows: list[list[str]]

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [[one_line(cell) for cell in row] for row in self.rows]
        columns = list(zip(*[self.titles, *cells], strict=True))
        widths = [min(_MAX_COLUMN, max(map(cell_len, column))) for column in columns[:-1]]
        widths.append(max(_MIN_LAST_COLUMN, options.max_width - sum(widths) - _GAP * len(widths)))
        for style, row in [("bold", self.titles), *(("", row) for row in cells)]:
            line = Text(style=style, no_wrap=True, overflow="ellipsis")
            for cell, width in zip(row, widths, strict=True):
                text = Text(cell)
                text.truncate(width, overflow="ellipsis", pad=True)
                line.append_text(text).append(" " * _GAP)
            line.rstrip()
            yield line


def printable(text: str) -> str:
    """Escape control characters, so that a stored unit cannot control the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode-escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """As ``printable``, with any white space as one blank."""
    return printable(" ".join(text.split()))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the error, where rich would exit with 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def console_for(stream: Any) -> Console:
    """Return a console that writes to the stream, with a fixed width unless it is a terminal."""
    terminal = bool(getattr(stream, "isatty", lambda: False)())
    return _Console(file=stream, force_terminal=terminal or None, width=None if terminal else _PIPED_WIDTH)


def _plain(value: Any) -> Any:
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
