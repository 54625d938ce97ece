"""Tests that need a GPU: skipped, with the reason, where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path += [str(REPOSITORY), str(REPOSITORY / "cpu_tests")]  # the contract of the bodies and its oracle are shared

SEED = 20_260_101
"""Seed of every random choice here."""


def pytest_report_header(config: pytest.Config) -> str:
    """Name what is needed to repeat this run, and why nothing runs where nothing does."""
    return f"seed: {SEED}, GPU: {_why_no_gpu() or 'present'}"


@cache
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


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts at the printed seed in every test."""
    return np.random.default_rng(SEED)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real units and embeddings: $MEMEVOLVE_TEST_DATA, or one beside the checkout, or one in it."""
    named = os.environ.get("MEMEVOLVE_TEST_DATA")
    folders = [Path(named)] if named else []
    folders += [REPOSITORY.parent / "shared" / "data", REPOSITORY / "shared" / "data"]
    for folder in folders:
        if (folder / "tldr_minilm_f16.npy").is_file():
            return folder
    pytest.skip(f"no real embeddings in {' or '.join(map(str, folders))}; MEMEVOLVE_TEST_DATA names a folder")
