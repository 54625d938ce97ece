"""A stand-in for a GPU: a device of that name whose tensors lie on the CPU, with as much room as a test gives it."""

from __future__ import annotations

import os

# Before triton is imported: its kernels then run on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from memevolve_gpu.index import device_failover
from memevolve_gpu.index.torch_gpu import index, ivf, runtime
from memevolve_gpu.index.torch_gpu.memory_accounting import WORKSPACE, Account, account_of

CARD = "cuda:7"


@pytest.fixture(scope="session")
def torch() -> Any:
    """torch, or a skipped test."""
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture(scope="session")
def kernels(torch: Any) -> SimpleNamespace:
    """The Triton kernels in Triton's interpreter, or a skipped test."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from memevolve_gpu.index.torch_gpu import kernels as module

    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1 must be set before triton is imported")
    return module.load()


@pytest.fixture
def card(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """The account of device ``CARD``, whose tensors lie on the CPU; set its ``limit`` to make the card small."""
    for module in (index, ivf):
        monkeypatch.setattr(module, "open_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(runtime, "current", lambda _: nullcontext())
    monkeypatch.setattr(runtime, "_release", lambda _: None)
    account = account_of(CARD)
    if account.used > WORKSPACE:
        gc.collect()  # what an earlier test saw raised holds its indexes
    yield account
    account.limit = None
    device_failover._lost.pop(CARD, None)
