"""Which engine searches how many rows: the table behind GPU_ENGINE=auto.

The table is not measured yet: no run of benchmarks/gpu on a GPU lies in benchmarks/results. The first border is where
one CPU thread takes about as long for a query (0.2 ms for 40,000 rows of 384 dimensions, benchmarks/results) as
launching a few kernels and copying a result back is expected to take; the order of the engines is a guess. Every plan
that follows it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

__all__ = ["BANDS", "MEASURED", "SOURCE", "Band", "Choice", "Engine", "EngineSetting", "engine_for", "gpu_pays_from"]

Engine = Literal["cpu", "torch", "faiss"]
EngineSetting = Literal["auto", "torch", "faiss"]


class Band(NamedTuple):
    """Up to ``rows`` rows (None: any number) the engines in this order, quickest first; the CPU is among them."""

    rows: int | None
    engines: tuple[Engine, ...]


BANDS = (Band(50_000, ("cpu",)), Band(None, ("torch", "faiss", "cpu")))
SOURCE = "no GPU run in benchmarks/results yet"
MEASURED = False


class Choice(NamedTuple):
    """An engine, a note on the choice, and whether it is the CPU for want of one that would be quicker."""

    engine: Engine
    why: str
    lacking: bool = False


def gpu_pays_from() -> int:
    """Rows from which DEVICE=auto may take a GPU; below it nobody needs to look for one."""
    last = 0
    for band in BANDS:
        if band.engines[0] != "cpu" or band.rows is None:
            break
        last = band.rows
    return last + 1


def engine_for(count: int, setting: EngineSetting, usable: Sequence[str], *, wanted: bool) -> Choice:
    """The engine for ``count`` rows on a device.

    Args:
        count: live rows.
        setting: GPU_ENGINE.
        usable: the GPU engines that are installed.
        wanted: a GPU was asked for in so many words, so that bands which belong to the CPU are passed over.
    """
    band = next(band for band in BANDS if band.rows is None or count <= band.rows)
    asked = [engine for engine in band.engines if setting in ("auto", engine) or engine == "cpu"]
    if wanted:
        asked = [engine for engine in _in_any_case(band, setting) if engine != "cpu"]
    for engine in asked:
        if engine in usable:
            return Choice(engine, f"engine {engine} by {_why(setting)}")
        if engine == "cpu":
            break
    if asked[:1] == ["cpu"]:
        return Choice("cpu", f"the CPU is quicker for so many rows ({_trust()})")
    return Choice(
        "cpu", "no GPU engine can be used" if setting == "auto" else f"GPU_ENGINE={setting} cannot be used", True
    )


def _in_any_case(band: Band, setting: EngineSetting) -> tuple[Engine, ...]:
    """What to try where a GPU is wanted though the table may see no gain."""
    if setting != "auto":
        return (setting,)
    return band.engines if len(band.engines) > 1 else BANDS[-1].engines


def _why(setting: EngineSetting) -> str:
    return "GPU_ENGINE" if setting != "auto" else f"the table ({_trust()})"


def _trust() -> str:
    return f"measured: {SOURCE}" if MEASURED else f"unmeasured: {SOURCE}"
