"""Queries that lie on a GPU and stay there: torch tensors, cupy arrays, and whatever else speaks DLPack."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DeviceError
from ..types import FloatArray, Metric

__all__ = ["DeviceQueries", "as_tensor", "device_queries", "fetched", "lies_on_device", "wait_for_maker"]

_CUDA = (2, 13)
"""Kinds of devices in DLPack's header (dlpack.h): kDLCUDA and kDLCUDAManaged."""
_SMALLEST_SAFE = 1e-30
_LARGEST_SAFE = 1e30
"""As in :mod:`.vectors`: squared norms outside are looked at closely, on the host."""


_REFUSALS = (RuntimeError, TypeError, ValueError, BufferError, AttributeError, AssertionError)
"""What libraries raise for an array that they cannot take; torch without CUDA asserts."""


class DeviceQueries:
    """nq queries on a device, checked there; a view of the caller's memory where its type allows.

    tensor: torch, float32 (nq, dim), contiguous; of length 1 under cosine. To everything else this looks like a numpy
    array, and comes to the host when it is first read as one.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self._host: FloatArray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(nq, dim)."""
        return int(self.tensor.shape[0]), int(self.tensor.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: Any) -> Any:
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


def lies_on_device(array: Any) -> bool:
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


def device_queries(array: Any, dim: int, metric: Metric, *, torch: Any = None) -> DeviceQueries | None:
    """``array`` (nq, dim) of real numbers as queries that stay on their device.

    Args:
        array: whatever the caller gave.
        dim: length of a vector.
        metric: under cosine the queries are normalised, on the device.
        torch: the module; None takes it where it is loaded already.

    Returns:
        None when it does not lie on a device, torch is not loaded, or anything about it is unusual (shape, numbers, a
        length next to zero): the host's own checks then say what, or make do with it.
    """
    torch = torch or sys.modules.get("torch")
    if torch is None or not lies_on_device(array):
        return None
    try:
        return _checked(as_tensor(array, torch), dim, metric, torch)
    except _REFUSALS:
        return None


def fetched(array: Any, *, torch: Any = None, cupy: Any = None) -> Any:
    """``array``, which lies on a device, as a numpy array; as it is where no loaded library can read it.

    torch, cupy: the modules; None takes them where they are loaded already. Whoever made such an array has one of them,
    or an array that copies itself by ``get`` or ``copy_to_host``.
    """
    for copies in ("get", "copy_to_host"):
        if hasattr(array, copies):
            return getattr(array, copies)()
    torch, cupy = torch or sys.modules.get("torch"), cupy or sys.modules.get("cupy")
    try:
        if torch is not None:
            return as_tensor(array, torch).cpu().numpy()
        if cupy is not None:
            return (cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else cupy.asarray(array)).get()
    except _REFUSALS:
        return array
    return array


def as_tensor(array: Any, torch: Any, device: Any = "cuda") -> Any:
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


def wait_for_maker(array: Any, torch: Any) -> None:
    """Wait for the stream on which ``array`` is being filled, as its ``__cuda_array_interface__`` (version 3) names it.

    torch does not. 1 is the default stream, behind which torch's own work queues up by itself; 2 is that of the
    calling thread.
    """
    stream = array.__cuda_array_interface__.get("stream")
    if stream not in (None, 0, 1):
        torch.cuda.ExternalStream(stream).synchronize()


def _checked(tensor: Any, dim: int, metric: Metric, torch: Any) -> DeviceQueries | None:
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
