"""Which engine searches how many rows: the table behind GPU_ENGINE=auto.

The table of this module is not measured yet: no run of benchmarks/gpu on a GPU lies in benchmarks/results. The first
border is where one CPU thread takes about as long for a query (0.2 ms for 40,000 rows of 384 dimensions,
benchmarks/results) as launching a few kernels and copying a result back is expected to take; the order of the engines
is a guess. Every plan that follows it says so. Whoever has measured gives a table of his own: see :mod:`.engine_table`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

__all__ = [
    "BANDS",
    "ENGINES",
    "MEASURED",
    "NEVER",
    "SOURCE",
    "TABLE",
    "Band",
    "Choice",
    "Engine",
    "EngineSetting",
    "EngineTable",
    "engine_for",
    "gpu_pays_from",
]

Engine = Literal["cpu", "torch", "faiss"]
EngineSetting = Literal["auto", "torch", "faiss"]
ENGINES: tuple[Engine, ...] = ("cpu", "torch", "faiss")

NEVER = sys.maxsize
"""More rows than there can be."""


class Band(NamedTuple):
    """Up to ``rows`` rows (None: any number) the engines in this order, quickest first; the CPU is among them."""

    rows: int | None
    engines: tuple[Engine, ...]


@dataclass(frozen=True, slots=True)
class EngineTable:
    """bands: by ascending rows, the last one open; source: where the order comes from; measured: by measurement."""

    bands: tuple[Band, ...]
    source: str
    measured: bool = True

    @property
    def trust(self) -> str:
        """What plans say of it."""
        return f"{'measured' if self.measured else 'unmeasured'}: {self.source}"

    def band(self, count: int) -> Band:
        """The band for ``count`` rows."""
        return next(band for band in self.bands if band.rows is None or count <= band.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: the form in which a table is read from a file, and whether it is measured."""
        bands = [[band.rows, list(band.engines)] for band in self.bands]
        return {"bands": bands, "source": self.source, "measured": self.measured}


BANDS = (Band(50_000, ("cpu",)), Band(None, ("torch", "faiss", "cpu")))
SOURCE = "no GPU run in benchmarks/results yet"
MEASURED = False
TABLE = EngineTable(BANDS, SOURCE, MEASURED)
"""The table of whoever has not measured."""


class Choice(NamedTuple):
    """An engine, a note on the choice, and whether it is the CPU for want of one that would be quicker."""

    engine: Engine
    why: str
    lacking: bool = False


def gpu_pays_from(table: EngineTable) -> int:
    """Rows from which DEVICE=auto may take a GPU, :data:`NEVER` where the CPU is quicker for any number.

    Below it nobody needs to look for one.
    """
    last = 0
    for band in table.bands:
        if band.engines[0] != "cpu":
            return last + 1
        last = band.rows or NEVER
    return NEVER


def engine_for(
    table: EngineTable, count: int, setting: EngineSetting, usable: Sequence[str], *, wanted: bool
) -> Choice:
    """The engine for ``count`` rows on a device.

    Args:
        table: what is quicker.
        count: live rows.
        setting: GPU_ENGINE.
        usable: the GPU engines that are installed.
        wanted: a GPU was asked for in so many words, so that bands which belong to the CPU are passed over.
    """
    asked = _in_any_case(table, count) if wanted else table.band(count).engines
    asked = tuple(engine for engine in asked if setting in ("auto", engine) or engine == "cpu")
    for engine in asked:
        if engine == "cpu":
            break
        if engine in usable:
            return Choice(engine, f"engine {engine} by {_why(table, setting)}")
    if setting in usable and setting not in asked and table.band(count).engines != ("cpu",):
        return Choice("cpu", f"the table does not name {setting} for so many rows ({table.trust})")
    if asked[:1] == ("cpu",):
        return Choice("cpu", f"the CPU is quicker for so many rows ({table.trust})")
    if setting != "auto":
        return Choice("cpu", f"GPU_ENGINE={setting} cannot be used", True)
    if usable:
        return Choice("cpu", f"the CPU is quicker than {' and '.join(usable)} for so many rows ({table.trust})", True)
    return Choice("cpu", "no GPU engine can be used", True)


def _in_any_case(table: EngineTable, count: int) -> tuple[Engine, ...]:
    """What to try where a GPU is wanted though the table may see no gain: its own order first, then what it lacks."""
    bands = (table.band(count), *reversed(table.bands))
    order = dict.fromkeys(engine for band in bands for engine in band.engines) | dict.fromkeys(ENGINES)
    return tuple(engine for engine in order if engine != "cpu")


def _why(table: EngineTable, setting: EngineSetting) -> str:
    return "GPU_ENGINE" if setting != "auto" else f"the table ({table.trust})"
