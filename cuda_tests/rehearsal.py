"""The tests of this folder without a GPU: tensors lie on the CPU, under the name of a card.

    python -m pytest cuda_tests --rehearse

It shows that the tests themselves run, so that time on a card is not spent on their mistakes; nothing about a GPU. The
faiss engine runs on its test double. What only a card can do (its own allocator, its errors, streams) is skipped.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

from cuda_tests.card_kit import DEVICE, Hooks
from fake_faiss_gpu import Card as FaissCard
from fake_faiss_gpu import gpu_faiss
from gpu_kit import MB, Card, machine_with

from memevolve_gpu.devices.selection import Machine
from memevolve_gpu.index import faiss_support
from memevolve_gpu.index.torch_gpu import index, ivf, runtime
from memevolve_gpu.index.torch_gpu.memory_accounting import account_of

__all__ = ["start"]

_CARD, _FAISS = Card(8000 * MB), FaissCard(8000 * MB)


def start() -> None:
    """Put the stand-ins in place, for the whole process."""
    torch = importlib.import_module("torch")
    for module in (index, ivf):
        _replace(module, "open_device", lambda _: torch.device("cpu"))
    _replace(runtime, "current", lambda _: nullcontext())
    _replace(runtime, "_release", lambda _: None)
    faiss_support.load_faiss()
    _replace(faiss_support, "_module", gpu_faiss(_FAISS))
    Hooks.tensors = "cpu"
    Hooks.machine = _machine
    Hooks.filled = _filled
    Hooks.free = _free
    Hooks.refusal = _refusal


def _replace(module: ModuleType, name: str, by: object) -> None:
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__} has no {name}: the rehearsal must follow it")
    setattr(module, name, by)


def _machine() -> Machine:
    return machine_with(_CARD, present={})


def _refusal(_engine: str, _index: int) -> str:
    return ""


def _free() -> int:
    return _CARD.free - account_of(DEVICE).used - sum(_FAISS.held.values())


@contextmanager
def _filled(leave: int) -> Iterator[None]:
    """No room beyond ``leave`` bytes, as the driver says and as allocations find."""
    account: Any = account_of(DEVICE)
    before, _CARD.taken = account.limit, _CARD.total - account.used - leave
    account.limit, _FAISS.others = account.used + leave, max(0, _FAISS.free() - leave)
    try:
        yield
    finally:
        account.limit, _CARD.taken, _FAISS.others = before, 0, 0
