"""Reads the table of whoever has measured for himself: a small JSON file, written by benchmarks/gpu/engine_table.py.

    {"bands": [[40000, ["cpu", "torch"]], [null, ["torch", "faiss", "cpu"]]], "source": "our card, 2026-05-01"}

Each band holds up to so many rows and the engines, quickest first; the last one holds for any number.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .engines import ENGINES, Band, EngineTable

__all__ = ["SETTING", "parse_engine_table", "read_engine_table"]

SETTING = "MEMEVOLVE_STORAGE_GPU_ENGINE_TABLE"
_MOST_BYTES = 1 << 20
_LONGEST_SOURCE = 300
_REMEDY = "write it anew with benchmarks/gpu/engine_table.py RESULTS --json FILE, or unset the setting"


def read_engine_table(path: str) -> EngineTable:
    """The table in a file.

    Raises:
        ConfigurationError: the file cannot be read or holds no such table; names the setting, the file, what is wrong
            and the remedy.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(_MOST_BYTES)  # what is longer is cut, and so no JSON
        value = json.loads(data.decode("utf-8-sig"))
    except (OSError, RuntimeError) as error:  # RecursionError, and a home folder that nobody knows
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{SETTING}={path!r}: cannot be read ({reason}); {_REMEDY}") from None
    except ValueError as error:  # JSON and UTF-8, too
        raise ConfigurationError(f"{SETTING}={path!r}: not a JSON table ({error}); {_REMEDY}") from None
    try:
        return parse_engine_table(value)
    except ValueError as error:
        raise ConfigurationError(f"{SETTING}={path!r}: {error}; {_REMEDY}") from None


def parse_engine_table(value: Any) -> EngineTable:
    """The table out of plain JSON values.

    Raises:
        ValueError: what is wrong with it.
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
