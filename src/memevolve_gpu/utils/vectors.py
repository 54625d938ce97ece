"""Vectors at the border: what comes in is checked here once, and is float32 from then on.

Anything array-like is taken: lists of numbers, numpy arrays, torch tensors and cupy arrays on any device. Integers and
floats of every width become float32; strings, booleans, complex numbers and objects are refused, and so are NaN,
infinity and values that float32 cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DimensionMismatchError, InvalidVectorError
from ..types import FloatArray, Metric
from .device_arrays import fetched, lies_on_device

__all__ = ["check_vector", "check_vectors", "cosines", "normalize_rows", "to_host"]

_LARGEST = 1e18
_SMALLEST_SAFE = 1e-30
_LARGEST_SAFE = 1e30
"""Squared float32 norms between these two lose nothing; beyond them they may under- or overflow: float64 then."""


def check_vector(array: Any, dim: int, metric: Metric, *, name: str = "embedding") -> FloatArray:
    """Check one vector; (dim,) or (1, dim) of numbers in, float32 (dim,) out. It may share memory with ``array``.

    The length is not changed: see :func:`normalize_rows`. ``name`` is the parameter that the messages blame.

    Raises DimensionMismatchError for another length and InvalidVectorError for a wrong type or shape, NaN, infinity,
    values beyond float32, or a zero vector under cosine.
    """
    raw = to_host(array, name=name)
    if raw.ndim == 2 and raw.shape[0] == 1:
        raw = raw[0]
    if raw.ndim != 1:
        raise InvalidVectorError(f"{name} must be one vector of shape ({dim},), got shape {raw.shape}; pass one row")
    if raw.shape[0] != dim:
        raise DimensionMismatchError(dim, raw.shape[0], _dimension_remedy(name))
    vector = _to_float32(raw)
    square = _squares(vector[np.newaxis])[0]
    if not _SMALLEST_SAFE < square < _LARGEST_SAFE:
        _check_row(raw, vector, metric, name)
    return vector


def check_vectors(array: Any, dim: int, metric: Metric, *, name: str = "embeddings") -> FloatArray:
    """Check n vectors; (n, dim) of numbers in, C-contiguous float32 (n, dim) out. It may share memory with ``array``.

    No vectors at all (an empty list, or shape (0, anything)) give shape (0, dim). ``name`` as in :func:`check_vector`;
    a message about one vector names its row, ``embeddings[17]``.

    Raises DimensionMismatchError for another length and InvalidVectorError for a wrong type or shape, NaN, infinity,
    values beyond float32, or a zero vector under cosine.
    """
    raw = _rows_to_host(array, dim, name)
    if raw.shape[0] == 0:
        return np.empty((0, dim), dtype=np.float32)
    if raw.ndim != 2:
        raise InvalidVectorError(f"{name} must have shape (n, {dim}), got shape {raw.shape}; pass one row per vector")
    if raw.shape[1] != dim:
        raise DimensionMismatchError(dim, raw.shape[1], _dimension_remedy(name))
    vectors = _to_float32(raw)
    squares = _squares(vectors)
    usual = (squares > _SMALLEST_SAFE) & (squares < _LARGEST_SAFE)
    if usual.all():
        return vectors
    for row in np.flatnonzero(~usual):
        _check_row(raw[row], vectors[row], metric, f"{name}[{row}]")
    return vectors


def cosines(vector: FloatArray, rows: Mapping[str, FloatArray]) -> dict[str, float]:
    """The cosine between ``vector`` (dim,) and each of ``rows`` (dim,), by name; 0.0 where one of the two is zero."""
    if not rows:
        return {}
    table = np.array(list(rows.values()))
    lengths = np.linalg.norm(table, axis=1) * np.linalg.norm(vector)
    found = table @ vector / np.where(lengths > 0, lengths, 1)
    return dict(zip(rows, found.tolist(), strict=True))


def normalize_rows(vectors: FloatArray) -> FloatArray:
    """Scale every row of float32 (n, dim) to L2 norm 1; a new float32 (n, dim), zero rows stay zero.

    A row's result does not depend on the rows beside it, so a vector stored alone or in a batch has the same bytes.
    """
    squares = _squares(vectors)
    safe = (squares > _SMALLEST_SAFE) & (squares < _LARGEST_SAFE)
    factors = np.ones_like(squares)
    np.divide(1.0, np.sqrt(squares), out=factors, where=safe)
    scaled: FloatArray = vectors * factors[:, None]
    odd = np.flatnonzero(~safe)
    if odd.size:
        exact = vectors[odd].astype(np.float64)
        norms = np.sqrt(np.einsum("ij,ij->i", exact, exact))
        norms[norms == 0.0] = 1.0
        scaled[odd] = exact / norms[:, None]
    return scaled


def to_host(array: Any, *, name: str = "embedding") -> npt.NDArray[Any]:
    """Bring an array-like of real numbers to a numpy array of its own dtype, from a GPU as well.

    Raises InvalidVectorError when it is no array of real numbers.
    """
    try:
        raw = np.asarray(_off_device(array))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidVectorError(f"{name} is no array of numbers: {error}; pass numbers of one shape") from error
    if raw.dtype.kind not in "fiu":
        kind = type(array).__name__ if raw.dtype.kind == "O" else raw.dtype.name
        raise InvalidVectorError(f"{name} must hold real numbers, got {kind}; pass floats")
    return raw


def _off_device(array: Any) -> Any:
    """Unwrap torch tensors, and bring over what says that it lies on a GPU; no library is imported for it."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "detach") and hasattr(array, "cpu"):
        tensor = array.detach().cpu()
        try:
            return tensor.numpy()
        except TypeError:  # bfloat16 and its like have no numpy dtype; float32 holds them all
            return tensor.float().numpy()
    return fetched(array) if lies_on_device(array) else array


