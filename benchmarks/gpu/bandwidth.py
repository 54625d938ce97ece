"""Measure how fast memory is copied on the device, the upper limit for a scan.

    python benchmarks/gpu/bandwidth.py [--device cuda:0 | cpu] [--quick]

A copy reads and writes, and both count. Random data: some cards are faster on zeros. On a GPU the copies are timed by
CUDA events, several of 4 GiB (a quarter of the free memory where that is less) after a warm-up, median.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.common import Setting, module, note, script


def measure(setting: Setting) -> dict[str, Any]:
    """Bytes read plus written in a second: ``bytes_per_s``, and how it was measured."""
    repeats = 3 if setting.quick else 20
    torch = module("torch")
    size = (1 << 24) if setting.quick else 1 << 28
    if setting.on_gpu and not setting.quick:
        size = min(4 << 30, torch.cuda.mem_get_info(setting.index)[0] // 4 >> 20 << 20)
    device = setting.device if setting.on_gpu else "cpu"
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = [_copied(torch, setting, source, target) for _ in range(repeats + 3)][3:]
    median = float(np.median(seconds))
    found = {"bytes": size, "copies": repeats, "seconds": median, "bytes_per_s": 2 * size / median}
    note(f"copies of {size >> 20} MiB: {found['bytes_per_s'] / 1e12:.3f} TB/s read plus written")
    return setting.kept("bandwidth", found)


def _copied(torch: Any, setting: Setting, source: Any, target: Any) -> float:
    """Seconds of one copy."""
    if not setting.on_gpu:
        started = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def run(setting: Setting) -> dict[str, Any]:
    return {"bandwidth": measure(setting)}


if __name__ == "__main__":
    script(__doc__, run, lambda _: ())
