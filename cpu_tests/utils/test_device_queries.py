"""Arrays that lie on a GPU: recognised by what they say, checked where they lie, brought over where they must be."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import SEED

from memevolve_gpu.errors import DeviceError, InvalidVectorError
from memevolve_gpu.utils.vectors import (
    DeviceQueries,
    check_vectors,
    device_queries,
    fetched,
    lies_on_device,
    wait_for_maker,
)

ROWS = np.random.default_rng(SEED).standard_normal((4, 8)).astype(np.float32)
KINDS = ["dlpack", "interface"]


class OnGpu:
    """Something on a GPU that speaks one protocol and has no methods to copy itself."""

    def __init__(self, rows: Any, kind: str) -> None:
        self.rows = rows
        if kind == "interface":
            self.__cuda_array_interface__ = {"shape": rows.shape}
        else:
            self.__dlpack__ = lambda **_arguments: None
            self.__dlpack_device__ = lambda: (2, 0)


class Tensor:
    """As much of a CUDA tensor as fetching needs."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> Any:
        return self.rows


def fake_torch() -> Any:
    return SimpleNamespace(
        Tensor=Tensor,
        from_dlpack=lambda array: Tensor(array.rows),
        as_tensor=lambda array, device: Tensor(array.rows) if device == "cuda" else None,
    )


def fake_cupy() -> Any:
    got = SimpleNamespace
    return SimpleNamespace(
        from_dlpack=lambda array: got(get=lambda: array.rows), asarray=lambda array: got(get=lambda: array.rows)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_on_a_device_is_recognised_by_its_word(kind: str) -> None:
    assert lies_on_device(OnGpu(ROWS, kind))
    assert lies_on_device(SimpleNamespace(is_cuda=True))


def test_arrays_of_the_host_are_not_taken_for_others() -> None:
    torch = pytest.importorskip("torch")
    for array in (ROWS, ROWS.tolist(), torch.from_numpy(ROWS), "text", None, SimpleNamespace(is_cuda=False)):
        assert not lies_on_device(array)
        assert device_queries(array, 8, "l2") is None

    def broken() -> Any:
        raise RuntimeError("the device is gone")

    assert not lies_on_device(SimpleNamespace(__dlpack_device__=broken))


@pytest.mark.parametrize("kind", KINDS)
def test_whichever_library_is_loaded_brings_it_over(kind: str) -> None:
    array = OnGpu(ROWS, kind)
    assert fetched(array, torch=fake_torch()) is ROWS
    assert fetched(SimpleNamespace(copy_to_host=lambda: ROWS)) is ROWS
    assert fetched(SimpleNamespace(get=lambda: ROWS)) is ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_cupy_serves_where_torch_is_not_loaded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    np.testing.assert_array_equal(check_vectors(OnGpu(ROWS, kind), 8, "l2"), ROWS)


def test_what_nobody_can_read_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "cupy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidVectorError, match="queries must hold real numbers, got OnGpu"):
        check_vectors(OnGpu(ROWS, "interface"), 8, "l2", name="queries")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_every_width_becomes_float32_on_the_device(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = (10 * torch.from_numpy(ROWS)).to(getattr(torch, dtype))
    tensor[:, 0] = 3
    found = device_queries(Claims(tensor), 8, "cosine")
    assert found is not None
    assert found.tensor.dtype == torch.float32
    np.testing.assert_allclose(np.linalg.norm(found.host(), axis=1), 1, rtol=1e-5)


class Claims:
    """A tensor of the host that says that it lies elsewhere."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.__cuda_array_interface__ = {"shape": tuple(tensor.shape)}

    def __dlpack__(self, **_arguments: Any) -> Any:
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def test_what_is_unusual_is_left_to_the_host() -> None:
    torch = pytest.importorskip("torch")
    good = torch.from_numpy(ROWS)
    zero = good.clone()
    zero[2] = 0
    for odd in (good[0], good[:0], good[:, :5], good > 0, good.to(torch.complex64), zero, good * float("nan")):
        assert device_queries(Claims(odd), 8, "cosine") is None
    assert device_queries(Claims(good), 8, "l2") is not None


def test_queries_on_a_device_look_like_an_array_to_everybody_else() -> None:
    torch = pytest.importorskip("torch")
    queries = DeviceQueries(torch.from_numpy(ROWS))
    assert (len(queries), queries.shape) == (4, (4, 8))
    np.testing.assert_array_equal(np.asarray(queries), ROWS)
    np.testing.assert_array_equal(queries[2], ROWS[2])
    assert np.asarray(queries, dtype=np.float64).dtype == np.float64
    copied = np.array(queries, copy=True)
    copied[0] = 0
    np.testing.assert_array_equal(queries.host(), ROWS)


def test_queries_that_went_with_their_device_are_an_error_that_says_so() -> None:
    def gone() -> Any:
        raise RuntimeError("CUDA error: device lost")

    with pytest.raises(DeviceError, match="give them as an array of the host") as caught:
        DeviceQueries(SimpleNamespace(cpu=gone)).host()
    assert caught.value.cause == "device-lost"


@pytest.mark.parametrize(("stream", "waits"), [(None, False), (1, False), (2, True), (77, True)])
def test_the_stream_that_fills_an_array_is_waited_for(stream: int | None, *, waits: bool) -> None:
    waited: list[int] = []

    def external(number: int) -> Any:
        return SimpleNamespace(synchronize=lambda: waited.append(number))

    array = SimpleNamespace(__cuda_array_interface__={"shape": (1,), "stream": stream})
    torch: Any = SimpleNamespace(cuda=SimpleNamespace(ExternalStream=external))
    wait_for_maker(array, torch)
    assert waited == ([stream] if waits else [])
