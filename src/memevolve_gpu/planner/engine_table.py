"""Which engine searches how many rows: the table used by GPU_ENGINE=auto, built in or read from a file.

    {"bands": [[40000, ["cpu", "torch"]], [null, ["torch", "faiss", "cpu"]]], "source": "our card, 2026-05-01"}

Each band gives the engines, fastest first, for up to that many rows; the last one is for any number.

The built-in table is not measured yet: there is no run of benchmarks/gpu on a GPU in benchmarks/results. Its first
border is where one CPU thread takes about as long for a query (0.2 ms for 40,000 rows of 384 dimensions,
benchmarks/results) as a few kernel launches and the copy of a result are expected to take; the order of the engines is
a guess. Every plan that uses it says so. A measured table can be given in a file: see :func:`read_engine_table`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import ConfigurationError

__all__ = [
    "NEVER",
    "SETTING",
    "TABLE",
    "Band",
    "EngineSetting",
    "EngineTable",
    "engine_for",
    "gpu_pays_from",
    "parse_engine_table",
    "read_engine_table",
]

Engine = Literal["cpu", "torch", "faiss"]
EngineSetting = Literal["auto", "torch", "faiss"]
ENGINES: tuple[Engine, ...] = ("cpu", "torch", "faiss")

NEVER = sys.maxsize
"""More rows than there can be."""


class Band(NamedTuple):
    """The engines for up to ``rows`` rows (None: any number), fastest first; the CPU is among them."""

    rows: int | None
    engines: tuple[Engine, ...]


@dataclass(frozen=True, slots=True)
class EngineTable:
    """bands: by ascending rows, the last one open; source: what was measured; measured: whether anything was."""

    bands: tuple[Band, ...]
    source: str
    measured: bool = True

    @property
    def trust(self) -> str:
        """How far the table can be trusted, for plans."""
        return f"{'measured' if self.measured else 'unmeasured'}: {self.source}"

    def band(self, count: int) -> Band:
        """The band for ``count`` rows."""
        return next(band for band in self.bands if band.rows is None or count <= band.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: the table as it is read from a file, and whether it is measured."""
        bands = [[band.rows, list(band.engines)] for band in self.bands]
        return {"bands": bands, "source": self.source, "measured": self.measured}


BANDS = (Band(50_000, ("cpu",)), Band(None, ("torch", "faiss", "cpu")))
SOURCE = "no GPU run yet"
MEASURED = False
TABLE = EngineTable(BANDS, SOURCE, MEASURED)
"""The built-in table."""


class Choice(NamedTuple):
    """An engine, the reason, and whether it is the CPU because a faster engine is missing."""

    engine: Engine
    why: str
    lacking: bool = False


def gpu_pays_from(table: EngineTable) -> int:
    """Rows from which DEVICE=auto may use a GPU; :data:`NEVER` where the CPU is faster for any number.

    With fewer rows no GPU is looked for.
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
        table: the fastest engines by number of rows.
        count: live rows.
        setting: GPU_ENGINE.
        usable: the GPU engines that are installed.
        wanted: a GPU is requested explicitly, so that the CPU's bands are ignored.
    """
    tried = _in_any_case(table, count) if wanted else table.band(count).engines
    tried = tuple(engine for engine in tried if setting in ("auto", engine) or engine == "cpu")
    for engine in tried:
        if engine == "cpu":
            break
        if engine in usable:
            return Choice(engine, f"engine {engine} by {_why(table, setting)}")
    if setting in usable and setting not in tried and table.band(count).engines != ("cpu",):
        return Choice("cpu", f"the table does not name {setting} for this many rows ({table.trust})")
    if tried[:1] == ("cpu",):
        return Choice("cpu", f"the CPU is faster for this many rows ({table.trust})")
    if setting != "auto":
        return Choice("cpu", f"GPU_ENGINE={setting} cannot be used", True)
    if usable:
        return Choice("cpu", f"the CPU is faster than {' and '.join(usable)} for this many rows ({table.trust})", True)
    return Choice("cpu", "no GPU engine can be used", True)


