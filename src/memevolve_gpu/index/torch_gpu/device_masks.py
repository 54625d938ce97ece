"""Filters and tombstones on the device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

from ...utils.forking import renew_in_child
from ..bitmap import Allowed
from .device_rows import Resident
from .runtime import host_tensor

__all__ = ["Masks", "Tombstones"]

_KEPT_BYTES = 64 << 20
_KEPT = 8


class Masks:
    """The last few filters as rows with the others hidden: 4 bytes per row and filter, 64 MB in all or one.

    A filter is known by the object that states it, which is kept alive as long as it is remembered here.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[Allowed, Resident]] = OrderedDict()
        self._lock = threading.Lock()
        renew_in_child(self)

    def after_fork(self) -> None:
        """In a forked child: a lock that nobody holds."""
        self._lock = threading.Lock()

    def rows(self, resident: Resident, allowed: Allowed) -> Resident:
        """``resident`` with the rows hidden that are not ``allowed``; the same numbers in the same places."""
        with self._lock:
            known = self._kept.get(id(allowed))
            if known is not None:
                self._kept.move_to_end(id(allowed))
                return known[1]
            shown = host_tensor(allowed.rows.view("u1")).to(resident.x.device).bool()
            hidden = resident.only(shown)
            self._kept[id(allowed)] = (allowed, hidden)
            most = max(1, min(_KEPT, _KEPT_BYTES // (hidden.bias.numel() * 4)))
            while len(self._kept) > most:
                self._kept.popitem(last=False)
            return hidden

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()


class Tombstones:
    """The deaths that a body's ``living`` scores show: a mask that grows by what died since, and is never sent whole.

    Used under the device's lock.
    """

    def __init__(self, resident: Resident) -> None:
        self.rows = replace(resident, bias=resident.living)
        """The rows without those that died, the same tensors all the time."""
        self._bias = resident.bias
        self._shown: Allowed | None = None
        self._whole = True

    def show(self, alive: Allowed) -> bool:
        """Have ``rows`` show what is ``alive``; False where that is not known by what died, as of a filter."""
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
