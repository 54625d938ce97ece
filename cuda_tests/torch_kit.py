"""What the tests of the torch engine on a GPU share: indexes on the card, data, and programs of their own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_tests.card_kit import DEVICE, Hooks

from memevolve_gpu.index.registry import build
from memevolve_gpu.index.torch_gpu import index as index_module
from memevolve_gpu.index.torch_gpu.index import TorchIndex
from memevolve_gpu.types import FloatArray, IndexPlan, IntArray, Metric, Rows, SearchParams

__all__ = [
    "DEVICE",
    "SEED",
    "Newer",
    "SearchParams",
    "alone",
    "cut",
    "here",
    "host_is_not_asked",
    "meanwhile",
    "need_card",
    "on_card",
    "overlap",
    "rows_of",
    "vectors_of",
]

SEED = 20_260_505
_REPOSITORY = Path(__file__).resolve().parents[1]


def here() -> str:
    """Where tensors lie: the card, but in a rehearsal."""
    return Hooks.tensors


def need_card() -> None:
    """Skip what a rehearsal cannot show."""
    if here() == "cpu":
        pytest.skip("only a card can show this")


def vectors_of(n: int, dim: int, seed: int = SEED, metric: Metric = "l2") -> FloatArray:
    """Points around 200 centres; of length one under cosine."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(dim).standard_normal((200, dim)).astype(np.float32)
    found = centres[rng.integers(200, size=n)] + 0.7 * rng.standard_normal((n, dim), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True) if metric == "cosine" else found


def rows_of(vectors: FloatArray) -> Rows:
    """Rows 0, 1, 2, ..., each called ``a``."""
    n = len(vectors)
    return Rows(np.arange(n, dtype=np.int64), np.full(n, 97, np.uint8), np.arange(1, n + 1, dtype=np.int64), vectors)


def cut(vectors: FloatArray, start: int, end: int) -> Rows:
    """Rows ``start`` up to ``end`` of those."""
    count = end - start
    ends = np.arange(1, count + 1, dtype=np.int64)
    return Rows(np.arange(start, end, dtype=np.int64), np.full(count, 97, np.uint8), ends, vectors[start:end])


class Newer:
    """Rows that came after an index was made."""

    def __init__(self, vectors: FloatArray) -> None:
        self.vectors = vectors

    def blocks(self, start: int, end: int) -> Iterator[FloatArray]:
        """Some thousand rows at a time."""
        for low in range(start, end, 5000):
            yield self.vectors[low : min(end, low + 5000)]


def on_card(kind: str, vectors: FloatArray, metric: Metric = "l2", *, nlist: int = 64, **how: Any) -> TorchIndex:
    """An index on the card, all of whose kernels run there."""
    float32_rows = how.pop("float32_rows", False)
    plan = IndexPlan(
        kind,  # type: ignore[arg-type]
        nlist=nlist if kind == "ivf" else 0,
        engine="torch",
        device=DEVICE,
        device_bytes=1 << 50 if float32_rows else 0,
        **how,
    )
    found = build(plan, rows_of(vectors), metric, seed=7)
    assert isinstance(found, TorchIndex)
    assert found.incidents() == [], "a kernel does not run here"
    assert found.device == DEVICE
    return found


def overlap(found: IntArray, expected: IntArray) -> float:
    """Share of the expected positions that were found."""
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    return sum(hits) / expected.size


def host_is_not_asked(index: TorchIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send everything to the device, and fail where the host scans."""
    monkeypatch.setattr(index_module, "_DEVICE_CALL", 0.0)
    monkeypatch.setattr(type(index.table), "scan", None)


@contextmanager
def meanwhile(work: Callable[[], None], *mishaps: type[BaseException]) -> Iterator[list[BaseException]]:
    """Another thread does ``work`` over and over; what it raises is kept, and must be one of ``mishaps``."""
    over, raised = threading.Event(), list[BaseException]()

    def run() -> None:
        while not over.is_set():
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - kept, and judged below
                raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield raised
    finally:
        over.set()
        thread.join(60)
    assert all(isinstance(error, mishaps) for error in raised), raised


def alone(program: str) -> str:
    """The last line that ``program`` prints in a process of its own, which must end well; it finds this module."""
    paths = [str(_REPOSITORY), str(_REPOSITORY / "cpu_tests"), str(_REPOSITORY / "cpu_tests/helpers"), *sys.path]
    start = f"import sys; sys.path[:0] = {paths!r}\nfrom cuda_tests.torch_kit import *\n"
    if here() == "cpu":
        start += "from cuda_tests import rehearsal\nrehearsal.start()\n"
    command = [sys.executable, "-W", "ignore", "-c", start + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.returncode, (done.stdout + done.stderr)[-3000:])
    return done.stdout.strip().splitlines()[-1]
