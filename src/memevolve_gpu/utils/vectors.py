"""Check vectors at the border: float32 from then on, on the host or as device queries.

Anything array-like is taken: lists of numbers, numpy arrays, torch tensors and cupy arrays on any device. Integers and
floats of every width become float32; strings, booleans, complex numbers and objects are refused, and so are NaN,
infinity and values that float32 cannot hold.
"""

from __future__ import annotations

import base64
import math
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DeviceError, DimensionMismatchError, InvalidVectorError, MemEvolveError
from ..types import AnyArray, Device, FloatArray, IntArray, Metric, Tensor

_CUDA = (2, 13)
"""Kinds of devices in DLPack's header (dlpack.h): kDLCUDA and kDLCUDAManaged."""
_SMALLEST_SAFE = 1e-30
_LARGEST_SAFE = 1e30
"""Squared norms outside are looked at closely, on the host."""

_REFUSALS = (RuntimeError, TypeError, ValueError, BufferError, AttributeError, AssertionError)
"""What libraries raise for an array that they cannot take; torch without CUDA asserts."""


class DeviceQueries:
    """nq queries on a device, checked there; a view of the caller's memory where its type allows.

    tensor: torch, float32 (nq, dim), contiguous; of length 1 under cosine. To everything else this looks like a numpy
    array, and comes to the host when it is first read as one.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._host: FloatArray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(nq, dim)."""
        return int(self.tensor.shape[0]), int(self.tensor.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: int | slice | IntArray) -> FloatArray:
        return self.host()[which]

    def host(self) -> FloatArray:
        """The queries as float32 (nq, dim) on the host; copied once.

        Raises DeviceError when the device does not give them up: it is lost, and they are with it.
        """
        if self._host is None:
            try:
                self._host = np.ascontiguousarray(self.tensor.cpu().numpy(), dtype=np.float32)
            except RuntimeError as error:
                raise DeviceError(
                    f"queries cannot be read from their device ({error}); give them as an array of the host",
                    "device-lost",
                ) from error
        return self._host

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        found = self.host() if dtype is None else self.host().astype(dtype, copy=False)
        return found.copy() if copy else found


def lies_on_device(array: object) -> bool:
    """Does ``array`` say that it lies on a GPU?"""
    if isinstance(array, np.ndarray):
        return False
    if getattr(array, "is_cuda", False) is True or hasattr(array, "__cuda_array_interface__"):
        return True
    where = getattr(array, "__dlpack_device__", None)
    try:
        return where is not None and int(where()[0]) in _CUDA
    except (RuntimeError, TypeError, ValueError, BufferError):
        return False


