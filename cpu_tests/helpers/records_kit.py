"""Rows and helpers for the tests of the records package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
import numpy as np

from memevolve_gpu.records import Records, Transaction

__all__ = ["DIM", "Rows", "facts", "foreign_connection", "put", "unit", "vector"]

DIM = 4
Rows = dict[str, str]
"""Id and text of units to store."""


def vector(first: float = 1.0) -> bytes:
    """A vector of ``DIM`` little-endian float32 that begins with ``first``."""
    return np.array([first, 0, 0, 0], dtype="<f4").tobytes()


def unit(unit_id: str, **fields: Any) -> dict[str, Any]:
    """A small unit."""
    return {"id": unit_id, "type": "lesson", "content": f"content of {unit_id}", **fields}


def put(target: Records | Transaction, unit_id: str, text: str | None = None, **fields: Any) -> int:
    """Store one unit, in a transaction of its own when a store is given; returns its slot."""
    if isinstance(target, Records):
        with target.write() as tx:
            return put(tx, unit_id, text, **fields)
    made = unit(unit_id, **fields)
    return target.put(made, made["content"] if text is None else text, vector(), unit_id)


def facts(records: Records) -> dict[str, dict[str, Any]]:
    """Every unit by id, read unit by unit."""
    return {one["id"]: one for one in records.units(page_size=7)}


def foreign_connection(path: Path) -> apsw.Connection:
    """The database in the hands of another program."""
    return apsw.Connection(str(path))
