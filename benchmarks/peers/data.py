"""The units, vectors and queries that every peer is given, as files that every worker maps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import Data, load

from .protocol import Array, Payload

__all__ = ["SEED", "Work", "prepared"]

SEED = 20_261_122
NOISE = 0.3
"""Length of the noise on a repeated vector: the copy's cosine to its origin is 0.96, as of two units on one subject."""
BLOCK = 50_000
QUERIES = 500
"""Of each kind; half to calibrate on, half to be judged by."""


@dataclass
class Work:
    """folder: holds vectors.npy, queries.npy and units.jsonl; size: rows to ingest, what follows is for later writes.

    name: what the data is, in words.
    """

    folder: Path
    name: str
    size: int

    @cached_property
    def vectors(self) -> Array:
        """float32 (size + spare, dim), mapped."""
        rows: Array = np.load(self.folder / "vectors.npy", mmap_mode="r")
        return rows

    @cached_property
    def queries(self) -> Array:
        """float32 (nq, dim); like the data and out of distribution by turns."""
        rows: Array = np.load(self.folder / "queries.npy")
        return rows

    @cached_property
    def parts(self) -> npt.NDArray[np.int64]:
        """``metadata.part`` of each row, 0 to 99."""
        return parts_of(len(self.vectors))

    @cached_property
    def units(self) -> list[Payload]:
        with (self.folder / "units.jsonl").open() as lines:
            return [json.loads(line) for line in lines]

    def payload(self, row: int) -> Payload:
        unit = self.units[row % len(self.units)]
        metadata = {**unit.get("metadata", {}), "part": int(self.parts[row])}
        return {**unit, "content": f"{unit['content']} [{row}]", "metadata": metadata}

    @property
    def calibration(self) -> list[int]:
        """Positions of the queries to set knobs by: two of every four, one of each kind."""
        return [i for i in range(len(self.queries)) if i % 4 < 2]

    @property
    def judged(self) -> list[int]:
        return [i for i in range(len(self.queries)) if i % 4 >= 2]


def parts_of(rows: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([SEED, 1]).integers(0, 100, rows)


def prepared(source: Path, folder: Path, size: int, spare: int, queries: int = QUERIES) -> Work:
    """Write the files of so many rows, from the units in ``source`` when there are some, else generated ones.

    queries: of each kind, at most as many as there are.
    """
    data = load(source)
    data.vectors = unit_length(data.vectors)
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng([SEED, 2]).permutation(len(data.vectors))
    shape = (size + spare, data.vectors.shape[1])
    rows = np.lib.format.open_memmap(folder / "vectors.npy", mode="w+", dtype=np.float32, shape=shape)
    at = 0
    for block in blocks(data.vectors[order], size + spare):
        rows[at : at + len(block)] = block
        at += len(block)
    rows.flush()
    np.save(folder / "queries.npy", by_turns(data, queries))
    with (folder / "units.jsonl").open("w") as lines:
        lines.writelines(json.dumps(data.units[i]) + "\n" for i in order)
    return Work(folder, described(data, size), size)


def blocks(base: Array, rows: int) -> Iterator[Array]:
    """The base itself, then copies of it with seeded noise, renormalised, up to so many rows."""
    yield base[:rows]
    done = min(len(base), rows)
    number = 0
    while done < rows:
        rng = np.random.default_rng([SEED, 3, number])
        picked = base[rng.integers(0, len(base), min(BLOCK, rows - done))]
        noise = rng.standard_normal(picked.shape, dtype=np.float32) * np.float32(NOISE / np.sqrt(base.shape[1]))
        yield unit_length(picked + noise)
        done += len(picked)
        number += 1


def by_turns(data: Data, queries: int) -> Array:
    inside, outside = (unit_length(data.queries[kind][:queries]) for kind in ("in", "out"))
    return np.asarray(np.stack([inside, outside], axis=1).reshape(-1, inside.shape[1]), dtype=np.float32)


def unit_length(rows: Array) -> Array:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def described(data: Data, size: int) -> str:
    real = len(data.vectors)
    if size <= real:
        return f"{size:,} of {data.name}"
    return f"{data.name}, and {size - real:,} copies of them with noise of length {NOISE}, renormalised"


def as_json(value: Any) -> Any:
    """numpy numbers as Python's, floats to six significant digits."""
    if isinstance(value, dict):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}")
    return int(value) if isinstance(value, np.integer) else value
