"""Real processes that are killed and stopped: a small part of the campaign, in a process of its own that can fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def endure(repository: Path, *arguments: str) -> str:
    paths = os.pathsep.join(str(repository / folder) for folder in ("cpu_tests", "cpu_tests/helpers"))
    done = subprocess.run(
        [sys.executable, "-m", "simulation.campaign", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    return done.stdout


@pytest.mark.slow
def test_what_was_acknowledged_survives_every_kill(repository: Path) -> None:
    said = endure(repository, "--cuts", "0", "--kills", "80", "--seconds", "0")
    assert " kills, 0 promises broken" in said


@pytest.mark.slow
def test_eight_processes_write_while_some_are_stopped_and_killed(repository: Path) -> None:
    said = endure(repository, "--cuts", "0", "--kills", "0", "--seconds", "4")
    assert "'stopped while holding the lock'" in said
    assert "'lock errors that name the holder'" in said
