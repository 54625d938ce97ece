"""The units, vectors and queries that every peer is given, as files that every worker maps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import Data, load, wide

from .protocol import Array, Payload

__all__ = ["SEED", "Work", "documents", "mixed_text", "prepared", "wide_units"]

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
        """``metadata.part`` of each row, 0 to 999."""
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
    return np.random.default_rng([SEED, 1]).integers(0, 1000, rows)


def prepared(
    source: Path,
    folder: Path,
    size: int,
    spare: int,
    queries: int = QUERIES,
    make: Callable[[Data], Data] | None = None,
) -> Work:
    """Write the files of so many rows, from the units in ``source`` when there are some, else generated ones.

    queries: of each kind, at most as many as there are. make: another data set from those units.
    """
    data = load(source)
    data.vectors = unit_length(data.vectors)
    data = make(data) if make else data
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
        lines.writelines(json.dumps(data.units[i % len(data.units)]) + "\n" for i in order)
    return Work(folder, described(data, size), size)


def documents(data: Data, size: int = 40_000) -> Data:
    """Chunks of 2,000 documents: each chunk is its document's vector and a smaller one of its own; so are questions."""
    rng = np.random.default_rng([SEED, 5])
    subjects = data.vectors[rng.choice(len(data.vectors), 2000, replace=False)]

    def drawn(rows: int) -> Array:
        own = data.vectors[rng.integers(0, len(data.vectors), rows)]
        return unit_length(subjects[rng.integers(0, len(subjects), rows)] + np.float32(0.6) * own)

    name = f"{size:,} chunks of 2,000 documents, made of {data.name}; all questions are like the chunks"
    return Data(name, data.units, drawn(size), {"in": drawn(QUERIES), "out": drawn(QUERIES)}, data.texts)


def mixed_text(data: Data, size: int = 40_000) -> Data:
    """Mixtures of two real vectors, from almost one of them to half of each; half the questions are of another kind."""
    rng = np.random.default_rng([SEED, 6])
    first, second = (data.vectors[rng.integers(0, len(data.vectors), size)] for _ in range(2))
    share = rng.beta(0.5, 0.5, (size, 1)).astype(np.float32)
    noise = rng.standard_normal(first.shape, dtype=np.float32) * np.float32(NOISE / np.sqrt(first.shape[1]))
    name = f"{size:,} mixtures of two of {data.name}; half of the questions are of another kind"
    return Data(name, data.units, unit_length(share * first + (1 - share) * second + noise), data.queries, data.texts)


def wide_units(data: Data) -> Data:
    """The vectors of 1,536 columns beside the units; where there are none, the others made as wide by joining."""
    found = wide(data)
    return Data(found.name, found.units, unit_length(found.vectors), found.queries, found.texts)


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
