"""The newest rows of a store, on the device of its index."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np

from ...errors import DeviceError, first_line
from ...types import FloatArray, IntArray, Metric, Tensor
from ..base import DeltaRows
from ..bitmap import RowFilter
from ..device_failover import cause_of
from .device_rows import GROUP, DeviceRows, Quantization, padded_columns, padded_groups
from .memory_accounting import Account, resident_bytes
from .runtime import host_tensor, load_torch, sent
from .search import LEAST_CANDIDATES, SPARE_GROUPS, Search, columns, found_in_batches
from .upload import DeviceIndex

_LEAST_ROWS = 4096


class DeviceDeltaBuffer:
    """Newer rows: float16 proposes and float32 decides, as in an index. Used under the device's lock.

    Its capacity doubles when it is full. Where the device has no memory, or float16 cannot hold a row in the index's
    space, ``search`` returns None from then on: the host scans the delta buffer until there is a new index.
    """

    def __init__(
        self,
        newer: DeltaRows,
        metric: Metric,
        quantization: Quantization,
        beside: DeviceIndex,
        account: Account,
        note: Callable[[str], None],
    ) -> None:
        """Keep the rows.

        Args:
            newer: the rows.
            metric: of the store.
            quantization: of the index.
            beside: what the index holds.
            account: of its device.
            note: called with the reason when the device does not take the rows.
        """
        self.newer = newer
        self._metric: Metric = metric
        self._quantization = quantization
        self._beside = beside
        self._account = account
        self._note = note
        self._rows: DeviceRows | None = None
        self._giving: Callable[[], object] = _nothing
        self._n = self._room = 0
        self._masked: tuple[RowFilter, int, DeviceRows] | None = None
        self._refused = False

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        rows = self._rows
        return 0 if rows is None else rows.nbytes

    def search(
        self, n: int, queries: FloatArray | Tensor, k: int, row_filter: RowFilter | None, batch: int
    ) -> tuple[FloatArray, IntArray] | None:
        """The k nearest of the first ``n`` rows, those that ``row_filter`` (over n rows) does not name left out.

        distances float32 (nq, k), positions int64 (nq, k), +inf and -1 where there are fewer; at most ``batch`` queries
        at once.
        """
        rows = self._up_to(n)
        if rows is None:
            return None
        rows = self._shown(rows, n, row_filter)
        want = max(2 * k, LEAST_CANDIDATES)
        search = Search(
            rows, self._beside.device, self._beside.operations, None, self._account, self._metric == "cosine"
        )
        distances, positions = found_in_batches(search, queries, (want, k + SPARE_GROUPS), batch)
        if distances is None:  # rows in float32 are always there
            raise DeviceError("the delta buffer on the device has no float32 rows")
        return columns(distances, positions, k)

    def _up_to(self, n: int) -> DeviceRows | None:
        """The rows with at least the first ``n`` in them."""
        try:
            if n > self._room and not self._refused:
                self._grow(n)
            for block in self.newer.blocks(self._n, n) if n > self._n else ():
                if not self._refused:
                    self._put(block)
        except (RuntimeError, MemoryError) as error:
            if cause_of(error) not in {"out-of-memory", "limit"}:
                self._drop()  # a half-written row would be seen by searches of the rows before it
                raise
            self._refuse(first_line(error))
        return None if self._refused else self._rows

    def _grow(self, n: int) -> None:
        dim, old = len(self._quantization.centre), self._rows
        room = max(_LEAST_ROWS, 2 * n)
        amount = resident_bytes(room, dim, "float32", float32_rows=True)
        self._account.take(amount, f"{n} new rows")
        giving = weakref.finalize(self, self._account.give, amount)
        try:
            shape = (room, dim, padded_groups(-(-room // GROUP)))
            metric: Metric = "ip" if self._metric == "ip" else "l2"
            rows = DeviceRows.empty(metric, self._quantization, shape, self._beside.device, float32_rows=True)
            if old is not None:
                rows.take_over(old, load_torch().arange(old.groups, device=self._beside.device))
        except (RuntimeError, MemoryError):
            giving()
            raise
        self._rows, self._room, self._masked = rows, room, None
        self._giving()
        self._giving = giving

    def _put(self, block: FloatArray) -> None:
        if self._rows is None or not self._quantization.holds(block):
            self._refuse("new rows lie too far from the others for float16")
            return
        device = self._beside.device
        vectors = sent(block, device)
        self._rows.put(self._n, self._quantization.enter(vectors, padded_columns(block.shape[1]), device), vectors)
        self._n += len(block)

    def _refuse(self, why: str) -> None:
        self._refused = True
        self._drop()
        self._note(f"the host scans the newest rows ({why})")

    def _drop(self) -> None:
        self._rows = self._masked = None
        self._n = self._room = 0
        self._giving()
        self._giving = _nothing

    def _shown(self, rows: DeviceRows, n: int, row_filter: RowFilter | None) -> DeviceRows:
        """The allowed ones of the first ``n`` rows; rows that an older view does not know are hidden."""
        if row_filter is None and n == self._n:
            return rows
        if self._masked is not None and self._masked[0] is row_filter and self._masked[1] == n:
            return self._masked[2]
        shown = np.zeros(self._room, np.bool_)
        shown[:n] = True if row_filter is None else row_filter.rows
        own = rows.only(host_tensor(shown).to(self._beside.device))
        if row_filter is not None:
            self._masked = (row_filter, n, own)
        return own


def _nothing() -> None:
    """There is nothing to give back."""