def device_queries(array: object, dim: int, metric: Metric) -> DeviceQueries | None:
    """``array`` (nq, dim) of real numbers as queries that stay on their device.

    Args:
        array: whatever the caller gave.
        dim: length of a vector.
        metric: under cosine the queries are normalised, on the device.

    Returns:
        None when it does not lie on a device, torch is not loaded, or anything about it is unusual (shape, numbers, a
        length next to zero): the host's own checks then say what, or make do with it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not lies_on_device(array):
        return None
    try:
        return _checked(as_tensor(array, torch), dim, metric, torch)
    except _REFUSALS:
        return None


def fetched(array: Any, *, torch: ModuleType | None = None) -> Any:
    """``array``, which lies on a device, as a numpy array; as it is where no loaded library can read it.

    torch: the module; None takes it where it is loaded already. A caller that made such an array has it, or cupy, or an
    array that copies itself by ``get`` or ``copy_to_host``.
    """
    for copies in ("get", "copy_to_host"):
        if hasattr(array, copies):
            return getattr(array, copies)()
    torch, cupy = torch or sys.modules.get("torch"), sys.modules.get("cupy")
    try:
        if torch is not None:
            return as_tensor(array, torch).cpu().numpy()
        if cupy is not None:
            return (cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else cupy.asarray(array)).get()
    except _REFUSALS:
        return array
    return array


def as_tensor(array: Any, torch: ModuleType, device: Device = "cuda") -> Tensor:
    """``array`` as a torch tensor of its memory.

    Taken are torch tensors, what has ``__dlpack__``, whose maker is asked to wait until it is filled, and what has
    ``__cuda_array_interface__``, where the stream that it names is waited for; ``device`` is where that lies.
    """
    if isinstance(array, torch.Tensor):
        return array.detach()
    if hasattr(array, "__dlpack__"):
        return torch.from_dlpack(array)
    wait_for_maker(array, torch)
    return torch.as_tensor(array, device=device)


def wait_for_maker(array: Any, torch: ModuleType) -> None:
    """Wait for the stream on which ``array`` is being filled, as its ``__cuda_array_interface__`` (version 3) names it.

    torch does not. 1 is the default stream, behind which torch's own work queues up by itself; 2 is that of the
    calling thread.
    """
    stream = array.__cuda_array_interface__.get("stream")
    if stream not in (None, 0, 1):
        torch.cuda.ExternalStream(stream).synchronize()


def _checked(tensor: Tensor, dim: int, metric: Metric, torch: ModuleType) -> DeviceQueries | None:
    if tensor.ndim != 2 or not len(tensor) or tensor.shape[1] != dim:
        return None
    if tensor.dtype == torch.bool or tensor.is_complex():
        return None
    queries = tensor.to(torch.float32).contiguous()
    squares = (queries * queries).sum(1)
    if not bool(((squares > _SMALLEST_SAFE) & (squares < _LARGEST_SAFE)).all()):
        return None
    if metric == "cosine":
        queries = queries * squares.rsqrt()[:, None]
    return DeviceQueries(queries)


_LARGEST = 1e18


def usual_vector(array: object, dim: int | None) -> FloatArray | None:
    """``array`` if it is plainly a float32 vector of ``dim`` usual numbers, which spares the steps of a full check."""
    if type(array) is not np.ndarray or array.dtype != np.float32 or array.shape != (dim,):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        usual = array.flags.c_contiguous and _SMALLEST_SAFE < array.dot(array) < _LARGEST_SAFE
    return array if usual else None


def check_vector(array: object, dim: int, metric: Metric, *, name: str = "embedding") -> FloatArray:
    """Check one vector; (dim,) or (1, dim) of numbers in, float32 (dim,) out. It may share memory with ``array``.

    The length is not changed: see :func:`normalize_rows`. ``name`` is the parameter that the messages blame.

    Raises DimensionMismatchError for another length and InvalidVectorError for a wrong type or shape, NaN, infinity,
    values beyond float32, or a zero vector under cosine.
    """
    usual = usual_vector(array, dim)
    if usual is not None:
        return usual
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


def check_vectors(array: object, dim: int, metric: Metric, *, name: str = "embeddings") -> FloatArray:
    """Check n vectors; (n, dim) of numbers in, C-contiguous float32 (n, dim) out. It may share memory with ``array``.

    No vectors at all (an empty list, or shape (0, anything)) give shape (0, dim). ``name`` as in :func:`check_vector`;
    a message about one vector names its row, ``embeddings[17]``.

    Raises DimensionMismatchError for another length and InvalidVectorError for a wrong type or shape, NaN, infinity,
    values beyond float32, or a zero vector under cosine.
    """
    if type(array) is np.ndarray and array.ndim == 2 and len(array) == 1 and usual_vector(array[0], dim) is not None:
        return array
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


def from_bytes(raw: Sequence[bytes], metric: Metric) -> FloatArray:
    """Stored vectors, each ``dim`` little-endian float32, as float32 (n, dim), normalised under cosine; n is not 0."""
    vectors: FloatArray = np.frombuffer(b"".join(raw), dtype="<f4").reshape(len(raw), -1)
    return normalize_rows(vectors) if metric == "cosine" else vectors


def packed(vector: object) -> str:
    """The base64 of a vector's float32, little-endian: exact, and a third of the length of decimals."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> FloatArray:
    """The vector of :func:`packed`, float32 (n,). Raises ValueError for any other text."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")


def read_vector(value: object, name: str, error: type[MemEvolveError] = InvalidVectorError) -> FloatArray:
    """A vector in JSON, as a list of numbers or as :func:`packed` gives it: float32 (n,).

    Numbers beyond float32 become infinite. Raises ``error``, which names ``name``, for anything else.
    """
    try:
        with np.errstate(over="ignore"):
            vector = unpacked(value) if isinstance(value, str) else np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as wrong:
        raise error(f"{name} must be a list of numbers or the base64 of little-endian float32: {wrong}") from None
    if vector.ndim != 1:
        raise error(f"{name} must be one list of numbers, got shape {vector.shape}")
    return vector


def to_host(array: object, *, name: str = "embedding") -> AnyArray:
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


def host_queries(queries: object) -> FloatArray:
    """Checked queries, from wherever they are, as float32 (nq, dim) on the host.

    Raises:
        DeviceError: their device does not give them up.
    """
    if isinstance(queries, np.ndarray):
        return queries
    if hasattr(queries, "detach"):
        queries = DeviceQueries(queries.detach())
    if isinstance(queries, DeviceQueries):
        return queries.host()
    return np.ascontiguousarray(_off_device(queries), dtype=np.float32)


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


def _rows_to_host(array: object, dim: int, name: str) -> AnyArray:
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


def _check_row(raw: AnyArray, vector: FloatArray, metric: Metric, name: str) -> None:
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
