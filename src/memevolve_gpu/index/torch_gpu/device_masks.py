"""Filters and tombstones on the device."""

from __future__ import annotations

from dataclasses import replace

from ...utils.forking import lock
from ...utils.lru import LruCache
from ..bitmap import RowFilter
from .device_rows import DeviceRows
from .runtime import host_tensor

_KEPT_BYTES = 64 << 20
_KEPT = 8


class Masks:
    """The last few filters as rows with the others hidden: 4 bytes per row and filter, 64 MB in all or one.

    A filter is known by its object, which is kept alive while it is cached here.
    """

    def __init__(self) -> None:
        self._kept: LruCache[int, tuple[RowFilter, DeviceRows]] = LruCache(_KEPT)
        self._lock = lock()

    def rows(self, rows_on_device: DeviceRows, row_filter: RowFilter) -> DeviceRows:
        """``rows_on_device`` with the rows hidden that ``row_filter`` excludes; positions stay."""
        with self._lock:
            known = self._kept.get(id(row_filter))
            if known is not None:
                return known[1]
            shown = host_tensor(row_filter.rows.view("u1")).to(rows_on_device.x.device).bool()
            hidden = rows_on_device.only(shown)
            self._kept.capacity = max(1, min(_KEPT, _KEPT_BYTES // (hidden.bias.numel() * 4)))
            self._kept.put(id(row_filter), (row_filter, hidden))
            return hidden

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()


class Tombstones:
    """The tombstones in an index's ``living`` scores: a mask that only receives what died since, never all of it.

    Used under the device's lock.
    """

    def __init__(self, rows_on_device: DeviceRows) -> None:
        self.rows = replace(rows_on_device, bias=rows_on_device.living)
        """The rows without those that died, the same tensors all the time."""
        self._bias = rows_on_device.bias
        self._shown: RowFilter | None = None
        self._whole = True

    def show(self, alive: RowFilter) -> bool:
        """Hide what is not ``alive``; False where the difference is not known, as for a filter."""
        dead = alive.dead_since(self._shown) if self._whole else None
        again = dead is None
        if dead is None:
            dead = alive.dead_since(None)
        if dead is None:
            return False
        self._whole = False  # should the device fail half-way
        if again:
            self.rows.bias.copy_(self._bias)
        if len(dead):
            positions = host_tensor(dead).to(self._bias.device)
            places = positions if self.rows.places is None else self.rows.places[positions].long()
            self.rows.bias.index_fill_(0, places, float("inf"))
        self._shown, self._whole = alive, True
        return True
