"""Run a query program in a child process with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

_MOST_CHARACTERS = 1 << 16
_GRACE_SECONDS = 1.0
_LONGEST, _FEW = 300, 3
"""Characters and lines of an error output that are passed on."""
_TRACEBACK = "Traceback (most recent call last)"

_abandoned: list[subprocess.Popen[str]] = []
"""Killed processes that did not end: one that waits inside a broken driver ends only when the driver lets it."""


class Answer(NamedTuple):
    """code: the exit status; negative for the signal that ended it, None when it did not end in time or begin; late: it
    did not end in time."""

    code: int | None
    out: str
    problem: str
    """What went wrong, in one line; empty when the status is 0."""
    late: bool = False


def run_subprocess(command: Sequence[str], timeout: float) -> Answer:
    """Run ``command`` and wait ``timeout`` seconds for its answer, and never much longer. Raises nothing."""
    name = command[0].rsplit("/", 1)[-1]
    _abandoned[:] = [each for each in _abandoned if each.poll() is None]
    try:
        process = subprocess.Popen(  # noqa: S603 - the caller's own command, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return Answer(None, "", f"{name} cannot be started: {error}")
    try:
        out, complaint = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        return Answer(None, "", f"{name} did not answer within {timeout:g} s", late=True)
    except BaseException:  # interrupted: the child is in a session of its own and would run on
        _end(process)
        raise
    code = process.returncode
    problem = f"{name} {_ending(code)}: {_gist(complaint or out)}" if code else ""
    return Answer(code, out[:_MOST_CHARACTERS], problem)


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
    try:
        process.communicate(timeout=_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        if process.poll() is None:
            _abandoned.append(process)


def _gist(text: str) -> str:
    """The error output of a failed program, in one line.

    Of a traceback the exception, whose message may go on below it; of a few lines all, since some tools end with a
    version number; else the last one.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    traces = [number for number, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    said = next((line for line in lines[traces[-1] + 1 :] if not line.startswith(" ")), "") if traces else ""
    if not said:
        said = "; ".join(lines if len(lines) <= _FEW else lines[-1:]) or "it said nothing"
    return said.strip()[:_LONGEST]


def _ending(code: int) -> str:
    if code >= 0:
        return f"failed with status {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
