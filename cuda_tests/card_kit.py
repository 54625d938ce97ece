"""What the tests on a GPU share: stores on a device, the card as its driver sees it, and somebody else who fills it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.devices.engine_probe import try_engine
from memevolve_gpu.devices.selection import Machine
from memevolve_gpu.index.faiss_gpu.sizes import TEMPORARY_BYTES
from memevolve_gpu.types import FloatArray

__all__ = [
    "DEVICE",
    "ENGINES",
    "Hooks",
    "device_of",
    "embeddings",
    "event_kinds",
    "filled_card",
    "free_bytes",
    "need_engine",
    "open_store",
    "scratch_of",
    "units",
]

DEVICE = "cuda:0"
ENGINES = ("torch", "faiss")

_FILLER = """
import sys, torch
free = torch.cuda.mem_get_info(0)[0]
leave, step, held = int(sys.argv[1]), 1 << 28, []
while step >= 1 << 20:
    if torch.cuda.mem_get_info(0)[0] - leave < step:
        step //= 2
        continue
    try:
        held.append(torch.empty(step, dtype=torch.uint8, device="cuda:0"))
    except RuntimeError:
        step //= 2
print("full", flush=True)
sys.stdin.read()
"""


class Hooks:
    """What a rehearsal without a GPU puts in the place of the real thing."""

    tensors = DEVICE
    machine: Callable[[], Machine] | None = None
    filled: Any = None
    free: Callable[[], int] | None = None
    refusal: Callable[[str, int], str] = staticmethod(try_engine)


def need_engine(engine: str) -> None:
    """Skip, with the reason, where this engine does not work on the device."""
    problem = Hooks.refusal(engine, 0)
    if problem:
        pytest.skip(problem)


def open_store(prefix: Path, engine: str, dim: int | None = None, **settings: Any) -> VectorStore:
    """A store of given embeddings that wants the GPU and maintains itself when told to."""
    wanted = {"device": "cuda", "gpu_engine": engine, "background": False, "max_memory_units": 10**8}
    config = StorageConfig(**{**wanted, **settings})
    machine = None if Hooks.machine is None else Hooks.machine()
    return VectorStore(prefix, None, dim, storage_config=config, machine=machine)


def units(start: int, stop: int, **more: Any) -> list[dict[str, Any]]:
    """Units ``u<row>`` of three topics."""
    kinds = ("lesson", "skill", "tool")
    return [
        {"id": f"u{row}", "type": kinds[row % 3], "content": f"unit {row}", "metadata": {"topic": row % 3}, **more}
        for row in range(start, stop)
    ]


def device_of(store: VectorStore) -> Any:
    """The ``device`` part of the health report."""
    return store.get_storage_health()["device"]


def event_kinds(store: VectorStore) -> dict[str, int]:
    """How often each kind of event happened."""
    totals: dict[str, int] = store.statistics()["event_totals"]
    return totals


def free_bytes() -> int:
    """Free memory of the first GPU, after torch has given back what it keeps in reserve."""
    if Hooks.free is not None:
        return Hooks.free()
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(0)[0])


def scratch_of(engine: str) -> int:
    """Bytes of a prediction that the engine shares among all indexes."""
    if engine == "faiss":
        return TEMPORARY_BYTES
    from memevolve_gpu.index.torch_gpu.memory_accounting import SCRATCH, WORKSPACE

    return SCRATCH + WORKSPACE


@contextmanager
def filled_card(leave: int = 64 << 20) -> Iterator[None]:
    """Another process takes all memory of the card but about ``leave`` bytes, and gives it back."""
    if Hooks.filled is not None:
        with Hooks.filled(leave):
            yield
        return
    command = [sys.executable, "-c", _FILLER, str(leave)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as filler:
        if filler.stdin is None or filler.stdout is None:
            raise RuntimeError("no pipes")
        try:
            if filler.stdout.readline().strip() != "full":
                pytest.skip("the card could not be filled by another process")
            yield
        finally:
            filler.stdin.close()
            filler.wait(60)


def embeddings(n: int, dim: int, seed: int = 1, around: int = 200) -> FloatArray:
    """Unit vectors around as many seeded centres, float32 (n, dim)."""
    centres = np.random.default_rng(dim).standard_normal((around, dim))
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(around, size=n)] + rng.standard_normal((n, dim))
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


if __name__ == "__main__":
    print(json.dumps({engine: try_engine(engine, 0) or "works" for engine in ENGINES}))
