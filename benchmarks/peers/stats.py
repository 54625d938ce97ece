"""From single timings to figures: percentiles, spread over passes, exponents of growth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Growth", "exponent", "passes_summary", "percentiles"]

Growth = tuple[float, float]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and mean of single calls, in milliseconds, and how many there were."""
    values = np.asarray(seconds, dtype=np.float64) * 1e3
    if not len(values):
        return {"calls": 0}
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "mean": float(values.mean()), "calls": len(values)}


def passes_summary(passes: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Percentiles over all passes, with the medians of the passes and their spread (largest less least, of the middle).

    passes: seconds of single calls, one sequence for each pass over the work.
    """
    kept = [one for one in passes if len(one)]
    medians = [float(np.median(one) * 1e3) for one in kept]
    every = [second for one in kept for second in one]
    summary: dict[str, Any] = {**percentiles(every), "pass_medians": medians}
    if medians:
        middle = float(np.median(medians))
        summary["ms"] = middle
        summary["spread"] = (max(medians) - min(medians)) / middle if middle else 0.0
    return summary


def exponent(sizes: Sequence[float], values: Sequence[float]) -> Growth:
    """The b of values = a * sizes**b by least squares over the logarithms, and the root mean square residual (e-folds).

    Raises ValueError for fewer than two different sizes, or for a size or value that is not above 0.
    """
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(set(x.tolist())) < 2 or (x <= 0).any() or (y <= 0).any():
        raise ValueError("sizes must hold two different sizes or more, and sizes and values must be above 0")
    slope, start = np.polyfit(np.log(x), np.log(y), 1)
    residual = np.log(y) - (slope * np.log(x) + start)
    return float(slope), float(np.sqrt(np.mean(residual**2)))
