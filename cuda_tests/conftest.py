"""Tests that need a GPU: skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def _why_no_gpu() -> str:
    """Ask the driver's own tool, in a process of its own: a broken driver then cannot take the tests with it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no NVIDIA driver on this machine (nvidia-smi is not installed)"
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {error}"
    if answer.returncode or "GPU" not in answer.stdout:
        return f"nvidia-smi lists no GPU: {(answer.stdout + answer.stderr).strip()[:200]}"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test of this folder the reason why it cannot run."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and (reason := _why_no_gpu()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))