def _rows_to_host(array: Any, dim: int, name: str) -> npt.NDArray[Any]:
    """``to_host`` for many vectors: unwraps lists of tensors and names the row whose length differs from ``dim``."""
    if not isinstance(array, (list, tuple)):
        return np.atleast_1d(to_host(array, name=name))
    if not array:
        return np.empty((0, dim), dtype=np.float32)
    rows = [_off_device(row) for row in array]
    for number, row in enumerate(rows):
        size = len(row) if hasattr(row, "__len__") and not isinstance(row, (str, bytes)) else dim
        if size != dim:
            raise DimensionMismatchError(dim, size, _dimension_remedy(f"{name}[{number}]"))
    return np.atleast_1d(to_host(rows, name=name))


def _to_float32(raw: npt.NDArray[Any]) -> FloatArray:
    if raw.dtype == np.float32 and raw.flags.c_contiguous:
        same: FloatArray = raw
        return same
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(raw, dtype=np.float32)


def _squares(vectors: FloatArray) -> FloatArray:
    """Squared norms, float32 (n,), infinite where they overflow; einsum warns of nothing."""
    squares: FloatArray = np.einsum("ij,ij->i", vectors, vectors)
    return squares


def _check_row(raw: npt.NDArray[Any], vector: FloatArray, metric: Metric, name: str) -> None:
    """Judge one vector whose squared norm is unusual; huge and tiny ones may still be good."""
    if not np.isfinite(raw).all():
        raise InvalidVectorError(f"{name} contains NaN or infinity; check the embedding function for this text")
    if not np.isfinite(vector).all():
        largest = max(math.fabs(float(raw.max())), math.fabs(float(raw.min())))
        raise InvalidVectorError(f"{name} holds {largest:g}, beyond float32 (3.4e38); scale the vectors down")
    if max(float(vector.max(initial=0.0)), -float(vector.min(initial=0.0))) > _LARGEST:
        raise InvalidVectorError(f"{name} holds values beyond 1e18, whose squares overflow; scale the vectors down")
    if metric == "cosine" and not vector.any():
        raise InvalidVectorError(
            f"{name} is a zero vector, which has no direction under cosine; use l2 or leave it out"
        )


def _dimension_remedy(name: str) -> str:
    return f"{name} must come from the embedding model that the store was made with"