def _in_any_case(table: EngineTable, count: int) -> tuple[Engine, ...]:
    """The engines to try where a GPU is requested: those of the table in its order, then the others."""
    bands = (table.band(count), *reversed(table.bands))
    order = dict.fromkeys(engine for band in bands for engine in band.engines) | dict.fromkeys(ENGINES)
    return tuple(engine for engine in order if engine != "cpu")


def _why(table: EngineTable, setting: EngineSetting) -> str:
    return "GPU_ENGINE" if setting != "auto" else f"the table ({table.trust})"


SETTING = "MEMEVOLVE_STORAGE_GPU_ENGINE_TABLE"
_MOST_BYTES = 1 << 20
_LONGEST_SOURCE = 300
_REMEDY = "write it again, see https://memevolve-gpu.example/docs/how-to/gpu/#measure-your-card, or unset the setting"


def read_engine_table(path: str) -> EngineTable:
    """The table in a file.

    Raises:
        ConfigurationError: the file cannot be read or is not a table; names the setting, the file, the fault and the
            remedy.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(_MOST_BYTES)  # a longer file is cut, and is no valid JSON
        value = json.loads(data.decode("utf-8-sig"))
    except (OSError, RuntimeError) as error:  # RecursionError, or an unknown home folder
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{SETTING}={path!r}: cannot be read ({reason}); {_REMEDY}") from None
    except ValueError as error:  # also invalid JSON and UTF-8
        raise ConfigurationError(f"{SETTING}={path!r}: not a JSON table ({error}); {_REMEDY}") from None
    try:
        return parse_engine_table(value)
    except ValueError as error:
        raise ConfigurationError(f"{SETTING}={path!r}: {error}; {_REMEDY}") from None


def parse_engine_table(value: Any) -> EngineTable:
    """The table in plain JSON values.

    Raises:
        ValueError: they are not a table; says why.
    """
    if not isinstance(value, dict) or not {"bands", "source"} <= value.keys():
        raise ValueError('it must be an object with "bands" and "source"')
    source, listed = value["source"], value["bands"]
    if not isinstance(source, str) or not source.strip() or len(source) > _LONGEST_SOURCE:
        raise ValueError(
            f"source must be a text of 1 to {_LONGEST_SOURCE} characters: what was measured, where and when"
        )
    if not isinstance(listed, list) or not listed:
        raise ValueError("bands must be a list of [rows, engines]")
    bands = tuple(_band(number, entry) for number, entry in enumerate(listed, 1))
    if bands[-1].rows is not None:
        raise ValueError("the last band must be open: give null for its rows")
    rows = [band.rows for band in bands[:-1]]
    borders = [each for each in rows if each is not None]
    if len(borders) < len(rows):
        raise ValueError("only the last band may be open")
    if any(low >= high for low, high in pairwise(borders)):
        raise ValueError("the rows of the bands must ascend")
    return EngineTable(bands, " ".join(source.split()))


def _band(number: int, entry: Any) -> Band:
    if not isinstance(entry, list) or len(entry) != 2:
        raise ValueError(f"band {number} must be [rows, engines]")
    rows, engines = entry
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f"band {number}: rows must be a whole number of at least 1, or null, got {rows!r}")
    if not isinstance(engines, list) or not all(isinstance(engine, str) for engine in engines):
        raise ValueError(f"band {number}: engines must be a list of names")
    unknown = [engine for engine in engines if engine not in ENGINES]
    if unknown:
        raise ValueError(f"band {number}: unknown engine {unknown[0]!r}; known are {', '.join(ENGINES)}")
    if len(set(engines)) < len(engines):
        raise ValueError(f"band {number}: an engine is named twice")
    if "cpu" not in engines:
        raise ValueError(f"band {number}: cpu is missing; it is what answers where no other engine can")
    return Band(rows, tuple(engines))
