"""Device memory: predicted before an index is built, counted while it lives, held below a limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import DeviceError
from ...types import Precision
from ...utils.forking import lock
from .device_rows import GROUP, padded_columns, padded_groups

SCRATCH = 512 << 20
"""Bytes that a search or a build takes beside the rows, at most; queries are cut into parts that keep to it."""
WORKSPACE = 32 << 20
"""What cuBLAS takes for the one stream that the engine works on, for good (32 MiB on Hopper, less before it)."""
_ROW_EXTRA = 12
"""Bias, and bias of the living, float32; position, int32."""
_PLACE = 4
"""Where a row lies, int32; without lists it lies at its position."""
_SMALL = 4096
"""What an allocator rounds up, over all small tensors."""


def resident_bytes(count: int, dim: int, precision: Precision, *, nlist: int = 0, float32_rows: bool = False) -> int:
    """Bytes that stay on the device for ``count`` rows of ``dim`` columns.

    float16 rows unless ``precision`` is int8, padded to a multiple of 16 columns and 32 rows (a list: half a group on
    average); ``float32_rows``: float32 rows beside them, which decide there instead of on the host.
    """
    groups = padded_groups(-(-count // GROUP) + (nlist + 1) // 2)
    return bytes_in_groups(groups, count, dim, precision, nlist=nlist, float32_rows=float32_rows) + _SMALL


def bytes_in_groups(groups: int, count: int, dim: int, precision: Precision, *, nlist: int, float32_rows: bool) -> int:
    """:func:`resident_bytes` once the number of ``groups`` is known, padding included."""
    columns = padded_columns(dim)
    row = columns * (1 if precision == "int8" else 2) + _ROW_EXTRA + (4 if precision == "int8" else 0)
    lists = nlist * (4 * columns + 12) + (_PLACE * count if nlist else 0)
    return groups * GROUP * row + (4 * count * dim if float32_rows else 0) + lists


def predicted_bytes(count: int, dim: int, precision: Precision, *, nlist: int = 0, float32_rows: bool = False) -> int:
    """:func:`resident_bytes` and the scratch of searches: what :class:`~....types.IndexPlan` calls ``device_bytes``.

    A plan whose ``device_bytes`` reach this with ``float32_rows`` gets float32 rows on the device.
    """
    return resident_bytes(count, dim, precision, nlist=nlist, float32_rows=float32_rows) + SCRATCH + WORKSPACE


class Account:
    """What the indexes of this process hold on one device. ``limit`` in bytes may be set at any time; None: no
    limit."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.limit: int | None = None
        self.used = WORKSPACE if device.startswith("cuda") else 0
        self._lock = lock()  # a finaliser that runs while it is held gives bytes back, too

    def take(self, amount: int, purpose: str) -> None:
        """Count ``amount`` bytes as used.

        Raises:
            DeviceError: the limit would be passed; its cause is ``limit``.
        """
        with self._lock:
            if self.limit is not None and self.used + amount > self.limit:
                raise DeviceError(
                    f"device {self.device}: {purpose} needs {amount >> 20} MB, {self.used >> 20} of {self.limit >> 20} "
                    "MB are in use; raise gpu_memory_fraction or gpu_max_memory_mb, or free GPU memory",
                    "limit",
                )
            self.used += amount

    def give(self, amount: int) -> None:
        """Count ``amount`` bytes as free again."""
        with self._lock:
            self.used -= amount

    @contextmanager
    def scratch(self, amount: int, purpose: str) -> Iterator[None]:
        """``amount`` bytes for the time of the block."""
        self.take(amount, purpose)
        try:
            yield
        finally:
            self.give(amount)


_accounts: dict[str, Account] = {}
_accounts_lock = lock()


def account_of(device: str) -> Account:
    """The account of ``device``, one for the whole process."""
    with _accounts_lock:
        return _accounts.setdefault(device, Account(device))
