"""Small dealings with arrays here and there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import EngineError
from ...types import FloatArray, IntArray
from ...utils.device_arrays import DeviceQueries
from ..base import Arrays
from .door import host_tensor

__all__ = ["columns", "joined", "on_host", "on_some_device", "part", "some", "widened"]


def part(parts: Arrays, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A part of exactly this kind, or an EngineError."""
    array = parts.get(name)
    if array is None or array.dtype != dtype or array.shape != shape:
        raise EngineError(f"part {name!r} is missing or not {np.dtype(dtype).name} {shape}; rebuild the index")
    return array


def on_some_device(queries: Any) -> bool:
    return hasattr(queries, "__dlpack__") or hasattr(queries, "__cuda_array_interface__")


def on_host(queries: Any) -> FloatArray:
    if isinstance(queries, np.ndarray):
        return queries
    if isinstance(queries, DeviceQueries):
        return queries.host()
    if hasattr(queries, "detach"):
        return DeviceQueries(queries.detach()).host()
    if hasattr(queries, "get"):
        queries = queries.get()
    return np.ascontiguousarray(queries, dtype=np.float32)


def some(queries: Any, rows: IntArray) -> Any:
    if isinstance(queries, np.ndarray):
        return np.ascontiguousarray(queries[rows])
    return queries[host_tensor(rows).to(queries.device)]


def widened(positions: IntArray, want: int) -> IntArray:
    """``positions`` (nq, w) with as many columns as were asked for, -1 in the new ones; C-contiguous."""
    if positions.shape[1] == want:
        return np.ascontiguousarray(positions)
    wide = np.full((len(positions), want), -1, np.int64)
    wide[:, : positions.shape[1]] = positions[:, :want]
    return wide


def columns(distances: FloatArray, positions: IntArray, k: int) -> tuple[FloatArray, IntArray]:
    return np.ascontiguousarray(distances[:, :k]), np.ascontiguousarray(positions[:, :k])


def joined(found: list[tuple[FloatArray | None, IntArray]], want: int) -> tuple[FloatArray | None, IntArray]:
    positions = np.concatenate([widened(one, want) for _, one in found])
    if found[0][0] is None:
        return None, positions
    distances = np.full(positions.shape, np.inf, np.float32)
    row = 0
    for own, _ in found:
        if own is not None:
            distances[row : row + len(own), : own.shape[1]] = own
            row += len(own)
    return distances, positions
