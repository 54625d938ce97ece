"""The tests of this folder without a GPU: tensors lie on the CPU, under the name of a card.

    python -m pytest cuda_tests --rehearse

It shows that the tests themselves run, so that time on a card is not spent on their mistakes; nothing about a GPU. What
only a card can do (its own allocator, its errors, streams, the faiss engine) is skipped.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

from cuda_tests.card_kit import DEVICE, Hooks
from gpu_kit import MB, Card, machine_with

from memevolve_gpu.devices.selection import Machine
from memevolve_gpu.index.torch_gpu import index, ivf, runtime
from memevolve_gpu.index.torch_gpu.memory_accounting import account_of

__all__ = ["start"]

_CARD = Card(8000 * MB)


def start() -> None:
    """Put the stand-ins in place, for the whole process."""
    torch = importlib.import_module("torch")
    for module in (index, ivf):
        _replace(module, "open_device", lambda _: torch.device("cpu"))
    _replace(runtime, "current", lambda _: nullcontext())
    _replace(runtime, "_release", lambda _: None)
    Hooks.tensors = "cpu"
    Hooks.machine = _machine
    Hooks.filled = _filled
    Hooks.free = _free
    Hooks.refusal = _refusal


def _replace(module: ModuleType, name: str, by: Callable[[str], Any]) -> None:
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__} has no {name}: the rehearsal must follow it")
    setattr(module, name, by)


def _machine() -> Machine:
    return machine_with(_CARD)


def _refusal(engine: str, _index: int) -> str:
    return "" if engine == "torch" else "there is no rehearsal of the faiss engine here"


def _free() -> int:
    return _CARD.free - account_of(DEVICE).used


@contextmanager
def _filled(leave: int) -> Iterator[None]:
    """No room beyond ``leave`` bytes, as the driver says and as allocations find."""
    account: Any = account_of(DEVICE)
    before, _CARD.taken = account.limit, _CARD.total - account.used - leave
    account.limit = account.used + leave
    try:
        yield
    finally:
        account.limit, _CARD.taken = before, 0
