"""Tests that need a GPU: skipped, with the reason, where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path += [
    str(REPOSITORY),
    *(str(REPOSITORY / name) for name in ("cpu_tests", "cpu_tests/helpers")),
]  # the contract of the indexes and its oracle are shared

SEED = 20_260_101
"""Seed of every random choice here."""


PARTS = {
    "torch": ("test_torch_engine.py", "test_beside_a_gpu.py"),
    "faiss": ("test_faiss_engine.py",),
    "stores": ("test_store_on_gpu.py",),
    "programs": ("test_torch_growth.py", "test_torch_in_programs.py"),
}
"""What runs in one process: each part ends within nine minutes on a card that has compiled nothing yet."""
_STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=sorted(PARTS), help="run only these files of cuda_tests")
    parser.addoption(
        "--minutes", type=float, help="skip, with the reason, tests that would begin after so many minutes"
    )
    parser.addoption(
        "--rehearse", action="store_true", help="run cuda_tests on CPU tensors: see cuda_tests/rehearsal.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--rehearse", default=False):
        from cuda_tests import rehearsal

        rehearsal.start()


def pytest_report_header(config: pytest.Config) -> str:
    """Name what is needed to repeat this run, and why nothing runs where nothing does."""
    rehearsed = config.getoption("--rehearse", default=False)
    return f"seed: {SEED}, GPU: {'rehearsed on CPU tensors' if rehearsed else _why_no_gpu() or 'present'}"


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every test of this folder the reason why it cannot run."""
    part = config.getoption("--part", default=None)
    if part is not None:
        left = [item for item in items if item.path.name not in PARTS[part]]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.path.name in PARTS[part]]
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = "" if not here or config.getoption("--rehearse", default=False) else _why_no_gpu()
    for item in here if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what would begin too late: a call that is cut off from outside loses the summary."""
    minutes = item.config.getoption("--minutes", default=None)
    if minutes is not None and time.monotonic() - _STARTED > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are used up")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts at the printed seed in every test."""
    return np.random.default_rng(SEED)


@pytest.fixture(scope="session")
def torch() -> Any:
    """torch that sees the GPU, in a process whose kernels are compiled."""
    from cuda_tests.torch_kit import here

    module = pytest.importorskip("torch", reason="torch is not installed")
    if here() == "cpu":
        return module
    if not module.cuda.is_available():
        pytest.skip(f"torch {module.__version__} sees no GPU")
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set in this process; run cuda_tests by themselves")
    return module


@pytest.fixture(autouse=True)
def _recorded() -> Iterator[None]:
    """Single queries are recorded, as a user may ask for: the plain way is gone the first two times."""
    from memevolve_gpu.index.torch_gpu.cuda_graphs import record_searches

    record_searches(True)
    yield
    record_searches(False)


@pytest.fixture
def small_card(torch: Any) -> Iterator[Callable[[int], None]]:
    """``small_card(bytes)`` leaves torch so many bytes beyond what is in use; None: all there are."""
    from cuda_tests.torch_kit import need_card

    need_card()

    def leave(room: int | None) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        share = 1.0 if room is None else (torch.cuda.memory_reserved(0) + room) / total
        torch.cuda.set_per_process_memory_fraction(share, 0)

    yield leave
    leave(None)


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
